"""Rows of encoded images -> levels: decoded once into memory or into a mapped file, or when asked for."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from filelock import FileLock

from ..errors import UserError
from ..signals import is_rank_0
from .cells import Cell, Rows, encoded_image, file_bytes, image_name
from .decoding.formats import UNREADABLE
from .decoding.levels import COLOURS, ImageFormat, Seen, decode_image, probe, reason
from .spec import DataSpec, Reading

__all__ = [
    "Cells",
    "Decoded",
    "Decoder",
    "decode_to_file",
    "decode_to_memory",
    "fingerprint",
    "image_format",
    "say_once",
    "source_digest",
    "tell_of",
]

_ROWS_AT_ONCE = 512
_SAMPLED_ROWS = 256  # rows whose whole content enters the fingerprint of a set too large to be read for it
_TRIED_ROWS = 16  # rows decoded at the start of a set that is not read as a whole
_ENOUGH = 100  # images met before a share of unreadable ones says something of a set of unknown length
_said: set[str] = set()


class Cells(Protocol):
    """Encoded images by number: the rows of a set, or a block of a stream."""

    def __len__(self) -> int: ...

    def cells(self, numbers: Sequence[int]) -> list[Cell]:
        """Return the cells of these numbers."""
        ...


class Decoded(NamedTuple):
    """Every readable image of a set."""

    levels: np.ndarray  # uint8 or uint16, shape (n, C, H, W)
    kept: np.ndarray  # int64, shape (n,): the row of each
    skipped: list[str]
    digest: str  # hex, of the levels
    told: list[str]  # what must be said of the set


def say_once(*sentences: str) -> None:
    """Print each sentence to stderr once in a program, on the first of several processes."""
    for sentence in sentences:
        if sentence not in _said and is_rank_0():
            _said.add(sentence)
            print(sentence, file=sys.stderr)


# Format ---------------------------------------------------------------------------------------------------------------


def image_format(rows: Cells, spec: DataSpec) -> ImageFormat:
    """Complete size, channels and depth of a set; what the spec does not say is read from the images.

    Raises:
        UserError: images of several sizes and no resolution, none that can be read, or a number out of range.
    """
    size, channels = spec.resolution, spec.channels
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise UserError(f"resolution must be a positive number or (height, width), got {size}.")
    if channels is not None and channels < 1:
        raise UserError(f"channels must be at least 1, got {channels}.")
    reasons = Reasons(len(rows))
    if size is None:
        size = _common_size(rows, spec, reasons)
    if channels is None:
        channels = _first(rows, spec, reasons)[2]
    return ImageFormat(
        *size, channels, spec.center_crop, spec.bits, spec.value_range, spec.channel_axis, spec.array_key
    )


def _common_size(rows: Cells, spec: DataSpec, reasons: Reasons) -> tuple[int, int]:
    """(H, W) of every image, from the headers alone."""
    first: tuple[str, tuple[int, int]] | None = None
    for number, cell in _each_cell(rows):
        found = _probed(number, cell, spec, reasons)
        if found is None:
            continue
        size = found[:2]
        first = first or (image_name(cell, number), size)
        if size != first[1]:
            raise UserError(
                f"The images have several sizes (height, width): {first[0]} {first[1]}, "
                f"{image_name(cell, number)} {size}. Give a resolution: then all are scaled and cropped to it."
            )
    if first is None:
        raise reasons.none_readable()
    return first[1]


def _first(rows: Cells, spec: DataSpec, reasons: Reasons) -> tuple[int, int, int]:
    """(H, W, C) of the first readable image."""
    for number, cell in _each_cell(rows):
        if (found := _probed(number, cell, spec, reasons)) is not None:
            return found
    raise reasons.none_readable()


def _probed(number: int, cell: Cell, spec: DataSpec, reasons: Reasons) -> tuple[int, int, int] | None:
    try:
        return probe(encoded_image(cell), spec.array_key, spec.channel_axis)
    except UNREADABLE as error:
        reasons.add(image_name(cell, number), error)
        return None


def _each_cell(rows: Cells) -> Iterator[tuple[int, Cell]]:
    """Number and cell of every row."""
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        numbers = range(start, min(start + _ROWS_AT_ONCE, len(rows)))
        yield from zip(numbers, rows.cells(numbers), strict=True)


class Reasons:
    """Why images cannot be read: by file for the first three, counted by reason for all.

    Args:
        total: Images of the set; None where that is not known.
    """

    def __init__(self, total: int | None) -> None:
        self.total = total
        self.names: dict[str, str] = {}  # name -> its own reason
        self._kinds: Counter[str] = Counter()

    def add(self, name: str, error: BaseException) -> None:
        """Remember one image and its reason."""
        if name not in self.names:
            self.names[name] = str(error).strip() or type(error).__name__
            self._kinds[reason(error)] += 1

    def __str__(self) -> str:
        """Count by reason, then the first three images with theirs."""
        of = "" if self.total is None else f" of {self.total:,}"
        counted = "; ".join(f"{count:,}{of}: {kind}" for kind, count in self._kinds.most_common(5))
        first = "; ".join(f"{name}: {why}" for name, why in list(self.names.items())[:3])
        return f"{counted}. The first: {first}"

    def none_readable(self) -> UserError:
        """The error for a set of which nothing can be read."""
        return UserError(f"None of the {self.total:,} images can be read: {self}")


# Decoding -------------------------------------------------------------------------------------------------------------


class Decoder:
    """Encoded images -> levels, with the unreadable ones counted and named, or fatal with `strict`.

    Args:
        form: What every image is turned into.
        reading: How.
        total: Images of the set; None where that is not known.
    """

    def __init__(self, form: ImageFormat, reading: Reading, total: int | None = None) -> None:
        self.form, self.reading = form, reading
        self.skipped: list[str] = []
        self.seen, self.reasons = Seen(), Reasons(total)
        self._met = 0
        workers = reading.num_workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode") if workers > 1 else None

    def decode(
        self, numbers: Sequence[int], cells: Sequence[Cell], name: Callable[[Cell, int], str] = image_name
    ) -> list[np.ndarray | None]:
        """Return the levels of each cell, shape (C, H, W), or None where it cannot be read.

        Args:
            numbers: The rows that the cells are of, which decide where each is cropped.
            cells: The stored images.
            name: What a cell is called in messages.
        """
        one = partial(self._decode_one, name)
        if self._pool is None:
            found = list(map(one, numbers, cells))
        else:  # a share for each thread: to hand over every image by itself costs as much as to decode a small one
            size = -(-len(cells) // self.reading.num_workers) or 1
            shares = [slice(start, start + size) for start in range(0, len(cells), size)]
            parts = self._pool.map(lambda share: list(map(one, numbers[share], cells[share])), shares)
            found = [levels for part in parts for levels in part]
        self._met += len(found)
        # Here and not by the threads, whose turns differ from run to run.
        return [one if isinstance(one, np.ndarray) else self._skip(*one) for one in found]

    def _decode_one(
        self, name_of: Callable[[Cell, int], str], number: int, cell: Cell
    ) -> np.ndarray | tuple[str, BaseException]:
        place = 0.5 if self.form.center_crop else float(np.random.default_rng(number).random())
        try:
            return decode_image(encoded_image(cell), self.form, place, self.seen)
        except UNREADABLE as error:
            name = name_of(cell, number)
            if self.reading.strict:
                raise UserError(f"The image {name} cannot be read: {error}") from error
            return name, error

    def _skip(self, name: str, error: BaseException) -> None:
        """Count and name an image that cannot be read."""
        self.reasons.add(name, error)
        if name not in self.skipped:
            self.skipped.append(name)

    def nearest_readable(
        self, rows: Cells, numbers: np.ndarray, name: Callable[[Cell, int], str] = image_name
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the levels of these rows, shape (B, C, H, W), and the rows they are of, shape (B,).

        Where an image cannot be read the next that can stands in for it, with all that belongs to it.

        Args:
            rows: The set.
            numbers: The rows asked for, int64, shape (B,).
            name: What a cell is called in messages.
        """
        levels, used = self.decode(numbers.tolist(), rows.cells(numbers.tolist()), name), numbers.copy()
        self._refuse_too_many()
        for place, number in enumerate(numbers.tolist()):
            following = number
            while levels[place] is None:
                following = (following + 1) % len(rows)
                if following == number:
                    raise Reasons.none_readable(self._of(len(rows)))
                levels[place] = self.decode([following], rows.cells([following]), name)[0]
            used[place] = following
        return np.stack([one for one in levels if one is not None]), used

    def every_image(self, rows: Rows) -> Iterator[tuple[int, np.ndarray]]:
        """Yield row number and levels of every readable image."""
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            numbers = range(start, min(start + _ROWS_AT_ONCE, len(rows)))
            for number, levels in zip(numbers, self.decode(numbers, rows.cells(numbers)), strict=True):
                if levels is not None:
                    yield number, levels

    def _of(self, total: int) -> Reasons:
        """The reasons, of a stated number of images."""
        self.reasons.total = total
        return self.reasons

    def _refuse_too_many(self) -> None:
        """Raise where more images than allowed cannot be read, as far as it is known."""
        total = self.reasons.total or (self._met if self._met >= _ENOUGH else None)
        if total is not None:
            self.check_share(len(self.skipped), total)

    def check_share(self, unreadable: int, total: int, reasons: str | None = None) -> None:
        """Raise a UserError where too great a share of a set cannot be read.

        Args:
            unreadable: How many cannot.
            total: Of how many.
            reasons: Why; None for what was met here.
        """
        allowed = self.reading.max_unreadable
        if unreadable > allowed * total:
            raise UserError(
                f"{unreadable:,} of {total:,} images cannot be read, more than the {allowed:.3g} of them that "
                f"--max_unreadable allows: {self.reasons if reasons is None else reasons}"
            )

    def sentences(self) -> list[str]:
        """Return what must be said of a set that was not read as it is stored, or fills a small part of its range."""
        seen, form, said = self.seen, self.form, list[str]()
        if seen.cut:
            said.append(
                f"{seen.cut:,} images store up to {seen.cut_bits} bits and are read at {form.bits}: --bits 16 (or "
                "--preserve_input_precision) keeps them."
            )
        largest = seen.largest.get(16, 0)
        if form.value_range is None and 0 < largest < 1 << 15:
            whole = (1 << max(1, largest.bit_length())) - 1
            said.append(
                f"The largest value of these 16-bit images is {largest} of 65535, so that they come out almost black: "
                f"if they hold {largest.bit_length()} bits, say --value_range 0 {whole}."
            )
        if form.value_range is not None and seen.span is not None and _fills_little(seen.span, form.value_range):
            (least, largest), (lo, hi) = seen.span, form.value_range
            said.append(
                f"The stored values, {least:g} to {largest:g}, fill less than 1/16 of --value_range {lo:g} {hi:g}, so "
                "that the images have few levels: state the range that the values can have."
            )
        if seen.enlarged and seen.smallest is not None:
            small = f"{seen.smallest[0]} x {seen.smallest[1]}"
            said.append(
                f"{seen.enlarged:,} images are smaller than {form.height} x {form.width} and are enlarged, the "
                f"smallest from {small}: --resolution {'x'.join(map(str, seen.smallest))} would keep its size."
            )
        return said + [_changed(mode, channels, count) for (mode, channels), count in sorted(seen.changed.items())]


def _fills_little(span: tuple[float, float], value_range: tuple[float, float]) -> bool:
    """Whether the values of a set that is not of one value fill less than 1/16 of the range stated for them."""
    return 0 < 16 * (span[1] - span[0]) < value_range[1] - value_range[0]


def _changed(mode: str, channels: int, count: int) -> str:
    """What was made of images whose colours are not the network's, and which network would hold them."""
    made = {
        ("LA", 1): "alpha is laid on white",
        ("RGBA", 3): "alpha is laid on white",
        ("LA", 3): "alpha is laid on white and grey repeated",
        ("RGB", 1): "they are read as grey (Rec. 601)",
        ("RGBA", 1): "alpha is laid on white, and they are read as grey (Rec. 601)",
        ("RGBA", 2): "they are read as grey (Rec. 601) and alpha",
    }.get((mode, channels), "grey is repeated")
    holds = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}[mode]
    return (
        f"{count:,} images are {COLOURS[mode]} and the network has {channels} channel{'s' * (channels > 1)}: {made}. A "
        f"network of {holds} (in_channels of --model_config_name_or_path; --init_new_head with --init_from) keeps them."
    )


def tell_of(rows: Cells, form: ImageFormat, reading: Reading) -> None:
    """Decode some rows of a set that is not read as a whole, to say what must be said of it.

    Args:
        rows: The set.
        form: What its images are brought to.
        reading: How it is read.

    Raises:
        UserError: none of them can be read, and they are not few.
    """
    numbers = range(min(len(rows), _TRIED_ROWS))
    some = Decoder(form, reading._replace(strict=False), len(numbers))
    if all(levels is None for levels in some.decode(numbers, rows.cells(numbers))):
        raise some.reasons.none_readable()
    say_once(*some.sentences())


def _fill(decoder: Decoder, rows: Rows, levels: np.ndarray) -> tuple[list[int], str]:
    """Write every readable image into `levels`, one after the other; their rows and the digest of their levels."""
    kept, digest = [], hashlib.blake2b(digest_size=16)
    for number, image in decoder.every_image(rows):
        levels[len(kept)] = image
        digest.update(image.data)
        kept.append(number)
    if not kept:
        raise decoder.reasons.none_readable()
    decoder.check_share(len(decoder.skipped), len(rows))
    return kept, digest.hexdigest()


def decode_to_memory(decoder: Decoder, rows: Rows) -> Decoded:
    """Decode every readable image into memory."""
    form = decoder.form
    levels = np.empty((len(rows), form.channels, form.height, form.width), form.dtype)
    kept, digest = _fill(decoder, rows, levels)
    return Decoded(levels[: len(kept)], np.asarray(kept, np.int64), decoder.skipped, digest, decoder.sentences())


def decode_to_file(decoder: Decoder, rows: Rows, cache: Path) -> Decoded:
    """Decode every readable image into a file that all processes map; the first of them writes it, the others wait.

    Args:
        decoder: What turns a cell into levels.
        rows: The set.
        cache: The file.
    """
    source = f"{rows.identity} {source_digest(rows, decoder.form)}"
    folder = cache / hashlib.blake2b(source.encode(), digest_size=16).hexdigest()
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            _write_decoded(decoder, rows, folder)
    record = json.loads((folder / "decoded.json").read_text(encoding="utf-8"))
    skipped: list[str] = record["skipped"]
    reasons = record.get("reasons") or f"{', '.join(skipped[:3])}."  # records of 0.1.0 had none
    if decoder.reading.strict and skipped:
        raise UserError(f"{len(skipped):,} of {len(rows):,} images cannot be read: {reasons}")
    decoder.check_share(len(skipped), len(rows), reasons)
    kept = np.load(folder / "kept.npy")
    levels = np.load(folder / "pixels.npy", mmap_mode="r")
    return Decoded(levels[: len(kept)], kept, skipped, record["digest"], record.get("told", []))


def _write_decoded(decoder: Decoder, rows: Rows, folder: Path) -> None:
    """Decode into a folder of another name and rename it: a folder of this name is complete."""
    form = decoder.form
    shape = (len(rows), form.channels, form.height, form.width)
    needed, free = int(np.prod(shape)) * np.dtype(form.dtype).itemsize, shutil.disk_usage(folder.parent).free
    if free < needed:
        raise UserError(
            f"{folder.parent} needs {needed:,} bytes for the decoded images and has {free:,}: set cache_dir."
        )
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        levels = np.lib.format.open_memmap(f"{temporary}/pixels.npy", "w+", form.dtype, shape)
        kept, digest = _fill(decoder, rows, levels)
        levels.flush()
        np.save(f"{temporary}/kept.npy", np.asarray(kept, np.int64))
        reasons = str(decoder.reasons) if decoder.skipped else None
        record = {"digest": digest, "skipped": decoder.skipped, "reasons": reasons, "told": decoder.sentences()}
        Path(temporary, "decoded.json").write_text(json.dumps(record), encoding="utf-8")
        os.rename(temporary, folder)
        os.mkdir(temporary)  # for its owner to remove


# Fingerprint ----------------------------------------------------------------------------------------------------------


def source_digest(rows: Rows, form: ImageFormat) -> str:
    """Return the hex digest of a set that is not read as a whole: number, format, rows spread over it."""
    digest = hashlib.blake2b(f"{len(rows)} {form.identity}".encode(), digest_size=16)
    numbers = np.unique(np.linspace(0, len(rows) - 1, _SAMPLED_ROWS).astype(np.int64)).tolist()
    for cell in rows.cells(numbers):
        digest.update(hashlib.blake2b(file_bytes(cell)).digest())
    return digest.hexdigest()


def fingerprint(digest: str, labels: np.ndarray | None, form: ImageFormat) -> str:
    """Return the hex digest of a whole set: images, labels, shape and depth.

    Args:
        digest: Hex digest of the images.
        labels: Of the images, shape (N,), or None.
        form: Their shape and depth.
    """
    depth = "" if form.bits == 8 else f"{form.bits} bits "
    whole = hashlib.blake2b(f"{digest} {(form.channels, form.height, form.width)} {depth}".encode(), digest_size=16)
    whole.update(b"" if labels is None else labels.tobytes())
    return whole.hexdigest()
