"""How many images an update takes, how they are cut, how many updates a run has, and after which something is due."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

from ...run_dir import RunError
from ..config import TrainConfig
from .summary import plural

__all__ = ["BatchPlan", "Intervals", "plan_batch", "plan_intervals", "total_updates"]


class BatchPlan(NamedTuple):
    """How one update's global batch is cut: by process, then by forward pass."""

    global_batch: int
    processes: int
    accumulation: int

    @property
    def micro_batch(self) -> int:
        """Images of one process in one forward pass."""
        return self.global_batch // (self.processes * self.accumulation)

    def rows(self, rank: int, micro: int) -> range:
        """Places in the global batch of one forward pass of one process."""
        start = (rank * self.accumulation + micro) * self.micro_batch
        return range(start, start + self.micro_batch)


def plan_batch(config: TrainConfig, processes: int, global_batch: int | None = None) -> BatchPlan:
    """Cut the global batch into equal parts of at most `train_batch_size` images.

    Args:
        config: The options.
        processes: Number of processes.
        global_batch: That of the run being resumed, which rules over the options.

    Raises:
        RunError: the global batch cannot be shared equally, or is not the one that the other options give.
    """
    asked = config.train_batch_size * config.gradient_accumulation_steps * processes
    if (
        global_batch is None
        and config.gradient_accumulation_steps > 1
        and config.global_batch_size not in (None, asked)
    ):
        raise RunError(
            f"--global_batch_size {config.global_batch_size} contradicts --train_batch_size {config.train_batch_size} "
            f"x --gradient_accumulation_steps {config.gradient_accumulation_steps} x "
            f"{plural(processes, 'process', 'processes')} = {asked}; leave out the accumulation, which "
            "follows from the other two, or the global batch."
        )
    total = global_batch or config.global_batch_size or asked
    if total % processes:
        raise RunError(
            f"A global batch of {total} cannot be shared equally among {processes} processes; choose a number of "
            f"processes that divides it{'' if global_batch else ', or another --global_batch_size'}."
        )
    share = total // processes
    accumulation = config.gradient_accumulation_steps if total == asked else math.ceil(share / config.train_batch_size)
    fewest = accumulation
    while share % accumulation:
        accumulation += 1
    if accumulation > 2 * fewest:
        warnings.warn(
            f"The {share} images of one process can be cut equally only into {accumulation} passes of "
            f"{share // accumulation}, which is slow; choose a global batch that has {config.train_batch_size} or a "
            "number near it among the divisors of a process's share.",
            stacklevel=2,
        )
    return BatchPlan(total, processes, accumulation)


def total_updates(config: TrainConfig, num_images: int | None, plan: BatchPlan) -> int:
    """Length of the run in updates.

    Args:
        config: The options.
        num_images: Length of the data; None for a stream.
        plan: How the batch is cut.
    """
    if config.max_train_steps is not None:
        return config.max_train_steps
    updates = epochs_to_updates("num_epochs", config.num_epochs, num_images, plan)
    assert updates is not None  # TrainConfig has one of the two
    return updates


def epochs_to_updates(name: str, epochs: int | None, num_images: int | None, plan: BatchPlan) -> int | None:
    """Return updates of a number of epochs, rounded up; None stays None.

    Args:
        name: The option, for messages.
        epochs: Passes over the data, or None.
        num_images: Length of the data; None for a stream.
        plan: How the batch is cut.

    Raises:
        RunError: a stream, whose epochs have no known length.
    """
    if epochs is None:
        return None
    if num_images is None:
        other = {"num_epochs": "max_train_steps", "save_images_epochs": "save_images_steps"}.get(name, "another option")
        raise RunError(f"A stream's length is not known, so --{name} {epochs} says nothing; give --{other} instead.")
    return math.ceil(epochs * num_images / plan.global_batch)


@dataclass(frozen=True)
class Intervals:
    """Updates from one log line, snapshot, checkpoint … to the next; None where it is made at the end alone or never.

    Attributes:
        length: Updates of the whole run, the last of which is due for everything.
    """

    length: int
    log: int
    snapshot: int | None
    checkpoint: int
    validation: int | None
    export: int | None
    grid: int | None
    upload: int | None

    def due(self, every: int | None, update: int) -> bool:
        """Return whether what is done every so many updates is done after this one."""
        return every is not None and (update % every == 0 or update == self.length)

    def anything_due(self, update: int) -> bool:
        """Return whether something is done after this update that must know how it ended."""
        every = (self.log, self.snapshot, self.checkpoint, self.validation, self.export, self.grid, self.upload)
        return update == self.length or any(self.due(one, update) for one in every)


def plan_intervals(config: TrainConfig, length: int, num_images: int | None, plan: BatchPlan) -> Intervals:
    """Return the intervals that the options name, those in epochs as updates.

    Args:
        config: The options.
        length: Updates of the whole run.
        num_images: Length of the data; None for a stream.
        plan: How the batch is cut.
    """

    def updates_of(name: str) -> int | None:
        return epochs_to_updates(name, getattr(config, name), num_images, plan)

    has_snapshots = config.use_ema and config.ema == "power_function"
    return Intervals(
        length=length,
        log=config.logging_steps,
        snapshot=(config.ema_snapshot_steps or max(1, length // 32)) if has_snapshots else None,
        checkpoint=config.checkpointing_steps,
        validation=config.eval_steps,
        export=updates_of("save_model_epochs"),
        grid=config.save_images_steps or updates_of("save_images_epochs"),
        upload=config.hub_every,
    )
