"""Denoising diffusion probabilistic models for Diffusers."""

__version__ = "0.1.0"
