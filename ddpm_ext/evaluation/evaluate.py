"""Pipeline + images -> eval.json and eval.md: every score with what made it.

A result is replaced when it is measured again under the same conditions, and kept otherwise; it is written as soon as
it is known. What takes long is done in pieces (`sharded`): the same command after a kill resumes where it stopped. What
would be refused is refused before anything is measured.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from ..diffusion.words import EXTENSION_KEY
from ..errors import UserError
from ..pipelines.ddpm import load_pipeline
from ..pipelines.guidance import make_guidance
from ..run_dir import write_atomically
from ..schedulers.config import extension
from ..signals import interruptible
from .bound.sets import SetBound, bits_of, check_bound, is_fixed, rows_of, set_bound, under_fixed_variance
from .bound.terms import BoundOptions
from .config import EvalConfig, split_words
from .features.metrics import (
    feature_statistics,
    frechet_distance,
    frechet_distance_per_class,
    inception_score,
    kernel_distance,
    precision_recall,
    rbf_mmd,
)
from .features.samples import Drawing, SampleFeatures, Samples
from .images import labels_of
from .plots import draw_bound, draw_nearest, draw_paper, draw_results, figure_class
from .report import markdown
from .results import Outcome, Result, write_results
from .runner import Runner
from .samplers import ancestral, chain_conditions, make_scheduler
from .solvers.few_steps import FEW_STEPS, few_step_results, own_solver

if TYPE_CHECKING:
    from ..data.dataset import ImageSet
    from ..schedulers.contract import Scheduler
    from ..schedulers.ddpm import DDPMExtScheduler

__all__ = ["evaluate"]


def evaluate(config: EvalConfig) -> list[Result]:
    """Measure what the options ask for, write eval.json, eval.md and plots, and return the new results.

    Args:
        config: The options.

    Raises:
        UserError: what cannot be measured, before anything is.
        Stopped: a signal came; what is measured is kept, and the same command continues.
    """
    with interruptible(f"What is measured is kept in {config.folder}"):
        work = _Evaluation(config)
        results: list[Result] = []
        for result in work.results():
            results.append(result)
            if work.runner.is_main:
                write_atomically(
                    config.folder / "eval.md", markdown(write_results(config.folder / "eval.json", [result]))
                )
        if work.runner.is_main and config.plots:
            work.draw(write_results(config.folder / "eval.json", []))
        work.runner.accelerator.wait_for_everyone()
        return results


class _Evaluation:
    """One evaluation: what it was asked for, checked, and what of it plots need."""

    def __init__(self, config: EvalConfig) -> None:
        self.config = config
        self.runner = Runner(config, load_pipeline(config.model), config.folder / "eval_pieces")
        self.features, load = SampleFeatures(self.runner), self.runner.images.load
        self.held_out = load(config.bpd_split, "bpd_split") if config.of_bound else None
        wants_images = config.of_samples or config.plots
        self.images = load(config.reference_split, "reference_split") if wants_images else None
        self.bound_options = BoundOptions(
            num_inference_steps=config.bpd_num_inference_steps,
            decoder_variance=config.decoder_variance,
            cdf=config.cdf,
            num_timesteps_sampled=config.num_timesteps_sampled,
        )
        self.bounds: dict[str, SetBound] = {}
        self.first: DDPMExtScheduler | None = None  # the scheduler of the first bound
        self.samples: Samples | None = None
        self.check()

    def check(self) -> None:
        """Raise a UserError for whatever could not be measured or drawn."""
        config, runner = self.config, self.runner
        if self.held_out is not None:
            for variance in config.variances:
                check_bound(runner.unet, self.bound_scheduler(variance), self.held_out, self.bound_options)
        make_guidance(runner.unet.config, runner.scheduler.config["num_train_timesteps"], **(config.guidance or {}))
        if config.of_samples:
            assert self.images is not None
            for sampler, variance, steps in self.plan():
                copy.copy(self.sampling_scheduler(sampler, variance)).set_timesteps(steps)
            self.features.check(self.images, config.least_images)
            if "fid_per_class" in config.of_samples:
                self.features.check_class_counts(self.images, config.num_samples)
        if config.plots:
            figure_class()
            assert self.images is not None
            if len(self.images) < 2:
                raise UserError(
                    f'--plots interpolates between two images of the split "{self.images.spec.split}", got '
                    f"{len(self.images)}. Leave --plots out."
                )

    def results(self) -> Iterator[Result]:
        """Measure, result by result."""
        if self.held_out is not None:
            yield from self.bound_results(self.held_out)
        if self.config.of_samples:
            assert self.images is not None
            self.reference = self.features.reference(self.images)
            for sampler, variance, steps in self.plan():
                yield from self.sample_results(self.images, sampler, variance, steps)
            few = [K for K in self.config.steps if K <= FEW_STEPS and self.config.few_steps]
            if len(few) > 1 and "fid" in self.config.of_samples:  # a table of few steps: stock's rows belong to it
                samples, solver = self.samples, own_solver(self.runner.scheduler)
                yield from few_step_results(self.features, self.images, solver, few, self.config.num_samples)
                self.samples = samples

    # -- real images --------------------------------------------------------------------------------------------------

    def bound_scheduler(self, variance: str | None) -> DDPMExtScheduler:
        """Return the chain that bits/dim judges; all T steps need no spacing."""
        spacing = self.config.timestep_spacing if self.config.bpd_num_inference_steps else None
        made = ancestral(self.runner.scheduler, variance, spacing)
        extra = extension(made.config)
        if self.config.bpd_num_inference_steps and spacing is None and extra.trajectories:
            # A calibrated model draws images at even distances; its bound is best where the bits are.
            made.register_to_config(**{EXTENSION_KEY: {**made.config[EXTENSION_KEY], "trajectory": "optimal"}})
        return made

    def bound_results(self, images: ImageSet) -> Iterator[Result]:
        """Measure bpd and rate_distortion for each variance asked for."""
        config, runner = self.config, self.runner
        count = min(config.max_bpd_images or len(images), len(images))
        for variance in config.variances:
            scheduler = self.bound_scheduler(variance)
            runner.start_clock()
            found = self.bounds[scheduler.config["variance_type"]] = self.bound(scheduler, images, count)
            conditions = {
                "dataset": runner.images.describe(images, count),
                "variance_type": scheduler.config["variance_type"],
                "num_inference_steps": config.bpd_num_inference_steps or len(scheduler),
                **(chain_conditions(scheduler) if config.bpd_num_inference_steps else {}),
                "num_timesteps_sampled": config.num_timesteps_sampled,
                "decoder_variance": config.decoder_variance,
                "cdf": config.cdf,
                "seed": config.seed,
            }
            if "bpd" in config.of_bound:
                yield runner.result("bpd", **bits_of(found), **conditions)
            if "rate_distortion" in config.of_bound:
                assert found.sweep is not None
                yield runner.result("rate_distortion", **rows_of(found.sweep, len(scheduler)), **conditions)

    def bound(self, scheduler: DDPMExtScheduler, images: ImageSet, count: int) -> SetBound:
        """Return the bound under a scheduler's variance; a second fixed one follows from the first one's sweep."""
        swept = [found for found in self.bounds.values() if found.sweep is not None]
        if swept and self.first is not None and is_fixed(scheduler) and is_fixed(self.first):
            return under_fixed_variance(swept[0], scheduler)
        self.first = scheduler
        return set_bound(
            self.runner.unet,
            scheduler,
            images,
            num_images=count,
            seed=self.config.seed,
            options=self.bound_options,
            shards=self.runner.shards(scheduler),
        )

    # -- generated images ---------------------------------------------------------------------------------------------

    def plan(self) -> list[tuple[str, str | None, int]]:
        """Return (sampler, variance, steps) of every set of samples; only ddpm has a variance to choose."""
        samplers = [
            (sampler, variance)
            for sampler in split_words(self.config.sampler)
            for variance in (self.config.variances if sampler == "ddpm" else [None])
        ]
        return [(*pair, steps) for pair, steps in itertools.product(samplers, self.config.steps)]

    def sampling_scheduler(self, sampler: str, variance: str | None) -> Scheduler:
        """Return the scheduler that samples."""
        return make_scheduler(self.runner.scheduler, sampler, variance, self.config.timestep_spacing)

    def sample_results(self, images: ImageSet, sampler: str, variance: str | None, steps: int) -> Iterator[Result]:
        """Measure the scores of one set of generated images."""
        config, runner = self.config, self.runner
        runner.start_clock()
        scheduler = self.sampling_scheduler(sampler, variance)
        drawing = Drawing(num_samples=config.num_samples, steps=steps, seed=config.seed)
        self.samples = self.features.draw(scheduler, images, drawing)
        conditions = {
            "sampler": sampler,
            "variance_type": scheduler.config["variance_type"] if sampler == "ddpm" else None,
            "num_inference_steps": steps,
            **chain_conditions(scheduler),
            **self.features.conditions(images, len(self.reference.features), config.num_samples),
        }
        for metric in config.of_samples:
            yield runner.result(metric, **self.score(metric, images), **conditions)

    def score(self, metric: str, images: ImageSet) -> Outcome:
        """Return one score of the samples at hand, with its error where it has one."""
        config, reference, samples = self.config, self.reference, self.samples
        assert samples is not None
        features, logits = samples.features
        if metric == "fid":
            distance = frechet_distance(reference.statistics, feature_statistics(features))
            return {"value": distance, "note": _note(features)}
        if metric == "fid_per_class":
            real_labels = labels_of(images, len(reference.features))
            parts = frechet_distance_per_class(reference.features, real_labels, features, samples.labels)
            names = images.spec.class_names or ()
            named = {names[c] if c < len(names) else str(c): value for c, value in parts.items()}
            return {"value": sum(parts.values()) / len(parts), "parts": named}
        if metric == "kid":
            count, size = config.kid_subsets, config.kid_subset_size
            found = kernel_distance(reference.features, features, num_subsets=count, subset_size=size)
            of_kid: Outcome = {"value": found.mean, "std": found.std, "standard_error": found.standard_error}
            return {**of_kid, "kid_subsets": count, "kid_subset_size": size}
        if metric == "cmmd":
            return {"value": rbf_mmd(reference.features, features)}
        if metric == "is":
            assert logits is not None  # `check` saw to it
            score = inception_score(logits)
            return {"value": score.mean, "std": score.std}
        parts = precision_recall(reference.features, features)
        return {"value": parts.precision, "parts": parts._asdict()}

    # -- plots --------------------------------------------------------------------------------------------------------

    def draw(self, results: list[Result]) -> None:
        """Draw what the measurements allow, in the folder `plots`."""
        folder, runner = self.config.folder / "plots", self.runner
        for variance, bound in self.bounds.items():
            if bound.sweep is not None:
                draw_bound(bound.sweep, len(ancestral(runner.scheduler)), folder, variance)
        draw_results(results, folder)
        runner.pipeline.register_modules(scheduler=ancestral(runner.scheduler))
        assert self.images is not None
        draw_paper(runner.pipeline, self.images, folder, self.config.seed, self.config.guidance)
        if self.samples is not None:
            draw_nearest(self.samples, self.reference, self.images, self.config.extractor, folder / "nearest.png")


def _note(features: Tensor) -> str | None:
    """Return the warning of a Fréchet distance of few images; None for many."""
    if len(features) > features.shape[1]:
        return None
    return f"{len(features)} images for {features.shape[1]} features: biased upwards"
