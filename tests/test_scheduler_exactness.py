"""The scheduler's numbers to ten digits, every dtype, shape, layout and mode of torch."""

from __future__ import annotations

import mpmath
import numpy as np
import oracles
import pytest
import torch
from accelerator import device_at_hand, never_waits
from diffusers import DDPMScheduler
from tensors import BAR, images, noise
from torch import Tensor
from torch.testing import assert_close

from ddpm_ext.schedulers.ddpm import DDPMExtScheduler

SHAPE = (3, 2, 2, 2)
CHAINS = {
    "full": lambda s: None,
    "leading-7": lambda s: s.set_timesteps(7),
    "custom": lambda s: s.set_timesteps(timesteps=[999, 640, 441, 12]),
}


def neighbours(scheduler: DDPMExtScheduler) -> tuple[list[int], list[int]]:
    """The first, a middle and the last timestep of the chain, and where each goes."""
    times = [*scheduler.timesteps.tolist(), -1]
    places = (0, (len(times) - 1) // 2, len(times) - 2)
    return [times[i] for i in places], [times[i + 1] for i in places]


def exact_step(kind: str, variance: str, output: Tensor, x: Tensor, z: Tensor, t: int, s: int, clip: float | None):
    """(x_s, its rounding scale) of one pixel each, 50 digits."""
    with mpmath.workdps(50):
        step = oracles.exact_jump(BAR, t, s)
        for i in range(x.numel()):
            pairs = ((float(output.ravel()[i]), 0.0), (0.0, float(x.ravel()[i])))
            terms = [oracles.exact_x_0(kind, *pair, BAR, t) for pair in pairs]
            x_0 = sum(terms)
            if clip is not None:
                x_0 = max(-clip, min(clip, x_0))
            head = float(output.ravel()[x.numel() + i]) if output.numel() > x.numel() else 0.0
            std = mpmath.exp(oracles.exact_log_var(variance, BAR, t, s, head) / 2) if s >= 0 else mpmath.mpf(0)
            value = step.c1 * x_0 + step.c2 * float(x.ravel()[i]) + std * float(z.ravel()[i])
            scale = step.c1 * max(map(abs, terms)) + abs(step.c2 * float(x.ravel()[i])) + abs(std * float(z.ravel()[i]))
            yield value, scale


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "posterior_mean"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large_log", "learned", "learned_range"])
def test_step_to_ten_digits(variance_type: str, prediction_type: str, chain: str):
    scheduler = DDPMExtScheduler(prediction_type=prediction_type, variance_type=variance_type)
    CHAINS[chain](scheduler)
    learned = variance_type in ("learned", "learned_range")
    output, x = noise(1, (3, 4 if learned else 2, 2, 2)), noise(2, SHAPE)
    t, s = neighbours(scheduler)
    x_s = scheduler.step(output, torch.tensor(t), x, generator=torch.Generator().manual_seed(0)).prev_sample
    assert x_s.dtype == torch.float64
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for b in range(3):
        exact = exact_step(prediction_type, variance_type, output[b], x[b], z[b], t[b], s[b], clip=1.0)
        for value, (expected, scale) in zip(x_s[b].ravel().tolist(), exact, strict=True):
            assert abs(value - expected) <= 1e-10 * scale


@pytest.mark.parametrize("chain", CHAINS)
def test_records_to_ten_digits(chain: str):
    """q_posterior, p_mean_variance and add_noise of the current chain, per image, float64 in, float64 out."""
    scheduler = DDPMExtScheduler(variance_type="fixed_large", clip_sample=False)
    CHAINS[chain](scheduler)
    x_0, x_t, eps = images(shape=SHAPE), noise(2, SHAPE), noise(1, SHAPE)
    t, s = neighbours(scheduler)
    q = scheduler.q_posterior(x_0, x_t, torch.tensor(t))
    p = scheduler.p_mean_variance(eps, torch.tensor(t), x_t)
    noised, v = (f(x_0, eps, torch.tensor(t)) for f in (scheduler.add_noise, scheduler.get_velocity))
    assert q._fields == ("mean", "var") and p._fields == ("mean", "var", "log_var", "pred_original_sample")
    assert all(value.dtype == torch.float64 for value in (*q, *p, noised, v))
    for b in range(3):
        step = oracles.exact_jump(BAR, t[b], s[b])
        assert_close(q.var[b].item(), float(step.var), rtol=1e-10, atol=1e-40)
        log_var = oracles.exact_log_var("fixed_large", BAR, t[b], s[b])
        assert_close(p.log_var[b].item(), float(log_var), rtol=1e-10, atol=0)
        assert_close(p.var[b].item(), float(mpmath.exp(log_var)), rtol=1e-10, atol=0)
        with mpmath.workdps(50):
            signal, spread = mpmath.sqrt(BAR[t[b]]), mpmath.sqrt(1 - BAR[t[b]])
            expected = {
                "posterior": [step.c1 * a + step.c2 * c for a, c in pairs(x_0[b], x_t[b])],
                "mean": [step.c1 * (c - spread * e) / signal + step.c2 * c for e, c in pairs(eps[b], x_t[b])],
                "noised": [signal * a + spread * e for a, e in pairs(x_0[b], eps[b])],
                "velocity": [signal * e - spread * a for a, e in pairs(x_0[b], eps[b])],
            }
        for ours, name in ((q.mean, "posterior"), (p.mean, "mean"), (noised, "noised"), (v, "velocity")):
            exact = torch.tensor([float(value) for value in expected[name]], dtype=torch.float64)
            # 1e-10 of the largest pixel: a pixel near 0 is a difference of larger terms.
            assert_close(ours[b].ravel(), exact, rtol=1e-10, atol=1e-10 * exact.abs().max().item())


def pairs(x: Tensor, y: Tensor) -> list[tuple[mpmath.mpf, mpmath.mpf]]:
    return [(mpmath.mpf(a), mpmath.mpf(b)) for a, b in zip(x.ravel().tolist(), y.ravel().tolist(), strict=True)]


def test_decoder_variance_of_the_records():
    scheduler = DDPMExtScheduler()
    scheduler.set_timesteps(timesteps=[999, 500, 20])
    x, eps = noise(2, SHAPE), noise(1, SHAPE)
    base = scheduler.p_mean_variance(eps, 20, x)
    respaced = scheduler.p_mean_variance(eps, 20, x, decoder_variance="respaced")
    assert_close(base.var.flatten()[0].item(), 5.453187661302606e-05, rtol=1e-12, atol=0)
    assert_close(respaced.var.flatten()[0].item(), float(oracles.exact_jump(BAR, 500, 20).var), rtol=1e-10, atol=0)
    assert torch.equal(base.mean, respaced.mean) and torch.equal(base.mean, base.pred_original_sample)
    with pytest.raises(ValueError, match="decoder_variance must be one of"):
        scheduler.p_mean_variance(eps, 20, x, decoder_variance="own")  # pyright: ignore[reportArgumentType]


# dtypes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance_type", ["fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "posterior_mean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_rounded_last(dtype, prediction_type: str, variance_type: str):
    scheduler = DDPMExtScheduler(prediction_type=prediction_type, variance_type=variance_type)
    scheduler.set_timesteps(20)
    x, output = noise(2, SHAPE).to(dtype), noise(1, (3, 4 if "learned" in variance_type else 2, 2, 2)).to(dtype)
    for t in (950, 500, 50, 0):
        for timestep in (t, torch.tensor([t] * 3)):
            half = scheduler.step(output, timestep, x, generator=torch.Generator().manual_seed(0))
            z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=dtype).double()
            p = scheduler.p_mean_variance(output.double(), timestep, x.double())
            exact = p.mean + (p.var.sqrt() * z if t > 0 else 0)
            assert half.prev_sample.dtype == half.pred_original_sample.dtype == dtype
            # One rounding to nearest, and float32 arithmetic of numbers below 10.
            assert_close(half.prev_sample.double(), exact, rtol=torch.finfo(dtype).eps * 0.51, atol=5e-6)


def test_a_half_precision_network_beside_a_float32_image():
    scheduler, x, output = DDPMExtScheduler(), noise(2, SHAPE).float(), noise(1, SHAPE).bfloat16()
    mixed = scheduler.step(output, 500, x, generator=torch.Generator().manual_seed(0)).prev_sample
    whole = scheduler.step(output.float(), 500, x, generator=torch.Generator().manual_seed(0)).prev_sample
    assert mixed.dtype == torch.float32 and torch.equal(mixed, whole)


def test_autocast_changes_nothing():
    scheduler, x, output = DDPMExtScheduler(), noise(2, SHAPE).float(), noise(1, SHAPE).float()
    for t in (500, torch.tensor([500, 2, 0])):
        plain = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
        assert cast.dtype == torch.float32 and torch.equal(plain, cast)


# Shapes, layouts, gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5), (2, 1, 4, 6), (2, 3, 2, 4, 4), (1, 1, 1, 1)])
def test_samples_of_any_dimension_equal_stock(shape: tuple[int, ...]):
    ours, stock = DDPMExtScheduler(), DDPMScheduler()
    x, output = noise(2, shape).float(), noise(1, shape).float()
    a, b = (s.step(output, 500, x, generator=torch.Generator().manual_seed(0)).prev_sample for s in (ours, stock))
    assert_close(a, b, rtol=1e-4, atol=1e-5)  # stock's tables
    t = torch.full(shape[:1], 500)
    assert_close(ours.step(output, t, x, generator=torch.Generator().manual_seed(0)).prev_sample, a)
    assert ours.q_posterior(x, output, t).var.shape == (shape[0],) + (1,) * (len(shape) - 1)


@pytest.mark.parametrize("timestep", [500, torch.tensor([500, 7, 0, 999])], ids=["one", "per image"])
def test_layouts_give_the_same_numbers_and_are_kept(timestep):
    scheduler = DDPMExtScheduler()
    x, output = noise(2, (4, 3, 6, 5)).float(), noise(1, (4, 3, 6, 5)).float()

    def step(output: Tensor, x: Tensor) -> Tensor:
        return scheduler.step(output, timestep, x, generator=torch.Generator().manual_seed(0)).prev_sample

    expected = step(output, x)
    last = step(output.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert_close(last, expected, rtol=1e-6, atol=1e-6)
    strided = step(noise(1, (4, 3, 6, 5)).float().mT.contiguous().mT, x.mT.contiguous().mT)
    assert_close(strided, expected, rtol=1e-6, atol=1e-6)
    view = step(output.repeat(1, 2, 1, 1)[:, 3:], x.repeat(1, 1, 1, 2)[..., :5])
    assert_close(view, expected, rtol=1e-6, atol=1e-6)
    noised = scheduler.add_noise(x.to(memory_format=torch.channels_last), output, timestep)
    assert noised.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_inputs_are_left_alone(prediction_type: str):
    scheduler = DDPMExtScheduler(prediction_type=prediction_type)
    x, output = 3 * noise(2, SHAPE), 3 * noise(1, SHAPE)
    for t in (0, 500, torch.tensor([0, 500, 999])):
        before = x.clone(), output.clone()
        scheduler.step(output, t, x).prev_sample.zero_()
        scheduler.add_noise(x, output, t).zero_()
        scheduler.p_mean_variance(output, t, x).mean.zero_()
        assert torch.equal(x, before[0]) and torch.equal(output, before[1])


@pytest.mark.parametrize("t", [500, torch.tensor([500, 7, 0])], ids=["one", "per image"])
@pytest.mark.parametrize(
    "options", [{}, {"clip_sample": False}, {"thresholding": True, "sample_max_value": 2.0}], ids=str
)
def test_gradients_flow_as_through_the_plain_formula(options: dict, t):
    scheduler = DDPMExtScheduler(variance_type="learned_range", **options)
    x, output = noise(2, SHAPE).requires_grad_(), noise(1, (3, 4, 2, 2)).requires_grad_()
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
    ours = torch.autograd.grad(step.square().sum(), (x, output))
    p = scheduler.p_mean_variance(output, t, x)
    noisy = (torch.as_tensor(t) > 0).reshape(-1, 1, 1, 1)
    plain = torch.autograd.grad((p.mean + p.var.sqrt() * z * noisy).square().sum(), (x, output))
    assert_close(ours, plain, rtol=1e-9, atol=1e-11)


# Short chains ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned", "learned_range"])
def test_chains_of_one_and_two_steps(T: int, variance_type: str):
    scheduler = DDPMExtScheduler(
        T, trained_betas=[0.3, 0.99][-T:], variance_type=variance_type, clip_sample=False, prediction_type="sample"
    )
    learned = variance_type in ("learned", "learned_range")
    x, output = noise(2, SHAPE), noise(1, (3, 4 if learned else 2, 2, 2))
    for K in range(1, T + 1):
        scheduler.set_timesteps(K)
        for t in scheduler.timesteps:
            result = scheduler.step(output, t, x)
            assert torch.isfinite(result.prev_sample).all()
            p = scheduler.p_mean_variance(output, t, x)
            assert all(torch.isfinite(value).all() for value in p)
        assert torch.equal(result.prev_sample, output[:, :2])


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_one_step_of_a_long_schedule_goes_to_the_image(spacing: str):
    scheduler = DDPMExtScheduler(timestep_spacing=spacing, prediction_type="sample", clip_sample=False)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == ([999] if spacing == "trailing" else [0])
    x, output = noise(2, SHAPE), noise(1, SHAPE)
    assert torch.equal(scheduler.step(output, scheduler.timesteps[0], x).prev_sample, output)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_timesteps_of_any_integer_type(dtype: torch.dtype):
    scheduler, x, output = DDPMExtScheduler(), noise(2, SHAPE), noise(1, SHAPE)
    t = torch.tensor([3, 0, 200])
    calls = [
        lambda t: scheduler.step(output, t, x, generator=torch.Generator().manual_seed(0)).prev_sample,
        lambda t: scheduler.p_mean_variance(output, t, x).mean,
        lambda t: scheduler.q_posterior(output, x, t).mean,
        lambda t: scheduler.add_noise(x, output, t),
        lambda t: scheduler.previous_timestep(t),
    ]
    for call in calls:
        assert torch.equal(call(t), call(t.to(dtype)))
        assert torch.equal(call(200).expand_as(call(t)), call(torch.tensor([200] * 3).to(dtype)))
        assert torch.equal(call(200), call(np.int64(200)))


# Accelerators ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "posterior_mean"])
def test_a_step_on_an_accelerator_never_makes_the_host_wait(prediction_type: str, variance_type: str):
    scheduler = DDPMExtScheduler(prediction_type=prediction_type, variance_type=variance_type)
    device = device_at_hand()
    scheduler.set_timesteps(20, device=device)
    assert scheduler.timesteps.device.type == device
    x = noise(2, SHAPE).to(device)
    output = noise(1, (3, 4 if "learned" in variance_type else 2, 2, 2)).to(device)
    t = torch.tensor([950, 500, 0], device=device)
    expected = scheduler.p_mean_variance(output.cpu(), t.cpu(), x.cpu()).mean
    generator = torch.Generator(device).manual_seed(0)
    scheduler.step(output, t, x), scheduler.add_noise(x, x, t)  # the tables go to the device once
    with never_waits():
        for timestep in (t, t[0], scheduler.timesteps[-1], 500):
            scheduler.step(output, timestep, x, generator=generator)
        result = scheduler.step(output, scheduler.timesteps[-1], x)
        for timestep in (t, t[:1]):
            scheduler.add_noise(x, x, timestep)
            scheduler.get_velocity(x, x, timestep)
    p = scheduler.p_mean_variance(output, t, x)
    assert_close(p.mean.cpu(), expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(result.prev_sample, result.pred_original_sample)
    outside = scheduler.step(output, torch.tensor([951, 0, 0], device=device), x).prev_sample
    assert outside[0].isnan().all()  # never a wrong number, without looking at the timestep
