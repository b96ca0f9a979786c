"""Same noise, same samples as Diffusers' DDPMScheduler; and what stock does wrong, done right."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import oracles
import pytest
import torch
from diffusers import DDPMScheduler
from tensors import noise
from torch import Tensor
from torch.testing import assert_close

from ddpm_ext.schedulers.ddpm import DDPMExtScheduler

STOCK_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")  # of the others it makes NaN
STOCK_PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
X_T = noise(0, (4, 3, 4, 4)).float()

Network = Callable[[Tensor, Tensor], Tensor]


def network(prediction_type: str, variance_type: str, head: float | None = None) -> Network:
    """A float32 network that guesses x̂_0 = 1.2 tanh(2x/(1 + √ᾱ)): some pixels are clipped, errors do not grow."""
    alpha_bar = DDPMExtScheduler().tables.alpha_bar.float()

    def model(x: Tensor, t: Tensor) -> Tensor:
        signal, spread = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
        x_0 = 1.2 * torch.tanh(2 * x / (1 + signal))
        eps = (x - signal * x_0) / spread
        output = {"epsilon": eps, "sample": x_0, "v_prediction": signal * eps - spread * x_0}[prediction_type]
        if variance_type in ("learned", "learned_range"):
            output = torch.cat([output, torch.sin(3 * x) if head is None else torch.full_like(x, head)], 1)
        return output

    return model


def sample(scheduler: DDPMScheduler | DDPMExtScheduler, model: Network, x: Tensor = X_T, seed: int = 1) -> Tensor:
    """Every x_s of the chain, with x̂_0 in place of the last: stock may add noise there."""
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for t in scheduler.timesteps:
        output = scheduler.step(model(x, t), t, x, generator=generator)
        x = output.prev_sample
        steps.append(x)
    assert output.pred_original_sample is not None
    return torch.stack([*steps[:-1], output.pred_original_sample])


def both(K: int | None, **options: object) -> tuple[DDPMExtScheduler, DDPMScheduler]:
    ours, stock = DDPMExtScheduler(**options), DDPMScheduler(**options)
    for scheduler in (ours, stock):
        if K is not None:
            scheduler.set_timesteps(K)
    return ours, stock


# Same noise, same samples ---------------------------------------------------------------------------------------------

# Stock's float32 tables are off by up to 1.7e-4 in 1 - ᾱ, 4e-4 in β̃ and 5e-4 in a respaced β. Half of that, relative,
# reaches the noise: with σ <= 0.14 on the full chain, and damped by each later step, less than 2e-4 in a sample.
# Another variance or prediction moves samples by more than 1e-2.
STOCK_TABLES = {"rtol": 0.0, "atol": 2e-4}


@pytest.mark.parametrize("prediction_type", STOCK_PREDICTIONS)
@pytest.mark.parametrize("variance_type", STOCK_VARIANCES)
def test_full_chain_equals_stock(variance_type: str, prediction_type: str):
    options = {"variance_type": variance_type, "prediction_type": prediction_type}
    ours, stock = both(None, **options)
    model = network(prediction_type, variance_type)
    assert_close(sample(ours, model), sample(stock, model), **STOCK_TABLES)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", STOCK_PREDICTIONS)
@pytest.mark.parametrize("variance_type", STOCK_VARIANCES)
def test_respaced_chain_equals_stock(variance_type: str, prediction_type: str, spacing: str):
    for K, clip_sample in ((50, True), (7, False)):
        ours, stock = both(
            K,
            variance_type=variance_type,
            prediction_type=prediction_type,
            timestep_spacing=spacing,
            clip_sample=clip_sample,
        )
        model = network(prediction_type, variance_type)
        assert_close(sample(ours, model), sample(stock, model), **STOCK_TABLES)


@pytest.mark.parametrize(
    "options",
    [
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "sigmoid"},
        {"trained_betas": torch.linspace(1e-4, 0.03, 1000).tolist()},
        {"clip_sample_range": 0.5},
        {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
        {"steps_offset": 1},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"prediction_type": "sample", "rescale_betas_zero_snr": True, "timestep_spacing": "linspace"},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_other_option_equals_stock(options: dict):
    ours, stock = both(20, **options)
    model = network(options.get("prediction_type", "epsilon"), "fixed_small")
    assert_close(sample(ours, model), sample(stock, model), **STOCK_TABLES)


def test_laplace_equals_stock():
    """Its ᾱ_T = 0.03 leaves signal in x_T, which is said once."""
    with pytest.warns(UserWarning, match="far from 0"):
        ours = DDPMExtScheduler(beta_schedule="laplace")
    stock, model = DDPMScheduler(beta_schedule="laplace"), network("epsilon", "fixed_small")
    for scheduler in (ours, stock):
        scheduler.set_timesteps(20)
    assert_close(sample(ours, model), sample(stock, model), **STOCK_TABLES)


def test_custom_timesteps_equal_stock():
    ours, stock = both(None)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(timesteps=[900, 500, 499, 120, 3])
    model = network("epsilon", "fixed_small")
    assert_close(sample(ours, model), sample(stock, model), **STOCK_TABLES)


def test_another_variance_is_seen_at_this_tolerance():
    model = network("epsilon", "fixed_small")
    small, large = (sample(both(50, variance_type=v)[0], model) for v in ("fixed_small", "fixed_large"))
    assert (small - large).abs().max() > 1e-2


# What stock does wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", ["fixed_small", "fixed_large"])
def test_log_twins_make_the_same_samples(plain: str):
    model = network("epsilon", plain)
    for K in (None, 50):
        a, b = (both(K, variance_type=v)[0] for v in (plain, f"{plain}_log"))
        assert all(torch.equal(a._get_variance(t), b._get_variance(t)) for t in a.timesteps)
    samples = sample(a, model)
    assert torch.equal(samples, sample(b, model)) and torch.isfinite(samples).all()
    stock = sample(both(50, variance_type="fixed_large_log")[1], model)
    assert not torch.isfinite(stock).all()  # the reason for this test is still there


@pytest.mark.parametrize(("head", "plain"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
@pytest.mark.parametrize("K", [None, 10])
def test_learned_range_at_its_ends_is_a_fixed_variance(head: float, plain: str, K: int | None):
    learned, _ = both(K, variance_type="learned_range")
    fixed, _ = both(K, variance_type=plain)
    a = sample(learned, network("epsilon", "learned_range", head))
    # exp(½ log β̃) against √β̃ in float32: a few 1e-7 of σ at every step.
    assert_close(a, sample(fixed, network("epsilon", plain)), rtol=0, atol=1e-5)


def test_learned_with_the_true_logarithm_is_fixed_small():
    learned, fixed = DDPMExtScheduler(variance_type="learned"), DDPMExtScheduler()
    learned.set_timesteps(20)
    fixed.set_timesteps(20)
    model = network("epsilon", "fixed_small")

    def with_head(x: Tensor, t: Tensor) -> Tensor:
        log_var = fixed._get_variance(t).log().clamp(min=-30).float()
        return torch.cat([model(x, t), log_var.expand_as(x)], 1)

    assert_close(sample(learned, with_head), sample(fixed, model), rtol=0, atol=1e-5)


def test_posterior_mean_prediction_is_epsilon_prediction_in_other_words():
    """On the full chain without clipping the step's mean is the answer; respaced, x̂_0 is the same x̂_0."""
    for K in (None, 10):
        answer, plain = DDPMExtScheduler(prediction_type="posterior_mean"), DDPMExtScheduler()
        for scheduler in (answer, plain):
            if K:
                scheduler.set_timesteps(K)
        t = int(answer.timesteps[-3])
        x_t, eps = noise(1), noise(2)
        beta, bar = plain.tables.beta[t], plain.tables.alpha_bar[t]
        mean = (x_t - beta / (1 - bar).sqrt() * eps) / (1 - beta).sqrt()  # DDPM Eq. (11), the training jump
        a = answer.step(mean, t, x_t, generator=torch.Generator().manual_seed(0))
        b = plain.step(eps, t, x_t, generator=torch.Generator().manual_seed(0))
        assert_close(a.prev_sample, b.prev_sample, rtol=0, atol=1e-9)
        assert_close(a.pred_original_sample, b.pred_original_sample, rtol=0, atol=1e-8)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize(
    "choose",
    [
        lambda s: None,
        lambda s: s.set_timesteps(10),
        lambda s: s.set_timesteps(1),
        lambda s: s.set_timesteps(timesteps=[700, 321]),
    ],
    ids=["full", "trailing-10", "trailing-1", "custom"],
)
def test_no_noise_on_the_last_jump_whatever_its_t(variance_type: str, choose: Callable):
    scheduler = DDPMExtScheduler(variance_type=variance_type, timestep_spacing="trailing")
    choose(scheduler)
    last = scheduler.timesteps[-1]
    output = network("epsilon", variance_type)(X_T, last)
    for timestep in (int(last), last, last.expand(4)):
        result = scheduler.step(output, timestep, X_T)
        assert torch.equal(result.prev_sample, result.pred_original_sample)
    if len(scheduler.timesteps) > 1:
        before = scheduler.timesteps[-2]
        assert not torch.equal(*(scheduler.step(output, before, X_T).prev_sample for _ in range(2)))


@pytest.mark.parametrize("T", [10, 100, 1000])
def test_trailing_has_exactly_n_timesteps(T: int):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = DDPMExtScheduler(T, timestep_spacing="trailing")
    for K in range(1, T + 1, 1 if T < 1000 else 13):
        scheduler.set_timesteps(K)
        times = scheduler.timesteps.tolist()
        assert len(times) == scheduler.num_inference_steps == K and times[0] == T - 1 and min(times) >= 0
        assert times == sorted(set(times), reverse=True)


def test_bfloat16_add_noise_keeps_one_percent_where_stock_does_not():
    x_0 = (torch.arange(256).double() / 127.5 - 1).bfloat16().view(1, 1, 16, 16)
    eps = noise(1, (1, 1, 16, 16)).bfloat16()
    t = torch.tensor([5])
    scheduler = DDPMExtScheduler()
    exact = scheduler.add_noise(x_0.double(), eps.double(), t)
    ours = scheduler.add_noise(x_0, eps, t)
    assert ours.dtype == torch.bfloat16
    # One rounding to 8 significant bits: at most 2^-8 = 0.4 % of the value.
    assert_close(ours.double(), exact, rtol=2**-8 + 1e-6, atol=0)

    def spread(x_t: Tensor) -> float:
        """The noise's size in x_t, by regression on the noise."""
        residual = x_t.double() - scheduler.tables.alpha_bar[5].sqrt() * x_0.double()
        return float((residual * eps.double()).sum() / (eps.double() ** 2).sum())

    true = scheduler.tables.one_minus_alpha_bar[5].sqrt().item()
    assert abs(spread(ours) / true - 1) < 0.01
    assert abs(spread(DDPMScheduler().add_noise(x_0, eps, t)) / true - 1) > 0.01  # 1 - ᾱ rounded to 8 bits


# Per image ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "posterior_mean"])
def test_per_image_timesteps_are_a_loop_over_images(prediction_type: str, variance_type: str):
    scheduler = DDPMExtScheduler(prediction_type=prediction_type, variance_type=variance_type)
    scheduler.set_timesteps(10)
    t = torch.tensor([900, 0, 400, 400])
    x = noise(0, (4, 3, 4, 4))
    output = noise(1, (4, 6 if "learned" in variance_type else 3, 4, 4))

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in range(4)]

    whole = scheduler.step(output, t, x, generator=generators())
    for i, generator in enumerate(generators()):
        alone = scheduler.step(output[i : i + 1], int(t[i]), x[i : i + 1], generator=generator)
        assert_close(whole.prev_sample[i : i + 1], alone.prev_sample, rtol=1e-12, atol=1e-13)
        assert_close(whole.pred_original_sample[i : i + 1], alone.pred_original_sample, rtol=1e-12, atol=1e-12)

    p, q = scheduler.p_mean_variance(output, t, x), scheduler.q_posterior(x.tanh(), x, t)
    noisy = scheduler.add_noise(x.tanh(), x, t)
    for i in range(4):
        one = slice(i, i + 1)
        for ours, alone in zip(p, scheduler.p_mean_variance(output[one], int(t[i]), x[one]), strict=True):
            assert_close(ours[one], alone, rtol=1e-12, atol=1e-12)
        for ours, alone in zip(q, scheduler.q_posterior(x[one].tanh(), x[one], int(t[i])), strict=True):
            assert_close(ours[one], alone, rtol=1e-12, atol=1e-13)
        assert_close(noisy[one], scheduler.add_noise(x[one].tanh(), x[one], int(t[i])), rtol=1e-12, atol=1e-13)


def test_a_list_of_generators_makes_images_independent_of_their_batch():
    model = network("epsilon", "fixed_large")

    def run(images: list[int]) -> Tensor:
        scheduler = DDPMExtScheduler(variance_type="fixed_large")
        scheduler.set_timesteps(10)
        generators, x = [torch.Generator().manual_seed(i) for i in images], X_T[images]
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x, generator=generators).prev_sample
        return x

    whole = run([0, 1, 2, 3])
    assert torch.equal(run([3, 1]), whole[[3, 1]])
    assert torch.equal(run([2]), whole[[2]])


def test_one_generator_for_all_advances_and_none_uses_torch():
    scheduler = DDPMExtScheduler()
    output = noise(1, (4, 3, 4, 4)).float()
    draws = [
        scheduler.step(output, 500, X_T, generator=torch.Generator().manual_seed(s)).prev_sample for s in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    torch.manual_seed(0)
    a = scheduler.step(output, 500, X_T).prev_sample
    torch.manual_seed(0)
    assert torch.equal(a, scheduler.step(output, 500, X_T).prev_sample)
    assert torch.equal(a, draws[0])  # Diffusers' convention: the same seed, the same noise


def test_dynamic_thresholding_by_sorting():
    options = {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 3.0}
    scheduler = DDPMExtScheduler(prediction_type="sample", **options)
    x = 4 * noise(0, (4, 3, 4, 4))
    expected = torch.from_numpy(oracles.dynamic_threshold(x.numpy(), 0.8, 3.0))
    assert_close(scheduler.step(x, 0, x).prev_sample, expected, rtol=1e-12, atol=1e-14)
    assert_close(scheduler.p_mean_variance(x, 700, x).pred_original_sample, expected, rtol=1e-12, atol=1e-14)
    assert_close(scheduler.step(x.half(), 0, x.half()).prev_sample.double(), expected, rtol=2e-3, atol=1e-3)


def test_zero_terminal_snr_starts_from_pure_noise():
    scheduler = DDPMExtScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(5)
    assert scheduler.timesteps[0] == 999 and scheduler.tables.alpha_bar[999] == 0
    v = noise(1, (4, 3, 4, 4))
    result = scheduler.step(v, 999, X_T.double(), generator=torch.Generator().manual_seed(0))
    assert torch.equal(result.pred_original_sample, (-v).clamp(-1, 1))  # √ᾱ x_t - √(1-ᾱ) v with ᾱ = 0
    p = scheduler.p_mean_variance(v, 999, X_T.double())
    s = int(scheduler.previous_timestep(999))
    assert_close(p.mean, scheduler.tables.alpha_bar[s].sqrt() * (-v).clamp(-1, 1))  # x_T says nothing: c2 = 0
    assert_close(p.var.flatten()[0], 1 - scheduler.tables.alpha_bar[s])


def test_standard_normal_data_keep_their_variance():
    """Exact case: x_0 ~ N(0, 1), ε̂ = √b̄ x; with fixed_large every x_s is standard normal again, at any K."""
    scheduler = DDPMExtScheduler(variance_type="fixed_large", clip_sample=False)
    scheduler.set_timesteps(5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1, 32, 32, generator=generator, dtype=torch.float64)
    for t in scheduler.timesteps[:-1]:
        x = scheduler.step(scheduler.tables.one_minus_alpha_bar[t].sqrt() * x, t, x, generator=generator).prev_sample
        assert abs(x.var().item() - 1) < 4 * (2 / x.numel()) ** 0.5  # four standard errors
    last = scheduler.timesteps[-1]
    x_0 = scheduler.step(scheduler.tables.one_minus_alpha_bar[last].sqrt() * x, last, x).prev_sample
    assert_close(x_0, scheduler.tables.alpha_bar[last].sqrt() * x)
