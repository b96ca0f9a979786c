"""The Accelerator of a run, and the check that the processes asked for are the processes there are."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
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
    """Two processes that do not see each other would train two models into one folder, each as rank 0."""
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != accelerator.num_processes:
        raise RunError(
            f"The launcher started {asked} processes and this one sees {accelerator.num_processes}. Without "
            "a GPU launch with accelerate_configs/cpu.yaml, or set ACCELERATE_USE_CPU=true."
        )


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
