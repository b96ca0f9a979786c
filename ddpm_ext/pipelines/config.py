"""Options of sampling to a folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from ..errors import UserError
from ..models.values import check_bands
from ..options import check_options, option, required
from ..run_dir import JsonRecord

__all__ = ["GuidanceConfig", "GuidanceOptions", "SampleConfig", "guidance_conditions"]


class GuidanceOptions(TypedDict, total=False):
    """What a caller of the pipeline may ask for.

    Attributes:
        guidance_scale: w >= 0; 0, the default, is no guidance.
        guidance_interval: (low, high): guide at low <= t <= high only.
        guidance_rescale: φ in [0, 1]: how far ε̃ is brought back to the deviation of the conditional ε̂.
        guider: One of `diffusers.guiders` that mixes two predictions, in place of these three.
    """

    guidance_scale: float
    guidance_interval: tuple[int, int] | None
    guidance_rescale: float
    guider: Any


def guidance_conditions(guidance: GuidanceOptions | None) -> JsonRecord:
    """Return the guidance of a score, a fit or a measurement as it is recorded: what is in effect, {} for none."""
    return {name: value for name, value in (guidance or {}).items() if value}


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """Class guidance of what is drawn."""

    guidance_scale: float = option(
        0.0, "w of class guidance, (1 + w) with the class - w without; 0: none. Diffusers' usual number is 1 + w."
    )
    guidance_interval: list[int] | None = option(None, "Guide at these steps only: lowest and highest t.")
    guidance_rescale: float = option(0.0, "How far, 0 to 1, guided predictions get the deviation of the others.")

    @property
    def guidance(self) -> GuidanceOptions | None:
        """The guidance asked for, as the pipeline takes it; None for none."""
        interval: Any = self.guidance_interval
        asked: GuidanceOptions = {
            "guidance_scale": self.guidance_scale,
            "guidance_interval": interval,
            "guidance_rescale": self.guidance_rescale,
        }
        return asked if any(asked.values()) else None


@dataclass(frozen=True, kw_only=True)
class SampleConfig(GuidanceConfig):
    """Options of `ddpm-ext sample`."""

    model: str = required("Folder or Hub name of a pipeline.")
    output_dir: str = option("samples", "Folder for 000000.png ... and grid.png.")
    num_samples: int = option(64, "Number of images.", at_least=1)
    batch_size: int = option(64, "Images of one process at a time.", at_least=1)
    seed: int = option(0, "Image i is drawn from torch.Generator().manual_seed(seed + i).", below=2**62)
    num_inference_steps: int | None = option(None, "Denoising steps; none: all T of the model.", at_least=1)
    class_label: str | None = option(None, "Class of all images, by name or number, for conditional networks.")
    bits: int | None = option(None, "Depth of the files, 8 or 16 (PNG; arrays as .npy); none: the network's images'.")
    rgb_bands: list[int] | None = option(
        None, "Three bands, counted from 1, that previews and grids show; none: all of up to four, else the first."
    )
    file_format: Literal["png", "tiff"] = option(
        "png", "Of the images: png, .npy beside a preview above four channels; or tiff, of any number of them."
    )
    dtype: Literal["float32", "float16", "bfloat16"] = option("float32", "Of the weights.")
    cpu: bool = option(False, "Use the CPU even where there is an accelerator.")

    def __post_init__(self) -> None:
        check_options(self)
        if self.bits not in (None, 8, 16):
            raise UserError(f"bits must be 8 or 16, got {self.bits}.")
        check_bands(self.rgb_bands)
