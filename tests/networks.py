"""The tiny networks and schedulers that tests share: they run in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DModel

from ddpm_ext import DDPMExtScheduler

__all__ = ["TINY_UNET", "tiny_scheduler", "tiny_unet"]

# Two levels, for 8x8 grey images.
TINY_UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
}


def tiny_unet(seed: int = 0, **changes: Any) -> UNet2DModel:
    """A network of `TINY_UNET` with other options, its weights from a seed."""
    torch.manual_seed(seed)
    return UNet2DModel(**{**TINY_UNET, **changes})


def tiny_scheduler(**options: Any) -> DDPMExtScheduler:
    """A process of twenty steps that ends near pure noise."""
    return DDPMExtScheduler(num_train_timesteps=20, beta_start=1e-3, beta_end=0.6, **options)
