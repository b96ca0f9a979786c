"""The mathematics of DDPM: tensors in, tensors out; torch and numpy only."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .images import to_uint8, to_x_0
    from .losses import training_loss
    from .process import predict_x_0, q_posterior, q_sample, training_target
    from .reverse import p_mean_variance
    from .schedules import Tables, make_tables
    from .textbook import DenoiseDiffusion

__all__ = [
    "DenoiseDiffusion",
    "Tables",
    "make_tables",
    "p_mean_variance",
    "predict_x_0",
    "q_posterior",
    "q_sample",
    "to_uint8",
    "to_x_0",
    "training_loss",
    "training_target",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "images": (
            "to_uint8",
            "to_x_0",
        ),
        "losses": ("training_loss",),
        "process": (
            "predict_x_0",
            "q_posterior",
            "q_sample",
            "training_target",
        ),
        "reverse": ("p_mean_variance",),
        "schedules": (
            "Tables",
            "make_tables",
        ),
        "textbook": ("DenoiseDiffusion",),
    },
)
