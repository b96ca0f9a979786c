"""Cards and uploads of runs."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .model_card import export_card, write_card
    from .publisher import Publisher, publish

__all__ = ["Publisher", "export_card", "publish", "write_card"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "model_card": (
            "export_card",
            "write_card",
        ),
        "publisher": (
            "Publisher",
            "publish",
        ),
    },
)
