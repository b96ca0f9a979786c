"""The scheduler's options as one typed record, parsed and checked once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import get_args

from ..diffusion import images
from ..diffusion.schedules import Tables, warn_if_signal_remains
from ..diffusion.words import (
    EXTENSION_KEY,
    LEARNED_VARIANCES,
    SPACINGS,
    Config,
    PredictionType,
    TimestepSpacing,
    Trajectory,
    VarianceType,
)
from ..errors import UserError, check_word

__all__ = [
    "OF_WEIGHTS",
    "Extension",
    "GuidanceSetting",
    "SchedulerOptions",
    "check_terminal_snr",
    "extension",
    "guidance_setting",
    "read_options",
    "warn_of_other_guidance",
]


@dataclass(frozen=True)
class GuidanceSetting:
    """The class guidance that something was measured or is used with; equal ones guide alike.

    Attributes:
        scale: w; 0 is none.
        interval: (low, high): guided at low <= t <= high only; None for everywhere.
        rescale: φ.
        guider: Name of a guider of Diffusers with a formula of its own; None for ours.
    """

    scale: float = 0.0
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    guider: str | None = None

    def __str__(self) -> str:
        if self.guider is not None:
            return self.guider
        if not self.scale:
            return "no guidance"
        interval = "" if self.interval is None else " at {:g} <= t <= {:g}".format(*self.interval)
        return f"guidance_scale {self.scale:g}{interval}" + (f", rescaled {self.rescale:g}" if self.rescale else "")


# Fields of the extension that were measured or fitted for one network's weights.
OF_WEIGHTS = (
    *("mse_eps", "ms_eps", "standard_error", "trajectories", "solver"),
    *("guidance_scale", "guidance_interval", "guidance_rescale"),
)


def guidance_setting(record: Config, T: int) -> GuidanceSetting:
    """Return the guidance that a record holds under the names of the pipeline's options; what is missing is none.

    Args:
        record: guidance_scale, guidance_interval, guidance_rescale.
        T: Steps of the chain: an interval of all of them is none.
    """
    low, high = record.get("guidance_interval") or (0, T - 1)
    whole = low <= 0 and high >= T - 1
    scale, rescale = float(record.get("guidance_scale") or 0), float(record.get("guidance_rescale") or 0)
    return GuidanceSetting(scale, None if whole else (low, high), rescale) if scale else GuidanceSetting()


def warn_of_other_guidance(what: str, there: GuidanceSetting, here: GuidanceSetting) -> None:
    """Warn when what was measured or fitted with one guidance is used with another."""
    if there != here:
        warnings.warn(
            f"{what} with {there}, and the network is used with {here}: not the best there. Calibrate with this "
            "guidance.",
            stacklevel=4,
        )


@dataclass(frozen=True)
class Extension:
    """What a scheduler keeps in `_ddpm_ext` beside stock's options.

    Attributes:
        mse_eps: Measured E mean_dims (ε - ε̂)² per step, T numbers; variance_type "analytic" and optimal trajectories
            need it.
        ms_eps: Measured E mean_dims ε̂² per step, for comparison with Analytic-DPM's own estimate.
        eta: η of the DDIM family: 1 is DDPM, 0 is DDIM's mean, deterministic with the fixed variances.
        trajectory: How `set_timesteps(K)` chooses its steps: "even" or "optimal"; None is `timestep_spacing`.
        trajectories: Optimal trajectories found before, K -> ascending code indices.
        standard_error: Standard errors of mse_eps, T numbers.
        solver: Fitted solvers of DDPMExtSolverScheduler; see `schedulers.solver.fitted_solvers`.
        guidance_scale: w of the class guidance that the errors were measured with; 0 is none.
        guidance_interval: Its steps (low, high); None for all.
        guidance_rescale: Its φ.
    """

    mse_eps: Sequence[float] | None = None
    ms_eps: Sequence[float] | None = None
    eta: float = 1.0
    trajectory: Trajectory | None = None
    trajectories: Mapping[str, Sequence[int]] = field(default_factory=dict)
    standard_error: Sequence[float] | None = None
    solver: Config | None = None
    guidance_scale: float = 0.0
    guidance_interval: Sequence[float] | None = None
    guidance_rescale: float = 0.0


@dataclass(frozen=True)
class SchedulerOptions:
    """The options of `DDPMExtScheduler` that a step needs; their meaning stands there."""

    num_train_timesteps: int
    variance_type: VarianceType
    prediction_type: PredictionType
    clip_sample: bool
    clip_sample_range: float
    thresholding: bool
    dynamic_thresholding_ratio: float
    sample_max_value: float
    timestep_spacing: TimestepSpacing
    steps_offset: int
    extension: Extension

    @property
    def clip(self) -> images.Clip:
        """How x̂_0 is bounded: a number, a function, or None."""
        if self.thresholding:
            return partial(
                images.threshold_x_0, quantile=self.dynamic_thresholding_ratio, max_value=self.sample_max_value
            )
        return self.clip_sample_range if self.clip_sample else None

    @property
    def lacks_errors(self) -> bool:
        """Whether the analytic variance waits for measured errors."""
        return self.variance_type == "analytic" and self.extension.mse_eps is None


def read_options(config: Config) -> SchedulerOptions:
    """Return the options of a config, checked.

    Args:
        config: Every option by name, and `_ddpm_ext` where there is one.

    Raises:
        UserError: an option that is not one of its words or outside its range, or a wrong field (`extension`).
    """
    names = [f.name for f in fields(SchedulerOptions) if f.name != "extension"]
    values = {name: config[name] for name in names}
    check_word("variance_type", values["variance_type"], get_args(VarianceType))
    check_word("prediction_type", values["prediction_type"], get_args(PredictionType))
    if values["timestep_spacing"] == "even":
        raise UserError(
            'timestep_spacing "even" is no spacing of Diffusers: keep one of '
            f'{", ".join(map(repr, SPACINGS))} and choose set_timesteps(K, trajectory="even"), or '
            f'{{"trajectory": "even"}} in {EXTENSION_KEY}.'
        )
    check_word("timestep_spacing", values["timestep_spacing"], SPACINGS)
    T = values["num_train_timesteps"]
    rules: tuple[tuple[str, Callable[[float], bool], str], ...] = (
        ("clip_sample_range", lambda v: v > 0, "a positive number"),
        ("sample_max_value", lambda v: v > 0, "a positive number"),
        ("dynamic_thresholding_ratio", lambda v: 0 <= v <= 1, "between 0 and 1"),
        ("steps_offset", lambda v: isinstance(v, int) and 0 <= v < T, f"an int from 0 to {T - 1}"),
    )
    for name, fits, expected in rules:
        if not fits(values[name]):
            raise UserError(f"{name} must be {expected}, got {values[name]!r}.")
    return SchedulerOptions(**values, extension=extension(config))


def extension(config: Config) -> Extension:
    """Return the extension's fields of a config, checked.

    Raises:
        UserError: an unknown field, a list that does not hold one number per step, η outside [0, 1], a trajectory
            that is not as many ascending steps as its key says, or a field that contradicts the variance.
    """
    values = config.get(EXTENSION_KEY) or {}
    if not isinstance(values, Mapping):
        raise UserError(f"{EXTENSION_KEY} must hold fields by name, got {values!r}.")
    for name in values:
        check_word(f"a field of {EXTENSION_KEY}", name, [f.name for f in fields(Extension)])
    found = Extension(**values)
    T = config["num_train_timesteps"]
    for name in ("mse_eps", "ms_eps", "standard_error"):
        if getattr(found, name) is not None:
            _check_per_step(name, getattr(found, name), T)
    _check_trajectories(found.trajectories, T)
    if not _are((int, float), [found.eta]) or not 0 <= found.eta <= 1:
        raise UserError(f"eta must lie between 0 (DDIM) and 1 (DDPM), got {found.eta!r}.")
    if found.eta != 1 and config["variance_type"] in LEARNED_VARIANCES:
        raise UserError(
            f"eta = {found.eta} fixes the noise of the DDIM family, which variance_type "
            f'"{config["variance_type"]}" learns. Use a fixed variance or "analytic".'
        )
    _check_guidance(found)
    if found.trajectory is not None:
        check_word("trajectory", found.trajectory, get_args(Trajectory))
    return found


def _are(kind: type | tuple[type, ...], values: Sequence[object]) -> bool:
    """Whether all values are of a kind, booleans being none. By their types, of which there are few."""
    return all(issubclass(t, kind) and t is not bool for t in set(map(type, values)))


def _check_guidance(found: Extension) -> None:
    if not _are((int, float), [found.guidance_scale]) or not 0 <= found.guidance_scale < math.inf:
        raise UserError(f"guidance_scale must be a number of at least 0, got {found.guidance_scale!r}.")
    if not _are((int, float), [found.guidance_rescale]) or not 0 <= found.guidance_rescale <= 1:
        raise UserError(f"guidance_rescale must lie between 0 and 1, got {found.guidance_rescale!r}.")
    ends = found.guidance_interval
    if ends is not None and (len(ends) != 2 or not _are((int, float), ends) or not ends[0] <= ends[1]):
        raise UserError(f"guidance_interval must be two steps with low <= high, got {ends!r}.")


def _check_per_step(name: str, numbers: object, T: int) -> None:
    expected = f"{name} must be a list of {T} finite numbers of at least 0, one per step, got "
    if not isinstance(numbers, list | tuple):
        raise UserError(f"{expected}{type(numbers).__name__}.")
    if len(numbers) != T:
        raise UserError(f"{expected}{len(numbers)}.")
    if _are((int, float), numbers) and min(numbers) >= 0 and math.isfinite(sum(numbers)):
        return  # the quick way: a NaN makes the sum NaN
    for step, value in enumerate(numbers):
        if not _are((int, float), [value]) or not 0 <= value < math.inf:
            raise UserError(f"{expected}{value!r} at step {step}.")


def _check_trajectories(trajectories: object, T: int) -> None:
    if not isinstance(trajectories, Mapping):
        raise UserError(f"trajectories must map a number of steps to its steps, got {trajectories!r}.")
    for K, times in trajectories.items():
        listed = list(times) if isinstance(times, list | tuple) else []
        fits = bool(listed) and K == str(len(listed)) and _are(int, listed)
        if not fits or listed != sorted(set(listed)) or listed[0] < 0 or listed[-1] >= T:
            raise UserError(
                f'trajectories must map "K" to K strictly ascending steps from 0 to {T - 1}, as "3": [0, 5, {T - 1}], '
                f"got {K!r}: {times!r}. Calibrate again."
            )


def check_terminal_snr(options: SchedulerOptions, tables: Tables) -> None:
    """Refuse epsilon prediction where ᾱ_T = 0 is sure to be visited; warn where ᾱ_T is far from 0."""
    gone = tables.alpha_bar[-1].item() == 0
    if gone and options.prediction_type == "epsilon" and options.timestep_spacing != "leading":
        raise UserError(
            f"timestep_spacing {options.timestep_spacing!r} visits the last step, whose signal is gone (ᾱ_T = 0): "
            'epsilon prediction is undefined there. Use prediction_type "v_prediction" or "sample".'
        )
    warn_if_signal_remains(tables)
