"""Noise -> images: the pipeline, how models are found and loaded, N images from N seeds."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .config import SampleConfig
    from .ddpm import DDPMExtPipeline, load_pipeline
    from .locate import find_pipeline
    from .sampling import sample_to_folder
    from .seeds import sample_images

__all__ = ["DDPMExtPipeline", "SampleConfig", "find_pipeline", "load_pipeline", "sample_images", "sample_to_folder"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "config": ("SampleConfig",),
        "ddpm": (
            "DDPMExtPipeline",
            "load_pipeline",
        ),
        "locate": ("find_pipeline",),
        "sampling": ("sample_to_folder",),
        "seeds": ("sample_images",),
    },
)
