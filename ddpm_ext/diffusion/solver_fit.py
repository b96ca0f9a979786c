r"""The fit of a solver to one network by least squares: nothing is trained, no gradient is taken.

Jump after jump, c and d bring the state that the solver itself has reached nearest to the network's own fine solution,
the *reference*:

    min over c, d of Σ_n ‖x*_s - x_s‖²

so that later jumps mend the errors of earlier ones (`fit_solver`). The steps are those whose images come nearest on
noises that are not fitted (`choose_times`), all coefficients are then moved together (`refine_solver`), and the last
jump gives the images the contrast that least squares takes from them (`restore_contrast`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from .images import clip_x_0
from .schedules import Tables, widest_float
from .solvers import (
    Estimate,
    JumpWeights,
    Predict,
    Reference,
    Solver,
    jump_size,
    jump_weights,
    solve,
    solver_step,
)

__all__ = ["Fit", "Problem", "choose_times", "fit_solver", "power_times", "refine_solver", "restore_contrast"]

RIDGE = 1e-6  # of the diagonal of the normal equations
POWERS = (1.0, 1.5, 2.0, 2.5)
MOVES = (8, 4, 2, 1)
DAMPINGS = (1e-3, 1e-2, 1e-1)  # of a Gauss-Newton step, relative to the diagonal of its equations
NUDGE = 3e-3  # root mean square change of x_s by which derivatives are taken
DERIVATIVE_NOISES = 128  # enough for the few dozen coefficients of a solver


@dataclass(frozen=True)
class Problem:
    """What solvers are fitted to.

    Attributes:
        predict: The network, (x_t, t) -> Estimate.
        reference: A fine solution; its steps are those that a solver may visit.
        tables: One schedule, on the CPU.
        order: m >= 1, estimates per jump.
        num_fit: The first so many noises of the reference are fitted, the rest are held out and judge; None fits all,
            and all judge.
        with_x_0: Whether the d are fitted, too. A reference that is not clipped, or whose ε̂ follows from the clipped
            x̂_0, is an equation for ε̂ alone: there the c suffice.
        clip: Images are compared as they are shown, clipped to ±clip; None: as they are.
        ridge: Added to the diagonal of the normal equations, relative to it.
    """

    predict: Predict
    reference: Reference
    tables: Tables
    order: int
    num_fit: int | None = None
    with_x_0: bool = True
    clip: float | None = None
    ridge: float = RIDGE

    def __post_init__(self) -> None:
        if self.order < 1:
            raise UserError(f"order must be at least 1, got {self.order}.")
        if not 1 <= self.fitted <= self.count:
            raise UserError(f"num_fit must lie in 1..{self.count}, got {self.fitted}.")

    @property
    def count(self) -> int:
        """The number of noises."""
        return len(self.reference.states[0])

    @property
    def fitted(self) -> int:
        """The number of those that are fitted."""
        return self.count if self.num_fit is None else self.num_fit

    def shown(self, x_0: Tensor) -> Tensor:
        """Return images as they are compared."""
        return clip_x_0(x_0, self.clip)

    def squared_distance(self, x_0: Tensor) -> float:
        """Return the mean over the noises that judge, and dimensions, of (x_0* - x_0)²."""
        held = slice(self.fitted, None) if self.fitted < self.count else slice(None)
        return _mean_square(self.shown(self.reference.states[-1][held]) - self.shown(x_0[held]))

    def of_noises(self, places: Sequence[int], num_fit: int, predict: Predict) -> Problem:
        """Return the problem of some of the noises alone.

        Args:
            places: Which of them.
            num_fit: As above, of these.
            predict: The network for these.
        """
        states = [state[list(places)] for state in self.reference.states]
        return replace(self, predict=predict, reference=Reference(self.reference.times, states), num_fit=num_fit)


class Fit(NamedTuple):
    """A fitted solver and how near it comes to its reference."""

    solver: Solver
    squared_distance: float  # `Problem.squared_distance` of its images


# -- jump after jump --------------------------------------------------------------------------------------------------


def fit_solver(problem: Problem, times: Sequence[int]) -> Fit:
    """The coefficients of given steps that bring every state nearest to the reference; one network call per step.

    Args:
        problem: What is fitted.
        times: Steps to visit, descending; the first is the reference's.
    """
    return _Fitting(problem).fit(tuple(times))


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
    problem: Problem,
    num_steps: int,
    *,
    powers: Sequence[float] = POWERS,
    moves: Sequence[int] = MOVES,
    max_rounds: int = 3,
    on_trial: Callable[[float], None] | None = None,
) -> Fit:
    """The steps, and their fit, that bring x_0 nearest to the reference on noises that are not fitted.

    From the best of the power steps, coordinate descent over the positions on the reference's grid: each step but the
    first is moved by so many places to either side, largest moves first, and stays where the distance is smaller.

    Args:
        problem: What is fitted.
        num_steps: K.
        powers: The ρ of the power steps to begin with.
        moves: Sizes of the moves, in places of the grid.
        max_rounds: Rounds over all steps per size.
        on_trial: Called with the best distance so far after every trial.
    """
    fitting, grid, seen = _Fitting(problem), problem.reference.times[:-1], {}

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


class _State(NamedTuple):
    """Where a chain that is being fitted stands before a jump."""

    x: Tensor
    now: Estimate
    before: tuple[Estimate, ...]
    rows: tuple[Tensor, ...]  # coefficients of the jumps before


class _Fitting:
    """Fits of many choices of steps to one reference; chains that begin alike share their beginning."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.states = dict(zip(problem.reference.times, problem.reference.states, strict=True))
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
        return Fit(solver, self.problem.squared_distance(x_0))

    def _arrive(self, t: int) -> _State:
        if not self.path:
            x = self.states[t]
            return _State(x, self.problem.predict(x, t), (), ())
        before, state = self.path[-1]
        x, row = self._jump(before, t, state)
        history = (state.now, *state.before)[: self.problem.order - 1]
        return _State(x, self.problem.predict(x, t), history, (*state.rows, row))

    def _jump(self, t: int, s: int, state: _State) -> tuple[Tensor, Tensor]:
        """The state at s under the best coefficients, and these."""
        problem, now, before = self.problem, state.now, state.before
        plain = solver_step(now, (), jump_weights(problem.tables, t, s, [0.0, 0.0], 0))
        signal, _, h = jump_size(problem.tables, t, s)
        basis = [(h, now.eps, None)] + [(h, now.eps, one.eps) for one in before]
        if problem.with_x_0:
            basis += [(signal, now.x_0, None)] + [(signal, now.x_0, one.x_0) for one in before]
        found = _least_squares(self.states[s] - plain, basis, problem.fitted, problem.ridge)
        row, used, order = torch.zeros(2 * problem.order, dtype=torch.float64), 1 + len(before), problem.order
        row[:used] = found[:used]
        row[order : order + len(found) - used] = found[used:]
        return solver_step(now, before, jump_weights(problem.tables, t, s, row.tolist(), len(before))), row


def _least_squares(
    wanted: Tensor, basis: Sequence[tuple[float, Tensor, Tensor | None]], count: int, ridge: float, chunk: int = 64
) -> Tensor:
    """The weights of (scale, a, b), that is scale · (a - b), whose sum is nearest to `wanted` over the first images.

    The normal equations are summed in float64, a few images at a time, and solved with a unit diagonal; directions
    that the ridge leaves undetermined (an estimate that never changes) get 0.
    """
    size, dtype = len(basis), widest_float(wanted.device)
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


# -- the whole chain --------------------------------------------------------------------------------------------------


def refine_solver(problem: Problem, fit: Fit, *, max_steps: int = 3, least_gain: float = 0.01) -> Fit:
    r"""Move all coefficients of a fitted solver together, so that its images and not its states come nearest.

        min over all c, d of Σ_n ‖x_0* - x_0‖²        by damped Gauss-Newton steps

    A jump's own fit cannot know what later jumps make of its error; these steps do. The derivatives are differences of
    two runs, so that the network is only ever called forwards. A step that does not bring the held-out images nearer
    is not taken.

    Args:
        problem: What the solver was fitted to.
        fit: What `fit_solver` or `choose_times` found.
        max_steps: Gauss-Newton steps at most.
        least_gain: Stop when the distance falls by a smaller part than this.
    """
    for _ in range(max_steps):
        entries = _free_entries(fit.solver, problem.with_x_0)
        normal, right = _derivatives(problem, fit.solver, entries)
        scale = normal.diagonal().sqrt().clamp(min=1e-30)
        tried = []
        for damping in DAMPINGS:
            damped = normal / scale / scale[:, None] + damping * torch.eye(len(scale), dtype=torch.float64)
            rows = fit.solver.coefficients.clone()
            rows[tuple(zip(*entries, strict=True))] += torch.linalg.solve(damped, right / scale) / scale
            tried.append(_judge(problem, Solver(fit.solver.times, rows)))
        best = min(tried, key=lambda one: one.squared_distance)
        gain = 1 - best.squared_distance / max(fit.squared_distance, 1e-30)
        fit = best if gain > 0 else fit
        if not gain >= least_gain:
            break
    return fit


def restore_contrast(problem: Problem, fit: Fit) -> Fit:
    r"""Scale the last jump so that the images vary as the reference's do: Var x_0 = Var x_0* over the fitted noises.

    Least squares draws every image towards the mean of those that it cannot tell apart: their variance is too small by
    the squared distance. A factor on x_0 gives it back; it is found by fixed-point steps, as images are clipped.

    Args:
        problem: What the solver was fitted to.
        fit: What was found.
    """
    *_, x_0 = solve(problem.predict, problem.reference.states[0], fit.solver, problem.tables)
    some = slice(None, problem.fitted)
    wanted, gain = _variance(problem.shown(problem.reference.states[-1][some])), 1.0
    for _ in range(30):
        there = _variance(problem.shown(gain * x_0[some]))
        if not (there > 0 and wanted > 0) or abs(there / wanted - 1) < 1e-6:
            break
        gain = min(max(gain * (wanted / there) ** 0.5, 1.0), 2.0)  # given back, never taken
    rows, order = fit.solver.coefficients.clone(), fit.solver.order
    rows[-1] *= gain
    rows[-1, order] += gain - 1  # 1 + d_0 is the weight
    return Fit(Solver(fit.solver.times, rows), problem.squared_distance(gain * x_0))


def _judge(problem: Problem, solver: Solver) -> Fit:
    *_, x_0 = solve(problem.predict, problem.reference.states[0], solver, problem.tables)
    return Fit(solver, problem.squared_distance(x_0))


def _free_entries(solver: Solver, with_x_0: bool) -> list[tuple[int, int]]:
    """Where coefficients stand that do something: jump i has i estimates before it."""
    order = solver.order
    return [
        (i, j)
        for i in range(len(solver.times))
        for start in ((0, order) if with_x_0 else (0,))
        for j in range(start, start + min(i + 1, order))
    ]


def _derivatives(problem: Problem, solver: Solver, entries: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Normal equations of x_0 in the coefficients, by differences: (J^T J, J^T (x_0* - x_0)), float64 on the CPU."""
    some = slice(None, min(problem.fitted, DERIVATIVE_NOISES))
    x_T, wanted = problem.reference.states[0][some], problem.reference.states[-1][some]
    rows, dtype = solver.coefficients.tolist(), widest_float(x_T.device)

    def run(x: Tensor, before: tuple[Estimate, ...], start: int) -> Iterator[tuple[Tensor, Estimate, tuple]]:
        for i in range(start, len(rows)):
            now = problem.predict(x, solver.times[i])
            yield x, now, before
            x = solver_step(now, before, weights_of(i, rows[i], before))
            before = (now, *before)[: solver.order - 1]
        yield problem.shown(x), Estimate(x, x), before

    def weights_of(i: int, row: Sequence[float], before: Sequence[Estimate]) -> JumpWeights:
        return jump_weights(problem.tables, solver.times[i], solver.targets[i], row, len(before))

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
    columns.append((problem.shown(wanted) - x_0).flatten())
    gram = torch.zeros(len(columns), len(columns), dtype=torch.float64)
    for parts in zip(*(column.split(2**20) for column in columns), strict=True):  # a bounded float64 copy
        part = torch.stack(parts).to(dtype)
        gram += (part @ part.T).to("cpu", torch.float64)
    return gram[:-1, :-1], gram[:-1, -1]


def _mean_square(x: Tensor) -> float:
    return x.to(widest_float(x.device)).square().mean().item()


def _variance(images: Tensor) -> float:
    """Mean over dimensions of the variance over images."""
    return _mean_square(images - images.mean(0))
