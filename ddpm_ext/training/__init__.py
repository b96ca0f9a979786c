"""Training runs: options, presets, and the run itself."""

__all__: list[str] = []
