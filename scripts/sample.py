"""Make N images with a saved pipeline, each from its own seed; images that are there already are kept.

    python scripts/sample.py --model runs/digits/pipeline --num_samples 64 --num_inference_steps 100
    accelerate launch scripts/sample.py --model google/ddpm-cifar10-32 --num_samples 50000 --output_dir samples/cifar10
    torchrun --nproc_per_node 2 scripts/sample.py --cpu --model runs/digits/pipeline

Image i is drawn from seed + i, whatever the batch size and the number of processes. Exit code 75: stopped by a signal,
the same command continues.
"""

import sys

from ddpm_ext.cli.main import script

main = script("sample")

if __name__ == "__main__":
    sys.exit(main())
