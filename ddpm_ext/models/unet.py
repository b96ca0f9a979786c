"""The papers' networks as Diffusers' UNet2DModel, with the papers' initialisation.

A network is a UNet2DModel configuration, so what is saved here loads with stock Diffusers. What a configuration cannot
say is how the weights begin: Diffusers leaves PyTorch's defaults, with which the output's deviation is 0.36 and
L_simple starts at 1.12; the papers start at a network that predicts almost nothing, L_simple = 1.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal, NamedTuple, get_args

import torch
from diffusers import UNet2DModel
from torch import nn

from ..diffusion.words import Arguments, Config
from ..errors import UserError, check_word
from .values import image_size

__all__ = [
    "UNET_PRESETS",
    "build_unet",
    "check_resolution",
    "count_parameters",
    "init_ddpm_",
    "last_layers",
    "unet_config",
]

Initialisation = Literal["ddpm", "iddpm", "torch"]


class UNetPreset(NamedTuple):
    """A published network."""

    config: Config  # arguments of UNet2DModel that differ from its defaults
    init: Initialisation
    num_parameters: int  # as counted in the published code's network; ours for the small ones


def _levels(widths: tuple[int, ...], attention: tuple[int, ...]) -> Arguments:
    """Widths of the levels, the finest first, and the levels that have self-attention, counted from 0."""
    down = tuple("AttnDownBlock2D" if level in attention else "DownBlock2D" for level in range(len(widths)))
    up = tuple("AttnUpBlock2D" if level in attention else "UpBlock2D" for level in reversed(range(len(widths))))
    return {"block_out_channels": widths, "down_block_types": down, "up_block_types": up}


# Ho et al. 2020, arXiv:2006.11239, App. B: sin and cos side by side with exp(-ln(1e4) i / (half - 1)), one attention
# head, stride 2 padded right and below as TensorFlow's SAME, GroupNorm of 32 groups with epsilon 1e-6.
_HO: Arguments = {
    "layers_per_block": 2,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
# Nichol & Dhariwal 2021, arXiv:2102.09672: scale and shift from the time embedding, heads of 64. Without
# attn_norm_num_groups Diffusers would drop the normalisation of the middle attention.
_IDDPM: Arguments = {
    "layers_per_block": 3,
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 64,
    "attn_norm_num_groups": 32,
}
_HO_256: Arguments = {"sample_size": 256, **_levels((128, 128, 256, 256, 512, 512), (4,)), **_HO}

UNET_PRESETS: dict[str, UNetPreset] = {
    "digits": UNetPreset(
        {
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            **_levels((32, 64), (1,)),
            **_HO,
            "layers_per_block": 1,
            "norm_num_groups": 8,
        },
        "ddpm",
        701_345,
    ),
    "cifar10-small": UNetPreset(
        {
            "sample_size": 32,
            **_levels((32, 64, 128), (1,)),
            **_HO,
            "layers_per_block": 1,
            "norm_num_groups": 8,
        },
        "ddpm",
        2_587_491,
    ),
    "cifar10-tiny": UNetPreset(
        {
            "sample_size": 32,
            **_levels((16, 32, 64), (1,)),
            **_HO,
            "layers_per_block": 1,
            "norm_num_groups": 8,
        },
        "ddpm",
        649_907,
    ),
    "cifar10": UNetPreset(
        {"sample_size": 32, "dropout": 0.1, **_levels((128, 256, 256, 256), (1,)), **_HO}, "ddpm", 35_746_307
    ),
    "lsun256": UNetPreset(_HO_256, "ddpm", 113_673_219),
    "celebahq256": UNetPreset(_HO_256, "ddpm", 113_673_219),
    "iddpm-cifar10": UNetPreset(
        {
            "sample_size": 32,
            "out_channels": 6,
            "dropout": 0.3,
            **_levels((128, 256, 256, 256), (1, 2)),
            **_IDDPM,
        },
        "iddpm",
        52_546_438,
    ),
    # The network of Diffusers' train_unconditional.py, with Diffusers' defaults for all else.
    "train_unconditional": UNetPreset(
        {"sample_size": 64, "layers_per_block": 2, **_levels((128, 128, 256, 256, 512, 512), (4,))}, "ddpm", 113_673_219
    ),
}


# Building -------------------------------------------------------------------------------------------------------------


def unet_config(preset_or_config: str | Config, **changes: Any) -> Arguments:
    """Return arguments of UNet2DModel: those of a preset or a configuration, under `changes` that are not None."""
    if isinstance(preset_or_config, str):
        check_word("unet", preset_or_config, UNET_PRESETS)
        preset_or_config = UNET_PRESETS[preset_or_config].config
    config = {key: value for key, value in preset_or_config.items() if not key.startswith("_")}
    return config | {key: value for key, value in changes.items() if value is not None}


def build_unet(
    preset_or_config: str | Config,
    *,
    seed: int = 0,
    init: Initialisation | None = None,
    sample_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
    out_channels: int | None = None,
    dropout: float | None = None,
    num_class_embeds: int | None = None,
) -> UNet2DModel:
    """Return a network with its first weights, which `seed` alone decides; PyTorch's own generator is left alone.

    Args:
        preset_or_config: A name in `UNET_PRESETS`, or the configuration of a UNet2DModel.
        seed: Seed of the first weights.
        init: "ddpm" (`init_ddpm_`), "iddpm" (`init_iddpm_`) or "torch" (PyTorch's defaults); None takes the preset's,
            for a configuration "ddpm".
        sample_size: H = W, or (H, W), in place of the configuration's; likewise the others.
        in_channels: Channels of x_t.
        out_channels: Channels of the output: in_channels, or twice as many with a learned variance.
        dropout: Probability of dropout in the residual blocks.
        num_class_embeds: Number of classes of a class-conditional network.

    Raises:
        ValueError: an unknown preset, option or initialisation, or a size that the network cannot halve often enough.

    Example:
        >>> sum(parameter.numel() for parameter in build_unet("digits").parameters())
        701345
    """
    config = unet_config(
        preset_or_config,
        sample_size=list(sample_size) if isinstance(sample_size, tuple) else sample_size,
        in_channels=in_channels,
        out_channels=out_channels,
        dropout=dropout,
        num_class_embeds=num_class_embeds,
    )
    if init is None:
        init = UNET_PRESETS[preset_or_config].init if isinstance(preset_or_config, str) else "ddpm"
    check_word("init", init, get_args(Initialisation))
    arguments = set(inspect.signature(UNet2DModel.__init__).parameters) - {"self"}
    if unknown := set(config) - arguments:
        raise UserError(f"UNet2DModel has no argument {sorted(unknown)}; it has {sorted(arguments)}.")
    if config.get("sample_size") is not None:
        check_resolution(config, image_size(config))

    with torch.random.fork_rng(devices=[]):  # UNet2DModel draws PyTorch's defaults from the global generator
        torch.manual_seed(seed)
        unet = UNet2DModel(**config)
    generator = torch.Generator().manual_seed(seed)
    if init == "ddpm":
        init_ddpm_(unet, generator)
    elif init == "iddpm":
        init_iddpm_(unet)
    return unet


def check_resolution(config: Config, size: tuple[int, int]) -> None:
    """Raise ValueError unless (H, W) can be halved once between each two levels of the network."""
    step = 2 ** (len(config.get("block_out_channels", (224, 448, 672, 896))) - 1)
    if len(size) != 2 or any(side < step or side % step for side in size):
        fitting = tuple(max(step, round(side / step) * step) for side in size)
        raise UserError(
            f"The network has {step.bit_length()} levels, each half as large as the one before: height and width must "
            f"be multiples of {step}, got {size}. The nearest size that fits is {fitting}; a network of fewer levels "
            "fits smaller ones."
        )


def count_parameters(unet: nn.Module) -> int:
    """Return the number of weights."""
    return sum(weight.numel() for weight in unet.parameters())


# Initialisation -------------------------------------------------------------------------------------------------------


def last_layers(unet: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    """Return the layer that ends each residual branch, each attention, and the network: 22 + 6 + 1 for CIFAR-10."""
    ends = ("conv2", "to_out.0", "conv_out")
    return [
        module
        for name, module in unet.named_modules()
        if name.endswith(ends) and isinstance(module, (nn.Conv2d, nn.Linear))
    ]


@torch.no_grad()
def init_ddpm_(unet: nn.Module, generator: torch.Generator | None = None) -> None:
    """Set the first weights of Ho's code: every convolution and linear layer from U(-a, a), every bias 0.

        a = gain · sqrt(6 / (fan_in + fan_out)),   gain = 1, but 1e-5 where a branch ends (`last_layers`)

    So every branch starts as almost nothing, the output has a deviation of about 1e-5, and L_simple starts at 1.

    Args:
        unet: The network, changed in place.
        generator: Where the weights are drawn from; None draws from PyTorch's global one.

    Source: Ho et al. 2020, arXiv:2006.11239, the published code, whose scale 1e-10 is the square of this gain.
    """
    ends = {id(layer) for layer in last_layers(unet)}
    for layer in unet.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight, gain=1e-5 if id(layer) in ends else 1.0, generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()
        elif isinstance(layer, nn.Embedding):
            layer.weight.normal_(generator=generator)


@torch.no_grad()
def init_iddpm_(unet: nn.Module) -> None:
    """Set the first weights of the improved-diffusion code: PyTorch's defaults, but exactly 0 where a branch ends.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, the published code's zero_module.
    """
    for layer in last_layers(unet):
        layer.weight.zero_()
        if layer.bias is not None:
            layer.bias.zero_()
