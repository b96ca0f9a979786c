"""What every scheduler of Diffusers offers, ours among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

__all__ = ["Scheduler"]


class Scheduler(Protocol):
    """A scheduler that a pipeline can sample with."""

    timesteps: Tensor

    @property
    def config(self) -> dict[str, Any]:
        """Its options by name."""
        ...

    @property
    def set_timesteps(self) -> Callable[..., None]:
        """Choose the steps of one chain, by their number."""
        ...
