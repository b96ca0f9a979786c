"""--forecast: memory, speed, hours and cost of a training on a machine that is not at hand, from fake tensors.

One forward and backward pass of the network runs on tensors that have shapes and no values (FakeTensorMode), so a
network for eight cards is counted on a laptop within seconds. Counted are the bytes of every storage that lives (own
tracker: MemTracker of torch.distributed takes 20 times as long and counts recomputed activations twice) and the
floating-point operations of matrix products, convolutions and attention (FlopCounterMode).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import psutil
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from ...errors import check_word
from ...models.unet import count_parameters
from ...models.values import image_size
from ...run_dir import RunError
from ..builders import NetworkOptions, network_config
from ..config import TrainConfig
from .batch import plan_batch
from .summary import amount, duration, plural

__all__ = ["ACCELERATORS", "AcceleratorSpec", "Forecast", "forecast", "forecast_lines", "pass_costs"]

Shape: TypeAlias = Sequence[int]  # of a tensor

GIB = 2**30
USABLE = 0.92  # of the memory: the rest is the driver's, the libraries' and lost between blocks
FRAGMENTS = 1.15  # a CPU process's memory by the bytes of its tensors: what malloc keeps between them
ADAM_MOMENTS = 2


@dataclass(frozen=True)
class AcceleratorSpec:
    """A card as its maker describes it: dense TFLOP/s, without sparsity."""

    name: str
    memory_gib: float
    bf16: float  # TFLOP/s with bfloat16 inputs
    tf32: float
    fp32: float
    source: str


ACCELERATORS: dict[str, AcceleratorSpec] = {
    "h100": AcceleratorSpec("NVIDIA H100 SXM 80 GB", 79.6, 989.4, 494.7, 66.9, "NVIDIA H100 datasheet, 2024"),
    "h200": AcceleratorSpec("NVIDIA H200 SXM 141 GB", 139.8, 989.4, 494.7, 66.9, "NVIDIA H200 datasheet, 2024"),
    "b200": AcceleratorSpec("NVIDIA B200 SXM 180 GB", 178.3, 2250.0, 1125.0, 75.0, "NVIDIA DGX B200 datasheet, 2025"),
    "a100": AcceleratorSpec("NVIDIA A100 SXM 80 GB", 79.3, 312.0, 156.0, 19.5, "NVIDIA A100 datasheet, 2021"),
    "a100-40": AcceleratorSpec("NVIDIA A100 SXM 40 GB", 39.4, 312.0, 156.0, 19.5, "NVIDIA A100 datasheet, 2021"),
    "l40s": AcceleratorSpec("NVIDIA L40S 48 GB", 44.5, 362.1, 183.2, 91.6, "NVIDIA L40S datasheet, 2023"),
    "l4": AcceleratorSpec("NVIDIA L4 24 GB", 22.5, 121.0, 60.0, 30.3, "NVIDIA L4 datasheet, 2023"),
    "rtx4090": AcceleratorSpec(
        "NVIDIA GeForce RTX 4090 24 GB", 23.6, 165.2, 82.6, 82.6, "NVIDIA Ada white paper, 2022"
    ),
    "rtx3090": AcceleratorSpec(
        "NVIDIA GeForce RTX 3090 24 GB", 23.6, 71.0, 35.6, 35.6, "NVIDIA GA102 white paper, 2021"
    ),
}


@dataclass(frozen=True)
class PassCosts:
    """One forward and backward pass of a network, without its weights and gradients."""

    batch: int
    flops: int
    kept: int  # bytes alive between forward and backward: the activations
    peak: int  # bytes at the highest point of both passes, beside the weights, without the gradients' own

    @property
    def flops_per_image(self) -> float:
        return self.flops / self.batch


@dataclass(frozen=True)
class Forecast:
    """What a run takes on one accelerator of a kind; bytes are of one process."""

    accelerator: AcceleratorSpec
    assumed: str  # network, size and channels of the images
    processes: int
    global_batch: int
    micro_batch: int
    parameters: int
    weights: int
    gradients: int
    adam: int
    averages: int
    costs: PassCosts
    largest_batch: int  # images of one forward pass that fit
    largest_batch_checkpointed: int
    tflops: float  # the peak in the precision of the run
    precision: str
    utilisation: float
    updates: int | None  # None: in epochs, of data that is not opened
    base: int = 0  # bytes of the process before anything is built, on a CPU

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the batch."""
        return self.base + self.weights + self.gradients + self.adam + self.averages

    @property
    def peak(self) -> int:
        """Bytes of one process at most."""
        return self.fixed + int(self.costs.peak * (FRAGMENTS if self.base else 1))

    @property
    def images_per_second(self) -> float:
        """Of all processes."""
        return self.processes * self.utilisation * self.tflops * 1e12 / self.costs.flops_per_image

    @property
    def hours(self) -> float | None:
        """Of the whole run; None where its length is not known."""
        images = None if self.updates is None else self.updates * self.global_batch
        return None if images is None else images / self.images_per_second / 3600


class StorageCounter(TorchDispatchMode):
    """Bytes of the storages that were made inside and live.

    Args:
        outside: What was there before: a view of a weight, or a sum into a gradient, makes nothing new.
    """

    def __init__(self, outside: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.outside = {tensor.untyped_storage()._cdata for tensor in outside}
        self.alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive and key not in self.outside:
            self.alive[key] = weakref.ref(storage, partial(self._forget, key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int, _: object) -> None:
        del self.alive[key]
        self.now -= size


def _attention_flops(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    """QK^T and the product with V, two operations each."""
    batch, heads, length, width = query
    return 2 * batch * heads * length * key[2] * (width + value[3])


def _attention_backward_flops(_: Shape, query: Shape, key: Shape, value: Shape, *rest: object, **__: object) -> int:
    return 2 * _attention_flops(query, key, value)


# The CPU's fused attention, which fake tensors take; the other kinds FlopCounterMode knows.
_ATTENTION: dict[object, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


@contextmanager
def _counted(outside: Iterable[Tensor]) -> Iterator[tuple[FlopCounterMode, StorageCounter]]:
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as flops, StorageCounter(outside) as memory:
        yield flops, memory


def pass_costs(
    network: NetworkOptions,
    batch: int,
    *,
    mixed_precision: str = "no",
    gradient_checkpointing: bool = False,
    channels_last: bool = False,
) -> PassCosts:
    """Count one forward and backward pass of a network, in float32 or under autocast, without allocating it.

    Args:
        network: Arguments of UNet2DModel, with sample_size.
        batch: Images of the pass.
        mixed_precision: "no", "bf16" or "fp16". As on CUDA, group norm computes in float32 under autocast.
        gradient_checkpointing: Recompute the blocks' activations in the backward pass.
        channels_last: Memory format of weights and images.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    with FakeTensorMode():
        unet = UNet2DModel(**network)
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        if half is not None:
            for module in unet.modules():
                if isinstance(module, nn.GroupNorm):
                    module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        for weight in unet.parameters():  # their gradients are counted by themselves
            if weight.ndim == 4:
                weight.data = weight.data.contiguous(memory_format=layout)
            weight.grad = torch.zeros_like(weight)
        gradients = [weight.grad for weight in unet.parameters() if weight.grad is not None]
        with _counted([*unet.parameters(), *gradients]) as (flops, memory):
            x = torch.empty(batch, unet.config["in_channels"], *image_size(unet.config)).to(memory_format=layout)
            t = torch.empty(batch, dtype=torch.int64)
            labels = None if unet.config["num_class_embeds"] is None else torch.empty(batch, dtype=torch.int64)
            with nullcontext() if half is None else torch.autocast("cpu", half):
                output = unet(x, t, class_labels=labels, return_dict=False)[0]
            loss = output.float().square().mean()
            kept = memory.now
            loss.backward()
    return PassCosts(batch, flops.get_total_flops(), kept, memory.peak)


def forecast(config: TrainConfig, kind: str | None = None) -> Forecast:
    """Forecast a run on accelerators of a kind.

    Args:
        config: The options of the run. Its data is not opened: the images have the network's size.
        kind: A word of `ACCELERATORS`, or "cpu" for this machine's; None takes the options'.

    Raises:
        RunError: no such kind, no such share of a peak, no such folder, or a batch that cannot be shared.
    """
    kind, processes = kind or config.forecast, config.forecast_processes
    check_word("forecast", kind, (*ACCELERATORS, "cpu"), RunError)
    _check(config)
    accelerator = ACCELERATORS[kind] if kind in ACCELERATORS else _this_cpu()
    network = network_config(config)
    if network.get("sample_size") is None:
        raise RunError("A forecast needs the images' size, which this network leaves open: give --resolution.")
    plan = plan_batch(config, processes)

    def costs(batch: int, checkpointing: bool) -> PassCosts:
        return pass_costs(
            network,
            batch,
            mixed_precision=config.mixed_precision,
            gradient_checkpointing=checkpointing,
            channels_last=config.channels_last,
        )

    with FakeTensorMode():
        parameters = count_parameters(UNet2DModel(**network))
    item = 8 if config.double else 4
    averages = 0 if not config.use_ema else len(config.ema_sigma_rel) if config.ema == "power_function" else 1
    weights = parameters * item
    fixed = weights * (2 + ADAM_MOMENTS + averages)
    plain, checkpointed = costs(plan.micro_batch, False), costs(plan.micro_batch, True)
    own = checkpointed if config.gradient_checkpointing else plain
    base = psutil.Process().memory_info().rss if kind == "cpu" else 0
    free = USABLE * accelerator.memory_gib * GIB - fixed - base
    tflops, precision = peak_tflops(accelerator, config)
    return Forecast(
        accelerator=accelerator,
        assumed=_assumed(config, network),
        processes=processes,
        global_batch=plan.global_batch,
        micro_batch=plan.micro_batch,
        parameters=parameters,
        weights=weights,
        gradients=weights,
        adam=ADAM_MOMENTS * weights,
        averages=averages * weights,
        costs=own,
        largest_batch=largest(free, plain),
        largest_batch_checkpointed=largest(free, checkpointed),
        tflops=tflops,
        precision=precision,
        utilisation=config.forecast_utilisation,
        base=base,
        updates=config.max_train_steps,
    )


def _check(config: TrainConfig) -> None:
    """Refuse more than the whole of a peak, and a folder of images that is not there."""
    share, folder = config.forecast_utilisation, config.train_data_dir
    if not 0 < share <= 1:
        raise RunError(f"forecast_utilisation must be a share of the peak, above 0 and at most 1, got {share:g}.")
    if folder is not None and not Path(folder).exists():
        raise RunError(f"train_data_dir must be a folder of images, and there is none at {folder}. Correct the path.")


def _assumed(config: TrainConfig, network: NetworkOptions) -> str:
    """Say which network is counted, and on which images."""
    name = config.init_from or config.model_config_name_or_path or config.unet or "that of train_unconditional.py"
    height, width = image_size(network)
    return f"{name}, on images of {height} x {width} and {plural(network['in_channels'], 'channel')}"


def _this_cpu() -> AcceleratorSpec:
    """Return this machine's memory; how fast it is, --dry_run alone measures."""
    return AcceleratorSpec("this machine's CPU", round(psutil.virtual_memory().total / GIB, 1), 0, 0, 0, "memory only")


def largest(free: float, costs: PassCosts) -> int:
    """Images of one pass that fit into `free` bytes: what a pass holds grows with their number."""
    return max(0, math.floor(free / costs.peak * costs.batch))


def peak_tflops(accelerator: AcceleratorSpec, config: TrainConfig) -> tuple[float, str]:
    """The peak in the run's precision, and that precision's name."""
    if config.mixed_precision != "no":
        return accelerator.bf16, config.mixed_precision
    return (accelerator.tf32, "tf32") if config.allow_tf32 else (accelerator.fp32, "float32")


def forecast_lines(found: Forecast, price_per_hour: float | None = None) -> list[str]:
    """The lines that --forecast prints.

    Args:
        found: The forecast.
        price_per_hour: Of the machine with all its accelerators; None leaves the cost out.
    """
    card, costs = found.accelerator, found.costs
    parts = (
        *((("process", found.base),) if found.base else ()),
        ("weights", found.weights),
        ("gradients", found.gradients),
        ("Adam", found.adam),
        ("averages", found.averages),
        ("activations", costs.kept),
        ("backward", costs.peak - costs.kept),
    )
    room = USABLE * card.memory_gib * GIB
    verdict = "fits" if found.peak <= room else "does NOT fit"
    lines = [
        f"forecast    {found.processes} x {card.name}, nothing measured; {card.source}",
        f"assumed     {found.assumed}; the data are not opened",
        f"network     {found.parameters:,} parameters, {costs.flops_per_image / 1e9:,.1f} GFLOP per training image",
        f"batch       {found.global_batch}: {plural(found.processes, 'process', 'processes')}, passes of "
        f"{plural(found.micro_batch, 'image')}",
        f"memory      {found.peak / GIB:,.2f} GiB at the peak of a process, {verdict} into {card.memory_gib:g} GiB: "
        + ", ".join(f"{size / GIB:,.2f} {name}" for name, size in parts),
        f"largest     {found.largest_batch:,} images a pass, {found.largest_batch_checkpointed:,} with "
        "--gradient_checkpointing",
    ]
    if not found.tflops:
        return lines
    lines.append(
        f"speed       {found.images_per_second:,.0f} images/s at {found.utilisation:.0%} of {found.tflops:g} TFLOP/s "
        f"({found.precision})"
    )
    if found.hours is None:
        lines.append(
            "whole run   unknown: its length is in epochs of data that a forecast does not open; give --max_train_steps"
        )
    else:
        lines.append(
            f"whole run   {plural(found.updates or 0, 'update')}: {duration(found.hours)}, without sample grids"
        )
        if price_per_hour is not None:
            lines.append(f"cost        {amount(found.hours * price_per_hour)} at {price_per_hour:g} an hour")
    return lines
