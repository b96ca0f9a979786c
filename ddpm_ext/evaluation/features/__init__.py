"""Features of images, and the scores of generated images that they give."""

__all__: list[str] = []
