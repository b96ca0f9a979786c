"""Rows of encoded pictures -> uint8 pixels: decoded once into memory or into a mapped file, or when asked for."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from filelock import FileLock
from PIL import Image

from ddpm_ext.data.decoding import UNREADABLE, PictureFormat, decode_picture, eight_bits, open_picture, upright_size
from ddpm_ext.data.sources import Cell, Rows, encoded_picture, file_bytes, picture_name

ROWS_AT_ONCE = 512
SAMPLED_ROWS = 256  # rows whose whole content enters the fingerprint of a set too large to be read for it

Result = TypeVar("Result")
Name = Callable[[Cell, int], str]  # how a picture is called in messages: its cell and its number


class Cells(Protocol):
    """Encoded pictures by number: the rows of a set, or a block of a stream."""

    def __len__(self) -> int: ...

    def cells(self, numbers: Sequence[int]) -> list[Cell]:
        """The cells of these numbers."""
        ...


class Decoded(NamedTuple):
    """Every readable picture of a set."""

    pixels: np.ndarray  # uint8, shape (n, C, H, W)
    kept: np.ndarray  # int64, shape (n,): the row of each
    skipped: list[str]
    digest: str  # hex, of the pixels


# Format ---------------------------------------------------------------------------------------------------------------


def picture_format(
    rows: Cells, resolution: int | tuple[int, int] | None, channels: int | None, center_crop: bool
) -> PictureFormat:
    """Size and channels of the set; what is not given is read from its pictures, which must then agree in size."""
    if resolution is not None:
        size = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"resolution must be a positive number or (height, width), got {resolution}.")
    else:
        size = common_size(rows)
    if channels is None:
        channels = 1 if first_mode(rows) in ("L", "LA") else 3
    if channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels}.")
    return PictureFormat(size[0], size[1], channels, center_crop)


def common_size(rows: Cells) -> tuple[int, int]:
    """(H, W) of every picture, from the headers alone."""
    first: tuple[str, tuple[int, int]] | None = None
    for number, cell in each_cell(rows):
        size = read_or_none(upright_size, cell)
        if size is None:
            continue
        first = first or (picture_name(cell, number), size)
        if size != first[1]:
            raise ValueError(
                f"The pictures have several sizes (height, width): {first[0]} {first[1]}, "
                f"{picture_name(cell, number)} {size}. Give a resolution: then all are scaled and cropped to it."
            )
    if first is None:
        raise ValueError(f"None of the {len(rows)} pictures can be read.")
    return first[1]


def first_mode(rows: Cells) -> str:
    """Pillow's mode of the first readable picture, at 8 bits."""
    for _, cell in each_cell(rows):
        mode = read_or_none(lambda image: eight_bits(image).mode, cell)
        if mode is not None:
            return mode
    raise ValueError(f"None of the {len(rows)} pictures can be read.")


def read_or_none(what: Callable[[Image.Image], Result], cell: Cell) -> Result | None:
    """Something about one picture, or None where it cannot be read."""
    try:
        with open_picture(encoded_picture(cell)) as image:
            return what(image)
    except UNREADABLE:
        return None


def each_cell(rows: Cells) -> Iterator[tuple[int, Cell]]:
    """Number and cell of every row."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        numbers = range(start, min(start + ROWS_AT_ONCE, len(rows)))
        yield from zip(numbers, rows.cells(numbers), strict=True)


# Decoding -------------------------------------------------------------------------------------------------------------


class Decoder:
    """Encoded pictures -> pixels, with the unreadable ones counted and named, or fatal with `strict`."""

    def __init__(self, form: PictureFormat, strict: bool, num_workers: int) -> None:
        self.form = form
        self.strict = strict
        self.skipped: list[str] = []
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="decode") if num_workers > 1 else None

    def decode(
        self, numbers: Sequence[int], cells: Sequence[Cell], name: Name = picture_name
    ) -> list[np.ndarray | None]:
        """Pixels of each cell, uint8 (C, H, W), or None where it cannot be read."""
        run = map if self._pool is None else self._pool.map
        return list(run(partial(self._decode_one, name), numbers, cells))

    def _decode_one(self, name_of: Name, number: int, cell: Cell) -> np.ndarray | None:
        place = 0.5 if self.form.center_crop else float(np.random.default_rng(number).random())
        try:
            return decode_picture(encoded_picture(cell), self.form, place)
        except UNREADABLE as error:
            name = name_of(cell, number)
            if self.strict:
                raise ValueError(f"The picture {name} cannot be read: {error}") from error
            if name not in self.skipped:
                self.skipped.append(name)
            return None

    def nearest_readable(
        self, rows: Cells, numbers: np.ndarray, name: Name = picture_name
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pixels of these rows, shape (B, C, H, W), and the rows they are of, shape (B,).

        Where a picture cannot be read the next that can stands in for it, with all that belongs to it.
        """
        pixels, used = self.decode(numbers.tolist(), rows.cells(numbers.tolist()), name), numbers.copy()
        for place, number in enumerate(numbers.tolist()):
            following = number
            while pixels[place] is None:
                following = (following + 1) % len(rows)
                if following == number:
                    raise ValueError(f"None of the {len(rows)} pictures can be read, e.g. {self.skipped[0]}.")
                pixels[place] = self.decode([following], rows.cells([following]), name)[0]
            used[place] = following
        return np.stack([one for one in pixels if one is not None]), used

    def every_picture(self, rows: Rows) -> Iterator[tuple[int, np.ndarray]]:
        """Row number and pixels of every readable picture."""
        for start in range(0, len(rows), ROWS_AT_ONCE):
            numbers = range(start, min(start + ROWS_AT_ONCE, len(rows)))
            for number, pixels in zip(numbers, self.decode(numbers, rows.cells(numbers)), strict=True):
                if pixels is not None:
                    yield number, pixels


def fill(decoder: Decoder, rows: Rows, pixels: np.ndarray) -> tuple[list[int], str]:
    """Write every readable picture into `pixels`, one after the other; their rows and the digest of their pixels."""
    kept, digest = [], hashlib.blake2b(digest_size=16)
    for number, picture in decoder.every_picture(rows):
        pixels[len(kept)] = picture
        digest.update(picture.data)
        kept.append(number)
    if not kept:
        raise ValueError(f"None of the {len(rows)} pictures can be read, e.g. {decoder.skipped[0]}.")
    return kept, digest.hexdigest()


def decode_to_memory(decoder: Decoder, rows: Rows) -> Decoded:
    """Every readable picture, held in memory."""
    form = decoder.form
    pixels = np.empty((len(rows), form.channels, form.height, form.width), np.uint8)
    kept, digest = fill(decoder, rows, pixels)
    return Decoded(pixels[: len(kept)], np.asarray(kept, np.int64), decoder.skipped, digest)


def decode_to_file(decoder: Decoder, rows: Rows, cache: Path) -> Decoded:
    """Every readable picture in a file that all processes map; the first of them writes it, the others wait."""
    source = f"{rows.identity} {source_digest(rows, decoder.form)}"
    folder = cache / hashlib.blake2b(source.encode(), digest_size=16).hexdigest()
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            write_decoded(decoder, rows, folder)
    stored = json.loads((folder / "decoded.json").read_text(encoding="utf-8"))
    if decoder.strict and stored["skipped"]:
        raise ValueError(f"The picture {stored['skipped'][0]} cannot be read.")
    kept = np.load(folder / "kept.npy")
    pixels = np.load(folder / "pixels.npy", mmap_mode="r")
    return Decoded(pixels[: len(kept)], kept, stored["skipped"], stored["digest"])


def write_decoded(decoder: Decoder, rows: Rows, folder: Path) -> None:
    """Decode into a folder of another name and rename it: a folder of this name is complete."""
    form = decoder.form
    shape = (len(rows), form.channels, form.height, form.width)
    needed, free = int(np.prod(shape)), shutil.disk_usage(folder.parent).free
    if free < needed:
        raise ValueError(
            f"{folder.parent} needs {needed:,} bytes for the decoded pictures and has {free:,}: set cache_dir."
        )
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        pixels = np.lib.format.open_memmap(f"{temporary}/pixels.npy", "w+", np.uint8, shape)
        kept, digest = fill(decoder, rows, pixels)
        pixels.flush()
        np.save(f"{temporary}/kept.npy", np.asarray(kept, np.int64))
        stored = {"digest": digest, "skipped": decoder.skipped}
        Path(temporary, "decoded.json").write_text(json.dumps(stored), encoding="utf-8")
        os.rename(temporary, folder)
        os.mkdir(temporary)  # for its owner to remove


# Fingerprint ----------------------------------------------------------------------------------------------------------


def source_digest(rows: Rows, form: PictureFormat) -> str:
    """Hex digest of a set that is not read as a whole: number, format, and the content of rows spread over it."""
    digest = hashlib.blake2b(f"{len(rows)} {tuple(form)}".encode(), digest_size=16)
    numbers = np.unique(np.linspace(0, len(rows) - 1, SAMPLED_ROWS).astype(np.int64)).tolist()
    for cell in rows.cells(numbers):
        digest.update(hashlib.blake2b(file_bytes(cell)).digest())
    return digest.hexdigest()


def fingerprint(digest: str, labels: np.ndarray | None, shape: tuple[int, int, int]) -> str:
    """Hex digest of a whole set: pictures, labels, shape."""
    whole = hashlib.blake2b(f"{digest} {shape} ".encode(), digest_size=16)
    whole.update(b"" if labels is None else labels.tobytes())
    return whole.hexdigest()
