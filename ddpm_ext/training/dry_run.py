"""--dry_run: build everything, update, save and read back a checkpoint, say what the whole run will take, and stop."""

from __future__ import annotations

import resource
import shutil
import sys
import time

import torch

from ..run_dir import RunError
from . import checkpoint
from .resume import RunState, gather, on_main

UPDATES = 3  # the first warms up and is not counted


def dry_run(trainer: RunState) -> int:
    """Try the run without leaving a trace in its folder.

    Returns:
        Exit code 0.

    Raises:
        RunError: the checkpoint did not come back as it was written.
    """
    seconds = time_of_update(trainer)
    tensors, state = gather(trainer)
    folder = trainer.run.path / ".dry-run"

    def round_trip() -> tuple[float, int]:
        begin = time.perf_counter()
        try:
            path = checkpoint.write_checkpoint(folder, trainer.update_count, tensors, state)
            checkpoint.verify(path)
            for stem, named in tensors.items():
                back = checkpoint.read_tensors(path, stem)
                if any(not torch.equal(back[name], tensor.cpu()) for name, tensor in named.items()):
                    raise RunError(f"{stem} came back from {path} with other values: the disk is not to be trusted.")
            size = sum(file.stat().st_size for file in path.iterdir())
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return time.perf_counter() - begin, size

    saving, size = on_main(trainer.accelerator, round_trip)
    if trainer.accelerator.is_main_process:
        print("\n".join(report(trainer, seconds, saving, size)))
    return 0


def time_of_update(trainer: RunState) -> float:
    """Seconds of one update after the first."""
    begin = 0.0
    for number in range(UPDATES):
        if number == 1:
            begin = time.perf_counter()
        trainer.update()  # ends with reading the gradient norm, so the device is done
    return (time.perf_counter() - begin) / (UPDATES - 1)


def report(trainer: RunState, seconds: float, saving: float, size: int) -> list[str]:
    """The lines that a dry run prints."""
    config, plan, left = trainer.config, trainer.plan, trainer.updates - trainer.update_count + UPDATES
    saves = left // config.checkpointing_steps + 1
    hours = (left * seconds + saves * saving) / 3600
    lines = [
        f"network     {sum(parameter.numel() for parameter in trainer.parameters):,} parameters",
        f"pictures    {trainer.num_images or 'a stream of unknown length'}, shape {trainer.data.shape}",
        f"batch       {plan.global_batch}: {plan.processes} processes, {plan.accumulation} x {plan.micro_batch} each",
        f"memory      {peak_memory(trainer.accelerator.device) / 2**20:,.0f} MiB at the peak, process 0",
        f"speed       {plan.global_batch / seconds:,.1f} images/s, {seconds:.3f} s an update",
        f"checkpoint  {size / 2**20:,.1f} MiB, written and read back in {saving:.1f} s",
        f"whole run   {left:,} updates and {saves:,} checkpoints: {hours:,.2f} hours, without sample grids",
    ]
    if config.price_per_hour is not None:
        lines.append(f"cost        {hours * config.price_per_hour:,.2f} at {config.price_per_hour:g} an hour")
    return lines


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kibibytes on Linux
