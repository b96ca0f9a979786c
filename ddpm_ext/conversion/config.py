"""Options of a conversion, checked when they are built, and its errors."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from ..errors import UserError
from ..options import check_options, option, required

__all__ = ["ConvertError", "ConvertOptions", "Source", "codes", "unanswered"]

Source = Literal["auto", "guided-diffusion", "improved-diffusion", "pytorch-ddpm", "ddim", "diffusers"]
_OPENAI = ("guided-diffusion", "improved-diffusion")
_CODES = (*_OPENAI, "pytorch-ddpm", "ddim")
# Option -> the sources whose checkpoints leave it open; elsewhere it would have no effect.
_OPEN: dict[str, tuple[str, ...]] = {
    "resolution": _CODES,
    "image_channels": _CODES,
    "prediction_type": _CODES,
    "variance_type": _CODES,
    "noise_schedule": _CODES,
    "beta_start": ("pytorch-ddpm", "ddim"),
    "beta_end": ("pytorch-ddpm", "ddim"),
    "num_timesteps": (*_OPENAI, "ddim"),
    "rescale_timesteps": _OPENAI,
    "num_heads": _OPENAI,
    "num_head_channels": _OPENAI,
    "attention_order": _OPENAI,
    "null_label": _OPENAI,
    "weights": _CODES,
    "license": (*_CODES, "diffusers"),
    "token": ("diffusers",),
}
# What each code's own scripts take where a command line says nothing: shown beside the question, never assumed.
_USUAL: dict[str, str] = {
    "guided-diffusion": "--resolution 64 --prediction_type epsilon --variance_type fixed_large --noise_schedule linear "
    "--num_timesteps 1000 --rescale_timesteps false --num_heads 4 --attention_order legacy --null_label none",
    "improved-diffusion": "--resolution 64 --prediction_type epsilon --variance_type fixed_large --noise_schedule "
    "linear --num_timesteps 1000 --rescale_timesteps true --num_heads 4 --attention_order legacy --null_label none",
    "pytorch-ddpm": "--resolution 32 --prediction_type epsilon --variance_type fixed_large --noise_schedule linear",
    "ddim": "--resolution 32 --prediction_type epsilon --variance_type fixed_large --noise_schedule linear "
    "--num_timesteps 1000",
}


class ConvertError(UserError):
    """A checkpoint cannot be converted; the message says which tensor or option is in the way."""


@dataclass(frozen=True)
class ConvertOptions:
    """What is converted, and what its checkpoint does not tell: that is asked for, never guessed."""

    source: Source = required("The code that wrote the checkpoint; auto: seen by the names of its tensors.")
    checkpoint: str = required("Its file; for diffusers a pipeline's folder or Hub name.")
    output_dir: str = required("Folder of the new pipeline, not the checkpoint's own.")
    resolution: int | None = option(None, "Height and width of the images.", at_least=1)
    image_channels: int | None = option(None, "Channels of the images, where they are neither 1, 3 nor 4.", at_least=1)
    prediction_type: Literal["epsilon", "sample", "posterior_mean"] | None = option(
        None, "What the network predicts: the noise, x_0 (predict_xstart, xstart), or the mean of x_t-1 (xprev)."
    )
    variance_type: Literal["fixed_small", "fixed_large", "learned", "learned_range"] | None = option(
        None, "Reverse variance: fixed_small (sigma_small, fixedsmall) or fixed_large; learned ones show in the file."
    )
    noise_schedule: Literal["linear", "cosine", "quad", "sigmoid"] | None = option(None, "Schedule of the betas.")
    beta_start: float | None = option(None, "pytorch-ddpm, ddim: beta of the first step; none: 1e-4.", above=0, below=1)
    beta_end: float | None = option(None, "pytorch-ddpm, ddim: beta of the last step; none: 0.02.", above=0, below=1)
    num_timesteps: int | None = option(None, "T: diffusion_steps, num_diffusion_timesteps.", at_least=1)
    rescale_timesteps: bool | None = option(None, "The network sees 1000 t / T; asked for where T is not 1000.")
    num_heads: int | None = option(
        None,
        "Attention heads of every level, down and up alike: a network with another num_heads_upsample cannot be "
        "converted, and its file does not tell; or give --num_head_channels.",
        at_least=1,
    )
    num_head_channels: int | None = option(
        None, "Channels of an attention head, which sets its number by level.", at_least=1
    )
    attention_order: Literal["legacy", "new"] | None = option(
        None,
        "Rows of qkv: legacy [head][q,k,v], new (use_new_attention_order) [q,k,v][head]. Names and shapes are the same "
        "and the network another, so it is asked for where there is more than one head.",
    )
    null_label: Literal["none", "last"] | None = option(
        None,
        "Whether the last row of the class embedding stands for no class, as in networks trained for guidance; asked "
        "for where there are classes.",
    )
    weights: str | None = option(None, "The entry of the file that is taken, as ema_model, where there are several.")
    license: str | None = option(
        None, "Licence of the weights, for the card, by the Hub's name; none: that of a Hub pipeline's card."
    )
    token: str | None = option(None, "diffusers: token for a private repository.")

    def __post_init__(self) -> None:
        check_options(self, ConvertError)
        if self.num_heads is not None and self.num_head_channels is not None:
            raise ConvertError("--num_heads and --num_head_channels say the same in two ways: give one of them.")
        self.check_source(self.source)

    def check_source(self, source: str) -> None:
        """Raise ConvertError for an option that has no effect with a source; "auto" takes all options."""
        for field in fields(self)[3:]:  # behind the three that every source needs
            users = _OPEN[field.name]
            if getattr(self, field.name) is not None and source not in (*users, "auto"):
                raise ConvertError(
                    f"--{field.name} has an effect only with --source {' and '.join(users)}, and source is {source!r}: "
                    "leave it out."
                )


def codes() -> tuple[str, ...]:
    """Return the sources that are files of other codes."""
    return _CODES


def unanswered(names: list[str], source: str) -> ConvertError:
    """Return the error that asks for what a checkpoint does not tell."""
    asked = ", ".join(f"--{name}" for name in names)
    return ConvertError(
        f"The checkpoint does not tell {asked}: give {'it' if len(names) == 1 else 'each'} as the network was trained. "
        f"Where a command line said nothing, {source} took: {_USUAL[source]}."
    )
