"""Options of sampling to a folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..options import option, required

__all__ = ["SampleConfig"]


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Options of scripts/sample.py."""

    model: str = required("Folder or Hub name of a pipeline.")
    output_dir: str = option("samples", "Folder for 000000.png ... and grid.png.")
    num_samples: int = option(64, "Number of images.")
    batch_size: int = option(64, "Images of one process at a time.")
    seed: int = option(0, "Image i is drawn from torch.Generator().manual_seed(seed + i).")
    num_inference_steps: int = option(1000, "Denoising steps.")
    class_label: int | None = option(None, "Class of all images, for conditional networks.")
    dtype: Literal["float32", "float16", "bfloat16"] = option("float32", "Of the weights.")
    cpu: bool = option(False, "Use the CPU even where there is an accelerator.")

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
