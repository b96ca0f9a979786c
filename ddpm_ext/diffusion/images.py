"""Images as the network sees them: levels 0 ... 2^bits - 1 <-> x_0 in [-1, 1], and a predicted x̂_0 held in that range.

DDPM §3.3: "image data consists of integers in {0, 1, ..., 255} scaled linearly to [-1, 1]". This file is the home of
that scale, at 8 bits and at any other depth; nobody else writes 127.5.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UserError

__all__ = [
    "HALF_RANGE",
    "MAX_BITS",
    "Clip",
    "clip_x_0",
    "half_range",
    "threshold_x_0",
    "to_levels",
    "to_uint8",
    "to_unit",
    "to_x_0",
]

HALF_RANGE = 127.5  # levels per unit of x_0 at 8 bits: 255 levels span [-1, 1]
MAX_BITS = 16
Clip = float | Callable[[Tensor], Tensor] | None


def half_range(bits: int = 8) -> float:
    """Return the levels per unit of x_0, (2^bits - 1) / 2.

    Raises:
        UserError: bits outside 1 to 16.
    """
    if not 1 <= bits <= MAX_BITS:
        raise UserError(f"bits must lie between 1 and {MAX_BITS}, got {bits}.")
    return (2**bits - 1) / 2


def to_x_0(pixels: Tensor, bits: int = 8) -> Tensor:
    """Scale levels to clean images: x_0 = 2 · level / (2^bits - 1) - 1.

    Args:
        pixels: Levels of any shape: uint8 up to 8 bits, int32 above.
        bits: Their depth.

    Returns:
        float32, same shape, values in [-1, 1]; level 0 is exactly -1 and the highest exactly 1.

    Raises:
        UserError: not integers of that depth (a float image may already be scaled, and scaling twice is silent).

    Source: Ho et al. 2020, arXiv:2006.11239, §3.3.
    """
    expected = torch.uint8 if bits <= 8 else torch.int32
    if pixels.dtype != expected:
        raise UserError(
            f"to_x_0 expects {str(expected).removeprefix('torch.')} pixels of {bits} bits, got {pixels.dtype}. Floats "
            "in [0, 1] become x_0 by 2 * image - 1."
        )
    return pixels.to(torch.float32).div_(half_range(bits)).sub_(1)


def to_levels(x_0: Tensor, bits: int = 8) -> Tensor:
    """Return the nearest levels: clamp to [-1, 1], then round((x_0 + 1) (2^bits - 1) / 2).

    Args:
        x_0: Floats of any shape, values in about [-1, 1]; what lies outside becomes the lowest or highest level.
        bits: Depth of the result.

    Returns:
        uint8 up to 8 bits, int32 above, same shape. `to_levels(to_x_0(p, bits), bits) == p` for every p.

    Raises:
        UserError: x_0 holds NaN or is not of a floating type (a black image would hide either).
    """
    if not x_0.is_floating_point():
        raise UserError(f"to_levels expects floats in [-1, 1], got {x_0.dtype}.")
    if torch.isnan(x_0).any():
        raise UserError("to_levels expects finite images, got NaN. Look for the step at which the network diverged.")
    dtype = torch.uint8 if bits <= 8 else torch.int32
    return ((x_0.float().clamp(-1, 1) + 1) * half_range(bits)).round().to(dtype)


def to_unit(pixels: Tensor, bits: int = 8) -> Tensor:
    """Return levels as what extractors of features take: uint8 at 8 bits as they are, else floats in [0, 1]."""
    return pixels if bits == 8 else pixels.float() / (2 * half_range(bits))


def to_uint8(x_0: Tensor) -> Tensor:
    """Return the nearest 8-bit pixels; see `to_levels`."""
    return to_levels(x_0)


def clip_x_0(x_0: Tensor, clip: Clip) -> Tensor:
    """Return x̂_0 clamped to [-clip, clip]; None leaves it, and a function is applied to it."""
    if clip is None:
        return x_0
    return clip(x_0) if callable(clip) else x_0.clamp(-clip, clip)


def threshold_x_0(x_0: Tensor, quantile: float, max_value: float) -> Tensor:
    r"""Threshold dynamically: s = clamp(quantile of |x̂_0| per image, 1, max_value); x̂_0 ← clamp(x̂_0, -s, s) / s.

    Args:
        x_0: Shape (B, …), at least float32.
        quantile: In [0, 1].
        max_value: Largest s; 1 is plain clipping to [-1, 1].

    Source: Saharia et al. 2022, arXiv:2205.11487, §2.3.
    """
    s = torch.quantile(x_0.abs().flatten(1), quantile, dim=1).clamp(1, max_value)
    s = s.reshape(-1, *(1,) * (x_0.ndim - 1))
    return x_0.clamp(-s, s) / s
