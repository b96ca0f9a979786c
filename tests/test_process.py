"""Forward steps, posteriors of any jump and conversions, against 50-digit arithmetic."""

from __future__ import annotations

import mpmath
import oracles
import pytest
import torch
from tensors import BAR, PREDICTIONS, TABLES, images, noise
from torch.testing import assert_close

from ddpm_ext.diffusion.process import (
    jump,
    predict_x_0,
    q_marginal,
    q_posterior,
    q_sample,
    q_step,
    training_target,
)
from ddpm_ext.diffusion.schedules import make_tables

TIMES = torch.tensor([0, 1, 5, 400, 999])
TEN_DIGITS = {"rtol": 1e-10, "atol": 0.0}


# Coefficients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(("t", "s"), [(0, -1), (1, 0), (1, -1), (5, 4), (400, 399), (400, 123), (999, 998), (999, -1)])
def test_jump_is_gaussian_conditioning(schedule: str, t: int, s: int):
    tables = make_tables(schedule)
    exact = oracles.exact_jump(oracles.exact_alpha_bar(tables.beta.tolist()), t, s)
    step = jump(tables, torch.tensor(t), torch.tensor(s))
    if s < 0:
        assert (step.c1, step.c2, step.var) == (1, 0, 0)
    for name in ("c1", "c2", "var", "b"):
        assert_close(getattr(step, name).item(), float(getattr(exact, name)), rtol=1e-10, atol=1e-40)


def test_full_chain_is_the_jump_to_the_step_before():
    t = torch.arange(1000)
    for ours, explicit in zip(jump(TABLES, t), jump(TABLES, t, t - 1), strict=True):
        assert torch.equal(ours, explicit)
    assert_close(jump(TABLES, t).b, TABLES.beta, rtol=1e-10, atol=0)


def test_printed_second_posterior_variance():
    assert jump(TABLES, torch.tensor(1)).var.item() == pytest.approx(5.453187661302606e-05, rel=1e-12)


def test_jumps_of_a_zero_terminal_snr_chain_are_finite():
    tables = make_tables(zero_terminal_snr=True)
    step = jump(tables, torch.tensor([999, 999]), torch.tensor([998, 500]))
    assert all(torch.isfinite(value).all() for value in step)
    assert (step.c2 == 0).all() and (step.b == 1).all()  # x_999 tells nothing about the image
    assert_close(step.c1, tables.alpha_bar[[998, 500]].sqrt())


# The forward process --------------------------------------------------------------------------------------------------


def test_forward_steps_compose_to_the_marginal():
    x_0 = images(shape=(1, 1, 2, 2))
    mean, var = x_0, torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for i in range(1000):
        t = torch.tensor([i])
        step = q_step(mean, t, TABLES)
        gain = q_step(torch.ones_like(x_0), t, TABLES).mean[:, :1, :1, :1]  # N(mean, var) goes to N(g mean, g² var + β)
        mean, var = step.mean, gain**2 * var + step.var
        if i in (0, 1, 10, 500, 999):
            marginal = q_marginal(x_0, t, TABLES)
            assert_close(mean, marginal.mean, rtol=1e-11, atol=0)
            assert_close(var, marginal.var, rtol=1e-11, atol=0)


def test_forward_samples_have_the_marginal_of_the_composed_steps():
    """The same composition drawn: 20 steps one after the other, 40,000 pixels of the same grey."""
    generator = torch.Generator().manual_seed(0)
    tables = make_tables("squaredcos_cap_v2", 20)
    x_0 = torch.full((1, 1, 200, 200), 0.5, dtype=torch.float64)
    x = x_0
    for i in range(12):
        step = q_step(x, torch.tensor([i]), tables)
        x = step.mean + step.var.sqrt() * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    marginal = q_marginal(x_0, torch.tensor([11]), tables)
    # Four standard errors of a mean and of a variance of 40,000 numbers.
    assert abs(x.mean() - marginal.mean.mean()) < 4 * (marginal.var.item() / 40_000) ** 0.5
    assert abs(x.var() / marginal.var.item() - 1) < 4 * (2 / 40_000) ** 0.5


def test_q_sample_to_ten_digits():
    x_0, eps = images(), noise()
    x_t = q_sample(x_0, TIMES, eps, TABLES)
    with mpmath.workdps(50):
        for b, t in enumerate(TIMES.tolist()):
            signal, spread = mpmath.sqrt(BAR[t]), mpmath.sqrt(1 - BAR[t])
            for x, e, out in zip(
                x_0[b].ravel().tolist(), eps[b].ravel().tolist(), x_t[b].ravel().tolist(), strict=True
            ):
                exact = signal * x + spread * e
                assert abs(out - exact) <= 1e-10 * abs(exact)


# The posterior --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [None, [-1, 0, -1, 7, 700]])
def test_q_posterior_to_ten_digits(s: list[int] | None):
    x_0, x_t = images(), noise()
    mean, var = q_posterior(x_0, x_t, TIMES, TABLES, None if s is None else torch.tensor(s))
    assert mean.shape == x_t.shape and var.shape == (5, 1, 1, 1) and mean.dtype == var.dtype == torch.float64
    with mpmath.workdps(50):
        for b, t in enumerate(TIMES.tolist()):
            exact = oracles.exact_jump(BAR, t, t - 1 if s is None else s[b])
            assert_close(var[b].item(), float(exact.var), rtol=1e-10, atol=1e-40)
            for x, y, out in zip(
                x_0[b].ravel().tolist(), x_t[b].ravel().tolist(), mean[b].ravel().tolist(), strict=True
            ):
                assert abs(out - (exact.c1 * x + exact.c2 * y)) <= 1e-10 * (abs(exact.c1 * x) + abs(exact.c2 * y))


def test_last_jump_of_the_posterior_is_the_clean_image():
    x_0, x_t = images(), noise()
    mean, var = q_posterior(x_0, x_t, TIMES, TABLES, torch.full((5,), -1))
    assert torch.equal(mean, x_0) and (var == 0).all()


def test_posterior_of_a_respaced_chain_composes():
    """q(x_s | x_t, x_0) of a long jump is the chain of two short ones, mean and variance."""
    x_0, x_t = images(shape=(1, 1, 2, 2)), noise(shape=(1, 1, 2, 2))
    t, u, s = (torch.tensor([i]) for i in (700, 350, 20))
    whole = q_posterior(x_0, x_t, t, TABLES, s)
    first = q_posterior(x_0, x_t, t, TABLES, u)
    second = q_posterior(x_0, first.mean, u, TABLES, s)
    c2 = jump(TABLES, u, s).c2.view(1, 1, 1, 1)
    assert_close(second.mean, whole.mean, rtol=1e-11, atol=1e-14)
    assert_close(second.var + c2**2 * first.var, whole.var, rtol=1e-11, atol=0)


# Conversions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_perfect_answer_gives_back_the_image(prediction_type: str):
    x_0, eps = images(), noise()
    x_t = q_sample(x_0, TIMES, eps, TABLES)
    target = training_target(x_0, x_t, eps, TIMES, TABLES, prediction_type)
    again = predict_x_0(target, x_t, TIMES, TABLES, prediction_type)
    # At t = 999 the image is 1/√ᾱ = 157 times fainter than the noise, and 1/c1 = 7,900 for the posterior mean.
    assert_close(again, x_0, rtol=0, atol=1e-11)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_x_0_of_any_answer_to_ten_digits(prediction_type: str):
    output, x_t = noise(3), noise(4)
    x_0 = predict_x_0(output, x_t, TIMES, TABLES, prediction_type)
    for b, t in enumerate(TIMES.tolist()):
        for out, x, value in zip(*(z[b].ravel().tolist() for z in (output, x_t, x_0)), strict=True):
            exact = float(oracles.exact_x_0(prediction_type, out, x, BAR, t))
            # Relative to the two terms that are subtracted.
            size = max(abs(float(oracles.exact_x_0(prediction_type, *pair, BAR, t))) for pair in ((out, 0.0), (0.0, x)))
            assert abs(value - exact) <= 1e-10 * size


def test_v_is_a_rotation():
    x_0, eps = images(), noise()
    x_t = q_sample(x_0, TIMES, eps, TABLES)
    v = training_target(x_0, x_t, eps, TIMES, TABLES, "v_prediction")
    assert_close(v**2 + x_t**2, x_0**2 + eps**2)


def test_targets_are_what_they_are_called():
    x_0, eps = images(), noise()
    x_t = q_sample(x_0, TIMES, eps, TABLES)
    assert training_target(x_0, x_t, eps, TIMES, TABLES, "epsilon") is eps
    assert training_target(x_0, x_t, eps, TIMES, TABLES, "sample") is x_0
    mean = training_target(x_0, x_t, eps, TIMES, TABLES, "posterior_mean")
    # DDPM Eq. (11): the posterior mean by the noise.
    beta, bar = (z[TIMES].view(5, 1, 1, 1) for z in (TABLES.beta, TABLES.alpha_bar))
    assert_close(mean, (x_t - beta / (1 - bar).sqrt() * eps) / (1 - beta).sqrt(), rtol=1e-9, atol=1e-12)


# Precision and shape --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype):
    x_0, eps = images().to(dtype), noise().to(dtype)
    exact = q_sample(x_0.double(), TIMES, eps.double(), TABLES)
    # One rounding to nearest, and float32 arithmetic that may tip a tie.
    assert_close(q_sample(x_0, TIMES, eps, TABLES).double(), exact, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-6)
    mean, var = q_posterior(x_0, eps, TIMES, TABLES)
    assert mean.dtype == dtype and var.dtype == torch.float32
    exact_mean = q_posterior(x_0.double(), eps.double(), TIMES, TABLES).mean
    assert_close(mean.double(), exact_mean, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (5, 1, 2, 3), (5, 1, 2, 2, 2)])
def test_any_number_of_dimensions(shape: tuple[int, ...]):
    x_0, eps = images(shape=shape), noise(shape=shape)
    x_t = q_sample(x_0, TIMES, eps, TABLES)
    flat = q_sample(x_0.reshape(5, -1, 1, 1), TIMES, eps.reshape(5, -1, 1, 1), TABLES)
    assert torch.equal(x_t, flat.reshape(shape))
    assert q_posterior(x_0, x_t, TIMES, TABLES).var.shape == (5,) + (1,) * (len(shape) - 1)


def test_bad_steps_and_shapes_are_refused():
    x_0, eps = images(), noise()
    with pytest.raises(
        ValueError, match=r"x_0 and eps must have the same shape, got \(5, 2, 3, 2\) and \(1, 2, 3, 2\)"
    ):
        q_sample(x_0, TIMES, eps[:1], TABLES)
    with pytest.raises(ValueError, match="x_0 and x_t must have the same shape"):
        q_posterior(x_0[:, :1], eps, TIMES, TABLES)
    with pytest.raises(ValueError, match="output and x_t must have the same shape"):
        predict_x_0(eps[:1], x_0, TIMES, TABLES, "epsilon")
    for t in (TIMES - 1, TIMES + 1):
        for call in (
            lambda t: q_step(x_0, t, TABLES),
            lambda t: q_marginal(x_0, t, TABLES),
            lambda t: q_sample(x_0, t, eps, TABLES),
            lambda t: q_posterior(x_0, eps, t, TABLES),
            lambda t: predict_x_0(eps, x_0, t, TABLES, "v_prediction"),
            lambda t: jump(TABLES, t),
            lambda t: training_target(x_0, x_0, eps, t, TABLES, "v_prediction"),
        ):
            with pytest.raises(ValueError, match=r"t must lie in 0\.\.999, got values from"):
                call(t)
    for t in (TIMES[:3], TIMES.int(), TIMES.double(), TIMES[:, None]):
        with pytest.raises(ValueError, match=r"one int64 step per image, shape \(5,\), got"):
            q_sample(x_0, t, eps, TABLES)
    for s in (TIMES, TIMES + 3, TIMES * 0 - 2):
        with pytest.raises(ValueError, match=r"s must lie in -1\.\.t-1"):
            q_posterior(x_0, eps, TIMES, TABLES, s)
    with pytest.raises(ValueError, match="s must be int64 in the shape of t"):
        q_posterior(x_0, eps, TIMES, TABLES, TIMES[:2] - 1)
    with pytest.raises(ValueError, match=r"prediction_type must be one of 'epsilon'.*got 'score'"):
        predict_x_0(eps, x_0, TIMES, TABLES, "score")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        training_target(x_0, x_0, eps, TIMES, TABLES, "score")  # pyright: ignore[reportArgumentType]
