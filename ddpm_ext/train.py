"""The training loop; with launch.py, assemble.py, resume.py and progress.py the only code that knows the training side.

One update: pictures and draws of (seed, step) -> x_t -> network -> loss -> clip -> Adam -> averages.
`step` numbers the global batches, `update` the optimiser's updates; they differ by the skipped non-finite steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from torch import Tensor
from torch.distributed.tensor import DTensor

from . import assemble, resume
from .checkpoint import checkpoint_name, list_checkpoints
from .config import TrainConfig, recorded
from .data import Batch, prefetch, random_flip
from .dry_run import dry_run
from .ema import PowerFunctionEMA, make_averages, swapped
from .export import finish_upload, make_publisher, write_pipeline, write_snapshot
from .images import to_x_0
from .launch import make_accelerator, set_numerics, whole
from .losses import training_loss
from .pipeline import DDPMExtPipeline
from .process import q_sample
from .progress import Meter, Progress, draw_training, start_trackers, track_images
from .publish import Publisher
from .randomness import draw, seed_dropout
from .resume import RunState, on_main
from .run_dir import RunDir, RunError, environment, write_json
from .sample import SamplingStopped, make_grid, sample_images, save_png
from .signals import PREEMPTED, StopRequest, die_with_launcher, leave
from .timesteps import Timesteps
from .watch import Watch


class Trainer(RunState):
    """The objects of a run and its counters. `update()` makes one optimiser update and nothing else."""

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, run: RunDir, stop: StopRequest | None = None
    ) -> None:
        self.config, self.accelerator, self.run, self.stop = config, accelerator, run, stop
        self.found = resume.find(config, run, accelerator)
        threads = self.found.state["numerics"]["num_threads"] if self.found else None
        self.numerics = set_numerics(config, accelerator, threads)
        arguments = assemble.network_config(config)
        self.data = assemble.build_data(config, arguments)
        network = assemble.build_network(config, arguments, self.data)
        self.scheduler = assemble.build_scheduler(config)
        self.tables = self.scheduler.tables.to(accelerator.device)
        self.dtype = torch.float64 if config.double else torch.float32
        # FSDP2 shards contiguous weights only.
        channels_last = config.channels_last and not accelerator.is_fsdp2
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        network.to(accelerator.device)
        (network.double() if config.double else network).to(memory_format=self.layout)  # pyright: ignore
        assemble.speed_up(config, network)

        optimizer = assemble.build_optimizer(config, network)
        self.unet, self.optimizer = accelerator.prepare(network, optimizer)
        self.network = accelerator.unwrap_model(self.unet)
        self.parameters = list(self.network.parameters())
        self.averages = make_averages(config, self.parameters)
        self.meter = Meter(accelerator.device, config.ddpm_num_steps)
        self.timesteps = Timesteps(config.timestep_sampler, config.ddpm_num_steps)
        self.update_count = self.step = self.skipped = self.bad_in_a_row = 0

        self.plan = resume.planned(config, self.found, accelerator.num_processes)
        accelerator.gradient_accumulation_steps = self.plan.accumulation
        self.updates = assemble.total_updates(config, self.num_images, self.plan)
        self.lr_factor = assemble.lr_factor(config, self.updates)
        if self.found:
            resume.restore(self, self.found)
        self.batches = self.read()

    # -- one update -------------------------------------------------------------------------------------------------

    def update(self) -> None:
        """One optimiser update on the next global batch; a non-finite one is skipped and counted."""
        loss = torch.zeros(())
        for micro in range(self.plan.accumulation):
            with self.accelerator.accumulate(self.unet):
                loss = self.loss(next(self.batches), micro)
                # A loss that overflowed may have finite gradients: make them nan, so that every process sees it.
                self.accelerator.backward(loss * (1 + 0 * loss.detach()))
        self.timesteps.learn(self.accelerator)
        norm = self.clip()
        self.step += 1
        if math.isfinite(norm):
            self.apply()
        else:
            self.skip(float(loss.detach()))
        self.optimizer.zero_grad()

    def loss(self, batch: Batch, micro: int) -> Tensor:
        """Mean loss of one forward pass of this process."""
        config, device = self.config, self.accelerator.device
        rows = self.plan.rows(self.accelerator.process_index, micro)
        draws = draw(config.seed, self.step, rows, self.data.shape, config.ddpm_num_steps, device)
        seed_dropout(config.seed, self.step, micro, self.accelerator.process_index)
        pixels = batch.pixels.to(device, non_blocking=True)
        if config.random_flip:
            pixels = random_flip(pixels, draws.flip)
        x_0 = to_x_0(pixels).to(self.dtype, memory_format=self.layout)
        eps = draws.eps.to(self.dtype, memory_format=self.layout)
        t, weight = self.timesteps.choose(draws.t, config.seed, self.step, rows)
        x_t = q_sample(x_0, t, eps, self.tables)
        labels = batch.labels.to(device) if config.class_conditional and batch.labels is not None else None
        output = self.unet(x_t, t, class_labels=labels, return_dict=False)[0]
        losses = training_loss(
            output,
            x_0,
            x_t,
            eps,
            t,
            self.tables,
            prediction_type=config.prediction_type,
            variance_type=config.variance_type,
            loss=config.loss,
            snr_gamma=config.snr_gamma,
        )
        self.meter.add_losses(losses, t, weight)
        self.timesteps.see(t, losses)
        return losses.mean() if weight is None else (losses * weight).mean()

    def clip(self) -> float:
        """Clip the gradients; their norm before it, the same on every process, non-finite if any gradient is."""
        limit = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(self.parameters, limit)
        assert norm is not None
        self.last_norm = whole(norm)
        return float(self.last_norm)

    def apply(self) -> None:
        """Adam at the learning rate of this update, then the averages."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        for average in self.averages:
            average.step(self.parameters)
        self.meter.add_grad_norm(self.last_norm)
        self.update_count += 1
        self.bad_in_a_row = 0

    def skip(self, loss: float) -> None:
        """Count a non-finite step; too many in a row end the run.

        Raises:
            RunError: `max_bad_steps` in a row.
        """
        if self.accelerator.scaler is not None:
            self.optimizer.step()  # fp16: the scaler skips the update itself and lowers its scale
        self.skipped += 1
        self.bad_in_a_row += 1
        if self.bad_in_a_row >= self.config.max_bad_steps:
            last = next(reversed(list_checkpoints(self.run.checkpoints)), None)
            raise RunError(
                f"{self.bad_in_a_row} steps in a row had a non-finite loss or gradient, the last at step {self.step} "
                f"(update {self.update_count}, loss {loss}, learning rate {self.learning_rate:.3g}). Last good "
                f"checkpoint: {last or 'none'}. Lower --learning_rate, or train with --mixed_precision no."
            )

    @property
    def learning_rate(self) -> float:
        return self.config.learning_rate * self.lr_factor(self.update_count)

    # -- data -------------------------------------------------------------------------------------------------------

    def read(self) -> Iterator[Batch]:
        """This process's pictures, forward pass by forward pass, from the current step on, without end."""
        seed = self.config.seed
        if self.config.dataloader_num_workers:
            return prefetch(lambda rows: self.data.at(rows, seed), self.requests())
        return (self.data.at(rows, seed) for rows in self.requests())

    def requests(self) -> Iterator[range]:
        position = self.position
        while True:
            for micro in range(self.plan.accumulation):
                rows = self.plan.rows(self.accelerator.process_index, micro)
                yield range(position + rows.start, position + rows.stop)
            position += self.plan.global_batch

    # -- the run ----------------------------------------------------------------------------------------------------

    publisher: Publisher | None = None  # the main process's, with --push_to_hub

    def fit(self) -> int:
        """Train to the last update, then write grid, pipeline and plot.

        Returns:
            Exit code: 0, or 75 when a stop was asked for; a checkpoint of the last update is then written.
        """
        options, plan = self.config, self.plan
        every_grid = options.save_images_steps or assemble.epochs_to_updates(
            "save_images_epochs", options.save_images_epochs, self.num_images, plan
        )
        every_export = assemble.epochs_to_updates("save_model_epochs", options.save_model_epochs, self.num_images, plan)
        every_snapshot = options.ema_snapshot_steps or max(1, self.updates // 32)
        watch = Watch(self) if options.eval_steps else None
        on_main(self.accelerator, self.open_publisher)
        progress = Progress(self.accelerator, self.updates, self.update_count, plan.global_batch)
        self.saved_at = self.update_count
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
            self.finish()
        except SamplingStopped:
            self.save()
            self.write_status("preempted")
            return PREEMPTED
        finally:
            progress.close()
        return 0

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

    def log(self, progress: Progress) -> None:
        """One line to log.jsonl, the trackers and the progress bar."""
        record: dict[str, Any] = {
            "update": self.update_count,
            "images": self.position,
            **self.meter.read(self.accelerator),
            "learning_rate": self.config.learning_rate * self.lr_factor(self.update_count - 1),
            "images_per_second": progress.images_per_second(),
            "skipped": self.skipped,
            "unreadable_images": len(self.data.skipped),
        }
        self.accelerator.log(record, step=self.update_count)
        if self.accelerator.is_main_process:
            progress.show(record)
            self.run.append_log(record)
            self.write_status("running")

    def write_status(self, status: str) -> None:
        if self.accelerator.is_main_process:
            self.run.write_status(status, self.update_count, updates=self.updates)

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
        images = accelerator.gather(images)[: config.eval_batch_size].cpu().numpy()
        if accelerator.is_main_process:
            grid = make_grid(images)
            save_png(grid, self.run.samples / f"{checkpoint_name(self.update_count)}.png")
            track_images(accelerator, grid, self.update_count)

    def averaged(self, which: int = 0) -> dict[str, Tensor]:
        """Weights of one average, or the network's own without any, in full. Every process must call this."""
        source = self.averages[which].shadow_params if self.averages else self.parameters
        names = [name for name, _ in self.network.named_parameters()]
        return {name: whole(tensor).cpu().contiguous() for name, tensor in zip(names, source, strict=True)}

    def write_snapshots(self) -> None:
        """Power-function averages as they stand, from which ema.py reconstructs other widths."""
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

    def finish(self) -> None:
        """What a complete run leaves: grid, pipeline, plot, and the upload if asked for."""
        self.draw_grid()
        self.export()
        if self.accelerator.is_main_process and not draw_training(self.run):
            print("training.png is not drawn: it needs matplotlib (pip install ddpm-ext[plots]) and logged losses.")
        self.write_status("finished")
        if self.publisher is not None:
            finish_upload(self.publisher)
        self.accelerator.wait_for_everyone()

    def open_publisher(self) -> None:
        """On the main process alone: the others upload nothing."""
        self.publisher = make_publisher(self.config, self.run)

    def upload(self) -> None:
        """The averaged weights as they are now to the Hub, in the background of the main process."""
        self.export()
        if self.publisher is not None:
            self.publisher.push(self.update_count)


def train(config: TrainConfig) -> int:
    """A whole run, or what is left of it.

    Returns:
        Exit code: 0, or 75 when a stop was asked for; the same command continues.

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
    except (RunError, ValueError) as error:
        if accelerator.is_main_process:
            run.write_status("failed", trainer.update_count if trainer else 0, error=str(error))
        if trainer is None:  # options that fit no data or no network: the sentence is the whole story
            raise RunError(str(error)) from error
        raise
    finally:
        run.unlock()
        stop.release()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return leave(code, accelerator.num_processes)


def run_to_its_end(trainer: Trainer) -> int:
    """Record the start, train, and say where the result lies."""
    run, main = trainer.run, trainer.accelerator.is_main_process
    if trainer.update_count >= trainer.updates and run.is_finished():
        if main:
            print(f"{run.path} is finished at update {trainer.update_count}: nothing to do.")
        return 0
    if main:
        record_start(trainer)
    if main and trainer.data.skipped:
        print(f"{len(trainer.data.skipped)} images cannot be read and are left out: {trainer.data.skipped[:10]}")
    start_trackers(trainer.accelerator, recorded(trainer.config))
    code = trainer.fit()
    if main and code == PREEMPTED:
        print(f"Stopped at update {trainer.update_count} of {trainer.updates}; the same command continues.")
    elif main:
        print(f"Samples in {run.samples}, the pipeline in {run.pipeline}.")
    return code


def open_run(config: TrainConfig, run: RunDir) -> None:
    """Lock the folder and, if asked for, empty it."""
    run.lock()
    if config.overwrite_output_dir:
        run.clear()


def record_start(trainer: Trainer) -> None:
    """config.json, one entry per start, and a log that ends where this start begins."""
    run, network = trainer.run, trainer.network
    start = {
        "update": trainer.update_count,
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
        "skipped_images": trainer.data.skipped,
        "network": dict(network.config),
        "parameters": sum(parameter.numel() for parameter in trainer.parameters),
        "starts": [*run.starts(), start],
    }
    write_json(run.config, record)
    run.rewind_log(trainer.update_count)
    trainer.write_status("running")
