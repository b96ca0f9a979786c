"""The loop of a run: update after update, and what is due between them, to the end or to a stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..pipelines.seeds import SamplingStopped
from ..run_dir import read_json, write_json
from ..signals import PREEMPTED
from .outputs.monitor import Progress, draw_training
from .state.meter import tell_unreadable

if TYPE_CHECKING:
    from .outputs.export import Exporter
    from .state.saver import Saver
    from .trainer import Trainer

__all__ = ["TrainingLoop"]


class TrainingLoop:
    """Trains to the last update.

    Args:
        trainer: The objects of the run, and one update of them.
        saver: Writes the checkpoints.
        exporter: Writes grids, scores, the pipeline and snapshots.

    Attributes:
        started: Whether the start stands in config.json, so that a failure may be written there too.
    """

    def __init__(self, trainer: Trainer, saver: Saver, exporter: Exporter) -> None:
        self.trainer, self.saver, self.exporter, self.started = trainer, saver, exporter, False
        self.run, self.accelerator, self.state = trainer.run, trainer.accelerator, trainer.state

    def fit(self, upload: Callable[[int], object] | None = None) -> int:
        """Train to the last update, then write grid, pipeline and plot.

        Args:
            upload: Uploads the run folder in the background, given the update; None where nothing is uploaded.

        Returns:
            Exit code: 0; 75 when a stop was asked for, with a checkpoint written.
        """
        trainer, state, length = self.trainer, self.state, self.trainer.intervals.length
        progress = Progress(self.accelerator, length, state.update, trainer.plan.global_batch)
        try:
            while state.update < length:
                before = state.update
                trainer.update()
                if state.update > before:
                    progress.advance(state.update - before)
                    self._between_updates(progress, upload)
                if self.exporter.must_stop():
                    raise SamplingStopped
            self.saver.save()
            progress.close()
            self._finish()
            return 0
        except SamplingStopped:
            self.saver.save()
            self._record_unreadable()
            self.write_status("preempted")
            return PREEMPTED
        finally:
            progress.close()

    def _between_updates(self, progress: Progress, upload: Callable[[int], object] | None) -> None:
        """Do what is due after this update: log, snapshots, checkpoint, validation, export, grid, upload."""
        every, update = self.trainer.intervals, self.state.update
        last = update == every.length
        if every.due(every.log, update):
            self._log(progress)
        if every.due(every.snapshot, update):
            if self.saver.abandoned:
                self.saver.save()  # which deletes the snapshots of the branch that was left
            self.exporter.write_snapshots()
        if every.due(every.checkpoint, update):
            self.saver.save()
        if every.due(every.validation, update):
            self.exporter.validate()
        if every.due(every.export, update) and not last:
            self.exporter.export()
        if every.due(every.grid, update) and not last:
            self.exporter.draw_grid()
        if every.due(every.upload, update) and not last:
            self.exporter.export()
            if upload is not None:
                upload(update)

    def _log(self, progress: Progress) -> None:
        """Write one line to log.jsonl, the trackers and the progress bar."""
        trainer, state = self.trainer, self.state
        tell_unreadable(state.unreadable, trainer.data.skipped, self.accelerator)
        record = {
            "update": state.update,
            "images": trainer.position,
            **state.meter.read(self.accelerator),
            "learning_rate": trainer.learning_rate(state.update - 1),
            "images_per_second": progress.images_per_second(),
            "skipped": state.skipped,
            "unreadable_images": len(state.unreadable.names),
        }
        self.accelerator.log(record, step=state.update)
        if self.accelerator.is_main_process:
            progress.show(record)
            self.run.append_log(record)
            self.write_status("running")

    def write_status(self, status: str) -> None:
        """Write status.json at this update; the main process alone does."""
        if self.accelerator.is_main_process:
            self.run.write_status(status, self.state.update, updates=self.trainer.intervals.length)

    def _record_unreadable(self) -> None:
        """Write the names of all images that could not be read to config.json. Every process must call this."""
        tell_unreadable(self.state.unreadable, self.trainer.data.skipped, self.accelerator)
        if self.accelerator.is_main_process:
            names = {"skipped_images": list(self.state.unreadable.names)}
            write_json(self.run.config, read_json(self.run.config) | names)

    def _finish(self) -> None:
        """Leave what a complete run leaves: grid, pipeline, plot."""
        self.exporter.draw_grid()
        self.exporter.export()
        if self.accelerator.is_main_process and not draw_training(self.run):
            print("training.png is not drawn: it needs matplotlib (pip install ddpm-ext[plots]) and logged losses.")
        self._record_unreadable()
        self.write_status("finished")
