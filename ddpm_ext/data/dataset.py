"""Data set name or folder -> levels of any image by its number, and the order in which training asks for them.

    global position p  ->  epoch p // n, place p % n  ->  image epoch_order(n, seed, epoch)[place]

Positions count through the whole training and over all processes: update u of a global batch B holds positions
u B .. (u + 1) B - 1, and process r of W takes its B/W neighbours among them. Nothing of the order depends on W, batches
run on across the end of an epoch, and no image is left out or doubled. Levels stay integers until the network asks;
`images.to_x_0` makes x_0 of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets.config import HF_DATASETS_CACHE
from torch import Tensor

from .folder import classes_in_names
from .rows import (
    Decoder,
    Reading,
    decode_to_file,
    decode_to_memory,
    fingerprint,
    image_format,
    say_once,
    source_digest,
    tell_of,
)
from .sources import Labels, Rows, find_image_column, find_label_column, open_source, read_labels
from .spec import DIGITS, DataSpec

__all__ = [
    "Batch",
    "ImageSet",
    "as_tensor",
    "class_names_of",
    "epoch_order",
    "load_images",
    "make_spec",
    "open_images",
    "positions_to_indices",
    "prefetch",
    "random_flip",
]


class Batch(NamedTuple):
    """Some images, in the order they were asked for."""

    pixels: Tensor  # levels, shape (B, C, H, W): uint8 up to 8 bits, int32 above
    labels: Tensor | None  # int64, shape (B,), -1 where an image has no class; None where the set has none


# Order ----------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=3)
def _epoch_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.default_rng((seed % 2**64, epoch)).permutation(num_images)
    order.flags.writeable = False  # shared by all who ask
    return order


def epoch_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: a permutation of range(num_images) that (seed, epoch) alone decide; int64, read-only.

    Args:
        num_images: Length of the set.
        seed: That of the run.
        epoch: Which pass, from 0.
    """
    if num_images < 1 or epoch < 0:
        raise ValueError(f"epoch_order needs num_images >= 1 and epoch >= 0, got {num_images} and {epoch}.")
    return _epoch_order(num_images, seed, epoch)


def positions_to_indices(positions: Sequence[int] | Tensor, num_images: int, seed: int) -> Tensor:
    """Which image stands at each global position; see the formula above.

    Args:
        positions: Global positions p >= 0, shape (B,). They may cross the end of an epoch.
        num_images: n, the length of the set.
        seed: Seed of the order.

    Returns:
        int64, shape (B,), values in [0, n).
    """
    asked = np.asarray(positions, dtype=np.int64).reshape(-1)
    if asked.size and asked.min() < 0:
        raise ValueError(f"positions count from 0, got {asked.min()}.")
    indices = np.empty_like(asked)
    for epoch in np.unique(asked // num_images):
        mine = asked // num_images == epoch
        indices[mine] = epoch_order(num_images, seed, int(epoch))[asked[mine] % num_images]
    return torch.from_numpy(indices)


def random_flip(pixels: Tensor, mask: Tensor) -> Tensor:
    """Mirror left and right the images that `mask` marks.

    Args:
        pixels: Any dtype, shape (B, C, H, W).
        mask: bool, shape (B,), drawn by the caller from (seed, update, place in the global batch).
    """
    if mask.dtype != torch.bool or mask.shape != pixels.shape[:1]:
        raise ValueError(f"mask must be bool of shape ({len(pixels)},), got {mask.dtype} of shape {tuple(mask.shape)}.")
    return torch.where(mask.to(pixels.device)[:, None, None, None], pixels.flip(-1), pixels)


# The set --------------------------------------------------------------------------------------------------------------


class ImageSet:
    """Images by number. Build it with `load_images`.

    Attributes:
        num_images: Number of images in one epoch, len(self).
        shape: (C, H, W) of every image.
        num_classes: Number of labels, or None where the set has none.
        fingerprint: Hex digest of what the set holds and how it is cut to size; equal sets have equal fingerprints.
        spec: What names the set and what was done to it, as training records it.
        skipped: Names of the images that could not be read. In a set decoded when asked for, the list grows as they
            are met, and the next readable image stands in for each.
    """

    def __init__(
        self,
        read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
        labels: Labels | None,
        length: int,
        spec: DataSpec,
        skipped: list[str],
        hint: str = "",
    ) -> None:
        assert spec.resolution is not None and spec.channels is not None and spec.fingerprint is not None
        self._read = read
        self._hint = hint
        self._labels = None if labels is None else labels.numbers
        self.num_images = length
        self.shape = (spec.channels, *spec.resolution)
        self.num_classes = None if labels is None else labels.num_classes
        self.fingerprint = spec.fingerprint
        self.skipped = skipped
        counts = (
            None if labels is None else np.bincount(labels.numbers[labels.numbers >= 0], minlength=labels.num_classes)
        )
        self.spec = replace(
            spec,
            class_names=None if labels is None or labels.names is None else tuple(labels.names),
            class_counts=None if counts is None else tuple(counts.tolist()),
            num_images=length,
        )

    def __len__(self) -> int:
        """Return the number of images in one epoch."""
        return self.num_images

    def require_classes(self) -> None:
        """Refuse a set whose classes cannot be learned or measured.

        Raises:
            ValueError: it has no classes, or images without one.
        """
        if self._labels is None or not self.num_classes:
            raise ValueError(f"The images of {self.spec.name} have no classes: name their label_column.{self._hint}")
        without = int((self._labels < 0).sum())
        if without:
            raise ValueError(
                f"{without:,} of the {len(self):,} images of {self.spec.name} have no class (their label is empty or "
                "below 0): classes cannot be asked for."
            )

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """Return the images of these numbers, each in [0, len(self))."""
        asked = np.asarray(indices, dtype=np.int64).reshape(-1)
        if asked.size and not (0 <= asked.min() and asked.max() < len(self)):
            raise ValueError(f"indices must lie in [0, {len(self)}), got {asked.min()} to {asked.max()}.")
        levels, used = self._read(asked)  # used: whose levels they are, where one stands in for another
        labels = None if self._labels is None else torch.from_numpy(self._labels[used])
        return Batch(as_tensor(levels), labels)

    def at(self, positions: Sequence[int] | Tensor, seed: int) -> Batch:
        """The images at these global positions of a training with this seed; see `positions_to_indices`."""
        return self.batch(positions_to_indices(positions, len(self), seed))

    def state_dict(self, position: int) -> dict[str, Any]:
        """What must be stored to go on at a global position: nothing, the order is a formula."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called: there is nothing to restore."""


def prefetch(ask: Callable[[Any], Batch], requests: Iterator[Any], ahead: int = 2) -> Iterator[Batch]:
    """`map(ask, requests)` with up to `ahead` batches read by a thread while the caller computes, in the same order.

    Args:
        ask: What reads one batch.
        requests: Its arguments, in order.
        ahead: Batches that may wait.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
        waiting = [pool.submit(ask, request) for request in islice(requests, max(1, ahead))]
        try:
            while waiting:
                batch = waiting.pop(0).result()
                waiting += [pool.submit(ask, request) for request in islice(requests, 1)]
                yield batch
        finally:
            for future in waiting:
                future.cancel()


def as_tensor(levels: np.ndarray) -> Tensor:
    """Return levels as a tensor: uint8 as it is, uint16 as int32, which torch computes with."""
    return torch.from_numpy(levels if levels.dtype == np.uint8 else levels.astype(np.int32))


def make_spec(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    resolution: int | Sequence[int] | None = None,
    channels: int | None = None,
    *,
    center_crop: bool = True,
    bits: int | None = None,
    value_range: Sequence[float] | None = None,
    channel_axis: int | None = None,
    array_key: str | None = None,
    class_names: Sequence[str] | None = None,
) -> DataSpec:
    """Name the images to open; see `load_images`.

    Args:
        dataset_name: As in `load_images`, and so on.
        dataset_config_name: As there.
        train_data_dir: As there.
        split: As there.
        image_column: As there.
        label_column: As there.
        resolution: As there.
        channels: As there.
        center_crop: As there.
        bits: As there.
        value_range: As there.
        channel_axis: As there.
        array_key: As there.
        class_names: As there.

    Raises:
        ValueError: bits outside 1 to 16, or a range that is none.
    """
    if value_range is not None and (len(value_range) != 2 or not value_range[0] < value_range[1]):
        raise ValueError(f"value_range must be two numbers, the lower first, got {list(value_range)}.")
    if bits is None:
        bits = 8 if value_range is None else _bits_of_range(*value_range)
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must lie between 1 and 16, got {bits}.")
    return DataSpec(
        dataset_name=dataset_name or (None if train_data_dir else DIGITS),
        dataset_config_name=dataset_config_name,
        data_dir=train_data_dir,
        split=split,
        image_column=image_column,
        label_column=label_column,
        resolution=(resolution, resolution) if isinstance(resolution, int) else resolution and tuple(resolution),  # pyright: ignore
        channels=channels,
        center_crop=center_crop,
        bits=bits,
        value_range=None if value_range is None else (float(value_range[0]), float(value_range[1])),
        channel_axis=-1 if channel_axis is None else channel_axis,
        array_key=array_key,
        class_names=None if class_names is None else tuple(class_names),
    )


def _bits_of_range(lo: float, hi: float) -> int:
    """12 for 0 to 4095, 16 for 0 to 65535: a level for each whole number of a range of 2^bits; otherwise 16."""
    levels = hi - lo + 1
    return next((bits for bits in range(9, 16) if levels == 2**bits), 16)


def load_images(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    resolution: int | Sequence[int] | None = None,
    channels: int | None = None,
    *,
    center_crop: bool = True,
    bits: int | None = None,
    value_range: Sequence[float] | None = None,
    channel_axis: int | None = None,
    array_key: str | None = None,
    class_names: Sequence[str] | None = None,
    **reading: Any,
) -> ImageSet:
    """Open a data set and turn its images into levels (C, H, W).

    Args:
        dataset_name: "digits" (built in; also the default), a Hub name, or a local folder as below.
        dataset_config_name: Configuration of a Hub set.
        train_data_dir: Folder or archive of images or arrays (class folders become labels), one .npy or .npz of many
            images, folder of parquet files or of `save_to_disk`.
        split: Which split. A folder of images has those of its sub-folders "train", "test", …; without such
            sub-folders all of it is "train" and nothing else.
        image_column: Column of the images; None takes the only one that holds images.
        label_column: Column of the labels; None takes the only one that holds labels, or none.
        resolution: H = W, or (H, W): larger and smaller images are scaled and cropped. None keeps the size, which
            must then be one for all.
        channels: The network's in_channels (see `decoding`); None takes the first image's.
        center_crop: Crop in the middle; False gives each image a place of its own, drawn from its number.
        bits: Levels 0 … 2^bits - 1 of each value, 1 to 16. None is 8; with a value_range 16, or the bits of a range
            of whole numbers like 0 to 4095.
        value_range: (lo, hi), the stored values of the lowest and the highest level; None takes the file's own range
            where it has one (8 and 16 bits).
        channel_axis: Axis of the channels in an image that is an array; None is the last.
        array_key: Name of the array in .npz files; None for their only one.
        class_names: The training's classes, whose places are the labels; None takes the set's own.
        **reading: How to read, the fields of `Reading`: strict, max_unreadable, cache_dir, max_images, num_workers,
            memory_bytes, mapped_bytes.

    Raises:
        ValueError: a set that cannot be opened or is empty, a missing column, images of several sizes without
            `resolution`, too few readable images, or with `strict` an unreadable one.

    Example:
        >>> digits = load_images("digits", split="test")
        >>> len(digits), digits.shape
        (297, (1, 8, 8))
    """
    spec = make_spec(
        dataset_name,
        dataset_config_name,
        train_data_dir,
        split,
        image_column,
        label_column,
        resolution,
        channels,
        center_crop=center_crop,
        bits=bits,
        value_range=value_range,
        channel_axis=channel_axis,
        array_key=array_key,
        class_names=class_names,
    )
    return open_images(spec, Reading(**reading))


def open_images(spec: DataSpec, reading: Reading | None = None) -> ImageSet:
    """Open the images that a spec names; see `load_images`."""
    reading = reading or Reading()
    source = open_source(spec, reading.cache_dir)
    table = source.table
    if reading.max_images is not None:
        table = table.select(range(min(reading.max_images, len(table))))
        source = source._replace(table=table, files=source.files and source.files[: reading.max_images])
    if len(table) == 0:
        raise ValueError(f"The data set is empty: split {spec.split!r} of {spec.name} has no rows.")
    if source.note is not None:
        say_once(source.note)
    rows = Rows(source, find_image_column(table.features, spec.image_column))
    column = find_label_column(table.features, spec.label_column)
    known = spec.class_names or _training_names(spec, table.features, column, reading.cache_dir)
    labels = read_labels(table, column, known)
    if labels is not None and spec.label_column is not None and labels.numbers.min() < 0:
        raise ValueError(
            f"label_column {spec.label_column!r} must hold classes from 0 upwards in every row, and "
            f"{int((labels.numbers < 0).sum()):,} of {len(rows):,} have none."
        )
    hint = classes_in_names(source.files or [])
    form = image_format(rows, spec)
    spec = replace(spec, resolution=(form.height, form.width), channels=form.channels)
    decoder = Decoder(form, reading, len(rows))

    num_bytes = len(rows) * form.channels * form.height * form.width * np.dtype(form.dtype).itemsize
    if num_bytes > reading.mapped_bytes:
        mark = fingerprint(source_digest(rows, form), labels and labels.numbers, form)
        tell_of(rows, form, reading)
        read = partial(decoder.nearest_readable, rows)
        return ImageSet(read, labels, len(rows), replace(spec, fingerprint=mark), decoder.skipped, hint)
    if num_bytes > reading.memory_bytes:
        decoded = decode_to_file(decoder, rows, Path(reading.cache_dir or HF_DATASETS_CACHE) / "ddpm_ext")
    else:
        decoded = decode_to_memory(decoder, rows)
    decoder.tell()
    labels = labels and labels._replace(numbers=labels.numbers[decoded.kept])
    mark = fingerprint(decoded.digest, labels and labels.numbers, form)
    return ImageSet(
        lambda asked: (decoded.levels[asked], asked),
        labels,
        len(decoded.kept),
        replace(spec, fingerprint=mark),
        decoded.skipped,
        hint,
    )


def _training_names(spec: DataSpec, features: Any, column: str | None, cache_dir: str | None) -> tuple[str, ...] | None:
    """The classes of the split "train" for another split whose labels are words, which would be numbered anew."""
    kind = None if column is None else features[column]
    if spec.split.startswith("train") or getattr(kind, "dtype", None) not in ("string", "large_string"):
        return None
    try:
        return class_names_of(replace(spec, split="train"), cache_dir)
    except ValueError:  # there is no such split
        return None


def class_names_of(spec: DataSpec, cache_dir: str | None = None) -> tuple[str, ...] | None:
    """Return the class names of a split without reading its images; None where it states none."""
    table = open_source(spec, cache_dir).table
    labels = read_labels(table, find_label_column(table.features, spec.label_column))
    return None if labels is None or labels.names is None else tuple(labels.names)
