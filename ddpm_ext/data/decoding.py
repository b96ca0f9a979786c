"""One picture file -> pixels: uint8 (C, H, W), with Pillow alone.

    encoded file -> upright (EXIF) -> 8 bits -> no hidden colour under alpha -> C channels -> cropped to (H, W)

Channels are the network's: 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha; any other number repeats a grey picture.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
# What Pillow raises for a file that is no picture, is cut short, or claims to be absurdly large.
UNREADABLE = (
    *(OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError),
    *(TypeError, IndexError, KeyError, OverflowError, struct.error, zlib.error),  # its parsers, on damaged headers
)


class PictureFormat(NamedTuple):
    """What every picture of a set is turned into."""

    height: int
    width: int
    channels: int
    center_crop: bool  # False: the window lies where `place` says


def open_picture(encoded: bytes | str | None) -> Image.Image:
    """A picture from its bytes or its path, not yet decoded."""
    if encoded is None:
        raise OSError("the row is empty.")
    return Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(H, W) of a picture after its EXIF orientation, from the header alone."""
    width, height = image.size
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def eight_bits(image: Image.Image) -> Image.Image:
    """The picture in one of L, LA, RGB, RGBA: palettes resolved, 16-bit values v rounded to v / 257."""
    if image.mode.startswith("I"):
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("a picture of floats has no stated range; store it with 8 or 16 bits.")
    if image.mode in ("P", "PA"):
        return image.convert("RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB")
    if "transparency" in image.info and image.mode in ("1", "L", "RGB"):  # one colour of the file stands for clear
        return image.convert("RGBA")
    if image.mode in MODES.values():
        return image
    return image.convert({"1": "L", "La": "LA", "RGBa": "RGBA"}.get(image.mode, "RGB"))


def with_channels(image: Image.Image, channels: int) -> Image.Image:
    """The picture with 1 to 4 channels. Alpha that the network does not ask for is laid on white."""
    if image.mode in ("LA", "RGBA") and channels not in (2, 4):
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("L" if image.mode == "LA" else "RGB")
    if channels in MODES:
        return image if image.mode == MODES[channels] else image.convert(MODES[channels])
    if image.mode != "L":
        raise ValueError(
            f"a colour picture cannot fill {channels} channels; give the network 1, 2, 3 or 4, or grey pictures."
        )
    return image


def decode_picture(encoded: bytes | str | None, form: PictureFormat, place: float = 0.5) -> np.ndarray:
    """One encoded picture -> pixels, uint8, shape (C, H, W).

    The picture is scaled until it covers (H, W) and its longer side is cropped (`ImageOps.fit`, Lanczos); a picture
    that has the size already keeps every pixel.

    Args:
        encoded: The file's bytes, or its path.
        form: Size, channels and how to crop.
        place: Where the window lies along the longer side without `center_crop`, in [0, 1].
    """
    with open_picture(encoded) as opened:
        image = with_channels(eight_bits(ImageOps.exif_transpose(opened)), form.channels)
    if image.size != (form.width, form.height):
        middle = 0.5 if form.center_crop else place
        image = ImageOps.fit(image, (form.width, form.height), Image.Resampling.LANCZOS, centering=(middle, middle))
    pixels = np.asarray(image, dtype=np.uint8).reshape(form.height, form.width, -1).transpose(2, 0, 1)
    if pixels.shape[0] != form.channels:  # grey, repeated
        pixels = np.repeat(pixels, form.channels, axis=0)
    return np.ascontiguousarray(pixels)
