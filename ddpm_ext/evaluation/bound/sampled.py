"""The bound from a few jumps of each image: unbiased, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...errors import UserError, is_whole
from ...schedulers.checks import Generators, check_generators
from ...schedulers.config import GuidanceSetting
from .records import BitsPerDim
from .terms import Bound, evaluating

__all__ = ["PILOT_FLOOR", "PILOT_IMAGES", "check_sampled_steps", "pilot_distribution", "sampled_bound"]

PILOT_IMAGES = 8  # whose L_t shape the distribution of sampled t
_PILOT_SEED = 2_206_069_301  # one that nobody takes for the images: p_t must not know the noise that it weighs
PILOT_FLOOR = 0.001  # uniform share of that distribution: no jump is impossible because the pilot pays nothing


@torch.no_grad()
def sampled_bound(
    bound: Bound, x_0: Tensor, num_timesteps_sampled: int, generator: Generators = None, p: Tensor | None = None
) -> BitsPerDim:
    r"""An unbiased estimate of the bound from n of its K - 1 jumps per image, and its standard error.

        Σ L_{t-1} ≈ Σ_k L_{t_k - 1} / (n p_{t_k}),   t_k = F⁻¹((k + u) / n),  k = 0..n-1,  u ~ U(0, 1) for each image

    F is the cumulative sum of p_t ∝ E L_{t-1} (`pilot_distribution`). L_t spans orders of magnitude: uniform strata
    would be useless. L_0, which every image pays, is the mean of several draws. The variance comes from differences of
    neighbouring strata and of those draws.

    Args:
        bound: A network and a chain.
        x_0: Clean images, float64, shape (B, C, H, W).
        num_timesteps_sampled: n, at least 2.
        generator: Source of the noise and of u; with a list of one per image and with p given, every image is
            independent of its batch.
        p: p_t of the K - 1 jumps from the noisiest, shape (K - 1,), sum 1; None takes the batch's own
            `pilot_distribution`.
    """
    n, num_jumps = num_timesteps_sampled, len(bound.timesteps) - 1
    check_sampled_steps(bound, n)
    bound.chain.warn_of_guidance(GuidanceSetting())
    generator = check_generators(generator, len(x_0))
    x_0 = x_0.to(bound.tables.beta.device)
    times = torch.tensor(bound.timesteps, device=x_0.device)
    p = (pilot_distribution(bound, x_0) if p is None else p).to(x_0)
    with evaluating(bound.model):
        position = (torch.arange(n) + _uniform(len(x_0), generator)) / n
        index = torch.searchsorted(p.cumsum(0), position.to(p)).clamp(max=num_jumps - 1)
        steps = bound.columns(x_0, times[index], generator)[0] / (n * p[index])
        decoder = bound.columns(x_0, times[-1:].expand(len(x_0), max(2, n // 5)), generator, decoder=True)[0]

    steps_var = (steps.diff(dim=1) ** 2).mean(1) * n / 2  # two neighbours differ by √2 standard deviations
    decoder_var = decoder.var(1) / decoder.shape[1]
    standard_error = (steps_var + decoder_var).sum().sqrt() / len(x_0)
    nats = bound.prior(x_0), decoder.mean(1), bound.prior(x_0) + steps.sum(1) + decoder.mean(1), standard_error
    prior, decoder, total, standard_error = (part / math.log(2) for part in nats)
    return BitsPerDim(prior, None, decoder, total, standard_error)


def check_sampled_steps(bound: Bound, n: int) -> None:
    """Raise a UserError unless n of a chain's jumps can be drawn."""
    num_jumps = len(bound.timesteps) - 1
    if num_jumps < 2:
        raise UserError(
            f"A chain of {num_jumps + 1} steps has no two jumps before the decoder to draw from: leave out "
            "num_timesteps_sampled."
        )
    if not is_whole(n) or not 2 <= n <= num_jumps:
        raise UserError(
            f"num_timesteps_sampled must be an int from 2 to {num_jumps}, the jumps before the decoder, got {n!r}. "
            "Leave it out to take every step."
        )


@torch.no_grad()
def pilot_distribution(bound: Bound, x_0: Tensor) -> Tensor:
    """p_t ∝ E L_{t-1} of the K - 1 jumps, shape (K - 1,), sum 1, from every jump of a few images spread over the batch.

    A share of it is uniform, so that no jump is impossible. Its noise has a seed of its own: it takes nothing from the
    generators of the images, and equal images give an equal p_t.

    Args:
        bound: A network and a chain.
        x_0: Clean images, float64, shape (B, C, H, W).
    """
    x_0 = x_0.to(bound.tables.beta.device)
    chosen = sorted({round(i) for i in torch.linspace(0, len(x_0) - 1, PILOT_IMAGES).tolist()})
    times = torch.tensor(bound.timesteps[:-1], device=x_0.device).expand(len(chosen), -1)
    few = bound if bound.labels is None else replace(bound, labels=bound.labels[chosen])
    with evaluating(bound.model):
        found = few.columns(x_0[chosen], times, torch.Generator().manual_seed(_PILOT_SEED))[0]
    mean = found.mean(0).clamp(min=0)
    uniform = torch.full_like(mean, 1 / len(mean))
    return uniform if not bool(mean.sum() > 0) else (1 - PILOT_FLOOR) * mean / mean.sum() + PILOT_FLOOR * uniform


def _uniform(size: int, generator: Generators) -> Tensor:
    """u of each image, shape (size, 1), float64, on the CPU."""
    if isinstance(generator, Sequence):
        return torch.cat([_uniform(1, one) for one in generator])
    device = "cpu" if generator is None else generator.device
    return torch.rand((size, 1), generator=generator, dtype=torch.float64, device=device).cpu()
