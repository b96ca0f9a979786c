"""Whether a step was finite, learned from the device without waiting for the step itself.

The device skips a non-finite update by itself: fused AdamW reads `found_inf` where it would step. The host learns of it
one step later, when a whole forward and backward pass is queued behind the answer, so the device never runs dry; only
then the averages and counters move on. Every number is that of asking at once.
"""

from __future__ import annotations

import time

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...distributed import HOST_MEMORY

__all__ = ["Outcomes", "can_skip_on_device"]


def can_skip_on_device(accelerator: Accelerator, optimizer: torch.optim.Optimizer, fused: bool) -> bool:
    """Return whether the optimiser can skip a step without the host.

    On a CPU the host loses nothing by asking; the scaler of fp16, DeepSpeed and sharded weights decide for themselves.

    Args:
        accelerator: Knows device and scaler.
        optimizer: The prepared optimiser.
        fused: Whether it is PyTorch's fused one.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return (
        fused
        and accelerator.device.type not in HOST_MEMORY
        and accelerator.scaler is None
        and accelerator.state.deepspeed_plugin is None
        and not any(isinstance(weight, DTensor) for weight in weights)
        and all(isinstance(weight, nn.Parameter) for weight in weights)
    )


class Outcomes:
    """The finiteness of the step queued last, on its way to the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_host = torch.zeros((), dtype=torch.bool, pin_memory=True)
        self._arrived: torch.Event | None = None

    def send(self, finite: Tensor) -> None:
        """Queue the copy of a bool, shape (), to the host."""
        self._on_host.copy_(finite, non_blocking=True)
        self._arrived = torch.Event(self.device)
        self._arrived.record()

    def receive(self) -> bool | None:
        """Return the bool sent last once it is there; None where none is under way."""
        if self._arrived is None:
            return None
        while not self._arrived.query():
            time.sleep(2e-5)
        self._arrived = None
        return bool(self._on_host)
