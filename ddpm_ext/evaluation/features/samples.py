"""Generated images and real ones side by side, as features of one extractor, over any number of processes.

Image i is drawn from a generator seeded by seed + i; the images themselves are not held, but for the first few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...diffusion.images import to_unit
from ...errors import UserError
from ...pipelines.config import guidance_conditions
from ...pipelines.seeds import images_from_seeds
from ..images import class_labels, labels_of
from .extractors import Extractor, Features, extract, make_extractor, quantize
from .reference import Reference, as_features, as_tensors, make_reference

if TYPE_CHECKING:
    from diffusers import UNet2DModel

    from ...data.dataset import ImageSet
    from ...schedulers.contract import Scheduler
    from ..runner import Runner

__all__ = ["Drawing", "SampleFeatures", "Samples"]

_KEPT_IMAGES = 64  # generated images that are kept for a grid
_SHARD = 500


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One set of generated images.

    Attributes:
        num_samples: How many.
        steps: Denoising steps.
        seed: Image i is drawn from seed + i.
    """

    num_samples: int
    steps: int
    seed: int


class Samples(NamedTuple):
    """What is kept of generated images."""

    features: Features
    images: Tensor  # uint8, (n, C, H, W): the first _KEPT_IMAGES
    labels: list[int] | None  # of all of them


class SampleFeatures:
    """What scores of generated images are made of: an extractor, the reference, and samples drawn under a scheduler.

    Args:
        runner: The measurement: its model, its options and its processes.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner, self.config = runner, runner.config

    @cached_property
    def extractor(self) -> Extractor:
        """The network of the features."""
        config = self.config
        return make_extractor(
            config.extractor,
            device=self.runner.accelerator.device,
            size=config.extractor_size,
            weights=config.inception_weights,
        )

    def check(self, images: ImageSet, least: Mapping[str, int]) -> None:
        """Ask the extractor about two real images before anything is measured.

        Args:
            images: The reference.
            least: Metrics, and the images that each of them needs.

        Raises:
            UserError: it does not take such images, gives no logits to a metric that needs them, or the reference is
                too small.
        """
        count = self._count(images)
        for metric, number in least.items():
            if count < number:
                raise UserError(
                    f'{metric} needs at least {number} reference images, the split "{images.spec.split}" gives '
                    f"{count}: see max_reference_images."
                )
        two = to_unit(images.batch([0, 1]).pixels, images.spec.bits)
        found = extract(self.extractor, [two], self.config.quantization)
        if "is" in least and found.logits is None:
            raise UserError(f'is needs a classifier as extractor, and "{self.config.extractor}" gives no logits.')

    def check_class_counts(self, images: ImageSet, num_samples: int) -> None:
        """Raise a UserError unless every class to be drawn has two images on either side."""
        labels = class_labels(self.runner.num_classes, images, num_samples)
        if labels is None:
            raise UserError("fid_per_class is of a class-conditional network, and this one has no classes: use fid.")
        fake, real = Counter(labels), Counter(labels_of(images, self._count(images)))
        for c in sorted(fake):
            if min(real[c], fake[c]) < 2:
                raise UserError(
                    f"fid_per_class needs at least 2 images of every class, class {c} has {real[c]} real and "
                    f"{fake[c]} generated ones: measure more, or leave it out."
                )

    def _count(self, images: ImageSet) -> int:
        """Return how many images of a set are the reference."""
        return min(self.config.max_reference_images or len(images), len(images))

    def reference(self, images: ImageSet) -> Reference:
        """Return the features of the images that samples are compared with, from the cache where they are there."""
        return make_reference(
            images,
            self.extractor,
            self.config.quantization,
            self.runner.accelerator,
            cache_dir=self.config.reference_cache,
            num_images=self.config.max_reference_images,
        )

    def draw(
        self, scheduler: Scheduler, images: ImageSet, drawing: Drawing, unet: UNet2DModel | None = None
    ) -> Samples:
        """Draw samples under a scheduler, in the class proportions of a set, and take their features.

        Args:
            scheduler: The one that samples.
            images: The reference, whose class proportions are taken.
            drawing: How many, in how many steps, from which seeds.
            unet: In place of the pipeline's own.
        """
        quantization, guidance = self.config.quantization, self.config.guidance
        seeds = range(drawing.seed, drawing.seed + drawing.num_samples)
        labels = class_labels(self.runner.num_classes, images, drawing.num_samples)

        def work(piece: range) -> dict[str, Tensor]:
            kept: list[Tensor] = []

            def batches() -> Iterator[Tensor]:
                for drawn in images_from_seeds(
                    self.runner.pipeline,
                    seeds[piece.start : piece.stop],
                    batch_size=self.config.batch_size,
                    num_inference_steps=drawing.steps,
                    class_labels=None if labels is None else labels[piece.start : piece.stop],
                    guidance=guidance,
                ):
                    room = max(0, _KEPT_IMAGES - piece.start - sum(map(len, kept)))
                    kept.append((quantize(drawn[:room], "uint8") * 255).round().to(torch.uint8).cpu())
                    yield drawn

            found = extract(self.extractor, batches(), quantization)
            return {**as_tensors(found), "images": torch.cat(kept)}

        key: dict[str, object] = {
            "extractor": self.extractor.description,
            "hand_off": quantization,
            "num_inference_steps": drawing.steps,
            "seed": drawing.seed,
        }
        if labels is not None:
            key["labels"] = labels
        if guidance is not None:
            key["guidance"] = dict(guidance)
        with self.runner.sampling(scheduler, unet):
            tensors = self.runner.shards(scheduler).run("samples", key, drawing.num_samples, _SHARD, work)
        return Samples(as_features(tensors), tensors["images"], labels)

    def conditions(self, images: ImageSet, count: int, num_samples: int) -> dict[str, object]:
        """Return what a score of generated images says of its samples, guidance, extractor and reference.

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
            "reference": self.runner.images.describe(images, count),
            "class_labels": None if self.runner.num_classes is None else "in the reference's proportions",
            **guidance_conditions(self.config.guidance),
        }
