"""The papers' networks as UNet2DModel."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .unet import UNET_PRESETS, build_unet, unet_config

__all__ = ["UNET_PRESETS", "build_unet", "unet_config"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "unet": (
            "UNET_PRESETS",
            "build_unet",
            "unet_config",
        )
    },
)
