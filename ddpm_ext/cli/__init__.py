"""The command `ddpm-ext` and its command lines."""

__all__: list[str] = []
