"""Cards and uploads of runs."""

__all__: list[str] = []
