"""What a run is, said at its start and by a dry run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...models.classes import classes_of
from ...models.values import Values

if TYPE_CHECKING:
    from ..trainer import Trainer

__all__ = ["amount", "describe", "duration", "plural"]


def plural(count: int, noun: str, many: str | None = None) -> str:
    """Return "1 process", "2 processes", "1,500 images".

    Args:
        count: How many.
        noun: Of what, in the singular.
        many: Its plural, where it is not made with an s.
    """
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def amount(value: float) -> str:
    """Return an amount with two decimals; below a hundredth with two digits that say something."""
    return f"{value:,.2f}" if value >= 0.01 or value == 0 else f"{value:.2g}"


def duration(hours: float) -> str:
    """Return "3.50 hours", or "0.36 minutes" where hours would be 0.00 or 0.01."""
    return f"{hours:,.2f} hours" if hours >= 0.01 else f"{amount(hours * 60)} minutes"


def describe(trainer: Trainer) -> list[str]:
    """Return the lines that say what is trained: device, network, images, batch, updates, run folder."""
    return [
        f"device      {_device(trainer)}",
        f"network     {_network(trainer)}",
        f"images      {_images(trainer)}",
        f"batch       {_batch(trainer)}",
        f"updates     {_updates(trainer)}",
        f"run folder  {trainer.run.path}, {_beginning(trainer)}",
    ]


def _device(trainer: Trainer) -> str:
    config, accelerator = trainer.config, trainer.accelerator
    precision = "float64" if config.double else {"no": "float32"}.get(config.mixed_precision, config.mixed_precision)
    where = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type
    if accelerator.device.type == "cpu":
        threads = plural(torch.get_num_threads(), "thread")
        there = "" if config.cpu or torch.accelerator.is_available() else " (there is no accelerator here)"
        return f"cpu{there}, {precision}, {plural(accelerator.num_processes, 'process', 'processes')} of {threads}"
    return f"{where}, {precision}, {plural(accelerator.num_processes, 'process', 'processes')}"


def _network(trainer: Trainer) -> str:
    config, count = trainer.config, sum(weight.numel() for weight in trainer.parameters)
    text = plural(count, "parameter")
    if not config.names_network:
        return f"{text}, that of Diffusers' train_unconditional.py since no other was named; --unet names smaller ones"
    if (origin := trainer.origin) is not None:
        trained = sum(weight.numel() for weight in trainer.parameters if weight.requires_grad)
        new = f", begun anew: {', '.join(origin['new'])}" if origin["new"] else ""
        some = "" if trained == count else f" ({trained:,} of them trained)"
        classes = classes_of(trainer.network.config)
        stale = classes is not None and classes.null_label is not None and not config.class_dropout
        without = (
            "; what it draws without a class is not trained, --class_conditional --class_dropout 0.1 would"
            if stale
            else ""
        )
        return f"{text}{some}, {plural(origin['loaded'], 'weight')} from {origin['source']}{new}{without}"
    source = config.model_config_name_or_path
    if source is not None and not source.endswith(".json"):
        return f"{text}, of the options of {source} alone; --init_from {source} would start from its weights"
    return f"{text}, {source or config.unet}"


def _images(trainer: Trainer) -> str:
    channels, height, width = trainer.data.shape
    count = "a stream" if trainer.num_images is None else plural(trainer.num_images, "image")
    classes = trainer.data.num_classes if trainer.config.class_conditional else None
    depth = Values(trainer.data.spec.bits, trainer.data.spec.value_range)
    text = f"{count} of {plural(channels, 'channel')}, {height} x {width}, {depth}"
    return text if classes is None else f"{text}, {plural(classes, 'class', 'classes')}"


def _batch(trainer: Trainer) -> str:
    plan = trainer.plan
    processes = plural(plan.processes, "process", "processes")
    return f"{plan.global_batch}: {processes}, {plan.accumulation} x {plan.micro_batch} each"


def _updates(trainer: Trainer) -> str:
    text = f"{trainer.intervals.length:,}"
    if trainer.num_images is None:
        return text
    epochs = trainer.intervals.length * trainer.plan.global_batch / trainer.num_images
    return f"{text}, {epochs:.3g} epochs"


def _beginning(trainer: Trainer) -> str:
    found = trainer.resumed_from
    if found is None:
        return "a new run"
    return f"continuing from {found.folder.name} at update {trainer.state.update:,}"
