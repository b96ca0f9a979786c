r"""Fitted solvers: the deterministic chain in a few network calls, a linear multistep method fitted by least squares.

One jump from step t to step s (-1: the clean image), α = √ᾱ, with x̂_0 and ε̂ of step t and of the m - 1 visited steps
before it (j = 1 is the last one before t; fewer at the start):

    x_s = α_s [x̂_0 + d_0 x̂_0 + Σ_j d_j (x̂_0 - x̂_0^j)] + √(1-ᾱ_s) ε̂ + h [c_0 ε̂ + Σ_j c_j (ε̂ - ε̂^j)]

with h = α_s (σ_s - σ_t), σ = √((1-ᾱ)/ᾱ). c = d = 0 is DDIM with η = 0, which in x̄ = x/α is Euler's method for
dx̄/dσ = ε̂. Adams-Bashforth, DPM-Solver++(2M), iPNDM and PLMS are other fixed choices; `solver_fit` finds those of one
network.

Every t and s counts from 0; coefficients are float64 and are rounded once, where they meet an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from ..errors import UserError, check_word
from .images import Clip, clip_x_0
from .process import PredictionType, eps_weights, x_0_weights
from .schedules import Tables, respaced_timesteps
from .words import ReferenceKind

__all__ = [
    "REFERENCES",
    "Estimate",
    "JumpWeights",
    "Predict",
    "Reference",
    "Solver",
    "estimate",
    "estimate_weights",
    "jump_size",
    "jump_weights",
    "solve",
    "solve_reference",
    "solver_step",
]

REFERENCES: tuple[ReferenceKind, ...] = get_args(ReferenceKind)


class Estimate(NamedTuple):
    """What a network says of one noised image, x_t ≈ √ᾱ_t x̂_0 + √(1-ᾱ_t) ε̂."""

    x_0: Tensor  # (B, C, H, W)
    eps: Tensor  # (B, C, H, W)


Predict = Callable[[Tensor, int], Estimate]  # (x_t, t) -> the network's estimate, 0 <= t < T


class EstimateWeights(NamedTuple):
    """x̂_0 = x_of_x_t · x_t + x_of_output · output, clipped; ε̂ = of_x_t · x_t + of_output · output + of_x_0 · x̂_0."""

    x_of_x_t: float
    x_of_output: float
    of_x_t: float
    of_output: float
    of_x_0: float


class JumpWeights(NamedTuple):
    """x_s = of_x_0 · x̂_0 + of_eps · ε̂ + Σ_j (of_x_0_before[j] · x̂_0^j + of_eps_before[j] · ε̂^j)."""

    of_x_0: float
    of_eps: float
    of_x_0_before: tuple[float, ...]  # the step before first
    of_eps_before: tuple[float, ...]


@dataclass(frozen=True)
class Solver:
    """The steps of a chain and the coefficients of its jumps.

    Attributes:
        times: The K steps visited, strictly descending, 0 <= t < T; the last jump ends at the clean image.
        coefficients: float64, shape (K, 2m): c_0 .. c_{m-1}, d_0 .. d_{m-1} of each jump.
    """

    times: tuple[int, ...]
    coefficients: Tensor

    @property
    def order(self) -> int:
        """m: how many estimates one jump uses."""
        return self.coefficients.shape[1] // 2

    @property
    def targets(self) -> tuple[int, ...]:
        """Where each jump ends."""
        return (*self.times[1:], -1)


class Reference(NamedTuple):
    """A fine solution of the same noises."""

    times: tuple[int, ...]  # its steps, descending, then -1
    states: Sequence[Tensor]  # x at each of them, (N, C, H, W)


# -- one step ---------------------------------------------------------------------------------------------------------


def estimate_weights(
    tables: Tables, t: int, prediction_type: PredictionType, kind: ReferenceKind = "clipped"
) -> EstimateWeights:
    r"""How x̂_0 and ε̂ of step t follow from x_t and the network's output.

        clipped      x̂_0 clipped, ε̂ = (x_t - √ᾱ_t x̂_0) / √(1-ᾱ_t) recomputed from it
        clipped_raw  x̂_0 clipped, ε̂ of the output itself (Diffusers' DDIM)
        unclipped    neither clipped; the two ε̂ are then the same

    Args:
        tables: One schedule, on the CPU.
        t: 0 <= t < T.
        prediction_type: What the network predicts.
        kind: One of the words above.

    Raises:
        UserError: epsilon prediction at ᾱ_t = 0, where there is no x̂_0.
    """
    check_word("reference", kind, REFERENCES)
    at = torch.tensor(t)
    x_0, eps = x_0_weights(tables, at, prediction_type), eps_weights(tables, at, prediction_type)
    if not math.isfinite(x_0.of_output.item()):
        raise UserError(
            f"timestep {t} has no signal left (ᾱ_t = 0), where {prediction_type} prediction gives no x_0. Use "
            'prediction_type "v_prediction" or "sample".'
        )
    if kind == "clipped":
        signal, rstd = tables.alpha_bar[t].sqrt().item(), tables.one_minus_alpha_bar[t].rsqrt().item()
        return EstimateWeights(x_0.of_x_t.item(), x_0.of_output.item(), rstd, 0.0, -signal * rstd)
    return EstimateWeights(x_0.of_x_t.item(), x_0.of_output.item(), eps.of_x_t.item(), eps.of_output.item(), 0.0)


def estimate(output: Tensor, x_t: Tensor, weights: EstimateWeights, clip: Clip = None) -> Estimate:
    """x̂_0 and ε̂ of one step, in the dtype of x_t.

    Args:
        output: The network's prediction, shape (B, C, …), x_t's dtype.
        x_t: Shape (B, C, …).
        weights: `estimate_weights` of the step.
        clip: As in `images.clip_x_0`; leave it out for the unclipped kind.
    """
    x_0 = clip_x_0(_combine((weights.x_of_x_t, x_t), (weights.x_of_output, output)), clip)
    if (weights.of_x_t, weights.of_output, weights.of_x_0) == (0.0, 1.0, 0.0):
        return Estimate(x_0, output)
    return Estimate(x_0, _combine((weights.of_x_t, x_t), (weights.of_output, output), (weights.of_x_0, x_0)))


def jump_weights(tables: Tables, t: int, s: int, coefficients: Sequence[float], before: int) -> JumpWeights:
    """The formula above, multiplied out.

    Args:
        tables: One schedule, on the CPU.
        t: The step of the image.
        s: The next one, -1 <= s < t.
        coefficients: c_0 .. c_{m-1}, d_0 .. d_{m-1}; all 0 is DDIM.
        before: How many earlier estimates there are; at most m - 1 of them are used.
    """
    order = len(coefficients) // 2
    used = min(before, order - 1)
    (c_0, *c), (d_0, *d) = coefficients[: 1 + used], coefficients[order : order + 1 + used]
    signal, spread, h = jump_size(tables, t, s)
    return JumpWeights(
        of_x_0=signal * (1 + (d_0 + sum(d))),
        of_eps=spread + h * (c_0 + sum(c)),
        of_x_0_before=tuple(-signal * one for one in d),
        of_eps_before=tuple(-h * one for one in c),
    )


def solver_step(now: Estimate, before: Sequence[Estimate], weights: JumpWeights) -> Tensor:
    """x_s from the estimates of this step and of those before it, the last one first.

    Args:
        now: x̂_0 and ε̂ at t.
        before: Estimates of the steps visited before t; those that the weights do not name are not looked at.
        weights: `jump_weights` of the jump.
    """
    terms = [(weights.of_x_0, now.x_0), (weights.of_eps, now.eps)]
    for of_x_0, of_eps, one in zip(weights.of_x_0_before, weights.of_eps_before, before, strict=False):
        terms += [(of_x_0, one.x_0), (of_eps, one.eps)]
    return _combine(*terms)


def jump_size(tables: Tables, t: int, s: int) -> tuple[float, float, float]:
    """(√ᾱ_s, √(1-ᾱ_s), h); where σ_t is infinite, h is in units of x_t instead: -√ᾱ_s √(1-ᾱ_t)."""
    signal_t, spread_t = tables.alpha_bar[t].sqrt().item(), tables.one_minus_alpha_bar[t].sqrt().item()
    signal = 1.0 if s < 0 else tables.alpha_bar[s].sqrt().item()
    spread = 0.0 if s < 0 else tables.one_minus_alpha_bar[s].sqrt().item()
    return signal, spread, (spread * signal_t - signal * spread_t) / (signal_t or 1.0)


def _combine(*terms: tuple[float, Tensor]) -> Tensor:
    """Σ weight · tensor in one new tensor; terms of weight 0 are left out."""
    kept = [term for term in terms if term[0] != 0] or [terms[0]]
    total = kept[0][1] * kept[0][0]
    for weight, x in kept[1:]:
        total.add_(x, alpha=weight)
    return total


# -- whole chains -----------------------------------------------------------------------------------------------------


def solve(predict: Predict, x: Tensor, solver: Solver, tables: Tables) -> Iterator[Tensor]:
    """The state after each jump of a solver; the last one is x_0.

    Args:
        predict: The network, (x_t, t) -> Estimate.
        x: Noise at the solver's first step, shape (N, C, H, W).
        solver: Steps and coefficients.
        tables: One schedule, on the CPU.
    """
    before: tuple[Estimate, ...] = ()
    for t, s, row in zip(solver.times, solver.targets, solver.coefficients.tolist(), strict=True):
        now = predict(x, t)
        x = solver_step(now, before, jump_weights(tables, t, s, row, len(before)))
        before = (now, *before)[: solver.order - 1]
        yield x


def solve_reference(predict: Predict, x_T: Tensor, tables: Tables, num_steps: int = 200) -> Reference:
    """DDIM with η = 0 on a fine even grid, every state kept.

    Args:
        predict: The network, (x_t, t) -> Estimate; whether it clips decides which reference this is.
        x_T: Noise, shape (N, C, H, W).
        tables: One schedule, on the CPU.
        num_steps: Steps of the grid; at most T are taken.
    """
    times = tuple(respaced_timesteps("even", tables.num_timesteps, min(num_steps, tables.num_timesteps))[::-1])
    plain = Solver(times, torch.zeros(len(times), 2, dtype=torch.float64))
    return Reference((*times, -1), [x_T, *solve(predict, x_T, plain, tables)])
