r"""The network's step back: its variance, and p(x_s | x_t) = N(c1 x̂_0 + c2 x_t, σ² I).

Steps and jumps are those of `process`. At the last jump (s = -1) β̃ is 0: sampling adds no noise there, while
log-variances and the decoder L_0 take log β̃ of the chain's second timestep (`decoder_log_var`).
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from ..errors import UserError, check_word
from .images import Clip, clip_x_0
from .process import Jump, compute_dtype, jump, per_image, predict_x_0, weighted_sum
from .schedules import Tables
from .words import LEARNED_VARIANCES, DecoderVariance, PredictionType, VarianceType

__all__ = [
    "Respaced",
    "ReverseStep",
    "decoder_log_var",
    "p_mean_variance",
    "reverse_log_var",
    "split_output",
    "variance_bounds",
]


class Respaced(NamedTuple):
    """What a shortened chain has otherwise than the full one; None stands for the full chain's."""

    s: Tensor | None = None  # int64, shape (B,), -1 <= s < t: where each image's step ends; t - 1
    last_log_var: Tensor | float | None = None  # log σ² of the last jump, a number or 0-d: `decoder_log_var`
    log_optimal: Tensor | None = None  # log σ*² of each image's jump, shape (B,), for variance_type "analytic"


class ReverseStep(NamedTuple):
    """p(x_s | x_t) of a network: N(mean, var I), and the clean image it rests on."""

    mean: Tensor  # (B, C, H, W)
    var: Tensor  # (B, 1, 1, 1), or (B, C, H, W) where the network gives it
    log_var: Tensor  # as var
    pred_original_sample: Tensor  # x̂_0, (B, C, H, W)


FULL_CHAIN = Respaced()


def decoder_log_var(tables: Tables, timesteps: list[int] | None = None, convention: DecoderVariance = "base") -> Tensor:
    r"""Return log β̃ of the chain's second timestep, which stands for log σ² at the last jump, where β̃ itself is 0.

        base      log β̃_2 of the full chain
        respaced  log β̃(n_1, n_2) of the shortened chain

    A chain of one step has no second timestep: it takes the base value, and a full chain of one step log β_1.

    Args:
        tables: One schedule.
        timesteps: Of a shortened chain, ascending; None for the full one.
        convention: One of the words above. Both are in print (Analytic-DPM, OpenAI).

    Returns:
        0-d float64, on the tables' device.

    Source: Ho et al. 2020, arXiv:2006.11239, §4 and its code; Bao et al. 2022, arXiv:2201.06503.
    """
    check_word("decoder_variance", convention, get_args(DecoderVariance))
    if tables.num_timesteps == 1:
        return tables.beta[0].log()
    n_1, n_2 = timesteps[:2] if convention == "respaced" and timesteps is not None and len(timesteps) > 1 else (0, 1)
    # Entries by a Python number, unlike those by a tensor, are had without a wait of the host.
    b = -torch.expm1(tables.log_alpha_bar[n_2] - tables.log_alpha_bar[n_1])
    return (b * tables.one_minus_alpha_bar[n_1] / tables.one_minus_alpha_bar[n_2]).log()


def variance_bounds(step: Jump, last_log_var: Tensor | float) -> tuple[Tensor, Tensor]:
    r"""Return (log β̃, log b) of each jump, log β̃ replaced by `last_log_var` at the last one, where β̃ = 0.

    Args:
        step: Coefficients of any shape.
        last_log_var: A number or 0-d, `decoder_log_var`.
    """
    return torch.where(step.var > 0, step.var.log(), last_log_var), step.b.log()


def reverse_log_var(
    variance_type: VarianceType,
    log_small: Tensor,
    log_large: Tensor,
    last: Tensor,
    head: Tensor | None = None,
    log_optimal: Tensor | None = None,
) -> Tensor:
    r"""Return log σ² of the reverse step.

        fixed_small    log β̃
        fixed_large    log b, at the last jump log β̃ of the second timestep like fixed_small
        learned        the head itself
        learned_range  f log b + (1 - f) log β̃,  f = (head + 1)/2, not clamped
        analytic       log σ*² of `optimal.optimal_variance`, at the last jump like fixed_small

    The two `_log` words name the same variances: what they change in other codes is only how σ is computed.

    Args:
        variance_type: One of the words above.
        log_small: log β̃ with the decoder's rule, `variance_bounds`.
        log_large: log b.
        last: bool, in the shape of both: True where the jump ends at the clean image.
        head: The network's variance channels, broadcastable with the others; only for the learned kinds.
        log_optimal: log σ*² of each jump; only for analytic.

    Source: Ho et al. 2020, arXiv:2006.11239, §3.2; Nichol & Dhariwal 2021, arXiv:2102.09672, Eq. (15).
    """
    if variance_type in ("fixed_small", "fixed_small_log"):
        return log_small
    if variance_type in ("fixed_large", "fixed_large_log"):
        return torch.where(last, log_small, log_large)
    check_word("variance_type", variance_type, get_args(VarianceType))
    if variance_type == "analytic":
        if log_optimal is None:
            raise UserError('variance_type "analytic" needs the optimal variances of the network, got none.')
        return torch.where(last, log_small, log_optimal)
    if head is None:
        raise UserError(f'variance_type "{variance_type}" needs the network\'s variance channels, got none.')
    if variance_type == "learned":
        return head
    f = (head + 1) / 2
    return f * log_large + (1 - f) * log_small


def split_output(output: Tensor, x_t: Tensor, variance_type: VarianceType) -> tuple[Tensor, Tensor | None]:
    """Return (prediction, variance head or None) of a network's output.

    Args:
        output: Shape (B, C, …) for the fixed variances, (B, 2C, …) for the learned ones.
        x_t: Shape (B, C, …).
        variance_type: A variance's name.

    Raises:
        UserError: the output does not have the shape that x_t and the variance type ask for.
    """
    heads = 2 if variance_type in LEARNED_VARIANCES else 1
    expected = (x_t.shape[0], heads * x_t.shape[1], *x_t.shape[2:])
    if output.shape != expected:
        raise UserError(
            f"model_output must have shape {expected} for images of shape {tuple(x_t.shape)} and variance_type "
            f'"{variance_type}", got {tuple(output.shape)}. '
            + (
                "The network must predict mean and variance: out_channels = 2 * in_channels."
                if heads == 2
                else 'A network with a variance head needs variance_type "learned" or "learned_range".'
            )
        )
    if heads == 1:
        return output, None
    prediction, head = output.split(x_t.shape[1], dim=1)
    return prediction, head


def p_mean_variance(
    output: Tensor,
    x_t: Tensor,
    t: Tensor,
    tables: Tables,
    *,
    prediction_type: PredictionType = "epsilon",
    variance_type: VarianceType = "fixed_small",
    clip: Clip = None,
    respaced: Respaced = FULL_CHAIN,
) -> ReverseStep:
    r"""Return the network's step back: p(x_s | x_t) = N(c1 x̂_0 + c2 x_t, σ² I).

    Args:
        output: Network output, shape (B, C, H, W), or (B, 2C, H, W) for the learned variances.
        x_t: Noised images, shape (B, C, H, W).
        t: int64, shape (B,), 0 <= t < T.
        tables: One schedule, on t's device.
        prediction_type: What the first C channels are.
        variance_type: Which σ².
        clip: x̂_0 is clamped to ±clip; None for not at all, as in training on the bound; or a function of x̂_0.
        respaced: The jumps of a shortened chain.

    Returns:
        mean and x̂_0 in x_t's dtype; log_var by the decoder's rule at the last jump, and var = exp(log_var).

    Source: Ho et al. 2020, arXiv:2006.11239, Eqs. (1), (7), (11).
    """
    prediction, head = split_output(output, x_t, variance_type)
    dtype = compute_dtype(x_t)
    x_0 = clip_x_0(predict_x_0(prediction.to(dtype), x_t.to(dtype), t, tables, prediction_type), clip)
    step = jump(tables, t, respaced.s)
    mean = weighted_sum(x_0, step.c1, x_t, step.c2, dtype=x_t.dtype)
    last_log_var = decoder_log_var(tables) if respaced.last_log_var is None else respaced.last_log_var
    log_small, log_large = (per_image(v, x_t) for v in variance_bounds(step, last_log_var))
    last = per_image(step.var == 0, x_t, dtype=torch.bool)
    head = None if head is None else head.to(dtype)
    log_optimal = None if respaced.log_optimal is None else per_image(respaced.log_optimal, x_t)
    log_var = reverse_log_var(variance_type, log_small, log_large, last, head, log_optimal)
    return ReverseStep(mean, log_var.exp(), log_var, x_0.to(x_t.dtype))
