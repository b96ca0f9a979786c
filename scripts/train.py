"""Train a DDPM; the same command run again continues the run.

    python scripts/train.py                                        # the built-in digits, minutes on two CPU cores
    python scripts/train.py --preset cifar10-small --max_train_steps 2000
    accelerate launch scripts/train.py --preset cifar10            # the paper's CIFAR-10, on the machine's GPUs
    accelerate launch scripts/train.py --dataset_name user/pictures --resolution 64 --output_dir runs/pictures
    accelerate launch --config_file accelerate_configs/cpu.yaml scripts/train.py --preset cifar10-small

Options: --preset NAME < --config FILE.yaml < flags; --help lists them. Exit codes: 0 finished, 75 stopped by a signal
with a checkpoint written, 1 an error that the last line explains.
"""

import sys

from ddpm_ext.cli.main import script

main = script("train")

if __name__ == "__main__":
    sys.exit(main())
