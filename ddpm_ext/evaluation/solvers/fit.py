"""Network -> fitted solvers of a few calls: reference and fit over any number of processes, resumable, without data.

    noises x_T  ->  reference states (200 calls; pieces of noises)  ->  steps and coefficients (pieces of one K)

The noises are of seeds that no sample uses. A solver is as good as its reference and no better, and which of the three
references is best depends on the network: it has to be measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor
from tqdm.auto import tqdm

from ...diffusion.reverse import split_output
from ...diffusion.schedules import respaced_timesteps
from ...diffusion.solvers import (
    REFERENCES,
    Estimate,
    Fit,
    Predict,
    Reference,
    Solver,
    choose_times,
    refine_solver,
    solve_reference,
)
from ...diffusion.words import EXTENSION_KEY, ReferenceKind
from ...errors import UserError
from ...models.classes import classes_of
from ...pipelines.config import GuidanceOptions, guidance_conditions
from ...pipelines.guidance import guided_prediction, make_guidance
from ...schedulers.solver import DDPMExtSolverScheduler, solver_record

__all__ = [
    "REFERENCE_WORDS",
    "FitOptions",
    "FittedNetwork",
    "candidate_references",
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

Run = Callable[[str, dict[str, Any], int, int, Callable[[range], dict[str, Tensor]]], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How solvers are fitted.

    Attributes:
        steps: The numbers of calls K.
        num_noises: Noises whose squared distance the coefficients minimise.
        num_held_out: Other noises, by whose distance the steps are chosen.
        order: Estimates that one jump uses.
        reference_steps: Calls of the reference.
        seed: Noise i is drawn from seed + 2^40 + i.
        batch_size: Images in one network call.
        guidance: Class guidance under which the solver will be used; None for none.
        max_rounds: Rounds of descent over the steps; 0 for the best power steps alone, a tenth of the work.
    """

    steps: tuple[int, ...]
    num_noises: int = 256
    num_held_out: int = 128
    order: int = 3
    reference_steps: int = 200
    seed: int = 0
    batch_size: int = 256
    guidance: GuidanceOptions | None = None
    max_rounds: int = 3

    def __post_init__(self) -> None:
        for name in ("num_noises", "num_held_out", "order", "reference_steps", "batch_size", *self.steps):
            value = name if isinstance(name, int) else getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name if isinstance(name, str) else 'solver_steps'} must be at least 1, got {value}.")
        if self.steps and max(self.steps) > self.reference_steps:
            raise UserError(
                f"solver_steps must be at most {self.reference_steps}, the calls of the reference, got "
                f"{max(self.steps)}."
            )


def candidate_references(scheduler: Any) -> tuple[ReferenceKind, ...]:
    """Return what a model's solvers can be fitted to: one that does not clip has one reference."""
    config = scheduler.config
    return REFERENCES if config["clip_sample"] or config["thresholding"] else ("unclipped",)


class FittedNetwork:
    """The fits of one network.

    Args:
        unet: The network, on its device; labels of a class-conditional one go round its classes.
        scheduler: The model's scheduler.
        options: How.
        run: Does work in pieces over all processes, `Shards.run` of the model.
        is_main: Whether this process shows progress.
    """

    def __init__(self, unet: UNet2DModel, scheduler: Any, options: FitOptions, run: Run, is_main: bool = True) -> None:
        self.unet, self.options, self.run, self.is_main = unet, options, run, is_main
        self.scheduler: DDPMExtSolverScheduler = DDPMExtSolverScheduler.from_config(scheduler.config)
        self.classes = classes_of(unet.config)
        self.guidance = make_guidance(unet.config, **(options.guidance or {}))
        size: Any = unet.config["sample_size"]
        self.shape: tuple[int, ...] = (unet.config["in_channels"], *((size, size) if isinstance(size, int) else size))
        self.count = options.num_noises + options.num_held_out
        T = len(self.scheduler)
        self.grid = respaced_timesteps("even", T, min(options.reference_steps, T))[::-1]
        if max(options.steps, default=1) > T:
            raise UserError(f"solver_steps must be at most T = {T}, got {max(options.steps)}.")
        needed = 4 * self.count * (len(self.grid) + 1) * math.prod(self.shape)
        if needed > MAX_BYTES:
            raise UserError(
                f"The reference of {self.count} noises takes {needed / 2**30:.0f} GiB of memory, at most "
                f"{MAX_BYTES / 2**30:.0f} are taken: choose num_noises and num_held_out of "
                f"{int(self.count * MAX_BYTES / needed)} together."
            )

    # -- pieces -----------------------------------------------------------------------------------------------------

    def reference(self, kind: ReferenceKind) -> Reference:
        """Measure the reference of a kind, a piece of noises at a time; states on the network's device."""

        def work(piece: range) -> dict[str, Tensor]:
            found = solve_reference(
                self.predict(kind, piece), self.noises(piece), self.scheduler.tables, len(self.grid)
            )
            return {"states": torch.stack(list(found.states), 1).cpu()}

        key = {**self.key(kind), "part": "reference"}
        states = self.run("reference", key, self.count, REFERENCE_SHARD, work)["states"]
        return Reference((*self.grid, -1), [states[:, i].to(self.unet.device) for i in range(states.shape[1])])

    def fit(self, kind: ReferenceKind, reference: Reference | None = None) -> dict[int, Fit]:
        """Fit a solver of every K to a reference, one K a piece."""
        options, found = self.options, reference or self.reference(kind)
        steps = sorted(options.steps, reverse=True)  # the long ones first: processes end together

        def work(piece: range) -> dict[str, Tensor]:
            (K,) = (steps[i] for i in piece)
            with tqdm(desc=f"{K} calls", unit="trial", disable=not self.is_main, leave=False) as bar:

                def on_trial(best: float) -> None:
                    bar.set_postfix(distance=f"{best:.3g}", refresh=False)
                    bar.update()

                predict, tables = self.predict(kind, range(self.count)), self.scheduler.tables
                shared: dict[str, Any] = {"num_fit": options.num_noises, "with_x_0": True}
                rounds = options.max_rounds
                fit = choose_times(
                    predict, found, K, options.order, tables, max_rounds=rounds, on_trial=on_trial, **shared
                )
                if rounds:
                    fit = refine_solver(predict, found, fit, tables, **shared)
            distance = torch.tensor([fit.squared_distance], dtype=torch.float64)
            times = torch.tensor(fit.solver.times)
            return {"times": times, "coefficients": fit.solver.coefficients, "distance": distance}

        key = {**self.key(kind), "part": "solver", "steps": steps, "order": options.order, "rounds": options.max_rounds}
        tensors = self.run("solvers", key, len(steps), 1, work)
        times, rows = tensors["times"].split(steps), tensors["coefficients"].split(steps)
        fits = zip(steps, times, rows, tensors["distance"].tolist(), strict=True)
        return {K: Fit(Solver(tuple(t.tolist()), row), distance) for K, t, row, distance in reversed(list(fits))}

    # -- inside -----------------------------------------------------------------------------------------------------

    def key(self, kind: ReferenceKind) -> dict[str, Any]:
        """Return everything that the pieces depend on beside the model."""
        options = self.options
        return {
            "reference": kind,
            "reference_steps": len(self.grid),
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

    def predict(self, kind: ReferenceKind, numbers: range) -> Predict:
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


def fitted_scheduler(scheduler: Any, kind: ReferenceKind, fits: dict[int, Fit], options: FitOptions) -> Any:
    """Return the model's scheduler with these solvers, all that `_ddpm_ext` held before kept.

    Args:
        scheduler: The model's own.
        kind: The reference that the solvers were fitted to.
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
    record = solver_record(kind, {K: fit.solver for K, fit in fits.items()}, ours, notes)
    record["setting"] |= {
        **guidance_conditions(options.guidance),
        "reference_steps": min(options.reference_steps, len(ours)),
    }
    extra = {**(ours.config.get(EXTENSION_KEY) or {}), "solver": record}
    return DDPMExtSolverScheduler.from_config({**ours.config, EXTENSION_KEY: extra})


def reference_scheduler(scheduler: Any, kind: ReferenceKind, steps: int) -> Any:
    """Return a scheduler that draws a reference itself: the plain solver on the fine grid.

    Args:
        scheduler: The model's own.
        kind: Which reference.
        steps: Those of the fine grid.
    """
    ours: DDPMExtSolverScheduler = DDPMExtSolverScheduler.from_config(scheduler.config)
    times = respaced_timesteps("even", len(ours), min(steps, len(ours)))[::-1]
    plain = Solver(tuple(times), torch.zeros(len(times), 1, dtype=torch.float64))
    record = solver_record(kind, {len(times): plain}, ours, {})
    return DDPMExtSolverScheduler.from_config({**ours.config, EXTENSION_KEY: {"solver": record}})
