"""Rows of encoded images, nothing decoded yet: the cells of a table, by number."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import datasets
import numpy as np
import pyarrow

from ..errors import UserError
from .decoding.files import read_bytes

__all__ = [
    "Cell",
    "Row",
    "Rows",
    "Source",
    "array_cell",
    "encoded_image",
    "file_bytes",
    "image_name",
    "undecoded",
]

Row: TypeAlias = dict[str, Any]  # of a table, by column
# One cell of an image column as `datasets` gives it undecoded, an array; None where it is empty.
Cell = Row | np.ndarray | None


class Source(NamedTuple):
    """An opened split."""

    table: Any  # datasets.Dataset, or datasets.IterableDataset of a stream
    note: str | None = None  # what was left out of a folder, and why
    files: list[str] | None = None  # of a folder of images: the file of each row


def undecoded(table: Any, column: str, label_column: str | None = None) -> Any:
    """Return the table with the column of images, which stay encoded or become arrays, and that of labels.

    Args:
        table: A table of `datasets`.
        column: That of the images.
        label_column: That of the labels, or None.
    """
    wanted = [column] if label_column is None else [column, label_column]
    try:
        table = table.select_columns(wanted)
        if _array_type(table.features[column]) is not None:
            return table
        return table.cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError, KeyError, pyarrow.ArrowException) as error:
        raise UserError(f"image_column {column!r} does not hold images: {table.features[column]}.") from error


def _array_type(feature: object) -> str | None:
    """The type of the numbers of a column of arrays or of lists of lists; None for another column."""
    while isinstance(feature, (datasets.List, datasets.LargeList, list)):
        feature = feature[0] if isinstance(feature, list) else feature.feature
        if isinstance(feature, datasets.Value):
            return None if pyarrow.types.is_string(feature.pa_type) else feature.dtype
    return feature.dtype if isinstance(feature, (datasets.Array2D, datasets.Array3D)) else None


def array_cell(value: Any, feature: object) -> Cell:
    """Return a cell as it is decoded: lists as the array they are, in the type of their column."""
    kind = _array_type(feature)
    if kind is None or value is None:
        return value
    try:
        return np.asarray(value, dtype=np.dtype(kind))
    except (TypeError, ValueError):  # rows of several lengths: an array of no axes, refused as such
        return np.empty(0)


def encoded_image(cell: Cell) -> bytes | str | np.ndarray | None:
    """Return the bytes, the path or the array of the image in a cell."""
    if cell is None or isinstance(cell, np.ndarray):
        return cell
    return cell["bytes"] if cell.get("bytes") is not None else cell.get("path")


def file_bytes(cell: Cell) -> bytes:
    """Return the encoded image itself; nothing where the row is empty or the file is gone."""
    encoded = encoded_image(cell)
    if isinstance(encoded, np.ndarray):
        return encoded.tobytes()
    if isinstance(encoded, str):
        try:
            return read_bytes(encoded)
        except OSError:
            return b""
    return encoded or b""


def image_name(cell: Cell, number: int) -> str:
    """Return how an image is called in messages: its path where it has one, and its number."""
    path = cell.get("path") if isinstance(cell, dict) else None
    return f"{path} (row {number})" if path else f"row {number}"


class Rows:
    """Encoded images by number.

    Args:
        source: The opened split.
        column: The column of the images.
    """

    def __init__(self, source: Source, column: str) -> None:
        self._table = undecoded(source.table, column)
        self._column, self._feature = column, self._table.features[column]
        self.identity = str(source.table._fingerprint)  # of the opened files: their names, sizes and times
        if source.files is not None:
            self.identity = _identity_of(source.files)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._table)

    def cells(self, numbers: Sequence[int]) -> list[Cell]:
        """Return the cells of these numbers."""
        return [array_cell(cell, self._feature) for cell in self._table[list(numbers)][self._column]]


def _identity_of(files: Sequence[str]) -> str:
    """Names, sizes and times of files, digested."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        local = file.rpartition("::")[2]
        known = os.stat(local) if "://" not in local and os.path.exists(local) else None
        digest.update(f"{file} {known and (known.st_size, known.st_mtime_ns)}\n".encode())
    return digest.hexdigest()
