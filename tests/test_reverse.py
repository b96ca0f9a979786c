"""The network's step back: means, every variance, the decoder's rule, clipping; against 50-digit arithmetic."""

from __future__ import annotations

import math

import mpmath
import oracles
import pytest
import torch
from tensors import BAR, PREDICTIONS, TABLES, noise
from torch import Tensor
from torch.testing import assert_close

from ddpm_ext.diffusion.images import clip_x_0, threshold_x_0
from ddpm_ext.diffusion.process import jump
from ddpm_ext.diffusion.reverse import Respaced, decoder_log_var, p_mean_variance, split_output, variance_bounds
from ddpm_ext.diffusion.schedules import make_tables

VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
T_FULL, S_FULL = [0, 1, 5, 400, 999], [-1, 0, 4, 399, 998]
T_SHORT, S_SHORT = [0, 111, 333, 555, 999], [-1, 0, 222, 444, 888]


def network_output(variance_type: str, x_t: Tensor) -> Tensor:
    learned = variance_type in ("learned", "learned_range")
    return torch.cat([noise(5), noise(6).tanh() - (4 if variance_type == "learned" else 0)], 1) if learned else noise(5)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize(("t", "s"), [(T_FULL, S_FULL), (T_SHORT, S_SHORT)], ids=["full", "respaced"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("variance_type", VARIANCES)
def test_p_mean_variance_to_ten_digits(variance_type, prediction_type, t, s, clip):
    x_t = noise(4)
    output = network_output(variance_type, x_t)
    p = p_mean_variance(
        output,
        x_t,
        torch.tensor(t),
        TABLES,
        prediction_type=prediction_type,
        variance_type=variance_type,
        clip=clip,
        respaced=Respaced(torch.tensor(s)),
    )
    assert p.mean.dtype == p.log_var.dtype == torch.float64
    for b in range(5):
        step = oracles.exact_jump(BAR, t[b], s[b])
        for i, (out, x) in enumerate(zip(output[b, :2].ravel().tolist(), x_t[b].ravel().tolist(), strict=True)):
            with mpmath.workdps(50):
                terms = [oracles.exact_x_0(prediction_type, *pair, BAR, t[b]) for pair in ((out, 0.0), (0.0, x))]
                x_0, size = sum(terms), max(abs(v) for v in terms)  # digits are lost where two large terms cancel
                if clip is not None:
                    x_0 = max(-clip, min(clip, x_0))
                head = float(output[b, 2:].ravel()[i]) if output.shape[1] == 4 else 0.0
                log_var = oracles.exact_log_var(variance_type, BAR, t[b], s[b], head)
                mean = step.c1 * x_0 + step.c2 * x
                mean_size = step.c1 * size + abs(step.c2 * x)
            assert abs(p.pred_original_sample[b].ravel()[i].item() - x_0) <= 1e-10 * size
            assert abs(p.mean[b].ravel()[i].item() - mean) <= 1e-10 * mean_size
            ours = p.log_var.expand_as(x_t)[b].ravel()[i].item()
            assert abs(ours - log_var) <= 1e-10 * abs(log_var)
    assert_close(p.var, p.log_var.exp(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("plain", ["fixed_small", "fixed_large"])
def test_log_twins_are_the_same_variances(plain: str):
    x_t, t = noise(4), torch.tensor(T_FULL)
    a, b = (p_mean_variance(noise(5), x_t, t, TABLES, variance_type=v) for v in (plain, f"{plain}_log"))
    assert all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


@pytest.mark.parametrize(("head", "power"), [(-1.0, 0.0), (1.0, 1.0), (0.0, 0.5), (3.0, 2.0), (-2.0, -0.5)])
def test_learned_range_interpolates_the_logarithms(head: float, power: float):
    """β̃ at -1, b at +1, √(β̃ b) at 0, and beyond the ends without a clamp (IDDPM Eq. 15)."""
    x_t, t, s = noise(4), torch.tensor([1, 5, 400, 700, 999]), torch.tensor([0, 4, 200, 699, 990])
    output = torch.cat([noise(5), torch.full_like(x_t, head)], 1)
    p = p_mean_variance(output, x_t, t, TABLES, respaced=Respaced(s), variance_type="learned_range")
    step = jump(TABLES, t, s)
    expected = (step.var ** (1 - power) * step.b**power).view(5, 1, 1, 1).expand_as(x_t)
    assert_close(p.var, expected, rtol=1e-10, atol=0)


def test_learned_is_the_log_variance_itself():
    x_t = noise(4)
    output = torch.cat([noise(5), noise(6)], 1)
    p = p_mean_variance(output, x_t, torch.tensor(T_FULL), TABLES, variance_type="learned")
    assert torch.equal(p.log_var, noise(6))


def test_last_jump_takes_the_second_variance():
    """log β̃_2 (base), also for fixed_large and from a distant n_1; log β̃(n_1, n_2) when that one is asked for."""
    x_t, t, s = noise(4), torch.full((5,), 40), torch.full((5,), -1)
    for variance_type in ("fixed_small", "fixed_large"):
        p = p_mean_variance(noise(5), x_t, t, TABLES, respaced=Respaced(s), variance_type=variance_type)
        assert_close(p.var, torch.full_like(p.var, 5.453187661302606e-05), rtol=1e-12, atol=0)
        assert_close(p.mean, p.pred_original_sample)
    respaced = decoder_log_var(TABLES, [40, 240, 440], "respaced")
    assert_close(respaced.item(), float(mpmath.log(oracles.exact_jump(BAR, 240, 40).var)), rtol=1e-12, atol=0)
    assert decoder_log_var(TABLES, [40, 240], "respaced") == respaced  # two times are enough
    assert decoder_log_var(TABLES, [40, 240, 440], "base") == decoder_log_var(TABLES)
    assert decoder_log_var(TABLES, [40], "respaced") == decoder_log_var(TABLES)
    p = p_mean_variance(noise(5), x_t, t, TABLES, respaced=Respaced(s, respaced))
    assert_close(p.log_var, torch.full_like(p.log_var, respaced.item()))
    with pytest.raises(ValueError, match="decoder_variance must be one of 'base', 'respaced', got 'full'"):
        decoder_log_var(TABLES, [0], "full")  # pyright: ignore[reportArgumentType]


def test_learned_range_at_the_last_jump_has_b_as_its_other_end():
    x_t, t, s = noise(4), torch.full((5,), 40), torch.full((5,), -1)
    for head, expected in ((-1.0, decoder_log_var(TABLES)), (1.0, TABLES.one_minus_alpha_bar[40].log())):
        output = torch.cat([noise(5), torch.full_like(x_t, head)], 1)
        p = p_mean_variance(output, x_t, t, TABLES, respaced=Respaced(s), variance_type="learned_range")
        assert_close(p.log_var, torch.full_like(p.log_var, expected.item()), rtol=1e-12, atol=0)


def test_one_step_has_no_second_variance():
    tables = make_tables(num_timesteps=1, trained_betas=[0.3])
    assert decoder_log_var(tables).item() == pytest.approx(math.log(0.3), rel=1e-12)
    small, large = variance_bounds(jump(tables, torch.tensor([0])), decoder_log_var(tables))
    assert_close(small, large)


def test_dynamic_threshold_by_sorting():
    x_0 = 3 * noise(7)
    for quantile, largest in ((0.9, 2.0), (0.5, 1.0), (1.0, 100.0), (0.0, 5.0)):
        expected = torch.from_numpy(oracles.dynamic_threshold(x_0.numpy(), quantile, largest))
        assert_close(threshold_x_0(x_0, quantile, largest), expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(threshold_x_0(x_0, 0.9, 1.0), x_0.clamp(-1, 1))  # s never falls below 1


def test_clip():
    x_0 = 3 * noise(7)
    assert clip_x_0(x_0, None) is x_0
    assert clip_x_0(x_0, 0.7).abs().max() == 0.7
    assert torch.equal(clip_x_0(x_0, torch.tanh), x_0.tanh())


def test_output_must_fit_image_and_variance():
    x_t, t = noise(4), torch.tensor(T_FULL)
    with pytest.raises(ValueError, match=r"shape \(5, 2, 3, 2\) for.*got \(5, 4, 3, 2\).*learned_range"):
        p_mean_variance(noise(5, shape=(5, 4, 3, 2)), x_t, t, TABLES)
    with pytest.raises(ValueError, match=r"shape \(5, 4, 3, 2\) for.*got \(5, 2, 3, 2\).*out_channels"):
        p_mean_variance(noise(5), x_t, t, TABLES, variance_type="learned")
    with pytest.raises(ValueError, match=r"got \(1, 2, 3, 2\)"):
        split_output(noise(5)[:1], x_t, "fixed_small")
    with pytest.raises(ValueError, match=r"variance_type must be one of 'fixed_small'.*got 'fixed'"):
        p_mean_variance(noise(5), x_t, t, TABLES, variance_type="fixed")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_keeps_its_dtype_and_is_rounded_last(dtype: torch.dtype):
    x_t, output, t = noise(4).to(dtype), noise(5).to(dtype), torch.tensor(T_FULL)
    p = p_mean_variance(output, x_t, t, TABLES, clip=1.0)
    exact = p_mean_variance(output.double(), x_t.double(), t, TABLES, clip=1.0)
    assert (p.mean.dtype, p.pred_original_sample.dtype, p.log_var.dtype) == (dtype, dtype, torch.float32)
    tolerance = max(torch.finfo(dtype).eps * 0.51, 1e-5)
    assert_close(p.mean.double(), exact.mean, rtol=tolerance, atol=1e-6)
    assert_close(p.pred_original_sample.double(), exact.pred_original_sample, rtol=tolerance, atol=1e-4)
    assert_close(p.log_var.double(), exact.log_var, rtol=1e-6, atol=0)
