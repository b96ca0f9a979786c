"""Pipeline + seeds -> images, each from its own seed: the one such loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .config import GuidanceOptions
    from .ddpm import DDPMExtPipeline

__all__ = ["POLL_EVERY", "SamplingStopped", "images_from_seeds", "sample_images"]

Poll = Callable[[], bool]
POLL_EVERY = 10  # denoising steps between two looks at the stop flag: with several processes a look is an all-reduce


class SamplingStopped(Exception):
    """A stop was asked for while sampling."""


def images_from_seeds(
    pipeline: DDPMExtPipeline,
    seeds: Sequence[int],
    *,
    batch_size: int,
    num_inference_steps: int,
    class_labels: Sequence[int] | None = None,
    guidance: GuidanceOptions | None = None,
    poll: Poll | None = None,
) -> Iterator[Tensor]:
    """Draw images in batches, image i from a CPU generator of seeds[i] alone.

    The noise of an image does not depend on its batch; its network's sums do in their last digits, so that a pixel
    may differ by one grey level between batch sizes.

    Args:
        pipeline: Network and scheduler.
        seeds: One per image.
        batch_size: Images at a time.
        num_inference_steps: Denoising steps.
        class_labels: One per image, for conditional networks.
        guidance: Class guidance, as the pipeline takes it; None for none.
        poll: Asked every POLL_EVERY steps whether to stop.

    Yields:
        Images of shape (b, C, H, W), values in [0, 1], on the network's device.

    Raises:
        SamplingStopped: poll said so.
    """

    def look(_pipeline: object, step: int, _t: object, tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
        if poll is not None and step % POLL_EVERY == 0 and poll():
            raise SamplingStopped
        return {}

    for start in range(0, len(seeds), batch_size):
        mine = slice(start, start + batch_size)
        (images,) = pipeline(
            batch_size=len(seeds[mine]),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[mine]],
            num_inference_steps=num_inference_steps,
            class_labels=None if class_labels is None else class_labels[mine],
            output_type="pt",
            callback_on_step_end=None if poll is None else look,
            return_dict=False,
            **(guidance or {}),
        )
        yield images


def sample_images(
    pipeline: DDPMExtPipeline, seeds: Sequence[int], *, bits: int = 8, **options: Any
) -> Iterator[np.ndarray]:
    """Draw images in batches as levels of 8 or 16 bits, shape (b, H, W, C); arguments as for `images_from_seeds`."""
    top, dtype = 2**bits - 1, np.uint8 if bits == 8 else np.uint16
    for images in images_from_seeds(pipeline, seeds, **options):
        yield (images.float() * top).round().permute(0, 2, 3, 1).cpu().numpy().astype(dtype)
