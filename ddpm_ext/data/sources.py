"""Data set name or folder -> rows of encoded pictures and their labels, nothing decoded yet.

Sources: "digits" (built in), a Hub name, a folder of pictures, of parquet files, or of `Dataset.save_to_disk`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
from datasets.exceptions import DatasetsError
from datasets.table import InMemoryTable

DIGITS = "digits"
DIGITS_DIR = Path(__file__).parent / "digits"

# Sub-folders of these names are splits and not classes (the words of `datasets`).
SPLIT_FOLDERS = (
    *("train", "training", "validation", "valid", "val", "dev"),
    *("test", "testing", "eval", "evaluation"),
)

Cell = dict[str, Any] | None  # one cell of an image column as `datasets` gives it undecoded; None where it is empty


# Opening --------------------------------------------------------------------------------------------------------------


def open_source(
    dataset_name: str | None,
    dataset_config_name: str | None,
    train_data_dir: str | None,
    split: str,
    cache_dir: str | None,
    streaming: bool = False,
) -> Any:
    """One split as `datasets.Dataset`, or as `datasets.IterableDataset` with `streaming`; see `data.load_images`."""
    if dataset_name is not None and train_data_dir is not None:
        raise ValueError(f"Give dataset_name or train_data_dir, got both: {dataset_name!r} and {train_data_dir!r}.")
    name = train_data_dir if dataset_name is None else dataset_name
    try:
        if name is None or name == DIGITS:
            return _open_digits(split, streaming)
        if Path(name).is_dir():
            return _open_folder(Path(name), dataset_config_name, split, cache_dir, streaming)
        if train_data_dir is not None:
            raise ValueError("there is no such folder.")
        return datasets.load_dataset(name, dataset_config_name, split=split, cache_dir=cache_dir, streaming=streaming)
    except (ValueError, FileNotFoundError, ConnectionError, DatasetsError) as error:
        raise ValueError(f"Cannot open split {split!r} of {name!r}: {error}") from error


def _open_digits(split: str, streaming: bool) -> Any:
    """The built-in digits, read without a cache folder."""
    if split not in ("train", "test"):
        raise ValueError(f'the digits have the splits "train" and "test", got {split!r}.')
    table = datasets.Dataset(InMemoryTable(pyarrow.parquet.read_table(DIGITS_DIR / f"{split}.parquet")))
    return table.to_iterable_dataset() if streaming else table


def _open_folder(folder: Path, config: str | None, split: str, cache_dir: str | None, streaming: bool) -> Any:
    """A local folder, by what lies in it."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise ValueError(f"it has the splits {list(saved)}.")
            saved = saved[split]
        elif split not in (own := str(saved.split or "train"), own.split("[")[0]):
            raise ValueError(f"the folder holds the split {own!r} alone.")
        return saved.to_iterable_dataset() if streaming else saved
    load: Callable[..., Any] = datasets.load_dataset  # its overloads know no variable `streaming`
    # In a cache beside the folder, `datasets` would write into the folder itself and read that as data the next time.
    cache = None if cache_dir is None else str(Path(cache_dir) / "opened_folders")
    options = {"split": split, "cache_dir": cache, "streaming": streaming}
    if any(folder.rglob("*.parquet")) or any(folder.glob("*.md")):  # a card may say which files make which split
        return load(str(folder), config, **options)
    folder = _split_folder(folder, split)
    # Every picture belongs to the split asked for: a file called test_1.png is no test split.
    return load("imagefolder", data_files={split: [str(folder / "**")]}, **options)


def _split_folder(folder: Path, split: str) -> Path:
    """Where the pictures of a split lie: in the sub-folder of its name; without any, all of a folder is "train"."""
    names = {path.name for path in folder.iterdir() if path.is_dir()}
    if split in names:
        return folder / split
    found = [name for name in SPLIT_FOLDERS if name in names]
    if found or split != "train":
        has = f"the sub-folders {found}" if found else 'no sub-folder of a split\'s name, so that all of it is "train"'
        raise ValueError(f"the folder has {has}. Ask for what is there, or make the sub-folder {split!r}.")
    return folder


# Columns --------------------------------------------------------------------------------------------------------------


def find_image_column(features: datasets.Features, asked: str | None) -> str:
    """The column of the pictures: the one asked for, or the only one that can be meant."""
    if asked is not None:
        if asked not in features:
            raise ValueError(f"image_column must be one of the columns {list(features)}, got {asked!r}.")
        return asked
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    found = found or [name for name in ("image", "img") if name in features]
    if len(found) != 1:
        raise ValueError(f"Say by image_column which of the columns {list(features)} holds the pictures, {found} may.")
    return found[0]


def find_label_column(features: datasets.Features, asked: str | None) -> str | None:
    """The column of the labels: the one asked for, or the only one that can be meant, or None."""
    if asked is not None:
        if asked not in features:
            raise ValueError(f"label_column must be one of the columns {list(features)}, got {asked!r}.")
        return asked
    found = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    return found[0] if len(found) == 1 else None


def class_names(features: datasets.Features, column: str | None) -> list[str] | None:
    """Names of the classes where the column states them."""
    feature = features[column] if column is not None else None
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def read_labels(
    table: datasets.Dataset, column: str | None, known: Sequence[str] | None = None
) -> tuple[np.ndarray | None, int | None, list[str] | None]:
    """Labels, int64, shape (n,), their number and their names; None without a column.

    Args:
        table: The rows.
        column: The column of the labels; words are numbered by alphabet.
        known: Class names whose places are the numbers, in place of the column's own order.

    Raises:
        ValueError: a row without a class, or a class that is not among the known ones.
    """
    if column is None:
        return None, None, None
    names = class_names(table.features, column)
    values = np.asarray(table[column][:])
    if values.dtype.kind in "US":
        words, values = np.unique(values, return_inverse=True)
        names = words.tolist()
    if values.dtype.kind not in "iu" or values.min() < 0:
        raise ValueError(f"label_column {column!r} must hold classes from 0 upwards in every row, got {values[:8]} …")
    values = values.astype(np.int64)
    if names is None:
        return values, int(values.max()) + 1, None
    if known is None:
        return values, len(names), names
    return renumbered(names, known)[values], len(known), list(known)


def renumbered(names: Sequence[str], known: Sequence[str]) -> np.ndarray:
    """The number among the known classes of each of these names, int64.

    Raises:
        ValueError: one of them is not known.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"the classes {unknown} are none of the training's, which are {list(known)}.")
    return np.asarray([known.index(name) for name in names], np.int64)


# Rows -----------------------------------------------------------------------------------------------------------------


def undecoded(table: Any, column: str, label_column: str | None = None) -> Any:
    """The table with the column of pictures, which stay encoded, and that of labels."""
    wanted = [column] if label_column is None else [column, label_column]
    try:
        return table.select_columns(wanted).cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # Arrow has many words for "this cannot be a picture"
        raise ValueError(f"image_column {column!r} does not hold pictures: {table.features[column]}.") from error


def encoded_picture(cell: Cell) -> bytes | str | None:
    """The bytes or the path of the picture in a cell."""
    if cell is None:
        return None
    return cell["bytes"] if cell.get("bytes") is not None else cell.get("path")


def file_bytes(cell: Cell) -> bytes:
    """The encoded picture itself; nothing where the row is empty or the file is gone."""
    encoded = encoded_picture(cell)
    if isinstance(encoded, str):
        return Path(encoded).read_bytes() if Path(encoded).is_file() else b""
    return encoded or b""


def picture_name(cell: Cell, number: int) -> str:
    """How a picture is called in messages: its path where it has one, and its number."""
    path = cell.get("path") if cell is not None else None
    return f"{path} (row {number})" if path else f"row {number}"


class Rows:
    """Encoded pictures by number."""

    def __init__(self, table: datasets.Dataset, column: str) -> None:
        self._table = undecoded(table, column)
        self._column = column
        self.identity = str(table._fingerprint)  # of the opened files: their names, sizes and times

    def __len__(self) -> int:
        return len(self._table)

    def cells(self, numbers: Sequence[int]) -> list[Cell]:
        """The cells of these numbers."""
        return self._table[list(numbers)][self._column]
