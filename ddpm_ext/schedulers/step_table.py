r"""One choice of sampling timesteps as a table of weights: a row per step, looked up without host-device waits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from ..diffusion import analytic, process, reverse
from ..diffusion.schedules import Tables, respaced_timesteps
from ..diffusion.words import Trajectory, check_word
from ..errors import UserError
from .config import Extension, extension


class Weights(NamedTuple):
    """What one reverse step needs, as floats for one t or as (B, 1, 1, 1) tensors for one t per image."""

    of_x_t: Any  # x̂_0 = of_x_t · x_t + of_output · output
    of_output: Any
    c1: Any  # mean = c1 · x̂_0 + c2 · x_t + c3 · output
    c2: Any
    c3: Any  # 0 but for the DDIM family
    std: Any  # σ of the fixed and analytic variances; 0 at the last jump
    log_small: Any  # log β̃ with the decoder's rule
    log_large: Any  # log b
    noisy: Any  # 1 where noise is added, 0 at the last jump


@dataclass
class StepTable:
    """The jumps of one choice of timesteps. Rows of steps that are not visited are NaN: never a wrong number."""

    config: Mapping[str, Any]  # the options it was made for
    times: list[int]  # code indices, descending
    table: Tensor  # float64, (T, 9), a row of Weights per step
    previous: Tensor  # int64, (T,): the step after t in the reverse chain, -1 for the clean image
    uses_output: bool  # whether c3 is anything but 0: the DDIM family
    lacks_errors: bool  # variance_type "analytic" before mse_eps is measured
    usable: list[bool]  # which of `times` have weights: epsilon has none where ᾱ_t = 0
    by_device: dict[torch.device, Tensor] = field(default_factory=dict)

    @cached_property
    def rows(self) -> dict[int, Weights]:
        """The visited rows as floats, made when the first step asks for one."""
        values = self.table[self.times].tolist()
        visited = zip(self.times, values, self.usable, strict=True)
        return {i: Weights(*row) for i, row, fits in visited if fits}

    def weights(self, t: Tensor, x: Tensor) -> Weights:
        """One row per image, shaped beside x, in the dtype in which x is computed; no wait for an accelerator."""
        table = self.table if t.device.type == "cpu" else self._on(t.device)
        rows = table.index_select(0, t.reshape(-1)).to(process.compute_dtype(x))
        return Weights(*(column.reshape(-1, *(1,) * (x.ndim - 1)) for column in rows.unbind(1)))

    def _on(self, device: torch.device) -> Tensor:
        if device not in self.by_device:
            dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
            self.by_device[device] = self.table.to(dtype).to(device)
        return self.by_device[device]


def make_step_table(tables: Tables, times: list[int], config: Mapping[str, Any]) -> StepTable:
    """The weights of every jump of a chain.

    Args:
        tables: One schedule, on the CPU.
        times: The steps it visits, code indices, descending.
        config: A scheduler's options: variance_type, prediction_type and the fields of `_ddpm_ext`.
    """
    t = torch.tensor(times, dtype=torch.int64)
    s = torch.tensor([*times[1:], -1], dtype=torch.int64)
    extra, step = extension(config), process.jump(tables, t, s)
    small, large = reverse.variance_bounds(step, reverse.decoder_log_var(tables))
    noisy = (s >= 0).to(torch.float64)
    if config["variance_type"] in reverse.LEARNED_VARIANCES:
        std = torch.full_like(noisy, math.nan)  # the network's head decides
    elif config["variance_type"] == "analytic":
        std = _analytic_std(tables, s, t, extra, first=times[-1]) * noisy
    else:
        log_var = reverse.reverse_log_var(config["variance_type"], small, large, s < 0)
        std = extra.eta * log_var.mul(0.5).exp() * noisy
    x_0 = process.x_0_weights(tables, t, config["prediction_type"])
    mean = _mean_weights(tables, step, t, config["prediction_type"], extra.eta)
    weights = torch.stack([x_0.of_x_t, x_0.of_output, *mean, std, small, large, noisy], dim=1)

    usable = torch.isfinite(weights[:, :5]).all(1)
    table = torch.full((tables.num_timesteps, weights.shape[1]), math.nan, dtype=torch.float64)
    table[t[usable]] = weights[usable]
    previous = torch.full((tables.num_timesteps,), -1, dtype=torch.int64)
    previous[t] = s
    lacks_errors = config["variance_type"] == "analytic" and extra.mse_eps is None
    return StepTable(config, times, table, previous, extra.eta != 1, lacks_errors, usable.tolist())


def _mean_weights(
    tables: Tables, step: process.Jump, t: Tensor, prediction_type: process.PredictionType, eta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(c1, c2, c3): DDPM's posterior mean, or with η < 1 DDIM's √ᾱ_s x̂_0 + √(1-ᾱ_s-λ²) ε̂ (2010.02502, Eq. 12)."""
    if eta == 1:
        return step.c1, step.c2, torch.zeros_like(step.c1)
    eps = process.eps_weights(tables, t, prediction_type)
    direction = (step.one_minus_alpha_bar_s - analytic.ddim_variance(step, eta)).clamp(min=0).sqrt()
    return step.alpha_bar_s.sqrt(), direction * eps.of_x_t, direction * eps.of_output


def _analytic_std(tables: Tables, s: Tensor, t: Tensor, extra: Extension, first: int) -> Tensor:
    """σ* with which sampling draws, capped at the jump to the first kept time; NaN until errors are measured."""
    if extra.mse_eps is None:
        return torch.full(t.shape, math.nan, dtype=torch.float64)
    mse_eps = torch.tensor(extra.mse_eps, dtype=torch.float64)
    var = analytic.optimal_variance(tables, mse_eps, s, t, extra.eta)
    cap = analytic.sampling_cap(2 if extra.eta == 1 else 1)
    return torch.where(s == first, var.clamp(max=cap), var).sqrt()


def check_usable(chain: StepTable) -> None:
    """Raise a UserError when a chain visits a step at which x̂_0 is undefined (epsilon at ᾱ_t = 0)."""
    missing = [i for i, fits in zip(chain.times, chain.usable, strict=True) if not fits]
    if missing:
        raise UserError(
            f"timestep {missing[0]} has no signal left (ᾱ_t = 0), where epsilon prediction is undefined. Use "
            'prediction_type "v_prediction" or "sample", or fewer steps with "leading" spacing.'
        )


def chosen_timesteps(
    tables: Tables, config: Mapping[str, Any], num_inference_steps: Any, trajectory: Trajectory | None
) -> list[int]:
    """The K steps that a config and a trajectory's name choose, ascending code indices.

    Raises:
        UserError: K outside [1, T], an unknown trajectory, or an optimal one before errors are measured.
    """
    extra = extension(config)
    trajectory = extra.trajectory if trajectory is None else trajectory
    if trajectory is None or trajectory == "even":
        spacing = "even" if trajectory else config["timestep_spacing"]
        return respaced_timesteps(spacing, tables.num_timesteps, num_inference_steps, config["steps_offset"])
    check_word("trajectory", trajectory, get_args(Trajectory))
    variance: str = config["variance_type"]
    cost: Any = variance.removesuffix("_log") if variance.startswith("fixed") else "analytic"
    known = extra.trajectories.get(str(num_inference_steps))
    if known is not None and cost == "analytic":
        return list(known)
    mse_eps = measured_errors(config, "An optimal trajectory")
    return analytic.optimal_trajectory(tables, mse_eps, num_inference_steps, cost)


def measured_errors(config: Mapping[str, Any], what: str) -> Tensor:
    """mse_eps of a config, float64, shape (T,); a UserError that says how to get it where there is none."""
    mse_eps = extension(config).mse_eps
    if mse_eps is None:
        raise UserError(
            f"{what} needs the network's measured errors, and this scheduler has none. Measure them with "
            "scripts/calibrate.py, or put mse_eps, one number per step, into the config's _ddpm_ext."
        )
    return torch.tensor(mse_eps, dtype=torch.float64)


def checked_timesteps(timesteps: Sequence[int] | Tensor | np.ndarray, T: int) -> list[int]:
    """Custom timesteps as ints, when they are whole, strictly descending and in [0, T); a UserError otherwise."""
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
