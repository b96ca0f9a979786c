"""Slow, obvious versions of the formulas, written from the papers and not from the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

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


def decoder_log_likelihood(level: int, mean: float, log_var: float, cdf: str, bits: int = 8) -> float:
    """The log P of one grey level under the discretised decoder, DDPM Eq. (13), 50 digits."""
    with mpmath.workdps(50):
        std = mpmath.exp(mpmath.mpf(log_var) / 2)

        def phi(x: mpmath.mpf) -> mpmath.mpf:
            if cdf == "exact":
                return mpmath.ncdf(x)
            return (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3))) / 2

        top = 2**bits - 1
        distance = mpmath.mpf(2 * level) / top - 1 - mpmath.mpf(mean)
        upper = 1 if level == top else phi((distance + mpmath.mpf(1) / top) / std)
        lower = 0 if level == 0 else phi((distance - mpmath.mpf(1) / top) / std)
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


class Posterior(NamedTuple):
    """The jump t -> s as mathematics writes it; s = -1 is the clean image."""

    c1: float
    c2: float
    small: float  # β̃
    large: float  # b


def posterior(alpha_bar: list[float], t: int, s: int) -> Posterior:
    """q(x_s | x_t, x_0) of DDPM Eqs. (6)-(7), β_t replaced by 1 - ᾱ_t/ᾱ_s."""
    bar_t, bar_s = alpha_bar[t], alpha_bar[s] if s >= 0 else 1.0
    a = bar_t / bar_s
    c1 = math.sqrt(bar_s) * (1 - a) / (1 - bar_t)
    c2 = math.sqrt(a) * (1 - bar_s) / (1 - bar_t)
    return Posterior(c1, c2, (1 - a) * (1 - bar_s) / (1 - bar_t), 1 - a)


def x_0_of_pixel(prediction: str, alpha_bar: list[float], t: int, x: float, out: float) -> float:
    """x̂_0 of one pixel, not clipped."""
    if prediction == "epsilon":
        return (x - math.sqrt(1 - alpha_bar[t]) * out) / math.sqrt(alpha_bar[t])
    if prediction == "v_prediction":
        return math.sqrt(alpha_bar[t]) * x - math.sqrt(1 - alpha_bar[t]) * out
    if prediction == "posterior_mean":
        train = posterior(alpha_bar, t, t - 1)
        return (out - train.c2 * x) / train.c1
    return out


def variance_of_pixel(variance: str, small: float, large: float, s: int, head: np.ndarray, i: tuple[int, ...]) -> float:
    """σ² of one pixel; `small` is β̃ with the decoder's rule."""
    if variance == "learned":
        return math.exp(head[i])
    if variance == "learned_range":
        f = (head[i] + 1) / 2
        return math.exp(f * math.log(large) + (1 - f) * math.log(small))
    return large if variance.startswith("fixed_large") and s >= 0 else small


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
    bar, terms = alpha_bar[kept[0]], np.zeros((len(x_0), len(kept)))
    prior = np.array([sum((bar * x**2 + (1 - bar) - 1 - math.log(1 - bar)) / 2 for x in image.flat) for image in x_0])
    for k, (t, s) in enumerate(zip(kept, [*kept[1:], -1], strict=True)):
        c1, c2, small, large = posterior(alpha_bar, t, s)
        if s == -1:
            n_2, n_1 = (kept[-2], kept[-1]) if decoder_variance == "respaced" else (1, 0)
            small = posterior(alpha_bar, n_2, n_1).small
        x_t = math.sqrt(alpha_bar[t]) * x_0 + math.sqrt(1 - alpha_bar[t]) * noise[k]
        output = model(x_t, t)
        for i in np.ndindex(x_0.shape):
            guess = x_0_of_pixel(prediction, alpha_bar, t, x_t[i], output[i])
            guess = max(-1.0, min(1.0, guess)) if clip else guess
            var = variance_of_pixel(variance, small, large, s, output[:, x_0.shape[1] :], i)
            if s == -1:
                term = -decoder_log_likelihood(round((x_0[i] + 1) * 127.5), guess, math.log(var), cdf)
            else:
                mean_q, mean_p = c1 * x_0[i] + c2 * x_t[i], c1 * guess + c2 * x_t[i]
                term = (small / var - 1 - math.log(small / var) + (mean_q - mean_p) ** 2 / var) / 2
            terms[i[0], k] += term
    scale = x_0[0].size * math.log(2)
    return prior / scale, terms[:, :-1] / scale, terms[:, -1] / scale


def mixture_mean(x_t: torch.Tensor, alpha_bar: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """E[x_0 | x_t] when every pixel is one of the grey levels, each as likely as the others."""
    distance = (x_t[..., None] - alpha_bar.sqrt() * levels) ** 2 / (2 * (1 - alpha_bar))
    return (torch.softmax(-distance, dim=-1) * levels).sum(-1)


def mixture_bound_in_bits(beta: np.ndarray, levels: np.ndarray, kept: list[int], bits: int = 8) -> float:
    """Bits/dim of the perfect network on independent pixels of equally likely grey levels: fixed_small, base, tanh.

    Expectations over the noise by the trapezoidal rule on a fine grid of z.
    """
    alpha_bar, top = np.cumprod(1 - beta), 2**bits - 1
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
                    for u in ((x - guess + 1 / top) / std, (x - guess - 1 / top) / std)
                ]
                upper, lower = (1.0 if x > 0.999 else phi[0]), (0.0 if x < -0.999 else phi[1])
                total -= (density * np.log(np.maximum(upper - lower, 1e-12))).sum() / len(levels)
    return float(total) / math.log(2)


# The process, 50 digits -----------------------------------------------------------------------------------------------


def exact_betas(schedule: str, T: int, beta_start: str = "0.0001", beta_end: str = "0.02") -> list[mpmath.mpf]:
    """β_1..β_T of a named schedule, 50 digits. The two ends come as the decimal numbers that the papers print."""
    with mpmath.workdps(50):
        first, last = mpmath.mpf(beta_start), mpmath.mpf(beta_end)

        def line(a: mpmath.mpf, b: mpmath.mpf, i: int) -> mpmath.mpf:
            return a if T == 1 else a + (b - a) * i / (T - 1)

        def cosine(u: mpmath.mpf) -> mpmath.mpf:
            return mpmath.cos((u + mpmath.mpf("0.008")) / mpmath.mpf("1.008") * mpmath.pi / 2) ** 2

        def laplace(u: mpmath.mpf) -> mpmath.mpf:
            sign = -1 if u > mpmath.mpf("0.5") else 1
            log_snr = -sign * mpmath.log(1 - 2 * abs(mpmath.mpf("0.5") - u) + mpmath.mpf("1e-6")) / 2
            return mpmath.sqrt(mpmath.exp(log_snr) / (1 + mpmath.exp(log_snr)))

        def capped(f: Callable[[mpmath.mpf], mpmath.mpf], i: int) -> mpmath.mpf:
            return min(1 - f(mpmath.mpf(i + 1) / T) / f(mpmath.mpf(i) / T), mpmath.mpf("0.999"))

        formulas: dict[str, Callable[[int], mpmath.mpf]] = {
            "linear": lambda i: line(first, last, i),
            "scaled_linear": lambda i: line(mpmath.sqrt(first), mpmath.sqrt(last), i) ** 2,
            "sigmoid": lambda i: first + (last - first) / (1 + mpmath.exp(-line(mpmath.mpf(-6), mpmath.mpf(6), i))),
            "squaredcos_cap_v2": lambda i: capped(cosine, i),
            "laplace": lambda i: capped(laplace, i),
        }
        return [formulas[schedule](i) for i in range(T)]


def exact_alpha_bar(beta: Sequence[float | mpmath.mpf]) -> list[mpmath.mpf]:
    """ᾱ_t as the product it is, 50 digits."""
    with mpmath.workdps(50):
        products, product = [], mpmath.mpf(1)
        for b in beta:
            product *= 1 - mpmath.mpf(b)
            products.append(product)
        return products


def exact_zero_terminal_snr(beta: Sequence[float]) -> list[mpmath.mpf]:
    """ᾱ after the rescaling that makes the last one 0 (Lin et al. 2023, Algorithm 1), 50 digits."""
    with mpmath.workdps(50):
        r = [mpmath.sqrt(a) for a in exact_alpha_bar(beta)]
        return [((x - r[-1]) * r[0] / (r[0] - r[-1])) ** 2 for x in r]


class ExactJump(NamedTuple):
    """q(x_s | x_t, x_0) by conditioning a two-dimensional Gaussian, 50 digits."""

    c1: mpmath.mpf
    c2: mpmath.mpf
    var: mpmath.mpf
    b: mpmath.mpf


def exact_jump(alpha_bar: Sequence[mpmath.mpf], t: int, s: int) -> ExactJump:
    """Given x_0, x_s ~ N(√ᾱ_s x_0, 1 - ᾱ_s) and x_t = √a x_s + √b z: condition x_s on x_t."""
    with mpmath.workdps(50):
        bar_s = alpha_bar[s] if s >= 0 else mpmath.mpf(1)
        a = alpha_bar[t] / bar_s
        var_s, b = 1 - bar_s, 1 - a
        gain = mpmath.sqrt(a) * var_s / (a * var_s + b)  # Cov(x_s, x_t) / Var(x_t)
        # mean = √ᾱ_s x_0 + gain (x_t - √a √ᾱ_s x_0);  var = Var(x_s) - gain Cov(x_s, x_t)
        c1 = mpmath.sqrt(bar_s) * (1 - gain * mpmath.sqrt(a))
        return ExactJump(c1, gain, var_s - gain * mpmath.sqrt(a) * var_s, b)


def exact_x_0(kind: str, output: float, x_t: float, alpha_bar: Sequence[mpmath.mpf], t: int) -> mpmath.mpf:
    """x̂_0 of one pixel from what the network says, 50 digits."""
    with mpmath.workdps(50):
        signal, noise = mpmath.sqrt(alpha_bar[t]), mpmath.sqrt(1 - alpha_bar[t])
        output, x_t = mpmath.mpf(output), mpmath.mpf(x_t)
        if kind == "epsilon":
            return (x_t - noise * output) / signal
        if kind == "v_prediction":  # x_t = signal x_0 + noise ε and v = signal ε - noise x_0: a rotation
            return signal * x_t - noise * output
        if kind == "posterior_mean":
            training = exact_jump(alpha_bar, t, t - 1)
            return (output - training.c2 * x_t) / training.c1
        assert kind == "sample"
        return output


def exact_log_var(kind: str, alpha_bar: Sequence[mpmath.mpf], t: int, s: int, head: float = 0.0) -> mpmath.mpf:
    """log σ² of one pixel, the last jump by the decoder's rule (base), 50 digits."""
    with mpmath.workdps(50):
        step = exact_jump(alpha_bar, t, s)
        small = mpmath.log(step.var if s >= 0 else exact_jump(alpha_bar, 1, 0).var)
        if kind.startswith("fixed_small") or (kind.startswith("fixed_large") and s < 0):
            return small
        if kind.startswith("fixed_large"):
            return mpmath.log(step.b)
        if kind == "learned":
            return mpmath.mpf(head)
        assert kind == "learned_range"
        f = (mpmath.mpf(head) + 1) / 2
        return f * mpmath.log(step.b) + (1 - f) * small


def dynamic_threshold(x_0: np.ndarray, quantile: float, largest: float) -> np.ndarray:
    """Each image by sorting its |values| and walking to the quantile by hand."""
    images = []
    for image in x_0:
        values = sorted(abs(float(v)) for v in image.flat)
        place = quantile * (len(values) - 1)
        low = math.floor(place)
        high = min(low + 1, len(values) - 1)
        s = min(max(values[low] + (place - low) * (values[high] - values[low]), 1.0), largest)
        images.append(np.vectorize(lambda v, s=s: max(-s, min(s, v)) / s)(image))
    return np.stack(images)


def training_loss_of_image(
    output: np.ndarray,
    x_0: np.ndarray,
    eps: np.ndarray,
    t: int,
    beta: Sequence[float],
    *,
    prediction: str = "epsilon",
    variance: str = "fixed_small",
    loss: str = "simple",
    gamma: float | None = None,
) -> float:
    """One image's loss, pixel by pixel from DDPM Eqs. (5), (13), (14), IDDPM Eq. (16) and min-SNR, 50 digits."""
    with mpmath.workdps(50):
        bar = exact_alpha_bar(beta)
        signal, noise = mpmath.sqrt(bar[t]), mpmath.sqrt(1 - bar[t])
        step = exact_jump(bar, t, t - 1)
        head = output[x_0.shape[0] :].ravel()
        simple, bound = mpmath.mpf(0), mpmath.mpf(0)
        for i, (x, e) in enumerate(zip(x_0.ravel(), eps.ravel(), strict=True)):
            x, e, out = mpmath.mpf(float(x)), mpmath.mpf(float(e)), mpmath.mpf(float(output.ravel()[i]))
            x_t = signal * x + noise * e
            mean = step.c1 * x + step.c2 * x_t
            target = {
                "epsilon": e,
                "sample": x,
                "v_prediction": signal * e - noise * x,
                "posterior_mean": mean,
            }[prediction]
            simple += (target - out) ** 2
            guess = exact_x_0(prediction, out, x_t, bar, t)
            log_var = exact_log_var(variance, bar, t, t - 1, float(head[i]) if len(head) else 0.0)
            if t == 0:
                bound -= decoder_log_likelihood(round(float((x + 1) * 127.5)), float(guess), float(log_var), "tanh")
            else:
                var, distance = mpmath.exp(log_var), mean - (step.c1 * guess + step.c2 * x_t)
                bound += (step.var / var - 1 - mpmath.log(step.var / var) + distance**2 / var) / 2
        simple, bound = simple / x_0.size, bound / x_0.size / mpmath.log(2)
        if gamma is not None:
            snr = bar[t] / (1 - bar[t])
            scale = {"epsilon": snr, "sample": 1, "v_prediction": snr + 1, "posterior_mean": step.c1**2}[prediction]
            simple *= min(snr, gamma) / scale
        if loss == "vlb":
            return float(len(bar) * bound)
        return float(simple if loss == "simple" else simple + len(bar) * bound / 1000)
