"""Data set name or folder -> levels of any image by its number.

Levels stay integers until the network asks; `images.to_x_0` makes x_0 of them. `order` says which image comes when.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets import Features
from datasets.config import HF_DATASETS_CACHE
from torch import Tensor

from ..errors import UserError
from ..run_dir import JsonRecord
from .cells import Rows
from .order import Batch, as_tensor, positions_to_indices
from .rows import (
    Decoder,
    decode_to_file,
    decode_to_memory,
    fingerprint,
    image_format,
    say_once,
    source_digest,
    tell_of,
)
from .sources import (
    Labels,
    empty_set,
    find_image_column,
    find_label_column,
    no_classes,
    open_source,
    read_labels,
    where_classes_may_stand,
    without_class,
)
from .spec import DataSpec, ImageOptions, Reading, spec_and_reading

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "ImageSet",
    "class_names_of",
    "load_images",
    "open_images",
]


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
            UserError: it has no classes, or images without one.
        """
        if self._labels is None or not self.num_classes:
            raise no_classes(self.spec, self._hint)
        without = int((self._labels < 0).sum())
        if without:
            raise without_class(f"{without:,} of the {len(self):,} images of {self.spec.name} have")

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """Return the images of these numbers, each in [0, len(self))."""
        asked = np.asarray(indices, dtype=np.int64).reshape(-1)
        if asked.size and not (0 <= asked.min() and asked.max() < len(self)):
            raise UserError(f"indices must lie in [0, {len(self)}), got {asked.min()} to {asked.max()}.")
        levels, used = self._read(asked)  # used: whose levels they are, where one stands in for another
        labels = None if self._labels is None else torch.from_numpy(self._labels[used])
        return Batch(as_tensor(levels), labels)

    def at(self, positions: Sequence[int] | Tensor, seed: int) -> Batch:
        """The images at these global positions of a training with this seed; see `positions_to_indices`."""
        return self.batch(positions_to_indices(positions, len(self), seed))

    def state_dict(self, position: int) -> JsonRecord:
        """What must be stored to go on at a global position: nothing, the order is a formula."""
        return {}

    def load_state_dict(self, state: JsonRecord) -> None:
        """Go on where `state_dict` was called: there is nothing to restore."""


def load_images(dataset_name: str | None = None, **options: Unpack[ImageOptions]) -> ImageSet:
    """Open a data set and turn its images into levels (C, H, W).

    Args:
        dataset_name: "digits" (built in; also the default), a Hub name, or a local folder as below.
        **options: By name, each of those below (`ImageOptions`).
        dataset_config_name: Configuration of a Hub set.
        train_data_dir: Folder or archive of images or arrays (class folders become labels), one .npy or .npz of many
            images, folder of parquet files or of `save_to_disk`.
        split: Which split. A folder of images has those of its sub-folders "train", "test", …; without such
            sub-folders all of it is "train" and nothing else.
        image_column: Column of the images; None takes the only one that holds images.
        label_column: Column of the labels; None takes the only one that holds labels, or none.
        resolution: H = W, or (H, W): larger and smaller images are scaled and cropped. None keeps the size, which
            must then be one for all.
        channels: The network's in_channels (see `decoding.levels`); None takes the first image's.
        center_crop: Crop in the middle; False gives each image a place of its own, drawn from its number.
        bits: Levels 0 … 2^bits - 1 of each value, 1 to 16. None is 8; with a value_range 16, or the bits of a range
            of whole numbers like 0 to 4095.
        value_range: (lo, hi), the stored values of the lowest and the highest level; None takes the file's own range
            where it has one (8 and 16 bits).
        channel_axis: Axis of the channels in an image that is an array; None is the last.
        array_key: Name of the array in .npz files; None for their only one.
        class_names: The training's classes, whose places are the labels; None takes the set's own.
        strict: How to read, as max_unreadable, cache_dir, max_images, num_workers, memory_bytes and mapped_bytes: the
            fields of `Reading`.

    Raises:
        UserError: a set that cannot be opened or is empty, a missing column, images of several sizes without
            `resolution`, too few readable images, or with `strict` an unreadable one.

    Example:
        >>> digits = load_images("digits", split="test")
        >>> len(digits), digits.shape
        (297, (1, 8, 8))
    """
    return open_images(*spec_and_reading(dataset_name, **options))


def open_images(spec: DataSpec, reading: Reading | None = None) -> ImageSet:
    """Open the images that a spec names; see `load_images`."""
    reading = reading or Reading()
    source = open_source(spec, reading.cache_dir)
    table = source.table
    if reading.max_images is not None:
        table = table.select(range(min(reading.max_images, len(table))))
        source = source._replace(table=table, files=source.files and source.files[: reading.max_images])
    if len(table) == 0:
        raise empty_set(spec)
    if source.note is not None:
        say_once(source.note)
    image_column = find_image_column(table.features, spec.image_column)
    rows, hint = Rows(source, image_column), where_classes_may_stand(source, image_column)
    column = find_label_column(table.features, spec.label_column)
    known = spec.class_names or _training_names(spec, table.features, column, reading.cache_dir)
    labels = read_labels(table, column, known)
    if labels is not None and spec.label_column is not None and labels.numbers.min() < 0:
        raise UserError(
            f"label_column {spec.label_column!r} must hold classes from 0 upwards in every row, and "
            f"{int((labels.numbers < 0).sum()):,} of {len(rows):,} have none."
        )
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
    say_once(*decoded.told)
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


def _training_names(
    spec: DataSpec, features: Features, column: str | None, cache_dir: str | None
) -> tuple[str, ...] | None:
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
