"""Data set name or folder -> pixels of any picture by its number, and the order in which training asks for them.

    global position p  ->  epoch p // n, place p % n  ->  picture epoch_order(n, seed, epoch)[place]

Positions count through the whole training and over all processes: update u of a global batch B holds positions
u B .. (u + 1) B - 1, and process r of W takes its B/W neighbours among them. Nothing of the order depends on W, batches
run on across the end of an epoch, and no picture is left out or doubled. Pixels stay uint8 until the network asks;
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

from ddpm_ext.data.pixels import Decoder, decode_to_file, decode_to_memory, fingerprint, picture_format, source_digest
from ddpm_ext.data.sources import DIGITS, Rows, find_image_column, find_label_column, open_source, read_labels
from ddpm_ext.data.spec import DataSpec

# Decoded pictures up to MEMORY_BYTES are held in memory, up to MAPPED_BYTES in a file that all processes map; larger
# sets are decoded when asked for.
MEMORY_BYTES = 1 << 28
MAPPED_BYTES = 1 << 34


class Batch(NamedTuple):
    """Some pictures, in the order they were asked for."""

    pixels: Tensor  # uint8, shape (B, C, H, W)
    labels: Tensor | None  # int64, shape (B,), or None where the set has none


# Order ----------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=3)
def _epoch_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.default_rng((seed % 2**64, epoch)).permutation(num_images)
    order.flags.writeable = False  # shared by all who ask
    return order


def epoch_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: a permutation of range(num_images) that (seed, epoch) alone decide; int64, read-only."""
    if num_images < 1 or epoch < 0:
        raise ValueError(f"epoch_order needs num_images >= 1 and epoch >= 0, got {num_images} and {epoch}.")
    return _epoch_order(num_images, seed, epoch)


def positions_to_indices(positions: Sequence[int] | Tensor, num_images: int, seed: int) -> Tensor:
    """Which picture stands at each global position; see the formula above.

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
    """Mirror left and right the pictures that `mask` marks.

    Args:
        pixels: Any dtype, shape (B, C, H, W).
        mask: bool, shape (B,), drawn by the caller from (seed, update, place in the global batch).
    """
    if mask.dtype != torch.bool or mask.shape != pixels.shape[:1]:
        raise ValueError(f"mask must be bool of shape ({len(pixels)},), got {mask.dtype} of shape {tuple(mask.shape)}.")
    return torch.where(mask.to(pixels.device)[:, None, None, None], pixels.flip(-1), pixels)


# The set --------------------------------------------------------------------------------------------------------------


class ImageSet:
    """Pictures by number. Build it with `load_images`.

    Attributes:
        num_images: Number of pictures in one epoch, len(self).
        shape: (C, H, W) of every picture.
        num_classes: Number of labels, or None where the set has none.
        fingerprint: Hex digest of what the set holds and how it is cut to size; equal sets have equal fingerprints.
        spec: What names the set and what was done to it, as training records it.
        skipped: Names of the pictures that could not be read. In a set decoded when asked for, the list grows as they
            are met, and the next readable picture stands in for each.
    """

    def __init__(
        self,
        read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
        labels: np.ndarray | None,
        length: int,
        shape: tuple[int, int, int],
        num_classes: int | None,
        fingerprint: str,
        skipped: list[str],
        spec: DataSpec,
    ) -> None:
        self._read = read
        self._labels = labels
        self.num_images = length
        self.shape = shape
        self.num_classes = num_classes
        self.fingerprint = fingerprint
        self.skipped = skipped
        counts = None if labels is None else np.bincount(labels, minlength=num_classes or 0).tolist()
        self.spec = replace(
            spec,
            resolution=shape[1:],
            channels=shape[0],
            class_counts=None if counts is None else tuple(counts),
            num_images=length,
            fingerprint=fingerprint,
        )

    def __len__(self) -> int:
        """Number of pictures in one epoch."""
        return self.num_images

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """The pictures of these numbers, each in [0, len(self))."""
        asked = np.asarray(indices, dtype=np.int64).reshape(-1)
        if asked.size and not (0 <= asked.min() and asked.max() < len(self)):
            raise ValueError(f"indices must lie in [0, {len(self)}), got {asked.min()} to {asked.max()}.")
        pixels, used = self._read(asked)  # used: whose pixels they are, where one stands in for another
        labels = None if self._labels is None else torch.from_numpy(self._labels[used])
        return Batch(torch.from_numpy(pixels), labels)

    def at(self, positions: Sequence[int] | Tensor, seed: int) -> Batch:
        """The pictures at these global positions of a training with this seed; see `positions_to_indices`."""
        return self.batch(positions_to_indices(positions, len(self), seed))

    def state_dict(self, position: int) -> dict[str, Any]:
        """What must be stored to go on at a global position: nothing, the order is a formula."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called: there is nothing to restore."""


def prefetch(ask: Callable[[Any], Batch], requests: Iterator[Any], ahead: int = 2) -> Iterator[Batch]:
    """`map(ask, requests)` with up to `ahead` batches read by a thread while the caller computes, in the same order."""
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


def load_images(
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
    class_names: Sequence[str] | None = None,
    strict: bool = False,
    cache_dir: str | None = None,
    max_images: int | None = None,
    num_workers: int = 0,
    memory_bytes: int = MEMORY_BYTES,
    mapped_bytes: int = MAPPED_BYTES,
) -> ImageSet:
    """Open a data set and turn its pictures into uint8 (C, H, W).

    Args:
        dataset_name: "digits" (built in; also the default), a Hub name, or a local folder as below.
        dataset_config_name: Configuration of a Hub set.
        train_data_dir: Folder of pictures (class folders become labels), of parquet files, or of `save_to_disk`.
        split: Which split. A folder of pictures has those of its sub-folders "train", "test", …; without such
            sub-folders all of it is "train" and nothing else.
        image_column: Column of the pictures; None takes the only one that holds pictures.
        label_column: Column of the labels; None takes the only one that holds labels, or none.
        resolution: H = W, or (H, W): larger and smaller pictures are scaled and cropped. None keeps the size, which
            must then be one for all.
        channels: The network's in_channels (see `pictures`); None takes the first picture's, 1 or 3.
        center_crop: Crop in the middle; False gives each picture a place of its own, drawn from its number.
        class_names: The training's classes, whose places are the labels; None takes the set's own.
        strict: A picture that cannot be read is an error; otherwise it is skipped, counted and named.
        cache_dir: Home of downloads and of decoded pictures; None takes that of `datasets`.
        max_images: Only the first so many rows.
        num_workers: Threads that decode; 0 decodes in the calling one.
        memory_bytes: Decoded sets up to this size are held in memory ...
        mapped_bytes: ... and up to this size in a memory-mapped file; larger ones are decoded when asked for.

    Raises:
        ValueError: a set that cannot be opened or is empty, a missing column, pictures of several sizes without
            `resolution`, no readable picture, or with `strict` an unreadable one.
    """
    table = open_source(dataset_name, dataset_config_name, train_data_dir, split, cache_dir)
    if max_images is not None:
        table = table.select(range(min(max_images, len(table))))
    if len(table) == 0:
        raise ValueError(f"The data set is empty: split {split!r} of {dataset_name or train_data_dir} has no rows.")
    rows = Rows(table, find_image_column(table.features, image_column))
    labels, num_classes, names = read_labels(table, find_label_column(table.features, label_column), class_names)
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
    form = picture_format(rows, resolution, channels, center_crop)
    decoder = Decoder(form, strict, num_workers)
    shape = (form.channels, form.height, form.width)

    num_bytes = len(rows) * form.channels * form.height * form.width
    if num_bytes > mapped_bytes:
        mark = fingerprint(source_digest(rows, form), labels, shape)
        read = partial(decoder.nearest_readable, rows)
        return ImageSet(read, labels, len(rows), shape, num_classes, mark, decoder.skipped, spec)
    if num_bytes > memory_bytes:
        decoded = decode_to_file(decoder, rows, Path(cache_dir or HF_DATASETS_CACHE) / "ddpm_ext")
    else:
        decoded = decode_to_memory(decoder, rows)
    labels = None if labels is None else labels[decoded.kept]
    mark = fingerprint(decoded.digest, labels, shape)
    return ImageSet(
        lambda asked: (decoded.pixels[asked], asked),
        labels,
        len(decoded.kept),
        shape,
        num_classes,
        mark,
        decoded.skipped,
        spec,
    )
