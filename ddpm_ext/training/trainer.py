"""The objects of a training run, and one update of them.

An update: images and draws of (seed, step) -> x_t -> network -> loss -> clip -> Adam -> averages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from torch import Tensor, nn

from ..data.order import Batch, prefetch, random_flip
from ..diffusion.images import to_x_0
from ..diffusion.losses import training_loss
from ..diffusion.process import q_sample
from ..distributed import full_tensor, move
from ..models.classes import classes_of
from ..run_dir import RunDir, RunError
from .state.checkpoint import list_checkpoints
from .state.rng import draw, seed_dropout, uniforms

if TYPE_CHECKING:
    from ..data.spec import DataSpec
    from ..schedulers.ddpm import DDPMExtScheduler
    from .builders import Images
    from .config import TrainConfig
    from .fine_tune import Origin
    from .plan.batch import BatchPlan, Intervals
    from .state.outcomes import Outcomes
    from .state.resume import ResumePoint
    from .state.train_state import TrainState

__all__ = ["Trainer"]


@dataclass(eq=False)
class Trainer:
    """The objects of a training run, and one update of them; `make_trainer` builds it.

    Attributes:
        config: The options.
        accelerator: Knows the processes.
        run: The run folder, locked.
        resumed_from: The checkpoint that it resumes from, or None.
        origin: What config.json says of --init_from; None without it.
        numerics: What decides the last digits beside the options.
        plan: How the global batch is cut.
        intervals: After which updates something is due.
        data: The images; `spec` is their record.
        num_images: Images of one epoch; None for a stream.
        scheduler: The schedule, the prediction and the variance.
        network: The bare UNet2DModel; `unet` is the same in what the launcher wraps around it.
        compiled: Whether its passes are compiled.
        dtype: Of images and weights; `layout` is their memory format.
        state: What updates change.
        lr_factor: Learning rate after n updates, as a share of `learning_rate`.
        outcomes: Tells of an accelerator's steps without waiting for them; None where the host asks at once.
    """

    config: TrainConfig
    accelerator: Accelerator
    run: RunDir
    resumed_from: ResumePoint | None
    origin: Origin | None
    numerics: dict[str, object]
    plan: BatchPlan
    intervals: Intervals
    data: Images
    spec: DataSpec
    num_images: int | None
    scheduler: DDPMExtScheduler
    network: UNet2DModel
    unet: nn.Module
    compiled: bool
    dtype: torch.dtype
    layout: torch.memory_format
    state: TrainState
    lr_factor: Callable[[int], float]
    outcomes: Outcomes | None

    def __post_init__(self) -> None:
        self.parameters = list(self.network.parameters())
        self.tables = self.scheduler.tables.to(self.accelerator.device)
        self.loss_options = self.config.loss_options(self.spec.bits)
        self.batches = self._read()

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
            if self.intervals.anything_due(self.state.update + 1):
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

    # -- the loss ---------------------------------------------------------------------------------------------------

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
        x_0 = to_x_0(pixels, self.spec.bits).to(self.dtype, memory_format=self.layout)
        eps = draws.eps.to(self.dtype, memory_format=self.layout)
        t, weight = self.state.timesteps.choose(draws.t, config.seed, step, rows)
        x_t = q_sample(x_0, t, eps, self.tables)
        labels = self._labels(batch, rows)
        output = self.unet(x_t, t, class_labels=labels, return_dict=False)[0]
        losses = training_loss(output, x_0, x_t, eps, t, self.tables, self.loss_options)
        self.state.meter.add_losses(losses, t, weight)
        self.state.timesteps.see(t, losses)
        return losses.mean() if weight is None else (losses * weight).mean()

    def _labels(self, batch: Batch, rows: range) -> Tensor | None:
        """Return the classes of some rows as the network gets them: null labels for the share of `class_dropout`."""
        config = self.config
        if not config.class_conditional or batch.labels is None:
            return None
        labels, classes = batch.labels, classes_of(self.network.config)
        if config.class_dropout and classes is not None and classes.null_label is not None:
            dropped = uniforms("class", config.seed, self.state.step, rows) < config.class_dropout
            labels = labels.masked_fill(dropped.to(labels.device), classes.null_label)
        return move(labels, self.accelerator.device)

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

    # -- the step ---------------------------------------------------------------------------------------------------

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
            group["lr"] = self.learning_rate(self.state.update)
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
            mean = cast(Tensor, self.accelerator.reduce(self.last_loss, reduction="mean"))  # over the processes
            last = next(reversed(list_checkpoints(self.run.checkpoints)), None)
            raise RunError(
                f"{state.bad_in_a_row} steps in a row had a non-finite loss or gradient, the last at step {state.step} "
                f"(update {state.update}, loss {float(mean)}, learning rate {self.learning_rate(state.update):.3g}). "
                f"Last good checkpoint: {last or 'none'}. Lower --learning_rate, or train with --mixed_precision no."
            )

    def learning_rate(self, update: int) -> float:
        """Return the learning rate after so many updates."""
        return self.config.learning_rate * self.lr_factor(update)

    @property
    def position(self) -> int:
        """Global position of the next image."""
        return self.state.step * self.plan.global_batch
