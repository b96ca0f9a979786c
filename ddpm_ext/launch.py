"""The Accelerator of a run, and the check that the processes asked for are the processes there are."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, ProjectConfiguration
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from .config import TrainConfig
from .run_dir import RunDir, RunError

FSDP_ON_CPU = "DDPM_EXT_FSDP_ON_CPU"  # for tests: Accelerate turns FSDP on for GPU worlds only


def make_accelerator(config: TrainConfig, run: RunDir) -> Accelerator:
    """The Accelerator that launcher, environment and options ask for.

    Raises:
        RunError: the world is not the one that was asked for.
    """
    cpu = config.cpu or not torch.accelerator.is_available()
    if os.environ.get(FSDP_ON_CPU) == "1":
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        cpu = False
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=config.mixed_precision,
        log_with=tracker(config.report_to),
        project_config=ProjectConfiguration(str(run.path), str(run.path / config.logging_dir)),
    )
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise RunError("fp16 needs a GPU: on a CPU small gradients vanish unscaled. Give --mixed_precision bf16.")
    check_world(accelerator)
    return accelerator


def tracker(report_to: str) -> str | None:
    """The tracker's name for Accelerate.

    Raises:
        RunError: it is not installed; Accelerate would train without it, and say so in a log line.
    """
    if report_to == "none":
        return None
    if importlib.util.find_spec(report_to) is None:
        raise RunError(f"--report_to {report_to} needs the package: pip install 'ddpm-ext[{report_to}]'.")
    return report_to


def check_world(accelerator: Accelerator) -> None:
    """The processes asked for are there and see each other.

    Two that do not would train two models into one folder, each as rank 0; one alone would take twice the time.

    Raises:
        RunError: they are not.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise RunError(
            f"The launcher started {started} processes and this one sees {accelerator.num_processes}. Without "
            "a GPU launch with accelerate_configs/cpu.yaml, or set ACCELERATE_USE_CPU=true."
        )
    asked = asked_of_accelerate(psutil.Process().parent())
    if "WORLD_SIZE" not in os.environ and asked > 1:
        raise RunError(
            f"accelerate launch was asked for {asked} processes and started one, as it does without a GPU. Launch "
            "with --config_file accelerate_configs/cpu.yaml and --cpu behind the script's name, or ask for one."
        )


def asked_of_accelerate(launcher: psutil.Process | None) -> int:
    """The processes that an `accelerate launch` was asked for on its command line or in the file that it names; else 1.

    Args:
        launcher: The process that may be one.
    """
    try:
        words = launcher.cmdline() if launcher else []
    except psutil.Error:  # another user's, or gone
        return 1
    # `python …/bin/accelerate launch …` or `python -m accelerate.commands.launch …`
    if "launch" not in words[:3] and not any(word.endswith("accelerate.commands.launch") for word in words[:3]):
        return 1
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int)
    parser.add_argument("--config_file", "--config-file")
    known, _ = parser.parse_known_args(words)
    if known.num_processes is None and known.config_file is not None:
        return int(yaml.safe_load(Path(known.config_file).read_text(encoding="utf-8")).get("num_processes", 1))
    return known.num_processes or 1


def set_numerics(config: TrainConfig, accelerator: Accelerator, recorded_threads: int | None) -> dict[str, Any]:
    """Set the switches that change the last digits; return what decides them beside the options, for the record.

    Args:
        config: The options.
        accelerator: Knows device and processes.
        recorded_threads: Thread count of the run being resumed, used where no option names one.
    """
    threads = config.num_threads or recorded_threads
    if threads:
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high" if config.allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.allow_tf32
    device = accelerator.device.type
    return {
        "num_threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "torch": torch.__version__,
    }


def whole(tensor: Tensor) -> Tensor:
    """A tensor in full on every rank, detached. Where weights are sharded every rank must call this, in one order."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Copy a full tensor into a weight, sharded as the weight is."""
    if isinstance(target, DTensor):
        target.copy_(distribute_tensor(value.to(target.device, target.dtype), target.device_mesh, target.placements))
    else:
        target.copy_(value)
