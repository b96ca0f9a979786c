"""Checkpoints of other codes -> pipelines."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .config import ConvertError, ConvertOptions

__all__ = ["ConvertError", "ConvertOptions"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "config": (
            "ConvertError",
            "ConvertOptions",
        )
    },
)
