"""Bits per dimension against a literal transcription and against cases whose answer is known without a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from accelerate import Accelerator
from accelerator import device_at_hand
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from networks import tiny_unet
from torch import Tensor
from torch.testing import assert_close

from ddpm_ext.data.dataset import load_images
from ddpm_ext.diffusion.images import to_x_0
from ddpm_ext.diffusion.schedules import respaced_timesteps
from ddpm_ext.evaluation.bound.bits_per_dim import BitsPerDim, bits_per_dim, rate_distortion
from ddpm_ext.evaluation.bound.checks import grid_images
from ddpm_ext.evaluation.bound.sampled import PILOT_FLOOR, pilot_distribution, sampled_bound
from ddpm_ext.evaluation.bound.terms import BoundOptions, full_sweep, make_bound
from ddpm_ext.evaluation.features.extractors import make_extractor
from ddpm_ext.schedulers.ddpm import DDPMExtScheduler
from ddpm_ext.training.outputs.validation import Validation, ValidationOptions

SHORT = {"num_train_timesteps": 20, "beta_start": 1e-3, "beta_end": 0.6}
EVEN = {K: respaced_timesteps("even", 1000, K)[::-1] for K in (10, 50, 1000)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=seeded(seed), dtype=torch.uint8)


def float64_images(pixels: Tensor) -> Tensor:
    """On the grid exactly, so that a callable network is run in float64."""
    return pixels.double() / 127.5 - 1


def alpha_bar_of(scheduler: DDPMExtScheduler, x: Tensor, t: Tensor) -> Tensor:
    """ᾱ_t shaped beside x, in its precision: what an exact network knows of the schedule."""
    return torch.cumprod(1 - scheduler.tables.beta, 0)[t].to(x.dtype).reshape(-1, 1, 1, 1)


# Parity ---------------------------------------------------------------------------------------------------------------


def wavy(scheduler: DDPMExtScheduler, heads: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A nonlinear network of x and t with a prediction of the right size and, where asked, a variance head."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        phase = t.to(x.dtype).reshape(-1, 1, 1, 1)
        prediction = 0.7 * x + 0.2 * torch.sin(3 * x + phase)
        if heads == 1:
            return prediction
        head = torch.cos(2 * x - phase)
        log_var = head - 5 if scheduler.config.variance_type == "learned" else 1.2 * head
        return torch.cat([prediction, log_var], dim=1)

    return network


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "posterior_mean"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large_log", "learned", "learned_range"])
@pytest.mark.parametrize(
    ("kept", "decoder_variance", "cdf", "clip"),
    [(None, "base", "tanh", True), ([17, 9, 4, 2], "respaced", "exact", False), ([19, 6, 0], "base", "tanh", True)],
)
def test_the_record_equals_the_literal_formulas(
    prediction: str, variance: str, kept: list[int] | None, decoder_variance: str, cdf: str, clip: bool
) -> None:
    scheduler = DDPMExtScheduler(prediction_type=prediction, variance_type=variance, **SHORT)
    network = wavy(scheduler, 2 if variance.startswith("learned") else 1)
    x_0 = float64_images(pictures(2, 1, 2, 2))
    x_0[0, 0, 0] = torch.tensor([-1.0, 1.0])  # both tails
    options: dict[str, Any] = {"decoder_variance": decoder_variance, "cdf": cdf}

    ours = bits_per_dim(network, scheduler, x_0, timesteps=kept, generator=seeded(), clip_sample=clip, **options)
    times, source = kept or list(range(19, -1, -1)), seeded()
    noise = [torch.randn(x_0.shape, generator=source, dtype=torch.float64).numpy() for _ in times]
    beta = np.linspace(1e-3, 0.6, 20)

    def plain(x_t: np.ndarray, t: int) -> np.ndarray:
        return network(torch.from_numpy(x_t), torch.full((len(x_t),), t)).numpy()

    prior, steps, decoder = oracles.bound_in_bits(
        plain, beta, x_0.numpy(), times, noise, prediction=prediction, variance=variance, clip=clip, **options
    )
    tight = {"rtol": 1e-9, "atol": 1e-12}  # float64 on both sides; the literal β̃/σ² - 1 - log cancels a little
    assert_close(ours.prior, torch.from_numpy(prior), **tight)
    assert_close(ours.steps, torch.from_numpy(steps), **tight)
    assert_close(ours.decoder, torch.from_numpy(decoder), **tight)
    assert_close(ours.total, torch.from_numpy(prior + steps.sum(1) + decoder), **tight)
    assert ours.standard_error is None


@pytest.mark.parametrize("options", [{"timesteps": [5]}, {"num_inference_steps": 1}])
@pytest.mark.parametrize("decoder_variance", ["base", "respaced"])
def test_one_step_pays_prior_and_decoder_alone(options: dict[str, Any], decoder_variance: Any) -> None:
    """Without a second timestep both conventions of the decoder's variance take that of the full chain."""
    scheduler = DDPMExtScheduler(timestep_spacing="trailing", **SHORT)
    network, x_0 = wavy(scheduler, 1), float64_images(pictures(3, 1, 2, 2))
    bits = bits_per_dim(network, scheduler, x_0, generator=seeded(), decoder_variance=decoder_variance, **options)
    kept = options.get("timesteps", [19])
    noise = [torch.randn(x_0.shape, generator=seeded(), dtype=torch.float64).numpy()]

    def plain(x_t: np.ndarray, t: int) -> np.ndarray:
        return network(torch.from_numpy(x_t), torch.full((len(x_t),), t)).numpy()

    prior, _, decoder = oracles.bound_in_bits(plain, np.linspace(1e-3, 0.6, 20), x_0.numpy(), kept, noise)
    assert bits.steps is not None and bits.steps.shape == (3, 0)
    assert_close(bits.decoder, torch.from_numpy(decoder), rtol=1e-9, atol=1e-12)
    assert_close(bits.total, torch.from_numpy(prior + decoder), rtol=1e-9, atol=1e-12)
    rows = rate_distortion(network, scheduler, x_0, generator=seeded(), **options)
    assert rows.timesteps == kept and rows.label == [20 - kept[0]]
    assert rows.rate_bits_per_dim.item() == pytest.approx(prior.mean(), rel=1e-9)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "analytic"])
@pytest.mark.parametrize("kept", [None, [19, 11, 4, 0]])
def test_zero_terminal_snr_pays_no_prior_and_equals_the_literal_formulas(variance: str, kept: list[int] | None) -> None:
    """The chain begins at pure noise, whose x̂_0 = -v̂ is judged as any other."""
    options: dict[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", **SHORT}
    scheduler = DDPMExtScheduler(prediction_type="v_prediction", variance_type=variance, **options)
    network, x_0 = wavy(scheduler, 1), float64_images(pictures(2, 1, 2, 2))
    if variance == "analytic":  # with errors so small that σ² = β̃ but at the last step, where Cov = 1 and σ² = 1 = b
        scheduler.register_to_config(_ddpm_ext={"mse_eps": [0.0] * 20})
    ours = bits_per_dim(network, scheduler, x_0, timesteps=kept, generator=seeded())
    times, source = kept or list(range(19, -1, -1)), seeded()
    noise = [torch.randn(x_0.shape, generator=source, dtype=torch.float64).numpy() for _ in times]
    alpha_bar = np.array([float(a) for a in oracles.exact_zero_terminal_snr(np.linspace(1e-3, 0.6, 20).tolist())])
    beta = 1 - alpha_bar / np.append(1, alpha_bar[:-1])

    def literal(fixed: str) -> list[np.ndarray]:
        return list(
            oracles.bound_in_bits(
                lambda x_t, t: network(torch.from_numpy(x_t), torch.full((2,), t)).numpy(),
                beta,
                x_0.numpy(),
                times,
                noise,
                prediction="v_prediction",
                variance=fixed,
            )
        )

    prior, steps, decoder = literal("fixed_large" if variance == "fixed_large" else "fixed_small")
    if variance == "analytic":
        steps[:, 0] = literal("fixed_large")[1][:, 0]
    assert (ours.prior == 0).all() and (prior == 0).all()
    assert_close(ours.steps, torch.from_numpy(steps), rtol=1e-8, atol=1e-12)  # β of the literal side cancels a little
    assert_close(ours.total, torch.from_numpy(prior + steps.sum(1) + decoder), rtol=1e-8, atol=1e-12)


def test_a_class_conditional_network_is_told_each_images_class() -> None:
    """A network that knows each class's only image pays L_0 and L_T alone, in every batch and with sampled steps."""
    scheduler, levels = DDPMExtScheduler(), torch.tensor([-1.0, 2 * 128 / 255 - 1, 1.0], dtype=torch.float64)

    def network(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        bar = alpha_bar_of(scheduler, x, t)
        return (x - bar.sqrt() * levels[class_labels].reshape(-1, 1, 1, 1)) / (1 - bar).sqrt()

    classes = torch.tensor([1, 0, 2, 1, 2])
    images = levels[classes].reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    floor = torch.tensor([0.509908, 1.305665, 0.509908], dtype=torch.float64)[classes]  # grey, then the two ends; tanh
    options: dict[str, Any] = {"class_labels": classes, "timesteps": EVEN[50]}
    for batch_size in (None, 3):
        found = bits_per_dim(network, scheduler, images, batch_size=batch_size, generator=seeded(), **options)
        assert_close(found.decoder, floor, rtol=0, atol=1e-6)  # the printed digits
        assert_close(found.steps, torch.zeros(5, 49, dtype=torch.float64), rtol=0, atol=1e-9)
        sampled = bits_per_dim(
            network, scheduler, images, batch_size=batch_size, generator=seeded(), num_timesteps_sampled=4, **options
        )
        assert_close(sampled.total, found.total, rtol=0, atol=1e-6)
    wrong = bits_per_dim(network, scheduler, images, generator=seeded(), **{**options, "class_labels": classes.flip(0)})
    assert wrong.total.max() > 100
    rows = rate_distortion(network, scheduler, images, generator=seeded(), **options)
    assert rows.distortion_rmse.max() < 1e-6
    unet = UNet2DModel(
        sample_size=2,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4,),
        norm_num_groups=2,
        add_attention=False,
        num_class_embeds=3,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    for labels in (None, [0, 1], [0, 1, 2, 3, 0], torch.zeros(5)):
        with pytest.raises(ValueError, match=r"class_labels.*0\.\.2"):
            bits_per_dim(unet, scheduler, images, class_labels=labels)


# Exact cases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [10, 50, 1000])
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-6), (torch.float64, 1e-9)])
@pytest.mark.parametrize(("depth", "level"), [(8, 128), (12, 1000), (16, 50_000)])
def test_point_mass_pays_decoder_and_prior_alone(
    K: int, dtype: torch.dtype, rel: float, depth: int, level: int
) -> None:
    scheduler = DDPMExtScheduler()
    grey = 2 * level / (2**depth - 1) - 1

    def network(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == dtype
        bar = torch.cumprod(1 - scheduler.tables.beta, 0)[t].reshape(-1, 1, 1, 1)
        return ((x.double() - bar.sqrt() * grey) / (1 - bar).sqrt()).to(dtype)

    x_0 = torch.full((2, 1, 4, 4), level, dtype=torch.uint8 if depth == 8 else torch.int32)
    x_0 = torch.full_like(x_0, grey, dtype=torch.float64) if dtype == torch.float64 else x_0
    bits = bits_per_dim(network, scheduler, x_0, timesteps=EVEN[K], generator=seeded(), bits=depth)

    log_var = math.log(5.453187661302606e-05)
    decoder = -oracles.decoder_log_likelihood(level, grey, log_var, "tanh", depth) / math.log(2)
    bar = 4.035829765375687e-05
    prior = 0.5 * (bar * grey**2 - bar - math.log1p(-bar)) / math.log(2)
    if depth == 8:
        assert decoder == pytest.approx(1.305665, abs=5e-7)
    else:  # a bin so narrow that Φ is its density: log2 σ√(2π)/width
        width = 2 / (2**depth - 1)
        assert decoder == pytest.approx(math.log2(math.sqrt(2 * math.pi * math.exp(log_var)) / width), abs=2e-3)
    assert bits.steps is not None and bits.steps.abs().max() < 1e-9
    assert bits.total.tolist() == pytest.approx([decoder + prior] * 2, rel=rel)


@pytest.mark.parametrize("kept", [None, EVEN[10], [900, 400, 30, 2]])
@pytest.mark.parametrize("k", [0.0, 0.25])
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-6), (torch.float64, 1e-9)])
@pytest.mark.parametrize("depth", [8, 16])
def test_a_constant_predictor_pays_the_fall_of_the_snr(
    kept: list[int] | None, k: float, dtype: torch.dtype, rel: float, depth: int
) -> None:
    scheduler = DDPMExtScheduler(prediction_type="sample")
    x_0 = torch.tensor([-1.0, 1.0, 1.0, -1.0]).reshape(1, 1, 2, 2).to(dtype)
    bits = bits_per_dim(lambda x, t: torch.full_like(x, k), scheduler, x_0, timesteps=kept, bits=depth)

    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    snr = alpha_bar / (1 - alpha_bar)
    n_K, n_1 = (999, 0) if kept is None else (kept[0], kept[-1])
    expected = 0.5 * (snr[n_1] - snr[n_K]) * (1 + k**2) / math.log(2)
    if kept is None and k == 0:
        assert expected == pytest.approx(7212.753828, abs=5e-7)
    assert bits.steps is not None
    assert bits.steps.sum().item() == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize(("depth", "values"), [(8, [0, 90, 128, 255]), (16, [0, 23_000, 33_000, 65_535])])
def test_a_grey_level_mixture_is_its_quadrature_and_above_the_entropy(depth: int, values: list[int]) -> None:
    scheduler = DDPMExtScheduler(prediction_type="sample")
    levels = torch.tensor(values, dtype=torch.uint8 if depth == 8 else torch.int32)
    x_0 = to_x_0(levels, depth)
    balanced = torch.stack([levels.repeat(64)[torch.randperm(256, generator=seeded(i))] for i in range(16)])
    bits = bits_per_dim(
        lambda x, t: oracles.mixture_mean(x, alpha_bar_of(scheduler, x, t)[..., None], x_0.to(x)),
        scheduler,
        balanced.reshape(16, 1, 16, 16),
        generator=seeded(),
        bits=depth,
    )
    beta = np.linspace(1e-4, 0.02, 1000)
    expected = oracles.mixture_bound_in_bits(beta, x_0.double().numpy(), EVEN[1000], depth)
    noise = bits.total.std().item() / math.sqrt(16)  # every image holds the same levels: it differs by noise alone
    assert noise < 0.01
    assert bits.total.mean().item() == pytest.approx(expected, abs=4 * noise)
    assert expected > 2 and bits.total.mean() > 2  # four equally likely levels


def sigma_points(d: int) -> Tensor:
    """2d points whose mean of any quadratic function is its expectation under N(0, I_d): ±√d on every axis."""
    axes = math.sqrt(d) * torch.eye(d, dtype=torch.float64)
    return torch.cat([axes, -axes])


def expected_step(bound: Any, x_0: Tensor, t: int, eps: Tensor) -> float:
    times = torch.full((len(x_0),), t)
    return bound.terms(x_0, times, eps, decoder=False)[0].mean().item()


@pytest.mark.parametrize("kept", [EVEN[10], EVEN[50], [700, 300, 5]])
def test_terms_of_standard_normal_data_are_the_mutual_information(kept: list[int]) -> None:
    scheduler = DDPMExtScheduler(variance_type="fixed_large")
    points = sigma_points(2)  # (x_0, ε) of one pixel
    x_0, eps = points[:, 0].reshape(-1, 1, 1, 1), points[:, 1].reshape(-1, 1, 1, 1)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return (1 - alpha_bar_of(scheduler, x, t)).sqrt() * x

    bound = make_bound(network, scheduler, x_0, BoundOptions(timesteps=kept, clip_sample=False))
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    # The step is exact, so what it pays is I(x_s; x_0 | x_t) = ½ log(b̄_t / b̄_s).
    for t, s in pairwise(kept):
        expected = 0.5 * math.log((1 - alpha_bar[t]) / (1 - alpha_bar[s]))
        assert expected_step(bound, x_0, t, eps) == pytest.approx(expected, rel=1e-9)
    expected_prior = 0.5 * (-math.log(1 - alpha_bar[kept[0]]))  # E x_0² = 1
    assert bound.prior(x_0).mean().item() == pytest.approx(expected_prior, rel=1e-9)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_terms_of_gaussian_data_follow_from_the_posterior_covariance(variance: str) -> None:
    scheduler = DDPMExtScheduler(variance_type=variance)
    rng = np.random.default_rng(0)
    mean, factor = rng.normal(size=4) * 0.3, rng.normal(size=(4, 4)) * 0.5
    covariance = factor @ factor.T
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    points = sigma_points(8).numpy()  # four pixels of x_0, four of ε
    x_0 = torch.from_numpy(mean + points[:, :4] @ factor.T).reshape(-1, 1, 2, 2)
    eps = torch.from_numpy(points[:, 4:]).reshape(-1, 1, 2, 2)

    def gain(bar: float) -> np.ndarray:
        return math.sqrt(bar) * covariance @ np.linalg.inv(bar * covariance + (1 - bar) * np.eye(4))

    def network(x: Tensor, t: Tensor) -> Tensor:
        bar = alpha_bar[int(t[0])]
        flat = x.reshape(-1, 4).numpy()
        guess = mean + (flat - math.sqrt(bar) * mean) @ gain(bar).T
        return torch.from_numpy((flat - math.sqrt(bar) * guess) / math.sqrt(1 - bar)).reshape(x.shape)

    kept = [999, 600, 250, 80, 3]
    bound = make_bound(network, scheduler, x_0, BoundOptions(timesteps=kept, clip_sample=False))
    for t, s in pairwise(kept):
        a, bar_s, bar_t = alpha_bar[t] / alpha_bar[s], 1 - alpha_bar[s], 1 - alpha_bar[t]
        small = (1 - a) * bar_s / bar_t
        var = small if variance == "fixed_small" else 1 - a
        error = np.trace(covariance - gain(alpha_bar[t]) @ covariance * math.sqrt(alpha_bar[t])) / 4
        c1 = math.sqrt(alpha_bar[s]) * (1 - a) / bar_t
        expected = 0.5 * (small / var - 1 - math.log(small / var) + c1**2 / var * error)
        assert expected_step(bound, x_0, t, eps) == pytest.approx(expected, rel=1e-9)


# The sweep ------------------------------------------------------------------------------------------------------------


def equal(a: BitsPerDim, b: BitsPerDim) -> bool:
    """Whether two records hold the same numbers, and lack the same ones."""
    return all(y is None if x is None else y is not None and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("batch_size", [1, 5, 7, 60, 1000])
@pytest.mark.parametrize("n", [None, 10])
def test_the_batch_size_changes_nothing(batch_size: int, n: int | None) -> None:
    scheduler = DDPMExtScheduler(**SHORT)
    images, widest = pictures(3, 1, 4, 4), []

    def network(x: Tensor, t: Tensor) -> Tensor:
        widest.append(len(x))
        return wavy(scheduler, 1)(x, t)

    options: dict[str, Any] = {"num_timesteps_sampled": n}
    first = bits_per_dim(wavy(scheduler, 1), scheduler, images, generator=seeded(), **options)
    again = bits_per_dim(network, scheduler, images, generator=seeded(), batch_size=batch_size, **options)
    assert equal(first, again)
    assert max(widest) <= batch_size
    if batch_size == 60 and n is None:
        assert max(widest) == 57  # 19 jumps of 3 images in one call


def test_a_generator_per_image_makes_it_independent_of_its_batch() -> None:
    scheduler = DDPMExtScheduler(**SHORT)
    images = pictures(3, 1, 4, 4)
    network = wavy(scheduler, 1)
    together = bits_per_dim(network, scheduler, images, generator=[seeded(i) for i in range(3)])
    alone = bits_per_dim(network, scheduler, images[1:2], generator=[seeded(1)])
    assert torch.equal(together.total[1:2], alone.total)


def test_sampled_steps_of_an_image_depend_on_its_generator_and_on_p_alone() -> None:
    scheduler, network = DDPMExtScheduler(**SHORT), wavy(DDPMExtScheduler(**SHORT), 1)
    images = pictures(12, 1, 4, 4)

    def sampled(some: list[int], p: Tensor | None = None) -> Tensor:
        x_0 = images[some]
        bound = make_bound(network, scheduler, x_0)
        return sampled_bound(bound, grid_images(x_0), 5, [seeded(i) for i in some], p).total

    p = pilot_distribution(make_bound(network, scheduler, images), grid_images(images))
    together = sampled(list(range(12)), p)
    assert torch.equal(together, sampled(list(range(12))))  # the batch's own p
    assert torch.equal(together[3:5], sampled([3, 4], p))
    assert torch.equal(together[:1], sampled([0], p))
    assert not torch.equal(together[:1], sampled([0]))  # another p, as the docstring says
    # Pilot images are no other images: the same picture and seed give the same estimate at every place.
    twenty = images[:1].expand(20, -1, -1, -1)
    alike = bits_per_dim(network, scheduler, twenty, generator=[seeded(7) for _ in twenty], num_timesteps_sampled=5)
    assert torch.equal(alike.total, alike.total[:1].expand(20))


def test_a_small_evaluation_of_two_shares_is_that_of_the_whole(tmp_path: Path) -> None:
    unet, scheduler = tiny_unet().eval(), DDPMExtScheduler(**SHORT)
    train, test = (load_images("digits", split=split) for split in ("train", "test"))
    options = ValidationOptions(num_held_out=16, num_timesteps_sampled=8)
    small = Validation(train, test, make_extractor("pixels"), Accelerator(cpu=True), options, cache_dir=tmp_path)
    halves = torch.cat([small._bits(unet, scheduler, range(8)), small._bits(unet, scheduler, range(8, 16))])
    assert_close(small._bits(unet, scheduler, range(16)), halves, rtol=1e-4, atol=0)  # float32 sums of other batches


def test_rate_and_distortion_of_a_constant_predictor() -> None:
    scheduler = DDPMExtScheduler(prediction_type="sample")
    kept = [999, 500, 100, 0]
    images = torch.tensor([[0, 255, 255, 0], [255] * 4], dtype=torch.uint8).reshape(2, 1, 2, 2)
    rows = rate_distortion(lambda x, t: torch.full_like(x, 0.2), scheduler, images, timesteps=kept)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    snr, bar = alpha_bar / (1 - alpha_bar), alpha_bar[999]
    prior = 0.5 * (bar - bar - math.log1p(-bar))
    error = ((0.8**2 + 1.2**2) / 2 + 0.8**2) / 2  # the mean over the images stands under the root
    rates = [(prior + 0.5 * (snr[t] - snr[999]) * error) / math.log(2) for t in kept]
    assert rows.label == [1, 500, 900, 1000]
    assert rows.timesteps == kept
    assert_close(rows.rate_bits_per_dim, torch.tensor(rates, dtype=torch.float64), rtol=1e-6, atol=0)
    rmse = torch.full((4,), 127.5 * math.sqrt(error), dtype=torch.float64)
    assert_close(rows.distortion_rmse, rmse, rtol=1e-6, atol=0)


# The estimate from some of the steps ----------------------------------------------------------------------------------


def gaussian_network(scheduler: DDPMExtScheduler, train: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The best linear ε-network of some images: exact if they were Gaussian with their mean and covariance."""
    flat = train.flatten(1).double()
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    values = values.clamp(min=1e-6)
    alpha_bar = torch.cumprod(1 - scheduler.tables.beta, 0)

    def network(x: Tensor, t: Tensor) -> Tensor:
        bar = alpha_bar[t][:, None]
        centred = x.flatten(1).double() - bar.sqrt() * mean
        gain = (1 - bar).sqrt() / (bar * values + (1 - bar))  # ε̂ = √b̄ (ᾱC + b̄I)⁻¹ (x - √ᾱ m)
        return ((centred @ vectors * gain) @ vectors.T).reshape(x.shape).to(x.dtype)

    return network


def test_fifty_of_a_thousand_steps_are_unbiased_and_their_error_is_stated() -> None:
    scheduler = DDPMExtScheduler(prediction_type="epsilon")
    train = load_images("digits", split="train").batch(range(1500)).pixels
    images = load_images("digits", split="test").batch(range(256)).pixels
    network = gaussian_network(scheduler, to_x_0(train))
    repetitions = 12
    estimates = [
        bits_per_dim(network, scheduler, images, num_timesteps_sampled=50, generator=seeded(i))
        for i in range(repetitions)
    ]
    means = torch.stack([estimate.total.mean() for estimate in estimates])
    errors = torch.stack([estimate.standard_error for estimate in estimates])  # pyright: ignore
    exact = bits_per_dim(network, scheduler, images, generator=seeded(99))
    exact_error = errors.mean() * 0.5  # one noise for each of 1000 steps: far less than of 50
    assert all(estimate.steps is None for estimate in estimates)
    assert errors.square().mean().sqrt() < 0.01  # what 140 repetitions measured: 0.0095
    assert means.std() < 0.01 * 1.2  # 12 repetitions know a spread to 20%
    assert 0.5 < (means.std() / errors.mean()) < 1.5  # 12 repetitions know a spread to 20%
    z = (means.mean() - exact.total.mean()) / (errors.mean() ** 2 / repetitions + exact_error**2).sqrt()
    assert abs(z) < 3
    assert_close(estimates[0].prior, exact.prior)


def test_the_estimate_of_terms_without_noise_is_exact_where_p_follows_them() -> None:
    # x̂_0 = 0 and images ±1 make every L_{t-1} the same for all noises and images: with p ∝ L but for the uniform
    # share, every draw is the sum to within that share.
    scheduler = DDPMExtScheduler(prediction_type="sample")
    images = torch.tensor([0, 255, 255, 0], dtype=torch.uint8).reshape(1, 1, 2, 2).repeat(8, 1, 1, 1)
    exact, bits = (
        bits_per_dim(lambda x, t: 0 * x, scheduler, images, num_timesteps_sampled=n, generator=seeded())
        for n in (None, 20)
    )
    assert bits.total.tolist() == pytest.approx(exact.total.tolist(), rel=2 * PILOT_FLOOR)
    assert bits.standard_error is not None and bits.standard_error < PILOT_FLOOR * exact.total.mean()


def test_what_the_pilot_images_do_not_pay_is_still_counted() -> None:
    scheduler = DDPMExtScheduler(prediction_type="sample", **SHORT)
    images = torch.zeros((20, 1, 2, 2), dtype=torch.uint8)
    images[1] = 255  # not among the pilot's images, which x̂_0 = -1 fits exactly
    bound = make_bound(lambda x, t: torch.full_like(x, -1), scheduler, images)
    x_0 = grid_images(images)
    exact = full_sweep(bound, x_0).bits_per_dim.total[1]
    draws = torch.stack([sampled_bound(bound, x_0, 5, seeded(i)).total[1] for i in range(200)])
    assert abs(draws.mean() - exact) < 4 * draws.std() / math.sqrt(200)


def test_the_pilot_images_are_asked_about_as_their_own_classes() -> None:
    """Eight of sixteen images, spread over the batch: p_t is that of a batch of these alone."""
    scheduler, labels = DDPMExtScheduler(prediction_type="sample", **SHORT), torch.arange(16) % 5
    images = (labels * 50).to(torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)

    def network(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:  # another error for each class and step
        return x.new_zeros(x.shape) + ((class_labels * (t + 1)) % 7 / 7 - 0.5).to(x).reshape(-1, 1, 1, 1)

    spread = [0, 2, 4, 6, 9, 11, 13, 15]  # linspace(0, 15, 8), rounded
    p, alone = (
        pilot_distribution(make_bound(network, scheduler, some, class_labels=of), grid_images(some))
        for some, of in ((images, labels), (images[spread], labels[spread]))
    )
    assert_close(p, alone, rtol=1e-12, atol=0)


def test_no_jump_is_impossible_because_the_pilot_pays_nothing_there() -> None:
    scheduler = DDPMExtScheduler(prediction_type="sample", **SHORT)
    images = torch.zeros((4, 1, 2, 2), dtype=torch.uint8)
    bound = make_bound(lambda x, t: -1 + 0.5 * (t == 7).to(x).reshape(-1, 1, 1, 1).expand_as(x), scheduler, images)
    p = pilot_distribution(bound, grid_images(images))
    assert p.sum().item() == pytest.approx(1, rel=1e-12)
    assert p.argmax() == 19 - 7
    assert p.min().item() == pytest.approx(PILOT_FLOOR / 19, rel=1e-9)


def test_the_stated_error_counts_the_decoders_noise() -> None:
    scheduler = DDPMExtScheduler(prediction_type="sample", **SHORT)
    images = torch.full((8, 1, 2, 2), 128, dtype=torch.uint8)

    def network(x: Tensor, t: Tensor) -> Tensor:  # exact but at the last step, where x̂_0 is off by up to 0.03
        wrong = 0.03 * torch.sin(1e3 * x) * (t == 0).to(x).reshape(-1, 1, 1, 1)
        return 2 * 128 / 255 - 1 + wrong

    estimates = [
        bits_per_dim(network, scheduler, images, num_timesteps_sampled=10, generator=seeded(i)) for i in range(200)
    ]
    spread = torch.stack([estimate.total.mean() for estimate in estimates]).std()
    stated = torch.stack([estimate.standard_error for estimate in estimates]).square().mean().sqrt()  # pyright: ignore
    assert spread > 0
    assert spread.item() == pytest.approx(stated.item(), rel=0.2)  # 200 repetitions know a spread to 5%


# Networks, schedulers, input ------------------------------------------------------------------------------------------


def test_a_unet_in_training_mode_is_evaluated_without_dropout_and_given_back_as_it_was() -> None:
    unet, images = tiny_unet(dropout=0.5), pictures(2, 1, 8, 8)
    scheduler = DDPMExtScheduler(**SHORT)
    evaluated = bits_per_dim(unet.eval(), scheduler, images, generator=seeded(), num_inference_steps=5)
    in_training = bits_per_dim(unet.train(), scheduler, images, generator=seeded(), num_inference_steps=5)
    assert equal(evaluated, in_training)
    assert unet.training
    assert not evaluated.total.requires_grad


def test_the_record_is_the_same_for_tensor_and_sample_and_float64_weights_run_in_float64() -> None:
    unet, images = tiny_unet().eval(), pictures(2, 1, 8, 8)
    scheduler = DDPMExtScheduler(**SHORT)
    wrapped = bits_per_dim(unet, scheduler, images, generator=seeded())
    plain = bits_per_dim(lambda x, t: SimpleNamespace(sample=unet(x, t)[0]), scheduler, images, generator=seeded())
    assert equal(wrapped, plain)
    assert wrapped.total.dtype == torch.float64
    asked: list[torch.dtype] = []
    unet.double().register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].dtype))
    # Images that are float64 already: both networks see the same noise, the one rounded to float32.
    noise = [torch.randn(images.shape, generator=seeded(), dtype=torch.float64).numpy() for _ in range(1)]
    double = bits_per_dim(unet, scheduler, float64_images(images), generator=seeded(), timesteps=[7])
    assert set(asked) == {torch.float64}
    with torch.no_grad():
        prior, _, decoder = oracles.bound_in_bits(
            lambda x, t: unet(torch.from_numpy(x), t).sample.numpy(),
            np.linspace(1e-3, 0.6, 20),
            float64_images(images).numpy(),
            [7],
            noise,
        )
    assert_close(double.total, torch.from_numpy(prior + decoder), rtol=1e-9, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [None, 10])
def test_on_an_accelerator_the_bound_is_that_of_the_cpu(n: int | None) -> None:
    unet, images, scheduler = (
        tiny_unet().eval(),
        pictures(3, 1, 8, 8),
        DDPMExtScheduler(**SHORT),
    )
    here = bits_per_dim(unet, scheduler, images, generator=seeded(), num_timesteps_sampled=n)
    there = bits_per_dim(unet.to(device_at_hand()), scheduler, images, generator=seeded(), num_timesteps_sampled=n)
    assert_close(there.total.cpu(), here.total, rtol=1e-3, atol=0)  # the network's float32 sums


def test_the_scheduler_is_left_as_it_is_and_stock_ones_are_taken() -> None:
    scheduler = DDPMExtScheduler(clip_sample=False, thresholding=True, sample_max_value=3.0, **SHORT)
    scheduler.set_timesteps(4)
    before, config = scheduler.timesteps.tolist(), dict(scheduler.config)
    images, network = pictures(2, 1, 4, 4), wavy(scheduler, 1)
    ours = bits_per_dim(network, scheduler, images, num_inference_steps=5, generator=seeded())
    assert scheduler.timesteps.tolist() == before
    assert dict(scheduler.config) == config
    assert ours.steps is not None and ours.steps.shape == (2, 4)
    for stock in (DDPMScheduler(**SHORT), DDIMScheduler(**SHORT), DDPMScheduler(20, 1e-3, 0.6)):
        assert equal(ours, bits_per_dim(network, stock, images, num_inference_steps=5, generator=seeded()))


def test_clipping_is_the_callers_choice() -> None:
    scheduler = DDPMExtScheduler(clip_sample=False, **SHORT)
    images = pictures(2, 1, 4, 4)
    clipped, free = (
        bits_per_dim(wavy(scheduler, 1), scheduler, images, generator=seeded(), clip_sample=clip)
        for clip in (True, False)
    )
    assert clipped.total.mean() < free.total.mean()  # x̂_0 far outside [-1, 1] at large t


def test_uint8_and_grid_floats_are_the_same_images() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    expected = pixels.double() / 127.5 - 1
    for images in (pixels, to_x_0(pixels), expected):
        assert torch.equal(grid_images(images), expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 8, 8), r"shape \(B, C, H, W\)"),
        (torch.zeros(0, 1, 8, 8), "not be empty"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.int64), "uint8 pixels or floats"),
        (torch.full((1, 1, 8, 8), math.nan), "finite"),
        (torch.full((1, 1, 8, 8), 1.01), r"lie in \[-1, 1\], got values from 1.01"),
        (torch.full((1, 1, 8, 8), 255.0), r"lie in \[-1, 1\]"),
        (torch.full((1, 1, 8, 8), 0.0), "0.500 grey levels beside it"),
        (torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8), "8-bit grid"),
    ],
)
def test_images_off_the_grid_are_refused(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bits_per_dim(lambda x, t: x, DDPMExtScheduler(**SHORT), images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_variance": "bass"}, "decoder_variance must be one of 'base', 'respaced', got 'bass'"),
        ({"cdf": "erf"}, "cdf must be one of 'tanh', 'exact', got 'erf'"),
        ({"batch_size": 0}, "batch_size must be an int of at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be an int of at least 1, got 2.5"),
        ({"generator": [seeded()]}, "a list of one per image, 2 here, got a list of 1"),
        ({"generator": [seeded()] * 3}, "a list of one per image, 2 here, got a list of 3"),
        ({"generator": []}, "a list of one per image, 2 here, got a list of 0"),
        ({"generator": [0, 1]}, "a list of one per image, 2 here"),
        ({"generator": [seeded()], "num_timesteps_sampled": 3}, "2 here, got a list of 1"),
        ({"generator": [seeded()] * 3, "num_timesteps_sampled": 3}, "2 here, got a list of 3"),
        ({"num_inference_steps": 21}, "num_inference_steps must be an int"),
        ({"timesteps": [3, 9]}, "strictly descending"),
        ({"num_timesteps_sampled": 1}, "num_timesteps_sampled must be an int from 2 to 19"),
        ({"num_timesteps_sampled": 20}, "from 2 to 19"),
        ({"num_timesteps_sampled": 2.5}, "got 2.5"),
        ({"num_timesteps_sampled": 2, "timesteps": [5]}, "A chain of 1 steps has no two jumps"),
        ({"num_timesteps_sampled": 2, "num_inference_steps": 2}, "A chain of 2 steps has no two jumps"),
    ],
)
def test_bad_options_are_sentences(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bits_per_dim(lambda x, t: x, DDPMExtScheduler(**SHORT), pictures(2, 1, 4, 4), **options)


def test_a_network_that_does_not_fit_or_diverged_is_named() -> None:
    scheduler, images = DDPMExtScheduler(**SHORT), pictures(2, 1, 4, 4)
    with pytest.raises(ValueError, match="model_output must have shape"):
        bits_per_dim(lambda x, t: torch.cat([x, x], 1), scheduler, images)
    with pytest.raises(ValueError, match=r"not finite at timestep 7 \(2 of"):
        bits_per_dim(lambda x, t: x / (t != 7).reshape(-1, 1, 1, 1), scheduler, images, clip_sample=False)
    with pytest.raises(ValueError, match=r"must return a tensor or an object with \.sample, got tuple"):
        bits_per_dim(lambda x, t: (x,), scheduler, images)
    for model in (None, DDPMPipeline(tiny_unet(), DDPMScheduler(**SHORT))):
        with pytest.raises(ValueError, match=rf"got {type(model).__name__}. Of a pipeline, pass its unet"):
            bits_per_dim(model, scheduler, images)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("call", [bits_per_dim, rate_distortion])
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 8, 8, 1), (2, 1, 7, 7), (2, 1, 16, 16), (2, 1, 8, 4)])
def test_images_that_are_not_the_networks_are_refused(call: Callable[..., Any], shape: tuple[int, ...]) -> None:
    """A convolutional network takes another size without a word, and its bits/dim would be of nothing it has seen."""
    with pytest.raises(ValueError, match=r"the network's 1 channels and size 8 x 8, got shape \(2, "):
        call(tiny_unet(), DDPMExtScheduler(**SHORT), pictures(*shape))


def test_a_network_that_names_no_size_takes_those_it_can_halve() -> None:
    unet, scheduler = tiny_unet(), DDPMExtScheduler(**SHORT)
    unet.register_to_config(sample_size=None)
    images, kept, source = pictures(2, 1, 8, 4), [12, 6, 0], seeded()
    wide = bits_per_dim(unet, scheduler, images, timesteps=kept, generator=seeded())
    noise = [torch.randn(images.shape, generator=source).double().numpy() for _ in kept]

    def plain(x_t: np.ndarray, t: int) -> np.ndarray:
        with torch.no_grad():
            return unet(torch.from_numpy(x_t).float(), t).sample.double().numpy()

    beta = np.linspace(1e-3, 0.6, 20)
    prior, steps, decoder = oracles.bound_in_bits(plain, beta, float64_images(images).numpy(), kept, noise)
    expected = torch.from_numpy(prior + steps.sum(1) + decoder)
    assert_close(wide.total, expected, rtol=1e-4, atol=0)  # the network's float32
    with pytest.raises(ValueError, match="must be multiples of 2"):
        bits_per_dim(unet, scheduler, pictures(2, 1, 7, 7), num_inference_steps=3)


@pytest.mark.parametrize("scheduler", [None, FlowMatchEulerDiscreteScheduler(), EDMEulerScheduler()])
def test_a_scheduler_without_betas_is_refused(scheduler: Any) -> None:
    with pytest.raises(ValueError, match=rf"with a beta schedule.*got {type(scheduler).__name__}"):
        bits_per_dim(lambda x, t: x, scheduler, pictures(2, 1, 4, 4))


def test_numpy_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images must be a torch\.Tensor, got ndarray\. See torch\.from_numpy"):
        bits_per_dim(lambda x, t: x, DDPMExtScheduler(**SHORT), pictures(2, 1, 4, 4).numpy())  # pyright: ignore
