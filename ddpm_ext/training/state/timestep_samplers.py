"""Which t a training step takes, and how its loss is weighed: uniform, or in proportion to what t has cost lately.

Draws are a function of (seed, step, place in the global batch) and of the losses before: history is the same on every
process, and it is part of a checkpoint.
"""

from __future__ import annotations

from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor

from ...diffusion.losses import LossHistory, empty_history, loss_aware_probabilities, remember, weighted_timesteps
from ...diffusion.words import TimestepSampler
from ...distributed import move
from .rng import uniforms

__all__ = ["STEM", "Timesteps", "uniforms"]

STEM = "timesteps"  # of the file in a checkpoint


class Timesteps:
    """Chooses t for the images of a forward pass.

    Args:
        sampler: "uniform" or "loss_aware" (Nichol & Dhariwal 2021, arXiv:2102.09672, §3.3).
        num_timesteps: T.
    """

    def __init__(self, sampler: TimestepSampler, num_timesteps: int) -> None:
        self.history = empty_history(num_timesteps) if sampler == "loss_aware" else None
        self.seen: list[tuple[Tensor, Tensor]] = []

    def choose(self, uniform: Tensor, seed: int, step: int, rows: range) -> tuple[Tensor, Tensor | None]:
        """(t, weights of their losses or None) of some rows of one step's global batch.

        Args:
            uniform: t as drawn uniformly, int64, shape (B,), on the device where t is needed.
            seed: The run's seed.
            step: The batch's number in the run.
            rows: Places in the global batch.
        """
        if self.history is None:
            return uniform, None
        t, weight = weighted_timesteps(uniforms("timestep", seed, step, rows), loss_aware_probabilities(self.history))
        return move(t, uniform.device), move(weight.float(), uniform.device)

    def see(self, t: Tensor, losses: Tensor) -> None:
        """Note the losses, not weighted, of one forward pass of this process."""
        if self.history is not None:
            self.seen.append((t, losses.detach().float()))

    def learn(self, accelerator: Accelerator) -> None:
        """Remember what all processes saw since the last call. Every process must call this."""
        if self.history is not None:
            t, losses = (torch.cat(parts) for parts in zip(*self.seen, strict=True))
            gathered = cast(tuple[Tensor, Tensor], accelerator.gather((t, losses)))  # in the order of the global batch
            self.history, self.seen = remember(self.history, *(part.cpu() for part in gathered)), []

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of a checkpoint by file; none where t is uniform."""
        return {} if self.history is None else {STEM: self.history._asdict()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on from the tensors of a checkpoint's file."""
        self.history = LossHistory(**tensors)
