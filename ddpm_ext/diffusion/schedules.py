r"""Noise schedules: named beta schedules as float64 tables, and the timesteps of a shorter chain.

Everything counts from 0: entry i of a table belongs to the paper's t = i + 1, and s = -1 is the clean image.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, check_word, is_whole
from .words import SPACINGS, BetaSchedule, TimestepSpacing

__all__ = ["Tables", "make_tables", "respaced_timesteps", "warn_if_signal_remains", "widest_float"]

FAR_FROM_ZERO = 0.02  # ᾱ_T above this leaves an x_T that is visibly not standard normal


def widest_float(device: torch.device | str) -> torch.dtype:
    """Return float64, or float32 on MPS, which has no float64."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


@dataclass(frozen=True)
class Tables:
    """One schedule of T steps; every table float64, shape (T,), on one device.

    Attributes:
        beta: β_t, the variance that step t adds, in (0, 1].
        alpha: α_t = 1 - β_t.
        alpha_bar: ᾱ_t = α_1 ··· α_t, the signal power left after step t.
        one_minus_alpha_bar: 1 - ᾱ_t, the noise power; not subtracted from ᾱ, so that it keeps its digits at small t.
        log_alpha_bar: log ᾱ_t = Σ log(1 - β_u), -inf where ᾱ_t = 0.
    """

    beta: Tensor
    alpha: Tensor
    alpha_bar: Tensor
    one_minus_alpha_bar: Tensor
    log_alpha_bar: Tensor

    @property
    def num_timesteps(self) -> int:
        """T, the number of steps of the full chain."""
        return self.beta.shape[0]

    def to(self, device: torch.device | str) -> Tables:
        """Return the same tables on another device; rounded to float32 on MPS, which has no float64."""
        dtype = widest_float(device)
        return Tables(*(getattr(self, name).to(dtype).to(device) for name in self.__dataclass_fields__))


def warn_if_signal_remains(tables: Tables) -> None:
    """Warn when ᾱ_T is far from 0: sampling starts from N(0, I), which x_T then is not."""
    alpha_bar_T = tables.alpha_bar[-1].item()
    if alpha_bar_T > FAR_FROM_ZERO:
        warnings.warn(
            f"ᾱ_T = {alpha_bar_T:.3g} is far from 0 with {tables.num_timesteps} steps: x_T keeps signal, so sampling "
            "must not start from standard normal noise. Scale betas meant for 1000 steps by "
            f"{1000 / tables.num_timesteps:.3g}, or use a zero terminal SNR or the squaredcos_cap_v2 schedule.",
            stacklevel=3,
        )


def make_tables(
    schedule: BetaSchedule = "linear",
    num_timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    trained_betas: Sequence[float] | Tensor | None = None,
    zero_terminal_snr: bool = False,
) -> Tables:
    r"""Return the tables of a schedule by name.

        linear             β = linspace(β_1, β_T, T)                                  DDPM §4
        scaled_linear      β = linspace(√β_1, √β_T, T)²                               latent diffusion
        squaredcos_cap_v2  β = min(1 - f((i+1)/T) / f(i/T), 0.999),
                           f(u) = cos²(π/2 · (u + 0.008)/1.008)                       IDDPM Eq. 17
        laplace            the same cap, f(u) = √(SNR/(1 + SNR)),
                           log SNR = -½ sign(½ - u) log(1 - 2|½ - u| + 1e-6)         arXiv:2407.03297
        sigmoid            β = β_1 + (β_T - β_1) σ(linspace(-6, 6, T))                GeoDiff

    Args:
        schedule: One of the words above; `trained_betas` go before it.
        num_timesteps: T >= 1.
        beta_start: β_1, in (0, 1]; used by linear, scaled_linear, sigmoid.
        beta_end: β_T, in (0, 1].
        trained_betas: The T betas themselves.
        zero_terminal_snr: Rescale so that ᾱ_T is exactly 0 (`rescale_zero_terminal_snr`).

    Returns:
        Float64 tables on the CPU.

    Raises:
        UserError: unknown word, T < 1, betas outside (0, 1] or NaN, or `trained_betas` whose length is not T.
    """
    if isinstance(num_timesteps, bool) or not isinstance(num_timesteps, int) or num_timesteps < 1:
        raise UserError(f"num_train_timesteps must be an int of at least 1, got {num_timesteps!r}.")
    check_word("beta_schedule", schedule, get_args(BetaSchedule))
    if trained_betas is not None:
        beta = torch.as_tensor(trained_betas, dtype=torch.float64).detach().cpu().clone()
        if beta.ndim != 1 or beta.shape[0] != num_timesteps:
            raise UserError(
                f"trained_betas must hold one beta per step, num_train_timesteps = {num_timesteps}, got shape "
                f"{tuple(beta.shape)}. Set num_train_timesteps to their number."
            )
    else:
        beta = _named_betas(schedule, num_timesteps, beta_start, beta_end)
    _check_betas(beta)
    return _tables_of_betas(rescale_zero_terminal_snr(beta) if zero_terminal_snr else beta)


def rescale_zero_terminal_snr(beta: Tensor) -> Tensor:
    r"""Return betas whose last ᾱ is exactly 0, all others shifted along.

        r = √ᾱ;   r ← (r - r_T) · r_1 / (r_1 - r_T);   ᾱ = r²;   β_t = 1 - ᾱ_t / ᾱ_{t-1}

    Args:
        beta: float64, shape (T,), T >= 2.

    Source: Lin et al. 2023, arXiv:2305.08891, Algorithm 1.

    Raises:
        UserError: T = 1, which would leave no signal at all.
    """
    if beta.shape[0] < 2:
        raise UserError("rescale_betas_zero_snr needs num_train_timesteps of at least 2, got 1.")
    r = torch.log1p(-beta).cumsum(0).mul(0.5).exp()
    r = (r - r[-1]) * (r[0] / (r[0] - r[-1]))
    alpha = torch.cat([r[:1] ** 2, (r[1:] / r[:-1]) ** 2])
    return 1 - alpha


def respaced_timesteps(
    spacing: TimestepSpacing | Literal["even"], num_timesteps: int, num_inference_steps: int, offset: int = 0
) -> list[int]:
    r"""Return the steps that a respaced chain of K = `num_inference_steps` visits, as ascending code indices.

        leading    k · (T // K) + offset,  k = 0..K-1
        trailing   round(T - k · T/K) - 1
        linspace   round(linspace(0, T - 1, K))
        even       0 + k · (T - 1)/(K - 1), the step added in float64 as Analytic-DPM and IDDPM do

    `leading` never reaches T - 1; `linspace` and `even` keep both ends. Halves round to even.

    Args:
        spacing: One of the words above.
        num_timesteps: T.
        num_inference_steps: K, 1 <= K <= T.
        offset: Added to `leading` only (Diffusers' `steps_offset`).

    Returns:
        K distinct ints, 0 <= i < T.

    Raises:
        UserError: unknown word, K that is not an int in [1, T], or an offset that leaves [0, T).

    Source: Lin et al. 2023, arXiv:2305.08891, Table 2; Bao et al. 2022, arXiv:2201.06503.
    """
    T, K = num_timesteps, num_inference_steps
    check_word("timestep_spacing", spacing, (*SPACINGS, "even"))
    if not is_whole(K) or not 1 <= K <= T:
        raise UserError(f"num_inference_steps must be an int from 1 to num_train_timesteps = {T}, got {K!r}.")
    K = operator.index(K)
    if spacing == "leading":
        times = [k * (T // K) + offset for k in range(K)]
        if not 0 <= times[0] <= times[-1] < T:
            fewer = next((n for n in range(K, 0, -1) if 0 <= offset < T - (n - 1) * (T // n)), 0)
            instead = f", or take {fewer} steps (num_inference_steps, of a training ddpm_num_inference_steps)"
            raise UserError(
                f"steps_offset = {offset} moves the leading timesteps to {times[0]}..{times[-1]}, outside 0..{T - 1}. "
                f"Choose an offset from 0 to {T - 1 - (K - 1) * (T // K)} in the scheduler's config "
                f"(scheduler_config.json of a folder){instead if fewer else ''}."
            )
        return times
    if spacing == "trailing":
        # Diffusers' own arithmetic, whose last digit decides halves; np.arange may run one step too far.
        return (np.arange(T, 0, -T / K)[:K].round().astype(int) - 1)[::-1].tolist()
    if K == 1:
        return [0] if spacing == "linspace" else [T - 1]
    if spacing == "linspace":
        return (
            np.linspace(0, T - 1, K).round().astype(int).tolist()
        )  # numpy's last digit decides halves, as in Diffusers
    times, time = [], 0.0
    for _ in range(K):
        times.append(round(time))
        time += (T - 1) / (K - 1)
    return times


def _tables_of_betas(beta: Tensor) -> Tables:
    r"""Return ᾱ_t = Π (1 - β_u), by its logarithm: log ᾱ_t = Σ log1p(-β_u) and 1 - ᾱ_t = -expm1(log ᾱ_t).

    Source: Ho et al. 2020, arXiv:2006.11239, Eq. (4).
    """
    log_alpha_bar = torch.log1p(-beta).cumsum(0)
    return Tables(
        beta=beta,
        alpha=1 - beta,
        alpha_bar=log_alpha_bar.exp(),
        one_minus_alpha_bar=-torch.expm1(log_alpha_bar),
        log_alpha_bar=log_alpha_bar,
    )


def _named_betas(schedule: BetaSchedule, T: int, beta_start: float, beta_end: float) -> Tensor:
    if schedule == "squaredcos_cap_v2":
        return _capped_betas(T, lambda u: math.cos(math.pi / 2 * (u + 0.008) / 1.008) ** 2)
    if schedule == "laplace":
        return _capped_betas(T, _laplace_alpha_bar)
    for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
        if not 0 < value <= 1:
            raise UserError(f"{name} must lie in (0, 1], got {value!r}: a step that adds {value!r} variance is none.")
    if schedule == "linear":
        return torch.linspace(beta_start, beta_end, T, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2
    return beta_start + (beta_end - beta_start) * torch.linspace(-6, 6, T, dtype=torch.float64).sigmoid()


def _capped_betas(T: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999) -> Tensor:
    # The cap keeps β below 1 at the end, where f reaches 0.
    betas = [min(1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), max_beta) for i in range(T)]
    return torch.tensor(betas, dtype=torch.float64)


def _laplace_alpha_bar(u: float) -> float:
    snr = math.exp(-0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6))
    return math.sqrt(snr / (1 + snr))


def _check_betas(beta: Tensor) -> None:
    wrong = (~((beta > 0) & (beta <= 1))).nonzero().flatten()  # NaN is wrong too
    if wrong.numel():
        i = int(wrong[0])
        raise UserError(
            f"Every beta must lie in (0, 1], got {beta[i].item()} at step {i} ({wrong.numel()} of {beta.numel()} are "
            "outside). A beta is the variance that one step adds."
        )
    alpha = 1 - beta[:-1]
    if alpha.numel() and bool((alpha == 0).any()):
        i = int((alpha == 0).nonzero()[0])
        raise UserError(f"Only the last beta may be 1, got 1 at step {i}: every later step would start from no signal.")
