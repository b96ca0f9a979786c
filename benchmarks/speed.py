"""Speed beside installed Diffusers: in one process, by turns, medians. Every ratio is Diffusers' time / our time.

python benchmarks/speed.py                                  # minutes on a quiet CPU, writes runs/benchmark.md
python benchmarks/speed.py --quick                          # a look, about a minute
python benchmarks/speed.py --output docs/benchmark.md       # the table of the documentation
"""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from diffusers import DDPMPipeline, DDPMScheduler, EMAModel
from diffusers.optimization import get_constant_schedule_with_warmup
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn.functional import mse_loss

from ddpm_ext.cli.arguments import parse_options
from ddpm_ext.data.dataset import ImageSet
from ddpm_ext.diffusion.images import to_uint8
from ddpm_ext.distributed import make_accelerator
from ddpm_ext.models.unet import build_unet, unet_config
from ddpm_ext.options import option
from ddpm_ext.pipelines.ddpm import DDPMExtPipeline
from ddpm_ext.pipelines.sampling import save_png
from ddpm_ext.run_dir import RunDir, environment
from ddpm_ext.schedulers.ddpm import DDPMExtScheduler
from ddpm_ext.training.config import TrainConfig
from ddpm_ext.training.presets import PRESETS
from ddpm_ext.training.setup import make_trainer

SHAPES = ((1, 3, 32, 32), (64, 3, 32, 32), (16, 3, 256, 256))
MIDDLE = 500  # the timestep of the single steps: what happens there happens everywhere but at the last
TURN_SECONDS = 0.05  # a turn repeats a call until about this long

Call = Callable[[], Any]


@dataclass(frozen=True)
class BenchmarkOptions:
    """What is measured and where it is written."""

    output: str = option("runs/benchmark.md", "Markdown file to write.")
    quick: bool = option(False, "A few turns only: numbers to look at, not to keep.")
    num_threads: int = option(1, "CPU threads, for both sides and every row.")


class Row(NamedTuple):
    """Median seconds of one call."""

    name: str
    ours: float
    stock: float
    noise: float = math.nan  # of drawing the noise alone, which both do alike

    @property
    def ratio(self) -> float:
        """Stock's time over ours."""
        return self.stock / self.ours

    @property
    def ratio_without_noise(self) -> float:
        """The same, with the time of the noise taken from both."""
        return (self.stock - self.noise) / (self.ours - self.noise)


def run_benchmark(options: BenchmarkOptions) -> str:
    """Measure everything; the report as markdown."""
    torch.set_num_threads(options.num_threads)
    turns = 5 if options.quick else 41
    rows = [row for shape in SHAPES for row in scheduler_rows(shape, turns)]
    rows += set_up_rows(turns)
    preset = PRESETS["cifar10-small"].config
    rows.append(training_row(preset, 3 if options.quick else 21, options.num_threads))
    rows.append(sampling_row("cifar10-small", 4, 50, 1 if options.quick else 5))
    rows.append(import_row(1 if options.quick else 5))
    return markdown(rows, options)


def by_turns(calls: Sequence[Call], turns: int) -> list[float]:
    """Median seconds of each call, measured A B C A B C …, after one round that does not count."""
    repeats = []
    for call in calls:
        call()
        repeats.append(max(1, round(TURN_SECONDS / max(seconds(call, 1), 1e-7))))
    measured = [[seconds(call, n) for call, n in zip(calls, repeats, strict=True)] for _ in range(turns)]
    return [median(column) for column in zip(*measured, strict=True)]


def seconds(call: Call, repeats: int) -> float:
    """Mean seconds of a call."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


# -- the scheduler -----------------------------------------------------------------------------------------------------


def scheduler_rows(shape: tuple[int, ...], turns: int) -> list[Row]:
    """`step` with a generator, `add_noise` and `get_velocity` with one timestep per image."""
    x, eps = torch.randn(2, *shape).unbind()
    t, times = torch.tensor(MIDDLE), torch.randint(1000, shape[:1])
    ours, stock = DDPMExtScheduler(), DDPMScheduler()
    generators = [torch.Generator().manual_seed(0) for _ in range(3)]
    size = "×".join(map(str, shape))

    def step(scheduler: Any, generator: torch.Generator) -> Call:
        return lambda: scheduler.step(eps, t, x, generator=generator)

    def noise() -> Tensor:
        return randn_tensor(shape, generator=generators[2])

    calls = [step(ours, generators[0]), step(stock, generators[1]), noise]
    rows = [Row(f"`step`, {size}", *by_turns(calls, turns))]
    for name in ("add_noise", "get_velocity"):
        pair = [getattr(scheduler, name) for scheduler in (ours, stock)]
        calls = [lambda f=f: f(x, eps, times) for f in pair]
        rows.append(Row(f"`{name}`, {size}", *by_turns(calls, turns)))
    return rows


def set_up_rows(turns: int) -> list[Row]:
    """What comes before the steps, by itself and with the steps of the smallest chain that it prepares."""
    kinds = (DDPMExtScheduler, DDPMScheduler)
    made = [kind() for kind in kinds]
    x, eps = torch.randn(2, *SHAPES[0]).unbind()

    def chain(scheduler: Any) -> None:
        scheduler.set_timesteps(50)
        for t in scheduler.timesteps:
            scheduler.step(eps, t, x)

    return [
        Row("`set_timesteps(50)` and 50 `step`s", *by_turns([lambda s=s: chain(s) for s in made], turns)),
        Row("`set_timesteps(50)` alone", *by_turns([lambda s=s: s.set_timesteps(50) for s in made], turns)),
        Row("making a scheduler", *by_turns(kinds, turns)),
    ]


def import_row(turns: int) -> Row:
    """Importing network, scheduler and pipeline in fresh processes, as the seconds of CPU that each takes."""

    def cpu_seconds(code: str) -> float:
        before = os.times()
        subprocess.run([sys.executable, "-c", code], check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    codes = (
        "from ddpm_ext import build_unet, DDPMExtScheduler, DDPMExtPipeline",
        "from diffusers import UNet2DModel, DDPMScheduler, DDPMPipeline",
    )
    measured = [[cpu_seconds(code) for code in codes] for _ in range(turns)]
    return Row("import of network, scheduler and pipeline, CPU time", *map(median, zip(*measured, strict=True)))


# -- training and sampling ---------------------------------------------------------------------------------------------


def training_row(preset: TrainConfig, turns: int, num_threads: int) -> Row:
    """One update from decoded images to averaged weights: our trainer beside a plain loop with stock parts."""
    assert preset.unet is not None
    with tempfile.TemporaryDirectory() as folder:
        network = unet_config(preset.unet)
        write_pictures(Path(folder, "pictures"), network)
        config = dataclasses.replace(
            preset,
            dataset_name=None,
            train_data_dir=str(Path(folder, "pictures")),
            output_dir=str(Path(folder, "run")),
            cache_dir=str(Path(folder, "cache")),
            num_threads=num_threads,
            cpu=True,
        )
        run = RunDir(str(config.output_dir))
        trainer = make_trainer(config, make_accelerator(config, run), run)
        assert isinstance(trainer.data, ImageSet)
        pixels = trainer.data.batch(range(len(trainer.data))).pixels
        calls = [trainer.update, stock_update(config, pixels)]
        name = f"training update, `{preset.unet}`, batch {trainer.plan.global_batch}"
        return Row(name, *by_turns(calls, turns))


def write_pictures(folder: Path, network: dict[str, Any], number: int = 256) -> None:
    """Random pictures of the network's size."""
    folder.mkdir()
    channels, size = network.get("in_channels", 3), network["sample_size"]
    generator = torch.Generator().manual_seed(0)
    for i in range(number):
        x_0 = torch.rand(size, size, channels, generator=generator) * 2 - 1
        save_png(to_uint8(x_0).numpy(), folder / f"{i}.png")


def stock_update(config: TrainConfig, pixels: Tensor) -> Call:
    """The update that Diffusers' examples write, with the same network and hyper-parameters, in plain PyTorch."""
    assert config.unet is not None
    unet = build_unet(config.unet, seed=config.seed, dropout=config.dropout).train()
    scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )
    lr_scheduler = get_constant_schedule_with_warmup(optimizer, config.lr_warmup_steps)
    ema = EMAModel(unet.parameters(), decay=config.ema_max_decay)
    batch_size = config.global_batch_size or config.train_batch_size

    def update() -> None:
        clean = pixels[torch.randint(len(pixels), (batch_size,))].float() / 127.5 - 1
        if config.random_flip:
            clean = torch.where(torch.rand(batch_size, 1, 1, 1) < 0.5, clean.flip(-1), clean)
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (batch_size,))
        noisy = scheduler.add_noise(clean, noise, t)  # pyright: ignore[reportArgumentType]
        loss = mse_loss(unet(noisy, t).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), config.max_grad_norm or math.inf)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())

    return update


def sampling_row(unet: str, batch_size: int, steps: int, turns: int) -> Row:
    """Images from noise with the two pipelines around one network."""
    network = build_unet(unet).eval()
    pipelines = DDPMExtPipeline(network, DDPMExtScheduler()), DDPMPipeline(network, DDPMScheduler())
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
    calls = [
        lambda p=p: p(batch_size, torch.Generator().manual_seed(0), num_inference_steps=steps, output_type="np")
        for p in pipelines
    ]
    return Row(f"{steps} sampling steps, `{unet}`, batch {batch_size}", *by_turns(calls, turns))


# -- the report --------------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row], options: BenchmarkOptions) -> str:
    """The table, and what made it."""
    made_by = environment()
    versions = ", ".join(f"{name} {number}" for name, number in made_by["versions"].items())
    hardware = made_by["hardware"]
    lines = [
        "# Speed beside Diffusers",
        "",
        "`make bench`, or `python benchmarks/speed.py`: median time of one call, measured by turns in one process. "
        "The ratio is Diffusers' time over ours; the last column is the ratio with the time of drawing the noise, "
        "which both do alike, taken from both.",
        "",
        f"- Machine: {hardware['processor']} ({hardware['machine']}, {hardware['cores']} cores), "
        f"{options.num_threads} thread{'s' if options.num_threads > 1 else ''} for every row",
        f"- Versions: {versions}",
        f"- Commit: {made_by['commit'] or 'unknown'}{', --quick' if options.quick else ''}",
        "- Training: the same network, dropout, flips, clipping, AdamW numbers and average on both sides. Diffusers' "
        "is a plain loop with DDPMScheduler, torch.optim.AdamW and EMAModel in their defaults; ours is "
        "`Trainer.update` with the defaults of `ddpm-ext train`.",
        "- Setting up: our scheduler computes all weights of a chain in float64 when it is made and when its timesteps "
        "are chosen, which costs about a millisecond once; Diffusers' computes them anew at every step, in float32.",
        "",
        "| | ddpm_ext | Diffusers | ratio | ratio without noise |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        net = "" if math.isnan(row.noise) else f"{row.ratio_without_noise:.2f}"
        lines.append(f"| {row.name} | {shown(row.ours)} | {shown(row.stock)} | {row.ratio:.2f} | {net} |")
    return "\n".join(lines) + "\n"


def shown(value: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def main() -> None:
    """Measure, write the table and print it."""
    options = parse_options(BenchmarkOptions, "Measure the speed of ddpm_ext beside installed Diffusers.")
    report = run_benchmark(options)
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report, encoding="utf-8")
    print(f"{report}\nWritten to {path}.")


if __name__ == "__main__":
    main()
