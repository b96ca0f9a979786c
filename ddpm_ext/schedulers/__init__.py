"""The diffusion process behind the signatures of Diffusers."""
