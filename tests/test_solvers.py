"""Fitted solvers: against Diffusers' DDIM, closed forms, and the known coefficients of Adams-Bashforth."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.testing import assert_close

from ddpm_ext.diffusion.images import clip_x_0
from ddpm_ext.diffusion.schedules import Tables, make_tables
from ddpm_ext.diffusion.solver_fit import (
    Problem,
    choose_times,
    fit_solver,
    power_times,
    refine_solver,
    restore_contrast,
)
from ddpm_ext.diffusion.solvers import (
    Estimate,
    Predict,
    Reference,
    Solver,
    estimate,
    estimate_weights,
    jump_size,
    solve,
    solve_reference,
)
from ddpm_ext.diffusion.words import ReferenceKind

F64 = torch.float64


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def plain(times: list[int], order: int = 1) -> Solver:
    return Solver(tuple(times), torch.zeros(len(times), 2 * order, dtype=F64))


def network(x: Tensor, t: int) -> Tensor:
    """Any smooth function of image and step, large enough for its x̂_0 to be clipped in places."""
    return torch.tanh(x * (1 + t / 500)) + 0.3 * x.flip(-1) + math.sin(t / 100)


def predictor(tables: Tables, prediction: Any, kind: ReferenceKind, model: Callable = network) -> Predict:
    clip = None if kind == "unclipped" else 1.0
    return lambda x, t: estimate(model(x, t), x, estimate_weights(tables, t, prediction, kind), clip)


KINDS: dict[ReferenceKind, dict[str, Any]] = {
    "clipped": {"clip_sample": True},
    "clipped_raw": {"clip_sample": True},
    "unclipped": {"clip_sample": False},
}


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2", "zero"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_coefficients_it_is_ddim(kind: ReferenceKind, prediction: Any, schedule: str):
    """c = d = 0 is Diffusers' DDIM with η = 0, whose ε̂ is the raw one unless `use_clipped_model_output`."""
    zero = schedule == "zero"
    if zero and prediction == "epsilon":
        pytest.skip("undefined there")
    named = {"beta_schedule": "linear" if zero else schedule, "rescale_betas_zero_snr": zero}
    tables = make_tables(named["beta_schedule"], 1000, 1e-4, 0.02, None, zero)
    stock = DDIMScheduler(
        **named, prediction_type=prediction, timestep_spacing="trailing", clip_sample_range=1.0, **KINDS[kind]
    )
    stock.alphas_cumprod = tables.alpha_bar  # float64, as ours: what is compared is the step
    stock.final_alpha_cumprod = torch.tensor(1.0, dtype=F64)
    stock.set_timesteps(8)
    x = theirs = noise(1, 3, 2, 4, 4)
    predict = predictor(tables, prediction, kind)
    for t, ours in zip(
        stock.timesteps.tolist(), solve(predict, x, plain(stock.timesteps.tolist(), 3), tables), strict=True
    ):
        theirs = stock.step(
            network(theirs, t), t, theirs, eta=0.0, use_clipped_model_output=kind == "clipped", return_dict=False
        )[0]
        assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("t", "s"), [(700, 300), (1, 0), (700, -1), (999, 300), (999, -1)])
def test_a_jump_has_the_size_of_its_formula_and_its_limit_without_signal(t: int, s: int):
    """h = α_s (σ_s - σ_t); where α_t = 0 it counts in units of x_t: h α_t -> -α_s."""
    tables = make_tables(zero_terminal_snr=True)
    bar_t, bar_s = tables.alpha_bar[t].item(), tables.alpha_bar[s].item() if s >= 0 else 1.0
    h = math.sqrt(bar_s) * (math.sqrt((1 - bar_s) / bar_s) - math.sqrt((1 - bar_t) / bar_t)) if bar_t else -(bar_s**0.5)
    assert jump_size(tables, t, s) == pytest.approx((math.sqrt(bar_s), math.sqrt(1 - bar_s), h), rel=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("with_x_0", [True, False])
@pytest.mark.parametrize("K", [1, 2, 5])
def test_a_constant_eps_is_solved_exactly(order: int, with_x_0: bool, K: int):
    r"""dx̄/dσ = ε: one step of any size is exact, and so is every fit: x_0 = (x_T - √(1-ᾱ_T) ε)/√ᾱ_T."""
    tables, eps = make_tables(), noise(2, 6, 1, 4, 4)
    signal, spread = tables.alpha_bar.sqrt(), tables.one_minus_alpha_bar.sqrt()

    def predict(x: Tensor, t: int) -> Estimate:
        return Estimate((x - spread[t] * eps) / signal[t], eps)

    reference = solve_reference(predict, noise(3, 6, 1, 4, 4), tables, 20)
    times = [reference.times[place] for place in power_times(reference.times[:-1], K, 1.5)]
    problem = Problem(predict, reference, tables, order, num_fit=4, with_x_0=with_x_0)
    fit = restore_contrast(problem, fit_solver(problem, times))
    x_0 = (reference.states[0] - spread[-1] * eps) / signal[-1]
    *_, ours = solve(predict, reference.states[0], fit.solver, tables)
    assert_close(ours, x_0, rtol=1e-9, atol=1e-9)
    assert fit.squared_distance < 1e-18


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "posterior_mean"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2", "zero"])
def test_gaussian_data_are_solved_exactly(schedule: str, prediction: Any):
    r"""N(m, s² I): the probability flow is x_0 - m = s (x_T - √ᾱ_T m)/√(ᾱ_T s² + 1 - ᾱ_T), linear in x_T.

    The fine grid itself is off by its own step size; the fitted solver reproduces it to rounding at any K >= 2.
    """
    zero = schedule == "zero"
    if zero and prediction == "epsilon":
        pytest.skip("undefined there")
    tables = make_tables("linear" if zero else schedule, 1000, 1e-4, 0.02, None, zero)  # pyright: ignore
    m, s = noise(4, 1, 4, 4), 0.4

    def model(x: Tensor, t: int) -> Tensor:
        a, b = tables.alpha_bar[t], tables.one_minus_alpha_bar[t]
        x_0 = m + a.sqrt() * s**2 * (x - a.sqrt() * m) / (a * s**2 + b)
        eps = (x - a.sqrt() * x_0) / b.sqrt()
        if prediction == "posterior_mean":
            from ddpm_ext.diffusion.process import jump

            step = jump(tables, torch.tensor(t))
            return step.c1 * x_0 + step.c2 * x
        return {"epsilon": eps, "sample": x_0, "v_prediction": a.sqrt() * eps - b.sqrt() * x_0}[prediction]

    predict = predictor(tables, prediction, "unclipped", model)
    reference = solve_reference(predict, noise(5, 8, 1, 4, 4), tables, 200)
    a = tables.alpha_bar[-1]
    exact = m + s * (reference.states[0] - a.sqrt() * m) / (a * s**2 + 1 - a).sqrt()
    assert_close(reference.states[-1], exact, rtol=0, atol=0.02)  # 200 Euler steps of the flow
    for K in (2, 4):
        times = [reference.times[place] for place in power_times(reference.times[:-1], K, 1.5)]
        fit = fit_solver(Problem(predict, reference, tables, 2, num_fit=4, ridge=0), times)
        assert fit.squared_distance < 1e-16, (K, fit)
        problem = Problem(predict, reference, tables, 2, num_fit=4)
        assert fit_solver(problem, times).squared_distance < 1e-9  # with the ridge
        assert solve_distance(predict, reference, plain(times), tables) > 1e-3  # DDIM is not exact


def solve_distance(predict: Predict, reference: Reference, solver: Solver, tables: Tables) -> float:
    *_, x_0 = solve(predict, reference.states[0], solver, tables)
    return (x_0 - reference.states[-1]).square().mean().item()


@pytest.mark.parametrize(("order", "known"), [(1, []), (2, [1 / 2]), (3, [4 / 3, -5 / 12])])
def test_adams_bashforth_is_recovered(order: int, known: list[float]):
    r"""ε̂ a polynomial of degree m - 1 in σ, steps equal in σ: Adams-Bashforth is exact, and the only such method.

    Its weights 3/2, -1/2 and 23/12, -16/12, 5/12 are 1 + Σ c_j and -c_j. The first m - 1 jumps lack history and err;
    the m-th mends that to the last digit, since its estimates span all such errors. From there on only Adams-Bashforth
    is left.
    """
    T, width = 12, 0.3
    sigma = width * torch.arange(1, T + 1, dtype=F64)
    alpha_bar = 1 / (1 + sigma**2)
    betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=F64), alpha_bar[:-1]])
    tables = make_tables("linear", T, trained_betas=betas)
    assert_close((tables.one_minus_alpha_bar / tables.alpha_bar).sqrt(), sigma, rtol=1e-12, atol=0)
    parts = [noise(10 + degree, 5, 1, 4, 4) for degree in range(order)]
    start = noise(20, 5, 1, 4, 4)

    def eps(at: float) -> Tensor:
        return torch.stack([part * at**degree for degree, part in enumerate(parts)]).sum(0)

    def x_bar(at: float) -> Tensor:
        return start + torch.stack([part * at ** (degree + 1) / (degree + 1) for degree, part in enumerate(parts)]).sum(
            0
        )

    def predict(x: Tensor, t: int) -> Estimate:
        return Estimate(x / alpha_bar[t].sqrt() - sigma[t] * eps(sigma[t].item()), eps(sigma[t].item()))

    times = list(range(T))[::-1]
    states = [x_bar(sigma[t].item()) * alpha_bar[t].sqrt() for t in times] + [x_bar(0.0)]
    problem = Problem(predict, Reference((*times, -1), states), tables, order, with_x_0=False, ridge=0)
    fit = fit_solver(problem, times)
    for row in fit.solver.coefficients[order:]:
        assert_close(row, torch.tensor([0.0, *known] + [0.0] * order, dtype=F64), rtol=0, atol=1e-6)


def test_a_fit_is_the_least_squares_of_its_own_states():
    """The normal equations by hand for the second jump: what `torch.linalg.lstsq` finds is what is used."""
    tables = make_tables()
    predict = predictor(tables, "epsilon", "clipped_raw")
    reference = solve_reference(predict, noise(6, 8, 1, 6, 6), tables, 50)
    times = [reference.times[place] for place in (0, 15, 32)]
    fit = fit_solver(Problem(predict, reference, tables, 2, num_fit=5, ridge=0), times)
    before, x = predict(reference.states[0], times[0]), reference.states[0]
    (x, *_) = list(solve(predict, x, fit.solver, tables))
    now = predict(x, times[1])
    a, b = tables.alpha_bar[times[2]].sqrt(), tables.one_minus_alpha_bar[times[2]].sqrt()
    wanted = reference.states[32] - (a * now.x_0 + b * now.eps)
    basis = torch.stack([now.eps, now.eps - before.eps, now.x_0, now.x_0 - before.x_0], -1)
    weights = torch.linalg.lstsq(basis[:5].reshape(-1, 4), wanted[:5].reshape(-1, 1)).solution[:, 0]
    h = a * (tables.one_minus_alpha_bar / tables.alpha_bar).sqrt()[[times[2], times[1]]].diff().neg()
    assert_close(fit.solver.coefficients[1] * torch.stack([h[0], h[0], a, a]), weights, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_is_nearer_than_ddim_and_chosen_steps_nearer_still(kind: ReferenceKind):
    tables = make_tables()
    predict = predictor(tables, "epsilon", kind)
    reference = solve_reference(predict, noise(7, 24, 1, 6, 6), tables, 60)
    times = [reference.times[place] for place in power_times(reference.times[:-1], 4, 2.0)]
    held_out = Reference(reference.times, [state[16:] for state in reference.states])
    ddim = solve_distance(predict, held_out, plain(times), tables)
    problem = Problem(predict, reference, tables, 3, num_fit=16)
    fit = fit_solver(problem, times)
    assert fit.squared_distance < 0.7 * ddim
    assert math.isclose(fit.squared_distance, solve_distance(predict, held_out, fit.solver, tables), rel_tol=1e-9)
    trials: list[float] = []
    chosen = choose_times(problem, 4, on_trial=trials.append)
    assert chosen.squared_distance <= fit.squared_distance and trials == sorted(trials, reverse=True)
    assert math.isclose(chosen.squared_distance, solve_distance(predict, held_out, chosen.solver, tables), rel_tol=1e-9)
    assert chosen.solver.times[0] == 999 and len(chosen.solver.times) == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_x_0", [True, False])
def test_moving_all_coefficients_together_comes_nearer_still(kind: ReferenceKind, with_x_0: bool):
    tables = make_tables()
    predict = predictor(tables, "epsilon", kind)
    reference = solve_reference(predict, noise(11, 24, 1, 6, 6), tables, 60)
    times = [reference.times[place] for place in power_times(reference.times[:-1], 4, 2.0)]
    problem = Problem(predict, reference, tables, 2, num_fit=16, with_x_0=with_x_0)
    fit = fit_solver(problem, times)
    refined = refine_solver(problem, fit)
    assert fit.squared_distance > 1e-4
    held_out = Reference(reference.times, [state[16:] for state in reference.states])
    assert math.isclose(
        refined.squared_distance, solve_distance(predict, held_out, refined.solver, tables), rel_tol=1e-9
    )
    assert with_x_0 or torch.equal(refined.solver.coefficients[:, 2:], torch.zeros(4, 2, dtype=F64))
    assert torch.equal(refined.solver.coefficients[0, [1, 3]], torch.zeros(2, dtype=F64))  # no estimates before it

    assert refined.squared_distance <= (1.0 if kind == "clipped" else 0.9) * fit.squared_distance  # jumpy at the clip
    assert refine_solver(problem, fit, max_steps=0) is fit


def test_chains_that_share_their_beginning_are_fitted_as_alone():
    """The descent keeps the beginning of the chain fitted last: what it finds is what a fresh fit finds."""
    tables, calls = make_tables(), []
    inner = predictor(tables, "epsilon", "clipped")

    def predict(x: Tensor, t: int) -> Estimate:
        calls.append(t)
        return inner(x, t)

    reference = solve_reference(predict, noise(8, 8, 1, 4, 4), tables, 40)
    calls.clear()
    problem = Problem(predict, reference, tables, 2, num_fit=6)
    chosen = choose_times(problem, 5)
    used = len(calls)
    fresh = fit_solver(problem, chosen.solver.times)
    assert torch.equal(fresh.solver.coefficients, chosen.solver.coefficients)
    assert fresh.squared_distance == chosen.squared_distance and len(calls) == used + 5


def test_an_estimate_that_never_changes_or_is_zero_does_no_harm():
    """Columns of zeros have no weight; nothing is NaN."""
    tables = make_tables()
    zero = torch.zeros(4, 1, 2, 2, dtype=F64)
    reference = solve_reference(lambda x, t: Estimate(zero, zero), noise(9, 4, 1, 2, 2), tables, 10)
    problem = Problem(lambda x, t: Estimate(zero, zero), reference, tables, 3)
    fit = restore_contrast(problem, fit_solver(problem, reference.times[:3]))
    assert torch.equal(fit.solver.coefficients, torch.zeros(3, 6, dtype=F64)) and fit.squared_distance == 0


@pytest.mark.parametrize("clip", [None, 1.0])
def test_images_vary_as_the_references_do(clip: float | None):
    """The variance that least squares takes comes back, whatever is clipped; the scheduler's formula draws the same."""
    tables = make_tables()

    def two_gaussians(x: Tensor, t: int) -> Tensor:
        """E[x_0 | x_t] of ½ N(-0.7, 0.3²) + ½ N(0.7, 0.3²) per pixel."""
        a, b = tables.alpha_bar[t].sqrt(), tables.one_minus_alpha_bar[t]
        var = a**2 * 0.09 + b
        of_each = [m + a * 0.09 * (x - a * m) / var for m in (-0.7, 0.7)]
        second = torch.sigmoid(2 * a * 0.7 * x / var)
        return (1 - second) * of_each[0] + second * of_each[1]

    predict = predictor(tables, "sample", "unclipped", two_gaussians)
    reference = solve_reference(predict, noise(12, 40, 1, 6, 6), tables, 60)
    times = [reference.times[place] for place in power_times(reference.times[:-1], 2, 1.0)]
    problem = Problem(predict, reference, tables, 1, num_fit=30, clip=clip)
    fit = fit_solver(problem, times)
    restored = restore_contrast(problem, fit)

    def variance(x_0: Tensor) -> float:
        shown = x_0[:30] if clip is None else x_0[:30].clamp(-clip, clip)
        return shown.var(0).mean().item()

    *_, before = solve(predict, reference.states[0], fit.solver, tables)
    *_, after = solve(predict, reference.states[0], restored.solver, tables)
    wanted = variance(reference.states[-1])
    assert variance(before) < 0.9995 * wanted
    assert math.isclose(variance(after), wanted, rel_tol=1e-5)
    gain = (after / before).median()
    assert_close(after, before * gain, rtol=1e-9, atol=1e-9)  # the last jump alone is scaled
    held = [x if clip is None else x.clamp(-clip, clip) for x in (after[30:], reference.states[-1][30:])]
    assert math.isclose(restored.squared_distance, (held[0] - held[1]).square().mean().item(), rel_tol=1e-9)


def test_power_times_keep_their_ends_and_never_meet():
    grid = list(range(0, 1000, 5))[::-1]
    for K in (2, 3, 10, 50, 200):
        for power in (1.0, 2.5, 6.0):
            places = power_times(grid, K, power)
            assert (places[0], places[-1], len(places)) == (0, len(grid) - 1, K)
            assert places == sorted(set(places))
    assert power_times(grid, 1, 2.0) == [0]


def test_wrong_input_is_told():
    tables = make_tables()
    predict = predictor(tables, "epsilon", "clipped")
    reference = solve_reference(predict, noise(0, 4, 1, 4, 4), tables, 10)
    for times, words in (([999, 500], "steps of the reference"), ([888, 777], "begin"), ([], "steps of the reference")):
        with pytest.raises(ValueError, match=words):
            fit_solver(Problem(predict, reference, tables, 2), times)
    with pytest.raises(ValueError, match="order"):
        Problem(predict, reference, tables, 0)
    with pytest.raises(ValueError, match="num_fit"):
        Problem(predict, reference, tables, 1, num_fit=5)
    with pytest.raises(ValueError, match="1\\.\\.10"):
        power_times(reference.times[:-1], 11, 1.0)
    with pytest.raises(ValueError, match="no signal"):
        estimate_weights(make_tables(zero_terminal_snr=True), 999, "epsilon")
    with pytest.raises(ValueError, match="reference"):
        estimate_weights(tables, 0, "epsilon", "raw")  # pyright: ignore[reportArgumentType]
    assert clip_x_0(torch.tensor(2.0), 1.0) == 1
