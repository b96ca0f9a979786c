"""The words that options may take, and names in the files of Diffusers.

Imports nothing heavy, so that command lines answer at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

__all__ = [
    "EXTENSION_KEY",
    "INDEX",
    "LEARNED_VARIANCES",
    "SPACINGS",
    "Arguments",
    "BetaSchedule",
    "Cdf",
    "Config",
    "DecoderVariance",
    "Loss",
    "PredictionType",
    "ReferenceKind",
    "TimestepSampler",
    "TimestepSpacing",
    "TrainedVariance",
    "Trajectory",
    "TrajectoryCost",
    "VarianceType",
]

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid"]
TimestepSpacing = Literal["linspace", "leading", "trailing"]
PredictionType = Literal["epsilon", "sample", "v_prediction", "posterior_mean"]
TrainedVariance = Literal[
    "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"
]  # analytic is measured after a training
VarianceType = Literal[TrainedVariance, "analytic"]
DecoderVariance = Literal["base", "respaced"]
Cdf = Literal["tanh", "exact"]
Loss = Literal["simple", "vlb", "hybrid"]
TimestepSampler = Literal["uniform", "loss_aware"]
Trajectory = Literal["even", "optimal"]
ReferenceKind = Literal["clipped", "clipped_raw", "unclipped"]  # what a solver is fitted to
TrajectoryCost = Literal["analytic", "fixed_small", "fixed_large"]

Config = Mapping[str, Any]  # options of a scheduler, a network or a pipeline of Diffusers by name
Arguments = dict[str, Any]  # the same, while they are being put together
INDEX = "model_index.json"  # in the folder of a saved pipeline: names its parts
# The one key of ours in the configs of Diffusers: stock classes neither warn about nor drop a leading "_".
EXTENSION_KEY = "_ddpm_ext"
LEARNED_VARIANCES = ("learned", "learned_range")
SPACINGS = get_args(TimestepSpacing)
