"""Slow, obvious versions of the formulas, written from the papers and not from the package."""

from __future__ import annotations

import mpmath
import numpy as np

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
