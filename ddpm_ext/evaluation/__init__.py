"""Scores of models, with their provenance."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .bound.bits_per_dim import BitsPerDim, RateDistortion, rate_distortion
    from .config import CalibrateConfig, EvalConfig

__all__ = ["BitsPerDim", "CalibrateConfig", "EvalConfig", "RateDistortion", "rate_distortion"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "bound.bits_per_dim": ("BitsPerDim", "RateDistortion", "rate_distortion"),
        "config": ("CalibrateConfig", "EvalConfig"),
    },
)
