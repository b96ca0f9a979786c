"""One .npy or .npz file that holds a whole set -> its images, as if each lay in a .npy of its own.

(N, H, W), (N, H, W, C), or (N, C, H, W) with --channel_axis 0: it counts the axes of one image, of which axis 0 holds
N. Image 17 of the array "images" is read by `npy://images/17::/data/set.npz`; the one array of a .npy has no name.
"""

from __future__ import annotations

import os
from functools import lru_cache
from io import BytesIO

import numpy as np

from .samples import load_array

__all__ = ["image_of_set", "paths_of_set"]


def paths_of_set(file: str, key: str | None, channel_axis: int) -> list[str]:
    """Return the path of every image in a file of arrays.

    Args:
        file: The .npy or .npz.
        key: Name of the array in a .npz; None for its only one.
        channel_axis: Axis of the channels in one image; -1, also where none is stated, is the last.

    Raises:
        ValueError: the array is no set, or its shape does not say which axis is which.
    """
    shape = _opened(file, key, os.stat(file).st_mtime_ns).shape
    if len(shape) not in (3, 4) or 0 in shape:
        raise ValueError(
            f"it is an array of shape {shape}; a set is (N, H, W), (N, H, W, C), or (N, C, H, W) with --channel_axis 0."
        )
    if len(shape) == 3 and min(shape[0], shape[-1]) <= 4:
        raise ValueError(
            f"its array of shape {shape} may be one image or {shape[0]} of {shape[1]} x {shape[2]}: give a set of grey "
            "images as (N, H, W, 1), a single image as a file in a folder."
        )
    if len(shape) == 4 and channel_axis not in (-3, 0, 2):
        if channel_axis != -1:
            raise ValueError(
                f"--channel_axis counts the axes of one image, {shape[1:]} here: 0 for (N, C, H, W), 2 for "
                f"(N, H, W, C), got {channel_axis}."
            )
        if shape[3] >= min(shape[1:3]):
            raise ValueError(
                f"its array of shape {shape} may be (N, H, W, C) or (N, C, H, W): say --channel_axis 2 or "
                "--channel_axis 0, the axis of the channels in one image."
            )
    return [f"npy://{key or ''}/{number}::{file}" for number in range(shape[0])]


def image_of_set(place: str) -> bytes:
    """Return one image as a .npy file.

    Args:
        place: Its path without `npy://`.

    Raises:
        OSError: the file is not there.
        ValueError: it holds no such array.
    """
    member, _, file = place.partition("::")
    key, _, number = member.rpartition("/")
    images = _opened(file, key or None, os.stat(file).st_mtime_ns)
    content = BytesIO()
    np.save(content, images[int(number)], allow_pickle=False)
    return content.getvalue()


@lru_cache(maxsize=8)
def _opened(file: str, key: str | None, version: int) -> np.ndarray:
    """The array of a file, opened once as long as the file stays the same; a .npy is mapped."""
    if file.lower().endswith(".npy"):
        return np.load(file, mmap_mode="r", allow_pickle=False)
    with open(file, "rb") as opened:
        return load_array(opened, key)
