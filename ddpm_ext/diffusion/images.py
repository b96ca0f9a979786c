"""Pictures as the network sees them: 8-bit pixels <-> x_0 in [-1, 1].

DDPM §3.3: "image data consists of integers in {0, 1, ..., 255} scaled linearly to [-1, 1]". This file is the home of
that scale; nobody else writes 127.5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError

HALF_RANGE = 127.5  # grey levels per unit of x_0: 255 levels span [-1, 1]


def to_x_0(pixels: Tensor) -> Tensor:
    """Clean images of 8-bit pixels: x_0 = pixels / 127.5 - 1.

    Args:
        pixels: uint8, any shape.

    Returns:
        float32, same shape, values in [-1, 1]; pixel 0 is exactly -1 and pixel 255 exactly 1.

    Raises:
        UserError: the pixels are not uint8 (a float image may already be scaled, and scaling twice is silent).

    Source: Ho et al. 2020, arXiv:2006.11239, §3.3.
    """
    if pixels.dtype != torch.uint8:
        raise UserError(
            f"to_x_0 expects uint8 pixels, got {pixels.dtype}. Floats in [0, 1] become x_0 by 2 * image - 1."
        )
    return pixels.to(torch.float32).div_(HALF_RANGE).sub_(1)


def to_uint8(x_0: Tensor) -> Tensor:
    """The nearest 8-bit pixels: clamp to [-1, 1], then round(127.5 (x_0 + 1)).

    Args:
        x_0: Floats of any shape, values in about [-1, 1]; what lies outside becomes 0 or 255.

    Returns:
        uint8, same shape. `to_uint8(to_x_0(p)) == p` for every p.

    Raises:
        UserError: x_0 holds NaN or is not of a floating type (a black picture would hide either).
    """
    if not x_0.is_floating_point():
        raise UserError(f"to_uint8 expects floats in [-1, 1], got {x_0.dtype}.")
    if torch.isnan(x_0).any():
        raise UserError("to_uint8 expects finite images, got NaN. Look for the step at which the network diverged.")
    return ((x_0.float().clamp(-1, 1) + 1) * HALF_RANGE).round().to(torch.uint8)
