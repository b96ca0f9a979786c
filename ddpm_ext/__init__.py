"""Denoising diffusion probabilistic models (Ho et al. 2020) for Diffusers, complete and exact."""

__version__ = "0.1.0"

from .diffusion.textbook import DenoiseDiffusion
from .evaluation.bits_per_dim import BitsPerDim, RateDistortion, bits_per_dim, rate_distortion
from .hub.upload import push_to_hub
from .pipelines.ddpm import DDPMExtPipeline
from .schedulers.ddpm import DDPMExtScheduler

__all__ = [
    "BitsPerDim",
    "DDPMExtPipeline",
    "DDPMExtScheduler",
    "DenoiseDiffusion",
    "RateDistortion",
    "__version__",
    "bits_per_dim",
    "push_to_hub",
    "rate_distortion",
]
