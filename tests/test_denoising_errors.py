"""Measured errors against networks whose errors are known, and the variances and chains that follow from one sweep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ddpm_ext.diffusion.analytic import optimal_trajectory
from ddpm_ext.diffusion.schedules import make_tables, respaced_timesteps
from ddpm_ext.diffusion.words import PredictionType
from ddpm_ext.evaluation.bound.bits_per_dim import BitsPerDim, bits_per_dim
from ddpm_ext.evaluation.bound.denoising_errors import denoising_errors, drop_variance_head, mean_error
from ddpm_ext.evaluation.bound.sets import SetBound, is_fixed, under_fixed_variance
from ddpm_ext.evaluation.bound.terms import BoundOptions, full_sweep, make_bound
from ddpm_ext.models.unet import build_unet
from ddpm_ext.schedulers.ddpm import DDPMExtScheduler

TABLES = make_tables()
SHORT = make_tables("squaredcos_cap_v2", 20)
GREY = 2 * 128 / 255 - 1


def column(values: Tensor, t: Tensor) -> Tensor:
    return values[t].view(-1, 1, 1, 1)


def seeded(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def chain(variance_type: str = "fixed_small", extension: dict[str, Any] | None = None, **more: Any) -> DDPMExtScheduler:
    made = DDPMExtScheduler(variance_type=variance_type, **more)
    if extension is not None:
        made.register_to_config(_ddpm_ext=extension)
    return made


def wrong_by(distance: float, prediction_type: PredictionType) -> Callable[[Tensor, Tensor], Tensor]:
    """The perfect network for images of one grey level, its output shifted by a constant."""

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        signal, spread = column(SHORT.alpha_bar.sqrt(), t), column(SHORT.one_minus_alpha_bar.sqrt(), t)
        eps = (x_t - signal * GREY) / spread
        right = {"epsilon": eps, "sample": torch.full_like(x_t, GREY), "v_prediction": signal * eps - spread * GREY}
        before = torch.cat([torch.ones(1, dtype=torch.float64), SHORT.alpha_bar[:-1]])  # ᾱ_{t-1}; DDPM Eq. (7)
        c1 = before.sqrt() * SHORT.beta / (1 - SHORT.alpha_bar)
        c2 = SHORT.alpha.sqrt() * (1 - before) / (1 - SHORT.alpha_bar)
        right["posterior_mean"] = column(c1, t) * GREY + column(c2, t) * x_t
        return right[prediction_type] + distance

    return model


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "posterior_mean"])
@pytest.mark.parametrize("batch_size", [3, 1024])
def test_a_known_error_is_measured_as_that_of_eps_whatever_is_predicted(
    prediction_type: PredictionType, batch_size: int
) -> None:
    images = torch.full((2, 1, 4, 4), GREY, dtype=torch.float64)
    scheduler = chain(num_train_timesteps=20, beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type)
    bound = make_bound(
        wrong_by(0.1, prediction_type), scheduler, images, BoundOptions(clip_sample=False, batch_size=batch_size)
    )
    found = denoising_errors(bound, images, seeded(2))
    snr = SHORT.alpha_bar / SHORT.one_minus_alpha_bar
    # How much ε̂ moves with the output: 1, -√SNR, √ᾱ, and -√SNR / c1 = -√(α_t (1-ᾱ_t)) / β_t.
    slope = {
        "epsilon": torch.ones_like(snr),
        "sample": -snr.sqrt(),
        "v_prediction": SHORT.alpha_bar.sqrt(),
        "posterior_mean": -(SHORT.alpha * SHORT.one_minus_alpha_bar).sqrt() / SHORT.beta,
    }[prediction_type]
    expected = (0.1 * slope) ** 2
    assert_close(found.mse_eps, expected.expand(2, -1), rtol=1e-6, atol=0)
    # What is drawn first belongs to the last step: ε̂ there is that noise and the shift.
    drawn = torch.cat([torch.randn(1, 1, 4, 4, generator=g, dtype=torch.float64) for g in seeded(2)])
    assert_close(found.ms_eps[:, -1], (drawn + 0.1 * slope[-1]).square().mean((1, 2, 3)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [1, 3])
def test_generators_are_one_per_image(count: int) -> None:
    images = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    bound = make_bound(lambda x, t: x, chain(num_train_timesteps=20, beta_schedule="squaredcos_cap_v2"), images)
    with pytest.raises(ValueError, match=rf"one per image, 2 here, got a list of {count}"):
        denoising_errors(bound, images, seeded(count))


def test_standard_normal_data_give_alpha_bar() -> None:
    """ε̂ = √(1-ᾱ) x_t is perfect for N(0, I): mse_eps = ᾱ, ms_eps = 1 - ᾱ."""
    x_0 = torch.randn(40, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    scheduler = chain(num_train_timesteps=20, beta_schedule="squaredcos_cap_v2")
    bound = make_bound(
        lambda x, t: column(SHORT.one_minus_alpha_bar.sqrt(), t) * x, scheduler, x_0, BoundOptions(clip_sample=False)
    )
    found = denoising_errors(bound, x_0, torch.Generator().manual_seed(0))
    for errors, expected in ((found.mse_eps, SHORT.alpha_bar), (found.ms_eps, SHORT.one_minus_alpha_bar)):
        mean = mean_error(errors)
        assert ((mean.mean - expected).abs() <= 4.5 * mean.standard_error + 1e-9).all()  # 40 values
        scale = expected * (2 / (40 * 64)) ** 0.5  # of a mean of squared normals
        assert_close(mean.standard_error, scale, rtol=0.5, atol=1e-12)


def test_standard_error_is_that_of_the_mean() -> None:
    of_images = torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 2.0]], dtype=torch.float64)
    found = mean_error(of_images)
    assert_close(found.mean, torch.tensor([3.0, 2.0], dtype=torch.float64))
    assert_close(found.standard_error, torch.tensor([2.0 / 3**0.5, 0.0], dtype=torch.float64))
    assert mean_error(of_images[:1]).standard_error.tolist() == [0.0, 0.0]


# One sweep, every chain -----------------------------------------------------------------------------------------------


def sweep(model: Any, images: Tensor, **options: Any) -> SetBound:
    bound = make_bound(model, chain(**options), images)
    found = full_sweep(bound, images, seeded(len(images)))
    return SetBound(found.bits_per_dim, found)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "analytic"])
@pytest.mark.parametrize("K", [2, 10, 1000])
def test_one_sweep_gives_the_bound_of_other_chains_and_variances(variance_type: str, K: int) -> None:
    """A network that answers with t alone errs alike under any noise, so both ways to the bound must agree."""
    images = 2.0 * torch.randint(2, (3, 1, 4, 4), generator=torch.Generator().manual_seed(0)).double() - 1
    errors = {"mse_eps": (1 - TABLES.one_minus_alpha_bar).tolist()}
    model, options = (lambda x, t: t.view(-1, 1, 1, 1) / 1500 + 0 * x), {"prediction_type": "sample"}
    scheduler = chain(variance_type, errors, **options)
    times = respaced_timesteps("even", 1000, K)[::-1]
    got = under_fixed_variance(sweep(model, images, **options), scheduler, times)
    expected = bits_per_dim(model, scheduler, images, timesteps=times)
    for name in BitsPerDim._fields[:-1]:
        assert_close(getattr(got.bits_per_dim, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
    assert got.sweep is not None and got.sweep.timesteps == times


def test_a_chain_that_leaves_out_an_end_is_refused() -> None:
    images = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    found = sweep(lambda x, t: torch.zeros_like(x), images, prediction_type="sample")
    with pytest.raises(ValueError, match=r"from 999 to 0 as the sweep does, got 980\.\.0"):
        under_fixed_variance(found, chain(), [980, 0])


def test_black_and_white_pixels_are_best_with_the_analytic_variance_at_every_K() -> None:
    """Pixels ±1: x̂_0 = tanh(√ᾱ x_t / (1-ᾱ)) is perfect; judged under the noise with which errors are measured."""

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(column(TABLES.alpha_bar.sqrt() / TABLES.one_minus_alpha_bar, t) * x_t)

    pixels = 2.0 * torch.randint(2, (8, 1, 6, 6), generator=torch.Generator().manual_seed(0)).double() - 1
    bound = make_bound(model, chain(prediction_type="sample"), pixels, BoundOptions(clip_sample=False))
    mse_eps = denoising_errors(bound, pixels, seeded(8)).mse_eps.mean(0)
    found = sweep(model, pixels, prediction_type="sample")
    for K in (5, 10, 25, 50, 100, 1000):  # at K = 2 fixed_large agrees to 7 digits
        bits = {}
        for variance_type in ("fixed_small", "fixed_large", "analytic"):
            scheduler = chain(variance_type, {"mse_eps": mse_eps.tolist()}, prediction_type="sample")
            for name, times in (
                ("even", respaced_timesteps("even", 1000, K)),
                ("optimal", optimal_trajectory(TABLES, mse_eps, K)),
            ):
                total = under_fixed_variance(found, scheduler, times[::-1]).bits_per_dim.total
                bits[variance_type, name] = total.mean().item()
        assert bits["analytic", "even"] < min(bits["fixed_small", "even"], bits["fixed_large", "even"])
        assert bits["analytic", "optimal"] <= min(bits.values())
        assert bits["analytic", "optimal"] < bits["analytic", "even"] or K == 1000  # one path only


def test_chains_that_depend_on_the_variance_are_swept_anew() -> None:
    assert is_fixed(chain("fixed_large"))
    assert is_fixed(chain("fixed_large_log", {"trajectory": "even"}))
    assert not is_fixed(chain("fixed_large", {"trajectory": "optimal", "mse_eps": [0.5] * 1000}))
    assert not is_fixed(chain("analytic", {"mse_eps": [0.5] * 1000}))


def test_a_network_without_its_variance_head_predicts_the_same() -> None:
    unet = build_unet("digits", out_channels=2).eval()
    torch.nn.init.normal_(unet.conv_out.weight)
    torch.nn.init.normal_(unet.conv_out.bias)
    slim = drop_variance_head(unet)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        assert_close(slim(x, t).sample, unet(x, t).sample[:, :1], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="there is none to drop"):
        drop_variance_head(slim)
