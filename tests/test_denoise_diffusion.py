"""The textbook class against the formulas written out, and its chain against the scheduler's."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from ddpm_ext import DDPMExtScheduler, DenoiseDiffusion

GEN = torch.Generator


def eps_model(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A smooth stand-in for a network that looks at both of its arguments."""
    return 0.9 * torch.tanh(x_t.roll(1, -1)) + (t.to(x_t.dtype) / 1000).reshape(-1, 1, 1, 1)


def images(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(shape, generator=GEN().manual_seed(7), dtype=dtype) * 2 - 1


def test_tables_and_marginal_are_equation_4():
    diffusion = DenoiseDiffusion(eps_model, 1000, "cpu")
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(diffusion.beta, beta, rtol=1e-14, atol=0)
    torch.testing.assert_close(diffusion.alpha, 1 - beta, rtol=1e-14, atol=0)
    alpha_bar = torch.cumprod(1 - beta, 0)
    torch.testing.assert_close(diffusion.alpha_bar, alpha_bar, rtol=1e-12, atol=0)  # 1000 roundings of 1e-16
    assert diffusion.n_steps == 1000
    x0, t = images(3, 2, 4, 4), torch.tensor([0, 500, 999])
    mean, var = diffusion.q_xt_x0(x0, t)
    torch.testing.assert_close(mean, alpha_bar[t].sqrt().reshape(3, 1, 1, 1) * x0, rtol=1e-12, atol=0)
    torch.testing.assert_close(var, (1 - alpha_bar[t]).reshape(3, 1, 1, 1), rtol=1e-11, atol=0)


@pytest.mark.parametrize("sigma2", ["beta", "posterior"])
def test_sigma2_is_the_variance_its_word_says(sigma2: str):
    diffusion = DenoiseDiffusion(eps_model, 1000, "cpu", sigma2=sigma2)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - beta, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    expected = beta if sigma2 == "beta" else beta * (1 - before) / (1 - alpha_bar)
    torch.testing.assert_close(diffusion.sigma2, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("sigma2", ["beta", "posterior"])
def test_p_sample_is_equation_11_and_noiseless_at_the_last_step(sigma2: str):
    diffusion = DenoiseDiffusion(eps_model, 1000, "cpu", sigma2=sigma2)
    xt, t = images(3, 1, 4, 4), torch.tensor([0, 1, 700])
    got = diffusion.p_sample(xt, t, generator=GEN().manual_seed(1))
    z = torch.randn(xt.shape, generator=GEN().manual_seed(1), dtype=torch.float64)
    for i, step in enumerate(t.tolist()):
        beta, alpha_bar = diffusion.beta[step].item(), diffusion.alpha_bar[step].item()
        eps_hat = eps_model(xt[i : i + 1], t[i : i + 1])[0]
        mean = (xt[i] - beta / (1 - alpha_bar) ** 0.5 * eps_hat) / (1 - beta) ** 0.5
        noise = diffusion.sigma2[step].sqrt() * z[i] if step > 0 else 0
        torch.testing.assert_close(got[i], mean + noise, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("sigma2", "variance_type"), [("beta", "fixed_large"), ("posterior", "fixed_small")])
@pytest.mark.parametrize("scheduler_class", [DDPMExtScheduler, DDPMScheduler])
def test_chain_equals_the_schedulers_on_the_same_noise(sigma2: str, variance_type: str, scheduler_class: type):
    diffusion = DenoiseDiffusion(eps_model, 1000, "cpu", sigma2=sigma2)
    scheduler = scheduler_class(variance_type=variance_type, clip_sample=False)
    dtype = torch.float64 if scheduler_class is DDPMExtScheduler else torch.float32
    x = y = torch.randn(2, 1, 4, 4, generator=GEN().manual_seed(3), dtype=dtype)
    ours, theirs = GEN().manual_seed(5), GEN().manual_seed(5)
    for i in reversed(range(1000)):
        t = torch.full((2,), i)
        x = diffusion.p_sample(x, t, generator=ours)
        y = scheduler.step(eps_model(y, t), i, y, generator=theirs).prev_sample
    # Float64 rounding over 1000 steps; float32 and stock's float32 tables otherwise.
    tolerance = 1e-10 if dtype is torch.float64 else 3e-3
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def test_loss_is_equation_14_and_trains_a_unet(tiny_unet: torch.nn.Module):
    x0 = images(4, 1, 8, 8, dtype=torch.float32)
    diffusion = DenoiseDiffusion(eps_model, 1000, "cpu")
    got = diffusion.loss(x0, generator=GEN().manual_seed(2))
    generator = GEN().manual_seed(2)
    t = torch.randint(1000, (4,), generator=generator)
    eps = torch.randn(x0.shape, generator=generator)
    squares = []
    for i in range(4):
        alpha_bar = diffusion.alpha_bar[t[i]].item()
        x_t = alpha_bar**0.5 * x0[i : i + 1] + (1 - alpha_bar) ** 0.5 * eps[i : i + 1]
        squares.append(((eps[i : i + 1] - eps_model(x_t, t[i : i + 1])) ** 2).mean())
    torch.testing.assert_close(got, torch.stack(squares).mean(), rtol=1e-5, atol=0)

    loss = DenoiseDiffusion(tiny_unet, 1000, "cpu").loss(x0, noise=eps)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tiny_unet.parameters())


def test_q_sample_draws_noise_of_the_right_size():
    diffusion = DenoiseDiffusion(eps_model, 1000, "cpu")
    t = torch.full((64,), 800)
    torch.manual_seed(0)
    x_t = diffusion.q_sample(torch.zeros(64, 1, 16, 16), t)
    # 16,384 draws: the variance is known to 3 standard errors, 3·√(2/16384).
    assert abs(x_t.var().item() / (1 - diffusion.alpha_bar[800].item()) - 1) < 0.034


def test_bad_input_is_explained():
    with pytest.raises(ValueError, match="sigma2 must be one of 'beta', 'posterior', got 'fixed'"):
        DenoiseDiffusion(eps_model, 1000, "cpu", sigma2="fixed")  # pyright: ignore[reportArgumentType]
    with pytest.warns(UserWarning, match="far from 0 with 10 steps"):
        DenoiseDiffusion(eps_model, 10, "cpu")
    diffusion = DenoiseDiffusion(eps_model, 1000, "cpu")
    with pytest.raises(ValueError, match=r"t must lie in 0\.\.999, got values from -1 to 3"):
        diffusion.q_sample(torch.zeros(2, 1, 4, 4), torch.tensor([-1, 3]), torch.zeros(2, 1, 4, 4))
