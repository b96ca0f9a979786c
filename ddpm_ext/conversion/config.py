"""Options of a conversion, checked when they are built, and its errors."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from ..errors import UserError
from ..options import option, required

__all__ = ["AVERAGE", "ConvertError", "ConvertOptions", "Source"]

Source = Literal["pytorch-ddpm", "improved-diffusion", "diffusers"]
AVERAGE = "ema_model"
# What a checkpoint of each source leaves open; the other options would have no effect.
OPEN: dict[str, tuple[str, ...]] = {
    "pytorch-ddpm": ("resolution", "weights"),
    "improved-diffusion": ("resolution", "num_heads", "noise_schedule", "num_timesteps", "rescale_timesteps"),
    "diffusers": ("token",),
}


class ConvertError(UserError):
    """A checkpoint cannot be converted; the message says which tensor or option is in the way."""


@dataclass(frozen=True)
class ConvertOptions:
    """What is converted, and what its checkpoint does not tell."""

    source: Source = required("The code that wrote the checkpoint.")
    checkpoint: str = required("Its file; for diffusers a pipeline's folder or Hub name.")
    output_dir: str = required("Folder of the new pipeline, not the checkpoint's own.")
    resolution: int = option(32, "Height and width of the pictures.")
    weights: str = option(AVERAGE, "pytorch-ddpm: ema_model, the average, or net_model.")
    num_heads: int = option(4, "improved-diffusion: attention heads.")
    noise_schedule: Literal["cosine", "linear"] = option("cosine", "improved-diffusion.")
    num_timesteps: int = option(4000, "improved-diffusion: T, its diffusion_steps.")
    rescale_timesteps: bool = option(True, "improved-diffusion: the network sees 1000 t / T.")
    token: str | None = option(None, "diffusers: token for a private repository.")

    def __post_init__(self) -> None:
        for name, words in (("source", get_args(Source)), ("noise_schedule", ("cosine", "linear"))):
            if getattr(self, name) not in words:
                raise ConvertError(f"{name} must be one of {', '.join(words)}, got {getattr(self, name)!r}.")
        for name in ("resolution", "num_heads", "num_timesteps"):
            if getattr(self, name) < 1:
                raise ConvertError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for field in fields(self)[3:]:  # behind the three that every source needs
            if field.name not in OPEN[self.source] and getattr(self, field.name) != field.default:
                users = " and ".join(source for source, names in OPEN.items() if field.name in names)
                raise ConvertError(
                    f"--{field.name} has an effect only with --source {users}, and source is {self.source!r}: leave "
                    "it out."
                )
