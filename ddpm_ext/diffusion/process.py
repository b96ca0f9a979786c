r"""The diffusion process: forward steps, the posterior of any jump, and what a network may predict.

One set of formulas serves the full chain and every respacing. A *jump* goes from step t back to an earlier step s < t
(s = -1: the clean image); the full chain has s = t - 1. With a = ᾱ_t/ᾱ_s, b = 1 - a, ᾱ_{-1} = 1:

    c1 = √ᾱ_s · b / (1 - ᾱ_t)     c2 = √a · (1 - ᾱ_s) / (1 - ᾱ_t)     β̃ = b · (1 - ᾱ_s) / (1 - ᾱ_t)
    q(x_s | x_t, x_0) = N(c1 x_0 + c2 x_t, β̃ I)                       DDPM Eqs. (6)-(7) when s = t - 1

Every t and s counts from 0 (step 0 is the paper's t = 1), int64, one per image. Coefficients are float64 and are
rounded once, where they meet an image; half-precision images are computed in float32 and rounded last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, get_args

import torch
from torch import Tensor

from ..errors import UserError, check_word
from .words import PredictionType

if TYPE_CHECKING:
    from .schedules import Tables

__all__ = [
    "Gaussian",
    "Jump",
    "check_range",
    "check_same_shape",
    "check_steps",
    "compute_dtype",
    "entries",
    "eps_weights",
    "jump",
    "per_image",
    "predict_x_0",
    "q_marginal",
    "q_posterior",
    "q_sample",
    "q_step",
    "training_target",
    "weighted_sum",
    "x_0_weights",
]


class Gaussian(NamedTuple):
    """A normal distribution per image."""

    mean: Tensor  # (B, C, H, W)
    var: Tensor  # (B, 1, 1, 1) or a scalar's shape: a variance, never its log or its root


class Jump(NamedTuple):
    """Coefficients of q(x_s | x_t, x_0), each float64 in the shape of t."""

    alpha_bar_t: Tensor
    alpha_bar_s: Tensor
    one_minus_alpha_bar_t: Tensor
    one_minus_alpha_bar_s: Tensor
    a: Tensor  # ᾱ_t / ᾱ_s, α_t on the full chain
    b: Tensor  # 1 - a, β_t on the full chain
    c1: Tensor  # weight of x_0 in the mean
    c2: Tensor  # weight of x_t in the mean
    var: Tensor  # β̃; exactly 0 where s = -1


class Affine(NamedTuple):
    """x̂_0 = of_x_t · x_t + of_output · output: every kind of prediction is affine in both."""

    of_x_t: Tensor
    of_output: Tensor


def jump(tables: Tables, t: Tensor, s: Tensor | None = None) -> Jump:
    r"""Return the coefficients of the step back from t to s.

    Args:
        tables: One schedule, on the device of t.
        t: int64, any shape, 0 <= t < T.
        s: int64, shape of t, -1 <= s < t. None means t - 1, the full chain.

    Returns:
        Float64 coefficients in the shape of t.

    Source: Ho et al. 2020, arXiv:2006.11239, Eqs. (6)-(7), with β_t replaced by 1 - ᾱ_t/ᾱ_s.
    """
    check_range(t, tables)
    s = t - 1 if s is None else check_targets(s, t)
    clean = s < 0
    s = s.clamp(min=0)
    log_alpha_bar_t = entries(tables.log_alpha_bar, t)
    log_alpha_bar_s = entries(tables.log_alpha_bar, s).masked_fill(clean, 0.0)
    alpha_bar_s = entries(tables.alpha_bar, s).masked_fill(clean, 1.0)
    one_minus_alpha_bar_t = entries(tables.one_minus_alpha_bar, t)
    one_minus_alpha_bar_s = entries(tables.one_minus_alpha_bar, s).masked_fill(clean, 0.0)

    # 1 - ᾱ_t/ᾱ_s loses its digits where the two are close; expm1 of the logarithms keeps them.
    log_a = log_alpha_bar_t - log_alpha_bar_s
    a, b = log_a.exp(), -torch.expm1(log_a)
    return Jump(
        alpha_bar_t=entries(tables.alpha_bar, t),
        alpha_bar_s=alpha_bar_s,
        one_minus_alpha_bar_t=one_minus_alpha_bar_t,
        one_minus_alpha_bar_s=one_minus_alpha_bar_s,
        a=a,
        b=b,
        c1=alpha_bar_s.sqrt() * (b / one_minus_alpha_bar_t),  # exactly 1 where s = -1
        c2=a.sqrt() * one_minus_alpha_bar_s / one_minus_alpha_bar_t,
        var=b * one_minus_alpha_bar_s / one_minus_alpha_bar_t,
    )


def x_0_weights(tables: Tables, t: Tensor, prediction_type: PredictionType) -> Affine:
    r"""Return how x̂_0 follows from x_t and the network's output.

        epsilon         x̂_0 = (x_t - √(1-ᾱ_t) ε̂) / √ᾱ_t           DDPM Eq. (15)
        sample          x̂_0 = output
        v_prediction    x̂_0 = √ᾱ_t x_t - √(1-ᾱ_t) v̂               Salimans & Ho 2022, arXiv:2202.00512, App. D
        posterior_mean  x̂_0 = (μ̂ - c2 x_t) / c1                   DDPM §3.2; c1, c2 of the training jump t -> t - 1

    Args:
        tables: One schedule, on the device of t.
        t: int64, any shape, 0 <= t < T.
        prediction_type: One of the words above.

    Returns:
        Float64 weights in the shape of t. Where ᾱ_t = 0, epsilon has none: they are infinite.
    """
    check_range(t, tables)
    alpha_bar, one_minus_alpha_bar = entries(tables.alpha_bar, t), entries(tables.one_minus_alpha_bar, t)
    if prediction_type == "epsilon":
        return Affine(alpha_bar.rsqrt(), -(one_minus_alpha_bar / alpha_bar).sqrt())
    if prediction_type == "sample":
        return Affine(torch.zeros_like(alpha_bar), torch.ones_like(alpha_bar))
    if prediction_type == "v_prediction":
        return Affine(alpha_bar.sqrt(), -one_minus_alpha_bar.sqrt())
    check_word("prediction_type", prediction_type, get_args(PredictionType))
    step = jump(tables, t)
    return Affine(-step.c2 / step.c1, 1 / step.c1)


def eps_weights(tables: Tables, t: Tensor, prediction_type: PredictionType) -> Affine:
    r"""Return how ε̂ follows from x_t and the network's output: ε̂ = (x_t - √ᾱ_t x̂_0) / √(1-ᾱ_t), x̂_0 not clipped.

    Args:
        tables: One schedule, on the device of t.
        t: int64, any shape, 0 <= t < T.
        prediction_type: What the network predicts.

    Returns:
        Float64 weights in the shape of t; epsilon is the output itself.
    """
    signal, rstd = entries(tables.alpha_bar, t).sqrt(), entries(tables.one_minus_alpha_bar, t).rsqrt()
    if prediction_type == "epsilon":
        return Affine(torch.zeros_like(rstd), torch.ones_like(rstd))
    x_0 = x_0_weights(tables, t, prediction_type)
    return Affine((1 - signal * x_0.of_x_t) * rstd, -signal * x_0.of_output * rstd)


def q_step(x_prev: Tensor, t: Tensor, tables: Tables) -> Gaussian:
    r"""Return one forward step: q(x_t | x_{t-1}) = N(√α_t x_{t-1}, β_t I).

    Args:
        x_prev: Images after the step before, shape (B, C, H, W); at t = 0 the clean images.
        t: int64, shape (B,), 0 <= t < T.
        tables: One schedule, on t's device.

    Source: Ho et al. 2020, arXiv:2006.11239, Eq. (2).
    """
    alpha, beta = tables.alpha[check_steps(t, x_prev, tables)], tables.beta[t]
    return Gaussian(mean=weighted_sum(x_prev, alpha.sqrt()), var=per_image(beta, x_prev))


def q_marginal(x_0: Tensor, t: Tensor, tables: Tables) -> Gaussian:
    r"""Return all forward steps up to t at once: q(x_t | x_0) = N(√ᾱ_t x_0, (1 - ᾱ_t) I).

    Args:
        x_0: Clean images in [-1, 1], shape (B, C, H, W).
        t: int64, shape (B,), 0 <= t < T.
        tables: One schedule, on t's device.

    Source: Ho et al. 2020, arXiv:2006.11239, Eq. (4).
    """
    alpha_bar = tables.alpha_bar[check_steps(t, x_0, tables)]
    return Gaussian(weighted_sum(x_0, alpha_bar.sqrt()), per_image(tables.one_minus_alpha_bar[t], x_0))


def q_sample(x_0: Tensor, t: Tensor, eps: Tensor, tables: Tables) -> Tensor:
    r"""Return a noised image from given noise: x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε.

    Args:
        x_0: Clean images in [-1, 1], shape (B, C, H, W).
        t: int64, shape (B,), 0 <= t < T.
        eps: Standard normal noise in the shape of x_0.
        tables: One schedule, on t's device.

    Returns:
        x_t in x_0's shape and dtype.

    Source: Ho et al. 2020, arXiv:2006.11239, Eq. (4), reparametrised as in §3.2.
    """
    check_same_shape("x_0", x_0, "eps", eps)
    alpha_bar = tables.alpha_bar[check_steps(t, x_0, tables)]
    return weighted_sum(x_0, alpha_bar.sqrt(), eps, tables.one_minus_alpha_bar[t].sqrt())


def q_posterior(x_0: Tensor, x_t: Tensor, t: Tensor, tables: Tables, s: Tensor | None = None) -> Gaussian:
    r"""Return one exact step back when the clean image is known: q(x_s | x_t, x_0) = N(c1 x_0 + c2 x_t, β̃ I).

    Args:
        x_0: Clean images in [-1, 1], shape (B, C, H, W).
        x_t: Noised images at step t, same shape and device.
        t: int64, shape (B,), 0 <= t < T.
        tables: One schedule, on t's device.
        s: Where each image goes, int64, shape (B,), -1 <= s < t; None means t - 1.

    Returns:
        mean in x_t's dtype, var in at least float32. Where s = -1 the mean is x_0 and var is exactly 0.

    Raises:
        UserError: x_0 and x_t differ in shape, t or s is not one step per image, or s is not below t.

    Source: Ho et al. 2020, arXiv:2006.11239, Eqs. (6)-(7).
    """
    check_same_shape("x_0", x_0, "x_t", x_t)
    step = jump(tables, check_steps(t, x_t, tables), s)
    return Gaussian(weighted_sum(x_0, step.c1, x_t, step.c2, dtype=x_t.dtype), per_image(step.var, x_t))


def predict_x_0(output: Tensor, x_t: Tensor, t: Tensor, tables: Tables, prediction_type: PredictionType) -> Tensor:
    r"""Return x̂_0 from what the network predicts (formulas at `x_0_weights`); not clipped.

    Args:
        output: The network's prediction, shape (B, C, H, W).
        x_t: Noised images, same shape.
        t: int64, shape (B,), 0 <= t < T.
        tables: One schedule, on t's device.
        prediction_type: epsilon, sample, v_prediction or posterior_mean.

    Returns:
        x̂_0 in x_t's shape and dtype.
    """
    check_same_shape("output", output, "x_t", x_t)
    weights = x_0_weights(tables, check_steps(t, x_t, tables), prediction_type)
    return weighted_sum(x_t, weights.of_x_t, output, weights.of_output)


def training_target(
    x_0: Tensor, x_t: Tensor, eps: Tensor, t: Tensor, tables: Tables, prediction_type: PredictionType
) -> Tensor:
    r"""Return what a perfect network would answer.

        epsilon         ε
        sample          x_0
        v_prediction    v = √ᾱ_t ε - √(1-ᾱ_t) x_0
        posterior_mean  μ̃(x_t, x_0) = c1 x_0 + c2 x_t of the jump t -> t - 1

    Args:
        x_0: Clean images in [-1, 1], shape (B, C, H, W).
        x_t: Noised images made of x_0 and eps.
        eps: The noise.
        t: int64, shape (B,), 0 <= t < T.
        tables: One schedule, on t's device.
        prediction_type: One of the words above.

    Source: Ho et al. 2020, arXiv:2006.11239, §3.2 and Table 2; Salimans & Ho 2022, arXiv:2202.00512 for v.
    """
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "sample":
        return x_0
    if prediction_type == "posterior_mean":
        return q_posterior(x_0, x_t, t, tables).mean
    check_word("prediction_type", prediction_type, get_args(PredictionType))
    alpha_bar = tables.alpha_bar[check_steps(t, x_0, tables)]
    return weighted_sum(eps, alpha_bar.sqrt(), x_0, -tables.one_minus_alpha_bar[t].sqrt())


def entries(table: Tensor, t: Tensor) -> Tensor:
    """Return a table's entries at t of any shape; indexing by a 0-d tensor would make the host wait for it."""
    return table.index_select(0, t.reshape(-1)).reshape(t.shape)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which an image is computed: its own, but at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def per_image(values: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return one value per image, shaped (B, 1, 1, 1) beside x and rounded to the dtype in which x is computed."""
    return values.to(compute_dtype(x) if dtype is None else dtype).reshape(-1, *(1,) * (x.ndim - 1))


def weighted_sum(
    x: Tensor,
    x_weight: Tensor,
    y: Tensor | None = None,
    y_weight: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return x_weight · x + y_weight · y with one weight per image, computed in at least float32, rounded once."""
    total = x.to(compute_dtype(x)) * per_image(x_weight, x)
    if y is not None and y_weight is not None:
        total = torch.addcmul(total, y.to(total.dtype), per_image(y_weight, x).to(total.dtype))
    return total.to(x.dtype if dtype is None else dtype)


def check_steps(t: Tensor, x: Tensor, tables: Tables) -> Tensor:
    """Return t, when it is one step per image with 0 <= t < T; a UserError that says what it is instead otherwise.

    Values are looked at on the CPU only: on an accelerator the host would have to wait for them.
    """
    if t.dtype != torch.int64 or t.shape != x.shape[:1]:
        raise UserError(
            f"t must be one int64 step per image, shape ({x.shape[0]},), got {t.dtype} of shape {tuple(t.shape)}."
        )
    check_range(t, tables)
    return t


def check_range(t: Tensor, tables: Tables) -> None:
    """Raise a UserError unless 0 <= t < T. Looked at on the CPU only."""
    if not torch.compiler.is_compiling() and t.device.type == "cpu" and t.numel():
        low, high = int(t.min()), int(t.max())
        if low < 0 or high >= tables.num_timesteps:
            raise UserError(f"t must lie in 0..{tables.num_timesteps - 1}, got values from {low} to {high}.")


def check_targets(s: Tensor, t: Tensor) -> Tensor:
    """Return s, when it is one earlier step per image, -1 <= s < t; a UserError otherwise. Looked at on a CPU only."""
    if s.dtype != torch.int64 or s.shape != t.shape:
        raise UserError(f"s must be int64 in the shape of t, {tuple(t.shape)}, got {s.dtype} of {tuple(s.shape)}.")
    if not torch.compiler.is_compiling() and s.device.type == "cpu" and bool(((s < -1) | (s >= t)).any()):
        raise UserError("s must lie in -1..t-1 for every image: a jump goes back, got an s outside.")
    return s


def check_same_shape(x_name: str, x: Tensor, y_name: str, y: Tensor) -> None:
    """Raise a UserError when two tensors that belong together differ in shape (broadcasting would hide it)."""
    if x.shape != y.shape:
        raise UserError(f"{x_name} and {y_name} must have the same shape, got {tuple(x.shape)} and {tuple(y.shape)}.")
