"""Gaussian KL, the discretised decoder and the terms of the bound, in nats.

Ho et al. 2020, arXiv:2006.11239, Eqs. (5), (7), (12) and (13). Tensors go in, tensors come out; every term is
elementwise, `mean_over_dims` turns it into nats per dimension of each image.
"""

from __future__ import annotations

import math
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from ..errors import UserError, check_word
from .images import half_range
from .schedules import widest_float
from .words import Cdf

__all__ = [
    "BoundTerms",
    "decoder_nll",
    "discretized_log_likelihood",
    "gaussian_kl",
    "mean_over_dims",
    "normal_cdf",
    "prior_kl",
    "step_kl",
]

LOWEST_PROBABILITY = 1e-12  # P is held above this before its logarithm is taken, as published


class BoundTerms(NamedTuple):
    """The three parts of the bound, DDPM Eq. (5), per image, in nats per dimension."""

    prior: Tensor  # (B,): L_T
    steps: Tensor  # (B, K - 1): L_{t-1} from the noisiest jump to the last before the decoder
    decoder: Tensor  # (B,): L_0

    @property
    def total(self) -> Tensor:
        """L_T + Σ L_{t-1} + L_0, shape (B,)."""
        return self.prior + self.steps.sum(1) + self.decoder


def mean_over_dims(x: Tensor) -> Tensor:
    """Return the mean over everything but the first dimension: (B, ...) -> (B,)."""
    if x.ndim < 2:
        raise UserError(f"x must have a batch dimension and at least one more, got shape {tuple(x.shape)}.")
    return x.flatten(1).mean(1)


def gaussian_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    r"""Return KL(N(mean1, var1) || N(mean2, var2)), elementwise, in nats.

        KL = ½ [var1/var2 - 1 - log(var1/var2) + (mean1 - mean2)² / var2]

    Both variances come as logarithms; shapes broadcast.
    """
    log_ratio = log_var1 - log_var2
    return 0.5 * (torch.expm1(log_ratio) - log_ratio + (mean1 - mean2).square() * torch.exp(-log_var2))


def prior_kl(x_0: Tensor, alpha_bar: Tensor) -> Tensor:
    r"""Return L_T = KL(q(x_T | x_0) || N(0, I)), elementwise, in nats.

        L_T = ½ [ᾱ x_0² + b̄ - 1 - log b̄],  b̄ = 1 - ᾱ

    Args:
        x_0: Clean images, values in [-1, 1], shape (B, ...).
        alpha_bar: ᾱ of the noisiest timestep, below 1; broadcasts with x_0.
    """
    return 0.5 * (alpha_bar * x_0.square() - alpha_bar - torch.log1p(-alpha_bar))  # b̄ - 1 is exactly -ᾱ


def step_kl(x_0: Tensor, x_0_hat: Tensor, c1: Tensor, log_posterior_var: Tensor, log_var: Tensor) -> Tensor:
    r"""Return L_{t-1} = KL(q(x_s | x_t, x_0) || p(x_s | x_t)), elementwise, in nats.

        L_{t-1} = ½ [β̃/σ² - 1 - log(β̃/σ²) + (c1²/σ²) (x_0 - x̂_0)²]

    Both means contain the same c2·x_t, so only c1·x_0 and c1·x̂_0 are compared: subtracting whole means in float32
    would lose three digits where c1 is small. Source: Ho et al. 2020, Eqs. (5)-(8).

    Args:
        x_0: Clean images, values in [-1, 1], shape (B, ...).
        x_0_hat: The network's x̂_0, clipped or not; same shape.
        c1: Weight of x_0 in the posterior mean of the jump; broadcasts with x_0.
        log_posterior_var: log β̃ of the jump; broadcasts with x_0.
        log_var: log σ² of the reverse step; broadcasts with x_0.
    """
    return gaussian_kl(c1 * x_0, log_posterior_var, c1 * x_0_hat, log_var)


def normal_cdf(x: Tensor, cdf: Cdf = "tanh") -> Tensor:
    r"""Return Φ(x): the standard normal distribution function, exact or as published.

        tanh:  Φ(x) = ½ (1 + tanh(√(2/π) (x + 0.044715 x³)))

    ½(1 + tanh u) is written as sigmoid(2u), which keeps its digits in the lower tail.
    """
    check_word("cdf", cdf, get_args(Cdf))
    if cdf == "exact":
        return 0.5 * torch.special.erfc(-x / math.sqrt(2))  # torch.special.ndtr is off by 3e-4 at x = -7.5
    return torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def discretized_log_likelihood(
    x_0: Tensor, mean: Tensor, log_var: Tensor, *, cdf: Cdf = "tanh", bits: int = 8
) -> Tensor:
    r"""Return the decoder's log P(x_0 | μ, σ), discretised, elementwise, in nats. DDPM Eq. (13).

        P = Φ((x_0 - μ + h)/σ) - Φ((x_0 - μ - h)/σ),   h = 1/(2^bits - 1): 1/255 at 8 bits

    The lowest of the 2^bits bins takes the whole lower tail, the highest the whole upper tail, so the bins sum to 1.
    The result is log(max(P, 1e-12)).

    Args:
        x_0: Images on the grid 2k/(2^bits - 1) - 1, shape (B, ...).
        mean: μ, in the units of x_0; broadcasts with x_0.
        log_var: log σ²; broadcasts with x_0.
        cdf: "tanh", the published approximation of Φ, or "exact".
        bits: Depth of the images.

    Returns:
        Nats, in the dtype of the images but at least float32.
    """
    dtype = torch.promote_types(torch.promote_types(x_0.dtype, mean.dtype), torch.float32)
    wide = widest_float(x_0.device)  # P is a difference of two near numbers
    x_0, mean, log_var = x_0.to(wide), mean.to(wide), log_var.to(wide)

    half_bin = 0.5 / half_range(bits)
    # Φ is symmetric, so an x_0 above μ is mirrored: in the lower tail the two values differ in their leading digits.
    distance = x_0 - mean
    mirrored = distance > 0
    centre = torch.where(mirrored, -distance, distance)  # unlike -|distance| it has the right gradient at 0
    inv_std = torch.exp(-0.5 * log_var)
    near = normal_cdf((centre + half_bin) * inv_std, cdf)
    far = normal_cdf((centre - half_bin) * inv_std, cdf)

    lowest, highest = x_0 < -1 + half_bin, x_0 > 1 - half_bin
    outermost = (lowest & ~mirrored) | (highest & mirrored)  # the bin reaches to infinity, away from μ
    innermost = (lowest & mirrored) | (highest & ~mirrored)  # ... past μ, when μ lies outside [-1, 1]
    probability = torch.where(outermost, near, torch.where(innermost, 1 - far, near - far))
    return probability.clamp(min=LOWEST_PROBABILITY).log().to(dtype)


def decoder_nll(x_0: Tensor, mean: Tensor, log_var: Tensor, *, cdf: Cdf = "tanh", bits: int = 8) -> Tensor:
    """Return L_0 = -log P(x_0 | x_1), elementwise, in nats; see `discretized_log_likelihood`."""
    return -discretized_log_likelihood(x_0, mean, log_var, cdf=cdf, bits=bits)
