"""Averaged weights against sums written out in full, and widths reconstructed after training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from ddpm_ext.training.config import TrainConfig
from ddpm_ext.training.state.ema import (
    PowerFunctionEMA,
    gamma_of,
    make_averages,
    profile_products,
    reconstruction_weights,
    swapped,
    weighted_sum,
)


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(max_train_steps=1, **changes)


def walk(steps: int) -> list[torch.Tensor]:
    """A random walk of 5 weights."""
    return list(torch.randn(steps, 5, generator=torch.Generator().manual_seed(1)).cumsum(0))


def run(average: EMAModel, parameter: nn.Parameter, path: list[torch.Tensor]) -> torch.Tensor:
    for theta in path:
        parameter.data.copy_(theta)
        average.step([parameter])
    return average.shadow_params[0]


def test_constant_decay_with_the_first_update_a_copy() -> None:
    parameter, path, decay = nn.Parameter(torch.full((5,), 7.0)), walk(40), 0.9
    averaged = run(make_averages(config(ema_max_decay=decay), [parameter])[0], parameter, path)
    # The recursion unrolled: decay^(n-1) θ_1 + Σ_{i>1} (1 - decay) decay^(n-i) θ_i.
    weights = [decay ** (40 - 1)] + [(1 - decay) * decay ** (40 - i) for i in range(2, 41)]
    expected = sum(weight * theta.double() for weight, theta in zip(weights, path, strict=True))
    torch.testing.assert_close(averaged.double(), expected, rtol=1e-6, atol=1e-6)  # float32 sums


def test_warm_up_is_that_of_diffusers() -> None:
    parameter, path = nn.Parameter(torch.zeros(5)), walk(30)
    ours = make_averages(config(ema="warmup", ema_inv_gamma=2.0, ema_power=0.7, ema_max_decay=0.8), [parameter])[0]
    stock = EMAModel([parameter], decay=0.8, use_ema_warmup=True, inv_gamma=2.0, power=0.7)
    torch.testing.assert_close(run(ours, parameter, path), run(stock, parameter, path))


def test_power_function_is_the_integral_of_its_profile() -> None:
    parameter, steps = nn.Parameter(torch.zeros(5, dtype=torch.float64)), 400
    path = [theta.double() for theta in walk(steps)]
    average = PowerFunctionEMA([parameter], 0.1)
    averaged = run(average, parameter, path)
    # ∏ (1 - 1/n)^(γ+1) telescopes: θ_i has weight (i/n)^(γ+1) - ((i-1)/n)^(γ+1).
    edges = (np.arange(steps + 1) / steps) ** (average.gamma + 1)
    expected = sum(float(weight) * theta for weight, theta in zip(np.diff(edges), path, strict=True))
    torch.testing.assert_close(averaged, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.9722), (0.10, 6.9372)])
def test_gamma_of_the_papers_two_widths(sigma_rel: float, gamma: float) -> None:
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=5e-5)
    g = gamma_of(sigma_rel)
    assert (g + 1) / ((g + 2) ** 2 * (g + 3)) == pytest.approx(sigma_rel**2, rel=1e-10)


def test_profile_products_are_the_integrals() -> None:
    n, gamma = np.array([300, 1000]), np.array([6.9, 17.0])
    t = (np.arange(200_000) + 0.5) / 200_000 * 1000  # midpoints
    profiles = [np.where(t < n_i, (g + 1) / n_i * (t / n_i) ** g, 0.0) for n_i, g in zip(n, gamma, strict=True)]
    expected = np.array([[np.sum(p * q) * (t[1] - t[0]) for q in profiles] for p in profiles])
    np.testing.assert_allclose(profile_products(n, gamma, n, gamma), expected, rtol=1e-4)  # the midpoint rule's error


@pytest.mark.parametrize("sigma_rel", [0.06, 0.08, 0.10, 0.15, 0.20])
def test_any_width_is_reconstructed_from_two(sigma_rel: float) -> None:
    parameter, steps = nn.Parameter(torch.zeros(5, dtype=torch.float64)), 1024
    path = [theta.double() for theta in walk(steps)]
    stored = {width: PowerFunctionEMA([parameter], width) for width in (0.05, 0.10)}
    wanted = PowerFunctionEMA([parameter], sigma_rel)
    snapshots, n, widths = [], [], []
    for step, theta in enumerate(path, start=1):
        parameter.data.copy_(theta)
        for average in (*stored.values(), wanted):
            average.step([parameter])
        if step % (steps // 32) == 0:
            for width, average in stored.items():
                snapshots.append({"w": average.shadow_params[0].clone()})
                n.append(step)
                widths.append(width)
    weights = reconstruction_weights(n, widths, steps, sigma_rel)
    rebuilt = weighted_sum(snapshots, weights)["w"]
    spread = torch.stack(path).std()
    # The least-squares profile is within about 1% of the wanted one (Karras et al. 2023, Sec. 3.2).
    assert (rebuilt - wanted.shadow_params[0]).abs().max() < 0.02 * spread
    assert weights.sum() == pytest.approx(1.0, abs=0.01)


def test_a_width_cannot_be_reconstructed_beyond_the_last_snapshot() -> None:
    with pytest.raises(ValueError, match="ends at update 20, after the last snapshot at 10"):
        reconstruction_weights([10], [0.1], 20, 0.1)


def test_swapping_shows_the_average_and_restores_every_bit() -> None:
    parameters = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 2))]
    average = make_averages(config(), parameters)[0]
    for _ in range(3):
        for parameter in parameters:
            parameter.data += torch.randn_like(parameter)
        average.step(parameters)
    before, averaged = [p.detach().clone() for p in parameters], [s.clone() for s in average.shadow_params]
    with pytest.raises(RuntimeError, match="while sampling"), swapped(parameters, average):
        assert all(torch.equal(p, s) for p, s in zip(parameters, averaged, strict=True))
        raise RuntimeError("while sampling")
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert all(torch.equal(s, a) for s, a in zip(average.shadow_params, averaged, strict=True))
    with swapped(parameters, None):
        assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


def test_no_average_without_use_ema() -> None:
    assert make_averages(config(use_ema=False), [nn.Parameter(torch.zeros(1))]) == []
