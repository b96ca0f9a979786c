"""The samples of an image as its file stores them, of any depth and number of bands, and what they mean.

Pillow gives 8 bits of most formats, also of those that store 16; what it would cut is read by tifffile and imagecodecs
(`pip install ddpm-ext[deep]`).
"""

from __future__ import annotations

import importlib
import re
from types import ModuleType
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from .files import Unreadable, load_array
from .formats import ALPHA, Stored, alpha_is_stated, stored, tag

__all__ = [
    "TURNS",
    "Samples",
    "array_samples",
    "deep_samples",
    "is_array",
]

# EXIF orientation -> how the image is turned upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_INDIRECT = {3: "palette indices", 6: "YCbCr", 8: "CIELab", 9: "ICCLab", 10: "ITULab"}  # photometric: no grey, no RGB
_MODES = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}


class Samples(NamedTuple):
    """The values of an image as they are stored."""

    values: np.ndarray  # shape (H, W, S)
    mode: str | None  # L, LA, RGB, RGBA, or None: bands without a stated meaning
    bits: int | None  # of unsigned integers, whose range is 0 … 2^bits - 1; None: no range is stated
    upright: bool = True  # False: the EXIF orientation is still to be applied

    def turned(self, turn: Image.Transpose) -> Samples:
        """Return the samples turned or mirrored."""
        bands = [Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(self.values, 2, 0)]
        return self._replace(values=np.stack([np.asarray(band.transpose(turn)) for band in bands], axis=2))


def is_array(file: IO[bytes]) -> bool:
    """Whether an open file is a .npy or .npz."""
    magic = file.read(6)
    file.seek(0)
    return magic == b"\x93NUMPY" or magic[:4] == b"PK\x03\x04"


# Samples --------------------------------------------------------------------------------------------------------------


def array_samples(source: np.ndarray | IO[bytes], channel_axis: int = -1, key: str | None = None) -> Samples:
    """Return the samples of an array, or of an open .npy or .npz file.

    Args:
        source: The array, shape (H, W) or of three axes, or the file.
        channel_axis: Which of three axes holds the channels.
        key: Name of the array in a .npz; None for its only one.

    Raises:
        Unreadable: several arrays and no key, another number of axes, values that are no real numbers.
    """
    values = source if isinstance(source, np.ndarray) else load_array(source, key)
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise Unreadable(
            f"arrays of {values.ndim} axes",
            f"it is an array of shape {values.shape}; an image is (H, W), (H, W, C), or another order with "
            "--channel_axis. A file that holds a whole set is given itself, in place of its folder.",
        )
    if values.dtype.kind not in "buif":
        raise Unreadable(f"arrays of {values.dtype}", f"it is an array of {values.dtype}, which are no real numbers.")
    if values.ndim == 3 and not -3 <= channel_axis < 3:
        raise Unreadable(
            "arrays without that --channel_axis",
            f"it is an array of shape {values.shape}, and --channel_axis is 0, 1 or 2, got {channel_axis}.",
        )
    values = values[..., None] if values.ndim == 2 else np.moveaxis(values, channel_axis, -1)
    if values.dtype.kind == "b":
        return Samples(values.astype(np.uint8), "L" if values.shape[2] == 1 else None, 1)
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    return Samples(values, "L" if values.shape[2] == 1 else None, _bits_of_type(values.dtype))


def _bits_of_type(dtype: np.dtype) -> int | None:
    return {"uint8": 8, "uint16": 16}.get(dtype.name)


def deep_samples(file: IO[bytes], image: Image.Image | None) -> Samples:
    """Return all samples of an image file, each in its own depth.

    Args:
        file: The open file.
        image: The same as Pillow opened it; None for a TIFF that Pillow cannot read, or not whole.

    Raises:
        Unreadable: the library that reads it is not installed, or the file holds more than one image.
    """
    if image is None:
        return _tiff_samples(file)
    depth, upright = stored(image), image.format == "TIFF"  # Pillow turns those itself
    if image.format == "TIFF" and not _pillow_keeps(image, depth):
        return _tiff_samples(file)
    if image.mode == "F":
        return Samples(np.asarray(image)[..., None], "L", None, upright)
    if image.mode.startswith("I") and (depth.integer or image.format != "JPEG2000"):
        values, bits = np.asarray(image)[..., None], depth.bits if depth.integer and depth.bits <= 16 else None
        if bits is None:
            return Samples(values, "L", None, upright)
        if "transparency" in image.info:  # one value that stands for clear
            values = np.concatenate([values, (values != image.info["transparency"]) * ((1 << bits) - 1)], axis=2)
        return Samples(values.astype(np.uint16), "L" if values.shape[2] == 1 else "LA", bits, upright)
    if depth.bits > 8 or not depth.integer:
        return _code_samples(file, image, depth.bits)
    mode = {"1": "L", "La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)
    if image.mode in ("P", "PA") or "transparency" in image.info:
        mode = "RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB"
    mode = mode if mode in _MODES else "RGB"
    values = np.atleast_3d(np.asarray(image.convert(mode)))
    return Samples(values, mode if mode in ("L", "RGB") or alpha_is_stated(image) else None, 8, upright)


def _pillow_keeps(image: Any, depth: Stored) -> bool:
    """Whether Pillow has every value of a TIFF: one page, and 8 bits or one band of at most 32."""
    if getattr(image, "n_frames", 1) > 1:
        return False
    if image.mode == "F":
        return depth.bits == 32
    signed = set(tag(image, "format", (1,))) == {2}
    if image.mode.startswith("I"):
        return depth.bits <= 16 or signed
    return depth.bits <= 8 and not signed


def _library(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unreadable(
            f"{what} need {name}, which is not installed",
            f"{what} are read whole by {name}, which is not installed: pip install ddpm-ext[deep].",
        ) from error


def _code_samples(file: IO[bytes], image: Image.Image, bits: int) -> Samples:
    """Colour of more than 8 bits, which Pillow cuts."""
    file.seek(0)
    data = file.read()
    if image.format == "PPM":
        start = re.match(rb"P6\s+(?:#.*\s+)*\d+\s+(?:#.*\s+)*\d+\s+(?:#.*\s+)*(\d+)\s", data)
        if start is None:
            raise Unreadable("PPM text of more than 8 bits", "it is a PPM of text: store it as PNG or TIFF.")
        values = np.frombuffer(data[start.end() :], ">u2").reshape(*image.size[::-1], 3)
        return Samples((values.astype(np.float64) * 65535 / int(start[1])).round().astype(np.uint16), "RGB", 16, False)
    names = {"PNG": "png_decode", "JPEG2000": "jpeg2k_decode", "AVIF": "avif_decode"}
    if image.format not in names:
        raise Unreadable(
            f"{bits}-bit {image.format} files",
            f"it stores {bits} bits and would be read at 8: store it as PNG or TIFF.",
        )
    codecs = _library("imagecodecs", f"{bits}-bit {image.format} images in colour")
    try:
        values = np.atleast_3d(getattr(codecs, names[image.format])(data))
    except RuntimeError as error:  # the base of imagecodecs' own
        raise OSError(f"damaged {image.format}: {error}") from error
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[values.shape[2]]
    unsigned = values.dtype.kind == "u"
    return Samples(
        values, mode if mode in ("L", "RGB") or alpha_is_stated(image) else None, bits if unsigned else None, False
    )


def _tiff_samples(file: IO[bytes]) -> Samples:
    """Every band and page of a TIFF; pages become bands."""
    tifffile = _library("tifffile", "TIFF files of several bands, pages or more than 8 bits")
    file.seek(0)
    try:
        with tifffile.TiffFile(file) as tiff:
            pages = [page for page in tiff.pages if not page.is_reduced]
            first = pages[0]
            if any(series.is_truncated for series in tiff.series):
                raise Unreadable(
                    "TIFF stacks whose pages have no headers",
                    f"it holds a stack of shape {tiff.series[0].shape} under one header: split it, or store .npy.",
                )
            parts = [_page_values(page) for page in pages]
    except (tifffile.TiffFileError, RuntimeError, AttributeError, IndexError) as error:
        if isinstance(error, Unreadable):
            raise
        raise OSError(f"damaged TIFF, or one that needs imagecodecs: {error}") from error
    if len({part.shape[:2] for part in parts}) > 1:
        raise Unreadable("TIFF pages of several sizes", f"its {len(parts)} pages have several sizes: split it.")
    values = np.concatenate(parts, axis=2)
    bits = None
    if (depth := _bits_of_type(values.dtype)) is not None:
        bits = min(depth, max(first.bitspersample if isinstance(first.bitspersample, tuple) else [first.bitspersample]))
    if first.photometric == 0:  # the lowest value is white
        if bits is None:
            raise Unreadable(
                "TIFF whose lowest value is white, without a range",
                f"its {values.dtype} values count from white, and no range says to where: store black as the lowest.",
            )
        values = ((1 << bits) - 1 - values).astype(values.dtype)
    mode = _tiff_mode(first, values.shape[2])
    if mode in ("LA", "RGBA") and first.extrasamples[0] == 1 and bits is not None:  # premultiplied
        alpha = values[..., -1:].astype(np.float64)
        colour = np.divide(
            values[..., :-1] * ((1 << bits) - 1.0), alpha, where=alpha > 0, out=np.zeros(values[..., :-1].shape)
        )
        values = np.concatenate([colour.round().clip(0, (1 << bits) - 1).astype(values.dtype), values[..., -1:]], 2)
    samples = Samples(values, mode, bits)
    orientation = first.tags.valueof(274, 1)
    return samples.turned(TURNS[orientation]) if orientation in TURNS else samples


def _page_values(page: Any) -> np.ndarray:
    """The values of one page, (H, W, S)."""
    if (colours := _INDIRECT.get(int(page.photometric))) is not None:
        raise Unreadable(
            f"TIFF of {colours} with several pages or more than 8 bits",
            f"it stores {colours}, in several pages or more than 8 bits: store it as grey, RGB or bands.",
        )
    values = page.asarray()
    if values.dtype.kind not in "buif":
        raise Unreadable(f"TIFF of {values.dtype}", f"it holds {values.dtype} values, which are no real numbers.")
    if page.axes == "YX":
        return values[..., None]
    if page.axes in ("YXS", "SYX"):
        return values if page.axes == "YXS" else np.moveaxis(values, 0, -1)
    raise Unreadable(f"TIFF pages of axes {page.axes}", f"its axes are {page.axes} of shape {values.shape}: split it.")


def _tiff_mode(page: Any, bands: int) -> str | None:
    """What the bands of a TIFF mean, as far as it says so itself."""
    base = {0: "L", 1: "L", 2: "RGB"}.get(int(page.photometric))
    if base is None or bands != page.samplesperpixel:
        return None if bands > 1 else "L"
    extra = bands - len(base)
    if extra == 0:
        return base
    return f"{base}A" if extra == 1 and page.extrasamples and page.extrasamples[0] in ALPHA else None
