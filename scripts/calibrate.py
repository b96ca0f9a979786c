"""Measure a DDPM's errors, store the optimal variance and the optimal few steps with its scheduler, show the gain.

python scripts/calibrate.py --extractor pixels --num_samples 1000                       # the digits, a CPU
python scripts/calibrate.py --model google/ddpm-cifar10-32 --dataset_name uoft-cs/cifar10 --metrics bpd
accelerate launch scripts/calibrate.py --model runs/cifar10/pipeline --num_inference_steps 10,25,50,100

Writes a pipeline that stock Diffusers loads, calibration.json, tables and plots; run again, it goes on after a kill.
"""

import sys

from ddpm_ext.cli.main import script

main = script("calibrate")

if __name__ == "__main__":
    sys.exit(main())
