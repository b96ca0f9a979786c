"""Which code wrote a checkpoint, by the names of its tensors: one of ours, or a known one that is none of these."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from .config import ConvertError
from .state_dict_maps import LAYOUTS, Layout

__all__ = ["recognise", "refuse_others"]

Weights = Mapping[str, Tensor]


def recognise(weights: Weights) -> str:
    """Return the source whose names a checkpoint has.

    Raises:
        ConvertError: it has those of none.
    """
    refuse_others(weights)
    found = [name for name, layout in LAYOUTS.items() if all(f"{own}.weight" in weights for own in _signs(layout))]
    if not found:
        raise ConvertError(
            f"The checkpoint is of none of {', '.join(LAYOUTS)}: its first tensor is {next(iter(weights), None)!r}. "
            "Give --source where you know better."
        )
    resamples = any(re.match(r"output_blocks\.\d+\.[12]\.in_layers\.", name) for name in weights)
    return found[0] if resamples else found[-1]


# Networks that are none of ours: beginnings of names that they alone have, and what they are.
_OTHERS: dict[tuple[str, ...], str] = {
    ("init_conv.", "final_conv.", "time_mlp."): "lucidrains/denoising-diffusion-pytorch, whose U-Net a UNet2DModel "
    "cannot express: its attention is linear on all levels but the last, and its first convolution 7 x 7",
    ("first_stage_model.",): "a latent diffusion model: its network draws what a decoder turns into images",
    ("all_modules.",): "yang-song/score_sde, whose layers have numbers for names: it is not among those converted",
    ("x_embedder.", "blocks.0.attn."): "a diffusion transformer, not a U-Net",
    ("time_embedding.linear_1.", "down_blocks.", "up_blocks."): "Diffusers: give --source diffusers and the folder of "
    "the pipeline, whose config.json says what its weights do not",
}


def refuse_others(weights: Weights) -> None:
    """Raise ConvertError for the weights of a known network that is none of these, by its name and with the reason."""
    for signs, words in _OTHERS.items():
        if all(any(name.startswith(sign) for name in weights) for sign in signs):
            raise ConvertError(f"The checkpoint is of {words}.")
    down, up = (any(name.startswith(f"{way}_blocks.") for name in weights) for way in ("input", "output"))
    if down and not up:
        raise ConvertError(
            "The checkpoint is of guided-diffusion's classifier (EncoderUNetModel), which has no way up: it tells the "
            "class of a noised image and draws none."
        )


def _signs(layout: Layout) -> tuple[str, ...]:
    return (layout.conv_in, layout.conv_out, *layout.time)
