"""Pipeline + images -> measurements over any number of processes: features of generated images, bits of real ones.

Image i of a measurement draws all its noise from a generator seeded by seed + i, so that neither batches nor processes
change what it measures but for the last digits of the network's sums. Which images are meant stands in the record of
the run (`data.spec`), or is asked for: nothing is measured on data that nobody named.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from torch import Tensor

from ..data.dataset import ImageSet
from ..data.spec import DataSpec
from ..diffusion.analytic import optimal_variance
from ..diffusion.images import to_unit
from ..diffusion.likelihood import gaussian_kl
from ..diffusion.process import jump
from ..diffusion.reverse import reverse_log_var, variance_bounds
from ..distributed import check_world
from ..errors import UserError
from ..models.classes import classes_of, number_of_classes
from ..models.values import values_of
from ..pipelines.config import GuidanceOptions
from ..pipelines.ddpm import DDPMExtPipeline, load_pipeline
from ..pipelines.identity import network_hash, scheduler_options, weights_hash
from ..pipelines.locate import local_pipeline, run_folder
from ..pipelines.sampling import images_from_seeds
from ..run_dir import environment, read_json
from ..schedulers.config import extension
from ..schedulers.ddpm import DDPMExtScheduler
from .bound.bits_per_dim import (
    BitsPerDim,
    Bound,
    BoundOptions,
    Sweep,
    check_sampled_steps,
    full_sweep,
    make_bound,
    sampled_bound,
)
from .bound.checks import grid_images
from .config import MeasureConfig, recorded
from .features.extractors import Extractor, Features, extract, make_extractor, quantize
from .features.reference import Reference, as_features, as_tensors, make_reference
from .results import Dataset, Provenance, Result
from .sharded import SWEEP_SHARD, Shards

__all__ = [
    "Runner",
    "Samples",
    "SetBound",
    "bits_of",
    "class_labels",
    "images_and_labels",
    "is_fixed",
    "labels_of",
    "sample_features",
    "set_bound",
    "under_fixed_variance",
]

KEPT_IMAGES = 64  # generated images that are kept for a grid
_SAMPLE_SHARD, _SAMPLED_SHARD = 500, 256


class Samples(NamedTuple):
    """What is kept of generated images."""

    features: Features
    images: Tensor  # uint8, (n, C, H, W): the first KEPT_IMAGES
    labels: list[int] | None  # of all of them


class SetBound(NamedTuple):
    """The bound of the images of a set."""

    bits_per_dim: BitsPerDim  # per image; standard_error that of the mean over the set
    sweep: Sweep | None  # None where the steps were sampled


class Runner:
    """One measurement: its model, its images, and the pieces in which long work is done.

    Args:
        config: The options that evaluation and calibration have in common.
        folder: Where the pieces go.

    Raises:
        UserError: no pipeline, no record of its images and none named, or images that do not fit the network.
    """

    def __init__(self, config: MeasureConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.accelerator = Accelerator(cpu=config.cpu or not torch.accelerator.is_available())
        check_world(self.accelerator)
        self.pipeline = load_pipeline(config.model).to(self.accelerator.device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.unet: UNet2DModel = self.pipeline.unet
        self.scheduler: Any = self.pipeline.scheduler
        self.trained = DataSpec.from_run(local_pipeline(config.model) or config.model)
        self.weights, self.network = weights_hash(self.unet), network_hash(self.unet)
        self.started, self._sets = time.perf_counter(), {}
        self._environment = environment()

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.accelerator.is_main_process

    # -- images -------------------------------------------------------------------------------------------------------

    @cached_property
    def data(self) -> DataSpec:
        """Which images are measured; nothing asks where none are needed."""
        return _data_of(self.config, self.trained, self.unet)

    def images(self, split: str | None, option: str) -> ImageSet:
        """Load a split as training read its own, and check that the network can be asked about it.

        Args:
            split: None for the split trained on.
            option: The option that names the split.

        Raises:
            UserError: there is no such split, or its classes are not the network's.
        """
        data = self.data
        split = split or data.split
        if split not in self._sets:
            try:
                allowed = self.config.max_unreadable
                images = data.load(split, **({} if allowed is None else {"max_unreadable": allowed}))
            except ValueError as error:
                raise UserError(f"{error} (--{option} names the split.)") from error
            _check_classes(self.unet, images, self.trained)
            images_and_labels(self.unet, images, range(1))
            self._sets[split] = images
        return self._sets[split]

    def dataset(self, images: ImageSet, count: int) -> Dataset:
        """Return what a result says of the first images of a set."""
        spec, trained, departures = images.spec, self.trained, None
        if trained is not None:
            same = spec if spec.split == trained.split else replace(spec, fingerprint=None, num_images=None)
            same = replace(
                same,
                split=trained.split,
                class_counts=same.class_counts if spec.split == trained.split else None,
                random_flip=trained.random_flip,  # no measurement mirrors images
                equal_sizes=trained.equal_sizes,  # nor refuses sizes that the training took
                class_names=same.class_names if self.num_classes else trained.class_names,
            )
            if trained.num_images is None:  # a stream, whose fingerprint is of its files
                trained = replace(trained, fingerprint=None)
            departures = trained.differences(same)
        return Dataset(
            name=spec.name,
            split=spec.split,
            num_images=count,
            fingerprint=images.fingerprint,
            resolution=list(images.shape),
            center_crop=spec.center_crop,
            departures=departures,
        )

    @property
    def num_classes(self) -> int | None:
        """Classes of a class-conditional network; None for another."""
        return number_of_classes(self.unet.config)

    # -- measuring ----------------------------------------------------------------------------------------------------

    def shards(self, scheduler: Any) -> Shards:
        """Return where the pieces of this network under a scheduler go."""
        key = {"weights": self.weights, "network": self.network, "scheduler": scheduler_options(scheduler)}
        return Shards(self.folder, key, self.accelerator)

    def bound(
        self, scheduler: Any, images: ImageSet, count: int, options: BoundOptions, unet: UNet2DModel | None = None
    ) -> SetBound:
        """Measure the bound of the first images of a set under a scheduler; see `set_bound`.

        Args:
            scheduler: The chain.
            images: The set.
            count: How many of its images.
            options: Which bound.
            unet: In place of the pipeline's own.
        """
        return set_bound(
            unet or self.unet,
            scheduler,
            images,
            num_images=count,
            seed=self.config.seed,
            options=options,
            shards=self.shards(scheduler),
        )

    def check_bound(self, scheduler: Any, images: ImageSet | None, options: BoundOptions) -> None:
        """Make the bound of one image, so that what it refuses is refused before anything is measured.

        Args:
            scheduler: The chain.
            images: The set, or None where no bound is asked for.
            options: Which bound.
        """
        assert images is not None
        pixels, labels = images_and_labels(self.unet, images, range(1))
        bound = make_bound(self.unet, scheduler, pixels, replace(options, bits=images.spec.bits), labels)
        if options.num_timesteps_sampled is not None:
            check_sampled_steps(bound, options.num_timesteps_sampled)

    @cached_property
    def extractor(self) -> Extractor:
        """The network of the features."""
        config = self.config
        return make_extractor(
            config.extractor,
            device=self.accelerator.device,
            size=config.extractor_size,
            weights=config.inception_weights,
        )

    def check_extractor(self, images: ImageSet, least: dict[str, int]) -> None:
        """Ask the extractor about two real images before anything is measured.

        Args:
            images: The reference.
            least: Metrics, and the images that each of them needs.

        Raises:
            UserError: it does not take such images, gives no logits to a metric that needs them, or the reference is
                too small.
        """
        count = min(self.config.max_reference_images or len(images), len(images))
        for metric, number in least.items():
            if count < number:
                raise UserError(
                    f'{metric} needs at least {number} reference images, the split "{images.spec.split}" gives '
                    f"{count}: see max_reference_images."
                )
        found = extract(
            self.extractor, [to_unit(images.batch([0, 1]).pixels, images.spec.bits)], self.config.quantization
        )
        if "is" in least and found.logits is None:
            raise UserError(f'is needs a classifier as extractor, and "{self.config.extractor}" gives no logits.')

    def check_class_counts(self, images: ImageSet, num_samples: int) -> None:
        """Raise a UserError unless every class to be drawn has two images on either side."""
        labels = class_labels(self.num_classes, images, num_samples)
        if labels is None:
            raise UserError("fid_per_class is of a class-conditional network, and this one has no classes: use fid.")
        fake = Counter(labels)
        real = Counter(labels_of(images, min(self.config.max_reference_images or len(images), len(images))))
        for c in sorted(fake):
            if min(real[c], fake[c]) < 2:
                raise UserError(
                    f"fid_per_class needs at least 2 images of every class, class {c} has {real[c]} real and "
                    f"{fake[c]} generated ones: measure more, or leave it out."
                )

    def reference(self, images: ImageSet) -> Reference:
        """Return the features of the images that samples are compared with, from the cache where they are there."""
        return make_reference(
            images,
            self.extractor,
            self.config.quantization,
            self.accelerator,
            cache_dir=self.config.reference_cache,
            num_images=self.config.max_reference_images,
        )

    def samples(
        self,
        scheduler: Any,
        images: ImageSet,
        *,
        num_samples: int,
        steps: int,
        seed: int,
        unet: UNet2DModel | None = None,
        guidance: GuidanceOptions | None = None,
    ) -> Samples:
        """Draw samples under a scheduler, in the class proportions of a set, and take their features.

        Args:
            scheduler: The one that samples.
            images: The reference, whose class proportions are taken.
            num_samples: How many.
            steps: Denoising steps.
            seed: Image i is drawn from seed + i.
            unet: In place of the pipeline's own.
            guidance: Class guidance, as the pipeline takes it; None for none.
        """
        self.pipeline.register_modules(scheduler=scheduler, unet=unet or self.unet)
        try:
            return sample_features(
                self.pipeline,
                self.extractor,
                self.config.quantization,
                seeds=range(seed, seed + num_samples),
                labels=class_labels(self.num_classes, images, num_samples),
                num_inference_steps=steps,
                batch_size=self.config.batch_size,
                guidance=guidance,
                shards=self.shards(scheduler),
            )
        finally:
            self.pipeline.register_modules(scheduler=self.scheduler, unet=self.unet)

    # -- results ------------------------------------------------------------------------------------------------------

    def of_samples(self, images: ImageSet, count: int, num_samples: int) -> dict[str, Any]:
        """Return what a score of generated images says of its samples, extractor and reference.

        Args:
            images: The reference.
            count: Its images that are compared with.
            num_samples: Generated images.
        """
        return {
            "num_samples": num_samples,
            "seed": self.config.seed,
            "extractor": self.extractor.description,
            "quantization": self.config.quantization,
            "reference": self.dataset(images, count),
            "class_labels": None if self.num_classes is None else "in the reference's proportions",
        }

    def result(self, metric: str, **more: Any) -> Result:
        """Make a result of this model, begun at `self.started`; fields by name."""
        made = Provenance(
            **self._environment,
            options=recorded(self.config),
            num_processes=self.accelerator.num_processes,
            device=str(self.accelerator.device),
            wall_time_s=round(time.perf_counter() - self.started, 1),
            date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        of_model = {"model": self.config.model, "weights": self.weights, "network": self.network}
        return Result(metric=metric, **of_model, averaged=self.averaged, **more, provenance=made)

    @cached_property
    def averaged(self) -> bool | None:
        """Whether the weights are averages, as the option or the run's record says; None where nothing does."""
        run = run_folder(self.config.model)
        if self.config.averaged is not None or run is None or not (run / "config.json").is_file():
            return self.config.averaged
        return read_json(run / "config.json").get("config", {}).get("use_ema")


def _data_of(config: MeasureConfig, trained: DataSpec | None, unet: UNet2DModel) -> DataSpec:
    """Return which images are measured: those of the training, but for what the options name.

    Raises:
        UserError: neither a record nor the options name any, or the record is of another network.
    """
    size, channels = unet.config["sample_size"], unet.config["in_channels"]
    if size is None:
        raise UserError("The network's config names no sample_size: there is no size to bring the images to.")
    resolution = (size, size) if isinstance(size, int) else (size[0], size[1])
    named = config.dataset_name is not None or config.data_dir is not None
    if trained is None and not named:
        raise UserError(
            f"Nothing says on which images {config.model} was trained: no config.json of its run lies beside it. Name "
            "images to measure it on with --dataset_name (digits, a Hub name) or --data_dir."
        )
    if trained is not None and (trained.resolution, trained.channels) != (resolution, channels):
        raise UserError(
            f"The config.json beside {config.model} is of another run: it trained on images of {trained.channels} x "
            f"{trained.resolution} (channels, size), and this network takes {channels} x {resolution}. Move the "
            "pipeline away from it, and name the images with --dataset_name or --data_dir."
        )
    values, classes = values_of(unet.config), classes_of(unet.config)
    base = trained or DataSpec(resolution=resolution, channels=channels, **values._asdict())
    names = None if classes is None else classes.names or base.class_names
    base = replace(base, class_names=names)  # without classes others than the training's do not matter
    changes: dict[str, Any] = {"image_column": config.image_column, "label_column": config.label_column}
    changes = {name: value for name, value in changes.items() if value is not None or named}
    if named:
        changes |= {name: getattr(config, name) for name in ("dataset_name", "dataset_config_name", "data_dir")}
        changes |= {"num_images": None, "fingerprint": None, "class_counts": None}
    elif config.dataset_config_name is not None:
        changes["dataset_config_name"] = config.dataset_config_name
    if config.center_crop is not None:
        changes["center_crop"] = config.center_crop
    return replace(base, **changes)


def _check_classes(unet: UNet2DModel, images: ImageSet, trained: DataSpec | None) -> None:
    """Raise a UserError where class numbers of a set cannot be the network's.

    The names of the training's classes decide (`DataSpec.load`). Where neither network nor record names them, only a
    set of as many classes can be numbered as the training's was.
    """
    classes = classes_of(unet.config)
    known = classes is not None and (classes.names or (trained is not None and trained.class_names))
    if classes is not None and not known and images.num_classes not in (None, classes.number):
        raise UserError(
            f"The network knows {classes.number} classes and these images have {images.num_classes}, so that class "
            "numbers cannot be told: measure on images of the same classes, or beside the run's config.json, which "
            "names them."
        )


def images_and_labels(unet: UNet2DModel, images: ImageSet, numbers: range) -> tuple[Tensor, Tensor | None]:
    """Return (pixels, classes) of images by number; classes where the network asks for them, else None.

    Args:
        unet: The network.
        images: The set.
        numbers: Which images.

    Raises:
        UserError: it asks for them and the set has none.
    """
    pixels, labels = images.batch(list(numbers))
    if number_of_classes(unet.config) is None:
        return pixels, None
    if labels is None:
        raise UserError("The network is class-conditional, and these images have no classes: name their label_column.")
    return pixels, labels


def class_labels(num_classes: int | None, images: ImageSet, number: int) -> list[int] | None:
    """Return labels of generated images in the class proportions of a set; None for a network without classes.

    Image i gets the class that is furthest behind its share of i + 1 images, so that the first n images, whatever n,
    are within one of their shares; equal shares go round the classes.

    Args:
        num_classes: Of the network.
        images: The set; one without classes counts as one of equal shares.
        number: How many labels.
    """
    if num_classes is None:
        return None
    counts = np.zeros(num_classes)
    known = images.spec.class_counts or (1,) * num_classes
    counts[: len(known)] = known
    share, found = counts / counts.sum(), []
    behind = np.zeros(num_classes)  # how many images of each class are due
    for _ in range(number):
        behind += share
        found.append(int(behind.round(9).argmax()))  # rounded, so that equal shares tie and go to the first class
        behind[found[-1]] -= 1
    return found


def labels_of(images: ImageSet, count: int) -> list[int]:
    """Return the classes of the first images of a set.

    Raises:
        UserError: it has none.
    """
    found: list[int] = []
    for start in range(0, count, 4096):
        labels = images.batch(list(range(start, min(start + 4096, count)))).labels
        if labels is None:
            raise UserError("The reference has no classes: name their label_column.")
        found += labels.tolist()
    return found


def sample_features(
    pipeline: DDPMExtPipeline,
    extractor: Extractor,
    quantization: Any,
    *,
    seeds: range,
    labels: Sequence[int] | None,
    num_inference_steps: int,
    batch_size: int,
    guidance: GuidanceOptions | None = None,
    shards: Shards,
) -> Samples:
    """Take features of generated images, piece by piece; the images themselves are not held.

    Args:
        pipeline: Network and scheduler.
        extractor: Makes the features.
        quantization: How pixels reach it.
        seeds: One per image, in steps of 1.
        labels: One per image, for conditional networks.
        num_inference_steps: Denoising steps.
        batch_size: Images of one process at a time.
        guidance: Class guidance, as the pipeline takes it; None for none.
        shards: Where the pieces go; each process must call.
    """

    def work(piece: range) -> dict[str, Tensor]:
        kept: list[Tensor] = []

        def batches() -> Iterator[Tensor]:
            for images in images_from_seeds(
                pipeline,
                seeds[piece.start : piece.stop],
                batch_size=batch_size,
                num_inference_steps=num_inference_steps,
                class_labels=None if labels is None else labels[piece.start : piece.stop],
                guidance=guidance,
            ):
                room = max(0, KEPT_IMAGES - piece.start - sum(map(len, kept)))
                kept.append((quantize(images[:room], "uint8") * 255).round().to(torch.uint8).cpu())
                yield images

        found = extract(extractor, batches(), quantization)
        return {**as_tensors(found), "images": torch.cat(kept)}

    key: dict[str, Any] = {
        "extractor": extractor.description,
        "hand_off": quantization,
        "num_inference_steps": num_inference_steps,
        "seed": seeds.start,
    }
    if labels is not None:
        key["labels"] = list(labels)
    if guidance is not None:
        key["guidance"] = dict(guidance)
    tensors = shards.run("samples", key, len(seeds), _SAMPLE_SHARD, work)
    return Samples(as_features(tensors), tensors["images"], None if labels is None else list(labels))


def set_bound(
    unet: UNet2DModel,
    scheduler: Any,
    images: ImageSet,
    *,
    num_images: int,
    seed: int,
    options: BoundOptions,
    shards: Shards,
) -> SetBound:
    """Measure `bits_per_dim` of the first images of a set, piece by piece over all processes.

    Args:
        unet: The network.
        scheduler: Its chain.
        images: The set.
        num_images: How many of them.
        seed: Image i draws its noise from seed + i.
        options: Which bound.
        shards: Where the pieces go; each process must call.
    """
    options = replace(options, bits=images.spec.bits)
    sampled = options.num_timesteps_sampled

    def bound_of(piece: range) -> tuple[Bound, Tensor]:
        pixels, labels = images_and_labels(unet, images, piece)
        return make_bound(unet, scheduler, pixels, options, labels), pixels

    times = bound_of(range(1))[0].times

    def work(piece: range) -> dict[str, Tensor]:
        bound, pixels = bound_of(piece)
        generators = [torch.Generator().manual_seed(seed + i) for i in piece]
        if sampled is not None:
            bits = sampled_bound(bound, grid_images(pixels, options.bits), sampled, generators)
            found = bits._replace(standard_error=None)._asdict()
            assert bits.standard_error is not None
            found["spread"] = (bits.standard_error * len(piece)).square().reshape(1)
        else:
            sweep = full_sweep(bound, grid_images(pixels, options.bits), generators)
            found = {**sweep.bits_per_dim._asdict(), "squared_error": sweep.squared_error}
        return {name: part.cpu() for name, part in found.items() if part is not None}

    key = {
        "dataset": images.fingerprint,
        "seed": seed,
        "timesteps": [times[0], times[-1], len(times)],
        "num_timesteps_sampled": sampled,
        "decoder_variance": options.decoder_variance,
        "cdf": options.cdf,
    }
    size = SWEEP_SHARD if sampled is None else _SAMPLED_SHARD
    found = shards.run("bits", key, num_images, size, work)
    if sampled is not None:
        error = found["spread"].sum().sqrt() / num_images
        return SetBound(BitsPerDim(found["prior"], None, found["decoder"], found["total"], error), None)
    bits = BitsPerDim(found["prior"], found["steps"], found["decoder"], found["total"], None)
    return SetBound(bits, Sweep(times, bits, found["squared_error"], options.bits))


def is_fixed(scheduler: Any) -> bool:
    """Return whether a scheduler's reverse variance is one number per step, and its steps do not depend on which."""
    return str(scheduler.config.variance_type).startswith("fixed_") and extension(scheduler.config).trajectory != (
        "optimal"
    )


def under_fixed_variance(found: SetBound, scheduler: DDPMExtScheduler, times: list[int] | None = None) -> SetBound:
    r"""Judge the same network and noise with another variance or chain, without running the network again.

        mean_dims L_{t-1} = ½ [β̃/σ² - 1 - log(β̃/σ²) + (c1²/σ²) mean_dims (x_0 - x̂_0)²]

    A fixed or analytic σ² is one number per step, so the squared errors of the sweep are all that it needs. L_T and L_0
    depend neither on which of these variances it is nor on the kept times between the first and the last.

    Args:
        found: A full sweep under any fixed variance.
        scheduler: The other variance, and the same noise schedule.
        times: Kept times, descending: some of the sweep's, its first and last among them; None for all.

    Raises:
        UserError: the chain does not run from the sweep's first time to its last.
    """
    assert found.sweep is not None
    bits, kept = found.sweep.bits_per_dim, found.sweep.timesteps
    times = kept if times is None else times
    if (times[0], times[-1]) != (kept[0], kept[-1]):
        raise UserError(f"times must run from {kept[0]} to {kept[-1]} as the sweep does, got {times[0]}..{times[-1]}.")
    squared_error = found.sweep.squared_error[:, [kept.index(t) for t in times]]
    t, s = torch.tensor(times[:-1]), torch.tensor(times[1:])
    step = jump(scheduler.tables, t, s)
    small, large = variance_bounds(step, step.var.log())
    log_optimal, mse_eps = None, extension(scheduler.config).mse_eps
    if mse_eps is not None:
        log_optimal = optimal_variance(scheduler.tables, torch.tensor(mse_eps, dtype=torch.float64), s, t).log()
    variance_type, last = scheduler.config["variance_type"], torch.zeros_like(t, dtype=torch.bool)
    log_var = reverse_log_var(variance_type, small, large, last, log_optimal=log_optimal)
    rmse = squared_error[:, :-1].sqrt()
    steps = gaussian_kl(step.c1 * rmse, small, torch.zeros_like(rmse), log_var) / math.log(2)
    bits = bits._replace(steps=steps, total=bits.prior + steps.sum(1) + bits.decoder)
    return SetBound(bits, Sweep(times, bits, squared_error, found.sweep.bits))


def bits_of(found: SetBound) -> dict[str, Any]:
    """Return mean bits/dim and its three parts as fields of a result.

    The standard error is of sampled steps; that of other images stands among the parts.
    """
    bits = found.bits_per_dim
    total, prior, decoder = (part.mean().item() for part in (bits.total, bits.prior, bits.decoder))
    over_images = bits.total.std().item() / math.sqrt(len(bits.total)) if len(bits.total) > 1 else math.nan
    return {
        "value": total,
        "standard_error": None if bits.standard_error is None else bits.standard_error.item(),
        "parts": {
            "prior": prior,
            "rate": total - prior - decoder,
            "decoder": decoder,
            "standard_error_over_images": over_images,
        },
    }
