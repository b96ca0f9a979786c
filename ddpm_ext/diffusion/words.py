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
    "TimestepSampler",
    "TimestepSpacing",
    "Trajectory",
    "TrajectoryCost",
    "VarianceType",
    "check_word",
]

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid"]
TimestepSpacing = Literal["linspace", "leading", "trailing"]
PredictionType = Literal["epsilon", "sample", "v_prediction", "posterior_mean"]
VarianceType = Literal[
    "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range", "analytic"
]
DecoderVariance = Literal["base", "respaced"]
Cdf = Literal["tanh", "exact"]
Loss = Literal["simple", "vlb", "hybrid"]
TimestepSampler = Literal["uniform", "loss_aware"]
Trajectory = Literal["even", "optimal"]
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
