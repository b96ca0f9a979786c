"""Read any file by one path: local, a member of a zip or tar, an image in an array, or behind a URL (`hf://` …).

/data/a.png · npy:///17::/data/set.npy · zip://cat/a.png::/data/images.zip · hf://datasets/user/set@main/a.png · zip://a.png::hf://…/images.zip
"""

from __future__ import annotations

import lzma
import os
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import PurePosixPath
from typing import IO, Any

import fsspec
import numpy as np

__all__ = ["Unreadable", "archive_kind", "archive_members", "load_array", "paths_of_set", "read_bytes"]

_TARS = (".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz")
_ARCHIVES = {".zip": "zip"} | dict.fromkeys(_TARS, "tar")
_BROKEN = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError),
    *(EOFError, NotImplementedError, RuntimeError, KeyError),
)


class Unreadable(ValueError):
    """An image that has no values of the form asked for.

    Attributes:
        kind: Why, in words that are the same for alike files, so that they can be counted.
    """

    def __init__(self, kind: str, message: str | None = None) -> None:
        super().__init__(message or f"{kind}.")
        self.kind = kind


def archive_kind(name: str) -> str | None:
    """Return "zip" or "tar" for the name of an archive, None for another file."""
    suffixes = "".join(PurePosixPath(name.lower()).suffixes[-2:])
    return next((kind for suffix, kind in _ARCHIVES.items() if suffixes.endswith(suffix)), None)


def archive_members(archive: str) -> list[tuple[str, str]]:
    """Return (name, path for `read_bytes`) of every file in an archive.

    Raises:
        OSError: it cannot be opened.
    """
    kind = archive_kind(archive)
    try:
        names = sorted(_archive(kind, archive)[0].find(""))
    except _BROKEN as error:
        raise OSError(f"{archive} cannot be opened: {error}") from error
    return [(name, f"{kind}://{name}::{archive}") for name in names]


def read_bytes(path: str) -> bytes:
    """Return the content of a file.

    Raises:
        OSError: it is not there or cannot be read.
        ValueError: it is an array in a file that holds none of that name.
    """
    kind, separator, rest = path.partition("://")
    if not separator:
        with open(path, "rb") as file:
            return file.read()
    if kind in _ARCHIVES.values():
        member, _, archive = rest.rpartition("::")
        filesystem, lock = _archive(kind, archive)
        try:
            with lock:  # the members share one open file
                return filesystem.cat_file(member)
        except _BROKEN as error:
            raise OSError(f"{member} of {archive} cannot be read: {error}") from error
    if kind == "npy":
        return _image_of_set(rest)
    filesystem, inner = fsspec.url_to_fs(path)
    return filesystem.cat_file(inner)


@lru_cache(maxsize=64)
def _archive_of(kind: str, archive: str, version: float) -> tuple[Any, threading.Lock]:
    ending = archive.lower().rpartition(".")[2]
    packed = {"gz": "gzip", "tgz": "gzip", "bz2": "bz2", "tbz2": "bz2", "xz": "xz", "txz": "xz"}.get(ending)
    options = {"compression": packed} if kind == "tar" else {}
    return fsspec.filesystem(kind, fo=archive, skip_instance_cache=True, **options), threading.Lock()


def _archive(kind: str | None, archive: str) -> tuple[Any, threading.Lock]:
    """The open archive, opened once as long as its file stays the same."""
    version = 0.0 if "://" in archive else os.stat(archive).st_mtime
    return _archive_of(str(kind), archive, version)


# One .npy or .npz file of many images --------------------------------------------------------------------------------
#
# (N, H, W), (N, H, W, C), or (N, C, H, W) with --channel_axis 0: it counts the axes of one image, of which axis 0 holds
# N. Image 17 of the array "images" is read by `npy://images/17::/data/set.npz`; the one array of a .npy has no name.


def paths_of_set(file: str, key: str | None, channel_axis: int) -> list[str]:
    """Return the path of every image in a file of arrays.

    Args:
        file: The .npy or .npz.
        key: Name of the array in a .npz; None for its only one.
        channel_axis: Axis of the channels in one image; -1, also where none is stated, is the last.

    Raises:
        ValueError: the array is no set, or its shape does not say which axis is which.
    """
    shape = _array_of_set(file, key, os.stat(file).st_mtime_ns).shape
    if len(shape) not in (3, 4) or 0 in shape:
        raise ValueError(
            f"it is an array of shape {shape}; a set is (N, H, W), (N, H, W, C), or (N, C, H, W) with --channel_axis 0."
        )
    if len(shape) == 3 and min(shape[0], shape[-1]) <= 4:
        raise ValueError(
            f"its array of shape {shape} may be one image or {shape[0]} of {shape[1]} x {shape[2]}: give a set of grey "
            "images as (N, H, W, 1), a single image as a file in a folder."
        )
    if len(shape) == 3 and channel_axis != -1:
        raise ValueError(
            f"its array of shape {shape} is {shape[0]} grey images of {shape[1]} x {shape[2]}, which have no "
            f"--channel_axis, got {channel_axis}: leave it out; one image of three axes is put as a .npy file into a "
            "folder, and the folder is given."
        )
    if len(shape) == 4 and channel_axis not in (-3, 0, 2):
        if channel_axis != -1:
            raise ValueError(
                f"--channel_axis counts the axes of one image, {shape[1:]} here: 0 for (N, C, H, W), 2 for "
                f"(N, H, W, C), got {channel_axis}."
            )
        if shape[3] >= min(shape[1:3]):
            raise ValueError(
                f"its array of shape {shape} may be (N, H, W, C) or (N, C, H, W): say --channel_axis 2 or "
                "--channel_axis 0, the axis of the channels in one image."
            )
    return [f"npy://{key or ''}/{number}::{file}" for number in range(shape[0])]


def _image_of_set(place: str) -> bytes:
    """Return one image as a .npy file.

    Args:
        place: Its path without `npy://`.

    Raises:
        OSError: the file is not there.
        ValueError: it holds no such array.
    """
    member, _, file = place.partition("::")
    key, _, number = member.rpartition("/")
    images = _array_of_set(file, key or None, os.stat(file).st_mtime_ns)
    content = BytesIO()
    np.save(content, images[int(number)], allow_pickle=False)
    return content.getvalue()


@lru_cache(maxsize=8)
def _array_of_set(file: str, key: str | None, version: int) -> np.ndarray:
    """The array of a file, opened once as long as the file stays the same; a .npy is mapped."""
    if file.lower().endswith(".npy"):
        with _told():
            return np.load(file, mmap_mode="r", allow_pickle=False)
    with open(file, "rb") as opened:
        return load_array(opened, key)


@contextmanager
def _told() -> Iterator[None]:
    """Say what NumPy's errors mean for images."""
    try:
        yield
    except Unreadable:
        raise
    except (ValueError, EOFError) as error:
        if "object" in str(error).lower():
            raise Unreadable(
                "arrays of Python objects",
                "it holds Python objects, which are not read: store numbers, images of one size as one array.",
            ) from error
        raise Unreadable("damaged arrays", f"it is damaged: {error}.") from error


def load_array(file: IO[bytes], key: str | None) -> np.ndarray:
    """Return the array of an open .npy or .npz file.

    Args:
        file: The file.
        key: Name of the array in a .npz; None for its only one.

    Raises:
        Unreadable: several arrays and no key, or none of that name.
    """
    with _told():
        found = np.load(file, allow_pickle=False)
    if isinstance(found, np.ndarray):
        return found
    with found, _told():
        names = list(found)
        if key is None and len(names) != 1:
            raise Unreadable(".npz files of several arrays", f"it holds the arrays {names}: name one by --array_key.")
        if key is not None and key not in names:
            raise Unreadable(
                f".npz files without {key!r}", f"it holds the arrays {names} and no {key!r} (--array_key)."
            )
        return found[names[0] if key is None else key]
