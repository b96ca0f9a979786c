r"""One choice of sampling timesteps as a table of weights: a row per step, looked up without host-device waits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from ..diffusion import analytic, process, reverse
from ..diffusion.schedules import Tables, respaced_timesteps, widest_float
from ..diffusion.words import LEARNED_VARIANCES, Trajectory
from ..errors import UserError, check_word
from .arithmetic import Weight
from .config import SchedulerOptions

__all__ = [
    "StepTable",
    "Weights",
    "check_usable",
    "checked_timesteps",
    "chosen_timesteps",
    "make_step_table",
    "measured_errors",
]


class Weights(NamedTuple):
    """What one reverse step needs, as floats for one t or as (B, 1, 1, 1) tensors for one t per image."""

    of_x_t: Weight  # x̂_0 = of_x_t · x_t + of_output · output
    of_output: Weight
    c1: Weight  # mean = c1 · x̂_0 + c2 · x_t + c3 · output
    c2: Weight
    c3: Weight  # 0 but for the DDIM family
    std: Weight  # σ of the fixed and analytic variances; 0 at the last jump
    log_small: Weight  # log β̃ with the decoder's rule
    log_large: Weight  # log b
    noisy: Weight  # 1 where noise is added, 0 at the last jump


class Rows(NamedTuple):
    """The tables of one choice of timesteps on one device, an entry per step; NaN where a step is not visited."""

    weights: Tensor  # float64, (T, 9), a row of Weights per step
    previous: Tensor  # int64, (T,): the step after t in the reverse chain, -1 for the clean image
    log_optimal: Tensor  # float64, (T,): log σ*² of the analytic variance, not capped

    def to(self, device: torch.device) -> Rows:
        """Return the same rows on another device; rounded to float32 on MPS, which has no float64."""
        dtype = widest_float(device)
        return Rows(self.weights.to(dtype).to(device), self.previous.to(device), self.log_optimal.to(dtype).to(device))


@dataclass
class StepTable:
    """The jumps of one choice of timesteps. Rows of steps that are not visited are NaN: never a wrong number."""

    options: SchedulerOptions
    timesteps: list[int]  # code indices, descending
    usable: list[bool]  # which of them have weights: epsilon has none where ᾱ_t = 0
    rows: Rows  # on the CPU
    by_device: dict[torch.device, Rows] = field(default_factory=dict)

    @cached_property
    def floats(self) -> dict[int, Weights]:
        """The visited rows as floats, made when the first step asks for one."""
        values = self.rows.weights[self.timesteps].tolist()
        visited = zip(self.timesteps, values, self.usable, strict=True)
        return {i: Weights(*row) for i, row, fits in visited if fits}

    def weights(self, t: Tensor, x: Tensor) -> Weights:
        """Return one row per image, shaped beside x, in the dtype in which x is computed; the host never waits."""
        rows = self.on(t.device).weights.index_select(0, t.reshape(-1)).to(process.compute_dtype(x))
        return Weights(*(column.reshape(-1, *(1,) * (x.ndim - 1)) for column in rows.unbind(1)))

    def on(self, device: torch.device) -> Rows:
        """Return the rows on a device, copied there once."""
        if device.type == "cpu":
            return self.rows
        if device not in self.by_device:
            self.by_device[device] = self.rows.to(device)
        return self.by_device[device]


def make_step_table(tables: Tables, timesteps: list[int], options: SchedulerOptions) -> StepTable:
    """Return the weights of every jump of a chain.

    Args:
        tables: One schedule, on the CPU.
        timesteps: The steps it visits, code indices, descending.
        options: The scheduler's.
    """
    t = torch.tensor(timesteps, dtype=torch.int64)
    s = torch.tensor([*timesteps[1:], -1], dtype=torch.int64)
    step = process.jump(tables, t, s)
    small, large = reverse.variance_bounds(step, reverse.decoder_log_var(tables))
    noisy = (s >= 0).to(torch.float64)
    optimal = _optimal_variance(tables, s, t, options)
    std = _std(small, large, optimal, s, timesteps[-1], options)
    x_0 = process.x_0_weights(tables, t, options.prediction_type)
    mean = _mean_weights(tables, step, t, options)
    weights = torch.stack([x_0.of_x_t, x_0.of_output, *mean, std, small, large, noisy], dim=1)

    usable = torch.isfinite(weights[:, :5]).all(1)
    rows = Rows(
        weights=torch.full((tables.num_timesteps, weights.shape[1]), math.nan, dtype=torch.float64),
        previous=torch.full((tables.num_timesteps,), -1, dtype=torch.int64),
        log_optimal=torch.full((tables.num_timesteps,), math.nan, dtype=torch.float64),
    )
    rows.weights[t[usable]] = weights[usable]
    rows.previous[t] = s
    rows.log_optimal[t] = optimal.log()
    return StepTable(options, timesteps, usable.tolist(), rows)


def _std(small: Tensor, large: Tensor, optimal: Tensor, s: Tensor, first: int, options: SchedulerOptions) -> Tensor:
    """σ with which sampling draws: 0 at the last jump, NaN where the network's head or measured errors decide."""
    noisy, eta = (s >= 0).to(torch.float64), options.extension.eta
    if options.variance_type in LEARNED_VARIANCES:
        return torch.full_like(noisy, math.nan)
    if options.variance_type == "analytic":  # capped at the jump to the first of the respaced timesteps
        cap = analytic.sampling_cap(2 if eta == 1 else 1)
        return torch.where(s == first, optimal.clamp(max=cap), optimal).sqrt() * noisy
    log_var = reverse.reverse_log_var(options.variance_type, small, large, s < 0)
    return eta * log_var.mul(0.5).exp() * noisy


def _mean_weights(
    tables: Tables, step: process.Jump, t: Tensor, options: SchedulerOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """(c1, c2, c3): DDPM's posterior mean, or with η < 1 DDIM's √ᾱ_s x̂_0 + √(1-ᾱ_s-λ²) ε̂ (2010.02502, Eq. 12)."""
    eta = options.extension.eta
    if eta == 1:
        return step.c1, step.c2, torch.zeros_like(step.c1)
    eps = process.eps_weights(tables, t, options.prediction_type)
    direction = (step.one_minus_alpha_bar_s - analytic.ddim_variance(step, eta)).clamp(min=0).sqrt()
    return step.alpha_bar_s.sqrt(), direction * eps.of_x_t, direction * eps.of_output


def _optimal_variance(tables: Tables, s: Tensor, t: Tensor, options: SchedulerOptions) -> Tensor:
    """σ*² of each jump; NaN until errors are measured, or where another variance is used."""
    if options.variance_type != "analytic" or options.extension.mse_eps is None:
        return torch.full(t.shape, math.nan, dtype=torch.float64)
    mse_eps = torch.tensor(options.extension.mse_eps, dtype=torch.float64)
    return analytic.optimal_variance(tables, mse_eps, s, t, options.extension.eta)


def check_usable(table: StepTable) -> None:
    """Raise a UserError when a chain visits a step at which x̂_0 is undefined (epsilon at ᾱ_t = 0)."""
    missing = [i for i, fits in zip(table.timesteps, table.usable, strict=True) if not fits]
    if missing:
        raise UserError(
            f"timestep {missing[0]} has no signal left (ᾱ_t = 0), where epsilon prediction is undefined. Use "
            'prediction_type "v_prediction" or "sample", or fewer steps with "leading" spacing.'
        )


def chosen_timesteps(
    tables: Tables, options: SchedulerOptions, num_inference_steps: int, trajectory: Trajectory | None
) -> list[int]:
    """Return the K steps that options and a trajectory's name choose, ascending code indices.

    Raises:
        UserError: K outside [1, T], an unknown trajectory, or an optimal one before errors are measured.
    """
    trajectory = options.extension.trajectory if trajectory is None else trajectory
    if trajectory is None or trajectory == "even":
        spacing = "even" if trajectory else options.timestep_spacing
        return respaced_timesteps(spacing, tables.num_timesteps, num_inference_steps, options.steps_offset)
    check_word("trajectory", trajectory, get_args(Trajectory))
    variance: str = options.variance_type
    cost: Any = variance.removesuffix("_log") if variance.startswith("fixed") else "analytic"
    known = options.extension.trajectories.get(str(num_inference_steps))
    if known is not None and cost == "analytic":
        return list(known)
    mse_eps = measured_errors(options, "An optimal trajectory")
    return analytic.optimal_trajectory(tables, mse_eps, num_inference_steps, cost)


def measured_errors(options: SchedulerOptions, what: str) -> Tensor:
    """Return mse_eps, float64, shape (T,); a UserError that says how to get it where there is none."""
    if options.extension.mse_eps is None:
        raise UserError(
            f"{what} needs the network's measured errors, and this scheduler has none. Measure them with "
            "`ddpm-ext calibrate`, or put mse_eps, one number per step, into the config's _ddpm_ext."
        )
    return torch.tensor(options.extension.mse_eps, dtype=torch.float64)


def checked_timesteps(timesteps: Sequence[int] | Tensor | np.ndarray, T: int) -> list[int]:
    """Return custom timesteps as ints; a UserError unless they are whole, strictly descending and in [0, T)."""
    arrays = isinstance(timesteps, Tensor | np.ndarray)
    times: Any = timesteps.tolist() if arrays else timesteps  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(times, Iterable):
        raise UserError(f"timesteps must be a sequence of descending steps, got {timesteps!r}.")
    times = list(times)
    if not times:
        raise UserError("timesteps must hold at least one step, got none.")
    for time in times:
        if isinstance(time, bool) or not isinstance(time, int | float | np.integer) or time % 1 != 0:  # NaN, inf too
            raise UserError(f"timesteps must be whole numbers, got {time!r}.")
    times = [int(time) for time in times]
    wrong = [time for time in times if not 0 <= time < T]
    if wrong:
        raise UserError(f"timesteps must lie in 0..{T - 1} (num_train_timesteps = {T}), got {wrong[0]}.")
    for before, after in pairwise(times):
        if after >= before:
            raise UserError(f"timesteps must be strictly descending, got {before} before {after}.")
    return times
