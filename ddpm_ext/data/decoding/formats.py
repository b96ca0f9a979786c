"""What an image file is by its first bytes and its header: its format, depth, bands and number of images.

Pillow opens it; what it would cut, or give other values than the file says, is told here.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import IO, NamedTuple

from PIL import Image, ImageFile, TiffImagePlugin

from .files import Unreadable, read_bytes

__all__ = [
    "ALPHA",
    "NO_DATA_TAG",
    "NO_IMAGES",
    "PILLOW_KEEPS_JPEG2000",
    "UNREADABLE",
    "Stored",
    "alpha_is_stated",
    "image_formats",
    "is_big_endian_bigtiff",
    "is_image",
    "is_netpbm",
    "is_tiff",
    "likely_formats",
    "opened",
    "reads_all",
    "refuse_colours",
    "refuse_more",
    "stored",
    "tag",
    "unknown",
    "why_no_image",
]

# Pillow lists these as images, but they are stubs, films, pages of text or lists of bytes.
NO_IMAGES = {"BUFR", "GRIB", "HDF5", "MPEG", "EPS", "WMF", "IPTC", "XVTHUMB"}
# What Pillow raises for a file that is no image, is cut short, or claims to be absurdly large.
UNREADABLE = (
    *(OSError, SyntaxError, EOFError, ValueError, Image.DecompressionBombError),
    *(TypeError, IndexError, KeyError, OverflowError, struct.error, zlib.error),  # its parsers, on damaged headers
)
NO_DATA_TAG = 42113  # GDAL_NODATA: the value, as text, of pixels that were not measured
ALPHA = (1, 2)  # ExtraSamples of a TIFF: premultiplied, not premultiplied; 0 is anything
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_REMOTE = ("hf://", "http://", "https://")
_FOREIGN = {
    b"\xff\xd8\xff": "damaged or 12-bit JPEG",
    b"#?RADIANCE": "Radiance HDR",
    b"#?RGBE": "Radiance HDR",
    b"v/1\x01": "OpenEXR",
    b"8BPS": "PSD of other than 8 bits or of several channels",
    b"\x89HDF\r\n\x1a\n": "HDF5 or NetCDF",
    b"CDF\x01": "NetCDF",
    b"CDF\x02": "NetCDF",
    b"\x5c\x01\0\0": "NIfTI",
    b"\0\0\x01\x5c": "NIfTI",
    b"NRRD": "NRRD",
    b"MATLAB": "MATLAB",
    b"\x1f\x8b": "gzip (NIfTI?)",
}
_TAGS = {
    "bits": 258,
    "compression": 259,
    "photometric": 262,
    "description": 270,
    "bands": 277,
    "extra": 338,
    "format": 339,
}
_MEANING_MORE = ("CMYK", "LAB", "YCbCr", "HSV")  # modes of Pillow whose RGB depends on what the file does not say
_JPEG = (6, 7)  # compressions whose decoder gives RGB for YCbCr
_BY_TIFFFILE = (50001,)  # compressions of TIFF that Pillow is seldom built with: WebP
_COLOURS = {  # photometric interpretations that are neither grey nor RGB
    3: "palette indices in several pages or more than 8 bits",
    4: "a transparency mask",
    5: "CMYK (separated)",
    6: "YCbCr",
    8: "CIELab",
    9: "ICCLab",
    10: "ITULab",
    32803: "a colour filter array",
    32844: "CIE LogL",
    32845: "CIE LogLuv",
    34892: "linear raw",
    51177: "a depth map",
}


class Stored(NamedTuple):
    """What the header of a file says of its samples."""

    bits: int
    integer: bool  # unsigned, so that their range is 0 … 2^bits - 1


# Other depths of JPEG 2000 Pillow shifts to 8 or 16 bits, so that the highest value is not white.
PILLOW_KEEPS_JPEG2000 = (Stored(8, True), Stored(16, True))


@contextmanager
def opened(encoded: bytes | str | None) -> Iterator[IO[bytes]]:
    """The file of an encoded image."""
    if encoded is None:
        raise Unreadable("the row is empty")
    if isinstance(encoded, str) and "://" not in encoded:
        with open(encoded, "rb") as file:
            yield _not_empty(file)
    else:
        yield _not_empty(io.BytesIO(encoded if isinstance(encoded, bytes) else read_bytes(encoded)))


def _not_empty(file: IO[bytes]) -> IO[bytes]:
    if not _head(file, 1):
        raise Unreadable("empty files", "it is empty.")
    return file


def is_image(path: str) -> bool:
    """Whether a file is an image by its first bytes; one behind a URL is not looked at."""
    if path.startswith(_REMOTE):
        return False
    try:
        with opened(path) as file:
            if is_tiff(file) or is_netpbm(file):
                return True
            with Image.open(file, formats=image_formats()):
                return True
    except UNREADABLE:
        return False


@cache
def image_formats() -> list[str]:
    """The formats that Pillow tells by their first bytes."""
    Image.init()
    return [name for name, (_, accept) in Image.OPEN.items() if accept is not None and name not in NO_IMAGES]


def likely_formats(file: IO[bytes]) -> tuple[str, ...] | None:
    """Return the one format that an open file can be of, so that Pillow tries no other; None where it must try all."""
    head = _head(file, 3)
    return ("JPEG",) if head == b"\xff\xd8\xff" else ("PNG",) if head == b"\x89PN" else None


def is_tiff(file: IO[bytes]) -> bool:
    """Whether an open file is a TIFF."""
    return _head(file, 4) in _TIFF_MAGIC


def is_big_endian_bigtiff(file: IO[bytes]) -> bool:
    """Whether an open file is a BigTIFF whose header Pillow takes for a damaged one."""
    return _head(file, 4) == b"MM\0+"


def is_netpbm(file: IO[bytes]) -> bool:
    """Whether an open file is a PAM or a PFM of colour, which Pillow does not know."""
    return _head(file, 3) in (b"P7\n", b"PF\n", b"PF ")


def unknown(file: IO[bytes]) -> Unreadable | None:
    """Return why a file that Pillow does not know cannot be read; None where its first bytes tell nothing."""
    head = _head(file, 132)
    known = (what for magic, what in _FOREIGN.items() if head.startswith(magic))
    found = "DICOM" if head[128:] == b"DICM" else next(known, None)
    if found is None:
        return None
    how = "store PNG, TIFF or .npy, floats and signed integers with --value_range LO HI"
    return Unreadable(f"{found} files, which are not read: {how}", f"it is {found}, which is not read: {how}.")


def why_no_image(path: str) -> str | None:
    """Return what a file that is no image is by its first bytes, and what to do; None where they do not tell."""
    if path.startswith(_REMOTE):
        return None
    try:
        with opened(path) as file:
            found = unknown(file)
    except (OSError, ValueError):
        return None
    return None if found is None else found.kind


def _head(file: IO[bytes] | None, count: int, start: int = 0) -> bytes:
    """The first bytes of a file, or those from another place on; the file stays where it is."""
    if file is None:
        return b""
    place = file.tell()
    file.seek(start)
    head = file.read(count)
    file.seek(place)
    return head


# Depth ----------------------------------------------------------------------------------------------------------------


def stored(image: Image.Image) -> Stored:
    """Return the depth in which a file holds its samples; of an image that is not loaded yet."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return Stored(max(tag(image, "bits", (1,))), set(tag(image, "format", (1,))) == {1})
    if image.format in ("JPEG2000", "AVIF"):
        return _stored_in_stream(image)
    if image.mode == "F":
        return Stored(32, False)
    if image.format in ("JPEG", "MPO", "WEBP", "GIF"):
        return Stored(8, True)
    tile = image.tile[0] if isinstance(image, ImageFile.ImageFile) and image.tile else None
    decoder, rawmode = ("", "") if tile is None else (tile.codec_name, str(tile.args))
    arguments: Sequence[object] = tile.args if tile is not None and isinstance(tile.args, tuple) else ()
    if image.format == "SGI":
        return Stored(16 if decoder == "SGI16" or (decoder == "sgi_rle" and rawmode.endswith(", 2)")) else 8, True)
    if image.format == "DDS":
        return _stored_in_dds(decoder, arguments)
    maxval = re.search(r"(\d+)\)$", rawmode) if image.format == "PPM" else None
    if image.mode == "1" or rawmode in ("L;2", "L;4"):
        return Stored(1 if image.mode == "1" else int(rawmode[2]), True)
    if ";16S" in rawmode:
        return Stored(16, False)
    if ";16" in rawmode or image.mode.startswith("I;16") or (maxval and int(maxval[1]) > 255):
        return Stored(16, True)
    if image.mode == "I":
        return Stored(16, True) if image.format in ("PPM", "PNG") else Stored(32, False)
    return Stored(8, True)


def _stored_in_dds(decoder: str, arguments: Sequence[object]) -> Stored:
    """The depth of a DDS: that of its widest mask, or half precision in BC6H."""
    if decoder == "bcn" and str(arguments[1]).startswith("BC6H"):
        return Stored(16, False)
    if decoder == "dds_rgb":
        masks = arguments[1]
        assert isinstance(masks, tuple)
        return Stored(max(8, *(int(mask).bit_count() for mask in masks)), True)
    return Stored(8, True)


def _stored_in_stream(image: Image.Image) -> Stored:
    """The depth of JPEG 2000 and AVIF, which Pillow decodes at 8 bits whatever they are."""
    file = getattr(image, "fp", None)
    if image.format == "AVIF":
        head = _head(file, 1 << 16)
        at = head.find(b"av1C")
        flags = head[at + 6] if at >= 0 and len(head) > at + 6 else 0
        return Stored((12 if flags & 0x20 else 10) if flags & 0x40 else 8, True)
    codestream = _jpeg2000_parts(file)[1]  # SOC, SIZ: 40 bytes later 3 bytes of each component, sign and depth less one
    count = int.from_bytes(codestream[40:42], "big")
    depths = set(codestream[42 : 42 + 3 * count : 3]) or {7}
    if len(depths) > 1:
        found = sorted((depth & 0x7F) + 1 for depth in depths)
        raise Unreadable(
            "JPEG 2000 of components of several depths",
            f"its components store {found} bits, signed or not: store all alike, or TIFF.",
        )
    depth = depths.pop()
    return Stored((depth & 0x7F) + 1, depth < 0x80)


def _jpeg2000_parts(file: IO[bytes] | None) -> tuple[bytes, bytes]:
    """What lies before the codestream of a JPEG 2000, and the codestream's first bytes; a profile may be long."""
    for count in (1 << 16, -1):
        before, mark, after = _head(file, count).partition(b"\xff\x4f\xff\x51")
        if mark and len(after) > 1 << 10:
            break
    return before, mark + after[: 1 << 16]


# Bands ----------------------------------------------------------------------------------------------------------------


def tag(image: TiffImagePlugin.TiffImageFile, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """Return a tag of a TIFF.

    Args:
        image: The TIFF.
        name: One of those in `_TAGS`.
        default: What its absence means.
    """
    value = image.tag_v2.get(_TAGS[name], default)
    return value if isinstance(value, tuple) else (value,)


def refuse_colours(photometric: int) -> None:
    """Refuse a TIFF whose samples are neither grey nor RGB nor bands, at whatever depth.

    Raises:
        Unreadable: they mean other colours.
    """
    if photometric not in (0, 1, 2):
        colours = _COLOURS.get(photometric, f"photometric interpretation {photometric}")
        raise Unreadable(f"TIFF of {colours}", f"it stores {colours}: convert it to grey, RGB or bands.")


def reads_all(image: Image.Image) -> bool:
    """Whether Pillow reads every band and page of a file as they are, and calls only that alpha which the file does."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return True
    bands, extra = tag(image, "bands", (1,))[0], tag(image, "extra", ())
    photometric, compression = tag(image, "photometric", (1,))[0], tag(image, "compression", (1,))[0]
    if compression in _BY_TIFFFILE or NO_DATA_TAG in image.tag_v2:
        return False
    if photometric != 3 and not (photometric == 6 and compression in _JPEG):
        refuse_colours(photometric)
    if photometric == 0 and stored(image) != (8, True) and max(tag(image, "bits", (1,))) >= 8:
        return False  # the lowest value is white, which Pillow heeds at 8 bits alone
    if _pages_described(image, bands) > getattr(image, "n_frames", 1):
        return False
    names = image.getbands()
    return len(names) == bands and (names[-1].lower() != "a" or (bool(extra) and extra[0] in ALPHA))


def _pages_described(image: TiffImagePlugin.TiffImageFile, bands: int) -> int:
    """Pages that a description by ImageJ or tifffile names: they may lie under one header, where Pillow sees one."""
    text = str(image.tag_v2.get(_TAGS["description"], ""))
    if text.startswith("ImageJ=") and (images := re.search(r"^images=(\d+)", text, re.MULTILINE)):
        return int(images[1])
    if shape := re.match(r'\{"shape": \[([\d, ]+)\]', text):
        return math.prod(map(int, shape[1].split(","))) // (math.prod(image.size) * bands)
    return 1


def alpha_is_stated(image: Image.Image) -> bool:
    """Whether the last band of a JPEG 2000 is alpha by its channel definition; for other formats Pillow knows."""
    return image.format != "JPEG2000" or b"cdef" in _jpeg2000_parts(getattr(image, "fp", None))[0]


# Number ---------------------------------------------------------------------------------------------------------------


def refuse_more(image: Image.Image) -> None:
    """Refuse a file that holds more than the one image that is read of it. Pages of a TIFF are bands and not counted.

    Raises:
        Unreadable: it holds frames, pages, sizes, faces or bands beside it.
    """
    name = str(image.format)
    if name == "FITS":
        raise Unreadable("FITS files", "Pillow ignores the scale, the sign and the further planes of FITS: store .npy.")
    if image.mode in _MEANING_MORE and name not in ("JPEG", "MPO", "TIFF"):
        raise Unreadable(f"{name} files of {image.mode}", f"it stores {image.mode}: convert it to RGB.")
    if name == "PSD":  # its first image is all layers merged
        stored, bands = _psd_channels(getattr(image, "fp", None)), len(image.getbands())
        if stored[0] > bands or (image.mode == "RGBA" and not stored[1]):
            raise Unreadable(
                "PSD files of further channels",
                f"it holds {stored[0]} channels, of which not all are colour: store TIFF.",
            )
        return
    count = 1 if name == "TIFF" else _images_in(image)
    if count > 1:
        raise Unreadable(
            f"{name} files of several images", f"it holds {count} images and one is read of a file: split it."
        )


def _psd_channels(file: IO[bytes] | None) -> tuple[int, bool]:
    """Number of channels of a PSD, and whether the first behind the colours is alpha: a negative count of layers."""
    channels, place = int.from_bytes(_head(file, 2, 12), "big"), 26
    for _ in ("colour mode data", "image resources"):
        place += 4 + int.from_bytes(_head(file, 4, place), "big")
    length = int.from_bytes(_head(file, 4, place), "big")  # of layers and masks
    return channels, length > 0 and int.from_bytes(_head(file, 2, place + 8), "big", signed=True) < 0


def _is_followed(file: IO[bytes] | None) -> bool:
    """Whether another image comes after the first of a binary PBM (P4), PGM (P5) or PPM (P6) file."""
    gap = rb"(?:#[^\n]*\n|\s)+"
    header = re.match(  # a PBM names no largest value
        rb"P(?:4|([56]))" + gap + rb"(\d+)" + gap + rb"(\d+)(?(1)" + gap + rb"(\d+))\s", _head(file, 4096)
    )
    if header is None:
        return False
    width, height = int(header[2]), int(header[3])
    if header[1] is None:
        row = (width + 7) // 8
    else:
        row = width * (3 if header[1] == b"6" else 1) * (2 if int(header[4]) > 255 else 1)
    return re.match(rb"P[1-6]\s", _head(file, 3, header.end() + row * height)) is not None


def _images_in(image: Image.Image) -> int:
    """Number of frames, pages, sizes of an icon, or faces of a texture."""
    if image.format in ("ICO", "ICNS"):
        return len(set(image.info.get("sizes", ())))
    if image.format == "DDS":
        head = _head(getattr(image, "fp", None), 148).ljust(148, b"\0")
        volume = int.from_bytes(head[24:28], "little") if head[114] & 0x20 else 1
        array = int.from_bytes(head[140:144], "little") if head[84:88] == b"DX10" else 1
        return (6 if head[113] & 0xFE else 1) * max(volume, array, 1)
    if image.format == "PPM":
        return 1 + _is_followed(getattr(image, "fp", None))
    frames = int(getattr(image, "n_frames", 1))
    if image.format == "MPO" and frames > 1:  # a camera's smaller preview or gain map is no second image
        size, same = image.size, 1
        with suppress(OSError, EOFError, ValueError, SyntaxError):
            for number in range(1, frames):
                image.seek(number)
                same += image.size == size
        image.seek(0)
        return same
    return frames
