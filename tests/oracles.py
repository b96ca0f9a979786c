"""Slow, obvious versions of the formulas, written from the papers and not from the package."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numpy as np
import torch

# Likelihood -----------------------------------------------------------------------------------------------------------


def gaussian_kl_by_quadrature(mean1: float, log_var1: float, mean2: float, log_var2: float) -> float:
    """KL of two Gaussians as the integral of p log(p/q), 30 digits."""
    with mpmath.workdps(30):
        std1, std2 = mpmath.exp(mpmath.mpf(log_var1) / 2), mpmath.exp(mpmath.mpf(log_var2) / 2)

        def integrand(z: mpmath.mpf) -> mpmath.mpf:  # x = mean1 + std1 z, so p(x) dx = φ(z) dz
            x = mpmath.mpf(mean1) + std1 * z
            log_p = -(z**2) / 2 - mpmath.log(std1)
            log_q = -(((x - mean2) / std2) ** 2) / 2 - mpmath.log(std2)
            return mpmath.npdf(z) * (log_p - log_q)

        return float(mpmath.quad(integrand, [-14, -6, 0, 6, 14]))


def decoder_log_likelihood(level: int, mean: float, log_var: float, cdf: str) -> float:
    """The log P of one 8-bit grey level under the discretised decoder, DDPM Eq. (13), 50 digits."""
    with mpmath.workdps(50):
        std = mpmath.exp(mpmath.mpf(log_var) / 2)

        def phi(x: mpmath.mpf) -> mpmath.mpf:
            if cdf == "exact":
                return mpmath.ncdf(x)
            return (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3))) / 2

        distance = mpmath.mpf(2 * level) / 255 - 1 - mpmath.mpf(mean)
        upper = 1 if level == 255 else phi((distance + mpmath.mpf(1) / 255) / std)
        lower = 0 if level == 0 else phi((distance - mpmath.mpf(1) / 255) / std)
        return float(mpmath.log(max(upper - lower, mpmath.mpf("1e-12"))))


# Metrics --------------------------------------------------------------------------------------------------------------


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Fréchet distance from the eigenvalues of the product of the covariances, 40 digits."""
    with mpmath.workdps(40):
        c_x, c_y = (mpmath.matrix(_covariance(z)) for z in (x, y))
        root = sum(mpmath.sqrt(max(mpmath.re(v), 0)) for v in mpmath.eig(c_x * c_y, left=False, right=False))
        distance = sum((mpmath.mpf(a) - mpmath.mpf(b)) ** 2 for a, b in zip(_mean(x), _mean(y), strict=True))
        for i in range(x.shape[1]):
            distance += c_x[i, i] + c_y[i, i]
        return float(distance - 2 * root)


def _mean(x: np.ndarray) -> list[mpmath.mpf]:
    return [sum((mpmath.mpf(float(v)) for v in column), mpmath.mpf(0)) / len(x) for column in x.T]


def _covariance(x: np.ndarray) -> list[list[mpmath.mpf]]:
    mean = _mean(x)
    rows = [[mpmath.mpf(float(v)) - m for v, m in zip(row, mean, strict=True)] for row in x]
    d = range(x.shape[1])
    return [[sum((row[i] * row[j] for row in rows), mpmath.mpf(0)) / (len(x) - 1) for j in d] for i in d]


def polynomial_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased MMD² with the cubic kernel by three double loops."""

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    xx = np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    yy = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    return float(xx + yy - 2 * np.mean([k(a, b) for a in x for b in y]))


def rbf_mmd(x: np.ndarray, y: np.ndarray, sigma: float, unbiased: bool) -> float:
    """MMD² with the Gaussian kernel by three double loops."""

    def mean(a: np.ndarray, b: np.ndarray, skip: bool) -> float:
        pairs = [(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if not (skip and i == j)]
        return float(np.mean([np.exp(-np.sum((p - q) ** 2) / (2 * sigma**2)) for p, q in pairs]))

    return mean(x, x, unbiased) + mean(y, y, unbiased) - 2 * mean(x, y, False)


def inception_score(logits: np.ndarray) -> float:
    """exp(E KL(p(y|x) ‖ p(y))) of one split, from probabilities."""
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    marginal = p.mean(0)
    return float(np.exp(np.mean([sum(q * np.log(q / m) for q, m in zip(row, marginal, strict=True)) for row in p])))


def precision_recall(x: np.ndarray, y: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """Precision, recall, density, coverage by looking at every pair."""

    def radius(z: np.ndarray, i: int) -> float:
        return sorted(float(np.sum((z[i] - z[j]) ** 2)) for j in range(len(z)) if j != i)[k - 1]

    x_radius, y_radius = ([radius(z, i) for i in range(len(z))] for z in (x, y))
    d = [[float(np.sum((a - b) ** 2)) for b in y] for a in x]
    n, m = range(len(x)), range(len(y))
    precision = np.mean([any(d[i][j] <= x_radius[i] for i in n) for j in m])
    recall = np.mean([any(d[i][j] <= y_radius[j] for j in m) for i in n])
    density = sum(d[i][j] <= x_radius[i] for i in n for j in m) / (k * len(y))
    coverage = np.mean([any(d[i][j] <= x_radius[i] for j in m) for i in n])
    return float(precision), float(recall), float(density), float(coverage)


# The bound ------------------------------------------------------------------------------------------------------------


def bound_in_bits(
    model: Callable[[np.ndarray, int], np.ndarray],
    beta: np.ndarray,
    x_0: np.ndarray,
    kept: list[int],
    noise: list[np.ndarray],
    *,
    prediction: str = "epsilon",
    variance: str = "fixed_small",
    decoder_variance: str = "base",
    cdf: str = "tanh",
    clip: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(prior (B,), steps (B, K-1), decoder (B,)) in bits/dim, DDPM Eq. (5), image by image and pixel by pixel.

    `kept` are code indices, descending; `noise` one array like x_0 for each; `model(x_t, t)` takes the whole batch.
    """
    alpha_bar = [float(np.prod(1 - beta[: i + 1])) for i in range(len(beta))]
    pixels, last = x_0[0].size, kept[-1]

    def posterior(t: int, s: int) -> tuple[float, float, float, float]:
        """c1, c2, β̃, b of the jump t -> s, as mathematics writes them."""
        bar_t, bar_s = alpha_bar[t], alpha_bar[s] if s >= 0 else 1.0
        a = bar_t / bar_s
        c1 = math.sqrt(bar_s) * (1 - a) / (1 - bar_t)
        c2 = math.sqrt(a) * (1 - bar_s) / (1 - bar_t)
        return c1, c2, (1 - a) * (1 - bar_s) / (1 - bar_t), 1 - a

    prior = np.zeros(len(x_0))
    bar = alpha_bar[kept[0]]
    for image, picture in enumerate(x_0):
        prior[image] = sum((bar * x**2 + (1 - bar) - 1 - math.log(1 - bar)) / 2 for x in picture.flat)
    terms = np.zeros((len(x_0), len(kept)))
    for k, t in enumerate(kept):
        s = kept[k + 1] if k + 1 < len(kept) else -1
        c1, c2, small, large = posterior(t, s)
        if s == -1:
            n_2, n_1 = (kept[-2], last) if decoder_variance == "respaced" else (1, 0)
            small = posterior(n_2, n_1)[2]
        x_t = math.sqrt(alpha_bar[t]) * x_0 + math.sqrt(1 - alpha_bar[t]) * noise[k]
        output = model(x_t, t)
        head = output[:, x_0.shape[1] :]
        for i in np.ndindex(x_0.shape):
            x, out = x_t[i], output[i]
            if prediction == "epsilon":
                guess = (x - math.sqrt(1 - alpha_bar[t]) * out) / math.sqrt(alpha_bar[t])
            elif prediction == "v_prediction":
                guess = math.sqrt(alpha_bar[t]) * x - math.sqrt(1 - alpha_bar[t]) * out
            elif prediction == "posterior_mean":
                train_c1, train_c2, _, _ = posterior(t, t - 1)
                guess = (out - train_c2 * x) / train_c1
            else:
                guess = out
            guess = max(-1.0, min(1.0, guess)) if clip else guess
            if variance == "learned":
                var = math.exp(head[i])
            elif variance == "learned_range":
                f = (head[i] + 1) / 2
                var = math.exp(f * math.log(large) + (1 - f) * math.log(small))
            else:
                var = large if variance.startswith("fixed_large") and s >= 0 else small
            if s == -1:
                term = -decoder_log_likelihood(round((x_0[i] + 1) * 127.5), guess, math.log(var), cdf)
            else:
                mean_q, mean_p = c1 * x_0[i] + c2 * x, c1 * guess + c2 * x
                term = (small / var - 1 - math.log(small / var) + (mean_q - mean_p) ** 2 / var) / 2
            terms[i[0], k] += term
    scale = pixels * math.log(2)
    return prior / scale, terms[:, :-1] / scale, terms[:, -1] / scale


def mixture_mean(x_t: torch.Tensor, alpha_bar: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """E[x_0 | x_t] when every pixel is one of the grey levels, each as likely as the others."""
    distance = (x_t[..., None] - alpha_bar.sqrt() * levels) ** 2 / (2 * (1 - alpha_bar))
    return (torch.softmax(-distance, dim=-1) * levels).sum(-1)


def mixture_bound_in_bits(beta: np.ndarray, levels: np.ndarray, kept: list[int]) -> float:
    """Bits/dim of the perfect network on independent pixels of equally likely grey levels: fixed_small, base, tanh.

    Expectations over the noise by the trapezoidal rule on a fine grid of z.
    """
    alpha_bar = np.cumprod(1 - beta)
    z = np.linspace(-8, 8, 1201)
    density = np.exp(-(z**2) / 2)
    density /= density.sum()
    total = 0.0
    bar = alpha_bar[kept[0]]
    total += np.mean((bar * levels**2 - bar - np.log(1 - bar)) / 2)
    log_var = math.log(beta[1] * (1 - alpha_bar[0]) / (1 - alpha_bar[1]))
    for t, s in zip(kept, [*kept[1:], -1], strict=True):
        bar = alpha_bar[t]
        for x in levels:
            x_t = np.sqrt(bar) * x + np.sqrt(1 - bar) * z
            log_weight = -((x_t[:, None] - np.sqrt(bar) * levels) ** 2) / (2 * (1 - bar))
            weight = np.exp(log_weight - log_weight.max(1, keepdims=True))
            guess = (weight * levels).sum(1) / weight.sum(1)
            if s >= 0:  # with σ² = β̃: ½ (SNR(s) - SNR(t)) (x_0 - x̂_0)²
                snr = alpha_bar[s] / (1 - alpha_bar[s]) - bar / (1 - bar)
                total += (density * snr / 2 * (x - guess) ** 2).sum() / len(levels)
            else:
                std = math.exp(log_var / 2)
                phi = [
                    (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))) / 2
                    for u in ((x - guess + 1 / 255) / std, (x - guess - 1 / 255) / std)
                ]
                upper, lower = (1.0 if x > 0.999 else phi[0]), (0.0 if x < -0.999 else phi[1])
                total -= (density * np.log(np.maximum(upper - lower, 1e-12))).sum() / len(levels)
    return float(total) / math.log(2)
