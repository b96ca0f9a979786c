"""What the values of a network's images are, kept in its config where they are not plain 8-bit pixels."""

from __future__ import annotations

from typing import NamedTuple

from ..diffusion.words import EXTENSION_KEY, Arguments, Config
from ..errors import UserError

__all__ = ["Values", "value_options", "values_of"]


class Values(NamedTuple):
    """The depth of a network's images."""

    bits: int = 8  # levels 0 … 2^bits - 1 are x_0 = -1 … 1
    value_range: tuple[float, float] | None = None  # the stored values of the lowest and the highest level


def value_options(bits: int, value_range: tuple[float, float] | None = None) -> Arguments:
    """Return what a network's config says of the depth, under its key of ours; nothing for plain 8-bit images."""
    found: Arguments = {} if bits == 8 else {"bits": bits}
    return found if value_range is None else {**found, "value_range": list(value_range)}


def values_of(config: Config) -> Values:
    """Return the depth of a network's images by its config.

    Raises:
        UserError: bits that are none.
    """
    ours = config.get(EXTENSION_KEY) or {}
    bits, value_range = ours.get("bits", 8), ours.get("value_range")
    if not isinstance(bits, int) or not 1 <= bits <= 16:
        raise UserError(f"bits of the network's config must lie between 1 and 16, got {bits!r}.")
    return Values(bits, None if value_range is None else (float(value_range[0]), float(value_range[1])))
