"""The options of a training run as one frozen dataclass, checked when it is built; what a resumed run may change.

The options themselves stand in `options.py`, ready ones in `presets.py`; `cli/arguments.py` lays YAML files and flags
over them.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from ..diffusion.words import LossOptions
from ..errors import UserError, did_you_mean
from ..options import check_options, option, required
from .options import (
    DataOptions,
    DiffusionOptions,
    EvaluationOptions,
    NetworkOptions,
    NumericsOptions,
    OptimizerOptions,
    RunOptions,
)

__all__ = [
    "BROUGHT",
    "NEUTRAL",
    "OF_SCHEDULE",
    "WIDEST",
    "Options",
    "ReconstructConfig",
    "TrainConfig",
    "config_changes",
    "recorded",
]

Options: TypeAlias = Mapping[str, object]  # name -> value, as config.json and state.json hold them
WIDEST = 0.28  # relative width of a power-function average, below which its exponent is above -1/2


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    EvaluationOptions, RunOptions, NumericsOptions, OptimizerOptions, DiffusionOptions, NetworkOptions, DataOptions
):
    """Every option of a training run.

    Raises:
        ValueError: an option is out of range, or two contradict each other; the sentence says what to do.

    Example:
        >>> TrainConfig(unet="digits", max_train_steps=1200, resolution="8").size
        (8, 8)
    """

    # Not options: which of them were given by hand, and whether those of the schedule are already init_from's.
    asked: frozenset[str] = dataclasses.field(default=frozenset(), metadata={"hidden": True}, compare=False, repr=False)
    resolved: bool = dataclasses.field(default=False, metadata={"hidden": True}, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_options(self)
        _check_allowed_changes(self)
        _check_ranges(self)
        _check_pairs(self)
        _check_data_and_network(self)
        _check_updates(self)
        _check_launch_and_evaluation(self)

    def loss_options(self, bits: int = 8) -> LossOptions:
        """Return what is minimised on images of this depth; a UserError where the words do not go together."""
        return LossOptions(self.loss, self.prediction_type, self.variance_type, self.snr_gamma, bits)

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of `resolution`."""
        if self.resolution is None:
            return None
        sides = [int(side) for side in str(self.resolution).split("x")]
        return (sides[0], sides[-1])

    @property
    def names_network(self) -> bool:
        """Whether a network was named; else Diffusers' script's is taken."""
        return (self.unet, self.model_config_name_or_path, self.init_from) != (None, None, None)


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """Options of `ddpm-ext reconstruct-ema`."""

    run: str = required("Run folder trained with --ema power_function.")
    sigma_rel: float = required("Relative width that is wanted.")
    update: int | None = option(None, "Update at which the average ends; none: the last.")
    output_dir: str | None = option(None, "Pipeline to write; none: pipeline-<width> in run.")

    def __post_init__(self) -> None:
        if not 0 < self.sigma_rel < WIDEST:
            raise UserError(f"sigma_rel must lie in (0, {WIDEST}), got {self.sigma_rel}.")
        if self.output_dir is None:
            object.__setattr__(self, "output_dir", f"{self.run.rstrip('/')}/pipeline-{self.sigma_rel:g}")


# Checks ---------------------------------------------------------------------------------------------------------------


def _check_allowed_changes(config: TrainConfig) -> None:
    """Refuse to let an option change that there is not."""
    known = [*(field.name for field in dataclasses.fields(TrainConfig)), "network", "data"]  # what options lead to
    for name in config.allow_config_change:
        if name not in known:
            raise UserError(f"allow_config_change names options, and there is no {name}.{did_you_mean(name, known)}")


def _check_ranges(config: TrainConfig) -> None:
    """What is written in figures lies where it has a meaning."""
    if config.resolution is not None and not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", str(config.resolution)):
        raise UserError(f"resolution must be like 32 or 24x32 (height x width), got {config.resolution!r}.")
    if any(not 0 < width < WIDEST for width in config.ema_sigma_rel):
        raise UserError(f"ema_sigma_rel must lie in (0, {WIDEST}), got {config.ema_sigma_rel}.")


def _check_pairs(config: TrainConfig) -> None:
    """Refuse two options that say the same thing."""
    for field in dataclasses.fields(config):
        other, why = field.metadata.get("excludes", (None, None))
        if other is not None and None not in (getattr(config, field.name), getattr(config, other)):
            raise UserError(f"{field.name} and {other} both {why}; give one of them.")


def _check_data_and_network(config: TrainConfig) -> None:
    if config.init_from is None or config.resolved:  # else the variance is not known yet
        config.loss_options()
    if config.init_from is not None and (config.unet or config.model_config_name_or_path) is not None:
        raise UserError("init_from brings its own network; leave unet and model_config_name_or_path out.")
    steps, sampled = config.ddpm_num_steps, config.ddpm_num_inference_steps
    if sampled > steps and sampled != TrainConfig.ddpm_num_inference_steps:
        raise UserError(f"ddpm_num_inference_steps must be at most ddpm_num_steps, {steps}, got {sampled}.")


def _check_updates(config: TrainConfig) -> None:
    if config.max_train_steps == 0 and config.init_from is None:
        raise UserError("max_train_steps must be at least 1, got 0; with init_from 0 exports what is there.")
    if config.max_train_steps is None and config.num_epochs is None:
        raise UserError("the length of the run is missing; give --max_train_steps or --num_epochs.")
    if config.lr_scheduler == "constant_with_warmup" and config.lr_warmup_steps == 0:
        raise UserError("constant_with_warmup needs --lr_warmup_steps of at least 1.")
    if config.ema == "power_function" and not config.ema_sigma_rel:
        raise UserError("the power-function average needs at least one width; give --ema_sigma_rel 0.05 0.10.")
    if config.ema == "power_function" and config.use_ema and config.lora_rank is not None:
        raise UserError(
            "power-function averages are of weights, not of the adapters of lora_rank; choose another --ema."
        )


def _check_launch_and_evaluation(config: TrainConfig) -> None:
    if config.local_rank not in (-1, int(os.environ.get("LOCAL_RANK", "-1"))):
        raise UserError(
            f"local_rank {config.local_rank} names one of several processes, and no launcher has started this one; "
            "start them with torchrun or accelerate launch, and leave --local_rank out."
        )
    if config.forecast is not None and not config.dry_run:
        raise UserError("forecast has an effect only with dry_run true: nothing is trained, nothing is allocated.")
    if config.double and config.mixed_precision != "no":
        raise UserError(
            f'double trains in float64, and mixed_precision is "{config.mixed_precision}"; drop one of them.'
        )
    if config.eval_metric == "bits_per_dim" and config.eval_split is None:
        raise UserError(
            'eval_metric "bits_per_dim" needs the held-out split that it is measured on; give --eval_split.'
        )


# Records and resuming -------------------------------------------------------------------------------------------------

# Options that init_from brings along -> the scheduler's name for each.
OF_SCHEDULE: dict[str, str] = {
    field.name: field.metadata["of_schedule"]
    for field in dataclasses.fields(TrainConfig)
    if "of_schedule" in field.metadata
}
# All that init_from brings along where it is not asked for.
BROUGHT = frozenset({*OF_SCHEDULE, "class_conditional"})
# What a resumed run may change freely: names, images and logs, never the weights.
NEUTRAL = frozenset(field.name for field in dataclasses.fields(TrainConfig) if field.metadata.get("neutral"))
_UNRECORDED = ("hub_token", "local_rank", "asked", "resolved")
# What an option was before there was a choice.
_BEFORE: Options = {
    "timestep_sampler": "uniform",
    "init_new_head": False,
    "freeze": [],
    "preserve_input_precision": False,
    "class_dropout": 0.0,
}


def recorded(config: TrainConfig) -> dict[str, object]:
    """Return the configuration as it is written to files: all of it but the token and the process's own number."""
    options = dataclasses.asdict(config)
    return {name: value for name, value in options.items() if name not in _UNRECORDED}


def config_changes(old: Options, new: Options) -> dict[str, tuple[object, object]]:
    """Options that alter the weights and differ: name -> (old, new); batch and length are compared in resume.py."""
    old = {**_BEFORE, **old}
    names = (old.keys() | new.keys()) - NEUTRAL
    if new.get("init_from") is not None and new["init_from"] == old.get("init_from"):
        names -= BROUGHT
    # None: an option that was not there.
    return {name: (old.get(name), new.get(name)) for name in sorted(names) if old.get(name) != new.get(name)}
