"""What the bound of some images comes out as: bits/dim of each, every jump of the chain, rate against distortion."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...diffusion.images import half_range

__all__ = ["BitsPerDim", "RateDistortion", "Sweep", "rate_distortion_rows"]


class BitsPerDim(NamedTuple):
    """The bound of each image, float64, in bits/dim. Lower is better."""

    prior: Tensor  # (B,): L_T
    steps: Tensor | None  # (B, K - 1): L_{t-1} from the noisiest jump to the last but one; None where sampled
    decoder: Tensor  # (B,): L_0
    total: Tensor  # (B,)
    standard_error: Tensor | None  # 0-d: of total.mean(), images held fixed; None where every step was taken


class Sweep(NamedTuple):
    """Every jump of the chain on every image."""

    timesteps: list[int]  # of the chain, K, descending, 0 <= t < T
    bits_per_dim: BitsPerDim
    squared_error: Tensor  # (B, K): mean over dimensions of (x_0 - x̂_0(x_t))², images in [-1, 1]
    bits: int = 8  # depth of the images


class RateDistortion(NamedTuple):
    """DDPM Table 4 and Figure 5: one row per timestep of the chain, from the noisiest."""

    label: list[int]  # T - t + 1 of the paper's t: 1 is the first reverse step
    timesteps: list[int]  # code index t, 0 <= t < T
    rate_bits_per_dim: Tensor  # (K,): L_T + Σ_{u>t} L_{u-1}, what is sent before x_t is known
    distortion_rmse: Tensor  # (K,): √E(x_0 - x̂_0(x_t))², in levels: 127.5 of them make 1 at 8 bits


def rate_distortion_rows(sweep: Sweep, num_timesteps: int) -> RateDistortion:
    r"""Rows of a sweep: rate(t) = L_T + Σ_{u>t} L_{u-1}, distortion(t) = (2^bits - 1)/2 √E(x_0 - x̂_0(x_t))².

    Source: Ho et al. 2020, arXiv:2006.11239, §4.3.
    """
    found = sweep.bits_per_dim
    assert found.steps is not None
    rate = torch.cat([found.prior[:, None], found.steps], dim=1).mean(0).cumsum(0)
    return RateDistortion(
        label=[num_timesteps - t for t in sweep.timesteps],
        timesteps=sweep.timesteps,
        rate_bits_per_dim=rate,
        distortion_rmse=half_range(sweep.bits) * sweep.squared_error.mean(0).sqrt(),
    )
