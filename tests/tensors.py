"""The tables, images and noise that tests of the mathematics share, all in float64."""

from __future__ import annotations

import oracles
import torch
from torch import Tensor

from ddpm_ext.diffusion.schedules import make_tables

__all__ = ["BAR", "PREDICTIONS", "TABLES", "images", "noise"]

TABLES = make_tables()
BAR = oracles.exact_alpha_bar(TABLES.beta.tolist())
PREDICTIONS = ("epsilon", "sample", "v_prediction", "posterior_mean")


def images(seed: int = 0, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (5, 2, 3, 2)) -> Tensor:
    """Clean images on the 8-bit grid."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(256, shape, generator=generator).double() / 127.5 - 1).to(dtype)


def noise(seed: int = 1, shape: tuple[int, ...] = (5, 2, 3, 2)) -> Tensor:
    """Standard normal noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
