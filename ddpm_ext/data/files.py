"""Read any file by one path: local, a member of a zip or tar, or behind a URL (`hf://` …), through fsspec.

/data/a.png · npy:///17::/data/set.npy · zip://cat/a.png::/data/images.zip · hf://datasets/user/set@main/a.png · zip://a.png::hf://…/images.zip
"""

from __future__ import annotations

import os
import tarfile
import threading
import zipfile
import zlib
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import fsspec

from .array_sets import image_of_set

__all__ = ["archive_kind", "archive_members", "read_bytes"]

_ARCHIVES = {".zip": "zip", ".tar": "tar", ".tgz": "tar", ".tar.gz": "tar", ".tar.bz2": "tar", ".tar.xz": "tar"}
_BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError, RuntimeError, KeyError)


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
        return image_of_set(rest)
    filesystem, inner = fsspec.url_to_fs(path)
    return filesystem.cat_file(inner)


@lru_cache(maxsize=64)
def _archive_of(kind: str, archive: str, version: float) -> tuple[Any, threading.Lock]:
    packed = {"gz": "gzip", "bz2": "bz2", "xz": "xz"}.get(archive.lower().rpartition(".")[2].replace("tgz", "gz"))
    options = {"compression": packed} if kind == "tar" else {}
    return fsspec.filesystem(kind, fo=archive, skip_instance_cache=True, **options), threading.Lock()


def _archive(kind: str | None, archive: str) -> tuple[Any, threading.Lock]:
    """The open archive, opened once as long as its file stays the same."""
    version = 0.0 if "://" in archive else os.stat(archive).st_mtime
    return _archive_of(str(kind), archive, version)
