"""The words that options may take, which of them go together, and names in the files of Diffusers.

Imports nothing heavy, so that command lines answer at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import UserError, check_word

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
    "LossOptions",
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


@dataclass(frozen=True)
class LossOptions:
    """What training minimises. The words are checked, and that they go together.

    A learned variance needs a loss with the bound in it, hybrid needs something for the bound to teach, and min-SNR
    weights the simple loss only.

    Attributes:
        loss: "simple", "vlb" or "hybrid": the formulas stand at `losses.training_loss`.
        prediction_type: What the network predicts.
        variance_type: The reverse variance that vlb and hybrid judge.
        snr_gamma: γ of min-SNR weighting; None for none.
        bits: Depth of the images, whose levels L_0 counts.
    """

    loss: Loss = "simple"
    prediction_type: PredictionType = "epsilon"
    variance_type: VarianceType = "fixed_small"
    snr_gamma: float | None = None
    bits: int = 8

    def __post_init__(self) -> None:
        """Raise a UserError for an unknown word, or options that do not go together."""
        loss, variance_type, snr_gamma = self.loss, self.variance_type, self.snr_gamma
        check_word("loss", loss, get_args(Loss))
        check_word("prediction_type", self.prediction_type, get_args(PredictionType))
        check_word("variance_type", variance_type, get_args(VarianceType))
        learned = variance_type in LEARNED_VARIANCES
        if loss == "simple" and learned:
            raise UserError(
                f'loss "simple" never trains the variance of variance_type "{variance_type}". '
                'Use loss "hybrid" or "vlb".'
            )
        if loss == "hybrid" and not learned:
            raise UserError(
                f'loss "hybrid" trains a variance head, but variance_type "{variance_type}" has none. '
                'Use loss "simple", or variance_type "learned_range".'
            )
        if snr_gamma is not None and (loss == "vlb" or not snr_gamma > 0):
            raise UserError(
                'snr_gamma must be a positive number and weights loss "simple" or "hybrid", '
                f'got {snr_gamma!r} with loss "{loss}".'
            )
