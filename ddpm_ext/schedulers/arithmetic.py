"""The sums that steps are made of: floats for one t, (B, 1, 1, 1) tensors for one t per image."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .checks import Generators, check_generators

__all__ = ["Weight", "add_to_noise", "draw_noise", "mix"]

Weight = Any  # a float, or a tensor (B, 1, 1, 1); which of the two decides what is done


def draw_noise(sample: Tensor, generator: Generators) -> Tensor:
    """Draw z ~ N(0, I) in the sample's shape and dtype, drawn as Diffusers draws it."""
    if generator is None:
        return torch.randn(sample.shape, device=sample.device, dtype=sample.dtype)
    generator = check_generators(generator, sample.shape[0])
    return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)


def mix(x: Tensor, x_weight: Weight, y: Tensor, y_weight: Weight) -> Tensor:
    """Return x_weight · x + y_weight · y in two passes; floats for one t, (B, 1, 1, 1) tensors for one t per image."""
    if isinstance(x_weight, float):
        return torch.mul(x, x_weight).add_(y, alpha=y_weight)
    return torch.addcmul(x * x_weight, y.to(x_weight.dtype), y_weight)  # the weights' dtype is at least float32


def add_to_noise(z: Tensor, std: Weight, x: Tensor, x_weight: Weight, y: Tensor, y_weight: Weight) -> Tensor:
    """Return std · z + x_weight · x + y_weight · y in the noise's own memory where floats allow it, in y's layout."""
    z = z if z.stride() == y.stride() else torch.empty_like(y).copy_(z)
    noise = z.mul_(std) if isinstance(std, float) else std * z
    if isinstance(x_weight, float):
        return noise.add_(x, alpha=x_weight).add_(y, alpha=y_weight)
    return noise.addcmul(x, x_weight).addcmul(y, y_weight)
