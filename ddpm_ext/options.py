"""Options of a command as fields of a frozen dataclass."""

from __future__ import annotations

from dataclasses import field
from typing import Any

__all__ = ["option", "required"]


def option(default: Any, help: str) -> Any:
    """Return a dataclass field with its default and its help text."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


def required(help: str) -> Any:
    """Return a dataclass field without a default, that a command line must give."""
    return field(metadata={"help": help})
