"""Expected errors, which a user sees as one sentence, and the smallest checks that raise them."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Collection

__all__ = ["HubError", "UsageError", "UserError", "check_word", "did_you_mean", "is_whole", "nearest"]


class UserError(ValueError):
    """An expected error: what a user can get wrong, shown as one sentence without a traceback.

    The message says what was expected, what came and what to do. Commands end with exit code 1 after it.
    """


class UsageError(UserError):
    """A command line that cannot be understood or contradicts itself. Commands end with exit code 2 after it."""


class HubError(UserError, OSError):
    """A push or a pull failed; the message is shown without a traceback."""


def check_word(name: str, word: object, words: Collection[str], error: type[UserError] = UserError) -> None:
    """Refuse a word that is not one of those allowed.

    Raises:
        UserError: with the list of the allowed words, and the one that was meant where one is near.
    """
    if word not in words:
        allowed, meant = ", ".join(map(repr, words)), did_you_mean(word, words)
        raise error(f"{name} must be one of {allowed}, got {word!r}.{meant}")


def did_you_mean(word: object, words: Collection[str]) -> str:
    """Return the sentence " Did you mean …?" with the word that is nearest to one that is not known; "" for none."""
    near = nearest(word, words)
    return f" Did you mean {near}?" if near else ""


def nearest(word: object, words: Collection[str]) -> str | None:
    """Return the one of some words whose letters are nearest to another's; None where none is near."""
    return next(iter(difflib.get_close_matches(str(word).lower(), [str(known) for known in words], n=1)), None)


def is_whole(number: object) -> bool:
    """Return true for what Python takes as an int: int, NumPy's and torch's integers, but no bool and no float."""
    try:
        return not isinstance(number, bool) and operator.index(number) is not None  # pyright: ignore[reportArgumentType]
    except TypeError:
        return False
