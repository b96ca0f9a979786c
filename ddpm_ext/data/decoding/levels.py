"""One encoded image -> levels: uint8 or uint16 (C, H, W), with nothing cut off and nothing guessed.

    file -> samples as stored -> upright (EXIF) -> 0 … 2^bits - 1 -> C channels -> scaled and cropped to (H, W)

Channels are the network's: 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha, or as many bands as the file has. Images
of 8 bits go through Pillow alone; deeper ones, arrays and files of several bands through `samples`.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from typing import IO, NamedTuple

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

from .files import Unreadable
from .formats import (
    NO_IMAGES,
    PILLOW_KEEPS_JPEG2000,
    UNREADABLE,
    alpha_is_stated,
    is_big_endian_bigtiff,
    is_netpbm,
    is_tiff,
    likely_formats,
    opened,
    reads_all,
    refuse_more,
    stored,
    tag,
    unknown,
)
from .samples import TURNS, Samples, array_samples, deep_samples, is_array

__all__ = ["COLOURS", "Encoded", "ImageFormat", "Seen", "decode_image", "orientation", "probe", "reason"]

Encoded = bytes | str | np.ndarray | None  # the content of a file, its path, an array, or an empty row

COLOURS = {"L": "grey", "LA": "grey and alpha", "RGB": "RGB", "RGBA": "RGB and alpha"}
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_LUMA = (0.299, 0.587, 0.114)  # Rec. 601, as Pillow's own


class ImageFormat(NamedTuple):
    """What every image of a set is turned into."""

    height: int
    width: int
    channels: int
    center_crop: bool  # False: the window lies where `place` says
    bits: int = 8  # levels 0 … 2^bits - 1
    value_range: tuple[float, float] | None = None  # stored values of the lowest and highest level; None: the file's
    channel_axis: int = -1  # of arrays of three axes
    array_key: str | None = None  # of .npz files

    @property
    def top(self) -> int:
        """The highest level."""
        return 2**self.bits - 1

    @property
    def dtype(self) -> type[np.uint8] | type[np.uint16]:
        """Of the decoded images."""
        return np.uint8 if self.bits <= 8 else np.uint16

    @property
    def identity(self) -> tuple[object, ...]:
        """The format as it enters fingerprints: at 8 bits as it always was."""
        return tuple(self)[:4] if tuple(self)[4:] == ImageFormat(1, 1, 1, True)[4:] else tuple(self)


class Seen:
    """What decoding met on its way, for what must be said once of a whole set; threads note in turn."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.cut = 0  # images whose stored bits are more than what was read
        self.cut_bits = 0  # the most bits stored
        self.largest: dict[int, int] = {}  # stored bits -> largest integer value met
        self.span: tuple[float, float] | None = None  # least and largest stored value, where a range is stated
        self.enlarged = 0  # images smaller than what was asked for
        self.smallest: tuple[int, int] | None = None  # (height, width) of the smallest of them
        self.changed: Counter[tuple[str, int]] = Counter()  # (mode stored, channels read) where they are not the same

    def note_cut(self, bits: int) -> None:
        """Remember an image that stores more bits than are read."""
        with self._lock:
            self.cut += 1
            self.cut_bits = max(self.cut_bits, bits)

    def note_values(self, bits: int, largest: int) -> None:
        """Remember the largest stored value of an image."""
        with self._lock:
            self.largest[bits] = max(self.largest.get(bits, 0), largest)

    def note_span(self, smallest: float, largest: float) -> None:
        """Remember the least and the largest stored value of an image whose range is stated."""
        with self._lock:
            lo, hi = self.span or (smallest, largest)
            self.span = min(lo, smallest), max(hi, largest)

    def note_channels(self, mode: str, channels: int) -> None:
        """Remember an image whose colours or alpha are not read as they are stored.

        Args:
            mode: L, LA, RGB or RGBA.
            channels: What is made of it.
        """
        if _MODES.get(channels) != mode:
            with self._lock:
                self.changed[mode, channels] += 1

    def note_size(self, height: int, width: int, form: ImageFormat) -> None:
        """Remember an image that is enlarged.

        Args:
            height: Of the image as it stands upright, in pixels.
            width: Likewise.
            form: What it is brought to.
        """
        if height < form.height or width < form.width:
            with self._lock:
                self.enlarged += 1
                self.smallest = min(self.smallest or (height, width), (height, width), key=math.prod)


def reason(error: BaseException) -> str:
    """Return why an image cannot be read, in words that count alike for alike files."""
    if isinstance(error, Unreadable):
        return error.kind
    if isinstance(error, FileNotFoundError):
        return "the file is not there"
    return str(error).split(" <")[0].split(" '")[0].strip() or type(error).__name__


# Opening --------------------------------------------------------------------------------------------------------------


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; what cannot be read costs the orientation and not the image."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except (*UNREADABLE, AttributeError, AssertionError, Warning):
        return 1


def probe(encoded: Encoded, array_key: str | None = None, channel_axis: int = -1) -> tuple[int, int, int]:
    """Return (H, W, channels) of an image as it stands upright, from its header alone where it has one.

    Channels are those a network for it would have: 1 for grey, 3 for colour with or without alpha, else the bands.

    Args:
        encoded: The bytes of a file, or an array.
        array_key: Name of the array in an .npz file; None for its only one.
        channel_axis: Axis of the channels in arrays.
    """
    if isinstance(encoded, np.ndarray):
        return array_samples(encoded, channel_axis).values.shape[:3]
    with opened(encoded) as file:
        if is_array(file):
            return array_samples(file, channel_axis, array_key).values.shape[:3]
        image = _pillow(file)
        if image is None or (image.format == "TIFF" and getattr(image, "n_frames", 1) > 1):  # pages are bands
            return deep_samples(file, image).values.shape[:3]
        with image:
            width, height = image.size
            turned = image.format != "TIFF" and orientation(image) in (5, 6, 7, 8)  # Pillow turns a TIFF's itself
            channels = 1 if _plain_mode(image) in ("L", "LA") else 3
            channels = channels if alpha_is_stated(image) else len(image.getbands())
            return (width, height, channels) if turned else (height, width, channels)


def _pillow(file: IO[bytes]) -> Image.Image | None:
    """The image as Pillow opens it; None for a TIFF or Netpbm of which Pillow would read a part, or nothing."""
    if is_netpbm(file) or is_big_endian_bigtiff(file):
        return None
    try:
        image = Image.open(file, formats=likely_formats(file))
    except Image.UnidentifiedImageError:
        if is_tiff(file):
            return None
        raise unknown(file) or Unreadable("no image format that Pillow knows") from None
    if image.format in NO_IMAGES:
        raise unknown(file) or Unreadable(f"{image.format} files, which are no images")
    refuse_more(image)
    return image if reads_all(image) else None


# 8 bits, through Pillow -----------------------------------------------------------------------------------------------


def _plain_mode(image: Image.Image) -> str:
    """The one of L, LA, RGB, RGBA that an image has at 8 bits."""
    if image.mode in ("P", "PA"):
        return "RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB"
    if "transparency" in image.info and image.mode in ("1", "L", "RGB"):  # one colour of the file stands for clear
        return "RGBA" if image.mode == "RGB" else "LA"
    if image.mode in _MODES.values():
        return image.mode
    return {"1": "L", "La": "LA", "RGBa": "RGBA", "F": "L", "I": "L"}.get(image.mode.split(";")[0], "RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image in one of L, LA, RGB, RGBA: palettes resolved, 16-bit values v rounded to v / 257."""
    if image.mode.startswith("I"):
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    mode = _plain_mode(image)
    return image if image.mode == mode else image.convert(mode)


def _check_channels(mode: str, channels: int) -> None:
    """Refuse channels that an image does not have: neither alpha nor bands are made up, and none is cut off."""
    if channels > 4 or (channels in (2, 4) and mode in ("L", "RGB")):
        what = COLOURS[mode]
        raise Unreadable(
            f"{what} for a network of {channels} channels",
            f"it holds {what}, and the network has {channels} channels: give the network 1 or 3, or images with "
            f"{'alpha' if channels in (2, 4) else f'{channels} bands'}.",
        )


def _with_channels(image: Image.Image, channels: int) -> Image.Image:
    """The image with 1 to 4 channels. Alpha that the network does not ask for is laid on white."""
    _check_channels(image.mode, channels)
    if image.mode in ("LA", "RGBA") and channels not in (2, 4):
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("L" if image.mode == "LA" else "RGB")
    return image if image.mode == _MODES[channels] else image.convert(_MODES[channels])


def _decode_8_bits(image: Image.Image, form: ImageFormat, place: float, seen: Seen) -> np.ndarray:
    """Levels of an image of 8 bits, uint8, shape (C, H, W)."""
    bits = stored(image).bits
    image.load()
    if bits > 8:
        seen.note_cut(bits)
        if image.mode.startswith("I"):
            seen.note_values(bits, int(np.asarray(image).max()))
    turn = TURNS.get(orientation(image))
    plain = _eight_bits(image if turn is None else image.transpose(turn))
    image = _with_channels(plain, form.channels)
    seen.note_channels(plain.mode, form.channels)
    if image.size != (form.width, form.height):
        seen.note_size(image.height, image.width, form)
        middle = 0.5 if form.center_crop else place
        image = ImageOps.fit(image, (form.width, form.height), Image.Resampling.LANCZOS, centering=(middle, middle))
    pixels = np.asarray(image, dtype=np.uint8).reshape(form.height, form.width, -1).transpose(2, 0, 1)
    return np.ascontiguousarray(pixels)


# Any depth, in floating point -----------------------------------------------------------------------------------------


def _levels(samples: Samples, form: ImageFormat, seen: Seen) -> np.ndarray:
    """Samples as levels, not rounded yet, float64, shape (H, W, S).

    level = (v - lo) / (hi - lo) · (2^bits - 1); a stated range is that of the colours, alpha of integers keeps its own.
    """
    values = samples.values
    if samples.mode in ("LA", "RGBA") and samples.top is not None:
        colours = _levels(samples._replace(values=values[..., :-1], mode=None), form, seen)
        alpha = values[..., -1:].astype(np.float64) * (form.top / samples.top)
        return np.concatenate([colours, alpha], axis=2)
    if values.dtype.kind in "fc" and not np.isfinite(values).all():
        raise Unreadable("values that are not finite", "it holds NaN or infinite values.")
    smallest, largest = values.min(), values.max()
    if values.dtype.itemsize == 8 and values.dtype.kind in "iu" and max(-int(smallest), int(largest)) > 1 << 53:
        raise Unreadable(
            "integers beyond 2^53",
            f"its {values.dtype} values, {smallest} to {largest}, are integers beyond 2^53, which float64 cannot "
            "tell apart: subtract an offset and store them with fewer bits.",
        )
    if form.value_range is None and samples.top is None:
        kind = "floats" if values.dtype.kind == "f" else f"{values.dtype} integers"
        raise Unreadable(
            f"{kind} without a stated range",
            f"its {values.dtype} values, {smallest:g} to {largest:g}, have no stated range: give --value_range LO HI, "
            "the values that become black and white.",
        )
    if samples.top is not None and values.dtype.kind in "iu":
        bits = samples.top.bit_length()
        seen.note_values(bits, int(largest))
        if form.value_range is None and bits > max(8, form.bits):
            seen.note_cut(bits)
    lo, hi = form.value_range or (0, samples.top or 255)
    slack = 0.5 * (hi - lo) / form.top  # what rounds to the outermost levels anyway
    if smallest < lo - slack or largest > hi + slack:
        counted = " (counted from black; 0 is white)" if samples.from_white else ""
        raise Unreadable(
            "values outside the stated range",
            f"its values, {smallest:g} to {largest:g}{counted}, leave the range {lo:g} to {hi:g} of --value_range.",
        )
    if form.value_range is not None:
        seen.note_span(float(smallest), float(largest))
    return (values.astype(np.float64) - lo) * (form.top / (hi - lo))


def _mix_channels(levels: np.ndarray, mode: str | None, form: ImageFormat) -> np.ndarray:
    """Levels with the network's channels, shape (H, W, C); bands (mode None) stay what they are or are refused."""
    if mode is None:
        if levels.shape[2] != form.channels:
            raise Unreadable(
                f"{levels.shape[2]} bands for a network of {form.channels} channels",
                f"it has {levels.shape[2]} bands of shape {levels.shape[:2]}, and the network has {form.channels} "
                "channels: none is cut off. Give the network as many, or say by --channel_axis where the channels lie.",
            )
        return levels
    _check_channels(mode, form.channels)
    if mode in ("LA", "RGBA"):
        if form.channels in (2, 4):
            colour, alpha = levels[..., :-1], levels[..., -1:]
            return np.concatenate([_colours(colour, form.channels - 1), alpha], axis=2)
        share = levels[..., -1:] / form.top
        levels = levels[..., :-1] * share + form.top * (1 - share)  # on white
    return _colours(levels, form.channels)


def _colours(levels: np.ndarray, channels: int) -> np.ndarray:
    """Grey or RGB as 1 or 3 channels."""
    if levels.shape[2] == 3 and channels == 1:
        return (levels @ np.asarray(_LUMA))[..., None]
    return np.repeat(levels, channels, axis=2) if levels.shape[2] == 1 else levels


def _scaled(levels: np.ndarray, form: ImageFormat, place: float, *, alpha: bool) -> np.ndarray:
    """Levels at (H, W), each band by itself; colour under real alpha is weighted by it."""
    if levels.shape[:2] == (form.height, form.width):
        return levels
    middle = 0.5 if form.center_crop else place

    def fit(band: np.ndarray) -> np.ndarray:
        image = Image.fromarray(band.astype(np.float32))
        size = (form.width, form.height)
        return np.asarray(ImageOps.fit(image, size, Image.Resampling.LANCZOS, centering=(middle, middle)))

    bands = list(np.moveaxis(levels, 2, 0))
    if not alpha:
        return np.stack([fit(band) for band in bands], axis=2)
    share = fit(bands[-1])
    weight = np.where(share > 0, share, 1)
    return np.stack([*(fit(band * bands[-1]) / weight for band in bands[:-1]), share], axis=2)


def _decode_samples(samples: Samples, form: ImageFormat, place: float, seen: Seen) -> np.ndarray:
    """Levels of samples of any depth, shape (C, H, W)."""
    levels = _mix_channels(_levels(samples, form, seen), samples.mode, form)
    if samples.mode is not None:
        seen.note_channels(samples.mode, form.channels)
    seen.note_size(levels.shape[0], levels.shape[1], form)
    levels = _scaled(levels, form, place, alpha=samples.mode in ("LA", "RGBA") and form.channels in (2, 4))
    return np.ascontiguousarray(np.rint(levels).clip(0, form.top).astype(form.dtype).transpose(2, 0, 1))


def decode_image(encoded: Encoded, form: ImageFormat, place: float = 0.5, seen: Seen | None = None) -> np.ndarray:
    """Decode one image: levels, uint8 or uint16, shape (C, H, W).

    The image is scaled until it covers (H, W) and its longer side is cropped (`ImageOps.fit`, Lanczos); an image that
    has the size already keeps every value.

    Args:
        encoded: The file's bytes, its path, or an array.
        form: Size, channels, depth and how to crop.
        place: Where the window lies along the longer side without `center_crop`, in [0, 1].
        seen: Takes notes of what must be said of the set.

    Raises:
        Unreadable: the image has no values of this form.
        OSError, ValueError, …: one of UNREADABLE, the file is damaged.
    """
    seen = seen or Seen()
    if isinstance(encoded, np.ndarray):
        return _decode_samples(array_samples(encoded, form.channel_axis), form, place, seen)
    with opened(encoded) as file:
        if is_array(file):
            return _decode_samples(array_samples(file, form.channel_axis, form.array_key), form, place, seen)
        image = _pillow(file)
        if image is None:
            return _decode_samples(deep_samples(file, None), form, place, seen)
        with image:
            pages, depth = getattr(image, "n_frames", 1), stored(image)
            if pages > 1 and image.format == "TIFF":
                return _decode_samples(deep_samples(file, image), form, place, seen)
            # Pillow brings every depth to 8 bits but that of grey in 16, where it keeps the values.
            fits = depth.integer and (depth.bits <= 8 or depth.bits == 16 or not image.mode.startswith("I"))
            fits = fits and (image.mode not in ("LA", "RGBA") or alpha_is_stated(image))
            fits = fits and (image.format != "JPEG2000" or depth in PILLOW_KEEPS_JPEG2000)
            # One value that is clear is as deep as it is stored.
            fits = fits and (depth.bits in (1, 8) or image.mode == "P" or "transparency" not in image.info)
            if form.value_range is None and form.bits == 8 and fits:
                return _decode_8_bits(image, form, place, seen)
            samples = deep_samples(file, image)
            if isinstance(image, TiffImagePlugin.TiffImageFile) and tag(image, "photometric", (1,)) == (0,):
                samples = samples._replace(from_white=True)
            if (turn := TURNS.get(orientation(image))) is not None and not samples.upright:
                samples = samples.turned(turn)
            return _decode_samples(samples, form, place, seen)
