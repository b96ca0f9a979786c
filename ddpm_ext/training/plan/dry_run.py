"""--dry_run: build everything, update, save and read back a checkpoint, say what the whole run will take, and stop."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

import torch

from ...distributed import on_main
from ...pipelines.seeds import SamplingStopped
from ...run_dir import RunError
from ...signals import PREEMPTED
from ..state import checkpoint
from .summary import amount, describe, duration, plural

if TYPE_CHECKING:
    from ..outputs.export import Exporter
    from ..state.saver import Saver
    from ..trainer import Trainer

__all__ = ["dry_run"]

_UPDATES = 3  # the first warms up and is not counted


class _Measured(NamedTuple):
    """Seconds of an update, of a checkpoint written and read back, and of a sample grid; bytes of the checkpoint."""

    update: float
    saving: float
    grid: float
    bytes: int


def dry_run(trainer: Trainer, saver: Saver, exporter: Exporter) -> int:
    """Try the run without leaving a trace in its folder.

    Args:
        trainer: The objects of the run.
        saver: Writes its checkpoints.
        exporter: Draws its grids.

    Returns:
        Exit code: 0; 75 when a stop was asked for.

    Raises:
        RunError: the checkpoint did not come back as it was written.
    """
    left = trainer.intervals.length - trainer.state.update
    update = _seconds_per_update(trainer)
    saving, size = _round_trip(trainer, saver)
    try:
        measured = _Measured(update, saving, _seconds_per_grid(trainer, exporter), size)
    except SamplingStopped:
        if trainer.accelerator.is_main_process:
            print("Stopped. A dry run keeps nothing; the same command begins it anew.", flush=True)
        return PREEMPTED
    if trainer.accelerator.is_main_process:
        print("\n".join([*describe(trainer), *_forecast(trainer, left, measured)]))
    return 0


def _seconds_per_update(trainer: Trainer) -> float:
    """Measure the updates after the first."""
    begin = 0.0
    for number in range(_UPDATES):
        if number == 1:
            begin = time.perf_counter()
        trainer.update()
        trainer.settle()  # the device is done
    return (time.perf_counter() - begin) / (_UPDATES - 1)


def _seconds_per_grid(trainer: Trainer, exporter: Exporter) -> float:
    """Measure two denoising steps of one batch, after one that warms up; the others take as long."""
    config, world = trainer.config, trainer.accelerator.num_processes
    share = -(-config.eval_batch_size // world)
    some = list(range(min(share, config.train_batch_size)))
    steps = min(config.ddpm_num_inference_steps, config.ddpm_num_steps)
    measured = min(2, steps)
    exporter.sample(some, 1)
    begin = time.perf_counter()
    exporter.sample(some, measured)
    return (time.perf_counter() - begin) / measured * steps * (share / len(some))


def _round_trip(trainer: Trainer, saver: Saver) -> tuple[float, int]:
    """Write a checkpoint, read it back and delete it.

    Returns:
        Seconds and bytes.
    """
    tensors, record = saver.gather()
    folder = trainer.run.path / ".dry-run"

    def work() -> tuple[float, int]:
        begin = time.perf_counter()
        try:
            path = checkpoint.write_checkpoint(folder, trainer.state.update, tensors, record)
            checkpoint.verify(path)
            for stem, named in tensors.items():
                back = checkpoint.read_tensors(path, stem)
                if any(not torch.equal(back[name], tensor.cpu()) for name, tensor in named.items()):
                    raise RunError(
                        f"{stem} came back from {path} with other values: this disk does not keep what is written. "
                        "Give another --output_dir."
                    )
            size = sum(file.stat().st_size for file in path.iterdir())
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return time.perf_counter() - begin, size

    return on_main(trainer.accelerator, work)


def _forecast(trainer: Trainer, left: int, measured: _Measured) -> list[str]:
    """Return the lines that say what the rest of the run takes: so many updates."""
    config, every = trainer.config, trainer.intervals
    saves = left // every.checkpoint + 1
    grids = 1 if every.grid is None else max(1, -(-left // every.grid))
    hours = (left * measured.update + saves * measured.saving + grids * measured.grid) / 3600
    memory = _peak_memory(trainer.accelerator.device) / 2**20
    lines = [
        f"memory      {memory:,.0f} MiB at the peak, process 0",
        f"speed       {trainer.plan.global_batch / measured.update:,.1f} images/s, {measured.update:.3f} s an update",
        f"checkpoint  {measured.bytes / 2**20:,.1f} MiB, written and read back in {measured.saving:.1f} s",
        f"samples     {plural(grids, 'grid')} of {plural(config.eval_batch_size, 'image')}, "
        f"{measured.grid:,.0f} s each",
        f"whole run   {plural(left, 'update')}, {plural(saves, 'checkpoint')} and the grids: {duration(hours)}",
    ]
    if config.eval_steps is not None:
        lines.append("            the evaluations of --eval_steps come on top")
    if config.price_per_hour is not None:
        lines.append(f"cost        {amount(hours * config.price_per_hour)} at {config.price_per_hour:g} an hour")
    return lines


def _peak_memory(device: torch.device) -> int:
    """Return bytes: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kibibytes on Linux
