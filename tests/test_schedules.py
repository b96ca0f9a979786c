"""Beta schedules, their tables and respaced timesteps, against 50-digit arithmetic and Diffusers."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import numpy as np
import oracles
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.testing import assert_close

from ddpm_ext.diffusion.schedules import make_tables, respaced_timesteps

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")


def as_tensor(values: list[mpmath.mpf]) -> Tensor:
    return torch.tensor([float(v) for v in values], dtype=torch.float64)


@pytest.mark.parametrize("T", [1, 2, 7, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_betas_are_the_published_formulas(schedule: str, T: int):
    beta = make_tables(schedule, T).beta
    assert beta.dtype == torch.float64 and beta.shape == (T,)
    # 1 - f(u')/f(u) loses about four digits of 1e-16 where the quotient is near 1.
    assert_close(beta, as_tensor(oracles.exact_betas(schedule, T)), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tables_hold_ten_digits(schedule: str):
    tables = make_tables(schedule)
    with mpmath.workdps(50):
        bar = oracles.exact_alpha_bar(tables.beta.tolist())
        noise, log = [1 - a for a in bar], [mpmath.log(a) for a in bar]
    # A product of 1000 factors, each right to 1e-16.
    assert_close(tables.alpha_bar, as_tensor(bar), rtol=1e-12, atol=0)
    assert_close(tables.one_minus_alpha_bar, as_tensor(noise), rtol=1e-12, atol=0)
    assert_close(tables.log_alpha_bar, as_tensor(log), rtol=1e-12, atol=0)
    assert torch.equal(tables.alpha, 1 - tables.beta)


def test_printed_numbers_of_the_linear_schedule():
    tables = make_tables()
    assert tables.alpha_bar[-1].item() == pytest.approx(4.035829765375687e-05, rel=1e-12)
    assert tables.beta[[0, -1]].tolist() == [1e-4, 0.02]


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("T", [2, 10, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tables_equal_stock(schedule: str, T: int, zero_terminal_snr: bool):
    stock = DDPMScheduler(T, beta_schedule=schedule, rescale_betas_zero_snr=zero_terminal_snr)
    tables = make_tables(schedule, T, zero_terminal_snr=zero_terminal_snr)
    # Stock computes in float32: each of up to 1000 factors 1 - β is off by 6e-8; rescaling divides by such a product.
    assert_close(tables.beta.float(), stock.betas, rtol=1e-5, atol=1e-5 if zero_terminal_snr else 2e-7)
    assert_close(tables.alpha_bar.float(), stock.alphas_cumprod, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_terminal_snr_is_exactly_zero(schedule: str):
    plain, tables = make_tables(schedule), make_tables(schedule, zero_terminal_snr=True)
    exact = oracles.exact_zero_terminal_snr(plain.beta.tolist())
    assert tables.alpha_bar[-1] == 0 and tables.one_minus_alpha_bar[-1] == 1 and tables.beta[-1] == 1
    assert_close(tables.alpha_bar, as_tensor(exact), rtol=1e-10, atol=0)
    assert_close(tables.alpha_bar[0], plain.alpha_bar[0], rtol=1e-12, atol=0)
    assert (tables.alpha_bar.diff() < 0).all()


def test_trained_betas_are_taken_as_they_are():
    beta = [0.1, 0.5, 1.0]
    for given in (beta, torch.tensor(beta), np.array(beta)):
        tables = make_tables(num_timesteps=3, trained_betas=given)
        assert_close(tables.beta.tolist(), beta, rtol=1e-7, atol=0)  # a float32 tensor holds 0.1 to 1e-8
        assert tables.alpha_bar[-1] == 0


def test_tables_are_frozen_and_move():
    tables = make_tables(num_timesteps=4, schedule="squaredcos_cap_v2")
    moved = tables.to("meta")
    assert moved.num_timesteps == 4 and moved.log_alpha_bar.device.type == "meta"
    with pytest.raises(AttributeError):
        tables.beta = tables.alpha  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"schedule": "cosine"}, "beta_schedule must be one of 'linear'.*got 'cosine'"),
        ({"num_timesteps": 0}, "at least 1, got 0"),
        ({"num_timesteps": -3}, "at least 1, got -3"),
        ({"num_timesteps": 10.0}, "must be an int.*got 10.0"),
        ({"num_timesteps": True}, "must be an int.*got True"),
        ({"beta_start": 0.0}, r"beta_start must lie in \(0, 1\], got 0.0"),
        ({"beta_start": -1e-4}, "beta_start.*got -0.0001"),
        ({"beta_end": 1.5}, "beta_end.*got 1.5"),
        ({"beta_end": math.nan}, "beta_end.*got nan"),
        ({"trained_betas": [0.1, 0.2]}, r"num_train_timesteps = 1000, got shape \(2,\)"),
        ({"trained_betas": 0.1}, r"one beta per step.*got shape \(\)"),
        ({"num_timesteps": 2, "trained_betas": [0.1, 1.5]}, "got 1.5 at step 1"),
        ({"num_timesteps": 2, "trained_betas": [0.0, 0.5]}, "got 0.0 at step 0"),
        ({"num_timesteps": 2, "trained_betas": [0.1, math.nan]}, "got nan at step 1"),
        ({"num_timesteps": 3, "trained_betas": [0.1, 1.0, 0.1]}, "Only the last beta may be 1, got 1 at step 1"),
        ({"num_timesteps": 1, "zero_terminal_snr": True}, "at least 2, got 1"),
    ],
)
def test_bad_schedules_are_refused(options: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        make_tables(**options)


# Respaced timesteps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("T", [1, 2, 7, 100, 999, 1000])
def test_respaced_timesteps_equal_stock_for_every_number_of_steps(spacing: str, T: int):
    stock = DDPMScheduler(T, timestep_spacing=spacing)
    for K in range(1, T + 1):
        times = respaced_timesteps(spacing, T, K)
        assert len(times) == len(set(times)) == K and times == sorted(times) and 0 <= times[0] <= times[-1] < T
        stock.set_timesteps(K)
        if spacing == "trailing":  # stock counts down with np.arange, which may run one step too far, to -1
            exact = [T - Fraction(k * T, K) - 1 for k in range(K)]
            assert all(abs(a - b) <= Fraction(1, 2) for a, b in zip(times[::-1], exact, strict=True))
            assert stock.timesteps.tolist()[K:] in ([], [-1])
        assert times[::-1] == stock.timesteps.tolist()[:K]


def test_trailing_is_right_where_stock_makes_one_step_too_many():
    stock = DDPMScheduler(timestep_spacing="trailing")
    wrong = 0
    for K in range(1, 1001):
        stock.set_timesteps(K)
        wrong += len(stock.timesteps) != K
        assert respaced_timesteps("trailing", 1000, K)[-1] == 999
    assert wrong > 0  # the reason for this test is still there


def test_offset_moves_leading_only():
    stock = DDPMScheduler(steps_offset=1)
    stock.set_timesteps(50)
    assert respaced_timesteps("leading", 1000, 50, offset=1)[::-1] == stock.timesteps.tolist()
    for spacing in ("trailing", "linspace", "even"):
        assert respaced_timesteps(spacing, 1000, 50, offset=1) == respaced_timesteps(spacing, 1000, 50)
    with pytest.raises(ValueError, match=r"to 1..1000, outside 0..999. Choose an offset from 0 to 0"):
        respaced_timesteps("leading", 1000, 1000, offset=1)
    words = r"0 to 0 in the scheduler's config \(scheduler_config.json of a folder\), or take 999 steps \(num_inference"
    with pytest.raises(ValueError, match=words):
        respaced_timesteps("leading", 1000, 1000, offset=1)
    assert respaced_timesteps("leading", 1000, 999, offset=1)[-1] == 999
    with pytest.raises(ValueError, match="outside"):
        respaced_timesteps("leading", 1000, 10, offset=-1)


def test_even_keeps_both_ends_and_rounds_as_published():
    for K in range(2, 1001):
        times = respaced_timesteps("even", 1000, K)
        assert len(set(times)) == K and times[0] == 0 and times[-1] == 999
    # T - 1 = 999 in 20 parts: 10 parts reach 499.5. linspace rounds it to even, the running sum stays just below.
    assert respaced_timesteps("even", 1000, 21)[10] in (499, 500)
    exact = [k * 999 / 24 for k in range(25)]
    assert all(abs(a - b) <= 0.5 + 1e-9 for a, b in zip(respaced_timesteps("even", 1000, 25), exact, strict=True))
    assert respaced_timesteps("even", 1000, 1) == [999]


@pytest.mark.parametrize("K", [0, -5, 1001, 2.5, 5.0, "5", None, True, torch.tensor(2.5)])
def test_number_of_steps_is_an_int_from_1_to_T(K: object):
    with pytest.raises(
        ValueError, match=r"num_inference_steps must be an int from 1 to num_train_timesteps = 1000, got"
    ):
        respaced_timesteps("leading", 1000, K)  # pyright: ignore[reportArgumentType]


def test_integers_of_numpy_and_torch_count():
    for K in (np.int64(5), torch.tensor(5)):
        times = respaced_timesteps("trailing", 1000, K)  # pyright: ignore[reportArgumentType]
        assert times == [199, 399, 599, 799, 999] and all(type(t) is int for t in times)


def test_unknown_spacing():
    with pytest.raises(ValueError, match=r"timestep_spacing must be one of 'linspace', 'leading'.*got 'uniform'"):
        respaced_timesteps("uniform", 1000, 10)  # pyright: ignore[reportArgumentType]
