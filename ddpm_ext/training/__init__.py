"""Training runs: options, presets, and the run itself."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .config import TrainConfig
    from .presets import PRESETS
    from .run import train

__all__ = ["PRESETS", "TrainConfig", "train"]

__getattr__, __dir__ = lazy_names(__name__, {"config": ("TrainConfig",), "presets": ("PRESETS",), "run": ("train",)})
