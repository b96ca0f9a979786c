"""Validation: every --eval_steps updates a small evaluation of the averaged weights; the best ones are kept.

    log.jsonl   a line {"update": ..., "eval/fid": ..., "eval/bits_per_dim": ...}
    best/       the pipeline that was best by --eval_metric, and best.json: its update and scores

Seeds and images are fixed, so that two values of one run differ by the weights and not by luck. Small numbers of images
bias a Fréchet distance upwards: its values compare within a run and with nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import UNet2DModel

from ...data.dataset import ImageSet
from ...data.spec import DataSpec
from ...errors import UserError
from ...evaluation.bound.checks import grid_images
from ...evaluation.bound.sampled import PILOT_IMAGES, pilot_distribution, sampled_bound
from ...evaluation.bound.terms import Bound, BoundOptions, full_sweep, make_bound
from ...evaluation.features.extractors import Extractor, extract, make_extractor
from ...evaluation.features.metrics import feature_statistics, frechet_distance
from ...evaluation.features.reference import make_reference
from ...evaluation.images import class_labels, images_and_labels
from ...evaluation.words import Quantization
from ...models.classes import number_of_classes
from ...pipelines.ddpm import DDPMExtPipeline
from ...pipelines.seeds import POLL_EVERY, SamplingStopped, images_from_seeds
from ...schedulers.ddpm import DDPMExtScheduler
from ..config import TrainConfig

__all__ = ["Validation", "ValidationOptions", "make_validation"]

SAMPLED_TIMESTEPS = 50  # of the bound per image, where the chain has more


@dataclass(frozen=True)
class ValidationOptions:
    """How much is measured.

    Attributes:
        num_samples: Generated images, at least 2.
        num_inference_steps: Their denoising steps.
        num_held_out: Real images of the bound.
        num_timesteps_sampled: Steps of the bound drawn per image; None for all.
        batch_size: Images of one process at a time.
        seed: Image i is drawn from seed + i.
        quantization: How generated pixels reach the extractor.
    """

    num_samples: int = 256
    num_inference_steps: int = 50
    num_held_out: int = 64
    num_timesteps_sampled: int | None = SAMPLED_TIMESTEPS
    batch_size: int = 64
    seed: int = 0
    quantization: Quantization = "uint8"


class Validation:
    """Measure the Fréchet distance of a few generated images and bits/dim of a few real ones, as often as asked.

    Args:
        training: What generated images are compared with.
        held_out: Images whose bits/dim are measured; None measures none.
        extractor: Makes the features.
        accelerator: Knows the processes; each of them must make and call this.
        options: How much is measured.
        cache_dir: Of the reference features.
    """

    def __init__(
        self,
        training: ImageSet,
        held_out: ImageSet | None,
        extractor: Extractor,
        accelerator: Accelerator,
        options: ValidationOptions,
        cache_dir: Path | str | None = None,
    ) -> None:
        if options.num_samples < 2:
            raise UserError(f"num_samples must be at least 2 for a Fréchet distance, got {options.num_samples}.")
        self.reference = make_reference(training, extractor, options.quantization, accelerator, cache_dir=cache_dir)
        self.training, self.held_out, self.extractor = training, held_out, extractor
        self.accelerator, self.options = accelerator, options
        self.num_held_out = 0 if held_out is None else min(options.num_held_out, len(held_out))

    def __call__(
        self, unet: UNet2DModel, scheduler: DDPMExtScheduler, must_stop: Callable[[], bool] | None = None
    ) -> dict[str, float]:
        """Return {"fid": ..., "bits_per_dim": ...} of a network, lower is better for both; the same on every process.

        Args:
            unet: The network.
            scheduler: Its schedule.
            must_stop: Asked now and then whether to stop, at the same calls of the network on every process.

        Raises:
            SamplingStopped: it said so.
        """
        if must_stop is None:
            return self._measure(unet, scheduler)
        with self._asking(unet, must_stop):
            return self._measure(unet, scheduler)

    def _measure(self, unet: UNet2DModel, scheduler: DDPMExtScheduler) -> dict[str, float]:
        """Return the scores."""
        pipeline = DDPMExtPipeline(unet, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        numbers = self._share(self.options.num_samples)
        labels = class_labels(number_of_classes(unet.config), self.training, self.options.num_samples)
        images = images_from_seeds(
            pipeline,
            [self.options.seed + i for i in numbers],
            batch_size=self.options.batch_size,
            num_inference_steps=self.options.num_inference_steps,
            class_labels=None if labels is None else [labels[i] for i in numbers],
        )
        mine = extract(self.extractor, images, self.options.quantization).features
        features = torch.cat(self._gathered(mine))
        found = {"fid": frechet_distance(self.reference.statistics, feature_statistics(features))}
        if self.held_out is not None:
            bits = self._bits(unet, scheduler, self._share(self.num_held_out))
            found["bits_per_dim"] = torch.cat(self._gathered(bits)).mean().item()
        return found

    def _bits(self, unet: UNet2DModel, scheduler: DDPMExtScheduler, numbers: range) -> torch.Tensor:
        """Return the bits/dim of this process's held-out images.

        Where steps are sampled, the first images decide for all processes how likely each step is, so that the number
        of processes changes nothing.
        """
        bound, x_0 = self._bound_of(unet, scheduler, numbers)
        generators = [torch.Generator().manual_seed(self.options.seed + i) for i in numbers]
        if self.options.num_timesteps_sampled is None:
            return full_sweep(bound, x_0, generators).bits_per_dim.total.cpu()
        pilots = range(min(PILOT_IMAGES, self.num_held_out))
        p = pilot_distribution(*self._bound_of(unet, scheduler, pilots))
        return sampled_bound(bound, x_0, self.options.num_timesteps_sampled, generators, p).total.cpu()

    def _bound_of(self, unet: UNet2DModel, scheduler: DDPMExtScheduler, numbers: range) -> tuple[Bound, torch.Tensor]:
        """Return the bound of some held-out images, and their x_0."""
        assert self.held_out is not None
        pixels, labels = images_and_labels(unet, self.held_out, numbers)
        bits = self.held_out.spec.bits
        return make_bound(unet, scheduler, pixels, BoundOptions(bits=bits), labels), grid_images(pixels, bits)

    def _share(self, count: int) -> range:
        """Return this process's part of range(count); every process has at least one item."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if count < world:
            raise UserError(f"A small evaluation needs at least one image per process, got {count} for {world}.")
        return range(count * rank // world, count * (rank + 1) // world)

    def _gathered(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """Return the parts of all processes, in their order."""
        return gather_object([mine]) if self.accelerator.num_processes > 1 else [mine]

    @contextmanager
    def _asking(self, unet: UNet2DModel, must_stop: Callable[[], bool]) -> Iterator[None]:
        """Ask whether to stop while the network is used, in calls that every process makes."""
        calls, world = 0, self.accelerator.num_processes
        # With several processes asking is an all-reduce: only generation surely takes as many calls on each of them.
        batches = -(-(self.options.num_samples // world) // self.options.batch_size)
        last = math.inf if world == 1 else batches * self.options.num_inference_steps

        def ask(*_: object) -> None:
            nonlocal calls
            if calls < last and calls % POLL_EVERY == 0 and must_stop():
                raise SamplingStopped
            calls += 1

        handle = unet.register_forward_pre_hook(ask)
        try:
            yield
        finally:
            handle.remove()


def make_validation(config: TrainConfig, data: DataSpec, accelerator: Accelerator) -> Validation:
    """Build the validation that a run's options name. Every process must call this.

    Args:
        config: The options.
        data: The record of the images trained on; those of the validation are made the same way.
        accelerator: Knows the processes.
    """
    how = {"cache_dir": config.cache_dir, "max_images": config.eval_max_images}
    return Validation(
        data.load(**how),
        None if config.eval_split is None else data.load(config.eval_split, **how),
        make_extractor(config.eval_extractor, device=accelerator.device),
        accelerator,
        ValidationOptions(
            num_samples=config.eval_samples,
            num_inference_steps=min(config.eval_num_inference_steps, config.ddpm_num_steps),
            num_timesteps_sampled=SAMPLED_TIMESTEPS if config.ddpm_num_steps > SAMPLED_TIMESTEPS else None,
            batch_size=config.train_batch_size,
            seed=config.seed,
        ),
    )
