"""Turn a checkpoint of another code into a pipeline that Diffusers and ddpm_ext load.

    python scripts/convert.py --source pytorch-ddpm --checkpoint ckpt.pt --output_dir runs/cifar10/pipeline
    python scripts/convert.py --source improved-diffusion --checkpoint cifar10_uncond_50M_500K.pt --output_dir out
    python scripts/convert.py --source improved-diffusion --checkpoint ema.pt --output_dir out --noise_schedule linear \
        --num_timesteps 1000 --num_heads 1
    python scripts/convert.py --source diffusers --checkpoint google/ddpm-cifar10-32 --output_dir out

Runs on a CPU in seconds. Checkpoints are read as data alone; no code in them runs. The output folder is never the
checkpoint's own: an older pipeline is converted into a new folder.
"""

from __future__ import annotations

import sys

from ddpm_ext.cli.arguments import parse_options
from ddpm_ext.conversion.convert import ConvertOptions, convert
from ddpm_ext.signals import report_error


def main() -> int:
    """Convert, and say where the result lies."""
    try:
        options = parse_options(ConvertOptions, "Turn a checkpoint of another code into a pipeline.")
        print(f"The pipeline lies in {convert(options)}.")
    except (ValueError, OSError) as error:  # HubError and ConvertError with them
        return report_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
