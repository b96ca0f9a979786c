"""Which loss, variance and weighting go together. Imports nothing heavy, so that command lines answer at once."""

from __future__ import annotations

from typing import get_args

from ..errors import UserError, check_word
from .words import LEARNED_VARIANCES, Loss, VarianceType

__all__ = ["check_loss_options"]


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
