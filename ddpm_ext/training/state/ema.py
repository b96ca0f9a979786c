"""Averaged weights: update, swap in, save; EDM2's power-function averages and the reconstruction of any width.

The recursion of every kind is θ̂_n = β_n θ̂_{n-1} + (1 - β_n) θ_n, n from 1; the kinds differ in β_n alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ...errors import UserError
from ..config import WIDEST, TrainConfig

__all__ = [
    "ForeachEMA",
    "PowerFunctionEMA",
    "gamma_of",
    "make_averages",
    "profile_products",
    "reconstruction_weights",
    "swapped",
    "weighted_sum",
]


class ForeachEMA(EMAModel):
    """Diffusers' EMAModel with its update in one call for all weights: θ̂ ← θ̂ + (1 - β_n)(θ - θ̂)."""

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Move the averages towards the parameters."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        trained = [(s, p) for s, p in zip(self.shadow_params, parameters, strict=True) if p.requires_grad]
        torch._foreach_lerp_([s for s, _ in trained], [p.detach() for _, p in trained], 1 - self.cur_decay_value)


class ConstantEMA(ForeachEMA):
    """β_n = decay, and β_1 = 0: the first update copies. Source: the code of Ho et al. 2020, arXiv:2006.11239.

    Args:
        parameters: The weights.
        decay: β_n.
        copies_first: False keeps β_1 = decay, where the average begins at weights that were given.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float, copies_first: bool = True) -> None:
        super().__init__(parameters, decay=decay)
        self.copies_first = copies_first

    def get_decay(self, optimization_step: int) -> float:
        return 0.0 if optimization_step <= 1 and self.copies_first else self.decay


class PowerFunctionEMA(ForeachEMA):
    r"""Average whose width is a constant share σ_rel of the training time.

        β_n = (1 - 1/n)^(γ+1),   σ_rel² = (γ+1) / ((γ+2)² (γ+3))

    Source: Karras et al. 2023, arXiv:2312.02696, Eqs. (121)-(127).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], sigma_rel: float) -> None:
        super().__init__(parameters)
        self.sigma_rel = sigma_rel
        self.gamma = gamma_of(sigma_rel)

    def get_decay(self, optimization_step: int) -> float:
        """Return β_n = (1 - 1/n)^(γ + 1)."""
        return (1 - 1 / optimization_step) ** (self.gamma + 1)


def gamma_of(sigma_rel: float) -> float:
    """γ of a relative width: the largest real root of γ³ + 7γ² + (16 - σ_rel⁻²)γ + 12 - σ_rel⁻²."""
    roots = np.roots([1.0, 7.0, 16.0 - sigma_rel**-2, 12.0 - sigma_rel**-2])
    gamma = float(max(root.real for root in roots if abs(root.imag) < 1e-9))
    if gamma <= -0.5:
        raise UserError(f"sigma_rel must lie in (0, {WIDEST}), got {sigma_rel}.")
    return gamma


def make_averages(config: TrainConfig, parameters: Sequence[nn.Parameter]) -> list[ForeachEMA]:
    """Return the averages a configuration asks for; the first is the one sampled from and exported."""
    if not config.use_ema:
        return []
    if config.ema == "power_function":
        return [PowerFunctionEMA(parameters, sigma_rel) for sigma_rel in config.ema_sigma_rel]
    if config.ema == "warmup":
        warm_up = {"use_ema_warmup": True, "inv_gamma": config.ema_inv_gamma, "power": config.ema_power}
        return [ForeachEMA(parameters, decay=config.ema_max_decay, **warm_up)]
    return [ConstantEMA(parameters, config.ema_max_decay, copies_first=config.init_from is None)]


@contextmanager
def swapped(parameters: Sequence[nn.Parameter], average: EMAModel | None) -> Iterator[None]:
    """Inside, the network holds the averaged weights and the average holds the network's; after, each its own again.

    The exchange moves values between the same tensors, one at a time, so it needs no second copy of the network and
    leaves every weight bitwise as it was. Without an average nothing happens.
    """
    exchange(parameters, average)
    try:
        yield
    finally:
        exchange(parameters, average)


@torch.no_grad()
def exchange(parameters: Sequence[nn.Parameter], average: EMAModel | None) -> None:
    """Swap weights and averages in place; without an average nothing moves."""
    for weight, averaged in zip(parameters, average.shadow_params if average else (), strict=average is not None):
        kept = weight.detach().clone()
        weight.copy_(averaged)
        averaged.copy_(kept)


def profile_products(n_a: np.ndarray, gamma_a: np.ndarray, n_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    r"""Inner products of the averaging profiles p(t) = (γ+1)/n · (t/n)^γ on [0, n], every a with every b.

        ⟨a, b⟩ = (γ_a+1)(γ_b+1) (n_a/n_b)^(γ_b if n_a < n_b else -γ_a) / ((γ_a+γ_b+1) max(n_a, n_b))

    Source: Karras et al. 2023, arXiv:2312.02696, Eq. (147).

    Args:
        n_a: Updates, shape (A,).
        gamma_a: Powers, shape (A,).
        n_b: Updates, shape (B,).
        gamma_b: Powers, shape (B,).
    """
    n_a, gamma_a = n_a[:, None].astype(np.float64), gamma_a[:, None].astype(np.float64)
    n_b, gamma_b = n_b[None, :].astype(np.float64), gamma_b[None, :].astype(np.float64)
    power = np.where(n_a < n_b, gamma_b, -gamma_a)
    ratio = np.exp(power * (np.log(n_a) - np.log(n_b)))
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * np.maximum(n_a, n_b))


def reconstruction_weights(n: Sequence[int], sigma_rel: Sequence[float], target_n: int, target: float) -> np.ndarray:
    """Weights of the stored snapshots whose sum is nearest to the average of width `target` at update `target_n`.

    Args:
        n: Update of each snapshot.
        sigma_rel: Relative width of each snapshot.
        target_n: Update at which the wanted average ends; at most the last snapshot's.
        target: Relative width that is wanted.

    Returns:
        One weight per snapshot, float64; least squares over the profiles.
    """
    if not n or target_n > max(n):
        raise UserError(f"The average ends at update {target_n}, after the last snapshot at {max(n, default=0)}.")
    n_a, gamma_a = np.array(n), np.array([gamma_of(width) for width in sigma_rel])
    n_b, gamma_b = np.array([target_n]), np.array([gamma_of(target)])
    gram = profile_products(n_a, gamma_a, n_a, gamma_a)
    return np.linalg.lstsq(gram, profile_products(n_a, gamma_a, n_b, gamma_b)[:, 0], rcond=None)[0]


def weighted_sum(snapshots: Iterable[dict[str, Tensor]], weights: np.ndarray) -> dict[str, Tensor]:
    """Σ weight · snapshot, summed in float64, one snapshot in memory at a time."""
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for snapshot, weight in zip(snapshots, weights, strict=True):
        for name, tensor in snapshot.items():
            dtypes[name] = tensor.dtype
            total[name] = total.get(name, 0) + float(weight) * tensor.double()
    return {name: tensor.to(dtypes[name]) for name, tensor in total.items()}
