"""The diffusion process behind Diffusers' scheduler signatures."""

__all__: list[str] = []
