"""The checksums by which the Hub knows the content of files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

__all__ = ["checksums", "git_sha1", "has_checksum", "sha256"]


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal, by which checkpoints and the Hub know a large file."""
    return _digest(path, hashlib.sha256())


def git_sha1(path: Path) -> str:
    """Return the checksum by which git knows any other file: SHA-1 of "blob", its size, a zero byte, the content."""
    return _digest(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size))


def _digest(path: Path, state: "hashlib._Hash") -> str:  # noqa: UP037 (a name of the type stubs alone)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def has_checksum(path: Path, checksum: str) -> bool:
    """Return whether a file's content is the one known by this SHA-256 (64 letters) or git SHA-1 (40)."""
    return (sha256(path) if len(checksum) == 64 else git_sha1(path)) == checksum


def checksums(siblings: object) -> dict[str, str]:
    """Return name -> checksum of a repository's files, from `model_info(files_metadata=True).siblings`."""
    known: dict[str, str] = {}
    for file in siblings or ():  # pyright: ignore[reportGeneralTypeIssues]
        lfs = file.lfs
        checksum = (lfs["sha256"] if isinstance(lfs, Mapping) else lfs.sha256) if lfs else file.blob_id
        if checksum:
            known[file.rfilename] = checksum
    return known
