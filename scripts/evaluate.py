"""Measure a DDPM: bits/dim, rate and distortion, FID, KID, CMMD, Inception score, precision and recall.

python scripts/evaluate.py --extractor pixels --num_samples 1000                        # the digits, a CPU
python scripts/evaluate.py --model google/ddpm-cifar10-32 --dataset_name uoft-cs/cifar10 --metrics bpd
accelerate launch scripts/evaluate.py --model runs/cifar10/pipeline --metrics fid,kid,is,prdc

Writes eval.json and eval.md beside the pipeline; the same command after a kill goes on where it stopped.
"""

import sys

from ddpm_ext.cli.main import script

main = script("evaluate")

if __name__ == "__main__":
    sys.exit(main())
