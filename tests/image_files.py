"""Image files as bytes, written by their specifications or by libraries that are not ours."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest

__all__ = ["netpbm", "npy", "pam", "png", "psd", "tiff"]


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def tiff(values: np.ndarray, **options: Any) -> bytes:
    """Written by tifffile, with its options."""
    buffer = io.BytesIO()
    pytest.importorskip("tifffile").imwrite(buffer, values, **{"metadata": None, **options})
    return buffer.getvalue()


def png(values: np.ndarray, bits: int, clear: int | None = None) -> bytes:
    """A grey PNG of 1 to 8 bits, (H, W), with one value that stands for clear (PNG specification, section 11)."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = values.shape
    rows = [np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - bits :].ravel() for row in values]
    content = zlib.compress(b"".join(b"\0" + np.packbits(row).tobytes() for row in rows))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
    head += b"" if clear is None else chunk(b"tRNS", struct.pack(">H", clear))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def netpbm(values: np.ndarray, kind: int, top: int) -> bytes:
    """A PGM (2, 5) or PPM (3, 6) of (H, W, S)."""
    head = f"P{kind}\n# a comment\n{values.shape[1]} {values.shape[0]}\n{top}\n".encode()
    if kind < 4:
        return head + "\n".join(map(str, values.ravel().tolist())).encode()
    return head + values.astype("u1" if top < 256 else ">u2").tobytes()


def pam(values: np.ndarray, top: int, kind: str) -> bytes:
    height, width, bands = values.shape
    head = f"P7\n# a comment\nWIDTH {width}\nHEIGHT {height}\nDEPTH {bands}\nMAXVAL {top}\nTUPLTYPE {kind}\nENDHDR\n"
    return head.encode() + values.astype("u1" if top < 256 else ">u2").tobytes()


def psd(values: np.ndarray, mode: int, *, alpha: bool = False) -> bytes:
    """A PSD (Adobe's specification): 1 grey, 3 RGB, 4 CMYK, 7 channels, 9 Lab; alpha is said by -1 layers."""
    height, width, channels = values.shape
    head = struct.pack(">4sH6xHIIHH", b"8BPS", 1, channels, height, width, values.itemsize * 8, mode)
    layer = struct.pack(">4iH4s4s4BI", 0, 0, 0, 0, 0, b"8BIM", b"norm", 255, 0, 0, 0, 12) + bytes(12)
    info = struct.pack(">h", -1) + layer
    layers = struct.pack(">II", len(info) + 4, len(info)) + info if alpha else bytes(4)
    return head + bytes(8) + layers + b"\0\0" + np.moveaxis(values, -1, 0).astype(f">u{values.itemsize}").tobytes()
