"""Turn a checkpoint of another code into a pipeline that Diffusers and ddpm_ext load.

    python scripts/convert.py --source pytorch-ddpm --checkpoint ckpt.pt --output_dir runs/cifar10/pipeline
    python scripts/convert.py --source improved-diffusion --checkpoint cifar10_uncond_50M_500K.pt --output_dir out
    python scripts/convert.py --source improved-diffusion --checkpoint ema.pt --output_dir out --noise_schedule linear \
        --num_timesteps 1000 --num_heads 1
    python scripts/convert.py --source diffusers --checkpoint google/ddpm-cifar10-32 --output_dir out

Runs on a CPU in seconds. Checkpoints are read as data alone; no code in them runs.
"""

from __future__ import annotations

import sys

from transformers import HfArgumentParser

from ddpm_ext.convert import ConvertError, ConvertOptions, convert
from ddpm_ext.patience import HubError


def main() -> int:
    """Convert, and say where the result lies."""
    try:
        options = HfArgumentParser(ConvertOptions).parse_args_into_dataclasses()[0]  # pyright: ignore[reportArgumentType]
        print(f"The pipeline lies in {convert(options)}.")
    except (ConvertError, HubError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
