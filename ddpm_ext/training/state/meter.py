"""What has been seen since the last line of the log: losses, gradient norms, images that could not be read."""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ...diffusion.schedules import widest_float

__all__ = ["QUARTERS", "Meter", "Unreadable", "tell_unreadable"]

QUARTERS = 4


class Meter:
    """Sums of losses and gradient norms, kept on the device until they are asked for.

    Row 0 holds the losses' sum by quarter of t, row 1 their number (weighted sum and weights, where t is not drawn
    uniformly), row 2 the sum and number of gradient norms.
    """

    def __init__(self, device: torch.device, num_timesteps: int) -> None:
        self.sums = torch.zeros(3, QUARTERS, dtype=widest_float(device), device=device)
        self.num_timesteps = num_timesteps

    def add_losses(self, losses: Tensor, t: Tensor, weight: Tensor | None = None) -> None:
        """Losses of some images, their timesteps and weights or None, each (B,); non-finite ones are left out.

        Args:
            losses: Shape (B,).
            t: Timesteps, int64, shape (B,).
            weight: Shape (B,), or None.
        """
        quarter, finite = t * QUARTERS // self.num_timesteps, losses.isfinite()
        share = finite if weight is None else finite * weight
        self.sums[0].index_add_(0, quarter, torch.where(finite, losses.detach() * share, 0).to(self.sums.dtype))
        self.sums[1].index_add_(0, quarter, share.to(self.sums.dtype))

    def add_grad_norm(self, norm: Tensor, finite: Tensor | int = 1) -> None:
        """Add the norm of an update, shape (), 0 where `finite` is not 1, and then not counted."""
        self.sums[2, 0] += norm
        self.sums[2, 1] += finite

    def total(self, accelerator: Accelerator) -> Tensor:
        """Return the sums over all processes. Every process must call this."""
        return accelerator.reduce(self.sums.clone(), reduction="sum")  # pyright: ignore[reportReturnType]

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Means of loss, loss by quarter of t (the first has the least noise) and gradient norm; then from 0."""
        losses, counts, norms = self.total(accelerator).tolist()
        self.sums.zero_()
        record = {"loss": sum(losses) / max(sum(counts), 1)}
        for quarter, (loss, count) in enumerate(zip(losses, counts, strict=True), start=1):
            record[f"loss_q{quarter}"] = loss / count if count else float("nan")
        record["grad_norm"] = norms[0] / max(norms[1], 1)
        return {name: value for name, value in record.items() if value == value}  # no nan in JSON


class Unreadable:
    """Names of the images that no process could read so far, each once."""

    def __init__(self) -> None:
        self.names: dict[str, None] = {}
        self.heard = 0  # names of this process that the others know

    def learn(self, skipped: list[str], accelerator: Accelerator) -> list[str]:
        """Hear what all processes met since the last call; the names that are new. Every process must call this."""
        mine = skipped[self.heard :]
        self.heard += len(mine)
        met: list[str] = gather_object(mine) if accelerator.num_processes > 1 else mine
        new = [name for name in dict.fromkeys(met) if name not in self.names]
        self.names |= dict.fromkeys(new)
        return new


def tell_unreadable(unreadable: Unreadable, skipped: list[str], accelerator: Accelerator) -> None:
    """Name the images that could not be read since the last call. Every process must call this.

    Args:
        unreadable: What is known on every process.
        skipped: All that this process has met.
        accelerator: Knows the processes.
    """
    new = unreadable.learn(skipped, accelerator)
    if new and accelerator.is_main_process:
        some = "; ".join(new[:10]) + (" …" if len(new) > 10 else "")
        print(f"{len(new)} images cannot be read and are left out, others stand in: {some}", file=sys.stderr)
