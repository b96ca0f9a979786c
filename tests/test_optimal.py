"""The optimal variance and trajectory against closed forms and brute force."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import numpy as np
import oracles
import pytest
import torch

from ddpm_ext.diffusion import analytic
from ddpm_ext.diffusion.process import jump
from ddpm_ext.diffusion.schedules import Tables, make_tables, respaced_timesteps

TABLES = make_tables()
T = 1000


def pairs(*times: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([-1, *times[:-1]]), torch.tensor(times)


def isotropic_errors(variance: float, tables=TABLES) -> torch.Tensor:
    """mse_eps of the perfect network for N(0, variance·I): ᾱ v / (ᾱ v + 1 - ᾱ)."""
    signal = tables.alpha_bar * variance
    return signal / (signal + tables.one_minus_alpha_bar)


@pytest.mark.parametrize("times", [tuple(range(T)), (0, 99, 500, 999)])
def test_point_mass_has_the_posterior_variance(times: tuple[int, ...]):
    s, t = pairs(*times)
    got = analytic.optimal_variance(TABLES, torch.zeros(T), s, t)
    torch.testing.assert_close(got, jump(TABLES, t, s).var, rtol=0, atol=0)


@pytest.mark.parametrize("times", [tuple(range(T)), (0, 99, 500, 999)])
def test_standard_normal_data_has_the_large_variance(times: tuple[int, ...]):
    s, t = pairs(*times)
    got = analytic.optimal_variance(TABLES, isotropic_errors(1.0), s, t)
    torch.testing.assert_close(got, jump(TABLES, t, s).b, rtol=1e-9, atol=0)  # Var(x_s|x_t) = 1 - ᾱ_t/ᾱ_s


@pytest.mark.parametrize("variance", [0.1, 0.7])
def test_isotropic_gaussian_has_its_conditional_variance(variance: float):
    s, t = pairs(0, 30, 200, 600, 999)
    alpha_bar_s = torch.cat([torch.ones(1, dtype=torch.float64), TABLES.alpha_bar[s[1:]]])
    alpha_bar_t = TABLES.alpha_bar[t]
    var_s, var_t = alpha_bar_s * variance + 1 - alpha_bar_s, alpha_bar_t * variance + 1 - alpha_bar_t
    a = alpha_bar_t / alpha_bar_s
    conditional = var_s - a * var_s**2 / var_t  # of jointly Gaussian x_s, x_t with covariance √a·var_s
    got = analytic.optimal_variance(TABLES, isotropic_errors(variance), s, t)
    torch.testing.assert_close(got, conditional, rtol=1e-8, atol=0)


def test_eta_1_of_the_ddim_form_is_the_ddpm_form_and_eta_0_stays_positive():
    s, t = pairs(0, 30, 200, 600, 999)
    errors = isotropic_errors(0.3)
    ddpm = analytic.optimal_variance(TABLES, errors, s, t)
    near = analytic.optimal_variance(TABLES, errors, s, t, eta=1 - 1e-12)  # takes the general branch
    torch.testing.assert_close(near, ddpm, rtol=1e-6, atol=0)  # the bracket subtracts close numbers
    assert (analytic.optimal_variance(TABLES, errors, s, t, eta=0.0) > 0).all()


def test_ddim_form_by_hand():
    errors, s, t, eta = isotropic_errors(0.5), 200, 600, 0.4
    a_s, a_t = TABLES.alpha_bar[s].item(), TABLES.alpha_bar[t].item()
    beta_tilde = (1 - a_t / a_s) * (1 - a_s) / (1 - a_t)
    lambda2 = eta**2 * beta_tilde
    covariance = min((1 - a_t) / a_t * errors[t].item(), 1)
    by_hand = lambda2 + (math.sqrt(a_s) - math.sqrt((1 - a_s - lambda2) * a_t / (1 - a_t))) ** 2 * covariance
    got = analytic.optimal_variance(TABLES, errors, torch.tensor(s), torch.tensor(t), eta)
    assert math.isclose(got.item(), by_hand, rel_tol=1e-10)


def test_covariance_is_bounded_by_the_data_range():
    assert analytic.covariance(TABLES, torch.ones(T), torch.tensor([999])).item() == 1.0


def test_sampling_cap_has_the_published_values():
    assert math.isclose(analytic.sampling_cap(2), 3.87e-4, rel_tol=2e-3)  # printed with three digits
    assert math.isclose(analytic.sampling_cap(1), 9.66e-5, rel_tol=2e-3)


def kl_bound(tables: Tables, errors: torch.Tensor, times: list[int], cost: Any = "analytic") -> float:
    """Σ L_{t-1} by the edges, in nats per dimension: ½ [Σ J(s, t) + log SNR(n_1) - log SNR(n_K)], or ½ Σ F(s, t).

    The last logarithm is left out where ᾱ = 0 at n_K, as in `analytic_edges`.
    """
    edges = analytic.trajectory_edges(tables, errors, cost)
    total = sum(edges[s, t].item() for s, t in itertools.pairwise(times))
    if cost == "analytic":
        log_snr = (tables.log_alpha_bar - tables.one_minus_alpha_bar.log()).tolist()
        total += log_snr[times[0]] - (log_snr[times[-1]] if tables.alpha_bar[times[-1]] > 0 else 0)
    return total / 2


@pytest.mark.parametrize("cost", ["analytic", "fixed_small", "fixed_large"])
@pytest.mark.parametrize("K", [2, 3, 5, 11, 12])
def test_trajectory_equals_brute_force(cost: str, K: int):
    tables = make_tables("linear", 12, 1e-3, 0.5)
    errors = torch.rand(12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    every = ([0, *middle, 11] for middle in itertools.combinations(range(1, 11), K - 2))
    best = min(every, key=lambda times: kl_bound(tables, errors, times, cost))
    assert analytic.optimal_trajectory(tables, errors, K, cost) == best


@pytest.mark.parametrize("cost", ["analytic", "fixed_small", "fixed_large"])
def test_bound_of_a_chain_is_the_sum_of_gaussian_kls(cost: str):
    """½[v_q/σ² - 1 - log v_q/σ² + c1² E(x_0 - x̂_0)²/σ²] per jump, written out."""
    errors, times = isotropic_errors(0.2), [0, 40, 333, 999]
    total = 0.0
    for s, t in itertools.pairwise(times):
        a_s, a_t = TABLES.alpha_bar[s].item(), TABLES.alpha_bar[t].item()
        b, b_s, b_t = 1 - a_t / a_s, 1 - a_s, 1 - a_t
        small, c1, error = b * b_s / b_t, math.sqrt(a_s) * b / b_t, b_t / a_t * errors[t].item()
        sigma2 = {"fixed_small": small, "fixed_large": b, "analytic": small + c1**2 * error}[cost]
        total += 0.5 * (small / sigma2 - 1 - math.log(small / sigma2) + c1**2 * error / sigma2)
    assert math.isclose(kl_bound(TABLES, errors, times, cost), total, rel_tol=1e-9)


def test_isotropic_bound_does_not_depend_on_the_trajectory():
    errors = isotropic_errors(0.3)
    bounds = [
        kl_bound(TABLES, errors, times)
        for times in ([0, 999], [0, 1, 999], respaced_timesteps("even", T, 50), list(range(T)))
    ]
    np.testing.assert_allclose(bounds, bounds[0], rtol=1e-9)


def test_plus_minus_one_pixels_gain_from_the_analytic_variance_and_the_trajectory():
    """x_0 = ±1 with equal chance: x̂_0 = tanh(√ᾱ x_t/(1-ᾱ)), its error by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(201)
    alpha_bar = TABLES.alpha_bar.numpy()[:, None]
    x_t = np.sqrt(alpha_bar) + np.sqrt(1 - alpha_bar) * nodes
    square = ((1 - np.tanh(np.sqrt(alpha_bar) * x_t / (1 - alpha_bar))) ** 2) @ (weights / weights.sum())
    errors = torch.from_numpy(square) * TABLES.alpha_bar / TABLES.one_minus_alpha_bar
    for K, best in analytic.optimal_trajectories(TABLES, errors, [10, 25, 50, 100, 1000]).items():
        even = respaced_timesteps("even", T, K)
        bound = {cost: kl_bound(TABLES, errors, even, cost) for cost in ("analytic", "fixed_small", "fixed_large")}
        assert bound["analytic"] < min(bound["fixed_small"], bound["fixed_large"])
        assert best[0] == 0 and best[-1] == 999 and len(best) == K == len(set(best))
        if K < 1000:
            assert kl_bound(TABLES, errors, best) < bound["analytic"]
        else:
            assert best == list(range(1000))


# Zero terminal SNR ----------------------------------------------------------------------------------------------------

NO_SIGNAL = make_tables("linear", 12, 1e-3, 0.5, zero_terminal_snr=True)


def test_without_signal_the_covariance_is_its_bound_and_standard_normal_data_keep_the_large_variance():
    """ε̂ = x_t has no error at ᾱ_T = 0. For N(0, I) mse_eps = ᾱ as everywhere, and Var(x_s | x_T) = Var(x_s) = 1 = b."""
    assert NO_SIGNAL.alpha_bar[-1] == 0
    for errors in (torch.zeros(12), NO_SIGNAL.alpha_bar):
        assert analytic.covariance(NO_SIGNAL, errors, torch.tensor([11])).item() == 1
    s, t = pairs(*range(12))
    got = analytic.optimal_variance(NO_SIGNAL, NO_SIGNAL.alpha_bar, s, t)
    torch.testing.assert_close(got, jump(NO_SIGNAL, t, s).b, rtol=1e-9, atol=0)
    ddim = analytic.optimal_variance(NO_SIGNAL, NO_SIGNAL.alpha_bar, torch.tensor(5), torch.tensor(11), eta=0.0)
    assert math.isclose(ddim.item(), NO_SIGNAL.alpha_bar[5].item(), rel_tol=1e-12)  # ε̂ is x_T, and x̂_0 has variance 1


def literal_bound(alpha_bar: list[float], errors: list[float], times: list[int], cost: str) -> float:
    """Σ ½[β̃/σ² - 1 - log(β̃/σ²) + c1² R/σ²] with R = 1 where nothing of x_0 is left."""
    total = 0.0
    for s, t in itertools.pairwise(times):
        b, b_s, b_t = 1 - alpha_bar[t] / alpha_bar[s], 1 - alpha_bar[s], 1 - alpha_bar[t]
        small, weight = b * b_s / b_t, alpha_bar[s] * (b / b_t) ** 2
        error = b_t / alpha_bar[t] * errors[t] if alpha_bar[t] > 0 else 1.0
        sigma2 = {"fixed_small": small, "fixed_large": b, "analytic": small + weight * error}[cost]
        total += 0.5 * (small / sigma2 - 1 - math.log(small / sigma2) + weight * error / sigma2)
    return total


@pytest.mark.parametrize("cost", ["analytic", "fixed_small", "fixed_large"])
@pytest.mark.parametrize("K", [2, 3, 5, 11, 12])
def test_without_signal_the_bound_is_the_literal_one_and_the_trajectory_brute_force(cost: str, K: int):
    errors = torch.rand(12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    errors[-1] = 0  # exactly, of every network
    alpha_bar = [float(a) for a in oracles.exact_zero_terminal_snr(np.linspace(1e-3, 0.5, 12).tolist())]
    every = [[0, *middle, 11] for middle in itertools.combinations(range(1, 11), K - 2)]
    bounds = [literal_bound(alpha_bar, errors.tolist(), times, cost) for times in every]
    ours = [kl_bound(NO_SIGNAL, errors, times, cost) for times in every]
    np.testing.assert_allclose(ours, bounds, rtol=1e-9)
    assert analytic.optimal_trajectory(NO_SIGNAL, errors, K, cost) == every[int(np.argmin(bounds))]


def test_a_chain_without_a_finite_cost_is_refused():
    errors = torch.zeros(T, dtype=torch.float64)
    errors[-1] = 1e308  # its R = mse_eps (1-ᾱ)/ᾱ is infinite
    with pytest.raises(ValueError, match="No trajectory of 5 steps has a finite cost"):
        analytic.optimal_trajectory(TABLES, errors, 5, "fixed_large")


@pytest.mark.slow
def test_four_trajectories_of_a_thousand_steps_take_less_than_five_seconds_of_one_core():
    began = time.process_time()
    found = analytic.optimal_trajectories(TABLES, isotropic_errors(0.3), [10, 25, 50, 100])
    assert time.process_time() - began < 5
    assert [len(found[K]) for K in (10, 25, 50, 100)] == [10, 25, 50, 100]


@pytest.mark.parametrize("K", [1, 0, 1001, 2.0, True])
def test_impossible_numbers_of_steps_are_refused(K):
    with pytest.raises(ValueError, match="from 2 to T = 1000 steps"):
        analytic.optimal_trajectory(TABLES, torch.zeros(T), K)


@pytest.mark.parametrize("errors", [torch.zeros(999), torch.full((T,), math.nan), torch.full((T,), -1.0)])
def test_errors_that_do_not_fit_are_refused(errors: torch.Tensor):
    with pytest.raises(ValueError, match="mse_eps must hold one finite number of at least 0 per step, 1000 of them"):
        analytic.optimal_variance(TABLES, errors, torch.tensor(0), torch.tensor(1))
    with pytest.raises(ValueError, match="eta must lie between 0"):
        analytic.optimal_variance(TABLES, torch.zeros(T), torch.tensor(0), torch.tensor(1), eta=1.5)


def test_all_steps_are_the_full_chain_and_need_no_search(monkeypatch: pytest.MonkeyPatch):
    small = make_tables("squaredcos_cap_v2", 12)
    monkeypatch.setattr(analytic, "_walk_back", None)
    assert analytic.optimal_trajectory(small, isotropic_errors(0.4, small), 12) == list(range(12))
