"""What a network's config says of its images: their size, and their values where they are not plain 8-bit pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..diffusion.words import EXTENSION_KEY, Arguments, Config
from ..errors import UserError

__all__ = ["Values", "check_bands", "image_size", "value_options", "values_of"]


class Values(NamedTuple):
    """The depth of a network's images."""

    bits: int = 8  # levels 0 … 2^bits - 1 are x_0 = -1 … 1
    value_range: tuple[float, float] | None = None  # the stored values of the lowest and the highest level

    def __str__(self) -> str:
        """Say the depth: "12 bits for values of 0 to 4095"."""
        of = "" if self.value_range is None else " for values of {:g} to {:g}".format(*self.value_range)
        return f"{self.bits} bit{'s' * (self.bits > 1)}{of}"


def image_size(config: Config) -> tuple[int, int]:
    """Return (H, W) of a network's images by its config.

    Raises:
        UserError: it names none.
    """
    size = config.get("sample_size")
    if size is None:
        raise UserError(
            "The network's config names no sample_size: pass latents of the size you want, or write it there."
        )
    return (size, size) if isinstance(size, int) else (size[0], size[1])


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


def check_bands(rgb_bands: Sequence[int] | None, channels: int | None = None) -> None:
    """Refuse bands to be shown that are not three, or that the images have not.

    Args:
        rgb_bands: Counted from 1; None, for those shown by default, passes.
        channels: C of the images; None where it is not known yet.
    """
    if rgb_bands is None:
        return
    if len(rgb_bands) != 3 or min(rgb_bands) < 1:
        raise UserError(f"rgb_bands must be three numbers from 1, as 3 2 1, got {list(rgb_bands)}.")
    if channels is not None and max(rgb_bands) > channels:
        raise UserError(
            f"rgb_bands {' '.join(map(str, rgb_bands))} must lie between 1 and {channels}, the bands of the images."
        )
