"""Denoising diffusion probabilistic models (Ho et al. 2020) for Diffusers, complete and exact."""

__version__ = "0.1.0"

from .denoise_diffusion import DenoiseDiffusion
from .hub import push_to_hub
from .pipeline import DDPMExtPipeline
from .scheduler import DDPMExtScheduler

__all__ = ["DDPMExtPipeline", "DDPMExtScheduler", "DenoiseDiffusion", "__version__", "push_to_hub"]
