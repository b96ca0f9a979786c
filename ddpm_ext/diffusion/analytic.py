r"""The best reverse variance and the best few steps of a trained network, from its measured errors.

Two numbers per step say all that is needed, measured once over training images with one noise each:

    mse_eps[t] = E mean_dims (ε - ε̂)²        ms_eps[t] = E mean_dims ε̂²

For a perfect network mse_eps = 1 - ms_eps; near T ms_eps carries noise of size √(2/(N d)) and mse_eps almost none, so
mse_eps is what these functions take. They serve every number of steps, every trajectory, and DDPM as well as DDIM.
Steps are code indices (step 0 is the paper's t = 1), s = -1 is the clean image, everything is float64.

Source: Bao et al. 2022, "Analytic-DPM", arXiv:2201.06503; for an imperfect mean arXiv:2206.07309.
"""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, check_word
from .images import HALF_RANGE
from .process import Jump, jump
from .schedules import Tables
from .words import TrajectoryCost

__all__ = [
    "covariance",
    "ddim_variance",
    "optimal_trajectories",
    "optimal_trajectory",
    "optimal_variance",
    "sampling_cap",
]


def covariance(tables: Tables, mse_eps: Tensor, t: Tensor) -> Tensor:
    r"""Return how far x̂_0 is from x_0 at step t, per dimension: Cov_t = min((1-ᾱ_t)/ᾱ_t · mse_eps[t], 1).

    Data in [-1, 1] have at most variance 1, hence the bound (Theorem 2). It is the value where ᾱ_t = 0 (zero terminal
    SNR): x_t holds nothing of x_0 there, and ε̂ = x_t errs by 0 whatever the network says.

    Args:
        tables: One schedule.
        mse_eps: float64, shape (T,), mean squared error of ε̂ per step.
        t: int64, any shape, 0 <= t < T.

    Returns:
        float64 in the shape of t.
    """
    return squared_error(tables, mse_eps)[t].clamp(max=1)


def squared_error(tables: Tables, mse_eps: Tensor) -> Tensor:
    r"""Return R_t = (1-ᾱ_t)/ᾱ_t · mse_eps[t], the mean squared error of x̂_0 at every step, float64, shape (T,).

    Where ᾱ_t = 0 the quotient says nothing, and R_t = 1, the largest variance of data in [-1, 1], stands for it.

    Args:
        tables: One schedule.
        mse_eps: float64, shape (T,).
    """
    mse_eps = checked_errors("mse_eps", mse_eps, tables)
    return (tables.one_minus_alpha_bar / tables.alpha_bar * mse_eps).masked_fill(tables.alpha_bar == 0, 1.0)


def optimal_variance(tables: Tables, mse_eps: Tensor, s: Tensor, t: Tensor, eta: float = 1.0) -> Tensor:
    r"""Return σ*² of the jump t -> s: what minimises the bound for this network.

        σ*² = λ² + [√ᾱ_s - √((1-ᾱ_s-λ²) ᾱ_t/(1-ᾱ_t))]² Cov_t,   λ² = η² β̃

    With η = 1 the bracket is c1 and σ*² = β̃ + c1² Cov_t, DDPM; η = 0 is DDIM's mean, whose σ*² is positive too.

    Args:
        tables: One schedule.
        mse_eps: float64, shape (T,).
        s: int64, any shape, -1 <= s < t.
        t: int64, shape of s, 0 <= t < T.
        eta: η in [0, 1].

    Returns:
        float64 in the shape of t. At s = -1 it is Cov_t (η = 1), though sampling adds no noise there.

    Raises:
        UserError: mse_eps is not one finite number >= 0 per step, or η is outside [0, 1].

    Source: Bao et al. 2022, arXiv:2201.06503, Theorem 1 and Eq. (8); 2206.07309 for the imperfect mean.
    """
    step = jump(tables, t, s)
    if eta == 1:
        weight = step.c1
    else:
        lambda2 = ddim_variance(step, eta)
        noise = (step.one_minus_alpha_bar_s - lambda2).clamp(min=0)
        weight = step.alpha_bar_s.sqrt() - (noise * step.alpha_bar_t / step.one_minus_alpha_bar_t).sqrt()
    return eta**2 * step.var + weight**2 * covariance(tables, mse_eps, t)


def ddim_variance(step: Jump, eta: float) -> Tensor:
    """Return λ² = η² β̃, the variance of the DDIM family's own noise.

    Source: Song et al. 2020, arXiv:2010.02502, Eq. (16).
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta must lie between 0 (DDIM) and 1 (DDPM), got {eta!r}.")
    return eta**2 * step.var


def sampling_cap(grey_levels: float) -> float:
    r"""Return the largest σ² of the jump that ends at the first timestep of the chain.

    E|σ z| <= y · 2/255, so σ² <= (y · 2/255 · √(π/2))².

    For sampling only, never for bits/dim: without it few-step samples end in visible noise.

    Args:
        grey_levels: y; the paper uses 2 for DDPM and 1 for DDIM.

    Source: Bao et al. 2022, arXiv:2201.06503, Appendix F.
    """
    return (grey_levels / HALF_RANGE * math.sqrt(math.pi / 2)) ** 2


def analytic_edges(tables: Tables, mse_eps: Tensor) -> np.ndarray:
    r"""Return J(s, t) = log(1 - b · max(0, 1 - mse_eps[t]) / (1-ᾱ_t)): what a jump costs at its optimal variance.

    It is written as log([a (1-ᾱ_s) + b · min(1, mse_eps[t])] / (1-ᾱ_t)), which keeps its digits where ᾱ_t is small.
    The cost of a path is Σ J + log SNR(n_1) - log SNR(n_K). Where ᾱ_t = 0 both J and the last logarithm are infinite:
    as ᾱ_t -> 0 with Cov_t = 1, J - log SNR(t) -> -log ᾱ_s, which is J there, the last logarithm being left out.

    Args:
        tables: One schedule.
        mse_eps: float64, shape (T,).

    Returns:
        float64, shape (T, T), entry [s, t] for 0 <= s < t, inf elsewhere; times ½ in nats per dimension.

    Source: Bao et al. 2022, arXiv:2201.06503, §4, Eq. (13).
    """
    error = checked_errors("mse_eps", mse_eps, tables).clamp(max=1)
    step, earlier = _all_jumps(tables)
    cost = ((step.a * step.one_minus_alpha_bar_s + step.b * error) / step.one_minus_alpha_bar_t).log()
    cost = torch.where(step.alpha_bar_t == 0, -step.alpha_bar_s.log(), cost)
    return cost.masked_fill(~earlier, math.inf).cpu().numpy()


def fixed_edges(tables: Tables, mse_eps: Tensor, variance: TrajectoryCost) -> np.ndarray:
    r"""Return F(s, t) = β̃/σ² - 1 - log(β̃/σ²) + c1² R_t/σ²: what a jump costs with σ² = β̃ or σ² = b.

    R_t is the `squared_error` of x̂_0, here without a bound.

    Args:
        tables: One schedule.
        mse_eps: float64, shape (T,).
        variance: "fixed_small" or "fixed_large".

    Returns:
        As `analytic_edges`.

    Source: Ho et al. 2020, arXiv:2006.11239, Eqs. (8), (12); Watson et al. 2021, arXiv:2106.03802.
    """
    error = squared_error(tables, mse_eps)
    step, earlier = _all_jumps(tables)
    sigma2 = step.var if variance == "fixed_small" else step.b
    ratio = step.var / sigma2
    cost = ratio - 1 - ratio.log() + step.c1**2 * error / sigma2
    return cost.masked_fill(~earlier, math.inf).cpu().numpy()


def trajectory_edges(tables: Tables, mse_eps: Tensor, cost: TrajectoryCost = "analytic") -> np.ndarray:
    """Return the cost of every jump by its name: `analytic_edges` or `fixed_edges`."""
    check_word("cost", cost, get_args(TrajectoryCost))
    return analytic_edges(tables, mse_eps) if cost == "analytic" else fixed_edges(tables, mse_eps, cost)


def optimal_trajectory(tables: Tables, mse_eps: Tensor, K: int, cost: TrajectoryCost = "analytic") -> list[int]:
    r"""Return the K timesteps 1 = n_1 < … < n_K = T whose bound is lowest: a cheapest path.

        C_1(1) = 0, else ∞;   C_k(t) = min_{s<t} C_{k-1}(s) + J(s, t)

    Args:
        tables: One schedule.
        mse_eps: float64, shape (T,).
        K: Number of steps, 2 <= K <= T.
        cost: Which reverse variance the steps will use.

    Returns:
        K ascending code indices, from 0 to T - 1.

    Raises:
        UserError: K that is not an int in [2, T], an unknown cost, mse_eps that does not fit, or one so large that
            no path has a finite cost.

    Source: Bao et al. 2022, arXiv:2201.06503, §4, Algorithm 1; Watson et al. 2021, arXiv:2106.03802.
    """
    return optimal_trajectories(tables, mse_eps, [K], cost)[K]


def optimal_trajectories(
    tables: Tables, mse_eps: Tensor, steps: list[int], cost: TrajectoryCost = "analytic"
) -> dict[int, list[int]]:
    """Return `optimal_trajectory` for several K in one sweep of the dynamic program, O(max(K) T²).

    Args:
        tables: One schedule.
        mse_eps: float64, shape (T,).
        steps: The K wanted, each in [2, T].
        cost: Which reverse variance the steps will use.

    Returns:
        K -> the timesteps of its chain.
    """
    T = tables.num_timesteps
    for K in steps:
        if isinstance(K, bool) or not isinstance(K, int) or not 2 <= K <= T:
            raise UserError(f"A trajectory has from 2 to T = {T} steps, got K = {K!r}.")
    from_s = trajectory_edges(tables, mse_eps, cost).T.copy()  # row t, column s: the minimum runs along memory
    best = np.full(T, math.inf)
    best[0] = 0.0
    came_from, cheapest = [np.zeros(T, dtype=np.int64)], [0.0]
    for _ in range(1, max((K for K in steps if K < T), default=1)):
        total = from_s + best
        origin = total.argmin(axis=1)
        came_from.append(origin)
        best = total[np.arange(T), origin]
        cheapest.append(best[-1])
    for K in steps:
        if K < T and not math.isfinite(cheapest[K - 1]):
            raise UserError(f"No trajectory of {K} steps has a finite cost: mse_eps is too large. Measure it again.")
    return {K: list(range(T)) if K == T else _walk_back(came_from[:K], T) for K in steps}


def checked_errors(name: str, errors: Tensor, tables: Tables) -> Tensor:
    """Return Measured errors as float64 on the tables' device, when there is one finite number >= 0 per step."""
    values = torch.as_tensor(errors, dtype=torch.float64, device=tables.beta.device)
    if values.shape != (tables.num_timesteps,) or not bool((values.isfinite() & (values >= 0)).all()):
        raise UserError(
            f"{name} must hold one finite number of at least 0 per step, {tables.num_timesteps} of them, got shape "
            f"{tuple(values.shape)}. Measure it on the network with this schedule."
        )
    return values


def _all_jumps(tables: Tables) -> tuple[Jump, Tensor]:
    """Coefficients of every jump, shape (T, T) by [s, t], and where s < t."""
    i = torch.arange(tables.num_timesteps, device=tables.beta.device)
    s, t = i[:, None].expand(-1, len(i)), i[None, :].expand(len(i), -1)
    earlier = s < t
    # Entries with s >= t are no jumps: any jump will do there, they are masked.
    return jump(
        tables, torch.where(earlier, t, torch.ones_like(t)), torch.where(earlier, s, torch.zeros_like(s))
    ), earlier


def _walk_back(came_from: list[np.ndarray], T: int) -> list[int]:
    path = [T - 1]
    for origin in reversed(came_from[1:]):
        path.append(int(origin[path[-1]]))
    return path[::-1]
