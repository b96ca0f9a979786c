"""One update: pictures and draws of (seed, step) -> x_t -> network -> loss -> clip -> Adam -> averages.

`step` numbers the global batches, `update` the optimiser's updates; they differ by the skipped non-finite steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.dataset import Batch, prefetch, random_flip
from ..diffusion.images import to_x_0
from ..diffusion.losses import training_loss
from ..diffusion.process import q_sample
from ..distributed import full_tensor, set_numerics, tell_deepspeed
from ..run_dir import RunDir, RunError
from ..signals import StopRequest
from . import builders, resume
from .checkpoint import list_checkpoints
from .config import TrainConfig
from .ema import make_averages
from .monitor import Meter, Unreadable
from .resume import RunState
from .rng import draw, seed_dropout
from .timestep_samplers import Timesteps


class Updates(RunState):
    """The objects of a run and its counters. `update()` makes one optimiser update and nothing else."""

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, run: RunDir, stop: StopRequest | None = None
    ) -> None:
        self.config, self.accelerator, self.run, self.stop = config, accelerator, run, stop
        self.found = resume.find(config, run, accelerator)
        self.course, self.left = (self.found.course, self.found.left) if self.found else (None, [])
        threads = self.found.state["numerics"]["num_threads"] if self.found else None
        self.numerics = set_numerics(config, accelerator, threads)
        arguments = builders.network_config(config)
        self.data = builders.build_data(config, arguments)
        network = builders.build_network(config, arguments, self.data)
        self.scheduler = builders.build_scheduler(config)
        self.tables = self.scheduler.tables.to(accelerator.device)
        self.dtype = torch.float64 if config.double else torch.float32
        # FSDP2 shards contiguous weights only.
        channels_last = config.channels_last and not accelerator.is_fsdp2
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        network.to(accelerator.device)
        (network.double() if config.double else network).to(memory_format=self.layout)  # pyright: ignore
        builders.speed_up(config, network)

        self.plan = resume.planned(config, self.found, accelerator.num_processes)
        accelerator.gradient_accumulation_steps = self.plan.accumulation
        tell_deepspeed(accelerator, self.plan.micro_batch, self.plan.accumulation, config.max_grad_norm)
        optimizer = builders.build_optimizer(config, network)
        self.unet, self.optimizer = accelerator.prepare(network, optimizer)
        self.network = accelerator.unwrap_model(self.unet)
        self.parameters = list(self.network.parameters())
        self.averages = make_averages(config, self.parameters)
        self.meter = Meter(accelerator.device, config.ddpm_num_steps)
        self.timesteps = Timesteps(config.timestep_sampler, config.ddpm_num_steps)
        self.unreadable = Unreadable()
        self.update_count = self.step = self.skipped = self.bad_in_a_row = 0

        self.updates = builders.total_updates(config, self.num_images, self.plan)
        self.lr_factor = builders.lr_factor(config, self.updates)
        if self.found:
            resume.restore(self, self.found)
        self.batches = self.read()

    # -- one update -------------------------------------------------------------------------------------------------

    def update(self) -> None:
        """One optimiser update on the next global batch; a non-finite one is skipped and counted."""
        mean = torch.zeros((), device=self.accelerator.device)  # loss of this process's pictures
        for micro in range(self.plan.accumulation):
            with self.accelerator.accumulate(self.unet):
                loss = self.loss(next(self.batches), micro)
                # A loss that overflowed may have finite gradients: make them nan, so that every process sees it.
                self.accelerator.backward(loss * (1 + 0 * loss.detach()))
                mean += loss.detach() / self.plan.accumulation
        self.timesteps.learn(self.accelerator)
        norm = self.clip()
        self.step += 1
        if math.isfinite(norm):
            self.apply()
        else:
            self.skip(mean)
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
        self.last_norm = full_tensor(norm)
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

    def skip(self, loss: Tensor) -> None:
        """Count a non-finite step, whose mean loss on this process is given; too many in a row end the run.

        Raises:
            RunError: `max_bad_steps` in a row.
        """
        if self.accelerator.scaler is not None:
            self.optimizer.step()  # fp16: the scaler skips the update itself and lowers its scale
        self.skipped += 1
        self.bad_in_a_row += 1
        if self.bad_in_a_row >= self.config.max_bad_steps:
            mean: Any = self.accelerator.reduce(loss, reduction="mean")  # over the processes
            last = next(reversed(list_checkpoints(self.run.checkpoints)), None)
            raise RunError(
                f"{self.bad_in_a_row} steps in a row had a non-finite loss or gradient, the last at step {self.step} "
                f"(update {self.update_count}, loss {float(mean)}, learning rate {self.learning_rate:.3g}). Last good "
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
