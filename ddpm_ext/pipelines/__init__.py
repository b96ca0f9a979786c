"""Noise -> images: the pipeline, how models are found and loaded, N images from N seeds."""

__all__: list[str] = []
