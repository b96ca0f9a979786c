"""Measure a DDPM's errors, store the optimal variance and the optimal few steps with its scheduler, show the gain.

python scripts/calibrate.py --extractor pixels --num_samples 1000                       # the digits, a CPU
python scripts/calibrate.py --model google/ddpm-cifar10-32 --dataset_name uoft-cs/cifar10 --metrics bpd
accelerate launch scripts/calibrate.py --model runs/cifar10/pipeline --num_inference_steps 10,25,50,100

Writes a pipeline that stock Diffusers loads, calibration.json, tables and plots; run again, it goes on after a kill.
"""

from __future__ import annotations

import os
import sys

from ddpm_ext.cli.arguments import parse_options
from ddpm_ext.evaluation.calibrate import calibrate
from ddpm_ext.evaluation.config import CalibrateConfig
from ddpm_ext.hub.retry import HubError
from ddpm_ext.run_dir import RunError
from ddpm_ext.signals import exit_process, report_error


def main() -> int:
    """Options -> a calibrated pipeline."""
    try:
        config = parse_options(CalibrateConfig, "Measure a DDPM's errors and store its optimal few steps.")
        calibrate(config)
    except (ValueError, RunError, HubError) as error:
        return report_error(error)
    if os.environ.get("RANK", "0") == "0":
        print(f"The calibrated pipeline is {config.folder / 'pipeline'}, its scores {config.folder / 'calibration.md'}")
    return exit_process(0, int(os.environ.get("WORLD_SIZE", "1")))


if __name__ == "__main__":
    sys.exit(main())
