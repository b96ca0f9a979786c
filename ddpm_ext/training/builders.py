"""Options -> the objects of a run: network, scheduler, data, optimiser, learning rate."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.optimization import get_scheduler
from torch import nn

from ..data.dataset import ImageSet, open_images
from ..data.spec import DataSpec, Reading, make_spec
from ..data.streaming import ImageStream, open_stream, without_resolution
from ..diffusion.words import EXTENSION_KEY, LEARNED_VARIANCES
from ..models.classes import class_options
from ..models.unet import UNET_PRESETS, build_unet, unet_config
from ..models.values import check_bands, value_options
from ..pipelines.loading import load_network_config
from ..run_dir import RunError
from ..schedulers.ddpm import DDPMExtScheduler
from .config import TrainConfig

__all__ = [
    "Images",
    "NetworkOptions",
    "build_data",
    "build_network",
    "build_optimizer",
    "build_scheduler",
    "compile_network",
    "data_spec",
    "length",
    "lr_factor",
    "network_config",
    "speed_up",
]


Images: TypeAlias = ImageSet | ImageStream
NetworkOptions: TypeAlias = dict[str, Any]  # arguments of UNet2DModel, and EXTENSION_KEY


def length(data: Images) -> int | None:
    """Images of one epoch; a stream does not know."""
    return None if isinstance(data, ImageStream) else len(data)


def lr_factor(config: TrainConfig, updates: int) -> Callable[[int], float]:
    """Learning rate after n updates, as a share of `learning_rate`: a formula of n, with no state to save.

    The courses are Diffusers' own. A prepared scheduler would advance once per process, and under accumulation stock's
    script stretches it.
    """
    name = config.lr_scheduler
    if name == "constant" and config.lr_warmup_steps:
        name = "constant_with_warmup"
    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=config.learning_rate)
    schedule = get_scheduler(name, stand_in, num_warmup_steps=config.lr_warmup_steps, num_training_steps=updates)
    return schedule.lr_lambdas[0]


def build_scheduler(config: TrainConfig) -> DDPMExtScheduler:
    """Return the noise schedule, prediction and variance that the options name."""
    return DDPMExtScheduler(
        num_train_timesteps=config.ddpm_num_steps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.ddpm_beta_schedule,
        prediction_type=config.prediction_type,
        variance_type=config.variance_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
    )


def network_config(config: TrainConfig) -> NetworkOptions:
    """Return the arguments of UNet2DModel before the data is known."""
    source = config.init_from or config.model_config_name_or_path
    base = load_network_config(source, config.cache_dir) if source else config.unet or "train_unconditional"
    size = None if config.size is None else list(config.size)
    found = unet_config(base, sample_size=size, dropout=config.dropout)
    channels = found.setdefault("in_channels", 3)
    check_bands(config.rgb_bands, channels)
    if config.variance_type in LEARNED_VARIANCES:
        found["out_channels"] = 2 * channels
    return found


def build_data(config: TrainConfig, network: NetworkOptions) -> Images:
    """Open the images at the network's size and channels.

    Raises:
        ValueError: no images, or none that fit the network.
    """
    spec = make_spec(
        config.dataset_name,
        dataset_config_name=config.dataset_config_name,
        train_data_dir=config.train_data_dir,
        split=config.train_split,
        image_column=config.image_column,
        label_column=config.label_column,
        resolution=network.get("sample_size"),
        channels=network["in_channels"],
        center_crop=config.center_crop,
        bits=16 if config.bits is None and config.preserve_input_precision else config.bits,
        value_range=config.value_range,
        channel_axis=config.channel_axis,
        array_key=config.array_key,
    )
    reading = Reading(
        strict=config.strict_data,
        max_unreadable=config.max_unreadable,
        cache_dir=config.cache_dir,
        num_workers=config.dataloader_num_workers,
    )
    if config.equal_sizes:
        refuse_several_sizes(spec, reading, streaming=config.streaming)
    return open_stream(spec, reading) if config.streaming else open_images(spec, reading)


def data_spec(config: TrainConfig, data: Images) -> DataSpec:
    """Return the record of the images a run is trained on, for config.json."""
    return replace(data.spec, random_flip=config.random_flip, equal_sizes=config.equal_sizes)


def refuse_several_sizes(spec: DataSpec, reading: Reading, *, streaming: bool) -> None:
    """Read the sizes in the headers of all images; nothing is decoded.

    Raises:
        ValueError: there are several, or a stream's are not known.
    """
    if streaming:
        raise without_resolution()
    as_stored = replace(spec, resolution=None)
    open_images(as_stored, reading._replace(memory_bytes=0, mapped_bytes=0, max_unreadable=1.0, strict=False))


def build_network(config: TrainConfig, network: NetworkOptions, data: Images) -> UNet2DModel:
    """Build the network at the images' size, with first weights that the seed decides.

    Args:
        config: The options.
        network: Arguments of UNet2DModel.
        data: The images, which tell size and classes.
    """
    if config.class_conditional:
        data.require_classes()
    _, height, width = data.shape
    preset = None if config.model_config_name_or_path else config.unet or "train_unconditional"
    null_label = config.class_dropout > 0 or "null_label" in (network.get(EXTENSION_KEY) or {})
    network = {name: value for name, value in network.items() if name not in ("num_class_embeds", EXTENSION_KEY)}
    classes: NetworkOptions = {}
    if config.class_conditional:
        assert data.num_classes is not None  # required above
        classes = class_options(data.num_classes, data.spec.class_names, with_null_label=null_label)
    unet = build_unet(
        network,
        seed=config.seed,
        init=UNET_PRESETS[preset].init if preset else None,
        sample_size=height if height == width else (height, width),
        num_class_embeds=classes.get("num_class_embeds"),
    )
    if ours := {**classes.get(EXTENSION_KEY, {}), **value_options(data.spec.bits, data.spec.value_range)}:
        unet.register_to_config(**{EXTENSION_KEY: ours})
    return unet


def speed_up(config: TrainConfig, network: UNet2DModel) -> None:
    """Turn on the switches of the network itself.

    Args:
        config: The options.
        network: Changed in place; its weights keep their names.

    Raises:
        RunError: xformers is missing.
    """
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if config.enable_xformers_memory_efficient_attention:
        if importlib.util.find_spec("xformers") is None:
            raise RunError(
                "--enable_xformers_memory_efficient_attention needs xformers, which is not installed: pip install "
                "xformers, or leave the option out (PyTorch's own attention is memory-efficient too)."
            )
        network.enable_xformers_memory_efficient_attention()


def compile_network(
    config: TrainConfig,
    network: UNet2DModel,
    accelerator: Accelerator,
    accumulation: int,
    dynamo: dict[str, object] | None,
) -> bool:
    """Compile the network in place, where options or launcher ask for it; its weights keep their names.

    --compile records the network as CUDA graphs, so that an update is a few launches in place of some thousands, where
    one process makes an update of one pass: the gradients of several passes would be added up in a graph's own memory,
    which its next replay overwrites.

    Args:
        config: The options.
        network: Changed in place.
        accelerator: Knows device and processes.
        accumulation: Passes of an update.
        dynamo: Arguments of torch.compile that the launcher asks for, or None.

    Returns:
        Whether it is compiled.

    Raises:
        RunError: launcher and options both name a compiler.
    """
    if config.compile and dynamo is not None:
        raise RunError(
            f"accelerate launch was given the dynamo backend {dynamo['backend']}, and the script --compile, which is "
            "inductor; drop one of them."
        )
    if config.compile:
        alone = accelerator.distributed_type is DistributedType.NO and accelerator.device.type == "cuda"
        dynamo = {"dynamic": False, "mode": "reduce-overhead" if alone and accumulation == 1 else None}
    if dynamo is None:
        return False
    modules: list[nn.Module] = [network]
    if accelerator.is_fsdp2:  # it gathers the weights of each block when the block is called
        modules = [module for module in network.modules() if isinstance(module, (ResnetBlock2D, Attention))]
        # Each shape is compiled for itself; past the limit PyTorch would go on uncompiled.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(modules))
    for module in modules:
        module.compile(**dynamo)
    return True


def build_optimizer(config: TrainConfig, network: nn.Module) -> torch.optim.AdamW:
    """AdamW; with weight decay 0 it is the paper's Adam."""
    speed = {"fused": True} if config.fused_optimizer else {"foreach": True}
    return torch.optim.AdamW(
        [weight for weight in network.parameters() if weight.requires_grad],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        **speed,
    )
