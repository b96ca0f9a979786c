"""Options of a command as fields of a frozen dataclass."""

from __future__ import annotations

from dataclasses import field
from typing import Any

__all__ = ["option"]


def option(default: Any, help: str) -> Any:
    """Return a dataclass field with its default and its help text."""
    return field(default=default, metadata={"help": help})
