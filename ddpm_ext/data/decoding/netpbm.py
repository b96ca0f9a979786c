"""Netpbm files -> their samples: PBM, PGM, PPM as text (P1-P3) and binary (P4-P6), PAM (P7), PFM (Pf, PF).

Pillow scales every largest value to 255 or 65535 and reads neither PAM nor PFM of colour; here what is stored is read.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from .files import Unreadable

__all__ = ["Netpbm", "netpbm_samples"]

_GAP = rb"(?:\s|#[^\n]*\n)+"
_HEAD = re.compile(rb"P([1-6fF])" + _GAP + rb"(\d+)" + _GAP + rb"(\d+)(?:" + _GAP + rb"([-+.\deE]+))?[ \t\r\n]")
_BITMAP_HEAD = re.compile(rb"P([14])" + _GAP + rb"(\d+)" + _GAP + rb"(\d+)\s")
_MODES = {"BLACKANDWHITE": "L", "GRAYSCALE": "L", "RGB": "RGB"}


class Netpbm(NamedTuple):
    """The values of a file as they are stored."""

    values: np.ndarray  # shape (H, W, S); 0 is black, also in a bitmap, which stores it as 1
    mode: str | None  # L, LA, RGB, RGBA, or None: bands without a stated meaning
    top: int | None  # the brightest value; None for floats


def netpbm_samples(data: bytes) -> Netpbm:
    """Return the samples of the one image in a file.

    Raises:
        Unreadable: it holds several images.
        ValueError: it is damaged.
    """
    if data.startswith(b"P7"):
        return _pam(data)
    head = (_BITMAP_HEAD if data[1:2] in b"14" else _HEAD).match(data)
    if head is None:
        raise ValueError("damaged Netpbm header")
    kind, width, height = head[1], int(head[2]), int(head[3])
    bands = 3 if kind in b"36F" else 1
    shape, rest = (height, width, bands), data[head.end() :]
    if kind in b"fF":  # the sign of the scale is the order of bytes; rows from the lowest up
        values = _binary(rest, shape, "<f4" if float(head[4]) < 0 else ">f4")
        return Netpbm(values[::-1].astype(np.float32), "L" if bands == 1 else "RGB", None)
    if kind in b"123":
        return _text(re.sub(rb"#[^\n]*", b"", rest), shape, None if kind == b"1" else _top(head[4]))
    if kind == b"4":
        row = (width + 7) // 8
        packed = _binary(rest, (height, row), "u1")
        return Netpbm(1 - np.unpackbits(packed, axis=1)[:, :width, None], "L", 1)
    top = _top(head[4])
    values = _binary(rest, shape, "u1" if top < 256 else ">u2")
    return Netpbm(_within(values, top), "L" if bands == 1 else "RGB", top)


def _pam(data: bytes) -> Netpbm:
    """A PAM: its bands are grey or RGB, with or without alpha, where it says so itself."""
    end = re.search(rb"\nENDHDR\n", data)
    if end is None:
        raise ValueError("damaged PAM header")
    lines = [line.split(None, 1) for line in data[: end.start()].decode("latin-1").splitlines()[1:]]
    found = {line[0]: line[1].strip() for line in lines if len(line) == 2 and not line[0].startswith("#")}
    try:
        height, width, bands, top = (int(found[name]) for name in ("HEIGHT", "WIDTH", "DEPTH", "MAXVAL"))
    except KeyError as error:
        raise ValueError(f"a PAM header without {error}") from error
    values = _within(_binary(data[end.end() :], (height, width, bands), "u1" if top < 256 else ">u2"), top)
    kind = found.get("TUPLTYPE", "")
    if kind.startswith("CMYK"):
        raise Unreadable("PAM of CMYK", "it stores CMYK: convert it to grey, RGB or bands.")
    mode = _MODES.get(kind.removesuffix("_ALPHA"), "") + "A" * kind.endswith("_ALPHA")
    mode = mode if len(mode) == bands else "L" if bands == 1 else None
    return Netpbm(values, mode, top)


def _top(word: bytes | None) -> int:
    top = int(word or b"0")
    if not 0 < top < 1 << 16:
        raise ValueError(f"a largest value of {top}")
    return top


def _binary(data: bytes, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """The values of the one image that follows a header."""
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    if len(data) < size:
        raise ValueError(f"{len(data)} bytes of {size}: the file is cut short")
    if re.match(rb"P[1-7fF]\s", data[size : size + 3]):
        raise Unreadable(
            "Netpbm files of several images", "it holds several images and one is read of a file: split it."
        )
    values = np.frombuffer(data, kind, int(np.prod(shape))).reshape(shape)
    return values.astype(values.dtype.newbyteorder("="))


def _text(words: bytes, shape: tuple[int, ...], top: int | None) -> Netpbm:
    """Decimal numbers; of a bitmap (top None) single digits, of which 1 is black."""
    found = re.findall(rb"[01]", words) if top is None else words.split()
    if len(found) != np.prod(shape):
        raise ValueError(f"{len(found)} values of {np.prod(shape)}")
    values = np.array([int(word) for word in found], np.int64).reshape(shape)
    if top is None:
        return Netpbm((1 - values).astype(np.uint8), "L", 1)
    return Netpbm(
        _within(values, top).astype(np.uint8 if top < 256 else np.uint16), "L" if shape[2] == 1 else "RGB", top
    )


def _within(values: np.ndarray, top: int) -> np.ndarray:
    if values.max(initial=0) > top:
        raise ValueError(f"a value of {values.max()} above the largest that the header names, {top}")
    return values
