r"""Fitted solvers: the deterministic chain in a few network calls, a linear multistep method fitted by least squares.

One jump from step t to step s (-1: the clean image), α = √ᾱ, with x̂_0 and ε̂ of step t and of the m - 1 visited steps
before it (j = 1 is the last one before t; fewer at the start):

    x_s = α_s [x̂_0 + Σ_j d_j (x̂_0 - x̂_0^j)] + √(1-ᾱ_s) ε̂ + h [c_0 ε̂ + Σ_j c_j (ε̂ - ε̂^j)],   h = α_s (σ_s - σ_t)

with σ = √((1-ᾱ)/ᾱ). c = d = 0 is DDIM with η = 0, which in x̄ = x/α is Euler's method for dx̄/dσ = ε̂. Adams-Bashforth,
DPM-Solver++(2M), iPNDM and PLMS are other fixed choices. Here the numbers are those that bring the state nearest to the
network's own fine solution, the *reference*, jump after jump. Nothing is trained, no gradient is taken.

Every t and s counts from 0; coefficients are float64 and are rounded once, where they meet an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from ..errors import UserError, check_word
from .images import Clip, clip_x_0
from .process import PredictionType, eps_weights, x_0_weights
from .schedules import respaced_timesteps
from .tables import Tables
from .words import ReferenceKind

__all__ = [
    "REFERENCES",
    "Estimate",
    "Fit",
    "JumpWeights",
    "Reference",
    "Solver",
    "choose_times",
    "estimate",
    "estimate_weights",
    "fit_solver",
    "jump_weights",
    "power_times",
    "refine_solver",
    "solve",
    "solve_reference",
    "solver_step",
]

REFERENCES: tuple[ReferenceKind, ...] = get_args(ReferenceKind)
RIDGE = 1e-6  # of the diagonal of the normal equations
POWERS = (1.0, 1.5, 2.0, 2.5)
MOVES = (8, 4, 2, 1)
DAMPINGS = (1e-3, 1e-2, 1e-1)  # of a Gauss-Newton step, relative to the diagonal of its equations
NUDGE = 3e-3  # root mean square change of x_s by which derivatives are taken


class Estimate(NamedTuple):
    """What a network says of one noised image, x_t ≈ √ᾱ_t x̂_0 + √(1-ᾱ_t) ε̂."""

    x_0: Tensor  # (B, C, H, W)
    eps: Tensor  # (B, C, H, W)


Predict = Callable[[Tensor, int], Estimate]  # (x_t, t) -> the network's estimate, 0 <= t < T


class EstimateWeights(NamedTuple):
    """x̂_0 = x_of_x_t · x_t + x_of_output · output, clipped; ε̂ = of_x_t · x_t + of_output · output + of_x_0 · x̂_0."""

    x_of_x_t: float
    x_of_output: float
    of_x_t: float
    of_output: float
    of_x_0: float


class JumpWeights(NamedTuple):
    """x_s = of_x_0 · x̂_0 + of_eps · ε̂ + Σ_j (of_x_0_before[j] · x̂_0^j + of_eps_before[j] · ε̂^j)."""

    of_x_0: float
    of_eps: float
    of_x_0_before: tuple[float, ...]  # the step before first
    of_eps_before: tuple[float, ...]


@dataclass(frozen=True)
class Solver:
    """The steps of a chain and the coefficients of its jumps.

    Attributes:
        times: The K steps visited, strictly descending, 0 <= t < T; the last jump ends at the clean image.
        coefficients: float64, shape (K, 2m - 1): c_0, c_1 .. c_{m-1}, d_1 .. d_{m-1} of each jump.
    """

    times: tuple[int, ...]
    coefficients: Tensor

    @property
    def order(self) -> int:
        """m: how many estimates one jump uses."""
        return (self.coefficients.shape[1] + 1) // 2

    @property
    def targets(self) -> tuple[int, ...]:
        """Where each jump ends."""
        return (*self.times[1:], -1)


class Reference(NamedTuple):
    """A fine solution of the same noises."""

    times: tuple[int, ...]  # its steps, descending, then -1
    states: Sequence[Tensor]  # x at each of them, (N, C, H, W)


class Fit(NamedTuple):
    """A fitted solver and how near it comes to its reference."""

    solver: Solver
    squared_distance: float  # mean over the held-out noises and dimensions of (x_0 - x_0*)²; of all where none is held


# -- one step ---------------------------------------------------------------------------------------------------------


def estimate_weights(
    tables: Tables, t: int, prediction_type: PredictionType, kind: ReferenceKind = "clipped"
) -> EstimateWeights:
    r"""How x̂_0 and ε̂ of step t follow from x_t and the network's output.

        clipped      x̂_0 clipped, ε̂ = (x_t - √ᾱ_t x̂_0) / √(1-ᾱ_t) recomputed from it
        clipped_raw  x̂_0 clipped, ε̂ of the output itself (Diffusers' DDIM)
        unclipped    neither clipped; the two ε̂ are then the same

    Args:
        tables: One schedule, on the CPU.
        t: 0 <= t < T.
        prediction_type: What the network predicts.
        kind: One of the words above.

    Raises:
        UserError: epsilon prediction at ᾱ_t = 0, where there is no x̂_0.
    """
    check_word("reference", kind, REFERENCES)
    at = torch.tensor(t)
    x_0, eps = x_0_weights(tables, at, prediction_type), eps_weights(tables, at, prediction_type)
    if not math.isfinite(x_0.of_output.item()):
        raise UserError(
            f"timestep {t} has no signal left (ᾱ_t = 0), where {prediction_type} prediction gives no x_0. Use "
            'prediction_type "v_prediction" or "sample".'
        )
    if kind == "clipped":
        signal, rstd = tables.alpha_bar[t].sqrt().item(), tables.one_minus_alpha_bar[t].rsqrt().item()
        return EstimateWeights(x_0.of_x_t.item(), x_0.of_output.item(), rstd, 0.0, -signal * rstd)
    return EstimateWeights(x_0.of_x_t.item(), x_0.of_output.item(), eps.of_x_t.item(), eps.of_output.item(), 0.0)


def estimate(output: Tensor, x_t: Tensor, weights: EstimateWeights, clip: Clip = None) -> Estimate:
    """x̂_0 and ε̂ of one step, in the dtype of x_t.

    Args:
        output: The network's prediction, shape (B, C, …), x_t's dtype.
        x_t: Shape (B, C, …).
        weights: `estimate_weights` of the step.
        clip: As in `images.clip_x_0`; leave it out for the unclipped kind.
    """
    x_0 = clip_x_0(_combine((weights.x_of_x_t, x_t), (weights.x_of_output, output)), clip)
    if (weights.of_x_t, weights.of_output, weights.of_x_0) == (0.0, 1.0, 0.0):
        return Estimate(x_0, output)
    return Estimate(x_0, _combine((weights.of_x_t, x_t), (weights.of_output, output), (weights.of_x_0, x_0)))


def jump_weights(tables: Tables, t: int, s: int, coefficients: Sequence[float], before: int) -> JumpWeights:
    """The formula above, multiplied out.

    Args:
        tables: One schedule, on the CPU.
        t: The step of the image.
        s: The next one, -1 <= s < t.
        coefficients: c_0, c_1 .. c_{m-1}, d_1 .. d_{m-1}; all 0 is DDIM.
        before: How many earlier estimates there are; at most m - 1 of them are used.
    """
    order = (len(coefficients) + 1) // 2
    used = min(before, order - 1)
    c_0, c, d = coefficients[0], coefficients[1 : 1 + used], coefficients[order : order + used]
    signal, spread, h = _step_size(tables, t, s)
    return JumpWeights(
        of_x_0=signal * (1 + sum(d)),
        of_eps=spread + h * (c_0 + sum(c)),
        of_x_0_before=tuple(-signal * one for one in d),
        of_eps_before=tuple(-h * one for one in c),
    )


def solver_step(now: Estimate, before: Sequence[Estimate], weights: JumpWeights) -> Tensor:
    """x_s from the estimates of this step and of those before it, the last one first.

    Args:
        now: x̂_0 and ε̂ at t.
        before: Estimates of the steps visited before t; those that the weights do not name are not looked at.
        weights: `jump_weights` of the jump.
    """
    terms = [(weights.of_x_0, now.x_0), (weights.of_eps, now.eps)]
    for of_x_0, of_eps, one in zip(weights.of_x_0_before, weights.of_eps_before, before, strict=False):
        terms += [(of_x_0, one.x_0), (of_eps, one.eps)]
    return _combine(*terms)


def _step_size(tables: Tables, t: int, s: int) -> tuple[float, float, float]:
    """(√ᾱ_s, √(1-ᾱ_s), h); where σ_t is infinite, h is in units of x_t instead: -√ᾱ_s √(1-ᾱ_t)."""
    signal_t, spread_t = tables.alpha_bar[t].sqrt().item(), tables.one_minus_alpha_bar[t].sqrt().item()
    signal = 1.0 if s < 0 else tables.alpha_bar[s].sqrt().item()
    spread = 0.0 if s < 0 else tables.one_minus_alpha_bar[s].sqrt().item()
    return signal, spread, (spread * signal_t - signal * spread_t) / (signal_t or 1.0)


def _combine(*terms: tuple[float, Tensor]) -> Tensor:
    """Σ weight · tensor in one new tensor; terms of weight 0 are left out."""
    kept = [term for term in terms if term[0] != 0] or [terms[0]]
    total = kept[0][1] * kept[0][0]
    for weight, x in kept[1:]:
        total.add_(x, alpha=weight)
    return total


# -- whole chains -----------------------------------------------------------------------------------------------------


def solve(predict: Predict, x: Tensor, solver: Solver, tables: Tables) -> Iterator[Tensor]:
    """The state after each jump of a solver; the last one is x_0.

    Args:
        predict: The network, (x_t, t) -> Estimate.
        x: Noise at the solver's first step, shape (N, C, H, W).
        solver: Steps and coefficients.
        tables: One schedule, on the CPU.
    """
    before: tuple[Estimate, ...] = ()
    for t, s, row in zip(solver.times, solver.targets, solver.coefficients.tolist(), strict=True):
        now = predict(x, t)
        x = solver_step(now, before, jump_weights(tables, t, s, row, len(before)))
        before = (now, *before)[: solver.order - 1]
        yield x


def solve_reference(predict: Predict, x_T: Tensor, tables: Tables, num_steps: int = 200) -> Reference:
    """DDIM with η = 0 on a fine even grid, every state kept.

    Args:
        predict: The network, (x_t, t) -> Estimate; whether it clips decides which reference this is.
        x_T: Noise, shape (N, C, H, W).
        tables: One schedule, on the CPU.
        num_steps: Steps of the grid; at most T are taken.
    """
    times = tuple(respaced_timesteps("even", tables.num_timesteps, min(num_steps, tables.num_timesteps))[::-1])
    plain = Solver(times, torch.zeros(len(times), 1, dtype=torch.float64))
    return Reference((*times, -1), [x_T, *solve(predict, x_T, plain, tables)])


# -- the fit ----------------------------------------------------------------------------------------------------------


class _State(NamedTuple):
    """Where a chain that is being fitted stands before a jump."""

    x: Tensor
    now: Estimate
    before: tuple[Estimate, ...]
    rows: tuple[Tensor, ...]  # coefficients of the jumps before


def fit_solver(
    predict: Predict,
    reference: Reference,
    times: Sequence[int],
    order: int,
    tables: Tables,
    *,
    num_fit: int | None = None,
    with_x_0: bool = True,
    ridge: float = RIDGE,
) -> Fit:
    r"""The coefficients of given steps that bring every state nearest to the reference, jump after jump.

        min over c, d of Σ_n ‖x*_s - x_s‖²,   x_t the state that the fitted solver itself has reached

    so that later jumps mend the errors of earlier ones. One network call per step.

    Args:
        predict: The network, (x_t, t) -> Estimate.
        reference: A fine solution whose steps contain `times`.
        times: Steps to visit, descending; the first is the reference's.
        order: m >= 1, estimates per jump.
        tables: One schedule, on the CPU.
        num_fit: The first so many noises of the reference are fitted, the rest are held out and judged; None fits all.
        with_x_0: Whether the d are fitted, too. A reference that is not clipped, or whose ε̂ follows from the clipped
            x̂_0, is an equation for ε̂ alone: there the c suffice.
        ridge: Added to the diagonal of the normal equations, relative to it.

    Returns:
        The solver, and the mean squared distance of its images to the reference's.
    """
    return _Fitting(predict, reference, order, tables, num_fit, with_x_0, ridge).fit(tuple(times))


def power_times(grid: Sequence[int], num_steps: int, power: float) -> list[int]:
    """Positions on a grid for steps at (T - 1)(i/(K-1))^ρ: the first is 0, the last the grid's last.

    Args:
        grid: Steps of the reference, descending, without -1.
        num_steps: K, at most the length of the grid.
        power: ρ; the larger, the more steps at small t.
    """
    count = len(grid)
    if not 1 <= num_steps <= count:
        raise UserError(f"The number of steps must lie in 1..{count}, the steps of the reference, got {num_steps}.")
    if num_steps == 1:
        return [0]
    wanted = [grid[0] * (i / (num_steps - 1)) ** power for i in range(num_steps)][::-1]
    places = [min(range(count), key=lambda place: abs(grid[place] - t)) for t in wanted]
    for i in range(1, num_steps):  # steps that fell together move apart, to where there is room
        places[i] = max(places[i], places[i - 1] + 1)
    for i in range(num_steps):
        places[-1 - i] = min(places[-1 - i], count - 1 - i)
    return places


def choose_times(
    predict: Predict,
    reference: Reference,
    num_steps: int,
    order: int,
    tables: Tables,
    *,
    num_fit: int,
    with_x_0: bool = True,
    powers: Sequence[float] = POWERS,
    moves: Sequence[int] = MOVES,
    max_rounds: int = 3,
    ridge: float = RIDGE,
    on_trial: Callable[[float], None] | None = None,
) -> Fit:
    """The steps, and their fit, that bring x_0 nearest to the reference on noises that are not fitted.

    From the best of the power steps, coordinate descent over the positions on the reference's grid: each step but the
    first is moved by so many places to either side, largest moves first, and stays where the distance is smaller.

    Args:
        predict: The network, (x_t, t) -> Estimate.
        reference: A fine solution; its steps are the candidates.
        num_steps: K.
        order: m >= 1.
        tables: One schedule, on the CPU.
        num_fit: The first so many noises are fitted, the others judge.
        with_x_0: As in `fit_solver`.
        powers: The ρ of the power steps to begin with.
        moves: Sizes of the moves, in places of the grid.
        max_rounds: Rounds over all steps per size.
        ridge: As in `fit_solver`.
        on_trial: Called with the best distance so far after every trial.
    """
    fitting = _Fitting(predict, reference, order, tables, num_fit, with_x_0, ridge)
    grid, seen = reference.times[:-1], {}

    def trial(places: tuple[int, ...]) -> float:
        if places not in seen:
            seen[places] = fitting.fit(tuple(grid[place] for place in places)).squared_distance
            if on_trial is not None:
                on_trial(min(seen.values()))
        return seen[places]

    best = min((tuple(power_times(grid, num_steps, power)) for power in powers), key=trial)
    for move in moves:
        for _ in range(max_rounds):
            start = best
            for i in range(1, num_steps):
                for by in (-move, move):
                    moved = (*best[:i], best[i] + by, *best[i + 1 :])
                    inside = moved[i] < len(grid) and all(a < b for a, b in pairwise(moved))
                    if inside and trial(moved) < trial(best):
                        best = moved
            if best == start:
                break
    return fitting.fit(tuple(grid[place] for place in best))


def refine_solver(
    predict: Predict,
    reference: Reference,
    fit: Fit,
    tables: Tables,
    *,
    num_fit: int,
    with_x_0: bool = True,
    max_steps: int = 3,
    least_gain: float = 0.01,
) -> Fit:
    r"""Move all coefficients of a fitted solver together, so that its images and not its states come nearest.

        min over all c, d of Σ_n ‖x_0* - x_0‖²        by damped Gauss-Newton steps

    A jump's own fit cannot know what later jumps make of its error; these steps do. The derivatives are differences of
    two runs, so that the network is only ever called forwards. A step that does not bring the held-out images nearer
    is not taken.

    Args:
        predict: The network, (x_t, t) -> Estimate.
        reference: What the solver was fitted to.
        fit: What `fit_solver` or `choose_times` found.
        tables: One schedule, on the CPU.
        num_fit: The first so many noises are fitted, the others judge.
        with_x_0: As in `fit_solver`.
        max_steps: Gauss-Newton steps at most.
        least_gain: Stop when the distance falls by a smaller part than this.
    """
    x_T, wanted, held = reference.states[0], reference.states[-1], slice(num_fit, None)
    for _ in range(max_steps):
        entries = _free_entries(fit.solver, with_x_0)
        normal, right = _derivatives(predict, x_T[:num_fit], wanted[:num_fit], fit.solver, tables, entries)
        scale = normal.diagonal().sqrt().clamp(min=1e-30)
        tried = []
        for damping in DAMPINGS:
            damped = normal / scale / scale[:, None] + damping * torch.eye(len(scale), dtype=torch.float64)
            rows = fit.solver.coefficients.clone()
            rows[tuple(zip(*entries, strict=True))] += torch.linalg.solve(damped, right / scale) / scale
            solver = Solver(fit.solver.times, rows)
            *_, x_0 = solve(predict, x_T, solver, tables)
            tried.append(Fit(solver, _mean_square(wanted[held] - x_0[held])))
        best = min(tried, key=lambda one: one.squared_distance)
        gain = 1 - best.squared_distance / max(fit.squared_distance, 1e-30)
        fit = best if gain > 0 else fit
        if not gain >= least_gain:
            break
    return fit


def _free_entries(solver: Solver, with_x_0: bool) -> list[tuple[int, int]]:
    """Where coefficients stand that do something: jump i has i estimates before it."""
    order = solver.order
    return [
        (i, j)
        for i in range(len(solver.times))
        for j in [*range(min(i + 1, order)), *(range(order, order + min(i, order - 1)) if with_x_0 else ())]
    ]


def _derivatives(
    predict: Predict, x_T: Tensor, wanted: Tensor, solver: Solver, tables: Tables, entries: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Normal equations of x_0 in the coefficients, by differences: (J^T J, J^T (x_0* - x_0)), float64 on the CPU."""
    rows, dtype = solver.coefficients.tolist(), torch.float32 if x_T.device.type == "mps" else torch.float64

    def run(x: Tensor, before: tuple[Estimate, ...], start: int) -> Iterator[tuple[Tensor, Estimate, tuple]]:
        for i in range(start, len(rows)):
            now = predict(x, solver.times[i])
            yield x, now, before
            x = solver_step(now, before, weights_of(i, rows[i], before))
            before = (now, *before)[: solver.order - 1]
        yield x, Estimate(x, x), before

    def weights_of(i: int, row: Sequence[float], before: Sequence[Estimate]) -> JumpWeights:
        return jump_weights(tables, solver.times[i], solver.targets[i], row, len(before))

    states = list(run(x_T, (), 0))
    x_0, columns = states[-1][0], []
    for i, j in entries:
        _, now, before = states[i]
        unit = [float(k == j) for k in range(len(rows[i]))]
        plain, moved = (solver_step(now, before, weights_of(i, row, before)) for row in ([0.0] * len(unit), unit))
        nudge = NUDGE / max(_mean_square(moved - plain) ** 0.5, 1e-30)
        row = [c + nudge * one for c, one in zip(rows[i], unit, strict=True)]
        x = solver_step(now, before, weights_of(i, row, before))
        *_, (end, _, _) = run(x, (now, *before)[: solver.order - 1], i + 1)
        columns.append(((end - x_0) / nudge).flatten())
    columns.append((wanted - x_0).flatten())
    gram = torch.zeros(len(columns), len(columns), dtype=torch.float64)
    for parts in zip(*(column.split(2**20) for column in columns), strict=True):  # a bounded float64 copy
        some = torch.stack(parts).to(dtype)
        gram += (some @ some.T).to("cpu", torch.float64)
    return gram[:-1, :-1], gram[:-1, -1]


class _Fitting:
    """Fits of many choices of steps to one reference; chains that begin alike share their beginning."""

    def __init__(
        self,
        predict: Predict,
        reference: Reference,
        order: int,
        tables: Tables,
        num_fit: int | None,
        with_x_0: bool,
        ridge: float,
    ) -> None:
        self.predict, self.order, self.tables = predict, order, tables
        self.with_x_0, self.ridge = with_x_0, ridge
        self.states = dict(zip(reference.times, reference.states, strict=True))
        if order < 1:
            raise UserError(f"order must be at least 1, got {order}.")
        self.num_fit = len(reference.states[0]) if num_fit is None else num_fit
        if not 1 <= self.num_fit <= len(reference.states[0]):
            raise UserError(f"num_fit must lie in 1..{len(reference.states[0])}, got {self.num_fit}.")
        self.path: list[tuple[int, _State]] = []  # the chain fitted last, state by state

    def fit(self, times: tuple[int, ...]) -> Fit:
        missing = [t for t in times if t not in self.states]
        if missing or not times or list(times) != sorted(set(times), reverse=True) or times[-1] < 0:
            raise UserError(f"times must be descending steps of the reference, got {list(times)}.")
        if times[0] != max(self.states):
            raise UserError(f"times must begin where the reference does, at {max(self.states)}, got {times[0]}.")
        shared = 0
        while shared < min(len(times), len(self.path)) and self.path[shared][0] == times[shared]:
            shared += 1
        del self.path[shared:]
        for t in times[shared:]:
            self.path.append((t, self._arrive(t)))
        x_0, row = self._jump(times[-1], -1, self.path[-1][1])
        solver = Solver(times, torch.stack([*self.path[-1][1].rows, row]))
        held = slice(self.num_fit, None) if self.num_fit < len(x_0) else slice(None)
        return Fit(solver, _mean_square(self.states[-1][held] - x_0[held]))

    def _arrive(self, t: int) -> _State:
        if not self.path:
            x = self.states[t]
            return _State(x, self.predict(x, t), (), ())
        before, state = self.path[-1]
        x, row = self._jump(before, t, state)
        history = (state.now, *state.before)[: self.order - 1]
        return _State(x, self.predict(x, t), history, (*state.rows, row))

    def _jump(self, t: int, s: int, state: _State) -> tuple[Tensor, Tensor]:
        """The state at s under the best coefficients, and these."""
        now, before = state.now, state.before
        plain = solver_step(now, (), jump_weights(self.tables, t, s, [0.0], 0))
        signal, _, h = _step_size(self.tables, t, s)
        basis = [(h, now.eps, None)] + [(h, now.eps, one.eps) for one in before]
        basis += [(signal, now.x_0, one.x_0) for one in before if self.with_x_0]
        found = _least_squares(self.states[s] - plain, basis, self.num_fit, self.ridge)
        row = torch.zeros(2 * self.order - 1, dtype=torch.float64)
        row[: 1 + len(before)] = found[: 1 + len(before)]
        row[self.order : self.order + len(found) - 1 - len(before)] = found[1 + len(before) :]
        return solver_step(now, before, jump_weights(self.tables, t, s, row.tolist(), len(before))), row


def _least_squares(
    wanted: Tensor, basis: Sequence[tuple[float, Tensor, Tensor | None]], count: int, ridge: float, chunk: int = 64
) -> Tensor:
    """The weights of (scale, a, b), that is scale · (a - b), whose sum is nearest to `wanted` over the first images.

    The normal equations are summed in float64, a few images at a time, and solved with a unit diagonal; directions
    that the ridge leaves undetermined (an estimate that never changes) get 0.
    """
    size, dtype = len(basis), torch.float32 if wanted.device.type == "mps" else torch.float64
    gram = torch.zeros(size + 1, size + 1, dtype=torch.float64)
    for start in range(0, count, chunk):
        some = slice(start, min(start + chunk, count))
        rows = [scale * (a[some] if b is None else a[some] - b[some]).to(dtype) for scale, a, b in basis]
        columns = torch.stack([*rows, wanted[some].to(dtype)]).flatten(1)
        gram += (columns @ columns.T).to("cpu", torch.float64)
    normal, right = gram[:size, :size], gram[:size, size]
    scale = normal.diagonal().clamp(min=0).sqrt()
    scale = torch.where(scale > 0, scale, torch.inf)  # a column of zeros gets the weight 0
    normal = normal / scale / scale[:, None] + ridge * torch.eye(size, dtype=torch.float64)
    return torch.linalg.pinv(normal, hermitian=True, rtol=1e-13) @ (right / scale) / scale


def _mean_square(x: Tensor) -> float:
    return x.double().square().mean().item() if x.device.type != "mps" else x.square().mean().item()
