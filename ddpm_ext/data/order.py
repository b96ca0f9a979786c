"""The order in which training asks for images, and the batches it gets.

    global position p  ->  epoch p // n, place p % n  ->  image epoch_order(n, seed, epoch)[place]

Positions count through the whole training and over all processes: update u of a global batch B holds positions
u B .. (u + 1) B - 1, and process r of W takes its B/W neighbours among them. Nothing of the order depends on W, batches
run on across the end of an epoch, and no image is left out or doubled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

__all__ = ["Batch", "as_tensor", "epoch_order", "positions_to_indices", "prefetch", "random_flip"]

Request = TypeVar("Request")


class Batch(NamedTuple):
    """Some images, in the order they were asked for."""

    pixels: Tensor  # levels, shape (B, C, H, W): uint8 up to 8 bits, int32 above
    labels: Tensor | None  # int64, shape (B,), -1 where an image has no class; None where the set has none


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
        raise UserError(f"epoch_order needs num_images >= 1 and epoch >= 0, got {num_images} and {epoch}.")
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
        raise UserError(f"positions count from 0, got {asked.min()}.")
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
        raise UserError(f"mask must be bool of shape ({len(pixels)},), got {mask.dtype} of shape {tuple(mask.shape)}.")
    return torch.where(mask.to(pixels.device)[:, None, None, None], pixels.flip(-1), pixels)


def prefetch(ask: Callable[[Request], Batch], requests: Iterator[Request], ahead: int = 2) -> Iterator[Batch]:
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
