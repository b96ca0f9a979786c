"""Write the built-in data set: the 1,797 handwritten digits of the UCI set, 8×8, 1,500 to train and 297 to test.

    python scripts/make_digits.py                                       # writes runs/data/{train,test}.parquet
    python scripts/make_digits.py --output_dir ddpm_ext/data/digits     # over the committed ones

Needs scikit-learn (extra `test`), which carries the set; a few seconds on one core. Run once; its result
is committed. The source counts ink in 17 steps, 0..16; here pixel = round(255 v / 16): paper 0, full ink 255.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NUM_TRAIN = 1500
SEED = 0


def main() -> None:
    """Read the set, permute it once with a fixed seed, write two parquet files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/data"))
    output_dir: Path = parser.parse_args().output_dir

    source: Any = load_digits()
    pixels = np.round(source["images"] * 255 / 16).astype(np.uint8)
    order = np.random.default_rng(SEED).permutation(len(pixels))
    features = datasets.Features(
        {"image": datasets.Image(mode="L"), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    for split, indices in {"train": order[:NUM_TRAIN], "test": order[NUM_TRAIN:]}.items():
        rows = {
            "image": [Image.fromarray(pixels[index]) for index in indices],
            "label": [int(source["target"][index]) for index in indices],
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(output_dir / f"{split}.parquet")
    print(f"{len(pixels)} digits lie in {output_dir}.")


if __name__ == "__main__":
    main()
