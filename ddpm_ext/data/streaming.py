"""A data set too large to open -> images at global positions, shard after shard, with exact and elastic resume.

    epoch e:  shards in an order of (seed, e), read in blocks of N rows, each block permuted by (seed, e, its number)

Every process reads the same rows and decodes those of its own positions alone, so the order is that of the global batch
whatever the number of processes, and what must be stored is one place in the stream: the start of a block. An epoch
ends with a shorter block; batches run on into the next epoch, and no image is left out or doubled. Images that
stand in one shard stay near each other: mix before writing shards.
"""

from __future__ import annotations

import copy
import hashlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor

from ..errors import UserError
from ..run_dir import JsonRecord
from .cells import Cell, Row, array_cell, file_bytes, undecoded
from .order import Batch, as_tensor
from .rows import Decoder, image_format, say_once, tell_of
from .sources import (
    empty_set,
    find_image_column,
    find_label_column,
    no_classes,
    number_labels,
    open_source,
    where_classes_may_stand,
    without_class,
)
from .spec import DataSpec, ImageOptions, Reading, spec_and_reading

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["BLOCK_ROWS", "ImageStream", "file_mark", "open_stream", "stream_images", "without_resolution"]

BLOCK_ROWS = 4096
_REMEMBERED_BLOCKS = 64  # block starts kept, so that a state can be asked for behind what was read ahead
_MARKED_ROWS = 16  # rows whose content enters the fingerprint, beside the name, size and row count of every file


class Place(NamedTuple):
    """The start of a block, all that is needed to read on from there."""

    position: int  # global position of the block's first row
    epoch: int
    block: int  # number of the block in its epoch
    shard: int  # place in the epoch's order of shards
    rows: JsonRecord | None  # state of `datasets` inside that shard; None at its beginning
    row: int = 0  # how many rows of the shard lie before


class Block(NamedTuple):
    """Rows of one block in their permuted order."""

    start: Place
    images: list[Cell]
    labels: np.ndarray | None  # int64
    names: list[str]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.images)

    def cells(self, numbers: Sequence[int]) -> list[Cell]:
        """The cells of these places in the block."""
        return [self.images[number] for number in numbers]

    def name(self, cell: Cell, number: int) -> str:
        """How the image of a place is called in messages: the same in every epoch."""
        path = cell.get("path") if isinstance(cell, dict) else None
        return f"{path} ({self.names[number]})" if path else self.names[number]


class ImageStream:
    """Images by global position. Build it with `stream_images`.

    The same attributes and methods as `data.ImageSet`, but its length is not known (`num_images` is None) and positions
    should be asked for in ascending order: going back reads again from the nearest block start that is remembered.
    """

    num_images: int | None = None

    def __init__(self, rows: _StreamRows, decoder: Decoder, block_rows: int, spec: DataSpec) -> None:
        assert spec.resolution is not None and spec.channels is not None and spec.fingerprint is not None
        self.shape = (spec.channels, *spec.resolution)
        self.num_classes = None if spec.class_names is None else len(spec.class_names)
        self.fingerprint = spec.fingerprint
        self.spec = spec
        self.skipped = decoder.skipped
        self._rows, self._decoder, self._block_rows = rows, decoder, block_rows
        self._classes_required = False
        self._seed: int | None = None
        self._places: deque[Place] = deque([Place(0, 0, 0, 0, None)], maxlen=_REMEMBERED_BLOCKS)
        self._block: Block | None = None
        self._reader: list[Iterator[Block]] = []  # at most one
        self._lock = threading.Lock()
        # Readers that are still open when Python shuts down complain about modules that are gone.
        weakref.finalize(self, self._reader.clear)

    def require_classes(self) -> None:
        """Refuse a set without classes now, and an image without one when it is met.

        Raises:
            UserError: it states no classes.
        """
        if self._rows.label_column is None:
            raise no_classes(self.spec, self._rows.hint)
        if self.num_classes is None:
            raise UserError(
                f"The label_column {self._rows.label_column!r} of {self.spec.name} does not say how many classes there "
                "are, and a stream is not read to count them: leave --streaming out."
            )
        self._classes_required = True

    def at(self, positions: Sequence[int] | Tensor, seed: int) -> Batch:
        """The images at these global positions of a training with this seed, in the order given."""
        asked = np.asarray(positions, dtype=np.int64).reshape(-1)
        if asked.size and asked.min() < 0:
            raise UserError(f"positions count from 0, got {asked.min()}.")
        levels = np.empty((len(asked), *self.shape), self._decoder.form.dtype)
        labels = np.zeros(len(asked), np.int64)
        with self._lock:
            self._keep_to(seed)
            ascending = np.argsort(asked, kind="stable")
            while ascending.size:
                block = self._block_of(int(asked[ascending[0]]))
                here = ascending[asked[ascending] < block.start.position + len(block)]
                numbers = asked[here] - block.start.position
                levels[here], used = self._decoder.nearest_readable(block, numbers, block.name)
                if block.labels is not None:
                    labels[here] = block.labels[used]
                    self._check_classes(block, used)
                ascending = ascending[len(here) :]
        return Batch(as_tensor(levels), torch.from_numpy(labels) if self._rows.label_column is not None else None)

    def _check_classes(self, block: Block, numbers: np.ndarray) -> None:
        """Refuse an image without a class where classes were asked for."""
        assert block.labels is not None
        without = [int(number) for number in numbers if block.labels[number] < 0]
        if without and self._classes_required:
            name = block.name(block.images[without[0]], without[0])
            raise without_class(f"The image {name} of {self.spec.name} has")

    def state_dict(self, position: int) -> JsonRecord:
        """What must be stored to go on at a global position, on any number of processes; plain JSON."""
        with self._lock:
            behind = [place for place in self._places if place.position <= position]
            if not behind:
                raise UserError(f"position {position} lies before what is remembered, {self._places[0].position}.")
            return {"seed": self._seed, "block_rows": self._block_rows, **behind[-1]._asdict()}

    def load_state_dict(self, state: JsonRecord) -> None:
        """Go on from what `state_dict` returned."""
        state = copy.deepcopy(state)
        seed, block_rows = state.pop("seed"), state.pop("block_rows")
        if block_rows != self._block_rows:
            raise UserError(f"The state has blocks of {block_rows} rows, this stream has {self._block_rows}.")
        with self._lock:
            self._seed = seed
            self._restart(Place(**state))

    def _keep_to(self, seed: int) -> None:
        """Use this seed from the first call on."""
        if self._seed is None:
            self._seed = seed
        if seed != self._seed:
            raise UserError(f"This stream is read in the order of seed {self._seed}, got seed {seed}: open another.")

    def _restart(self, place: Place) -> None:
        """Read on from a block start; the seed is not known before the first images are asked for."""
        remembered = [earlier for earlier in self._places if earlier.position < place.position]
        self._places.clear()
        self._places.extend([*remembered, place])
        self._block = None
        self._reader[:] = [] if self._seed is None else [self._read(place, self._seed)]

    def _block_of(self, position: int) -> Block:
        """The block that holds a position."""
        if self._block is None or position < self._block.start.position:
            behind = [place for place in self._places if place.position <= position]
            self._restart(behind[-1] if behind else Place(0, 0, 0, 0, None))
        while self._block is None or position >= self._block.start.position + len(self._block):
            self._block = next(self._reader[0])
            if self._block.start.position > self._places[-1].position:
                self._places.append(self._block.start)
        return self._block

    def _read(self, place: Place, seed: int) -> Iterator[Block]:
        """Blocks from a place on, without end."""
        num_shards = self._rows.num_shards
        while True:
            order = _generator(seed, place.epoch).permutation(num_shards)
            rows: list[Row] = []
            names: list[str] = []
            for number in range(place.shard, num_shards):
                at = place if number == place.shard else None
                shard, first = self._rows.shard(int(order[number]), at)
                for in_shard, row in enumerate(shard, first):
                    rows.append(row)
                    names.append(f"row {in_shard} of {self._rows.names[order[number]]}")
                    if len(rows) == self._block_rows:
                        yield self._permuted(place, rows, names, seed)
                        end = place.position + len(rows)
                        state = self._rows.state(shard)
                        place = Place(end, place.epoch, place.block + 1, number, state, in_shard + 1)
                        rows, names = [], []
            if rows:
                yield self._permuted(place, rows, names, seed)
            elif place.block == 0:
                raise UserError("The stream has no rows.")
            place = Place(place.position + len(rows), place.epoch + 1, 0, 0, None)

    def _permuted(self, start: Place, rows: list[Row], names: list[str], seed: int) -> Block:
        """One block in its permuted order."""
        order = _generator(seed, start.epoch, 1 + start.block).permutation(len(rows))
        images, labels = self._rows.read([rows[number] for number in order])
        return Block(start, images, labels, [names[number] for number in order])


class _StreamRows:
    """The rows of a stream, shard by shard.

    Args:
        spec: What to open.
        cache_dir: Home of downloads.
    """

    def __init__(self, spec: DataSpec, cache_dir: str | None) -> None:
        source = open_source(spec, cache_dir, streaming=True)
        if source.note is not None:
            say_once(source.note)
        table = source.table if source.table.features is not None else source.table._resolve_features()
        self.column = find_image_column(table.features, spec.image_column)
        self.hint = where_classes_may_stand(source._replace(table=table), self.column)
        self.label_column = find_label_column(table.features, spec.label_column)
        label = table.features[self.label_column] if self.label_column is not None else None
        if isinstance(label, datasets.Value) and label.dtype in ("string", "large_string"):
            raise UserError(
                f"label_column {self.label_column!r} of a stream must hold numbers or ClassLabel, it holds {label}: "
                "words are numbered when all are read, leave --streaming out."
            )
        self._names = list(label.names) if isinstance(label, datasets.ClassLabel) else None
        self._known = spec.class_names
        self.class_names = self._names if self._known is None else list(self._known)
        self._table = undecoded(table, self.column, self.label_column)
        self._feature = self._table.features[self.column]
        self.num_shards = self._table.num_shards
        self._in_files = source.files is not None  # rows that are paths: a place is the number of rows before it
        self.shards = [list(source.files)] if source.files is not None else _shard_files(self._table)
        self.names = [Path(files[0]).name if len(files) == 1 else f"shard {i}" for i, files in enumerate(self.shards)]

    def first(self, count: int) -> list[Cell]:
        """Return the cells of the first rows."""
        return self.read(list(islice(iter(self._table), count)))[0]

    def read(self, rows: list[Row]) -> tuple[list[Cell], np.ndarray | None]:
        """Return images and labels of rows."""
        images = [array_cell(row[self.column], self._feature) for row in rows]
        if self.label_column is None:
            return images, None
        values = [row[self.label_column] for row in rows]
        return images, number_labels(values, self._names, self.label_column, self._known).numbers

    def shard(self, number: int, place: Place | None) -> tuple[Any, int]:
        """Return a shard from a place in it on, and how many of its rows lie before."""
        shard = self._table.shard(self.num_shards, number)
        if place is None or place.row == 0:
            return shard, 0
        if self._in_files:
            return shard.skip(place.row), place.row
        shard.load_state_dict(place.rows)
        return shard, place.row

    def state(self, shard: datasets.IterableDataset) -> JsonRecord | None:
        """Return what `datasets` needs to go on in a shard."""
        return None if self._in_files else shard.state_dict()


def _generator(seed: int, *numbers: int) -> np.random.Generator:
    return np.random.default_rng((seed % 2**64, *numbers))


def _shard_files(table: Any) -> list[list[str]]:
    """The files of each shard, as far as `datasets` reads from files; a shard of unknown source has none."""
    source = table._ex_iterable
    while hasattr(source, "ex_iterable"):
        source = source.ex_iterable
    arguments = getattr(source, "kwargs", {})
    parts = next((arguments[name] for name in ("files", "shards", "tar_paths") if name in arguments), [])
    shards = [list(dict.fromkeys(_file_names(part))) for part in parts]
    if len(shards) != table.num_shards:  # one shard of many files, as a folder of images is
        shards = [list(dict.fromkeys(_file_names(parts)))] if table.num_shards == 1 else [[]] * table.num_shards
    return shards


def _file_names(source: object) -> Iterator[str]:
    """The file names in what `datasets` calls a source: names, tuples and lists of them, opened sets."""
    if isinstance(source, str):
        yield source
    elif isinstance(source, datasets.Dataset):
        yield from (file["filename"] for file in source.cache_files)
    elif isinstance(source, Iterable):
        for part in source:
            yield from _file_names(part)


def _content_mark(shards: list[list[str]]) -> str:
    """Names, sizes in bytes and numbers of rows of all files, as far as they can be known without reading them."""
    return "\n".join(" ".join(map(str, file_mark(file))) for files in shards for file in files)


def file_mark(file: str) -> tuple[str, int | None, int | None]:
    """Return (name without folders, bytes, rows) of a file, None where not known: elsewhere, or no parquet."""
    if not os.path.isfile(file):
        return Path(file).name, None, None
    rows = None
    if file.endswith(".parquet"):
        with suppress(OSError, pyarrow.ArrowException):
            rows = pyarrow.parquet.read_metadata(file).num_rows
    return Path(file).name, os.path.getsize(file), rows


def without_resolution() -> UserError:
    """Return the error for a stream whose images have no stated size."""
    return UserError("A stream needs a --resolution: the sizes of what has not been read are not known.")


def stream_images(
    dataset_name: str | None = None, *, block_rows: int = BLOCK_ROWS, **options: Unpack[ImageOptions]
) -> ImageStream:
    """Open a data set as a stream.

    Args:
        dataset_name: As for `load_images`.
        block_rows: N, rows that are held, still encoded, and permuted among themselves.
        **options: As for `load_images`. A resolution must be given: the sizes of what has not been read are not known.
            Labels must be numbers; their count is known where the column states its classes.

    Raises:
        UserError: a set that cannot be opened or is empty, a missing column, no resolution.
    """
    return open_stream(*spec_and_reading(dataset_name, **options), block_rows)


def open_stream(spec: DataSpec, reading: Reading | None = None, block_rows: int = BLOCK_ROWS) -> ImageStream:
    """Open the images that a spec names as a stream; see `stream_images`.

    Args:
        spec: Which images.
        reading: How they are read; None for the defaults.
        block_rows: Rows that are shuffled together.
    """
    reading = reading or Reading()
    if spec.resolution is None:
        raise without_resolution()
    if block_rows < 1:
        raise UserError(f"block_rows must be at least 1, got {block_rows}.")
    rows = _StreamRows(spec, reading.cache_dir)
    first = rows.first(_MARKED_ROWS)
    if not first:
        raise empty_set(spec)
    some = Block(Place(0, 0, 0, 0, None), first, None, [])
    form = image_format(some, spec)
    described = f"stream {rows.num_shards} {block_rows} {form.identity}\n{_content_mark(rows.shards)}"
    mark = hashlib.blake2b(described.encode(), digest_size=16)
    for cell in first:
        mark.update(hashlib.blake2b(file_bytes(cell)).digest())
    names = None if rows.class_names is None else tuple(rows.class_names)
    spec = replace(spec, channels=form.channels, class_names=names, fingerprint=mark.hexdigest())
    tell_of(some, form, reading)
    return ImageStream(rows, Decoder(form, reading), block_rows, spec)
