r"""One noise schedule as tables, an entry per step: entry i belongs to the paper's t = i + 1."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Tables", "tables_of_betas", "warn_if_signal_remains", "widest_float"]

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


def tables_of_betas(beta: Tensor) -> Tables:
    r"""Return ᾱ_t = Π (1 - β_u), by its logarithm: log ᾱ_t = Σ log1p(-β_u) and 1 - ᾱ_t = -expm1(log ᾱ_t).

    Args:
        beta: float64, shape (T,), values in (0, 1].

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
