"""From options to a Trainer: find the checkpoint, build the objects in their order, restore what was saved."""

from __future__ import annotations

from typing import cast

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from torch import nn

from ..data.rows import say_once
from ..diffusion.words import LEARNED_VARIANCES
from ..distributed import set_numerics, take_dynamo, tell_deepspeed
from ..run_dir import RunDir
from . import builders
from .builders import NetworkOptions
from .config import TrainConfig
from .fine_tune import Origin, Start, add_lora, check_class_names, find_start, freeze, load_weights, other_values
from .plan.batch import plan_intervals, total_updates
from .state.ema import make_averages
from .state.meter import Meter
from .state.outcomes import Outcomes, can_skip_on_device
from .state.resume import (
    ResumePoint,
    compare,
    find_checkpoint,
    resumed_plan,
    warn_of_other_conditions,
)
from .state.timestep_samplers import Timesteps
from .state.train_state import TrainState
from .trainer import Trainer

__all__ = ["make_trainer"]


def make_trainer(config: TrainConfig, accelerator: Accelerator, run: RunDir) -> Trainer:
    """Build the objects of a run, as they were at the checkpoint that it resumes from. Every process must call this.

    Args:
        config: The options.
        accelerator: From `make_accelerator`.
        run: The run folder, locked.

    Raises:
        RunError, ValueError: options that fit no data, no network or not the checkpoint.
    """
    found = find_checkpoint(config, run, accelerator)
    plan = resumed_plan(config, found, accelerator.num_processes)
    start = find_start(config, None if found is None else found.record)
    config = config if start is None else start.config
    arguments = builders.network_config(config) if start is None else start.network
    numerics = set_numerics(config, accelerator, None if found is None else found.record["numerics"]["num_threads"])
    data, arguments = _open_data(config, arguments, start)
    num_images = builders.length(data)
    length = total_updates(config, num_images, plan)
    network, origin = _build_network(config, arguments, start, data)
    dtype = torch.float64 if config.double else torch.float32
    # FSDP2 shards contiguous weights only.
    layout = torch.channels_last if config.channels_last and not accelerator.is_fsdp2 else torch.contiguous_format
    network.to(accelerator.device)
    nn.Module.to(network, dtype=dtype, memory_format=layout)  # pyright: ignore[reportCallIssue]
    builders.speed_up(config, network)
    compiled = builders.compile_network(config, network, accelerator, plan.accumulation, take_dynamo(accelerator))
    accelerator.gradient_accumulation_steps = plan.accumulation
    tell_deepspeed(accelerator, plan.micro_batch, plan.accumulation, config.max_grad_norm)
    names = [name for name, _ in network.named_parameters()]  # before any wrapper has given them others
    optimizer = builders.build_optimizer(config, network)
    unet, wrapped = accelerator.prepare(network, optimizer)
    network = cast(UNet2DModel, accelerator.unwrap_model(unet, keep_torch_compile=False))
    state = TrainState(
        parameters=dict(zip(names, network.parameters(), strict=True)),
        averages=make_averages(config, list(network.parameters())),
        optimizer=wrapped,
        timesteps=Timesteps(config.timestep_sampler, config.ddpm_num_steps),
        meter=Meter(accelerator.device, config.ddpm_num_steps),
    )
    by_device = can_skip_on_device(accelerator, optimizer, config.fused_optimizer)
    trainer = Trainer(
        config=config,
        accelerator=accelerator,
        run=run,
        resumed_from=found,
        origin=origin,
        numerics=numerics,
        plan=plan,
        intervals=plan_intervals(config, length, num_images, plan),
        data=data,
        spec=builders.data_spec(config, data),
        num_images=num_images,
        scheduler=builders.build_scheduler(config) if start is None else start.scheduler,
        network=network,
        unet=unet,
        compiled=compiled,
        dtype=dtype,
        layout=layout,
        state=state,
        lr_factor=builders.lr_factor(config, length),
        outcomes=Outcomes(accelerator.device) if by_device else None,
    )
    if found is not None:
        _resume(trainer, found)
    return trainer


def _open_data(
    config: TrainConfig, arguments: NetworkOptions, start: Start | None
) -> tuple[builders.Images, NetworkOptions]:
    """Open the images; a new head of --init_new_head is of their channels, else they are made of the network's."""
    if start is None or start.weights is None or not config.init_new_head:
        return builders.build_data(config, arguments), arguments
    data = builders.build_data(config, {**arguments, "in_channels": None})
    channels = data.shape[0]
    learned = config.variance_type in LEARNED_VARIANCES
    return data, {**arguments, "in_channels": channels, "out_channels": 2 * channels if learned else channels}


def _build_network(
    config: TrainConfig, arguments: NetworkOptions, start: Start | None, data: builders.Images
) -> tuple[UNet2DModel, Origin | None]:
    """Build the network with its first weights, or with those of the source; return it and what is said of that."""
    network = builders.build_network(config, arguments, data)
    if start is None:
        return network, None
    check_class_names(start, data.spec)
    if (said := other_values(start, data.spec)) is not None:
        say_once(said)
    origin = start.origin
    if start.weights is not None:
        origin["new"] = load_weights(network, start)
    if config.lora_rank is not None:
        add_lora(network, config.lora_rank, origin["new"])
    freeze(network, config.freeze, origin["new"])
    return network, origin


def _resume(trainer: Trainer, found: ResumePoint) -> None:
    """Make the trainer what its checkpoint holds, if its options may resume from it."""
    compare(trainer, found.record)
    if trainer.accelerator.is_main_process:
        warn_of_other_conditions(found.record["numerics"], trainer.numerics)
    trainer.state.restore(found.folder, found.record, trainer.plan.global_batch, trainer.accelerator)
    trainer.data.load_state_dict(found.record["data"]["state"])
