"""Turn a checkpoint of another code into a pipeline that Diffusers and ddpm_ext load.

    python scripts/convert.py --source pytorch-ddpm --checkpoint ckpt.pt --output_dir runs/cifar10/pipeline \
        --resolution 32 --prediction_type epsilon --variance_type fixed_large --noise_schedule linear
    python scripts/convert.py --source auto --checkpoint 256x256_diffusion_uncond.pt --output_dir adm ...
    python scripts/convert.py --source diffusers --checkpoint google/ddpm-cifar10-32 --output_dir out

What a checkpoint does not tell is asked for; docs/convert.md has the whole command of each published network.
Runs on a CPU in seconds. Checkpoints are read as data alone; no code in them runs. The output folder is never the
checkpoint's own: an older pipeline is converted into a new folder.
"""

import sys

from ddpm_ext.cli.main import script

main = script("convert")

if __name__ == "__main__":
    sys.exit(main())
