"""Denoising diffusion probabilistic models (Ho et al. 2020) for Diffusers, complete and exact."""

__version__ = "0.1.0"

from .bound import BitsPerDim, RateDistortion, bits_per_dim, rate_distortion
from .denoise_diffusion import DenoiseDiffusion
from .hub import push_to_hub
from .pipeline import DDPMExtPipeline
from .scheduler import DDPMExtScheduler

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
