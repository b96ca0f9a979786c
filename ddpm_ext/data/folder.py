"""Files of a folder -> the images of one split and their classes; what is left out and why.

A folder is a list of names, so that a local folder, a repository on the Hub and an archive are read by one rule:

- Sub-folders (or archives) named train, test, validation … are splits; without any, all of the folder is "train".
- Archives are read as if unpacked where they lie.
- Sub-folders are classes where all images lie equally deep in at least two of them.
- Notes, tables, hidden files and the like change nothing.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image

from ..errors import UserError
from .decoding.files import archive_kind, archive_members
from .decoding.formats import NO_IMAGES, is_image, why_no_image

__all__ = [
    "ARRAYS",
    "SPLIT_FOLDERS",
    "Entry",
    "Listing",
    "classes_in_names",
    "image_count",
    "list_images",
    "local_entries",
    "split_prefix",
]

# Sub-folders of these names are splits and not classes (the words of `datasets`).
SPLIT_FOLDERS = (
    *("train", "training", "validation", "valid", "val", "dev"),
    *("test", "testing", "eval", "evaluation"),
)
ARRAYS = (".npy", ".npz")
_SHOWN = 3  # names of each kind in a message


class Entry(NamedTuple):
    """A file of a folder."""

    name: str  # relative to the folder, with "/"
    path: str  # for `files.read_bytes`


class Listing(NamedTuple):
    """The images of one split."""

    paths: list[str]  # in the order of their names
    classes: list[str] | None  # class of each, None where the folder has no classes
    class_names: list[str] | None  # in the order of their numbers: the training split's
    note: str | None  # a sentence: what is left out and why; None where every file is an image


def local_entries(folder: Path) -> list[Entry]:
    """Return every file of a local folder, through symbolic links, by name."""
    found, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        found += [os.path.join(place, file) for file in files]
    return sorted(Entry(Path(path).relative_to(folder).as_posix(), path) for path in found)


def _expanded(entries: Iterable[Entry]) -> tuple[list[Entry], dict[str, list[str]]]:
    """Return the entries with each archive replaced by its members, and the archives that cannot be read, by reason."""
    found: list[Entry] = []
    broken: dict[str, list[str]] = defaultdict(list)
    for entry in entries:
        if archive_kind(entry.name) is None or _is_hidden(entry.name):
            found.append(entry)
            continue
        parent, stem = PurePosixPath(entry.name).parent, PurePosixPath(entry.name).name.split(".")[0]
        place = parent / stem if stem.lower() in SPLIT_FOLDERS else parent
        try:
            members = archive_members(entry.path)
        except OSError as error:
            broken[f"broken archive ({error})"].append(entry.name)
            continue
        if len({PurePosixPath(name).parts[0].lower() for name, _ in members}) == 1 and members[0][0].lower().startswith(
            f"{place.name.lower()}/"
        ):
            place = place.parent  # train.zip holds train/ itself
        found += [Entry((place / name).as_posix(), path) for name, path in members]
    return found, broken


def image_count(entries: Iterable[Entry]) -> int:
    """Return how many of some files are images by their suffix."""
    return sum(not _is_hidden(entry.name) and _suffix_kind(entry.name) == "image" for entry in entries)


def list_images(entries: Iterable[Entry], split: str, where: str) -> Listing:
    """Choose the images of a split among the files of a folder.

    Args:
        entries: Every file of the folder.
        split: The split asked for.
        where: The folder's name in messages.

    Raises:
        UserError: it holds no images, or not that split, or splits where classes should be.
    """
    files, left_out = _expanded(entries)
    total = len(files) + sum(map(len, left_out.values()))
    visible = []
    for entry in files:
        if _is_hidden(entry.name):
            left_out["hidden"].append(entry.name)
        else:
            visible.append(entry)
    part = split_prefix([entry.name for entry in visible], split)
    images, arrays, names = [], [], {entry.name for entry in visible}
    for entry in visible:
        if not entry.name.startswith(part):
            if _in_split(entry.name, part):
                total -= 1
            else:
                left_out[f"outside {part}"].append(entry.name)
            continue
        kind = _kind(entry)
        if kind == "image" and (beside := _drawn_of(entry.name, names)):
            left_out[beside].append(entry.name)
        elif kind == "image":
            images.append(entry)
        elif kind == "array":
            arrays.append(entry)
        else:
            left_out[kind].append(entry.name)
    if images and arrays:
        left_out["arrays beside images: give them a folder of their own"] += [entry.name for entry in arrays]
    chosen = images or arrays
    note = _told(left_out)
    if not chosen:
        raise UserError(f"it holds no images{f' ({note})' if note else ': it is empty'}.")
    chosen.sort()
    classes, class_names = _numbered([entry.name for entry in chosen], [entry.name for entry in visible], part, where)
    sentence = f"{where}: {len(chosen)} images of {total} files are read; left out: {note}." if note else None
    return Listing([entry.path for entry in chosen], classes, class_names, sentence)


def _drawn_of(name: str, names: set[str]) -> str | None:
    """What an image is drawn of, where it is none of its own: a preview beside its array, the grid of drawn samples.

    Raises:
        UserError: an array has the same name, and no samples.json says that the image is its preview.
    """
    path = PurePosixPath(name)
    beside = next((one for one in (str(path.with_suffix(suffix)) for suffix in ARRAYS) if one in names), None)
    if str(path.with_name("samples.json")) in names:
        return "preview of an array" if beside else "grid of samples" if path.name == "grid.png" else None
    if beside is not None:
        raise UserError(
            f"{name} and {beside} are two images of one name, and which is meant is not said: move one of them to a "
            "folder of its own. (An image is left out as a preview beside the samples.json of `sample` alone.)"
        )
    return None


def _numbered(chosen: list[str], names: list[str], part: str, where: str) -> tuple[list[str] | None, list[str] | None]:
    """The class of each chosen image, and all classes in the order of their numbers: those of the training split.

    Raises:
        UserError: the split has a class that training has not.
    """
    above = part.rstrip("/").rpartition("/")[0]
    for folder in (f"{above}/{name}/".lstrip("/") for name in ("train", "training")):
        beside = [name for name in names if name.lower().startswith(folder.lower()) and _suffix_kind(name) is not None]
        known = None if part.lower() == folder.lower() or not beside else _classes(beside, where)
        found = [PurePosixPath(name).parent.name for name in chosen]
        if known is None or not all(name.removeprefix(part).count("/") for name in chosen):
            continue
        if unknown := sorted(set(found) - set(known)):
            raise UserError(f"the classes {unknown} of {part} are none of {folder}, which has {sorted(set(known))}.")
        return found, sorted(set(known))
    classes = _classes(chosen, where)
    return classes, None if classes is None else sorted(set(classes))


def _is_hidden(name: str) -> bool:
    """Whether a file is nobody's data: hidden, or what macOS and Windows leave beside images."""
    parts = PurePosixPath(name).parts
    return any(part.startswith((".", "__")) for part in parts) or parts[-1].lower() in ("thumbs.db", "desktop.ini")


def split_prefix(names: list[str], split: str) -> str:
    """Return the sub-folder of a split with its "/", or "" where all of the folder is "train".

    Raises:
        UserError: the folder has other splits, or none and another than "train" is asked for.
    """
    above = ""
    while True:
        inner = [name.removeprefix(above).split("/") for name in names if name.startswith(above)]
        folders = sorted({parts[0] for parts in inner if len(parts) > 1})
        found = [folder for folder in folders if folder.lower() in SPLIT_FOLDERS]
        found.sort(key=lambda folder: SPLIT_FOLDERS.index(folder.lower()))
        same = [folder for folder in folders if folder == split] or [f for f in found if f.lower() == split.lower()]
        if same and (found or split != "train"):
            return f"{above}{same[0]}/"
        images_here = any(len(parts) == 1 and _suffix_kind(parts[0]) == "image" for parts in inner)
        if found or len(folders) != 1 or images_here:
            break
        above = f"{above}{folders[0]}/"  # one folder that holds all, as data/ in many repositories
    if found or split != "train":
        has = f"the sub-folders {found}" if found else 'no sub-folder of a split\'s name, so that all of it is "train"'
        raise UserError(f"the folder has {has}. Ask for what is there, or make the sub-folder {split!r}.")
    return ""


def _in_split(name: str, part: str) -> bool:
    """Whether a file outside a split's folder lies in the folder of another one."""
    above = part.rstrip("/").rpartition("/")[0]
    inner = name.removeprefix(f"{above}/" if above else "")
    return "/" in inner and inner.split("/")[0].lower() in SPLIT_FOLDERS


@cache
def _image_suffixes() -> frozenset[str]:
    Image.init()
    readable = {suffix: name for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    return frozenset(suffix for suffix, name in readable.items() if name not in NO_IMAGES)


def _suffix_kind(name: str) -> str | None:
    """Say "image" or "array" by a file's suffix; None where it does not tell."""
    suffix = PurePosixPath(name).suffix.lower()
    return "image" if suffix in _image_suffixes() else "array" if suffix in ARRAYS else None


# Suffixes of files that are surely no images, which need not be opened to know it.
_KNOWN = frozenset(
    f".{suffix}"
    for suffix in (
        *(
            "md",
            "txt",
            "csv",
            "tsv",
            "json",
            "jsonl",
            "yaml",
            "yml",
            "xml",
            "html",
            "toml",
            "cfg",
            "ini",
            "log",
            "py",
            "sh",
        ),
        *("parquet", "arrow", "pt", "pth", "safetensors", "pkl", "pickle", "pdf", "svg", "db", "bin", "cls"),
        *("mp4", "avi", "mov", "mkv", "webm", "mp3", "wav", "lock", "sha256", "md5"),
    )
)


def _kind(entry: Entry) -> str:
    """Say "image", "array", or why a file is neither."""
    suffix = PurePosixPath(entry.name).suffix.lower()
    if archive_kind(entry.name) is not None:
        return "archive in an archive: unpack the outer one"
    if (found := _suffix_kind(entry.name)) is not None:
        return found
    if suffix in _KNOWN:
        return suffix
    if is_image(entry.path):
        return "image"
    return why_no_image(entry.path) or suffix or "without a suffix, no image"


def classes_in_names(paths: Sequence[str]) -> str:
    """Return what to do about classes that stand in file names, as cat_01.png, or in folders that are none as they lie.

    Nothing where neither does.
    """
    words = [re.match(r"([A-Za-z]+)[ ._-]?\d+\.", path.rpartition("/")[2]) for path in paths]
    found = sorted({word[1] for word in words if word})
    if not 2 <= len(found) <= len(paths) / 2 or not all(words):
        return _folders_that_are_no_classes(paths)
    some = ", ".join(found[:5]) + (", …" if len(found) > 5 else "")
    return (
        f" Their file names begin with {some}: sort them into folders of these names, or write a metadata.csv with the "
        "columns file_name and label, and give --label_column label."
    )


def _folders_that_are_no_classes(paths: Sequence[str]) -> str:
    """Return why several folders or archives of images are no classes; nothing where there is one."""
    inner = [PurePosixPath(path.partition("::")[0]) for path in paths]
    archives = sorted({path.partition("::")[2] for path in paths})
    depths = {len(path.parts): str(path) for path in reversed(inner)}
    if len(archives) > 1:
        return f" They lie in {len(archives)} archives, which are no classes: unpack each to a folder of its own."
    if len(depths) > 1:
        least, most = depths[min(depths)], depths[max(depths)]
        return f" Sub-folders are classes where all images lie equally deep, and {least} and {most} do not."
    if len({path.parent for path in inner}) > 1:
        return (
            f" Each lies in a folder called {inner[0].parent.name!r}: classes are the folders right above the images."
        )
    return ""


def _told(left_out: dict[str, list[str]]) -> str:
    """What is left out, by reason: "2 .txt (a.txt, b.txt), 1 hidden (.DS_Store)"."""
    parts = []
    for reason, names in sorted(left_out.items(), key=lambda item: -len(item[1])):
        some = ", ".join(sorted(names)[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
        parts.append(f"{len(names):,} {reason} ({some})")
    return ", ".join(parts)


def _classes(names: list[str], where: str) -> list[str] | None:
    """The class folder of each image; None without at least two of them at one depth."""
    paths = [PurePosixPath(name) for name in names]
    found = [path.parent.name for path in paths]
    if len(set(found)) < 2 or len({len(path.parts) for path in paths}) > 1:
        return None
    splits = sorted({name for name in found if name.lower() in SPLIT_FOLDERS})
    if splits:
        some = next(path.parent.parent for path in paths if path.parent.name == splits[0])
        raise UserError(
            f"the sub-folders {splits} of {where}{'' if str(some) == '.' else f'/{some}'} are named as splits and lie "
            "where classes would: give the folder above them, or move each split to one folder."
        )
    return found
