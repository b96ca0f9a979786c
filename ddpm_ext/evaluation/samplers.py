"""Names -> schedulers: every way to draw images that an evaluation or a calibration compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypedDict, cast, get_args

from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from ..diffusion.words import EXTENSION_KEY
from ..errors import UserError, check_word
from ..schedulers.config import extension
from ..schedulers.ddpm import DDPMExtScheduler
from ..schedulers.solver import LAMBDA_MIN_OF_COSINE, DDPMExtSolverScheduler
from .words import Sampler

if TYPE_CHECKING:
    from ..schedulers.contract import Scheduler

__all__ = ["SAMPLERS", "STOCK_SETTINGS", "SamplerSetting", "ancestral", "chain_conditions", "make_scheduler"]


@dataclass(frozen=True)
class SamplerSetting:
    """One way to draw images from a network: a row of a table, a curve of a plot.

    Attributes:
        name: What the row and the curve are called; no two settings of a table share it.
        make: The pipeline's own scheduler -> the one that samples.
        when: "before" or "after" a calibration; None for neither.
    """

    name: str
    make: Callable[[Scheduler], Scheduler]
    when: str | None = None


class _Stock(NamedTuple):
    """A stock solver: its class, its options, and whether x̂_0 is clipped (None: as the model clips it)."""

    cls: type[DDIMScheduler | DPMSolverMultistepScheduler | UniPCMultistepScheduler]
    options: dict[str, object]
    clips: bool | None = None


# "ddpm" is the model's own ancestral chain, "solver" the one fitted to it; the others are stock's.
_SOLVERS = {
    "ddim": _Stock(DDIMScheduler, {}),
    "dpm++": _Stock(DPMSolverMultistepScheduler, {}),
    "dpm++-plain": _Stock(DPMSolverMultistepScheduler, {}, False),
    "dpm++-lu": _Stock(DPMSolverMultistepScheduler, {"use_lu_lambdas": True}, False),
    "dpm++3": _Stock(DPMSolverMultistepScheduler, {"solver_order": 3}, True),
    "unipc": _Stock(UniPCMultistepScheduler, {}, True),
    "unipc-plain": _Stock(UniPCMultistepScheduler, {}, False),
}
SAMPLERS = get_args(Sampler)


def ancestral(
    scheduler: Scheduler, variance_type: str | None = None, timestep_spacing: str | None = None
) -> DDPMExtScheduler:
    """Return the chain of DDPM itself with the noise schedule of a network's own scheduler.

    Args:
        scheduler: The pipeline's own.
        variance_type: Reverse variance; None for the scheduler's own.
        timestep_spacing: In place of the scheduler's own, and of a stored trajectory; None for those.
    """
    config = _config_of(scheduler, timestep_spacing)
    if variance_type is not None:
        config["variance_type"] = variance_type
    return DDPMExtScheduler.from_config(config)


def make_scheduler(
    scheduler: Scheduler, sampler: str = "ddpm", variance_type: str | None = None, timestep_spacing: str | None = None
) -> Scheduler:
    """Make the scheduler of a sampler with the noise schedule of a network's own.

    Stock solvers clip x̂_0 where the model does ("dpm++"), always ("dpm++3", "unipc") or never ("-plain", "-lu"), and
    start a cosine schedule at λ = -5.1: without either, a solver of order 2 follows the errors of the first steps to
    |x_0| in the thousands.

    Args:
        scheduler: The pipeline's own.
        sampler: One of SAMPLERS.
        variance_type: Reverse variance of "ddpm"; None for the scheduler's own.
        timestep_spacing: In place of the scheduler's own, and of a stored trajectory; None for those.

    Raises:
        UserError: an unknown word, or an option that the sampler does not have.
    """
    check_word("sampler", sampler, SAMPLERS)
    if sampler == "ddpm":
        return ancestral(scheduler, variance_type, timestep_spacing)
    if variance_type is not None:
        raise UserError(
            f'variance_type is an option of the sampler "ddpm"; "{sampler}" has none, got {variance_type!r}.'
        )
    config = _config_of(scheduler, timestep_spacing)
    if sampler == "solver":
        if timestep_spacing is not None:
            raise UserError(
                f'The sampler "solver" has steps of its own: leave timestep_spacing {timestep_spacing!r} out.'
            )
        return DDPMExtSolverScheduler.from_config(config)
    if config.get("prediction_type") == "posterior_mean":
        raise UserError(f'The sampler "{sampler}" knows no prediction_type "posterior_mean". Use "ddpm".')
    for name in ("variance_type", EXTENSION_KEY):  # of the ancestral chain; without a variance the head is dropped
        config.pop(name, None)
    solver = _SOLVERS[sampler]
    made = solver.cls.from_config({**config, **solver.options, **_changes(solver, config, sampler)})
    return cast("Scheduler", made)


def _config_of(scheduler: Scheduler, timestep_spacing: str | None) -> dict[str, object]:
    """Return a scheduler's options, under another spacing where one is given."""
    # Diffusers forgets values that were given by position: it notes them as defaults, and `from_config` drops those.
    config = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
    if timestep_spacing is None:
        return config
    ours = {name: value for name, value in (config.get(EXTENSION_KEY) or {}).items() if name != "trajectory"}
    return {**config, "timestep_spacing": timestep_spacing, EXTENSION_KEY: ours}


def _changes(solver: _Stock, config: dict[str, object], sampler: str) -> dict[str, object]:
    """Return the options of a multistep solver that follow from the model's: clipping and the start of a cosine."""
    if solver.cls is DDIMScheduler:
        return {}  # clips as DDPM does
    found: dict[str, object] = {"thresholding": config.get("thresholding", False)} if solver.clips is None else {}
    clips = config.get("clip_sample", False) and not found.get("thresholding") if solver.clips is None else solver.clips
    if clips and config.get("clip_sample_range", 1.0) != 1:
        raise UserError(
            f'The sampler "{sampler}" clips x̂_0 to [-1, 1] alone, and the model to ±{config["clip_sample_range"]:g}: '
            'use "ddpm", "ddim" or one that does not clip.'
        )
    if clips:  # stock's dynamic thresholding between 1 and 1 is static
        found |= {"thresholding": True, "sample_max_value": 1.0}
    elif solver.clips is False:
        found["thresholding"] = False
    if solver.cls is DPMSolverMultistepScheduler:
        found["algorithm_type"] = "dpmsolver++"
        if config.get("beta_schedule") == "squaredcos_cap_v2":
            found["lambda_min_clipped"] = LAMBDA_MIN_OF_COSINE
    return found


def _setting(name: str, sampler: str) -> SamplerSetting:
    return SamplerSetting(name, lambda scheduler: make_scheduler(scheduler, sampler))


STOCK_SETTINGS = (
    _setting("DDIM", "ddim"),
    _setting("DPM-Solver++ 2M", "dpm++-plain"),
    _setting("DPM-Solver++ 2M, lu lambdas", "dpm++-lu"),
    _setting("DPM-Solver++ 3M, clipped", "dpm++3"),
    _setting("UniPC", "unipc-plain"),
    _setting("UniPC, clipped", "unipc"),
)


class ChainConditions(TypedDict):
    """How a scheduler chooses its steps, by spacing or by trajectory, and its η: fields of a result."""

    timestep_spacing: str | None
    trajectory: str | None
    eta: float | None


def chain_conditions(scheduler: Scheduler) -> ChainConditions:
    """Return how a scheduler chooses its steps, and its η, which is 1 for DDPM."""
    spacing = scheduler.config["timestep_spacing"]
    if isinstance(scheduler, DDPMExtSolverScheduler):
        return {"timestep_spacing": None, "trajectory": "fitted", "eta": 0.0}
    if not isinstance(scheduler, DDPMExtScheduler):
        return {"timestep_spacing": spacing, "trajectory": None, "eta": None}
    extra = extension(scheduler.config)
    by_spacing = spacing if extra.trajectory is None else None
    return {"timestep_spacing": by_spacing, "trajectory": extra.trajectory, "eta": extra.eta}
