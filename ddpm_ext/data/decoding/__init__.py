"""One encoded image: the bytes of its file -> the samples that are stored -> levels (C, H, W)."""

__all__: list[str] = []
