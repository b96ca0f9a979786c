"""Images as they are: files, archives, data sets of the Hub -> levels (C, H, W)."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .dataset import ImageSet, load_images
    from .spec import DataSpec
    from .streaming import ImageStream, stream_images

__all__ = ["DataSpec", "ImageSet", "ImageStream", "load_images", "stream_images"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "dataset": (
            "ImageSet",
            "load_images",
        ),
        "spec": ("DataSpec",),
        "streaming": (
            "ImageStream",
            "stream_images",
        ),
    },
)
