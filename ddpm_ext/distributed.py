"""The Accelerator of a run, and the check that the processes asked for are the processes there are."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar, cast

import psutil
import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.commands.config import config_args
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    ProjectConfiguration,
    TorchDynamoPlugin,
    broadcast_object_list,
)
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from .run_dir import RunDir, RunError
from .threads import chosen_by_user

__all__ = [
    "FSDP_ON_CPU",
    "any_process",
    "asked_of_accelerate",
    "check_world",
    "copy_into",
    "forget_accelerator",
    "full_tensor",
    "launch_options",
    "launcher_accumulation",
    "make_accelerator",
    "on_main",
    "refuse_idle_precision",
    "refuse_idle_sharding",
    "set_numerics",
    "take_dynamo",
    "tell_deepspeed",
    "tracker",
]

Result = TypeVar("Result")

FSDP_ON_CPU = "DDPM_EXT_FSDP_ON_CPU"  # for tests: Accelerate turns FSDP on for GPU worlds only
HOST_MEMORY = ("cpu", "mps")  # device types whose values the host reads at once, or that take no pinned memory


class LaunchOptions(Protocol):
    """The options that an Accelerator and its numerics depend on."""

    @property
    def cpu(self) -> bool: ...
    @property
    def mixed_precision(self) -> str: ...
    @property
    def report_to(self) -> str: ...
    @property
    def logging_dir(self) -> str: ...
    @property
    def num_threads(self) -> int | None: ...
    @property
    def allow_tf32(self) -> bool: ...


def make_accelerator(config: LaunchOptions, run: RunDir) -> Accelerator:
    """Return the Accelerator that launcher, environment and options ask for.

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
    refuse_idle_precision(config)
    refuse_idle_sharding(accelerator)
    return accelerator


def refuse_idle_precision(config: LaunchOptions) -> None:
    """Refuse a precision of the launcher that is not the script's, which alone decides.

    Raises:
        RunError: the two differ.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked not in ("no", config.mixed_precision):
        known = asked in ("fp16", "bf16")
        raise RunError(
            f"accelerate launch was given --mixed_precision {asked}, which has no effect here, and the script has "
            f"{config.mixed_precision}. "
            + (f"Give --mixed_precision {asked} behind the script's name." if known else "The script knows fp16, bf16.")
        )


def refuse_idle_sharding(accelerator: Accelerator) -> None:
    """Refuse ways of cutting the network that the launcher asks for and that would not be, or would lose weights.

    Raises:
        RunError: the sentence says what to launch with.
    """
    kind = accelerator.distributed_type
    if _env_flag("ACCELERATE_USE_FSDP") and not accelerator.is_fsdp2:
        why = (
            "Accelerate cuts weights on accelerators only and there is none here: it would train whole copies"
            if kind != DistributedType.FSDP
            else "FSDP of version 1 renames the weights: give fsdp_version: 2"
        )
        raise RunError(
            f"The launcher asks for FSDP. {why}. Launch with accelerate_configs/fsdp2.yaml on GPUs, or with cpu.yaml."
        )
    if _env_flag("ACCELERATE_USE_DEEPSPEED") and kind != DistributedType.DEEPSPEED:
        raise RunError("The launcher asks for DeepSpeed, which needs a GPU; launch with accelerate_configs/cpu.yaml.")
    if kind == DistributedType.DEEPSPEED and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        raise RunError(
            "ZeRO stage 3 cuts the weights, which the checkpoints here would lose; launch with zero_stage: 2, or with "
            "accelerate_configs/fsdp2.yaml."
        )
    for name in ("MEGATRON_LM", "PARALLELISM_CONFIG"):
        if _env_flag(f"ACCELERATE_USE_{name}"):
            raise RunError(f"The launcher asks for {name.lower()}, which no DDPM network has a use for; leave it out.")


def launcher_accumulation() -> int:
    """Return the gradient_accumulation_steps that the launcher was given; 1 where it names none.

    With DeepSpeed they stand in ACCELERATE_GRADIENT_ACCUMULATION_STEPS; else the launcher keeps them to itself.
    """
    asked = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "")
    if asked.isdecimal():
        return int(asked)
    return getattr(_launcher_options(), "gradient_accumulation_steps", None) or 1


def take_dynamo(accelerator: Accelerator) -> dict[str, object] | None:
    """Take over what the launcher asks of torch.compile, so that Accelerate does not wrap and rename the network.

    Returns:
        Arguments of torch.compile, or None.
    """
    plugin = accelerator.state.dynamo_plugin
    if plugin is None or plugin.backend == DynamoBackend.NO:
        return None
    arguments = {"backend": plugin.backend.value.lower(), **_compile_options(plugin)}
    plugin.backend = DynamoBackend.NO
    return arguments


def _compile_options(plugin: TorchDynamoPlugin) -> dict[str, object]:
    """Return the launcher's other words for torch.compile; those that are at their defaults are left out."""
    mode = None if plugin.mode in (None, "default") else plugin.mode
    given = {"mode": mode, "dynamic": bool(plugin.dynamic), "fullgraph": plugin.fullgraph or None}
    return {name: value for name, value in given.items() if value is not None}


def forget_accelerator() -> None:
    """Forget Accelerate's state of this process, so that the next Accelerator begins anew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _env_flag(name: str) -> bool:
    """Return whether an environment variable says yes."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "y", "on", "t")


def tracker(report_to: str) -> str | None:
    """Return the tracker's name for Accelerate.

    Raises:
        RunError: it is not installed; Accelerate would train without it, and say so in a log line.
    """
    if report_to == "none":
        return None
    if importlib.util.find_spec(report_to) is None:
        raise RunError(f"--report_to {report_to} needs the package: pip install 'ddpm-ext[{report_to}]'.")
    return report_to


def check_world(accelerator: Accelerator) -> None:
    """Check that the processes asked for are there and see each other.

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
    asked = asked_of_accelerate()
    if "WORLD_SIZE" not in os.environ and asked > 1:
        raise RunError(
            f"accelerate launch was asked for {asked} processes and started one, as it does without a GPU. Launch "
            "with --config_file accelerate_configs/cpu.yaml and --cpu behind the script's name, or ask for one."
        )


def asked_of_accelerate(launcher: psutil.Process | None = None) -> int:
    """Return the processes that an `accelerate launch` was asked for; else 1.

    On its command line, in the file that it names, or in the one that `accelerate config` wrote.

    Args:
        launcher: The process that may be one; None for the parent of this one.
    """
    options = _launcher_options(launcher)
    if options is None:
        return 1
    file = options.config_file or (None if options.cpu else config_args.default_config_file)
    if options.num_processes is None and file is not None and Path(file).is_file():
        return int((yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}).get("num_processes") or 1)
    return options.num_processes or 1


def _launcher_options(launcher: psutil.Process | None = None) -> argparse.Namespace | None:
    """Return the options of the `accelerate launch` that a process is (this one's parent), or None."""
    try:
        launcher = launcher or psutil.Process().parent()
        return launch_options(launcher.cmdline() if launcher else [])
    except psutil.Error:  # another user's, or gone
        return None


def launch_options(words: list[str]) -> argparse.Namespace | None:
    """Return the options of an `accelerate launch`, without those of its script; None for another command.

    `python …/bin/accelerate launch …`, `…/bin/accelerate-launch …` or `python -u -m accelerate.commands.launch …`.
    """
    for place, word in enumerate(words):
        name, rest = Path(word).name, words[place + 1 :]
        if name == "accelerate" and rest[:1] == ["launch"]:
            rest = rest[1:]
        elif name != "accelerate-launch" and word != "accelerate.commands.launch":
            continue
        with suppress(SystemExit):  # words that the launcher itself would have refused
            return launch_command_parser().parse_known_args(rest)[0]
    return None


def tell_deepspeed(accelerator: Accelerator, micro_batch: int, accumulation: int, max_grad_norm: float | None) -> None:
    """Tell DeepSpeed, before `prepare`, what Accelerate would read off a DataLoader or its file."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = micro_batch
        plugin.deepspeed_config["gradient_accumulation_steps"] = accumulation
        plugin.deepspeed_config["gradient_clipping"] = max_grad_norm or 0.0


def set_numerics(config: LaunchOptions, accelerator: Accelerator, recorded_threads: int | None) -> dict[str, object]:
    """Set the switches that change the last digits; return what decides them beside the options, for the record.

    Args:
        config: The options.
        accelerator: Knows device and processes.
        recorded_threads: Those of the run being resumed, taken where neither an option nor the environment names a
            number; None takes PyTorch's.
    """
    threads = config.num_threads or chosen_by_user() or recorded_threads
    if threads:
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high" if config.allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.allow_tf32
    device, plugin = accelerator.device.type, accelerator.state.dynamo_plugin
    return {
        "num_threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "torch": torch.__version__,
        **({} if plugin is None or plugin.backend == DynamoBackend.NO else {"dynamo": plugin.backend.value.lower()}),
    }


def on_main(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Run something on the main process; its result, or the sentence of its error, reaches every process.

    Raises:
        RunError: on every process, in place of a RunError, OSError or ValueError of the main one.
    """
    said: list[Result | str | None] = [None, None]  # the result, the sentence
    cause: Exception | None = None
    if accelerator.is_main_process:
        try:
            said[0] = work()
        except (RunError, OSError, ValueError) as error:  # or the others would wait for a word that never comes
            said[1], cause = str(error), error
    if accelerator.num_processes > 1:
        broadcast_object_list(said)
    if said[1] is not None:
        raise RunError(said[1]) from cause
    return cast(Result, said[0])


def any_process(accelerator: Accelerator, mine: bool) -> bool:
    """Return whether any process says yes. Every process must call this at the same point."""
    if accelerator.num_processes == 1:
        return mine
    if mine:
        accelerator.set_trigger()
    return accelerator.check_trigger()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor in full, detached. Where weights are sharded every rank must call this, in one order."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_into(target: Tensor, value: Tensor) -> None:
    """Copy a full tensor into a weight, sharded as the weight is."""
    if isinstance(target, DTensor):
        target.copy_(distribute_tensor(value.to(target.device, target.dtype), target.device_mesh, target.placements))
    else:
        target.copy_(value)


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on the device, copied while the host goes on: from pinned memory."""
    if device.type in HOST_MEMORY:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
