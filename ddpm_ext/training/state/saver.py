"""The checkpoints of a run: what they hold, when they are written, which of them go."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from torch import Tensor

from ...diffusion.words import EXTENSION_KEY
from ...distributed import on_main
from ...run_dir import package_versions
from ..config import recorded
from . import checkpoint
from .meter import tell_unreadable
from .resume import is_of, plain_config

if TYPE_CHECKING:
    from ..trainer import Trainer

__all__ = ["Saver"]


class Saver:
    """Writes the checkpoints of a trainer.

    Attributes:
        abandoned: Later checkpoints and snapshots, of a branch that was left. The next save deletes them.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        found = trainer.resumed_from
        self.abandoned = found.abandoned if found else []
        # Another run's checkpoint is to be written here too.
        self._saved_at = trainer.state.update if found is not None and is_of(trainer.run, found.folder) else None

    def save(self) -> None:
        """Write a checkpoint of this update unless it is there, and delete those beyond the limit.

        The first one after going back to an earlier checkpoint deletes what lies beyond that, see `ResumePoint`.
        Every process must call this.

        Raises:
            RunError: the disk is full; raised on every process.
        """
        trainer = self.trainer
        trainer.settle()
        update, (abandoned, self.abandoned) = trainer.state.update, (self.abandoned, [])
        if self._saved_at == update:
            if abandoned:
                on_main(trainer.accelerator, lambda: checkpoint.delete(checkpoint.set_aside(abandoned)))
            return
        tensors, record = self.gather()
        folder, limit = trainer.run.checkpoints, trainer.config.checkpoints_total_limit

        def write() -> None:
            written = checkpoint.write_checkpoint(folder, update, tensors, record, abandoned)
            checkpoint.prune(folder, limit, written)

        on_main(trainer.accelerator, write)
        self._saved_at = update

    def gather(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, object]]:
        """Return what a checkpoint holds: tensors by file, and state.json. Every process must call this."""
        trainer = self.trainer
        trainer.settle()
        tell_unreadable(trainer.state.unreadable, trainer.data.skipped, trainer.accelerator)
        record = {
            **trainer.state.counters(trainer.accelerator),
            "seed": trainer.config.seed,
            "epoch": None if trainer.num_images is None else trainer.position // trainer.num_images,
            "branch": trainer.resumed_from.branch if trainer.resumed_from else None,
            "global_position": trainer.position,
            "global_batch": trainer.plan.global_batch,
            "updates": trainer.intervals.length,
            "data": {"fingerprint": trainer.data.fingerprint, "state": trainer.data.state_dict(trainer.position)},
            "numerics": trainer.numerics,
            "network": plain_config(trainer.network.config),
            **self._of_start(),
            "versions": package_versions(),
            "config": recorded(trainer.config),
        }
        return trainer.state.tensors(), record

    def _of_start(self) -> dict[str, object]:
        """Return what a run with --init_from needs to resume without its source."""
        if self.trainer.origin is None:
            return {}
        return {
            "init_from": self.trainer.origin,
            "classes": self.trainer.network.config.get(EXTENSION_KEY),
            "scheduler": json.loads(self.trainer.scheduler.to_json_string()),
        }
