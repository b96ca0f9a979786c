"""What a run is at one update, and how it comes back from its files."""

__all__: list[str] = []
