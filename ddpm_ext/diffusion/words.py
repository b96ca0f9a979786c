"""The words that options may take, and their check. Imports nothing heavy, so that command lines answer at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from ..errors import UserError

__all__ = [
    "LEARNED_VARIANCES",
    "SPACINGS",
    "BetaSchedule",
    "Cdf",
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
    "check_loss_options",
    "check_word",
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

LEARNED_VARIANCES = ("learned", "learned_range")
SPACINGS = get_args(TimestepSpacing)


def check_word(name: str, word: object, words: Sequence[str]) -> None:
    """Refuse a word that is not one of those allowed.

    Raises:
        UserError: with the list of the allowed words.
    """
    if word not in words:
        raise UserError(f"{name} must be one of {', '.join(map(repr, words))}, got {word!r}.")


def check_loss_options(loss: Loss, variance_type: VarianceType, snr_gamma: float | None) -> None:
    """Raise a UserError when a loss, a variance and a weighting do not go together.

    A learned variance needs a loss with the bound in it, hybrid needs something for the bound to teach, and min-SNR
    weights the simple loss only.
    """
    check_word("loss", loss, get_args(Loss))
    check_word("variance_type", variance_type, get_args(VarianceType))
    learned = variance_type in LEARNED_VARIANCES
    if loss == "simple" and learned:
        raise UserError(
            f'loss "simple" never trains the variance of variance_type "{variance_type}". Use loss "hybrid" or "vlb".'
        )
    if loss == "hybrid" and not learned:
        raise UserError(
            f'loss "hybrid" trains a variance head, but variance_type "{variance_type}" has none. Use loss "simple", '
            'or variance_type "learned_range".'
        )
    if snr_gamma is not None and (loss == "vlb" or not snr_gamma > 0):
        raise UserError(
            f'snr_gamma must be a positive number and weights loss "simple" or "hybrid", got {snr_gamma!r} with loss '
            f'"{loss}".'
        )
