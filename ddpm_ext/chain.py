r"""One choice of sampling timesteps as a table of weights: a row per step, looked up without host-device waits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import process, reverse
from .schedules import Tables


class Weights(NamedTuple):
    """What one reverse step needs, as floats for one t or as (B, 1, 1, 1) tensors for one t per image."""

    of_x_t: Any  # x̂_0 = of_x_t · x_t + of_output · output
    of_output: Any
    c1: Any  # mean = c1 · x̂_0 + c2 · x_t
    c2: Any
    std: Any  # σ of the fixed variances; 0 at the last jump
    log_small: Any  # log β̃ with the decoder's rule
    log_large: Any  # log b
    noisy: Any  # 1 where noise is added, 0 at the last jump


@dataclass
class Chain:
    """The jumps of one choice of timesteps. Rows of steps that are not visited are NaN: never a wrong number."""

    config: Mapping[str, Any]  # the options it was made for
    times: list[int]  # code indices, descending
    table: Tensor  # float64, (T, 8), a row of Weights per step
    rows: dict[int, Weights]  # the visited rows as floats
    previous: Tensor  # int64, (T,): the step after t in the reverse chain, -1 for the clean image
    by_device: dict[torch.device, Tensor] = field(default_factory=dict)

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


def make_chain(tables: Tables, times: list[int], config: Mapping[str, Any]) -> Chain:
    """The weights of every jump of a chain.

    Args:
        tables: One schedule, on the CPU.
        times: The steps it visits, code indices, descending.
        config: A scheduler's options: variance_type and prediction_type.
    """
    t = torch.tensor(times, dtype=torch.int64)
    s = torch.tensor([*times[1:], -1], dtype=torch.int64)
    step = process.jump(tables, t, s)
    small, large = reverse.variance_bounds(step, reverse.decoder_log_var(tables))
    noisy = (s >= 0).to(torch.float64)
    if config["variance_type"] in reverse.LEARNED_VARIANCES:
        std = torch.full_like(noisy, math.nan)  # the network's head decides
    else:
        std = reverse.reverse_log_var(config["variance_type"], small, large, s < 0).mul(0.5).exp() * noisy
    x_0 = process.x_0_weights(tables, t, config["prediction_type"])
    weights = torch.stack([x_0.of_x_t, x_0.of_output, step.c1, step.c2, std, small, large, noisy], dim=1)

    usable = torch.isfinite(weights[:, :4]).all(1)
    table = torch.full((tables.num_timesteps, weights.shape[1]), math.nan, dtype=torch.float64)
    table[t[usable]] = weights[usable]
    previous = torch.full((tables.num_timesteps,), -1, dtype=torch.int64)
    previous[t] = s
    rows = zip(times, weights.tolist(), usable.tolist(), strict=True)
    return Chain(config, times, table, {i: Weights(*row) for i, row, fits in rows if fits}, previous)


def check_usable(chain: Chain) -> None:
    """Raise a ValueError when a chain visits a step at which x̂_0 is undefined (epsilon at ᾱ_t = 0)."""
    missing = [i for i in chain.times if i not in chain.rows]
    if missing:
        raise ValueError(
            f"timestep {missing[0]} has no signal left (ᾱ_t = 0), where epsilon prediction is undefined. Use "
            'prediction_type "v_prediction" or "sample", or fewer steps with "leading" spacing.'
        )


def checked_times(timesteps: Sequence[int] | Tensor | np.ndarray, T: int) -> list[int]:
    """Custom timesteps as ints, when they are whole, strictly descending and in [0, T); a ValueError otherwise."""
    arrays = isinstance(timesteps, Tensor | np.ndarray)
    times: Any = timesteps.tolist() if arrays else timesteps  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(times, Iterable):
        raise ValueError(f"timesteps must be a sequence of descending steps, got {timesteps!r}.")
    times = list(times)
    if not times:
        raise ValueError("timesteps must hold at least one step, got none.")
    for time in times:
        if isinstance(time, bool) or not isinstance(time, int | float | np.integer) or time % 1 != 0:  # NaN, inf too
            raise ValueError(f"timesteps must be whole numbers, got {time!r}.")
    times = [int(time) for time in times]
    wrong = [time for time in times if not 0 <= time < T]
    if wrong:
        raise ValueError(f"timesteps must lie in 0..{T - 1} (num_train_timesteps = {T}), got {wrong[0]}.")
    for before, after in pairwise(times):
        if after >= before:
            raise ValueError(f"timesteps must be strictly descending, got {before} before {after}.")
    return times
