"""A data set too large to open -> pictures at global positions, shard after shard, with exact and elastic resume.

    epoch e:  shards in an order of (seed, e), read in blocks of N rows, each block permuted by (seed, e, its number)

Every process reads the same rows and decodes those of its own positions alone, so the order is that of the global batch
whatever the number of processes, and what must be stored is one place in the stream: the start of a block. An epoch
ends with a shorter block; batches run on into the next epoch, and no picture is left out or doubled. Pictures that
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
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor

from ddpm_ext.data.dataset import Batch
from ddpm_ext.data.pixels import Decoder, picture_format
from ddpm_ext.data.sources import (
    DIGITS,
    Cell,
    class_names,
    file_bytes,
    find_image_column,
    find_label_column,
    open_source,
    undecoded,
)
from ddpm_ext.data.spec import DataSpec

BLOCK_ROWS = 4096
REMEMBERED_BLOCKS = 64  # block starts kept, so that a state can be asked for behind what was read ahead
MARKED_ROWS = 16  # rows whose content enters the fingerprint, beside the name, size and row count of every file


class Place(NamedTuple):
    """The start of a block, all that is needed to read on from there."""

    position: int  # global position of the block's first row
    epoch: int
    block: int  # number of the block in its epoch
    shard: int  # place in the epoch's order of shards
    rows: dict[str, Any] | None  # state of `datasets` inside that shard; None at its beginning
    row: int = 0  # how many rows of the shard lie before


class Block(NamedTuple):
    """Rows of one block in their permuted order."""

    start: Place
    pictures: list[Cell]
    labels: list[int] | None
    names: list[str]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.pictures)

    def cells(self, numbers: Sequence[int]) -> list[Cell]:
        """The cells of these places in the block."""
        return [self.pictures[number] for number in numbers]

    def name(self, cell: Cell, number: int) -> str:
        """How the picture of a place is called in messages: the same in every epoch."""
        path = cell.get("path") if cell is not None else None
        return f"{path} ({self.names[number]})" if path else self.names[number]


class ImageStream:
    """Pictures by global position. Build it with `stream_images`.

    The same attributes and methods as `data.ImageSet`, but its length is not known (`num_images` is None) and positions
    should be asked for in ascending order: going back reads again from the nearest block start that is remembered.
    """

    num_images: int | None = None

    def __init__(
        self,
        table: Any,
        columns: tuple[str, str | None],
        decoder: Decoder,
        num_classes: int | None,
        fingerprint: str,
        block_rows: int,
        shard_names: list[str],
        spec: DataSpec,
    ) -> None:
        form = decoder.form
        self.shape = (form.channels, form.height, form.width)
        self.num_classes = num_classes
        self.fingerprint = fingerprint
        self.spec = replace(spec, resolution=self.shape[1:], channels=self.shape[0], fingerprint=fingerprint)
        self.skipped = decoder.skipped
        self._shard_names = shard_names
        self._table, self._columns, self._decoder, self._block_rows = table, columns, decoder, block_rows
        self._seed: int | None = None
        self._places: deque[Place] = deque([Place(0, 0, 0, 0, None)], maxlen=REMEMBERED_BLOCKS)
        self._block: Block | None = None
        self._reader: list[Iterator[Block]] = []  # at most one
        self._lock = threading.Lock()
        # Readers that are still open when Python shuts down complain about modules that are gone.
        weakref.finalize(self, self._reader.clear)

    def at(self, positions: Sequence[int] | Tensor, seed: int) -> Batch:
        """The pictures at these global positions of a training with this seed, in the order given."""
        asked = np.asarray(positions, dtype=np.int64).reshape(-1)
        if asked.size and asked.min() < 0:
            raise ValueError(f"positions count from 0, got {asked.min()}.")
        shape = (len(asked), *self.shape)
        pixels, labels = np.empty(shape, np.uint8), np.zeros(len(asked), np.int64)
        with self._lock:
            self._keep_to(seed)
            ascending = np.argsort(asked, kind="stable")
            while ascending.size:
                block = self._block_of(int(asked[ascending[0]]))
                here = ascending[asked[ascending] < block.start.position + len(block)]
                numbers = asked[here] - block.start.position
                pixels[here], used = self._decoder.nearest_readable(block, numbers, block.name)
                if block.labels is not None:
                    labels[here] = np.asarray(block.labels, np.int64)[used]
                ascending = ascending[len(here) :]
        return Batch(torch.from_numpy(pixels), torch.from_numpy(labels) if self._columns[1] is not None else None)

    def state_dict(self, position: int) -> dict[str, Any]:
        """What must be stored to go on at a global position, on any number of processes; plain JSON."""
        with self._lock:
            behind = [place for place in self._places if place.position <= position]
            if not behind:
                raise ValueError(f"position {position} lies before what is remembered, {self._places[0].position}.")
            return {"seed": self._seed, "block_rows": self._block_rows, **behind[-1]._asdict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        state = copy.deepcopy(state)
        seed, block_rows = state.pop("seed"), state.pop("block_rows")
        if block_rows != self._block_rows:
            raise ValueError(f"The state has blocks of {block_rows} rows, this stream has {self._block_rows}.")
        with self._lock:
            self._seed = seed
            self._restart(Place(**state))

    def _keep_to(self, seed: int) -> None:
        """Use this seed from the first call on."""
        if self._seed is None:
            self._seed = seed
        if seed != self._seed:
            raise ValueError(f"This stream is read in the order of seed {self._seed}, got seed {seed}: open another.")

    def _restart(self, place: Place) -> None:
        """Read on from a block start."""
        assert self._seed is not None
        remembered = [earlier for earlier in self._places if earlier.position < place.position]
        self._places.clear()
        self._places.extend([*remembered, place])
        self._block = None
        self._reader[:] = [self._read(place, self._seed)]

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
        num_shards = self._table.num_shards
        while True:
            order = _generator(seed, place.epoch).permutation(num_shards)
            rows: list[dict[str, Any]] = []
            names: list[str] = []
            for number in range(place.shard, num_shards):
                shard, first = self._table.shard(num_shards, int(order[number])), 0
                if number == place.shard and place.rows is not None:
                    shard.load_state_dict(place.rows)
                    first = place.row
                for in_shard, row in enumerate(shard, first):
                    rows.append(row)
                    names.append(f"row {in_shard} of {self._shard_names[order[number]]}")
                    if len(rows) == self._block_rows:
                        yield self._permuted(place, rows, names, seed)
                        end = place.position + len(rows)
                        place = Place(end, place.epoch, place.block + 1, number, shard.state_dict(), in_shard + 1)
                        rows, names = [], []
            if rows:
                yield self._permuted(place, rows, names, seed)
            elif place.block == 0:
                raise ValueError("The stream has no rows.")
            place = Place(place.position + len(rows), place.epoch + 1, 0, 0, None)

    def _permuted(self, start: Place, rows: list[dict[str, Any]], names: list[str], seed: int) -> Block:
        """One block in its permuted order."""
        column, label_column = self._columns
        order = _generator(seed, start.epoch, 1 + start.block).permutation(len(rows))
        labels = None if label_column is None else [int(rows[number][label_column]) for number in order]
        return Block(start, [rows[number][column] for number in order], labels, [names[number] for number in order])


def _generator(seed: int, *numbers: int) -> np.random.Generator:
    return np.random.default_rng((seed % 2**64, *numbers))


def shard_files(table: Any) -> list[list[str]]:
    """The files of each shard, as far as `datasets` reads from files; a shard of unknown source has none."""
    source = table._ex_iterable
    while hasattr(source, "ex_iterable"):
        source = source.ex_iterable
    arguments = getattr(source, "kwargs", {})
    parts = next((arguments[name] for name in ("files", "shards", "tar_paths") if name in arguments), [])
    shards = [list(dict.fromkeys(file_names(part))) for part in parts]
    if len(shards) != table.num_shards:  # one shard of many files, as a folder of pictures is
        shards = [list(dict.fromkeys(file_names(parts)))] if table.num_shards == 1 else [[]] * table.num_shards
    return shards


def file_names(source: Any) -> Iterator[str]:
    """The file names in what `datasets` calls a source: names, tuples and lists of them, opened sets."""
    if isinstance(source, str):
        yield source
    elif isinstance(source, datasets.Dataset):
        yield from (file["filename"] for file in source.cache_files)
    elif isinstance(source, Iterable):
        for part in source:
            yield from file_names(part)


def shard_names(shards: list[list[str]]) -> list[str]:
    """How shards are called in messages."""
    return [Path(files[0]).name if len(files) == 1 else f"shard {number}" for number, files in enumerate(shards)]


def content_mark(shards: list[list[str]]) -> str:
    """Names, sizes in bytes and numbers of rows of all files, as far as they can be known without reading them."""
    return "\n".join(" ".join(map(str, file_mark(file))) for files in shards for file in files)


def file_mark(file: str) -> tuple[str, int | None, int | None]:
    """(name without folders, bytes, rows) of a file, None where that is not known: elsewhere, or no parquet."""
    if not os.path.isfile(file):
        return Path(file).name, None, None
    rows = None
    if file.endswith(".parquet"):
        with suppress(OSError, pyarrow.ArrowException):
            rows = pyarrow.parquet.read_metadata(file).num_rows
    return Path(file).name, os.path.getsize(file), rows


def stream_images(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    resolution: int | tuple[int, int] | None = None,
    channels: int | None = None,
    *,
    center_crop: bool = True,
    strict: bool = False,
    cache_dir: str | None = None,
    num_workers: int = 0,
    block_rows: int = BLOCK_ROWS,
) -> ImageStream:
    """Open a data set as a stream; arguments as for `data.load_images`.

    Args:
        resolution: Must be given: the sizes of what has not been read are not known.
        label_column: Labels must be numbers; their count is known where the column states its classes.
        block_rows: N, rows that are held, still encoded, and permuted among themselves.

    Raises:
        ValueError: a set that cannot be opened or is empty, a missing column, no resolution.
    """
    if resolution is None:
        raise ValueError("A stream needs a resolution: the sizes of what has not been read are not known.")
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, got {block_rows}.")
    table = open_source(dataset_name, dataset_config_name, train_data_dir, split, cache_dir, streaming=True)
    if table.features is None:
        table = table._resolve_features()
    columns = find_image_column(table.features, image_column), find_label_column(table.features, label_column)
    label = table.features[columns[1]] if columns[1] is not None else None
    if isinstance(label, datasets.Value) and not pyarrow.types.is_integer(label.pa_type):
        raise ValueError(f"label_column {columns[1]!r} of a stream must hold numbers or ClassLabel, it holds {label}.")
    names = class_names(table.features, columns[1])
    table = undecoded(table, *columns)
    first = [row[columns[0]] for row in islice(iter(table), MARKED_ROWS)]
    if not first:
        raise ValueError(f"The data set is empty: split {split!r} of {dataset_name or train_data_dir} has no rows.")

    shards = shard_files(table)
    form = picture_format(Block(Place(0, 0, 0, 0, None), first, None, []), resolution, channels, center_crop)
    described = f"stream {table.num_shards} {block_rows} {tuple(form)}\n{content_mark(shards)}"
    mark = hashlib.blake2b(described.encode(), digest_size=16)
    for cell in first:
        mark.update(hashlib.blake2b(file_bytes(cell)).digest())
    decoder = Decoder(form, strict, num_workers)
    num_classes = None if names is None else len(names)
    spec = DataSpec(
        dataset_name=dataset_name or (None if train_data_dir else DIGITS),
        dataset_config_name=dataset_config_name,
        data_dir=train_data_dir,
        split=split,
        image_column=image_column,
        label_column=label_column,
        center_crop=center_crop,
        class_names=None if names is None else tuple(names),
    )
    return ImageStream(table, columns, decoder, num_classes, mark.hexdigest(), block_rows, shard_names(shards), spec)
