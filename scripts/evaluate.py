"""Measure a DDPM: bits/dim, rate and distortion, FID, KID, CMMD, Inception score, precision and recall.

python scripts/evaluate.py --extractor pixels --num_samples 1000                        # the digits, a CPU
python scripts/evaluate.py --model google/ddpm-cifar10-32 --dataset_name uoft-cs/cifar10 --metrics bpd
accelerate launch scripts/evaluate.py --model runs/cifar10/pipeline --metrics fid,kid,is,prdc

Writes eval.json and eval.md beside the pipeline; the same command after a kill goes on where it stopped.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from ddpm_ext.cli.arguments import parse_options
from ddpm_ext.evaluation.config import EvalConfig
from ddpm_ext.evaluation.evaluate import evaluate
from ddpm_ext.hub.retry import HubError
from ddpm_ext.hub.upload import open_repository
from ddpm_ext.publishing.publisher import publish
from ddpm_ext.run_dir import RunError
from ddpm_ext.signals import exit_process, report_error


def main() -> int:
    """Options -> eval.json."""
    try:
        config = parse_options(EvalConfig, "Measure a DDPM: eval.json, tables, plots.")
        pushes = config.push_to_hub and os.environ.get("RANK", "0") == "0"
        name = config.hub_model_id or config.folder.resolve().name
        access: dict[str, Any] = {"token": config.hub_token, "private": config.hub_private_repo or None}
        if pushes:
            open_repository(name, **access)  # what forbids the upload is told before hours of measuring
        figures = evaluate(config)
        if pushes:
            print(publish(config.folder, name, **access).url)
    except (ValueError, RunError, HubError) as error:
        return report_error(error)
    if os.environ.get("RANK", "0") == "0":
        print(f"{len(figures)} figures in {config.folder / 'eval.json'}, as tables in {config.folder / 'eval.md'}")
    return exit_process(0, int(os.environ.get("WORLD_SIZE", "1")))


if __name__ == "__main__":
    sys.exit(main())
