"""The mathematics of DDPM: tensors in, tensors out; torch and numpy only."""

__all__: list[str] = []
