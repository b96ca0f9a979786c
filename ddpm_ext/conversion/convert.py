"""Published checkpoints of other codes -> portable UNet2DModel pipelines.

Both codes build the network of Ho et al. 2020, block by block in the same order as UNet2DModel, under other names and
with other conventions for the time embedding and the attention. A checkpoint tells the network's shape; what it cannot
tell (heads, schedule, picture size) is an option.
"""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from ..pipelines.ddpm import DDPMExtPipeline
from ..pipelines.loading import load_pipeline
from ..schedulers.ddpm import DDPMExtScheduler
from .config import AVERAGE, ConvertError, ConvertOptions
from .state_dict_maps import CODES, Code, Place, Shape, all_places, find, measure


def convert(options: ConvertOptions) -> Path:
    """Write the pipeline; its folder.

    A folder is not converted in place: the former files would stay beside the new ones, a pickle of the weights beside
    the safetensors, and a failure half-way would leave neither pipeline.

    Raises:
        ConvertError: the file is no such checkpoint; names the first tensor that does not fit. Or the output folder
            cannot be one.
        HubError: the pull of a pipeline failed.
    """
    target = Path(options.output_dir)
    check_target(target, options.checkpoint)
    if options.source == "diffusers":
        pipeline = load_pipeline(options.checkpoint, options.token)
    else:
        pipeline = convert_weights(read_weights(options.checkpoint, options.weights), options)
    pipeline.save_pretrained(target)
    return target


def check_target(target: Path, checkpoint: str) -> None:
    """Raise ConvertError where no folder can be made, or where it is the checkpoint's own."""
    there = next(path for path in (target, *target.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConvertError(f"output_dir must be a folder, got {target}, and {there} is a file. Give another name.")
    if there == target and os.path.exists(checkpoint) and target.samefile(checkpoint):
        raise ConvertError(
            f"output_dir must be another folder than the checkpoint, got {target} for both: the former weights would "
            "stay beside the new ones. Convert into a new folder, then remove the former one."
        )


def convert_weights(weights: Mapping[str, Tensor], options: ConvertOptions) -> DDPMExtPipeline:
    """A pipeline of the weights of another code.

    Args:
        weights: Its state dict.
        options: `source` and what the weights do not tell.
    """
    code = CODES[options.source]
    shape, table = measure(weights, code), f"{code.time}.0.weight"
    T = find(weights, table, ("T", "width"), code).shape[0] if code.has_table else options.num_timesteps
    unet = UNet2DModel(**unet_arguments(shape, code, options, T))
    places = {place.target: place for place in all_places(shape, code, options.num_heads)}
    fill(unet, weights, places, code)
    if code.has_table and weights[table].shape[1] != shape.widths[0]:
        raise ConvertError(
            f"{table!r} of the checkpoint has the shape {tuple(weights[table].shape)}, which does not fit the "
            f"network's time embedding {(T, shape.widths[0])}."
        )
    return DDPMExtPipeline(unet.eval(), make_scheduler(shape, code, options, T))


# Reading --------------------------------------------------------------------------------------------------------------


def read_weights(path: str | os.PathLike[str], which: str = AVERAGE) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, which is read as data alone: no code in it runs.

    Args:
        path: The file.
        which: The entry that holds the weights, where there are several.

    Raises:
        ConvertError: there is no such file, it is no checkpoint, or it has no such entry.
    """
    if not Path(path).is_file():
        found = "a folder" if Path(path).is_dir() else "nothing"
        raise ConvertError(f"checkpoint must be a file of another code, and there is {found} at {path}. Name the file.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ConvertError(
            f"{path} is no checkpoint that can be read as data alone, and others are not opened, since they can run "
            f"code: {str(error).splitlines()[0]}"
        ) from error
    if isinstance(content, Mapping) and not all(isinstance(value, Tensor) for value in content.values()):
        holding = [name for name, value in content.items() if isinstance(value, Mapping) and _is_state(value)]
        if which not in holding:
            raise ConvertError(f"{path} has no weights {which!r}; it has {', '.join(holding) or 'none'} (--weights).")
        content = content[which]
    elif which != AVERAGE:
        raise ConvertError(f"{path} holds one set of weights under no name, got --weights {which}: leave it out.")
    if not isinstance(content, Mapping) or not content:
        raise ConvertError(f"{path} holds no weights, but a {type(content).__name__}.")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def _is_state(value: Mapping[Any, Any]) -> bool:
    return bool(value) and all(isinstance(weight, Tensor) for weight in value.values())


def unet_arguments(shape: Shape, code: Code, options: ConvertOptions, T: int) -> dict[str, Any]:
    """Arguments of the UNet2DModel that computes the same."""
    levels = range(len(shape.widths))
    arguments: dict[str, Any] = {
        "sample_size": options.resolution,
        "in_channels": shape.in_channels,
        "out_channels": shape.out_channels,
        "block_out_channels": shape.widths,
        "layers_per_block": shape.layers,
        "down_block_types": tuple("AttnDownBlock2D" if i in shape.attention else "DownBlock2D" for i in levels),
        "up_block_types": tuple("AttnUpBlock2D" if i in shape.attention else "UpBlock2D" for i in reversed(levels)),
        "freq_shift": 0,
        "flip_sin_to_cos": not code.has_table,
        "downsample_padding": 1,
        "norm_eps": 1e-5,
        "attention_head_dim": None if code.has_table else head_dim(shape, options.num_heads),
        "num_class_embeds": shape.classes,
    }
    if shape.scale_shift:  # without attn_norm_num_groups Diffusers would drop the norm of the middle attention
        arguments |= {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32}
    if is_rescaled(code, options, T):  # UNet2DModel takes whole t only, so 1000 t / T is looked up
        arguments |= {"time_embedding_type": "learned", "num_train_timesteps": T}
    return arguments


def head_dim(shape: Shape, num_heads: int) -> int:
    """Channels of a head, which UNet2DModel has alike on every level."""
    widths = {shape.widths[level] for level in shape.attention} | {shape.widths[-1]}
    if len(widths) != 1 or (width := widths.pop()) % num_heads:
        raise ConvertError(
            f"A UNet2DModel has heads of the same width on every level; {num_heads} heads over "
            f"{sorted({shape.widths[level] for level in shape.attention} | {shape.widths[-1]})} channels are not. "
            "Give the right --num_heads; a network of several attention widths cannot be expressed."
        )
    return width // num_heads


def is_rescaled(code: Code, options: ConvertOptions, T: int) -> bool:
    """Whether the code feeds its time embedding 1000 t / T in place of t."""
    return not code.has_table and options.rescale_timesteps and T != 1000


def make_scheduler(shape: Shape, code: Code, options: ConvertOptions, T: int) -> DDPMExtScheduler:
    """The process with which the code samples."""
    if code.has_table:  # it computes the clipped x_0 after the mean that it uses, so it samples without clipping
        return DDPMExtScheduler(num_train_timesteps=T, variance_type="fixed_large", clip_sample=False)
    learned = shape.out_channels == 2 * shape.in_channels
    variance = "learned_range" if learned else "fixed_large"
    if options.noise_schedule == "cosine":
        return DDPMExtScheduler(num_train_timesteps=T, variance_type=variance, beta_schedule="squaredcos_cap_v2")
    # Betas in proportion to 1 / T, so that ᾱ_T is the same for every T.
    ends: dict[str, Any] = {"beta_start": 1e-4 * 1000 / T, "beta_end": 0.02 * 1000 / T}
    return DDPMExtScheduler(num_train_timesteps=T, variance_type=variance, **ends)


def fill(unet: UNet2DModel, weights: Mapping[str, Tensor], places: Mapping[str, Place], code: Code) -> None:
    """Copy every weight to its place.

    Raises:
        ConvertError: a tensor is missing, of another shape, or left over; the first one is named.
    """
    state, used = unet.state_dict(), set()
    for target, own in state.items():
        if target == "time_proj.weight":  # the table of 1000 t / T
            state[target] = sinusoids(own.shape[0], own.shape[1])
            continue
        place = places[target]
        if place.source not in weights:
            raise ConvertError(
                f"The network's {target} {tuple(own.shape)} would come from {place.source!r}, which the checkpoint "
                f"does not have: its architecture is not one that {code.name} and UNet2DModel share."
            )
        theirs = weights[place.source]
        try:
            taken = place.change(theirs)
        except (IndexError, RuntimeError):  # of too few dimensions or numbers to be rearranged
            taken = None
        if taken is None or taken.shape != own.shape:
            raise ConvertError(
                f"{place.source!r} of the checkpoint has the shape {tuple(theirs.shape)}, which does not fit the "
                f"network's {target} {tuple(own.shape)}."
            )
        state[target] = taken.to(own.dtype)
        used.add(place.source)
    table = {f"{code.time}.0.weight"} if code.has_table else set()
    left = [name for name in weights if name not in used | table and not re.search(r"num_batches_tracked$", name)]
    if left:
        raise ConvertError(
            f"{left[0]!r} of the checkpoint, shape {tuple(weights[left[0]].shape)}, has no place in the network: its "
            f"architecture is not one that {code.name} and UNet2DModel share."
        )
    unet.load_state_dict(state)


def sinusoids(T: int, width: int) -> Tensor:
    """The time embedding of improved-diffusion at the rescaled steps: (T, width).

    e(t) = (cos(τ ω_i), sin(τ ω_i)),   τ = 1000 t / T,   ω_i = exp(-ln(1e4) i / (width / 2)),   0 <= t < T
    """
    half = width // 2
    omega = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    tau = torch.arange(T, dtype=torch.float32) * (1000 / T)
    phase = tau[:, None] * omega
    return torch.cat([phase.cos(), phase.sin()], dim=1)
