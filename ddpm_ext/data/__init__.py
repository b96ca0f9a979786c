"""Images as they are: files, archives, data sets of the Hub -> levels (C, H, W)."""

__all__: list[str] = []
