"""The diffusion process behind Diffusers' scheduler signatures."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .ddpm import DDPMExtScheduler
    from .solver import DDPMExtSolverScheduler

__all__ = ["DDPMExtScheduler", "DDPMExtSolverScheduler"]

__getattr__, __dir__ = lazy_names(__name__, {"ddpm": ("DDPMExtScheduler",), "solver": ("DDPMExtSolverScheduler",)})
