"""Slow, obvious versions of the formulas, written from the papers and not from the package."""

from __future__ import annotations

import mpmath


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
    """log P of one 8-bit grey level under the discretised decoder, DDPM Eq. (13), 50 digits."""
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
