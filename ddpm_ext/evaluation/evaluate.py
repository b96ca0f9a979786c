"""Pipeline + images -> eval.json and eval.md: every score with what made it.

    eval.json   {"figures": [{"metric": "fid", "value": ..., what it was measured on and how ..., "certificate": ...}]}
    eval.md     the same as tables

A figure is replaced when it is measured again under the same conditions, and kept otherwise. What takes long is done
in pieces (`shards`): the same command after a kill goes on where it stopped.
"""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..data.dataset import ImageSet, load_images
from ..distributed import check_world
from ..pipelines.identity import network_hash, scheduler_options, weights_hash
from ..pipelines.loading import load_pipeline
from ..pipelines.locate import run_folder
from ..run_dir import environment, read_json, write_atomically, write_json
from .config import EvalConfig, recorded, words_of
from .features import Extractor, make_extractor
from .figures import draw_bound, draw_nearest, draw_paper, draw_quality
from .measure import (
    Samples,
    SetBound,
    bits_of,
    images_and_labels,
    is_fixed,
    rows_of,
    sample_features,
    set_bound,
    under_fixed_variance,
)
from .metrics import (
    feature_statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    rbf_mmd,
)
from .plots import figure_class
from .reference import Reference, make_reference
from .report import RESULTS, markdown
from .samplers import chain_conditions, make_scheduler


def evaluate(config: EvalConfig) -> list[dict[str, Any]]:
    """Measure what the options ask for, write eval.json, eval.md and plots, and return the figures measured."""
    accelerator = Accelerator(cpu=config.cpu or not torch.accelerator.is_available())
    check_world(accelerator)
    session = Session(config, accelerator)
    figures: list[dict[str, Any]] = []
    if config.of_bound:
        figures += session.bound_figures()
    if config.of_samples:
        figures += session.sample_figures()
    if accelerator.is_main_process:
        merged = merge(config.folder / "eval.json", figures)
        write_atomically(config.folder / "eval.md", markdown(merged))
        if config.plots:
            session.draw(merged)
    accelerator.wait_for_everyone()
    return figures


def merge(path: Path, figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put figures into eval.json in the place of those measured under the same conditions; return all it holds.

    A figure of an earlier version, which said less of its conditions, makes room when all that it says is the same.
    """

    def identity(figure: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in figure.items() if name not in RESULTS}

    path.parent.mkdir(parents=True, exist_ok=True)
    there = read_json(path)["figures"] if path.exists() else []
    fresh = [identity(figure) for figure in figures]
    merged = [figure for figure in there if not any(agrees(identity(figure), new) for new in fresh)] + figures
    write_json(path, {"format": 1, "figures": merged})
    return merged


def agrees(former: Any, new: Any) -> bool:
    """Whether all that a former figure says is said by a new one, too."""
    if isinstance(former, dict) and isinstance(new, dict):
        return all(name in new and agrees(value, new[name]) for name, value in former.items())
    return former == new


class Session:
    """One evaluation: its model, its images, and what has been measured."""

    def __init__(self, config: EvalConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.folder = config.folder
        self.pipeline = load_pipeline(config.model)
        self.pipeline.to(accelerator.device)
        self.scheduler = self.pipeline.scheduler
        self.weights, self.network = weights_hash(self.pipeline.unet), network_hash(self.pipeline.unet)
        self.training: ImageSet | None = self.images_of_plots() if config.plots else None
        self.extractor: Extractor | None = None
        if config.of_samples:
            self.extractor = make_extractor(
                config.extractor,
                device=accelerator.device,
                size=config.extractor_size,
                weights=config.inception_weights,
            )
        self.started, self.environment = time.perf_counter(), environment()
        self.bounds: dict[str | None, SetBound] = {}
        self.first: Any = None  # the scheduler of the first bound
        self.samples: Samples | None = None
        self.reference: Reference | None = None

    # -- real images --------------------------------------------------------------------------------------------------

    def bound_figures(self) -> list[dict[str, Any]]:
        """bpd and rate_distortion for each variance asked for."""
        config, images = self.config, self.images(self.config.bpd_split)
        count = min(config.max_bpd_images or len(images), len(images))
        figures: list[dict[str, Any]] = []
        for variance in config.variances:
            spacing = config.timestep_spacing if config.bpd_num_inference_steps else None
            scheduler = make_scheduler(self.scheduler, "ddpm", variance, spacing)
            self.started = time.perf_counter()
            found = self.bound(scheduler, images, count)
            self.bounds[scheduler.config.variance_type] = found
            conditions = {
                "dataset": self.dataset(images, config.bpd_split, count),
                "variance_type": scheduler.config.variance_type,
                "num_inference_steps": config.bpd_num_inference_steps or len(scheduler),
                **(chain_conditions(scheduler) if config.bpd_num_inference_steps else {}),
                "num_timesteps_sampled": config.num_timesteps_sampled,
                "decoder_variance": config.decoder_variance,
                "cdf": config.cdf,
                "seed": config.seed,
            }
            if "bpd" in config.of_bound:
                figures.append(self.figure("bpd", **bits_of(found), **conditions))
            if "rate_distortion" in config.of_bound:
                figures.append(self.figure("rate_distortion", **rows_of(found, len(scheduler)), **conditions))
        return figures

    def bound(self, scheduler: Any, images: ImageSet, count: int) -> SetBound:
        """The bound under a scheduler's variance; a second fixed variance follows from the first one's sweep."""
        config = self.config
        swept = [found for found in self.bounds.values() if found.sweep is not None]
        if swept and is_fixed(scheduler) and is_fixed(self.first):
            return under_fixed_variance(swept[0], scheduler)
        self.first = scheduler
        return set_bound(
            self.pipeline.unet,
            scheduler,
            images,
            num_images=count,
            seed=config.seed,
            batch_size=None,
            num_inference_steps=config.bpd_num_inference_steps,
            num_timesteps_sampled=config.num_timesteps_sampled,
            decoder_variance=config.decoder_variance,
            cdf=config.cdf,
            folder=self.folder / "eval_pieces",
            key=self.key(scheduler),
            accelerator=self.accelerator,
        )

    # -- generated images ---------------------------------------------------------------------------------------------

    def sample_figures(self) -> list[dict[str, Any]]:
        """Scores of generated images for every sampler, variance and number of steps."""
        config = self.config
        images = self.images(config.reference_split)
        extractor = self.extractor
        assert extractor is not None
        check_reference(min(config.max_reference_images or len(images), len(images)), config)
        self.reference = make_reference(
            images,
            extractor,
            config.hand_off,
            self.accelerator,
            cache_dir=config.reference_cache,
            num_images=config.max_reference_images,
        )
        if "is" in config.of_samples and self.reference.logits is None:
            raise ValueError(f'is needs a classifier as extractor, and "{config.extractor}" gives no logits.')
        figures: list[dict[str, Any]] = []
        for sampler, variance, steps in self.plan():
            figures += self.scores(images, sampler, variance, steps)
        return figures

    def plan(self) -> list[tuple[str, str | None, int]]:
        """(sampler, variance, steps) of every set of images; only ddpm has a variance to choose."""
        samplers = [
            (sampler, variance)
            for sampler in words_of(self.config.sampler)
            for variance in (self.config.variances if sampler == "ddpm" else [None])
        ]
        return [(*pair, steps) for pair, steps in itertools.product(samplers, self.config.steps)]

    def scores(self, images: ImageSet, sampler: Any, variance: str | None, steps: int) -> list[dict[str, Any]]:
        """The scores of one set of generated images."""
        config, extractor, reference = self.config, self.extractor, self.reference
        assert extractor is not None and reference is not None
        self.started = time.perf_counter()
        scheduler = make_scheduler(self.scheduler, sampler, variance, config.timestep_spacing)
        self.pipeline.register_modules(scheduler=scheduler)
        self.samples = sample_features(
            self.pipeline,
            extractor,
            config.hand_off,
            num_samples=config.num_samples,
            num_inference_steps=steps,
            seed=config.seed,
            batch_size=config.batch_size,
            folder=self.folder / "eval_pieces",
            key=self.key(scheduler),
            accelerator=self.accelerator,
        )
        self.pipeline.register_modules(scheduler=self.scheduler)
        conditions = {
            "sampler": sampler,
            "variance_type": scheduler.config.variance_type if sampler == "ddpm" else None,
            "num_inference_steps": steps,
            **chain_conditions(scheduler),
            "num_samples": config.num_samples,
            "seed": config.seed,
            "extractor": extractor.description,
            "hand_off": config.hand_off,
            "reference": self.dataset(images, config.reference_split, len(reference.features)),
        }
        return [self.figure(metric, **self.score(metric), **conditions) for metric in config.of_samples]

    def score(self, metric: str) -> dict[str, Any]:
        """One score of the images at hand, with its error where it has one."""
        config, reference, samples = self.config, self.reference, self.samples
        assert reference is not None and samples is not None
        features, logits = samples.features
        if metric == "fid":
            note = None
            if len(features) <= features.shape[1]:
                note = f"{len(features)} images for {features.shape[1]} features: biased upwards"
            return {"value": frechet_distance(reference.statistics, feature_statistics(features)), "note": note}
        if metric == "kid":
            found = kernel_distance(
                reference.features, features, num_subsets=config.kid_subsets, subset_size=config.kid_subset_size
            )
            size = {"kid_subsets": config.kid_subsets, "kid_subset_size": config.kid_subset_size}
            return {"value": found.mean, "std": found.std, "standard_error": found.standard_error, **size}
        if metric == "cmmd":
            return {"value": rbf_mmd(reference.features, features)}
        if metric == "is":
            assert logits is not None
            score = inception_score(logits)
            return {"value": score.mean, "std": score.std}
        parts = precision_recall(reference.features, features)
        return {"value": parts.precision, "parts": parts._asdict()}

    # -- shared -------------------------------------------------------------------------------------------------------

    def key(self, scheduler: Any) -> dict[str, Any]:
        """What tells this network under a scheduler from others."""
        return {"weights": self.weights, "network": self.network, "scheduler": scheduler_options(scheduler)}

    def images(self, split: str) -> ImageSet:
        """A split at the network's size."""
        config, unet = self.config, self.pipeline.unet.config
        size = unet["sample_size"]
        if size is None:
            raise ValueError("The network's config names no sample_size: there is no size to bring the images to.")
        name = config.dataset_name or (None if config.data_dir else "digits")
        return load_images(
            name,
            config.dataset_config_name,
            config.data_dir,
            split,
            config.image_column,
            config.label_column,
            resolution=tuple(size) if isinstance(size, (list, tuple)) else size,
            channels=unet["in_channels"],
        )

    def dataset(self, images: ImageSet, split: str, count: int) -> dict[str, Any]:
        """What a figure says of the images it rests on."""
        name = self.config.dataset_name or self.config.data_dir or "digits"
        found = {"name": name, "split": split, "num_images": count, "fingerprint": images.fingerprint}
        return {**found, "resolution": list(images.shape)}  # the network's: pictures of other sizes were brought to it

    def figure(self, metric: str, **more: Any) -> dict[str, Any]:
        """One entry of eval.json."""
        found = {
            "metric": metric,
            "model": self.config.model,
            "weights": self.weights,
            "network": self.network,
            "averaged": self.averaged(),
            **more,
        }
        found["certificate"] = {
            **self.environment,
            "options": recorded(self.config),
            "num_processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
            "wall_time_s": round(time.perf_counter() - self.started, 1),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        if not math.isfinite(found.get("value", 0.0)):
            raise ValueError(f"{metric} came out as {found['value']}: look at the weights and at the extractor.")
        return finite({name: value for name, value in found.items() if value is not None or name not in RESULTS})

    def averaged(self) -> bool | None:
        """Whether the weights are averages, as the option or the run's record says; None where nothing does."""
        run = run_folder(self.config.model)
        if self.config.averaged is not None or run is None or not (run / "config.json").exists():
            return self.config.averaged
        return read_json(run / "config.json").get("config", {}).get("use_ema")

    def draw(self, figures: list[dict[str, Any]]) -> None:
        """The plots that the measurements allow, in the folder `plots`."""
        folder = self.folder / "plots"
        for variance, bound in self.bounds.items():
            if bound.sweep is not None:
                draw_bound(bound.sweep, len(make_scheduler(self.scheduler)), folder, variance)
        draw_quality(figures, folder)
        self.pipeline.register_modules(scheduler=make_scheduler(self.scheduler))
        assert self.training is not None
        draw_paper(self.pipeline, self.training, folder, self.config.seed)
        if self.samples is not None and self.reference is not None:
            draw_nearest(self.samples, self.reference, self.training, self.config.extractor, folder / "nearest.png")

    def images_of_plots(self) -> ImageSet:
        """The training images that plots show; what cannot be drawn is said before anything is measured."""
        figure_class()
        images = self.images(self.config.reference_split)
        if len(images) < 2:
            raise ValueError(
                f'--plots interpolates between two images of the split "{self.config.reference_split}", got '
                f"{len(images)}. Leave --plots out."
            )
        images_and_labels(self.pipeline.unet, images, range(1))
        return images


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """A record without the numbers that JSON does not know, such as the error of a mean of one image."""
    kept = {name: value for name, value in record.items() if not isinstance(value, float) or math.isfinite(value)}
    return {name: finite(value) if isinstance(value, dict) else value for name, value in kept.items()}


def check_reference(count: int, config: EvalConfig) -> None:
    """Raise a ValueError when a reference of so many images cannot serve the metrics asked for."""
    needs = {"kid": config.kid_subset_size, "prdc": 6}
    for metric in config.of_samples:
        if count < needs.get(metric, 2):
            raise ValueError(
                f"{metric} needs at least {needs.get(metric, 2)} reference images, the split "
                f'"{config.reference_split}" gives {count}: see max_reference_images.'
            )
