"""Checkpoints of other codes -> portable UNet2DModel pipelines with a card.

The codes build the network of Ho et al. 2020, block by block in the same order as UNet2DModel, under other names and
with other conventions for the time embedding and the attention. A checkpoint tells the network's shape; what it cannot
tell (heads, what is predicted, schedule, image size) is an option that is asked for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from diffusers import UNet2DModel
from torch import Tensor

from ..diffusion.words import Arguments
from ..hub.pipeline_files import PICKLES
from ..models.classes import class_options
from ..models.unet import check_resolution
from ..models.values import image_size
from ..pipelines.ddpm import DDPMExtPipeline, load_pipeline
from ..pipelines.locate import is_hub_name
from ..pipelines.saving import replacing
from ..schedulers.ddpm import DDPMExtScheduler
from .checkpoints import SCHEDULE, read_weights
from .config import ConvertError, ConvertOptions, unanswered
from .converted_card import converted_card
from .recognise import recognise, refuse_others
from .state_dict_maps import LAYOUTS, Layout, Place, Shape, all_places, find, left_over, measure

__all__ = ["convert", "convert_weights"]

_IMAGE_CHANNELS = (1, 3, 4)  # others are asked about
_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2", "quad": "scaled_linear", "sigmoid": "sigmoid"}


class _Settings(NamedTuple):
    """What the file and the options say together."""

    resolution: int
    T: int
    prediction_type: str
    variance_type: str
    is_rescaled: bool  # whether the network is given 1000 t / T in place of t
    head_channels: int | None  # None: one head of all channels
    order: Literal["legacy", "new"]


def convert(options: ConvertOptions) -> Path:
    """Write the pipeline and its card; return its folder.

    A folder is not converted in place: the former files would stay beside the new ones, a pickle of the weights beside
    the safetensors, and a failure half-way would leave neither pipeline.

    Raises:
        ConvertError: the file is no such checkpoint, names the first tensor that does not fit; an option is missing
            that it does not tell; or the output folder cannot be one.
        HubError: the pull of a pipeline failed.
    """
    target = Path(options.output_dir)
    _check_target(target, options.checkpoint)
    source, path = options.source, Path(options.checkpoint)
    is_file = path.is_file() or path.suffix in (*PICKLES, ".safetensors")
    if source == "auto" and not is_file and (path.is_dir() or is_hub_name(options.checkpoint)):
        source = "diffusers"
    if source == "diffusers":
        options.check_source(source)
        pipeline, precision = load_pipeline(options.checkpoint, options.token), None
        _check_pipeline(pipeline, options.checkpoint)
    else:
        weights = read_weights(options.checkpoint, options.weights)
        precision = _precision(weights)
        source = recognise(weights) if source == "auto" else source
        options = replace(options, source=source)
        pipeline = convert_weights(weights, options)
    card = converted_card(target, pipeline, replace(options, source=source), precision)
    with replacing(target) as folder:
        pipeline.save_pretrained(folder)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
    return target


def _check_pipeline(pipeline: DDPMExtPipeline, checkpoint: str) -> None:
    """Raise ConvertError for a pipeline of another process than DDPM's, or with other labels than class numbers."""
    scheduler = pipeline.scheduler.config
    betas = scheduler.keys() & {"beta_start", "beta_schedule", "trained_betas"}
    predicts = scheduler.get("prediction_type")
    if not betas or predicts in (None, "flow_prediction"):
        raise ConvertError(
            f"checkpoint must be a pipeline of a process with betas, as DDPM, DDIM or PNDM have, and the scheduler of "
            f"{checkpoint} is a {type(pipeline.scheduler).__name__} (prediction_type {predicts!r}): its network was "
            "trained for another process. Sample it with Diffusers."
        )
    if (kind := pipeline.unet.config.get("class_embed_type")) is not None:
        raise ConvertError(
            f"checkpoint must be a network without classes or with class numbers (num_class_embeds), and that of "
            f"{checkpoint} has class_embed_type {kind!r}, which takes other labels. Sample it with Diffusers."
        )


def _precision(weights: Mapping[str, Tensor]) -> str | None:
    """What has become of numbers that are not of float32, in words; None where all are."""
    kinds = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()} - {"float32"})
    return f"{', '.join(kinds)} in the checkpoint, float32 here" if kinds else None


def _check_target(target: Path, checkpoint: str) -> None:
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
    """Return a pipeline of the weights of another code.

    Args:
        weights: Its state dict.
        options: `source`, a code and not "auto", and what the weights do not tell.

    Raises:
        ConvertError: as in `convert`.
        UserError: a resolution that the levels of the network do not divide.
    """
    refuse_others(weights)
    schedule = {name: weights[name] for name in SCHEDULE if name in weights}
    weights = {name: weight for name, weight in weights.items() if name not in schedule}
    layout = LAYOUTS[options.source]
    if options.num_timesteps is None and schedule and not layout.table:
        options = replace(options, num_timesteps=len(next(iter(schedule.values()))))
    shape = measure(weights, layout)
    settings = _settle(weights, shape, layout, options)
    unet = UNet2DModel(**_unet_arguments(shape, layout, settings))
    check_resolution(unet.config, image_size(unet.config))
    heads = {width: width // (settings.head_channels or width) for width in shape.widths}
    places = {
        place.target: place for place in all_places(shape, layout, lambda width: heads.get(width, 1), settings.order)
    }
    _fill(unet, weights, places, layout)
    scheduler = _scheduler(layout, settings, options)
    _check_schedule(schedule, scheduler, options)
    if options.null_label == "last" and shape.classes is not None:
        unet.register_to_config(**class_options(shape.classes - 1, with_null_label=True))
    return DDPMExtPipeline(unet.eval(), scheduler)


# What the options say -------------------------------------------------------------------------------------------------


def _settle(weights: Mapping[str, Tensor], shape: Shape, layout: Layout, options: ConvertOptions) -> _Settings:
    """Return what file and options say, or ask for what neither does.

    Raises:
        ConvertError: something is missing, or the options contradict the file.
    """
    _check_network(shape, layout, options)
    T = _steps(weights, shape, layout) if layout.table else options.num_timesteps
    is_learned, is_openai = shape.out_channels != shape.in_channels, layout.labels is not None
    has_heads = options.num_heads is not None or options.num_head_channels is not None
    head_channels = _head_channels(shape, options) if has_heads else None
    # Of one head, both orders are the same.
    is_split = not has_heads or (head_channels is not None and max(_attention_widths(shape)) > head_channels)
    asked = {
        "resolution": True,
        "prediction_type": True,
        "variance_type": not is_learned,
        "noise_schedule": True,
        "num_timesteps": T is None,
        "rescale_timesteps": is_openai and T != 1000,
        "num_heads": is_openai and not has_heads,
        "attention_order": is_openai and is_split,
        "null_label": shape.classes is not None,
    }
    if options.null_label is not None and shape.classes is None:
        raise ConvertError(f"The network knows no classes, got --null_label {options.null_label}: leave it out.")
    if options.null_label == "last" and shape.classes == 1:
        raise ConvertError(
            "The class embedding must have a row for each class and one more for --null_label last, got one row: no "
            "class would be left. Give --null_label none."
        )
    missing = [name for name, is_asked in asked.items() if is_asked and getattr(options, name) is None]
    if missing or T is None:
        raise unanswered(missing, layout.name)
    variance = options.variance_type or "learned_range"  # all that OpenAI's scripts learn
    if variance.startswith("learned") != is_learned:
        raise ConvertError(
            f"The network has {shape.out_channels} output channels for images of {shape.in_channels}, so its variance "
            f"is {'learned' if is_learned else 'not learned'}, got --variance_type {variance}."
        )
    return _Settings(
        resolution=int(options.resolution or 0),
        T=T,
        prediction_type=str(options.prediction_type),
        variance_type=variance,
        is_rescaled=bool(options.rescale_timesteps) and T != 1000,
        head_channels=head_channels,
        order=options.attention_order or "legacy",
    )


def _check_network(shape: Shape, layout: Layout, options: ConvertOptions) -> None:
    """Raise ConvertError for a network that is not of this source, or not of images alone."""
    if shape.is_residual and layout.name == "improved-diffusion":
        raise ConvertError(
            "Residual blocks resample in this checkpoint (resblock_updown), which improved-diffusion has not: give "
            "--source guided-diffusion."
        )
    allowed = (options.image_channels,) if options.image_channels is not None else _IMAGE_CHANNELS
    if shape.in_channels not in allowed:
        raise ConvertError(
            f"The network takes {shape.in_channels} channels, and images have {options.image_channels or '1, 3 or 4'}: "
            "one that also takes another image, as of super-resolution, is no DDPM of images alone. If the images do "
            f"have {shape.in_channels} channels, give --image_channels {shape.in_channels}."
        )


def _steps(weights: Mapping[str, Tensor], shape: Shape, layout: Layout) -> int:
    """Return T, the length of the table of the time embedding, whose values are checked too.

    Its row t holds sin(t ω_i), cos(t ω_i) interleaved, ω_i = exp(-ln(1e4) 2i / width).
    """
    name = str(layout.table)
    table = find(weights, name, ("T", "width"), layout)
    T, width = table.shape
    if width != shape.widths[0]:
        raise ConvertError(
            f"{name!r} of the checkpoint has the shape {tuple(table.shape)}, which does not fit the network's time "
            f"embedding {(T, shape.widths[0])}."
        )
    omega = torch.exp(-torch.arange(0, width, 2) / width * math.log(10000))
    phase = torch.arange(T)[:, None] * omega
    if not torch.allclose(table.float(), torch.stack([phase.sin(), phase.cos()], dim=2).flatten(1), atol=1e-3):
        raise ConvertError(
            f"{name!r} of the checkpoint does not hold the sines and cosines of {layout.name}: it was changed or "
            "trained, and UNet2DModel computes its own."
        )
    return T


def _attention_widths(shape: Shape) -> set[int]:
    return {shape.widths[level] for level in shape.attention} | {shape.widths[-1]}


def _head_channels(shape: Shape, options: ConvertOptions) -> int | None:
    """Return the channels of a head, which UNet2DModel has alike on every level; None for one head of all channels."""
    widths = sorted(_attention_widths(shape))
    if (channels := options.num_head_channels) is not None:
        if any(width % channels for width in widths):
            raise ConvertError(f"num_head_channels must divide the attention's {widths} channels, got {channels}.")
        return channels
    heads = options.num_heads or 1
    if heads == 1:
        return None
    if len(widths) != 1 or widths[0] % heads:
        raise ConvertError(
            f"A UNet2DModel has heads of the same width on every level; {heads} heads over {widths} channels are not. "
            "Give the right --num_heads, or --num_head_channels where the code was given that; with one number of "
            "heads over several widths the network cannot be expressed. The way up (num_heads_upsample) must have the "
            "same number as the way down."
        )
    return widths[0] // heads


def _unet_arguments(shape: Shape, layout: Layout, settings: _Settings) -> Arguments:
    """Return the arguments of the UNet2DModel that computes the same."""
    levels = range(len(shape.widths))
    down, up = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if shape.is_residual else ("DownBlock2D", "UpBlock2D")
    )
    is_ho = layout.name == "ddim"  # TensorFlow's padding on the right alone, its eps, and half - 1 in the embedding
    arguments: Arguments = {
        "sample_size": settings.resolution,
        "in_channels": shape.in_channels,
        "out_channels": shape.out_channels,
        "block_out_channels": shape.widths,
        "layers_per_block": shape.layers,
        "down_block_types": tuple("AttnDownBlock2D" if i in shape.attention else down for i in levels),
        "up_block_types": tuple("AttnUpBlock2D" if i in shape.attention else up for i in reversed(levels)),
        "freq_shift": 1 if is_ho else 0,
        "flip_sin_to_cos": layout.labels is not None,
        "downsample_padding": 0 if is_ho else 1,
        "norm_eps": 1e-6 if is_ho else 1e-5,
        "attention_head_dim": settings.head_channels,
        "num_class_embeds": shape.classes,
    }
    if shape.is_residual:
        arguments |= {"downsample_type": "resnet", "upsample_type": "resnet"}
    if shape.scale_shift:  # without attn_norm_num_groups Diffusers would drop the norm of the middle attention
        arguments |= {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32}
    if settings.is_rescaled:  # UNet2DModel takes whole t only, so 1000 t / T is looked up
        arguments |= {"time_embedding_type": "learned", "num_train_timesteps": settings.T}
    return arguments


def _scheduler(layout: Layout, settings: _Settings, options: ConvertOptions) -> DDPMExtScheduler:
    """Return the process with which the code samples."""
    T = settings.T
    arguments: Arguments = {
        "num_train_timesteps": T,
        "beta_schedule": _SCHEDULES[str(options.noise_schedule)],
        "prediction_type": settings.prediction_type,
        "variance_type": settings.variance_type,
        # pytorch-ddpm computes the clipped x_0 after the mean that it uses, so it samples without clipping.
        "clip_sample": layout.table is None,
    }
    if options.noise_schedule != "cosine":
        # OpenAI's betas are in proportion to 1 / T, so that ᾱ_T is the same for every T.
        scale = 1000 / T if layout.labels is not None else 1.0
        ends = (options.beta_start or 1e-4) * scale, (options.beta_end or 0.02) * scale
        arguments |= {"beta_start": ends[0], "beta_end": ends[1]}
    return DDPMExtScheduler(**arguments)


def _check_schedule(schedule: Mapping[str, Tensor], scheduler: DDPMExtScheduler, options: ConvertOptions) -> None:
    """Raise ConvertError where the betas in the checkpoint are not those of the schedule that was stated."""
    for name, theirs in schedule.items():
        ours = getattr(scheduler, name)
        theirs = theirs.flatten().to(ours.dtype)
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=1e-3, atol=1e-6):
            raise ConvertError(
                f"The checkpoint holds {name!r}, {len(theirs)} numbers from {theirs[0]:.4g} to {theirs[-1]:.4g}, and "
                f"--noise_schedule {options.noise_schedule} has {len(ours)} from {ours[0]:.4g} to {ours[-1]:.4g}: give "
                "the schedule of the training."
            )


# Weights --------------------------------------------------------------------------------------------------------------


def _fill(unet: UNet2DModel, weights: Mapping[str, Tensor], places: Mapping[str, Place], layout: Layout) -> None:
    """Copy every weight to its place.

    Raises:
        ConvertError: a tensor is missing, of another shape, not finite, or left over; the first one is named.
    """
    state, used = unet.state_dict(), set()
    for target, own in state.items():
        if target == "time_proj.weight":  # the table of 1000 t / T
            state[target] = _sinusoids(own.shape[0], own.shape[1])
            continue
        place = places[target]
        if place.source not in weights:
            raise ConvertError(
                f"The network's {target} {tuple(own.shape)} would come from {place.source!r}, which the checkpoint "
                f"does not have: its architecture is not one that {layout.name} and UNet2DModel share."
            )
        state[target] = _taken(weights[place.source], place, own)
        used.add(place.source)
    left = left_over(weights, used | {str(layout.table)})
    if left:
        raise ConvertError(
            f"{left[0]!r} of the checkpoint, shape {tuple(weights[left[0]].shape)}, has no place in the network: its "
            f"architecture is not one that {layout.name} and UNet2DModel share."
        )
    unet.load_state_dict(state)


def _taken(theirs: Tensor, place: Place, own: Tensor) -> Tensor:
    """Return a tensor of the checkpoint as the network has it."""
    try:
        taken = place.change(theirs)
    except (IndexError, RuntimeError):  # of too few dimensions or numbers to be rearranged
        taken = None
    if taken is None or taken.shape != own.shape:
        reason = ""
        if place.target.startswith("time_embedding.linear_1") and theirs.ndim == 2:
            reason = f" The first level must be as wide as the time embedding, {theirs.shape[1]}, in a UNet2DModel."
        raise ConvertError(
            f"{place.source!r} of the checkpoint has the shape {tuple(theirs.shape)}, which does not fit the "
            f"network's {place.target} {tuple(own.shape)}.{reason}"
        )
    if not theirs.is_floating_point() or not bool(theirs.isfinite().all()):
        raise ConvertError(
            f"{place.source!r} of the checkpoint holds values that are not finite numbers (dtype {theirs.dtype}): it "
            "was saved after the training had failed, or is quantised. Take an earlier one."
        )
    return taken.to(own.dtype)


def _sinusoids(T: int, width: int) -> Tensor:
    """Return the time embedding of OpenAI's codes at the rescaled steps: (T, width).

    e(t) = (cos(τ ω_i), sin(τ ω_i)),   τ = 1000 t / T,   ω_i = exp(-ln(1e4) i / (width / 2)),   0 <= t < T
    """
    half = width // 2
    omega = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    tau = torch.arange(T, dtype=torch.float32) * (1000 / T)
    phase = tau[:, None] * omega
    return torch.cat([phase.cos(), phase.sin()], dim=1)
