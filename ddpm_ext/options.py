"""Options of a command as fields of a frozen dataclass, and what stands at a field: its words and its range."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import field, fields
from numbers import Integral
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import UserError, check_word

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["check_options", "option", "required"]


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


def check_options(options: DataclassInstance, error: type[UserError] = UserError) -> None:
    """Refuse a value of another type, a word that is not of its `Literal` and a number outside its range.

    Code builds options, too: a path is taken as its text, NumPy's whole number as Python's, a tuple as a list, and None
    passes where it stands for off.
    """
    for name, hint in get_type_hints(type(options)).items():
        value = plain = getattr(options, name)
        if isinstance(value, Integral) and not isinstance(value, bool):
            plain = int(value)
        elif isinstance(value, tuple):
            plain = list(value)
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if str in kinds and isinstance(plain, (os.PathLike, int)) and not isinstance(plain, bool):
            plain = os.fspath(plain) if isinstance(plain, os.PathLike) else str(plain)  # a resolution may be a number
        if plain is not value:
            object.__setattr__(options, name, plain)
        words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
        if words and (plain is not None or type(None) not in kinds):
            check_word(name, plain, words, error)
        elif not words and not any(_is_of(plain, kind) for kind in kinds):
            wanted = " or ".join(_KINDS.get(get_origin(kind) or kind, str(kind)) for kind in kinds)
            raise error(f"{name} must be {wanted}, got {plain!r}.")
    for one in fields(options):
        value = getattr(options, one.name)
        if isinstance(value, (int, float)) and (range_words := _out_of_range(one.metadata, value)):
            raise error(f"{one.name} must be {range_words}, got {value}.")


_KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    frozenset: "a frozenset",
    type(None): "None",
}


def _is_of(value: object, kind: Any) -> bool:
    """Whether a value is of the type of an option; True is no number, and a whole number does for another."""
    kind = get_origin(kind) or kind
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _out_of_range(rules: Mapping[str, Any], value: float) -> str:
    """Return in words the range that a value is outside of; "" where it is inside."""
    low, above, below = rules.get("at_least", -math.inf), rules.get("above", -math.inf), rules.get("below", math.inf)
    if not math.isfinite(value):
        return "a finite number"
    if low <= value < below and value > above:
        return ""
    if below < math.inf:
        if max(low, above) == -math.inf:
            return f"below {below}"
        return f"in ({above}, {below})" if above > -math.inf else f"in [{low}, {below})"
    return f"above {above}" if above > -math.inf else f"at least {low}"
