"""Samplers of a few network calls side by side: one row each, the same noises in every cell.

A row is a fitted solver, one of its references with all its calls, a stock solver, or the model's own long chain. A
cell holds the Fréchet distance to real images and, where the sampler turns x_T alone into an image, the mean squared
distance of its features to those of the reference that was fitted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...run_dir import JsonRecord
from ...schedulers.contract import Scheduler
from ...schedulers.ddpm import DDPMExtScheduler
from ...schedulers.solver import DDPMExtSolverScheduler, fitted_solvers
from ..features.extractors import Extractor, extract
from ..features.metrics import FeatureStatistics, feature_statistics, frechet_distance
from ..features.samples import Drawing
from ..results import Result
from ..samplers import STOCK_SETTINGS, SamplerSetting, ancestral, make_scheduler
from ..words import Quantization
from .fit import REFERENCE_WORDS, Candidate, FittedNetwork, reference_scheduler

if TYPE_CHECKING:
    from ...data.dataset import ImageSet
    from ..features.samples import SampleFeatures

__all__ = [
    "FEW_STEPS",
    "FewStepScore",
    "compare",
    "few_step_results",
    "fitted_setting",
    "own_solver",
    "reference_setting",
    "score_references",
    "stock_settings",
]

FEW_STEPS = 20  # from here down a table carries the stock solvers
Draw = Callable[[Scheduler, int, int], Tensor]  # (scheduler, K, number of the seed) -> features of the samples, (N, d)
# What stock solvers raise where they do not go together with a model (no such prediction, ᾱ_T = 0, too few steps).
_STOCK_REFUSES = (ValueError, NotImplementedError, FloatingPointError, IndexError, RuntimeError)


@dataclass(frozen=True)
class FewStepScore:
    """One cell.

    Attributes:
        sampler: Name of the row.
        kind: "fitted", "reference", "stock" or "chain".
        num_inference_steps: Network calls.
        value: Fréchet distance, mean over the seeds.
        values: That of each seed.
        squared_distance: Mean squared distance of the features to the reference's from the same x_T; None where the
            sampler draws more noise, or nothing is fitted.
    """

    sampler: str
    kind: str
    num_inference_steps: int
    value: float
    values: list[float]
    squared_distance: float | None = None

    @property
    def std(self) -> float | None:
        """Deviation over the seeds; None of one."""
        return torch.tensor(self.values, dtype=torch.float64).std().item() if len(self.values) > 1 else None

    def to_json(self) -> JsonRecord:
        """Return the cell as it is written to files."""
        return {**asdict(self), "std": self.std}


def fitted_setting(kind: str, scheduler: Scheduler) -> SamplerSetting:
    """Return the row of a fitted solver."""
    return SamplerSetting(f"fitted ({REFERENCE_WORDS[kind]})", lambda _: scheduler)


def reference_setting(scheduler: DDPMExtScheduler, reference: Candidate) -> SamplerSetting:
    """Return the row of a reference by itself.

    Args:
        scheduler: The model's own.
        reference: Which.
    """
    made = reference_scheduler(scheduler, reference)
    return SamplerSetting(f"reference, {reference.steps} calls ({REFERENCE_WORDS[reference.kind]})", lambda _: made)


def score_references(
    network: FittedNetwork,
    candidates: Sequence[Candidate],
    extractor: Extractor,
    real: FeatureStatistics,
    kind: Quantization = "uint8",
) -> dict[Candidate, float]:
    """Return the Fréchet distance of each candidate's own images to real ones, all from the same noises.

    Args:
        network: Draws them.
        candidates: Which.
        extractor: Makes the features.
        real: What they are compared with.
        kind: The pixel quantization.
    """
    scores = {}
    for candidate in candidates:
        batches = network.images(candidate).to(extractor.device).split(network.options.batch_size)
        scores[candidate] = frechet_distance(real, feature_statistics(extract(extractor, batches, kind).features))
    return scores


def stock_settings(spacings: Sequence[str] = ()) -> list[SamplerSetting]:
    """Return the rows of Diffusers' own solvers.

    Args:
        spacings: More rows, under these timestep spacings in place of the model's own.
    """
    found = list(STOCK_SETTINGS)
    for spacing in spacings:
        for setting in STOCK_SETTINGS:
            if "lu lambdas" not in setting.name:  # these choose their steps themselves

                def make(scheduler: Any, setting: SamplerSetting = setting, spacing: str = spacing) -> Any:
                    config = {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}
                    return setting.make(type(scheduler).from_config({**config, "timestep_spacing": spacing}))

                found.append(SamplerSetting(f"{setting.name}, {spacing}", make))
    return found


def compare(
    draw: Draw,
    real: FeatureStatistics,
    scheduler: Scheduler,
    plan: Sequence[tuple[str, SamplerSetting, Sequence[int]]],
    num_seeds: int,
    near: tuple[SamplerSetting, int] | None = None,
    left_out: dict[str, str] | None = None,
) -> Iterator[FewStepScore]:
    """Measure every cell of a plan, all under the same seeds.

    Args:
        draw: Draws samples under a scheduler and returns their features.
        real: What they are compared with.
        scheduler: The model's own.
        plan: (kind, setting, numbers of calls) of each row.
        num_seeds: Sets of samples of a cell.
        near: The reference, and its calls, to which squared distances are measured.
        left_out: Takes the stock rows that cannot be drawn with this model, and why.
    """
    base = make_scheduler(scheduler)
    targets = [] if near is None else [draw(near[0].make(base), near[1], seed) for seed in range(num_seeds)]
    for kind, setting, steps in plan:
        for K in steps:
            try:
                made = setting.make(base)
                found = [draw(made, K, seed) for seed in range(num_seeds)]
            except _STOCK_REFUSES as error:
                if kind != "stock":
                    raise
                if left_out is not None:
                    left_out[f"{setting.name}, {K} calls"] = str(error).splitlines()[0]
                continue
            values = [frechet_distance(real, feature_statistics(features)) for features in found]
            gaps = [(a.double() - b).square().mean().item() for a, b in zip(found, targets, strict=False)]
            deterministic = kind != "chain" and gaps
            yield FewStepScore(
                setting.name,
                kind,
                K,
                sum(values) / len(values),
                values,
                sum(gaps) / len(gaps) if deterministic else None,
            )


def few_step_results(
    features: SampleFeatures,
    images: ImageSet,
    fitted: DDPMExtSolverScheduler | None,
    steps: Sequence[int],
    num_samples: int,
    num_seeds: int = 1,
) -> Iterator[Result]:
    """Measure the rows that belong beside samplers of a few steps: the fitted solver, its reference, every stock one.

    Args:
        features: The model, its reference and its samples.
        images: What samples are compared with.
        fitted: A DDPMExtSolverScheduler with solvers; None where none are fitted.
        steps: Numbers of calls of the stock rows; a fitted row has those of them that were fitted.
        num_samples: Samples of a set.
        num_seeds: Sets of a cell.
    """
    runner = features.runner
    real, base = features.reference(images), ancestral(runner.scheduler)

    def draw(scheduler: Scheduler, K: int, number: int) -> Tensor:
        drawing = Drawing(num_samples=num_samples, steps=K, seed=runner.config.seed + number * num_samples)
        return features.draw(scheduler, images, drawing).features.features

    plan: list[tuple[str, SamplerSetting, Sequence[int]]] = []
    near = None
    if fitted is not None and (known := fitted_solvers(fitted.config)) is not None:
        calls = int(known.setting.get("reference_steps", 200))
        row = reference_setting(base, Candidate(known.reference, calls))
        near = (row, calls)
        there = [K for K in steps if K in known.solvers]
        plan.append(("fitted", fitted_setting(known.reference, fitted), there))
        plan.append(("reference", row, [calls]))
    plan += [("stock", setting, list(steps)) for setting in stock_settings()]
    left_out: dict[str, str] = {}
    of_samples = features.conditions(images, len(real.features), num_samples)
    for score in compare(draw, real.statistics, base, plan, num_seeds, near, left_out):
        distance = score.squared_distance
        yield runner.result(
            "fid",
            sampler=score.sampler,
            when="after" if score.kind == "fitted" else None,
            num_inference_steps=score.num_inference_steps,
            value=score.value,
            values=score.values if num_seeds > 1 else None,
            std=score.std,
            parts=None if distance is None else {"squared_distance": distance},
            **of_samples,
        )
    for name, reason in left_out.items():
        if runner.is_main:
            warnings.warn(f"{name} cannot be drawn with this model and is left out: {reason}", stacklevel=2)


def own_solver(scheduler: Scheduler) -> DDPMExtSolverScheduler | None:
    """Return the fitted solver that a model comes with; None where it has none."""
    found = fitted_solvers(scheduler.config)
    return None if found is None else DDPMExtSolverScheduler.from_config(scheduler.config)
