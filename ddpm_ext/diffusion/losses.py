r"""What training minimises, per image: the simple loss, the weighted bound, their hybrid, min-SNR weights.

Losses come back with shape (B,); reducing them is the caller's, who knows what a global batch is.
"""

from __future__ import annotations

import math
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from ..errors import check_word
from .likelihood import decoder_nll, mean_over_dims, step_kl
from .process import check_range, check_same_shape, check_steps, compute_dtype, jump, per_image, training_target
from .reverse import decoder_log_var, p_mean_variance, split_output, variance_bounds
from .schedules import Tables
from .words import LossOptions, PredictionType, VarianceType

__all__ = [
    "REMEMBERED",
    "SIMPLE",
    "LossHistory",
    "LossOptions",
    "bound_term",
    "empty_history",
    "loss_aware_probabilities",
    "min_snr_weight",
    "remember",
    "training_loss",
    "uniform_timesteps",
    "weighted_timesteps",
]

REMEMBERED = 10  # losses of each t that decide how often it is drawn
SIMPLE = LossOptions()  # of ε, as in DDPM
UNIFORM_SHARE = 0.001  # of the draws, so that no t is forgotten


class LossHistory(NamedTuple):
    """The last losses of each t."""

    recent: Tensor  # float64, (T, 10): the latest losses, in a ring
    total: Tensor  # int64, (T,): losses ever seen


def training_loss(
    output: Tensor, x_0: Tensor, x_t: Tensor, eps: Tensor, t: Tensor, tables: Tables, options: LossOptions = SIMPLE
) -> Tensor:
    r"""Return the loss of each image.

        simple  mean (target - output)², times the min-SNR weight where snr_gamma is given       DDPM Eq. (14)
        vlb     T · L_{t-1} / ln 2, with L_0 at the first step                                   DDPM Eqs. (5), (13)
        hybrid  simple + (T/1000) · L_{t-1} / ln 2, the mean detached in the second term         IDDPM Eq. (16)

    With t uniform, vlb is an unbiased estimate of the bound in bits/dim (less L_T, which no weight changes).

    Args:
        output: The network's output for (x_t, t): (B, C, H, W), or (B, 2C, H, W) for the learned variances.
        x_0: Clean images in [-1, 1], shape (B, C, H, W); on the grid of `bits` for vlb and hybrid.
        x_t: Noised images made of x_0 and eps.
        eps: The noise.
        t: int64, shape (B,), 0 <= t < T.
        tables: One schedule, on t's device.
        options: Which loss of which prediction.

    Returns:
        Shape (B,), at least float32.

    Raises:
        UserError: shapes or steps that do not fit.
    """
    check_steps(t, x_t, tables)
    kind, variance_type, bits = options.prediction_type, options.variance_type, options.bits
    if options.loss == "vlb":
        bound = bound_term(output, x_0, x_t, t, tables, prediction_type=kind, variance_type=variance_type, bits=bits)
        return bound * (tables.num_timesteps / math.log(2))

    prediction, head = split_output(output, x_t, variance_type)
    target = training_target(x_0, x_t, eps, t, tables, kind)
    dtype = compute_dtype(prediction)
    check_same_shape("the target", target, "the prediction", prediction)
    simple = mean_over_dims((target.to(dtype) - prediction.to(dtype)) ** 2)
    if options.snr_gamma is not None:
        simple = simple * min_snr_weight(t, tables, kind, options.snr_gamma).to(simple.dtype)
    if options.loss == "simple" or head is None:
        return simple

    detached = torch.cat([prediction.detach(), head], dim=1)
    bound = bound_term(detached, x_0, x_t, t, tables, prediction_type=kind, variance_type=variance_type, bits=bits)
    return simple + bound * (tables.num_timesteps / 1000 / math.log(2))


def bound_term(
    output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    tables: Tables,
    *,
    prediction_type: PredictionType = "epsilon",
    variance_type: VarianceType = "fixed_small",
    bits: int = 8,
) -> Tensor:
    r"""Return L_{t-1} of each image on the full chain, in nats per dimension; L_0 at the first step; x̂_0 not clipped.

        L_{t-1} = mean KL( q(x_{t-1} | x_t, x_0) ‖ p(x_{t-1} | x_t) )          t > 0
        L_0     = -mean log P(x_0 | μ, σ)                                      t = 0

    Args:
        output: As in `training_loss`.
        x_0: Clean images on the grid of `bits` in [-1, 1].
        x_t: Noised images.
        t: int64, shape (B,), 0 <= t < T.
        tables: One schedule, on t's device.
        prediction_type: What the network predicts.
        variance_type: The reverse variance.
        bits: Depth of the images.

    Source: Ho et al. 2020, arXiv:2006.11239, Eqs. (5), (12), (13).
    """
    check_same_shape("x_0", x_0, "x_t", x_t)
    output, x_t = output.to(compute_dtype(x_t)), x_t.to(compute_dtype(x_t))
    p = p_mean_variance(output, x_t, t, tables, prediction_type=prediction_type, variance_type=variance_type)
    step = jump(tables, t)
    log_posterior_var, _ = variance_bounds(step, decoder_log_var(tables))  # finite at t = 0, where the decoder counts
    c1, log_posterior_var = per_image(step.c1, x_t), per_image(log_posterior_var, x_t)
    kl = mean_over_dims(step_kl(x_0.to(c1), p.pred_original_sample, c1, log_posterior_var, p.log_var))
    decoder = mean_over_dims(decoder_nll(x_0, p.pred_original_sample, p.log_var, bits=bits))
    return torch.where(t == 0, decoder.to(kl.dtype), kl)


def min_snr_weight(t: Tensor, tables: Tables, prediction_type: PredictionType, gamma: float) -> Tensor:
    r"""Return the weight of the simple loss that caps each step's share at SNR = γ; SNR = ᾱ_t / (1 - ᾱ_t).

        epsilon         min(SNR, γ) / SNR
        sample          min(SNR, γ)
        v_prediction    min(SNR, γ) / (SNR + 1)
        posterior_mean  min(SNR, γ) / c1², c1 of the jump t -> t - 1

    Args:
        t: int64, shape (B,), 0 <= t < T.
        tables: One schedule, on t's device.
        prediction_type: One of the words above.
        gamma: γ > 0; the paper uses 5.

    Returns:
        float64, shape (B,).

    Source: Hang et al. 2023, arXiv:2303.09556, §3.4.
    """
    check_range(t, tables)
    snr = tables.alpha_bar[t] / tables.one_minus_alpha_bar[t]
    capped = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)  # also right where SNR = 0
    if prediction_type == "sample":
        return capped
    if prediction_type == "v_prediction":
        return capped / (snr + 1)
    check_word("prediction_type", prediction_type, get_args(PredictionType))
    return capped / jump(tables, t).c1 ** 2


def uniform_timesteps(
    batch_size: int,
    num_timesteps: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return one t per image, uniform over 0..T-1.

    Args:
        batch_size: B.
        num_timesteps: T.
        generator: Where the randomness comes from; on `device`.
        device: Where t is made.

    Returns:
        int64, shape (B,).

    Source: Ho et al. 2020, arXiv:2006.11239, Algorithm 1, line 3.
    """
    return torch.randint(num_timesteps, (batch_size,), generator=generator, device=device)


def empty_history(num_timesteps: int) -> LossHistory:
    """Return the history before the first loss, on the CPU."""
    shape = (num_timesteps, REMEMBERED)
    return LossHistory(torch.zeros(shape, dtype=torch.float64), torch.zeros(num_timesteps, dtype=torch.int64))


def remember(history: LossHistory, t: Tensor, losses: Tensor) -> LossHistory:
    """Return the history after some more losses, in their order; the old one stays as it is.

    Args:
        history: What was seen before.
        t: int64, shape (B,), 0 <= t < T, of all processes.
        losses: L_t of each, not weighted, shape (B,). What is not finite is left out.
    """
    recent, total = history.recent.clone(), history.total.clone()
    for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
        if math.isfinite(loss):
            recent[step, total[step] % REMEMBERED] = loss
            total[step] += 1
    return LossHistory(recent, total)


def loss_aware_probabilities(history: LossHistory) -> Tensor:
    r"""Return p_t ∝ √(mean of the last 10 L_t²), 0.001 of it given to all alike; uniform until every t has 10.

    Returns:
        float64, shape (T,), sum 1, all positive.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, §3.3, Eq. (18).
    """
    uniform = torch.full_like(history.recent[:, 0], 1 / len(history.total))
    size = history.recent.square().mean(1).sqrt()
    if bool((history.total < REMEMBERED).any()) or not bool(size.sum() > 0):
        return uniform
    return (1 - UNIFORM_SHARE) * size / size.sum() + UNIFORM_SHARE * uniform


def weighted_timesteps(u: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return (t, w) of uniform numbers: t = F⁻¹(u) with F the cumulative sum of p, and w_t = 1 / (T p_t).

    Σ p_t w_t L_t = (1/T) Σ L_t: the mean of w_t L_t is that of uniform t, whatever p is.

    Args:
        u: float64 in [0, 1), shape (B,).
        p: float64, shape (T,), sum 1, all positive.

    Returns:
        t, int64, and w, float64, each shape (B,).
    """
    t = torch.searchsorted(p.cumsum(0), u, right=True).clamp(max=len(p) - 1)
    return t, 1 / (len(p) * p[t])
