"""The scheduler's options: their words and ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from ..diffusion.schedules import Tables, warn_if_signal_remains
from ..diffusion.words import LEARNED_VARIANCES, SPACINGS, PredictionType, Trajectory, VarianceType, check_word
from ..errors import UserError

EXTENSION_KEY = "_ddpm_ext"  # the one config key of ours: stock classes neither warn about nor drop a leading "_"


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
    """

    mse_eps: Sequence[float] | None = None
    ms_eps: Sequence[float] | None = None
    eta: float = 1.0
    trajectory: Trajectory | None = None
    trajectories: Mapping[str, Sequence[int]] = field(default_factory=dict)
    standard_error: Sequence[float] | None = None
    solver: Mapping[str, Any] | None = None


def extension(config: Mapping[str, Any]) -> Extension:
    """The extension's fields of a config, checked.

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
    if found.trajectory is not None:
        check_word("trajectory", found.trajectory, get_args(Trajectory))
    return found


def _are(kind: type | tuple[type, ...], values: Sequence[Any]) -> bool:
    """Whether all values are of a kind, booleans being none. By their types, of which there are few."""
    return all(issubclass(t, kind) and t is not bool for t in set(map(type, values)))


def _check_per_step(name: str, numbers: Any, T: int) -> None:
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


def _check_trajectories(trajectories: Any, T: int) -> None:
    if not isinstance(trajectories, Mapping):
        raise UserError(f"trajectories must map a number of steps to its steps, got {trajectories!r}.")
    for K, times in trajectories.items():
        listed: list[Any] = list(times) if isinstance(times, list | tuple) else []
        fits = bool(listed) and K == str(len(listed)) and _are(int, listed)
        if not fits or listed != sorted(set(listed)) or listed[0] < 0 or listed[-1] >= T:
            raise UserError(
                f'trajectories must map "K" to K strictly ascending steps from 0 to {T - 1}, as "3": [0, 5, {T - 1}], '
                f"got {K!r}: {times!r}. Calibrate again."
            )


def check_options(config: Mapping[str, Any]) -> None:
    """Raise a UserError for an option that is not one of its words or outside its range."""
    check_word("variance_type", config["variance_type"], get_args(VarianceType))
    check_word("prediction_type", config["prediction_type"], get_args(PredictionType))
    if config["timestep_spacing"] == "even":
        raise UserError(
            'timestep_spacing "even" is no spacing of Diffusers: keep one of '
            f'{", ".join(map(repr, SPACINGS))} and choose set_timesteps(K, trajectory="even"), or '
            f'{{"trajectory": "even"}} in {EXTENSION_KEY}.'
        )
    check_word("timestep_spacing", config["timestep_spacing"], SPACINGS)
    ranges = {
        "clip_sample_range": (config["clip_sample_range"] > 0, "a positive number"),
        "sample_max_value": (config["sample_max_value"] > 0, "a positive number"),
        "dynamic_thresholding_ratio": (0 <= config["dynamic_thresholding_ratio"] <= 1, "between 0 and 1"),
        "steps_offset": (
            isinstance(config["steps_offset"], int) and 0 <= config["steps_offset"] < config["num_train_timesteps"],
            f"an int from 0 to {config['num_train_timesteps'] - 1}",
        ),
    }
    for name, (fits, expected) in ranges.items():
        if not fits:
            raise UserError(f"{name} must be {expected}, got {config[name]!r}.")
    extension(config)


def check_terminal_snr(config: Mapping[str, Any], tables: Tables) -> None:
    """Refuse epsilon prediction where ᾱ_T = 0 is sure to be visited; warn where ᾱ_T is far from 0."""
    gone = tables.alpha_bar[-1].item() == 0
    if gone and config["prediction_type"] == "epsilon" and config["timestep_spacing"] != "leading":
        raise UserError(
            f"timestep_spacing {config['timestep_spacing']!r} visits the last step, whose signal is gone (ᾱ_T = 0): "
            'epsilon prediction is undefined there. Use prediction_type "v_prediction" or "sample".'
        )
    warn_if_signal_remains(tables)
