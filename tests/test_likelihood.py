"""Gaussian KL, the bound's terms and the discretised decoder against mpmath and closed forms."""

from __future__ import annotations

import math

import mpmath
import oracles
import pytest
import torch
from torch.testing import assert_close

from ddpm_ext.diffusion.images import HALF_RANGE
from ddpm_ext.diffusion.likelihood import (
    BoundTerms,
    decoder_nll,
    discretized_log_likelihood,
    gaussian_kl,
    mean_over_dims,
    normal_cdf,
    prior_kl,
    step_kl,
)

GRID = torch.arange(256, dtype=torch.float64) / HALF_RANGE - 1
LOG_VAR_BASE = math.log(5.453187661302606e-05)  # log β̃_2 of linear 1e-4..0.02, T = 1000


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1)


@pytest.mark.parametrize(("mean1", "log_var1", "mean2", "log_var2"), [(0.3, -9.8, 0.31, -8.1), (-2, 1.5, 1, 0.25)])
def test_gaussian_kl_is_the_integral(mean1: float, log_var1: float, mean2: float, log_var2: float) -> None:
    expected = oracles.gaussian_kl_by_quadrature(mean1, log_var1, mean2, log_var2)
    assert_close(
        gaussian_kl(*(column(v) for v in (mean1, log_var1, mean2, log_var2))), column(expected), rtol=1e-11, atol=0
    )


def test_gaussian_kl_of_equal_gaussians_is_exactly_zero() -> None:
    mean, log_var = column(0.2, -0.7), column(-9.0, 3.0)
    assert torch.equal(gaussian_kl(mean, log_var, mean, log_var), torch.zeros_like(mean))


def test_gaussian_kl_of_nearly_equal_variances_keeps_its_digits() -> None:
    log_ratio = column(1e-4)
    expected = column(float(mpmath.expm1(mpmath.mpf(1e-4)) - mpmath.mpf(1e-4)) / 2)
    zero = torch.zeros_like(log_ratio)
    assert_close(gaussian_kl(zero, log_ratio, zero, zero), expected, rtol=1e-11, atol=0)  # 1e-16 / 5e-9 is lost


@pytest.mark.parametrize("alpha_bar", [4.035829765375687e-05, 0.3, 0.0])
def test_prior_kl_is_the_kl_to_the_standard_normal(alpha_bar: float) -> None:
    with mpmath.workdps(40):
        a, x = mpmath.mpf(alpha_bar), mpmath.mpf(0.5)
        expected = float((a * x**2 + (1 - a) - 1 - mpmath.log(1 - a)) / 2)
    got = prior_kl(column(0.5), torch.tensor(alpha_bar, dtype=torch.float64))
    assert_close(got, column(expected), rtol=1e-10, atol=0)  # ᾱ - |log1p(-ᾱ)| cancels to ᾱ²/2


def test_step_kl_is_the_kl_of_the_whole_gaussians() -> None:
    x_0, x_0_hat, x_t = column(0.2, -1), column(0.5, -0.75), column(0.7, -3)
    c1, c2, log_posterior_var, log_var = 0.03, 0.96, -4.5, -4.25
    whole = gaussian_kl(c1 * x_0 + c2 * x_t, column(log_posterior_var), c1 * x_0_hat + c2 * x_t, column(log_var))
    got = step_kl(x_0, x_0_hat, column(c1), column(log_posterior_var), column(log_var))
    assert_close(got, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("cdf", ["tanh", "exact"])
@pytest.mark.parametrize("mean", [0.0, 0.3721, -0.9999, 1.0, -1.3, 1.02])
@pytest.mark.parametrize("log_var", [-2.0, LOG_VAR_BASE])
def test_the_256_bins_sum_to_one(cdf: str, mean: float, log_var: float) -> None:
    log_p = discretized_log_likelihood(GRID, torch.tensor(mean).double(), torch.tensor(log_var).double(), cdf=cdf)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=3e-10)  # at most 256 bins are lifted to 1e-12


@pytest.mark.parametrize(
    ("cdf", "level", "bits"),
    [
        ("tanh", 128, 1.305665),
        ("exact", 128, 1.305378),
        ("tanh", 0, 0.509908),
        ("exact", 0, 0.509825),
        ("tanh", 255, 0.509908),
    ],
)
def test_a_perfect_network_pays_the_published_floor(cdf: str, level: int, bits: float) -> None:
    x_0 = GRID[level]
    got = decoder_nll(x_0, x_0, torch.tensor(LOG_VAR_BASE, dtype=torch.float64), cdf=cdf) / math.log(2)
    assert got.item() == pytest.approx(bits, abs=5e-7)  # the design states six decimals


@pytest.mark.parametrize("cdf", ["tanh", "exact"])
@pytest.mark.parametrize("level", [0, 1, 77, 128, 254, 255])
def test_the_decoder_equals_fifty_digit_arithmetic(cdf: str, level: int) -> None:
    means = [-1.05, -1.0, -0.5, 0.0039, 0.2, 0.97, 1.0, 1.2]
    for log_var in (LOG_VAR_BASE, -6.0, -1.0):
        expected = column(*(oracles.decoder_log_likelihood(level, mean, log_var, cdf) for mean in means))
        got = discretized_log_likelihood(GRID[level], column(*means), column(log_var), cdf=cdf)
        assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_an_impossible_pixel_costs_log_1e_12_and_no_nan_gradient() -> None:
    mean = torch.tensor([[1.0, 0.9], [0.0, -1.0]], requires_grad=True)
    x_0 = torch.tensor([[-1.0, -1.0], [1.0, -1.0]])
    log_p = discretized_log_likelihood(x_0, mean, torch.tensor(LOG_VAR_BASE))
    assert_close(log_p[0], torch.full((2,), math.log(1e-12)), rtol=1e-6, atol=0)
    log_p.sum().backward()
    assert mean.grad is not None and torch.isfinite(mean.grad).all()


def test_the_gradient_at_the_exact_edge_is_that_of_the_tail() -> None:
    mean, log_var = torch.tensor([-1.0, 1.0], dtype=torch.float64, requires_grad=True), torch.tensor(-9.0).double()
    discretized_log_likelihood(
        torch.tensor([-1.0, 1.0], dtype=torch.float64), mean, log_var, cdf="exact"
    ).sum().backward()
    std = math.exp(-4.5)
    z = 1 / 255 / std
    slope = (
        math.exp(-z * z / 2) / math.sqrt(2 * math.pi) / std / (0.5 * math.erfc(-z / math.sqrt(2)))
    )  # φ(z) / (σ Φ(z))
    assert mean.grad is not None
    assert_close(mean.grad, torch.tensor([-slope, slope], dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_tanh_cdf_is_the_published_formula_and_the_exact_one_the_error_function() -> None:
    x = torch.linspace(-6, 6, 41, dtype=torch.float64)
    published = 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    assert_close(normal_cdf(x), published, rtol=0, atol=2e-16)
    exact = torch.tensor([float(mpmath.ncdf(mpmath.mpf(v))) for v in x.tolist()], dtype=torch.float64)
    assert_close(normal_cdf(x, "exact"), exact, rtol=1e-13, atol=0)


def test_precision_is_the_images_but_at_least_float32() -> None:
    log_var = torch.tensor(LOG_VAR_BASE, dtype=torch.float64)
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        x_0 = GRID[:2].to(dtype)
        assert discretized_log_likelihood(x_0, x_0, log_var).dtype == expected


def test_bad_input_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="cdf must be one of 'tanh', 'exact', got 'erf'"):
        normal_cdf(GRID, "erf")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch dimension"):
        mean_over_dims(torch.zeros(3))


def test_the_record_adds_up_per_image() -> None:
    terms = BoundTerms(
        prior=torch.tensor([1.0, 2.0]), steps=torch.tensor([[3.0, 4.0], [5.0, 6.0]]), decoder=torch.tensor([7.0, 8.0])
    )
    assert terms.total.tolist() == [15, 21]
    assert mean_over_dims(torch.arange(8.0).reshape(2, 1, 2, 2)).tolist() == [1.5, 5.5]
