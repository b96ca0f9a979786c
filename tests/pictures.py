"""Random images in files, which tests of data, training and evaluation share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["save_pictures"]


def save_pictures(folder: Path, count: int, shape: tuple[int, ...], numbers: np.random.Generator | None = None) -> Path:
    """Save images of 8 bits as 00.png, 01.png, …, (H, W) in grey, (H, W, 3) in colour, in a new folder; return it."""
    folder.mkdir(parents=True)
    numbers = numbers or np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(numbers.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return folder
