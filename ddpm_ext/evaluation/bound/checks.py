"""What callers hand to the bound: images, network and classes, checked before they are used."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ...diffusion.images import half_range
from ...diffusion.words import Config
from ...errors import UserError
from ...models.classes import ClassLabels, check_labels
from ...models.unet import check_resolution
from ...models.values import image_size

__all__ = ["check_network", "checked_labels", "grid_images"]


def grid_images(images: Tensor, bits: int = 8) -> Tensor:
    """Return images as float64 exactly on the grid 2k/(2^bits - 1) - 1.

    Args:
        images: Levels (uint8 up to 8 bits, int32 above) or floats in [-1, 1], shape (B, C, H, W).
        bits: Their depth.

    Raises:
        UserError: they are not on that grid; the sentence says why.
    """
    if not isinstance(images, Tensor):
        raise UserError(f"images must be a torch.Tensor, got {type(images).__name__}. See torch.from_numpy.")
    if images.ndim != 4 or 0 in images.shape:
        raise UserError(f"images must have shape (B, C, H, W) and not be empty, got {tuple(images.shape)}.")
    half, levels = half_range(bits), torch.uint8 if bits <= 8 else torch.int32
    if images.dtype != levels and not images.is_floating_point():
        raise UserError(
            f"images must be {str(levels).removeprefix('torch.')} pixels or floats in [-1, 1], got {images.dtype}."
        )
    if images.dtype == levels:
        return images.double() / half - 1
    if not bool(torch.isfinite(images).all()):
        raise UserError("images must be finite, got NaN or infinity.")
    low, high = images.min().item(), images.max().item()
    if low < -1 - 1e-5 or high > 1 + 1e-5:
        raise UserError(
            f"images must lie in [-1, 1], got values from {low:.4g} to {high:.4g}. "
            "Of images in [0, 1] pass 2 * images - 1."
        )
    level = (images.double() + 1) * half
    off = (level - level.round()).abs().max().item()
    if off > max(1e-3, 1e-7 * half):  # float32 rounding is 1e-5 of a level at 8 bits, 2e-3 at 16
        raise UserError(
            f"images must lie on the {bits}-bit grid 2k/{2**bits - 1} - 1, got a value {off:.3f} grey levels beside "
            f"it: bits/dim counts the {2**bits} levels. Pass pixels; images in [0, 1] or resized as floats are not on "
            "the grid."
        )
    return level.round() / half - 1


def _network_config(model: object) -> Config:
    """Return a network's configuration, empty where it has none."""
    config = getattr(model, "config", None)
    return config if isinstance(config, Mapping) else {}


def check_network(model: object, images: Tensor) -> None:
    """Raise a UserError unless the network is one, and takes images of this shape by what its configuration says."""
    if isinstance(model, DiffusionPipeline) or not callable(model):
        raise UserError(
            f"model must be a network or a callable (x_t, t) -> tensor, got {type(model).__name__}. Of a pipeline, "
            "pass its unet."
        )
    config, (channels, *size) = _network_config(model), images.shape[1:]
    in_channels = config.get("in_channels") or channels
    expected = list(image_size(config)) if config.get("sample_size") else size
    if (channels, size) != (in_channels, expected):
        raise UserError(
            f"images must have the network's {in_channels} channels and size {expected[0]} x {expected[1]}, got shape "
            f"{tuple(images.shape)}. See channels and resolution of ddpm_ext.load_images."
        )
    if "block_out_channels" in config:
        check_resolution(config, (size[0], size[1]))


def checked_labels(model: object, class_labels: ClassLabels, count: int) -> Tensor | None:
    """Return one class per image, int64, where the network asks for them.

    Args:
        model: The network.
        class_labels: The classes, or None.
        count: Number of images.

    Raises:
        UserError: they are missing or too many, or are none of the network's classes.
    """
    config = _network_config(model)
    if config or class_labels is None:
        return check_labels(class_labels, count, config)
    labels = torch.as_tensor(class_labels)  # of a callable that names no classes every whole number is taken
    if labels.is_floating_point() or labels.shape != (count,):
        raise UserError(f"class_labels must be {count} ints, one per image, got {class_labels!r}.")
    return labels.long()
