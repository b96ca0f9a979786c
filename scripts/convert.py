"""Turn a checkpoint of another code into a pipeline that Diffusers and ddpm_ext load.

    python scripts/convert.py --source pytorch-ddpm --checkpoint ckpt.pt --output_dir runs/cifar10/pipeline
    python scripts/convert.py --source improved-diffusion --checkpoint cifar10_uncond_50M_500K.pt --output_dir out
    python scripts/convert.py --source improved-diffusion --checkpoint ema.pt --output_dir out --noise_schedule linear \
        --num_timesteps 1000 --num_heads 1
    python scripts/convert.py --source diffusers --checkpoint google/ddpm-cifar10-32 --output_dir out

Runs on a CPU in seconds. Checkpoints are read as data alone; no code in them runs. The output folder is never the
checkpoint's own: an older pipeline is converted into a new folder.
"""

import sys

from ddpm_ext.cli.main import script

main = script("convert")

if __name__ == "__main__":
    sys.exit(main())
