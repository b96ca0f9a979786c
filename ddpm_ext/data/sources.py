"""Data set name or folder -> rows of encoded images and their labels, nothing decoded yet.

Sources: "digits" (built in), a Hub name, a folder or archive of images or arrays, one .npy or .npz of many images, a
folder of parquet files or of `Dataset.save_to_disk`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import yaml
from datasets.exceptions import DatasetsError
from datasets.table import InMemoryTable
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from ..errors import UserError, did_you_mean
from ..run_dir import read_json
from .cells import Source
from .decoding.files import archive_kind, paths_of_set
from .folder import (
    ARRAYS,
    SPLIT_FOLDERS,
    Entry,
    Listing,
    classes_in_names,
    image_count,
    list_images,
    local_entries,
    split_prefix,
)
from .spec import DIGITS, DataSpec

__all__ = [
    "Labels",
    "empty_set",
    "find_image_column",
    "find_label_column",
    "no_classes",
    "number_labels",
    "open_source",
    "read_labels",
    "where_classes_may_stand",
    "without_class",
]

DIGITS_DIR = Path(__file__).parent / "digits"
_load_dataset: Callable[..., Any] = datasets.load_dataset  # its overloads know no variable `streaming`
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


class Labels(NamedTuple):
    """Labels of the rows of a set."""

    numbers: np.ndarray  # int64, shape (n,); -1 where a row has no class
    num_classes: int
    names: list[str] | None  # of each number, where the set states them


# Opening --------------------------------------------------------------------------------------------------------------


def open_source(spec: DataSpec, cache_dir: str | None, streaming: bool = False) -> Source:
    """Open one split; see `load_images`.

    Args:
        spec: Which images.
        cache_dir: Where downloads are kept; None for the usual place.
        streaming: Open it without loading it.

    Raises:
        UserError: it cannot be opened; the reason stands in the sentence.
    """
    if spec.dataset_name is not None and spec.data_dir is not None:
        raise UserError(f"Give dataset_name or train_data_dir, got both: {spec.dataset_name!r} and {spec.data_dir!r}.")
    name, split = spec.data_dir if spec.dataset_name is None else spec.dataset_name, spec.split
    try:
        if name is None or name == DIGITS:
            return _open_digits(split, streaming)
        path = Path(name)
        if path.is_file() and archive_kind(name) is not None:
            return _open_listing(list_images([Entry(path.name, str(path))], split, name), split, streaming)
        if path.is_file() and path.suffix.lower() in ARRAYS:
            return _open_array_set(spec, name, streaming)
        if path.is_dir():
            _refuse_levels(path, spec)
            return _open_folder(path, spec.dataset_config_name, split, cache_dir, streaming)
        if spec.data_dir is not None:
            raise UserError("it is a file: give its folder." if path.is_file() else "there is no such folder.")
        return _open_hub(name, spec.dataset_config_name, split, cache_dir, streaming)
    except (ValueError, FileNotFoundError, ConnectionError, DatasetsError) as error:
        raise UserError(f"Cannot open split {split!r} of {name!r}: {error}") from error


def _open_digits(split: str, streaming: bool) -> Source:
    """The built-in digits, read without a cache folder."""
    if split not in ("train", "test"):
        raise UserError(f'the digits have the splits "train" and "test", got {split!r}.')
    table = datasets.Dataset(InMemoryTable(pyarrow.parquet.read_table(DIGITS_DIR / f"{split}.parquet")))
    return Source(table.to_iterable_dataset() if streaming else table)


def _open_listing(listing: Listing, split: str, streaming: bool) -> Source:
    """A folder of images as a table of their paths."""
    columns: dict[str, list[object]] = {"image": [{"bytes": None, "path": path} for path in listing.paths]}
    features: dict[str, datasets.Image | datasets.ClassLabel] = {"image": datasets.Image(decode=False)}
    if listing.classes is not None and listing.class_names is not None:
        number = {name: i for i, name in enumerate(listing.class_names)}
        columns["label"] = [number[name] for name in listing.classes]
        features["label"] = datasets.ClassLabel(names=listing.class_names)
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return Source(table.to_iterable_dataset() if streaming else table, listing.note, listing.paths)


def _open_array_set(spec: DataSpec, file: str, streaming: bool) -> Source:
    """A file of arrays as a table of the paths of its images."""
    if spec.split != "train":
        raise UserError('all of a file of arrays is "train"; for splits put files of single images into sub-folders.')
    paths = paths_of_set(file, spec.array_key, spec.channel_axis)
    return _open_listing(Listing(paths, None, None, None), spec.split, streaming)


def _open_folder(folder: Path, config: str | None, split: str, cache_dir: str | None, streaming: bool) -> Source:
    """A local folder, by what lies in it; files that are no data change nothing."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return Source(_open_saved(folder, split, streaming))
    # In a cache beside the folder, `datasets` would write into the folder itself and read that as data the next time.
    cache = None if cache_dir is None else str(Path(cache_dir) / "opened_folders")
    options = {"split": split, "cache_dir": cache, "streaming": streaming}
    entries = local_entries(folder)
    if config is not None or _card_names_files(folder / "README.md"):
        return Source(_load_dataset(str(folder), config, **options))
    tables = [entry for entry in entries if entry.name.endswith(".parquet") and not entry.name.startswith(".")]
    images, rows = image_count(entries), _rows_of_images([entry.path for entry in tables])
    if rows and rows == images:
        raise UserError(
            f"it holds {images} images as files and as many in parquet files ({tables[0].name}): keep one of them."
        )
    if rows > images or (tables and not images):
        other = len(entries) - len(tables)
        note = f"{folder}: {len(tables)} parquet files are read; left out: {other} other files." if other else None
        return Source(_load_dataset("parquet", data_files=_parquet_splits(tables), **options), note)
    metadata = [entry for entry in entries if _is_metadata(entry)]
    if metadata:  # a table that names the images and says something of each
        base = _metadata_folder(folder, split, metadata)
        source = _load_dataset("imagefolder", data_files={split: [str(base / "**")]}, **options)
        return Source(source, _unnamed(source, base, [one for one in entries if Path(one.path).is_relative_to(base)]))
    return _open_listing(list_images(entries, split, str(folder)), split, streaming)


def _refuse_levels(folder: Path, spec: DataSpec) -> None:
    """Refuse to read the levels that `sample` wrote as the values that they stand for."""
    if spec.value_range is None or not (folder / "samples.json").is_file():
        return
    record = read_json(folder / "samples.json")
    levels = (0.0, 2.0 ** record.get("bits", 8) - 1)
    if record.get("value_range") is not None and spec.value_range != levels:
        raise UserError(
            f"samples.json says that its images hold levels ({record.get('values')}), and value_range is "
            f"{spec.value_range[0]:g} to {spec.value_range[1]:g}: give --value_range 0 {levels[1]:g}, or turn levels "
            "into values in a folder of their own."
        )


def _open_saved(folder: Path, split: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    """What `save_to_disk` wrote."""
    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise UserError(f"it has the splits {list(saved)}.")
        saved = saved[split]
    elif split not in (own := str(saved.split or "train"), own.split("[")[0]):
        raise UserError(f"the folder holds the split {own!r} alone.")
    return saved.to_iterable_dataset() if streaming else saved


def _card_names_files(card: Path) -> bool:
    """Whether a README says in its header which files make which split."""
    if not card.is_file():
        return False
    match = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        header = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return False
    return isinstance(header, dict) and bool(header.get("configs"))


def _rows_of_images(files: Sequence[str]) -> int:
    """Rows of the parquet files that have a column of images."""
    rows = 0
    for file in files:
        try:
            features = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(file))
            if any(_may_be_images(name, feature) for name, feature in features.items()):
                rows += pyarrow.parquet.read_metadata(file).num_rows
        except (OSError, pyarrow.ArrowException):
            continue
    return rows


def _parquet_splits(tables: Sequence[Entry]) -> dict[str, list[str]]:
    """Parquet files by the split in their names, as on the Hub: train-00000-of-00002.parquet, test/a.parquet."""
    same = {"training": "train", "testing": "test", "eval": "test", "evaluation": "test"}
    same |= {"valid": "validation", "val": "validation", "dev": "validation"}
    found: dict[str, list[str]] = {}
    for pattern in (r"(?:^|/)([^/]+)-\d{5}-of-\d{5}", rf"(?:^|[-._ /\d])({'|'.join(SPLIT_FOLDERS)})(?:$|[-._ /\d])"):
        for entry in tables:
            if match := re.search(pattern, entry.name.removesuffix(".parquet")):
                found.setdefault(same.get(match[1], match[1]), []).append(entry.path)
        if found:
            return found
    return {"train": [entry.path for entry in tables]}


def _is_metadata(entry: Entry) -> bool:
    """Whether a file is a table of images as `datasets` knows it: metadata.csv and the like with a column file_name."""
    if entry.name.rpartition("/")[2] not in _METADATA:
        return False
    if entry.name.endswith(".parquet"):
        return "file_name" in pyarrow.parquet.read_schema(entry.path).names
    with open(entry.path, encoding="utf-8", errors="replace") as file:
        return "file_name" in file.readline()


def _metadata_folder(folder: Path, split: str, metadata: Sequence[Entry]) -> Path:
    """The folder of a split among those that hold a table of images."""
    places = {entry.name.rpartition("/")[0].split("/")[0] for entry in metadata}
    if split in places:
        return folder / split
    splits = sorted(place for place in places if place.lower() in SPLIT_FOLDERS)
    if splits or split != "train":
        raise UserError(f"the folder has tables of images for {splits or ['train']}. Ask for what is there.")
    return folder


def _unnamed(source: datasets.Dataset | datasets.IterableDataset, folder: Path, entries: Sequence[Entry]) -> str | None:
    """A note of the images that a table does not name; None where it names all, or nobody has counted its rows."""
    images = image_count(entries)
    if isinstance(source, datasets.Dataset) and len(source) > images:  # it names arrays, too
        images += sum(Path(entry.name).suffix.lower() in ARRAYS for entry in entries)
    if not isinstance(source, datasets.Dataset) or len(source) == images:
        return None
    return f"{folder}: {len(source)} of {images} images are read, those that the table of images names."


def _open_hub(name: str, config: str | None, split: str, cache_dir: str | None, streaming: bool) -> Source:
    """A set on the Hub: one of image files as a folder of them, others by `datasets`."""
    repository = None if config is not None else _image_repository(name, cache_dir)
    if repository is None:
        return Source(_load_dataset(name, config, split=split, cache_dir=cache_dir, streaming=streaming))
    revision, names = repository
    if streaming:
        entries = [Entry(file, f"hf://datasets/{name}@{revision}/{file}") for file in names]
    else:
        packed = any(archive_kind(file) is not None for file in names)
        part = "" if packed else split_prefix(names, split)
        wanted = [f"{part}*"] if part else None  # not the images of other splits
        where = snapshot_download(
            name, repo_type="dataset", revision=revision, cache_dir=cache_dir, allow_patterns=wanted
        )
        folder = Path(where)
        entries = [Entry(file, str(folder / file)) for file in names]
    return _open_listing(list_images(entries, split, name), split, streaming)


def _image_repository(name: str, cache_dir: str | None) -> tuple[str, list[str]] | None:
    """(commit, files) of a repository that holds images as files; None for others and where it cannot be asked."""
    try:
        info = HfApi().dataset_info(name)
        names = [file.rfilename for file in info.siblings or []]
        if "README.md" in names:
            card = hf_hub_download(name, "README.md", repo_type="dataset", revision=info.sha, cache_dir=cache_dir)
            if _card_names_files(Path(card)):
                return None
    except (HfHubHTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError, EntryNotFoundError, OSError):
        return None  # `datasets` looks into its cache, or tells why there is nothing
    entries = [Entry(file, f"hf://datasets/{name}@{info.sha}/{file}") for file in names]
    archives = sum(archive_kind(file) == "zip" for file in names)
    tables = sum(file.endswith((".parquet", ".arrow", ".tar", ".jsonl", ".json", ".csv", ".tsv")) for file in names)
    if any(file.rpartition("/")[2] in _METADATA for file in names) or image_count(entries) + archives <= tables:
        return None
    return str(info.sha), names


# What a set lacks, in the words of every way to read it ---------------------------------------------------------------


def empty_set(spec: DataSpec) -> UserError:
    """Return the error for a split without rows."""
    return UserError(f"The data set is empty: split {spec.split!r} of {spec.name} has no rows.")


def where_classes_may_stand(source: Source, image_column: str) -> str:
    """Return what to do about classes that a set does not state: its other columns, or what its file names say."""
    others = [name for name in source.table.features if name != image_column]
    return f" Its other columns are {', '.join(others)}." if others else classes_in_names(source.files or [])


def no_classes(spec: DataSpec, hint: str) -> UserError:
    """Return the error for a set whose classes are asked for and that has none.

    Args:
        spec: The set.
        hint: See `where_classes_may_stand`.
    """
    return UserError(f"The images of {spec.name} have no classes: name their label_column.{hint}")


def without_class(what: str) -> UserError:
    """Return the error for images without a class where classes are asked for: "3 of the 9 images of x have"."""
    return UserError(f"{what} no class (the label is empty or below 0): classes cannot be asked for.")


# Columns --------------------------------------------------------------------------------------------------------------


def _may_be_images(name: str, feature: object) -> bool:
    """Whether a column holds images or, under a name that says so, arrays or encoded files."""
    if isinstance(feature, (datasets.Image, datasets.Array2D, datasets.Array3D)):
        return True
    return name in ("image", "img", "images") and not isinstance(feature, (datasets.ClassLabel, datasets.Audio))


def _no_column(name: str, asked: str, features: datasets.Features) -> str:
    """Say that a column asked for is not there."""
    return f"{name} must be one of the columns {list(features)}, got {asked!r}.{did_you_mean(asked, features)}"


def find_image_column(features: datasets.Features, asked: str | None) -> str:
    """Return the column of the images: the one asked for, or the only one that can be meant."""
    if asked is not None:
        if asked not in features:
            raise UserError(_no_column("image_column", asked, features))
        return asked
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    found = found or [name for name, feature in features.items() if _may_be_images(name, feature)]
    if len(found) != 1:
        may = f": {found} may" if found else ", by its type none does"
        raise UserError(f"Say by --image_column which of the columns {list(features)} holds the images{may}.")
    return found[0]


def find_label_column(features: datasets.Features, asked: str | None) -> str | None:
    """Return the column of the labels: the one asked for, or the only one that can be meant, or None."""
    if asked is not None:
        if asked not in features:
            raise UserError(_no_column("label_column", asked, features))
        return asked
    found = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    return found[0] if len(found) == 1 else None


def read_labels(table: datasets.Dataset, column: str | None, known: Sequence[str] | None = None) -> Labels | None:
    """Read the labels of all rows; None without a column.

    Args:
        table: The rows.
        column: The column of the labels; words are numbered by alphabet.
        known: Class names whose places are the numbers, in place of the column's own order.

    Raises:
        UserError: values that are no classes, or a class that is not among the known ones.
    """
    if column is None:
        return None
    feature = table.features[column]
    names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    values = table[column][:]
    if any(isinstance(value, str) for value in values):
        names = sorted({value for value in values if value is not None})
        place = {name: i for i, name in enumerate(names)}
        values = [None if value is None else place[value] for value in values]
    return number_labels(values, names, column, known)


def number_labels(
    values: Sequence[object], names: Sequence[str] | None, column: str, known: Sequence[str] | None = None
) -> Labels:
    """Number labels as training did; see `read_labels`. Where there is none (None, NaN, below 0) it is -1.

    Args:
        values: The labels as they are stored.
        names: Names of the classes that the set itself gives, or None.
        column: Where they stand, for messages.
        known: The training's class names, whose places are the numbers; None takes the set's own.
    """
    numbers = np.full(len(values), -1, np.int64)
    for i, value in enumerate(values):
        if value is None or value != value or (isinstance(value, (int, float)) and value < 0):
            continue
        if not isinstance(value, (int, float, np.integer, np.floating)) or value != int(value):
            words = " (words are numbered when all are read: leave --streaming out)" if isinstance(value, str) else ""
            raise UserError(f"label_column {column!r} must hold classes, numbers from 0 upwards{words}, got {value!r}.")
        numbers[i] = int(value)
    if names is None and known is not None:
        names = [str(number) for number in range(int(numbers.max(initial=-1)) + 1)]
        names = names if set(names) <= set(known) else None
        if names is None:
            raise UserError(
                f"label_column {column!r} holds numbers without names, and the training's classes have the names "
                f"{list(known)}: which number is which is not said."
            )
    if names is None:
        return Labels(numbers, int(numbers.max(initial=-1)) + 1, None)
    if known is None:
        return Labels(numbers, len(names), list(names))
    used = {names[number] for number in np.unique(numbers[numbers >= 0])}
    unknown = [name for name in names if name in used and name not in known]
    if unknown:
        raise UserError(f"the classes {unknown} are none of the training's, which are {list(known)}.")
    place = np.asarray([known.index(name) if name in known else -1 for name in names] + [-1], np.int64)
    return Labels(place[numbers], len(known), list(known))
