"""The scheduler with measured errors: analytic variance, optimal trajectories, the DDIM family, their disk form."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ddpm_ext import DDPMExtScheduler
from ddpm_ext.diffusion.analytic import optimal_trajectory, sampling_cap
from ddpm_ext.diffusion.schedules import make_tables, respaced_timesteps

TABLES = make_tables()
GEN = torch.Generator


def isotropic_errors(variance: float) -> list[float]:
    signal = TABLES.alpha_bar * variance
    return (signal / (signal + TABLES.one_minus_alpha_bar)).tolist()


def scheduler(extension: dict | None = None, **options) -> DDPMExtScheduler:
    built = DDPMExtScheduler(**options)
    if extension is not None:
        built.register_to_config(_ddpm_ext=extension)
    return built


def gaussian_eps(x_t: torch.Tensor, i: int, variance: float) -> torch.Tensor:
    """The perfect network for N(0, variance·I)."""
    alpha_bar = TABLES.alpha_bar[i]
    return x_t * TABLES.one_minus_alpha_bar[i].sqrt() / (alpha_bar * variance + 1 - alpha_bar)


@pytest.mark.parametrize("K", [2, 5, 40])
@pytest.mark.parametrize("trajectory", ["even", "optimal"])
def test_isotropic_gaussian_keeps_its_variance_at_any_number_of_steps(K: int, trajectory: str):
    """Ancestral sampling with σ*² is exact, so the variance carried by recursion ends on the marginal's."""
    variance = 0.3
    chain = scheduler({"mse_eps": isotropic_errors(variance)}, variance_type="analytic", clip_sample=False)
    chain.set_timesteps(K, trajectory=trajectory)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    carried = TABLES.alpha_bar[-1].item() * variance + TABLES.one_minus_alpha_bar[-1].item()
    for i in chain.timesteps.tolist()[:-1]:
        step = chain.p_mean_variance(gaussian_eps(one, i, variance), i, one)  # mean is linear in x_t: its slope
        carried = step.mean.item() ** 2 * carried + step.var.item()
    first = int(chain.timesteps[-1])
    expected = TABLES.alpha_bar[first].item() * variance + TABLES.one_minus_alpha_bar[first].item()
    assert math.isclose(carried, expected, rel_tol=1e-9)


def zero_terminal(extension: dict) -> DDPMExtScheduler:
    """A schedule whose last step is noise alone, visited by every chain."""
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return scheduler(extension, variance_type="analytic", clip_sample=False, **options)


@pytest.mark.parametrize("trajectory", [None, "even", "optimal"])
def test_zero_terminal_snr_samples_standard_normal_data_exactly(trajectory: Any):
    """v̂ = 0 is the perfect network of N(0, I), mse_eps its ᾱ: every x_s must have variance 1, beginning at x_T."""
    errors = make_tables(zero_terminal_snr=True).alpha_bar.tolist()
    assert errors[-1] == 0
    chain = zero_terminal({"mse_eps": errors})
    chain.set_timesteps(8, trajectory=trajectory)
    assert chain.timesteps[0] == 999
    one, carried = torch.ones(1, 1, 1, 1, dtype=torch.float64), 1.0
    for i in chain.timesteps.tolist()[:-1]:
        step = chain.p_mean_variance(0 * one, i, one)  # mean is linear in x_t: its slope
        carried = step.mean.item() ** 2 * carried + step.var.item()
        assert math.isclose(carried, 1, rel_tol=1e-9)


@pytest.mark.parametrize("eta", [1.0, 0.5, 0.0])
def test_zero_terminal_snr_is_sampled_without_a_nan(eta: float):
    chain = zero_terminal({"mse_eps": make_tables(zero_terminal_snr=True).alpha_bar.tolist(), "eta": eta})
    chain.set_timesteps(20)
    generator = GEN().manual_seed(0)
    x = torch.randn(4, 1, 32, 32, generator=generator)
    for i in chain.timesteps.tolist():
        x = chain.step(torch.zeros_like(x), i, x, generator=generator).prev_sample
        assert 0.8 < x.var() < 1.2  # 4096 numbers know a variance to 2%; the capped and the last step take a little


@pytest.mark.parametrize(("eta", "grey_levels"), [(1.0, 2), (0.0, 1)])
def test_sampling_caps_only_the_jump_to_the_first_kept_time(eta: float, grey_levels: int):
    """σ*² of Analytic-DPM's Eq. (8), at most that of 2 grey levels for DDPM and of 1 for DDIM (its Appendix F)."""
    errors = isotropic_errors(0.3)
    chain = scheduler({"mse_eps": errors, "eta": eta}, variance_type="analytic", clip_sample=False)
    chain.set_timesteps(timesteps=[999, 500, 100, 0])
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for t, s in ((999, 500), (500, 100), (100, 0)):
        bar_t, bar_s = TABLES.alpha_bar[t].item(), TABLES.alpha_bar[s].item()
        own = eta**2 * (1 - bar_t / bar_s) * (1 - bar_s) / (1 - bar_t)  # λ²
        weight = math.sqrt(bar_s) - math.sqrt((1 - bar_s - own) * bar_t / (1 - bar_t))
        var = own + weight**2 * min(1.0, (1 - bar_t) / bar_t * errors[t])
        sampled = chain.step(x, t, x, generator=GEN().manual_seed(0)).prev_sample.item()
        z = torch.randn(1, generator=GEN().manual_seed(0), dtype=torch.float64).item()
        cap = sampling_cap(grey_levels) if s == 0 else math.inf
        assert s > 0 or var > cap
        assert math.isclose(sampled, math.sqrt(min(var, cap)) * z, rel_tol=1e-9)
        if eta == 1:  # the bound knows no cap
            assert math.isclose(chain.p_mean_variance(x, t, x).var.item(), var, rel_tol=1e-9)


def test_optimal_trajectory_serves_fixed_variances_too_and_stored_ones_are_used():
    errors = (1 - torch.linspace(0, 1, 1000, dtype=torch.float64) ** 0.2).tolist()
    for variance_type, cost in (
        ("fixed_large", "fixed_large"),
        ("fixed_small_log", "fixed_small"),
        ("analytic", "analytic"),
    ):
        chain = scheduler({"mse_eps": errors}, variance_type=variance_type)
        chain.set_timesteps(7, trajectory="optimal")
        assert chain.timesteps.tolist()[::-1] == optimal_trajectory(TABLES, torch.tensor(errors), 7, cost)
    stored = scheduler(
        {"mse_eps": errors, "trajectories": {"3": [0, 123, 999]}, "trajectory": "optimal"}, variance_type="analytic"
    )
    stored.set_timesteps(3)
    assert stored.timesteps.tolist() == [999, 123, 0]
    stored.set_timesteps(4, trajectory="even")
    assert stored.timesteps.tolist() == respaced_timesteps("even", 1000, 4)[::-1]


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_eta_0_is_ddim(prediction_type: str):
    ours = scheduler({"eta": 0.0}, prediction_type=prediction_type)
    stock = DDIMScheduler(prediction_type=prediction_type, clip_sample=True, set_alpha_to_one=True)
    ours.set_timesteps(50)
    stock.set_timesteps(50)
    x = y = torch.randn(2, 1, 4, 4, generator=GEN().manual_seed(0))
    for i in ours.timesteps:
        x = ours.step(0.9 * torch.tanh(x.roll(1, -1)), i, x).prev_sample
        y = stock.step(0.9 * torch.tanh(y.roll(1, -1)), i, y).prev_sample
    torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)  # stock's float32 tables


def test_eta_between_is_ddims_family():
    ours = scheduler({"eta": 0.6}, variance_type="fixed_small", clip_sample=False)
    stock = DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    ours.set_timesteps(20)
    stock.set_timesteps(20)
    x = torch.randn(2, 1, 4, 4, generator=GEN().manual_seed(0))
    for i in (ours.timesteps[0], ours.timesteps[10]):
        output = 0.9 * torch.tanh(x.roll(1, -1))
        got = ours.step(output, i, x, generator=GEN().manual_seed(1)).prev_sample
        expected = stock.step(output, i, x, eta=0.6, generator=GEN().manual_seed(1)).prev_sample
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_errors_are_wanted_before_a_number_is_drawn():
    chain = DDPMExtScheduler(variance_type="analytic")
    x = torch.zeros(1, 1, 2, 2)
    for use in (
        lambda: chain.step(x, 5, x),
        lambda: chain.p_mean_variance(x, 5, x),
        lambda: chain.set_timesteps(5, trajectory="optimal"),
    ):
        with pytest.raises(ValueError, match="needs the network's measured errors"):
            use()
    with pytest.raises(ValueError, match="trajectory must be one of 'even', 'optimal'"):
        chain.set_timesteps(5, trajectory="best")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="both name the steps"):
        chain.set_timesteps(timesteps=[5, 0], trajectory="even")


@pytest.mark.parametrize(
    ("extension", "sentence"),
    [
        ({"mse_eps": [0.1]}, "mse_eps must be a list of 1000 finite numbers of at least 0, one per step, got 1"),
        ({"mse_eps": [math.nan] * 1000}, "mse_eps must be a list of 1000 finite numbers .* got nan at step 0"),
        ({"ms_eps": [0.5, -0.1] * 500}, "ms_eps must .* got -0.1 at step 1"),
        ({"standard_error": ["0.5"] * 1000}, "standard_error must .* got '0.5' at step 0"),
        ({"mse_eps": [None] * 1000}, "mse_eps must .* got None at step 0"),
        ({"mse_eps": 0.1}, "mse_eps must be a list of 1000 .* got float"),
        ({"mse_eps": torch.full((1000,), 0.1)}, "mse_eps must be a list of 1000 .* got Tensor"),
        ({"eta": 2}, "eta must lie between 0 .* got 2"),
        ({"eta": "0"}, "eta must lie between 0 .* got '0'"),
        ({"eta": None}, "eta must lie between 0 .* got None"),
        ({"eta": math.nan}, "eta must lie between 0 .* got nan"),
        ({"trajectories": 5}, "trajectories must map a number of steps to its steps, got 5"),
        ({"trajectories": {"10": [0, 999]}}, r"trajectories must map .* got '10': \[0, 999\]"),
        ({"trajectories": {"3": [0, 5, 2000]}}, r"steps from 0 to 999, .* got '3': \[0, 5, 2000\]"),
        ({"trajectories": {"3": [-5, 5, 999]}}, r"steps from 0 to 999, .* got '3': \[-5, 5, 999\]"),
        ({"trajectories": {"3": [999, 5, 7]}}, "strictly ascending .* got '3'"),
        ({"trajectories": {"3": [0, 5, 5]}}, "strictly ascending .* got '3'"),
        ({"trajectories": {"2": [0, 9.5]}}, r"got '2': \[0, 9.5\]"),
        ({"trajectories": {"0": []}}, r"got '0': \[\]"),
        ({"trajectories": {"2": [False, True]}}, "got '2': "),
        ({"mse_eps": [0.1] * 999 + [math.nan]}, "mse_eps must .* got nan at step 999"),
        ({"mse_eps": [True] * 1000}, "mse_eps must .* got True at step 0"),
        ({"trajectories": {"2": "09"}}, "got '2': '09'"),
        ({"trajectories": {2: [0, 999]}}, r"got 2: \[0, 999\]"),
        ("analytic", "_ddpm_ext must hold fields by name, got 'analytic'"),
        ({"trajectory": "best"}, "trajectory must be one of"),
        ({"mse": []}, "a field of _ddpm_ext must be one of"),
    ],
)
def test_bad_fields_are_refused_and_change_nothing(extension: Any, sentence: str):
    chain = DDPMExtScheduler()
    before = dict(chain.config)
    with pytest.raises(ValueError, match=sentence):
        chain.register_to_config(_ddpm_ext=extension)
    assert dict(chain.config) == before
    with pytest.raises(ValueError, match=sentence):  # as it comes from disk
        DDPMExtScheduler.from_config({**DDPMScheduler().config, "_ddpm_ext": extension})


def test_words_that_are_none_are_refused():
    with pytest.raises(ValueError, match="words of _ddpm_ext must map options to their true words, got 'analytic'"):
        DDPMExtScheduler.from_config({**DDPMScheduler().config, "_ddpm_ext": {"words": "analytic"}})


def test_disk_form_is_stocks_and_comes_back_whole(tmp_path: Path):
    extension = {"mse_eps": isotropic_errors(0.3), "ms_eps": isotropic_errors(0.5), "eta": 0.5, "trajectory": "optimal"}
    ours = scheduler(extension, variance_type="analytic")
    ours.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert written["_class_name"] == "DDPMScheduler" and written["variance_type"] == "fixed_small"
    stock = DDPMScheduler.from_pretrained(tmp_path)
    assert stock.config.variance_type == "fixed_small"
    for back in (DDPMExtScheduler.from_pretrained(tmp_path), DDPMExtScheduler.from_config(stock.config)):
        assert back.config["variance_type"] == "analytic"
        assert back.config["_ddpm_ext"] == extension
        ours.set_timesteps(6)
        back.set_timesteps(6)
        assert torch.equal(back.timesteps, ours.timesteps)
