"""Which files are images: the formats that Pillow tells by their first bytes, and what it raises for broken ones."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import IO

from PIL import Image

from .files import Unreadable, read_bytes

__all__ = ["NO_IMAGES", "UNREADABLE", "image_formats", "is_image", "opened"]

# Pillow lists these as images, but they are stubs, films, pages of text or lists of bytes.
NO_IMAGES = {"BUFR", "GRIB", "HDF5", "MPEG", "EPS", "WMF", "IPTC", "XVTHUMB"}
# What Pillow raises for a file that is no image, is cut short, or claims to be absurdly large.
UNREADABLE = (
    *(OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError),
    *(TypeError, IndexError, KeyError, OverflowError, struct.error, zlib.error),  # its parsers, on damaged headers
)


@contextmanager
def opened(encoded: bytes | str | None) -> Iterator[IO[bytes]]:
    """The file of an encoded image."""
    if encoded is None:
        raise Unreadable("the row is empty")
    if isinstance(encoded, str) and "://" not in encoded:
        with open(encoded, "rb") as file:
            yield file
    else:
        yield io.BytesIO(encoded if isinstance(encoded, bytes) else read_bytes(encoded))


def is_image(path: str) -> bool:
    """Whether a file is an image by its first bytes; one behind a URL is not looked at."""
    if path.startswith(("hf://", "http://", "https://")):
        return False
    try:
        with opened(path) as file, Image.open(file, formats=image_formats()):
            return True
    except UNREADABLE:
        return False


@cache
def image_formats() -> list[str]:
    """The formats that Pillow tells by their first bytes."""
    Image.init()
    return [name for name, (_, accept) in Image.OPEN.items() if accept is not None and name not in NO_IMAGES]
