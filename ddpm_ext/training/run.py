"""The training loop; with the files from builders.py on the only code that knows Accelerate's training side."""

from __future__ import annotations

import sys
from typing import Any, cast

import numpy as np
import torch
from diffusers import UNet2DModel
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..distributed import full_tensor, make_accelerator
from ..pipelines.ddpm import DDPMExtPipeline
from ..pipelines.sampling import SamplingStopped, make_grid, sample_images, save_png
from ..publishing.publisher import Publisher
from ..run_dir import RunDir, RunError, environment, read_json, write_json
from ..signals import PREEMPTED, StopRequest, die_with_launcher, exit_process
from . import builders, resume
from .checkpoint import checkpoint_name, list_checkpoints, update_of
from .config import TrainConfig, recorded
from .dry_run import dry_run
from .ema import PowerFunctionEMA, swapped
from .export import finish_upload, make_publisher, write_pipeline, write_snapshot
from .monitor import Progress, draw_training, start_trackers, track_images
from .resume import on_main
from .updates import Updates
from .validation import Watch


class Trainer(Updates):
    """A run: its updates, and what happens between them."""

    # -- the run ----------------------------------------------------------------------------------------------------

    publisher: Publisher | None = None  # the main process's, with --push_to_hub

    def fit(self) -> int:
        """Train to the last update, then write grid, pipeline and plot.

        Returns:
            Exit code: 0; 1 when the last upload failed; 75 when a stop was asked for, with a checkpoint written.
        """
        options, plan = self.config, self.plan
        every_grid = options.save_images_steps or builders.epochs_to_updates(
            "save_images_epochs", options.save_images_epochs, self.num_images, plan
        )
        every_export = builders.epochs_to_updates("save_model_epochs", options.save_model_epochs, self.num_images, plan)
        every_snapshot = options.ema_snapshot_steps or max(1, self.updates // 32)
        watch = Watch(self) if options.eval_steps else None
        on_main(self.accelerator, self.open_publisher)
        progress = Progress(self.accelerator, self.updates, self.update_count, plan.global_batch)
        here = self.found is None or resume.is_of(self.run, self.found.folder)
        self.saved_at = self.update_count if here else None  # another run's checkpoint is to be written here too
        try:
            while self.update_count < self.updates:
                before = self.update_count
                self.update()
                if self.update_count > before:
                    progress.advance()
                    if self.due(options.logging_steps):
                        self.log(progress)
                    if self.due(every_snapshot):
                        self.write_snapshots()
                    if self.due(options.checkpointing_steps):
                        self.save()
                    if watch is not None and self.due(options.eval_steps):
                        watch()
                    if self.due(every_export) and self.update_count < self.updates:
                        self.export()
                    if self.due(every_grid) and self.update_count < self.updates:
                        self.draw_grid()
                    if self.due(options.hub_every) and self.update_count < self.updates:
                        self.upload()
                if self.must_stop():
                    raise SamplingStopped
            self.save()
            return self.finish()
        except SamplingStopped:
            self.save()
            self.record_unreadable()
            self.write_status("preempted")
            return PREEMPTED
        finally:
            progress.close()

    def due(self, every: int | None) -> bool:
        return every is not None and (self.update_count % every == 0 or self.update_count == self.updates)

    def must_stop(self) -> bool:
        """Whether any process was asked to stop. Every process must call this at the same point."""
        if self.stop is None or self.accelerator.num_processes == 1:
            return bool(self.stop)
        if self.stop:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def save(self) -> None:
        """Write a checkpoint of this update unless it is there."""
        if self.saved_at != self.update_count:
            resume.save(self)
            self.saved_at = self.update_count
        elif self.left:
            resume.leave_course(self)

    def log(self, progress: Progress) -> None:
        """One line to log.jsonl, the trackers and the progress bar."""
        self.tell_unreadable()
        record: dict[str, Any] = {
            "update": self.update_count,
            "images": self.position,
            **self.meter.read(self.accelerator),
            "learning_rate": self.config.learning_rate * self.lr_factor(self.update_count - 1),
            "images_per_second": progress.images_per_second(),
            "skipped": self.skipped,
            "unreadable_images": len(self.unreadable.names),
        }
        self.accelerator.log(record, step=self.update_count)
        if self.accelerator.is_main_process:
            progress.show(record)
            self.run.append_log(record)
            self.write_status("running")

    def write_status(self, status: str) -> None:
        if self.accelerator.is_main_process:
            self.run.write_status(status, self.update_count, updates=self.updates)

    def record_unreadable(self) -> None:
        """The names of all pictures that could not be read, to config.json. Every process must call this."""
        self.tell_unreadable()
        if self.accelerator.is_main_process:
            write_json(self.run.config, read_json(self.run.config) | {"skipped_images": list(self.unreadable.names)})

    # -- pictures and weights that leave the run ----------------------------------------------------------------------

    def draw_grid(self) -> None:
        """samples/step-N.png from the averaged weights, the pictures shared among the processes.

        Raises:
            SamplingStopped: a stop was asked for.
        """
        config, accelerator = self.config, self.accelerator
        pipeline = DDPMExtPipeline(unet=self.network, scheduler=self.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        classes = self.network.config["num_class_embeds"] if config.class_conditional else None
        with (
            swapped(self.parameters, self.averages[0] if self.averages else None),
            accelerator.split_between_processes(list(range(config.eval_batch_size)), apply_padding=True) as share,
        ):
            numbers = cast(list[int], share)
            batches = sample_images(
                pipeline,
                [config.seed + i for i in numbers],
                batch_size=config.train_batch_size,
                num_inference_steps=min(config.ddpm_num_inference_steps, config.ddpm_num_steps),
                class_labels=[i % classes for i in numbers] if classes else None,
                poll=self.must_stop,
            )
            images = torch.from_numpy(np.concatenate(list(batches))).to(accelerator.device)
        gathered: Any = accelerator.gather((images, torch.tensor(numbers, device=accelerator.device)))
        if accelerator.is_main_process:
            grid = make_grid(by_number(*gathered).cpu().numpy())
            save_png(grid, self.run.samples / f"{checkpoint_name(self.update_count)}.png")
            track_images(accelerator, grid, self.update_count)

    def averaged(self, which: int = 0) -> dict[str, Tensor]:
        """Weights of one average, or the network's own without any, in full. Every process must call this."""
        source = self.averages[which].shadow_params if self.averages else self.parameters
        names = [name for name, _ in self.network.named_parameters()]
        return {name: full_tensor(tensor).cpu().contiguous() for name, tensor in zip(names, source, strict=True)}

    def write_snapshots(self) -> None:
        """Power-function averages as they stand, from which ema.py reconstructs other widths."""
        if self.left and self.config.ema == "power_function":
            self.save()  # which deletes the snapshots of the course that was left
        for i, average in enumerate(self.averages):
            if isinstance(average, PowerFunctionEMA):
                weights = self.averaged(i)
                if self.accelerator.is_main_process:
                    write_snapshot(self.run, weights, self.update_count, average.sigma_rel)

    def export(self) -> None:
        """pipeline/: averaged weights and scheduler, loadable by this package and by stock Diffusers."""
        weights = self.averaged()
        if self.accelerator.is_main_process:
            network = cast(UNet2DModel, UNet2DModel.from_config(self.network.config))
            network.load_state_dict(weights)
            write_pipeline(self.run, DDPMExtPipeline(unet=network, scheduler=self.scheduler))
        self.accelerator.wait_for_everyone()

    def finish(self) -> int:
        """What a complete run leaves: grid, pipeline, plot, and the upload if asked for.

        Returns:
            Exit code: 0, or 1 where the upload failed.
        """
        self.draw_grid()
        self.export()
        if self.accelerator.is_main_process and not draw_training(self.run):
            print("training.png is not drawn: it needs matplotlib (pip install ddpm-ext[plots]) and logged losses.")
        self.record_unreadable()
        self.write_status("finished")
        code = 0 if self.publisher is None else finish_upload(self.publisher)
        self.accelerator.wait_for_everyone()
        return code

    def open_publisher(self) -> None:
        """On the main process alone: the others upload nothing."""
        self.publisher = make_publisher(self.config, self.run)

    def upload(self) -> None:
        """The averaged weights as they are now to the Hub, in the background of the main process."""
        self.export()
        if self.publisher is not None:
            self.publisher.push(self.update_count)


def by_number(images: Tensor, numbers: Tensor) -> Tensor:
    """Images in the order of their numbers, each once: shares of unequal length were padded with repetitions."""
    ordered = torch.empty_like(images[: int(numbers.max()) + 1])
    ordered[numbers] = images
    return ordered


def train(config: TrainConfig) -> int:
    """A whole run, or what is left of it.

    Returns:
        Exit code: 0, 1 when the last upload failed, or 75 when a stop was asked for; the same command continues.

    Raises:
        RunError: the run cannot start or go on; the message says why and what to do.
    """
    stop = StopRequest()
    die_with_launcher()
    run, trainer = RunDir(config.output_dir or "runs/custom"), None
    accelerator = make_accelerator(config, run)
    on_main(accelerator, lambda: open_run(config, run))
    try:
        trainer = Trainer(config, accelerator, run, stop)
        code = dry_run(trainer) if config.dry_run else run_to_its_end(trainer)
    except Exception as error:
        if not config.dry_run:
            record_failure(run, trainer, error)
        if not isinstance(error, ValueError):
            raise
        sentence = RunError(str(error))  # options that fit no data or no network, a picture that cannot be read
        sentence.alone = trainer is not None
        raise sentence from error
    finally:
        run.unlock()
        stop.release()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return exit_process(code, accelerator.num_processes)


def run_to_its_end(trainer: Trainer) -> int:
    """Record the start, train, and say where the result lies."""
    run, main = trainer.run, trainer.accelerator.is_main_process
    if trainer.update_count >= trainer.updates and run.is_finished():
        if main:
            print(f"{run.path} is finished at update {trainer.update_count}: nothing to do.")
        on_main(trainer.accelerator, trainer.open_publisher)  # but perhaps to upload it
        return 0 if trainer.publisher is None else finish_upload(trainer.publisher)
    if main and trainer.left:
        beyond = ", ".join(path.name for path in trainer.left)
        print(f"Going on from update {trainer.update_count}; the next save deletes what lies beyond it: {beyond}.")
    trainer.tell_unreadable()
    if main:
        record_start(trainer)
    start_trackers(trainer.accelerator, recorded(trainer.config))
    code = trainer.fit()
    if main and code == PREEMPTED:
        print(f"Stopped at update {trainer.update_count} of {trainer.updates}; the same command continues.")
    elif main:
        print(f"Samples in {run.samples}, the pipeline in {run.pipeline}.")
    return code


def record_failure(run: RunDir, trainer: Trainer | None, error: Exception) -> None:
    """status.json: failed, at the update reached, or after an unforeseen error at the last checkpoint's.

    The first process that fails writes it; the others then fail of its absence. A start that was refused leaves the
    status of the run as it was.
    """
    explained, update = isinstance(error, (RunError, ValueError)), 0
    try:
        before = read_json(run.status)["status"] if run.status.exists() else None
        if before == "failed" or (trainer is None and before is not None):
            return
        if trainer is not None and explained:
            update = trainer.update_count
        elif checkpoints := list_checkpoints(run.checkpoints):
            update = update_of(checkpoints[-1])
        run.write_status("failed", update, error=str(error) if explained else f"{type(error).__name__}: {error}")
    except (OSError, ValueError) as failure:  # a full disk: the first error is the one to tell
        print(f"{run.status} cannot be written: {failure}", file=sys.stderr)


def open_run(config: TrainConfig, run: RunDir) -> None:
    """Lock the folder and, if asked for, empty it of a run that is finished or was started with other options."""
    run.lock()
    if not config.overwrite_output_dir or config.dry_run:
        return
    if run.is_unfinished() and run.was_started_with(recorded(config)):
        print(
            f"{run.path} holds this very run, not finished: it goes on in spite of --overwrite_output_dir. To start "
            "afresh delete the folder."
        )
    else:
        run.clear()


def record_start(trainer: Trainer) -> None:
    """config.json, one entry per start, and a log that ends where this start begins."""
    run, network = trainer.run, trainer.network
    start = {
        "update": trainer.update_count,
        "from": str(trainer.found.folder) if trainer.found else None,
        "course": trainer.course,
        "accumulation": trainer.plan.accumulation,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "sharded": any(isinstance(parameter, DTensor) for parameter in trainer.parameters),
        **trainer.numerics,
        **environment(),
    }
    record = {
        "config": recorded(trainer.config),
        "seed": trainer.config.seed,
        "updates": trainer.updates,
        "global_batch": trainer.plan.global_batch,
        "images": trainer.num_images,
        "data_fingerprint": trainer.data.fingerprint,
        "data": builders.data_spec(trainer.config, trainer.data).to_dict(),
        "skipped_images": list(trainer.unreadable.names),
        "network": dict(network.config),
        "parameters": sum(parameter.numel() for parameter in trainer.parameters),
        "starts": [*run.starts(), start],
    }
    write_json(run.config, record)
    run.rewind_log(trainer.update_count)
    trainer.write_status("running")
