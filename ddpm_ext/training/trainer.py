"""The Trainer: the objects of a run, one update, and what happens between updates.

An update: images and draws of (seed, step) -> x_t -> network -> loss -> clip -> Adam -> averages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from torch import Tensor

from ..data.order import Batch, prefetch, random_flip
from ..diffusion.images import to_x_0
from ..diffusion.losses import training_loss
from ..diffusion.process import q_sample
from ..diffusion.words import EXTENSION_KEY, LEARNED_VARIANCES
from ..distributed import full_tensor, move, set_numerics, take_dynamo, tell_deepspeed
from ..models.classes import classes_of, number_of_classes
from ..pipelines.ddpm import DDPMExtPipeline
from ..pipelines.sampling import make_grid, save_png, shown_bands
from ..pipelines.seeds import SamplingStopped, sample_images
from ..publishing.publisher import Publisher
from ..run_dir import RunDir, RunError, package_versions, read_json, write_json
from ..signals import PREEMPTED, StopRequest
from . import builders
from .config import TrainConfig, recorded
from .export import finish_upload, make_publisher, write_pipeline, write_snapshot
from .fine_tune import Start, add_lora, check_class_names, freeze, load_start, load_weights, merged, resumed_start
from .monitor import Meter, Progress, draw_training, sampling_bar, tell_unreadable, track_images
from .state import checkpoint
from .state.checkpoint import checkpoint_name, list_checkpoints
from .state.ema import PowerFunctionEMA, make_averages, swapped
from .state.outcomes import Outcomes, can_skip_on_device
from .state.resume import (
    ResumePoint,
    compare,
    find_checkpoint,
    is_of,
    on_main,
    plain_config,
    resumed_plan,
    warn_of_other_conditions,
)
from .state.rng import draw, seed_dropout, uniforms
from .state.timestep_samplers import Timesteps
from .state.train_state import TrainState
from .validation import is_better, make_validation

__all__ = ["Trainer"]


class Trainer:
    """One training run.

    Args:
        config: The options.
        accelerator: From `make_accelerator`.
        run: The run folder, locked.
        stop: Whether a signal asked to stop; None never stops.

    Attributes:
        state: What updates change; see `TrainState`.
        network: The bare UNet2DModel; `unet` is the same in what the launcher wraps around it.
        plan: How the global batch is cut.
        length: Updates of the whole run.
        resumed_from: The checkpoint that it goes on from, or None.
        numerics: What decides the last digits beside the options.

    Raises:
        RunError, ValueError: options that fit no data, no network or not the checkpoint.
    """

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, run: RunDir, stop: StopRequest | None = None
    ) -> None:
        self.config, self.accelerator, self.run, self.stop = config, accelerator, run, stop
        found = self.resumed_from = find_checkpoint(config, run, accelerator)
        self.abandoned = found.abandoned if found else []
        self.plan = resumed_plan(config, found, accelerator.num_processes)
        start = self._start(found)
        config = self.config
        arguments = start.network if start else builders.network_config(config)
        recorded = found.record["numerics"]["num_threads"] if found else builders.fitting_threads_of(arguments)
        self.numerics = set_numerics(config, accelerator, recorded)
        # A head of its own may be of the images' channels; else images are made of the network's.
        own = start is not None and start.weights is not None and config.init_new_head
        self.data = builders.build_data(config, {**arguments, "in_channels": None} if own else arguments)
        if own:
            arguments |= {"in_channels": self.data.shape[0], "out_channels": self.data.shape[0]}
            arguments |= {"out_channels": 2 * self.data.shape[0]} if config.variance_type in LEARNED_VARIANCES else {}
        self.scheduler = start.scheduler if start else builders.build_scheduler(config)
        self.tables = self.scheduler.tables.to(accelerator.device)
        self.num_images = builders.length(self.data)
        self.length = builders.total_updates(config, self.num_images, self.plan)
        self.lr_factor = builders.lr_factor(config, self.length)
        self.state = self._prepare(self._build_network(arguments, start))
        if found:
            network = plain_config(self.network.config)
            compare(config, found.record, network, self.data.fingerprint, self.plan, self.length)
            if accelerator.is_main_process:
                warn_of_other_conditions(found.record["numerics"], self.numerics)
            self.state.restore(found.folder, found.record, self.plan.global_batch, accelerator)
            self.data.load_state_dict(found.record["data"]["state"])
        self.batches = self._read()
        # Another run's checkpoint is to be written here too.
        self.saved_at = self.state.update if found is not None and is_of(run, found.folder) else None
        self.every_snapshot = config.ema_snapshot_steps or max(1, self.length // 32)
        self.every_grid = config.save_images_steps or self._updates_of("save_images_epochs")
        self.every_export = self._updates_of("save_model_epochs")
        self.data_spec = builders.data_spec(config, self.data)
        self.validation = make_validation(config, self.data_spec, accelerator) if config.eval_steps else None
        self.started = False  # whether the start stands in config.json
        self.publisher: Publisher | None = None  # the main process's, with --push_to_hub

    def _start(self, found: ResumePoint | None) -> Start | None:
        """Return what --init_from names, or named when the run began, and take over its schedule; None without it."""
        if self.config.init_from is None:
            self.origin = None
            return None
        start = load_start(self.config) if found is None else resumed_start(self.config, found.record)
        self.config, self.origin = start.config, start.record
        return start

    def _build_network(self, arguments: dict[str, Any], start: Start | None) -> UNet2DModel:
        """Build the network with its first weights, or with those of the source."""
        network = builders.build_network(self.config, arguments, self.data)
        if start is None:
            return network
        check_class_names(start, self.data.spec)
        if start.weights is not None:
            self.origin = {**start.record, "new": load_weights(network, start), "loaded": len(start.weights)}
        if self.config.lora_rank is not None:
            add_lora(network, self.config.lora_rank)
        freeze(network, self.config.freeze)
        return network

    def _prepare(self, network: UNet2DModel) -> TrainState:
        """Move the network to device, precision and memory layout, wrap it for the launcher, and begin a state."""
        config, accelerator = self.config, self.accelerator
        self.dtype = torch.float64 if config.double else torch.float32
        # FSDP2 shards contiguous weights only.
        channels_last = config.channels_last and not accelerator.is_fsdp2
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        network.to(accelerator.device)
        (network.double() if config.double else network).to(memory_format=self.layout)  # pyright: ignore
        builders.speed_up(config, network, take_dynamo(accelerator))
        accelerator.gradient_accumulation_steps = self.plan.accumulation
        tell_deepspeed(accelerator, self.plan.micro_batch, self.plan.accumulation, config.max_grad_norm)
        names = [name for name, _ in network.named_parameters()]  # before any wrapper has given them others
        optimizer = builders.build_optimizer(config, network)
        self.unet, wrapped = accelerator.prepare(network, optimizer)
        self.network = cast(UNet2DModel, accelerator.unwrap_model(self.unet, keep_torch_compile=False))
        self.parameters = list(self.network.parameters())
        by_device = can_skip_on_device(accelerator, optimizer, config.fused_optimizer)
        self.outcomes = Outcomes(accelerator.device) if by_device else None
        return TrainState(
            parameters=dict(zip(names, self.parameters, strict=True)),
            averages=make_averages(config, self.parameters),
            optimizer=wrapped,
            timesteps=Timesteps(config.timestep_sampler, config.ddpm_num_steps),
            meter=Meter(accelerator.device, config.ddpm_num_steps),
        )

    # -- one update -------------------------------------------------------------------------------------------------

    def update(self) -> None:
        """Make one optimiser update on the next global batch; a non-finite one is skipped and counted.

        On an accelerator `state` may speak of the step before until `settle` is called, which this does itself where
        the update is due for anything.
        """
        mean = torch.zeros((), device=self.accelerator.device)  # loss of this process's images
        for micro in range(self.plan.accumulation):
            with self.accelerator.accumulate(self.unet):
                loss = self.loss(next(self.batches), micro)
                # A loss that overflowed may have finite gradients: make them nan, so that every process sees it.
                self.accelerator.backward(loss * (1 + 0 * loss.detach()))
                mean += loss.detach() / self.plan.accumulation
        self.state.timesteps.learn(self.accelerator)
        norm = self._clip()
        self.settle()
        self.state.step += 1
        self.last_loss = mean
        if self.outcomes is None:
            finite = math.isfinite(float(norm))
            if finite:
                self._step(norm, norm.new_ones(()))
            self._count(finite)
        else:
            finite = norm.isfinite()
            self.state.optimizer.optimizer.found_inf = (~finite).float()  # pyright: ignore[reportAttributeAccessIssue]
            self._step(norm.where(finite, 0), finite)
            self.outcomes.send(finite)
            if self._anything_due(self.state.update + 1):
                self.settle()
        self.state.optimizer.zero_grad()

    def settle(self) -> None:
        """Learn how the step queued last ended, and count it. Every process must call this at the same point.

        Raises:
            RunError: `max_bad_steps` in a row.
        """
        finite = None if self.outcomes is None else self.outcomes.receive()
        if finite is not None:
            self._count(finite)

    def loss(self, batch: Batch, micro: int) -> Tensor:
        """Return the mean loss of one forward pass of this process.

        Args:
            batch: Its images.
            micro: Number of the pass within the update.
        """
        config, device, step = self.config, self.accelerator.device, self.state.step
        rows = self.plan.rows(self.accelerator.process_index, micro)
        draws = draw(config.seed, step, rows, self.data.shape, config.ddpm_num_steps, device)
        seed_dropout(config.seed, step, micro, self.accelerator.process_index)
        pixels = move(batch.pixels, device)
        if config.random_flip:
            pixels = random_flip(pixels, draws.flip)
        x_0 = to_x_0(pixels, self.data_spec.bits).to(self.dtype, memory_format=self.layout)
        eps = draws.eps.to(self.dtype, memory_format=self.layout)
        t, weight = self.state.timesteps.choose(draws.t, config.seed, step, rows)
        x_t = q_sample(x_0, t, eps, self.tables)
        labels = self.labels(batch, rows)
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
            bits=self.data_spec.bits,
        )
        self.state.meter.add_losses(losses, t, weight)
        self.state.timesteps.see(t, losses)
        return losses.mean() if weight is None else (losses * weight).mean()

    def labels(self, batch: Batch, rows: range) -> Tensor | None:
        """Return the classes of a batch as the network gets them: the null label for the share of `class_dropout`.

        Args:
            batch: The images.
            rows: Their places in the global batch.
        """
        config = self.config
        if not config.class_conditional or batch.labels is None:
            return None
        labels, classes = batch.labels, classes_of(self.network.config)
        if config.class_dropout and classes is not None and classes.null_label is not None:
            dropped = uniforms("class", config.seed, self.state.step, rows) < config.class_dropout
            labels = labels.masked_fill(dropped.to(labels.device), classes.null_label)
        return move(labels, self.accelerator.device)

    def _clip(self) -> Tensor:
        """Clip the gradients; return their norm before it, the same on every process, non-finite if any gradient is."""
        limit = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(self.parameters, limit)
        assert norm is not None
        return full_tensor(norm)

    def _step(self, norm: Tensor, finite: Tensor) -> None:
        """Take Adam's step at the learning rate of this update, unless the device finds it not finite.

        Args:
            norm: Of the gradients; 0 where it is not finite.
            finite: Shape ().
        """
        for group in self.state.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.state.optimizer.step()
        self.state.meter.add_grad_norm(norm, finite)

    def _count(self, finite: bool) -> None:
        """Count the last step: an update moves the averages on, too many skipped ones in a row end the run.

        Raises:
            RunError: `max_bad_steps` in a row.
        """
        state = self.state
        if finite:
            for average in state.averages:
                average.step(self.parameters)
            state.update += 1
            state.bad_in_a_row = 0
            return
        if self.accelerator.scaler is not None:
            state.optimizer.step()  # fp16: the scaler skips the update itself and lowers its scale
        state.skipped += 1
        state.bad_in_a_row += 1
        if state.bad_in_a_row >= self.config.max_bad_steps:
            mean: Any = self.accelerator.reduce(self.last_loss, reduction="mean")  # over the processes
            last = next(reversed(list_checkpoints(self.run.checkpoints)), None)
            raise RunError(
                f"{state.bad_in_a_row} steps in a row had a non-finite loss or gradient, the last at step {state.step} "
                f"(update {state.update}, loss {float(mean)}, learning rate {self.learning_rate:.3g}). Last good "
                f"checkpoint: {last or 'none'}. Lower --learning_rate, or train with --mixed_precision no."
            )

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return self.config.learning_rate * self.lr_factor(self.state.update)

    @property
    def position(self) -> int:
        """Global position of the next image."""
        return self.state.step * self.plan.global_batch

    def _read(self) -> Iterator[Batch]:
        """Yield this process's images, forward pass by forward pass, from the current step on, without end."""
        seed = self.config.seed
        if self.config.dataloader_num_workers:
            return prefetch(lambda rows: self.data.at(rows, seed), self._requests())
        return (self.data.at(rows, seed) for rows in self._requests())

    def _requests(self) -> Iterator[range]:
        position = self.position
        while True:
            for micro in range(self.plan.accumulation):
                rows = self.plan.rows(self.accelerator.process_index, micro)
                yield range(position + rows.start, position + rows.stop)
            position += self.plan.global_batch

    # -- the run ----------------------------------------------------------------------------------------------------

    def fit(self) -> int:
        """Train to the last update, then write grid, pipeline and plot.

        Returns:
            Exit code: 0; 1 when the last upload failed; 75 when a stop was asked for, with a checkpoint written.
        """
        progress = Progress(self.accelerator, self.length, self.state.update, self.plan.global_batch)
        try:
            while self.state.update < self.length:
                before = self.state.update
                self.update()
                if self.state.update > before:
                    progress.advance(self.state.update - before)
                    self._between_updates(progress)
                if self.must_stop():
                    raise SamplingStopped
            self.save()
            progress.close()
            return self._finish()
        except SamplingStopped:
            self.save()
            self.record_unreadable()
            self.write_status("preempted")
            return PREEMPTED
        finally:
            progress.close()

    def _between_updates(self, progress: Progress) -> None:
        """Do what is due after this update: log, snapshots, checkpoint, validation, export, grid, upload."""
        config, last = self.config, self.state.update == self.length
        if self._due(config.logging_steps):
            self.log(progress)
        if self._due(self.every_snapshot):
            self.write_snapshots()
        if self._due(config.checkpointing_steps):
            self.save()
        if self._due(config.eval_steps):
            self.validate()
        if self._due(self.every_export) and not last:
            self.export()
        if self._due(self.every_grid) and not last:
            self.draw_grid()
        if self._due(config.hub_every) and not last:
            self.upload()

    def _due(self, every: int | None) -> bool:
        return every is not None and (self.state.update % every == 0 or self.state.update == self.length)

    def _anything_due(self, update: int) -> bool:
        """Return whether something is done after this update that must know how it ended."""
        config = self.config
        intervals = (
            *(
                config.logging_steps,
                config.checkpointing_steps,
                config.eval_steps,
                config.hub_every,
                self.every_snapshot,
            ),
            *(self.every_export, self.every_grid),
        )
        return update == self.length or any(every is not None and update % every == 0 for every in intervals)

    def _updates_of(self, option: str) -> int | None:
        """Return the updates of an option in epochs."""
        return builders.epochs_to_updates(option, getattr(self.config, option), self.num_images, self.plan)

    def must_stop(self) -> bool:
        """Return whether any process was asked to stop. Every process must call this at the same point."""
        if self.stop is None or self.accelerator.num_processes == 1:
            return bool(self.stop)
        if self.stop:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def log(self, progress: Progress) -> None:
        """Write one line to log.jsonl, the trackers and the progress bar."""
        self.tell_unreadable()
        state = self.state
        record: dict[str, Any] = {
            "update": state.update,
            "images": self.position,
            **state.meter.read(self.accelerator),
            "learning_rate": self.config.learning_rate * self.lr_factor(state.update - 1),
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
            self.run.write_status(status, self.state.update, updates=self.length)

    def tell_unreadable(self) -> None:
        """Name the images that could not be read since the last call. Every process must call this."""
        tell_unreadable(self.state.unreadable, self.data.skipped, self.accelerator)

    def record_unreadable(self) -> None:
        """Write the names of all images that could not be read to config.json. Every process must call this."""
        self.tell_unreadable()
        if self.accelerator.is_main_process:
            names = {"skipped_images": list(self.state.unreadable.names)}
            write_json(self.run.config, read_json(self.run.config) | names)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of this update unless it is there, and delete those beyond the limit.

        The first one after going back to an earlier checkpoint deletes what lies beyond that, see `ResumePoint`.
        Every process must call this.

        Raises:
            RunError: the disk is full; raised on every process.
        """
        self.settle()
        abandoned, self.abandoned = self.abandoned, []
        if self.saved_at == self.state.update:
            if abandoned:
                on_main(self.accelerator, lambda: checkpoint.delete(checkpoint.set_aside(abandoned)))
            return
        tensors, record = self.gather()
        folder, limit = self.run.checkpoints, self.config.checkpoints_total_limit

        def write() -> None:
            written = checkpoint.write_checkpoint(folder, self.state.update, tensors, record, abandoned)
            checkpoint.prune(folder, limit, written)

        on_main(self.accelerator, write)
        self.saved_at = self.state.update

    def gather(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Return what a checkpoint holds: tensors by file, and state.json. Every process must call this."""
        self.settle()
        self.tell_unreadable()
        record = {
            **self.state.counters(self.accelerator),
            "seed": self.config.seed,
            "epoch": None if self.num_images is None else self.position // self.num_images,
            "branch": self.resumed_from.branch if self.resumed_from else None,
            "global_position": self.position,
            "global_batch": self.plan.global_batch,
            "updates": self.length,
            "data": {"fingerprint": self.data.fingerprint, "state": self.data.state_dict(self.position)},
            "numerics": self.numerics,
            "network": plain_config(self.network.config),
            **self._of_start(),
            "versions": package_versions(),
            "config": recorded(self.config),
        }
        return self.state.tensors(), record

    def _of_start(self) -> dict[str, Any]:
        """Return what a run with --init_from needs to go on without its source."""
        if self.origin is None:
            return {}
        classes = self.network.config.get(EXTENSION_KEY)
        return {"init_from": self.origin, "classes": classes, "scheduler": json.loads(self.scheduler.to_json_string())}

    # -- images and weights that leave the run ------------------------------------------------------------------------

    def draw_grid(self) -> None:
        """Write samples/step-N.png from the averaged weights, the images shared among the processes.

        Raises:
            SamplingStopped: a stop was asked for.
        """
        accelerator = self.accelerator
        with accelerator.split_between_processes(list(range(self.config.eval_batch_size)), apply_padding=True) as share:
            numbers = cast(list[int], share)
        images = torch.from_numpy(self.sample(numbers)).to(accelerator.device)
        gathered: Any = accelerator.gather((images, torch.tensor(numbers, device=accelerator.device)))
        if accelerator.is_main_process:
            images = _by_number(*gathered).cpu().numpy()
            grid = make_grid(shown_bands(images, self.config.rgb_bands if images.shape[-1] > 4 else None))
            save_png(grid, self.run.samples / f"{checkpoint_name(self.state.update)}.png")
            track_images(accelerator, grid, self.state.update)

    def sample(self, numbers: list[int], num_inference_steps: int | None = None) -> np.ndarray:
        """Draw images from the averaged weights, image i from seed + i; uint8, shape (N, H, W, C).

        Args:
            numbers: Which images.
            num_inference_steps: Denoising steps; None for those of the sample grids.

        Raises:
            SamplingStopped: a stop was asked for.
        """
        config = self.config
        steps = num_inference_steps or min(config.ddpm_num_inference_steps, config.ddpm_num_steps)
        pipeline = DDPMExtPipeline(unet=self.network, scheduler=self.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        classes = number_of_classes(self.network.config) if config.class_conditional else None
        calls = steps * -(-len(numbers) // config.train_batch_size)
        shown = self.accelerator.is_main_process and num_inference_steps is None
        with self._averaged_in_place(), sampling_bar(self.network, calls, self.state.update, shown):
            batches = sample_images(
                pipeline,
                [config.seed + i for i in numbers],
                batch_size=config.train_batch_size,
                num_inference_steps=steps,
                class_labels=[i % classes for i in numbers] if classes else None,
                poll=self.must_stop,
            )
            return np.concatenate(list(batches))

    def _averaged_in_place(self) -> Any:
        """Inside, the network holds the first average."""
        return swapped(self.parameters, self.state.averages[0] if self.state.averages else None)

    def validate(self) -> dict[str, float]:
        """Measure the averaged weights, log the scores, and keep the weights if they are the best so far.

        Raises:
            SamplingStopped: a stop was asked for.
        """
        assert self.validation is not None  # with --eval_steps
        update, best = self.state.update, self.run.best_record
        with self._averaged_in_place():
            scores = self.validation(self.network, self.scheduler, self.must_stop)
        record = {f"eval/{name}": value for name, value in scores.items()}
        self.accelerator.log(record, step=update)
        if self.accelerator.is_main_process:
            self.run.append_log({"update": update, **record})
        if on_main(self.accelerator, lambda: is_better(self.run, scores, self.config.eval_metric)):
            self.export(self.run.best)
            on_main(self.accelerator, lambda: write_json(best, {"update": update, **scores}))
        return scores

    def write_snapshots(self) -> None:
        """Write the power-function averages as they stand, from which other widths are reconstructed."""
        if self.config.ema != "power_function" or not self.state.averages:
            return
        if self.abandoned:
            self.save()  # which deletes the snapshots of the abandoned branch
        for i, average in enumerate(self.state.averages):
            assert isinstance(average, PowerFunctionEMA)
            weights = self.state.averaged(i)
            if self.accelerator.is_main_process:
                write_snapshot(self.run, weights, self.state.update, average.sigma_rel)

    def export(self, folder: Path | None = None) -> None:
        """Write averaged weights and scheduler as a pipeline that this package and stock Diffusers load.

        Args:
            folder: None for pipeline/ of the run.
        """
        weights = self.state.averaged()

        def write() -> None:
            network = cast(UNet2DModel, UNet2DModel.from_config(self.network.config))
            network.load_state_dict(merged(weights))
            write_pipeline(self.run, DDPMExtPipeline(unet=network, scheduler=self.scheduler), folder)

        on_main(self.accelerator, write)

    def _finish(self) -> int:
        """Leave what a complete run leaves: grid, pipeline, plot, and the upload if asked for.

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
        """Open the repository of --push_to_hub, on the main process alone."""
        self.publisher = make_publisher(self.config, self.run, self.origin)

    def upload(self) -> None:
        """Upload the averaged weights as they are now to the Hub, in the background of the main process."""
        self.export()
        if self.publisher is not None:
            self.publisher.push(self.state.update)


def _by_number(images: Tensor, numbers: Tensor) -> Tensor:
    """Return images in the order of their numbers, each once: shares of unequal length were padded with repetitions."""
    ordered = torch.empty_like(images[: int(numbers.max()) + 1])
    ordered[numbers] = images
    return ordered
