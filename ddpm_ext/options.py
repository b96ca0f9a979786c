"""Options of a command as fields of a frozen dataclass."""

from __future__ import annotations

from dataclasses import field
from typing import Any

__all__ = ["option", "required"]


def option(default: Any, help: str, **rules: object) -> Any:
    """Return a dataclass field with its default, its help text and the rules that stand at it.

    Args:
        default: Its value where nobody gives one.
        help: What --help says.
        **rules: `at_least`, `above`, `below`: the range of a number. `neutral=True`: a resumed run may change it, since
            it alters no weight. `needs=(name, words)`: it has an effect only where another option has one of these
            values, or with True in place of the words any value but none. `replaces=(names)`: given by hand, it takes
            the place of a preset's values of these, which say the same thing another way. `excludes=(name, why)`: not
            both may be given, since both … what `why` says.
    """
    metadata = {"help": help, **rules}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def required(help: str) -> Any:
    """Return a dataclass field without a default, that a command line must give."""
    return field(metadata={"help": help})
