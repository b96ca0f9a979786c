"""The samples of an image as its file stores them, of any depth and number of bands, and what they mean.

Pillow gives 8 bits of most formats, also of those that store 16; what it would cut is read by tifffile and imagecodecs
(`pip install ddpm-ext[deep]`).
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from .files import Unreadable, load_array
from .formats import (
    ALPHA,
    NO_DATA_TAG,
    PILLOW_KEEPS_JPEG2000,
    Stored,
    alpha_is_stated,
    is_tiff,
    refuse_colours,
    stored,
    tag,
)
from .netpbm import netpbm_samples

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
_MODES = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}


class Samples(NamedTuple):
    """The values of an image as they are stored."""

    values: np.ndarray  # shape (H, W, S)
    mode: str | None  # L, LA, RGB, RGBA, or None: bands without a stated meaning
    top: int | None  # of unsigned integers, whose range is 0 … top; None: no range is stated
    upright: bool = True  # False: the EXIF orientation is still to be applied
    from_white: bool = False  # the file counts from white; the values here do from black

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
    if 0 in values.shape:
        raise Unreadable("empty arrays", f"it is an array of shape {values.shape}, which holds nothing.")
    if values.ndim not in (2, 3):
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
    return Samples(values, "L" if values.shape[2] == 1 else None, _top_of_type(values.dtype))


def _top_of_type(dtype: np.dtype) -> int | None:
    return {"bool": 1, "uint8": 255, "uint16": 65535}.get(dtype.name)


def deep_samples(file: IO[bytes], image: Image.Image | None) -> Samples:
    """Return all samples of an image file, each in its own depth.

    Args:
        file: The open file.
        image: The same as Pillow opened it; None for a TIFF or Netpbm that Pillow cannot read, or not whole.

    Raises:
        Unreadable: the library that reads it is not installed, or the file holds more than one image.
    """
    if image.format == "PPM" if image is not None else not is_tiff(file):
        file.seek(0)
        return Samples(*netpbm_samples(file.read()))
    if image is None:
        return _tiff_samples(file)
    depth, upright = stored(image), image.format == "TIFF"  # Pillow turns those itself
    if image.format == "TIFF" and not _pillow_keeps(image, depth):
        return _tiff_samples(file)
    if image.format == "JPEG2000" and depth not in PILLOW_KEEPS_JPEG2000:
        return _code_samples(file, image, depth.bits)
    if image.mode == "F":
        return Samples(np.asarray(image)[..., None], "L", None, upright)
    if image.mode.startswith("I"):
        values = np.asarray(image)[..., None]
        if not depth.integer or depth.bits > 16:
            return Samples(values, "L", None, upright)
        return _grey_samples(values.astype(np.uint16), image, (1 << depth.bits) - 1)
    if depth.bits < 8 and image.mode in ("1", "L"):  # which Pillow scales to 255, but not the value that is clear
        top, clear = (1 << depth.bits) - 1, image.info.get("transparency")
        if image.mode == "1" and clear is not None:
            image.info["transparency"] = clear // 255
        return _grey_samples(np.asarray(image.convert("L"))[..., None] // (255 // top), image, top)
    if depth.bits > 8 or not depth.integer:
        return _code_samples(file, image, depth.bits)
    mode = {"1": "L", "La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)
    if image.mode in ("P", "PA") or "transparency" in image.info:
        mode = "RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB"
    mode = mode if mode in _MODES else "RGB"
    values = np.atleast_3d(np.asarray(image.convert(mode)))
    return Samples(values, mode if mode in ("L", "RGB") or alpha_is_stated(image) else None, 255, upright)


def _grey_samples(values: np.ndarray, image: Image.Image, top: int) -> Samples:
    """Grey of one band, and alpha where one value stands for clear."""
    upright = image.format == "TIFF"
    if (clear := image.info.get("transparency")) is None:
        return Samples(values, "L", top, upright)
    return Samples(np.concatenate([values, (values != clear) * values.dtype.type(top)], axis=2), "LA", top, upright)


def _pillow_keeps(image: Any, depth: Stored) -> bool:
    """Whether Pillow has every value of a TIFF: one page, and unsigned integers, or 32 bits that are not compressed.

    Signed integers and floats of the other order of bytes it swaps again after they are decompressed.
    """
    if getattr(image, "n_frames", 1) > 1:
        return False
    if image.mode == "F" or not depth.integer:
        return depth.bits == 32 and tag(image, "compression", (1,)) == (1,)
    return depth.bits <= (16 if image.mode.startswith("I") else 8)


def _library(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unreadable(
            f"{what} need {name}, which is not installed",
            f"{what} are read whole by {name}, which is not installed: pip install ddpm-ext[deep].",
        ) from error


def _code_samples(file: IO[bytes], image: Image.Image, bits: int) -> Samples:
    """What Pillow cuts or shifts: deep colour, and JPEG 2000 of other than 8 and 16 bits."""
    file.seek(0)
    data = file.read()
    names = {"PNG": "png_decode", "JPEG2000": "jpeg2k_decode", "AVIF": "avif_decode"}
    if image.format not in names:
        raise Unreadable(
            f"{bits}-bit {image.format} files",
            f"it stores {bits} bits and would be read at 8: store it as PNG or TIFF.",
        )
    codecs = _library("imagecodecs", f"{bits}-bit {image.format} images")
    try:
        values = np.atleast_3d(getattr(codecs, names[image.format])(data))
    except RuntimeError as error:  # the base of imagecodecs' own
        raise OSError(f"damaged {image.format}: {error}") from error
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[values.shape[2]]
    unsigned = values.dtype.kind == "u"
    return Samples(
        values,
        mode if mode in ("L", "RGB") or alpha_is_stated(image) else None,
        (1 << bits) - 1 if unsigned else None,
        False,
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
            _refuse_unlike([(page.index + 1, _page_facts(page)) for page in pages])
            parts = [_page_values(page) for page in pages]
            no_data = _page_facts(first)["GDAL_NODATA"]
    except (tifffile.TiffFileError, RuntimeError, AttributeError, IndexError) as error:
        if isinstance(error, Unreadable):
            raise
        raise OSError(f"damaged TIFF, or one that needs imagecodecs: {error}") from error
    if len({part.shape[:2] for part in parts}) > 1:
        raise Unreadable("TIFF pages of several sizes", f"its {len(parts)} pages have several sizes: split it.")
    values = np.concatenate(parts, axis=2)
    _refuse_no_data(values, no_data)
    stated = first.bitspersample if isinstance(first.bitspersample, tuple) else (first.bitspersample,)
    top = _top_of_type(values.dtype)
    top = None if top is None else min(top, (1 << max(stated)) - 1)
    values = values.astype(np.uint8) if values.dtype.kind == "b" else values
    if first.photometric == 0:
        values = _from_black(values, top)
    mode = _tiff_mode(first, values.shape[2])
    if mode in ("LA", "RGBA") and first.extrasamples[0] == 1 and top is not None:
        values = _not_premultiplied(values, top)
    samples = Samples(values, mode, top, from_white=first.photometric == 0)
    orientation = first.tags.valueof(274, 1)
    return samples.turned(TURNS[orientation]) if orientation in TURNS else samples


def _page_facts(page: Any) -> dict[str, str]:
    """What the tags of a page say of its values, by the names of the tags."""
    return {
        "PhotometricInterpretation": f"{int(page.photometric)} ({page.photometric.name.lower()})",
        "BitsPerSample": str(page.bitspersample),
        "SampleFormat": page.dtype.name if page.dtype is not None else "unknown",
        "SamplesPerPixel": str(page.samplesperpixel),
        "ExtraSamples": ", ".join(str(int(extra)) for extra in page.extrasamples) or "none",
        "Orientation": str(int(page.tags.valueof(274, 1))),
        "GDAL_NODATA": str(page.tags.valueof(NO_DATA_TAG, "")).strip(" \0") or "none",
    }


def _refuse_unlike(pages: list[tuple[int, dict[str, str]]]) -> None:
    """Refuse pages whose tags give their values another meaning than those of the first, by number and facts."""
    first, facts = pages[0]
    for number, others in pages[1:]:
        for name, value in others.items():
            if value != facts[name]:
                raise Unreadable(
                    f"TIFF whose pages differ in {name}",
                    f"its pages become the bands of one image, and {name} is {facts[name]} in page {first} and {value} "
                    f"in page {number}: write all pages alike, or split it.",
                )


def _from_black(values: np.ndarray, top: int | None) -> np.ndarray:
    """Values of which the lowest is white, counted from black."""
    if top is None:
        raise Unreadable(
            "TIFF whose lowest value is white, without a range",
            f"its {values.dtype} values count from white, and no range says to where: store black as the lowest.",
        )
    return (top - values).astype(values.dtype)


def _not_premultiplied(values: np.ndarray, top: int) -> np.ndarray:
    """Colours that were multiplied by their alpha / top, divided by it again."""
    alpha = values[..., -1:].astype(np.float64)
    colour = np.divide(values[..., :-1] * float(top), alpha, where=alpha > 0, out=np.zeros(values[..., :-1].shape))
    return np.concatenate([colour.round().clip(0, top).astype(values.dtype), values[..., -1:]], axis=2)


def _refuse_no_data(values: np.ndarray, no_data: str) -> None:
    """Refuse pixels that were not measured: a band holds the value that the file names for it (GDAL_NODATA)."""
    if no_data == "none":
        return
    try:
        value = float(no_data.replace(",", "."))  # as some languages write it
    except ValueError:
        raise Unreadable(
            "TIFF whose value for no data is no number",
            f"its value for no data (GDAL_NODATA) is {no_data!r}, no number: correct the tag, or leave it out.",
        ) from None
    missing = np.isnan(values) if np.isnan(value) else values == value
    if values.dtype.kind == "f" and np.isfinite(value):  # the text may have fewer digits than the value
        missing = np.isclose(values.astype(np.float64), value, rtol=2e-6, atol=0)
    if count := int(missing.any(axis=2).sum()):
        raise Unreadable(
            "TIFF with pixels without data",
            f"{count:,} of its pixels hold {no_data} in a band, its value for no data (GDAL_NODATA): cut them away, or "
            "fill them and leave out the tag.",
        )


def _page_values(page: Any) -> np.ndarray:
    """The values of one page, (H, W, S)."""
    refuse_colours(int(page.photometric))
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
