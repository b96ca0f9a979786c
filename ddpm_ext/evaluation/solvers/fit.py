"""Network -> fitted solvers of a few calls: reference and fit over any number of processes, resumable, without data.

    noises x_T  ->  reference states (20 to 200 calls; pieces of noises)  ->  steps and coefficients (pieces of one K)

The noises are of seeds that no sample uses. A solver is as good as its reference and no better, and which reference is
best depends on the network, in how x̂_0 is clipped and in the number of its steps: it has to be measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import UNet2DModel
from torch import Tensor
from tqdm.auto import tqdm

from ...diffusion.reverse import split_output
from ...diffusion.schedules import respaced_timesteps
from ...diffusion.solver_fit import Fit, Problem, choose_times, fit_solver, refine_solver, restore_contrast
from ...diffusion.solvers import REFERENCES, Estimate, Predict, Reference, Solver, solve_reference
from ...diffusion.words import EXTENSION_KEY, ReferenceKind
from ...errors import UserError
from ...models.classes import classes_of
from ...models.values import image_size
from ...pipelines.config import GuidanceOptions, guidance_conditions
from ...pipelines.guidance import guided_prediction, make_guidance
from ...run_dir import JsonRecord
from ...schedulers.ddpm import DDPMExtScheduler
from ...schedulers.solver import DDPMExtSolverScheduler, solver_record

__all__ = [
    "REFERENCE_WORDS",
    "TIE",
    "Candidate",
    "FitOptions",
    "FittedNetwork",
    "best_reference",
    "fitted_scheduler",
    "reference_scheduler",
]

REFERENCE_WORDS = {
    "clipped": "x̂_0 clipped, ε̂ recomputed",
    "clipped_raw": "x̂_0 clipped, raw ε̂",
    "unclipped": "not clipped",
}
NOISE_SEED = 2**40  # noise i of a fit is drawn from seed + NOISE_SEED + i: no sample's
REFERENCE_SHARD = 128
MAX_BYTES = 8 * 2**30  # of the reference states
SEARCH_NOISES = 64  # that are fitted, and as many that judge, while steps are chosen: hundreds of choices of them
# Fréchet distances of a few hundred images differ by up to 5 % between sets of noises (docs/few_steps.md: 0.0428 ±
# 0.0017 and 24.3 ± 0.3 of 2,000). Candidates nearer than this are not told apart, and the first of them is taken.
TIE = 0.05

Run = Callable[[str, JsonRecord, int, int, Callable[[range], dict[str, Tensor]]], dict[str, Tensor]]


class Candidate(NamedTuple):
    """A reference that solvers can be fitted to."""

    kind: ReferenceKind
    steps: int  # network calls

    def __str__(self) -> str:
        return f"{self.kind}, {self.steps} calls"


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How solvers are fitted.

    Attributes:
        steps: The numbers of calls K.
        num_noises: Noises whose squared distance the coefficients minimise.
        num_held_out: Other noises, by whose distance the steps are chosen.
        order: Estimates that one jump uses.
        reference_steps: Calls of the references that may be fitted to; more than T are T.
        seed: Noise i is drawn from seed + 2^40 + i.
        batch_size: Images in one network call.
        guidance: Class guidance under which the solver will be used; None for none.
        max_rounds: Rounds of descent over the steps; 0 for the best power steps alone, a tenth of the work.
    """

    steps: tuple[int, ...]
    num_noises: int = 256
    num_held_out: int = 128
    order: int = 3
    reference_steps: tuple[int, ...] = (200,)
    seed: int = 0
    batch_size: int = 256
    guidance: GuidanceOptions | None = None
    max_rounds: int = 3

    def __post_init__(self) -> None:
        numbers = {name: (getattr(self, name),) for name in ("num_noises", "num_held_out", "order", "batch_size")}
        for name, values in {**numbers, "solver_steps": self.steps, "reference_steps": self.reference_steps}.items():
            for value in values:
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise UserError(f"{name} must be at least 1, got {value}.")
        if max(self.steps, default=1) > max(self.reference_steps, default=0):
            raise UserError(
                f"solver_steps must be at most {max(self.reference_steps, default=0)}, the calls of the longest "
                f"reference, got {max(self.steps)}."
            )


def best_reference(scores: dict[Candidate, float]) -> Candidate:
    """Return the candidate of the lowest score; of those within TIE of it, the first."""
    good = (1 + TIE) * min(scores.values())
    return next(candidate for candidate, score in scores.items() if score <= good)


class FittedNetwork:
    """The fits of one network.

    Args:
        unet: The network, on its device; labels of a class-conditional one go round its classes.
        scheduler: The model's scheduler.
        options: How.
        run: Does work in pieces over all processes, `Shards.run` of the model.
        is_main: Whether this process shows progress.
    """

    def __init__(
        self, unet: UNet2DModel, scheduler: DDPMExtScheduler, options: FitOptions, run: Run, is_main: bool = True
    ) -> None:
        self.unet, self.options, self.run, self.is_main = unet, options, run, is_main
        self.scheduler: DDPMExtSolverScheduler = DDPMExtSolverScheduler.from_config(scheduler.config)
        self.classes = classes_of(unet.config)
        self.guidance = make_guidance(unet.config, len(scheduler), **(options.guidance or {}))
        self.shape: tuple[int, ...] = (unet.config["in_channels"], *image_size(unet.config))
        self.count = options.num_noises + options.num_held_out
        T = len(self.scheduler)
        longest = max(options.steps, default=1)
        if longest > T:
            raise UserError(f"solver_steps must be at most T = {T}, got {longest}.")
        calls = {min(steps, T) for steps in options.reference_steps if min(steps, T) >= longest}
        self.reference_steps = sorted(calls, reverse=True)
        needed = 4 * self.count * (self.reference_steps[0] + 1) * math.prod(self.shape)
        if needed > MAX_BYTES:
            raise UserError(
                f"The reference of {self.count} noises takes {needed / 2**30:.0f} GiB of memory, more than "
                f"the {MAX_BYTES / 2**30:.0f} allowed: choose num_noises and num_held_out of "
                f"{int(self.count * MAX_BYTES / needed)} together."
            )

    @property
    def candidates(self) -> list[Candidate]:
        """What solvers can be fitted to, the finest first; a model that does not clip has one kind."""
        config = self.scheduler.config
        kinds = REFERENCES if config["clip_sample"] or config["thresholding"] else ("unclipped",)
        return [Candidate(kind, steps) for kind in kinds for steps in self.reference_steps]

    # -- pieces -----------------------------------------------------------------------------------------------------

    def reference(self, candidate: Candidate) -> Reference:
        """Measure a reference, a piece of noises at a time; states on the network's device."""

        def work(piece: range) -> dict[str, Tensor]:
            return {"states": torch.stack(list(self.solved(candidate, piece).states), 1).cpu()}

        key = {**self.key(candidate), "part": "reference"}
        states = self.run("reference", key, self.count, REFERENCE_SHARD, work)["states"]
        times = (*self.grid(candidate), -1)
        return Reference(times, [states[:, i].to(self.unet.device) for i in range(states.shape[1])])

    def images(self, candidate: Candidate) -> Tensor:
        """Measure the images of a reference alone, values in [0, 1], on the CPU."""

        def work(piece: range) -> dict[str, Tensor]:
            return {"images": (self.solved(candidate, piece).states[-1] / 2 + 0.5).clamp(0, 1).cpu()}

        key = {**self.key(candidate), "part": "images of a reference"}
        return self.run("candidates", key, self.count, REFERENCE_SHARD, work)["images"]

    def solved(self, candidate: Candidate, piece: range) -> Reference:
        """Return the reference of a piece of noises."""
        predict, tables = self.predict(candidate.kind, piece), self.scheduler.tables
        return solve_reference(predict, self.noises(piece), tables, candidate.steps)

    def fit(self, candidate: Candidate) -> dict[int, Fit]:
        """Fit a solver of every K to a reference, one K a piece."""
        options, reference = self.options, self.reference(candidate)
        steps = sorted(options.steps, reverse=True)  # the long ones first: processes end together

        def work(piece: range) -> dict[str, Tensor]:
            (K,) = (steps[i] for i in piece)
            fit = self.fit_one(K, candidate.kind, reference)
            distance = torch.tensor([fit.squared_distance], dtype=torch.float64)
            times = torch.tensor(fit.solver.times)
            return {"times": times, "coefficients": fit.solver.coefficients, "distance": distance}

        of_solver = {"steps": steps, "order": options.order, "rounds": options.max_rounds}
        key = {**self.key(candidate), "part": "solver with the contrast of its reference", **of_solver}
        tensors = self.run("solvers", key, len(steps), 1, work)
        times, rows = tensors["times"].split(steps), tensors["coefficients"].split(steps)
        fits = zip(steps, times, rows, tensors["distance"].tolist(), strict=True)
        return {K: Fit(Solver(tuple(t.tolist()), row), distance) for K, t, row, distance in reversed(list(fits))}

    def fit_one(self, K: int, kind: ReferenceKind, reference: Reference) -> Fit:
        """Choose the steps of K calls with some of the noises, and fit the coefficients with all of them.

        Args:
            K: Number of calls.
            kind: Which x̂_0 and ε̂.
            reference: Its states.
        """
        options, predict = self.options, self.predict(kind, range(self.count))
        whole = Problem(predict, reference, self.scheduler.tables, options.order, options.num_noises, clip=1.0)
        fitted, held = (min(SEARCH_NOISES, n) for n in (options.num_noises, options.num_held_out))
        some = [*range(fitted), *range(options.num_noises, options.num_noises + held)]
        search = whole.of_noises(some, fitted, self.predict(kind, some))
        with tqdm(desc=f"{K} calls", unit="trial", disable=not self.is_main, leave=False) as bar:

            def on_trial(best: float) -> None:
                bar.set_postfix(distance=f"{best:.3g}", refresh=False)
                bar.update()

            chosen = choose_times(search, K, max_rounds=options.max_rounds, on_trial=on_trial)
            fit = fit_solver(whole, chosen.solver.times)
            return restore_contrast(whole, refine_solver(whole, fit) if options.max_rounds else fit)

    # -- inside -----------------------------------------------------------------------------------------------------

    def grid(self, candidate: Candidate) -> list[int]:
        """Return the steps of a reference, descending."""
        return respaced_timesteps("even", len(self.scheduler), candidate.steps)[::-1]

    def key(self, candidate: Candidate) -> JsonRecord:
        """Return everything that the pieces depend on beside the model."""
        options = self.options
        return {
            "reference": candidate.kind,
            "reference_steps": candidate.steps,
            "noises": [options.num_noises, options.num_held_out],
            "seed": options.seed,
            **guidance_conditions(options.guidance),
        }

    def noises(self, numbers: range) -> Tensor:
        """Draw x_T of these numbers, each from its own seed."""
        made = [torch.Generator().manual_seed(self.options.seed + NOISE_SEED + i) for i in numbers]
        return torch.stack([torch.randn(self.shape, generator=one) for one in made]).to(self.unet.device)

    def ask(self, x_t: Tensor, t: int, labels: Tensor | None) -> Tensor:
        """Return the network's output as the pipeline has it: of the classes, guided where the options say so.

        Args:
            x_t: Shape (B, C, H, W).
            t: One step for all.
            labels: Classes, shape (B,), or None.
        """
        if labels is None:
            return self.unet(x_t, t).sample

        def network(x: Tensor, c: Tensor) -> Tensor:
            return self.unet(x, t, class_labels=c).sample

        if self.guidance is None:
            return network(x_t, labels)
        return guided_prediction(self.guidance, network, x_t, labels, t, (0, 1), self.scheduler)

    def predict(self, kind: ReferenceKind, numbers: Sequence[int]) -> Predict:
        """Return the network's estimates of the images of these numbers."""
        size = self.options.batch_size
        labels = None
        if self.classes is not None:
            labels = torch.tensor([i % self.classes.number for i in numbers], device=self.unet.device)
        learned = self.scheduler.config["variance_type"]

        @torch.no_grad()
        def predict(x_t: Tensor, t: int) -> Estimate:
            parts = []
            for start in range(0, len(x_t), size):
                some = x_t[start : start + size]
                mine = None if labels is None else labels[start : start + len(some)]
                output = self.ask(some.to(self.unet.dtype), t, mine).to(x_t.dtype)
                parts.append(self.scheduler.estimate(split_output(output, some, learned)[0], t, some, kind))
            return Estimate(torch.cat([part.x_0 for part in parts]), torch.cat([part.eps for part in parts]))

        return predict


def fitted_scheduler(
    scheduler: DDPMExtScheduler, reference: Candidate, fits: dict[int, Fit], options: FitOptions
) -> DDPMExtSolverScheduler:
    """Return the model's scheduler with these solvers, all that `_ddpm_ext` held before kept.

    Args:
        scheduler: The model's own.
        reference: What the solvers were fitted to.
        fits: Number of calls -> its solver.
        options: What the fits were made with.
    """
    ours: DDPMExtSolverScheduler = DDPMExtSolverScheduler.from_config(scheduler.config)
    notes = {
        K: {
            "squared_distance": float(f"{fit.squared_distance:.6g}"),
            "order": fit.solver.order,
            "num_noises": [options.num_noises, options.num_held_out],
        }
        for K, fit in fits.items()
    }
    record = solver_record(reference.kind, {K: fit.solver for K, fit in fits.items()}, ours, notes)
    record["setting"] |= {**guidance_conditions(options.guidance), "reference_steps": reference.steps}
    extra = {**(ours.config.get(EXTENSION_KEY) or {}), "solver": record}
    return DDPMExtSolverScheduler.from_config({**ours.config, EXTENSION_KEY: extra})


def reference_scheduler(scheduler: DDPMExtScheduler, reference: Candidate) -> DDPMExtSolverScheduler:
    """Return a scheduler that draws a reference itself: the plain solver on its even steps.

    Args:
        scheduler: The model's own.
        reference: Which.
    """
    ours: DDPMExtSolverScheduler = DDPMExtSolverScheduler.from_config(scheduler.config)
    times = respaced_timesteps("even", len(ours), min(reference.steps, len(ours)))[::-1]
    plain = Solver(tuple(times), torch.zeros(len(times), 2, dtype=torch.float64))
    record = solver_record(reference.kind, {len(times): plain}, ours, {})
    return DDPMExtSolverScheduler.from_config({**ours.config, EXTENSION_KEY: {"solver": record}})
