"""Everything that a machine with a GPU can tell, in one command and a stated number of minutes.

python -m benchmarks.gpu --minutes 30 --data ../data/cifar10     # from the repository; writes docs/gpu/<card>.md
python -m benchmarks.gpu --rehearse --minutes 5                  # tiny sizes, the simulated device: no GPU needed

Four parts, each in a process of its own with a time of its own, so that what fails or hangs costs nothing else: the
tests marked gpu; training beside Diffusers' loop; 50 sampling steps with and without compilation and CUDA graphs;
a CIFAR-10 run with its card. The page is written anew after each part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import DDPMPipeline, DDPMScheduler, EMAModel
from diffusers.optimization import get_constant_schedule_with_warmup
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.functional import mse_loss
from torch.profiler import ProfilerActivity, profile

from ddpm_ext.cli.arguments import parse_options
from ddpm_ext.models.unet import build_unet, unet_config
from ddpm_ext.options import option
from ddpm_ext.pipelines.ddpm import DDPMExtPipeline
from ddpm_ext.run_dir import read_json
from ddpm_ext.schedulers.ddpm import DDPMExtScheduler
from ddpm_ext.training.config import TrainConfig
from ddpm_ext.training.plan.forecast import ACCELERATORS, Forecast, forecast
from ddpm_ext.training.presets import PRESETS

from .gpu_page import Row, markdown

ROOT = Path(__file__).resolve().parent.parent
# Part -> share of the whole time and the most seconds that it gets; the last takes what is left.
PARTS: dict[str, tuple[float, float]] = {
    "tests": (0.2, 180),
    "training": (0.45, 360),
    "sampling": (0.25, 240),
    "cifar10": (1.0, math.inf),
}
SAMPLING_STEPS = 50
LONG = 12.0  # minutes of the whole from which on the run is measured at some length
COMPILE_SECONDS = {"training": 100, "sampling": 35}  # a row that compiles is not begun with less time left

Note = Callable[[Row], None]


@dataclass(frozen=True, kw_only=True)
class GpuOptions:
    """What is measured, for how long, and where it is written."""

    minutes: float = option(30.0, "Minutes of the whole; CIFAR-10 trains in what the other parts leave.")
    data: str | None = option(None, "Local folder of CIFAR-10, as of images or parquet files; none: no CIFAR-10 run.")
    output: str | None = option(None, "Markdown file to write; none: docs/gpu/<card>.md.")
    extractor: str = option("pixels", "Features of the CIFAR-10 run's Fréchet distance, as of `ddpm-ext evaluate`.")
    parts: str = option(",".join(PARTS), "Which parts, separated by commas; the page keeps the rows of the others.")
    batch_size: int = option(128, "Images of a training update.")
    rehearse: bool = option(False, "Tiny sizes on the simulated accelerator: shows that every part runs.")
    part: str | None = option(None, "Inner use: run this part in this process.")
    results: str | None = option(None, "Inner use: file to which the part adds its rows.")
    seconds: float = option(60.0, "Inner use: seconds that the part has.")

    def __post_init__(self) -> None:
        if self.minutes <= 0 or self.batch_size < 1:
            raise ValueError(f"minutes and batch_size must be positive, got {self.minutes} and {self.batch_size}.")
        for name in self.parts.split(","):
            if name not in PARTS:
                raise ValueError(f"parts must be of {', '.join(PARTS)}, got {name!r}.")


class Budget:
    """Seconds that are left of a number of them."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left; negative when they are over."""
        return self.end - time.monotonic()


# -- the device --------------------------------------------------------------------------------------------------------


def use_simulator() -> None:
    """Make the simulated accelerator of the tests Accelerate's device in this process."""
    sys.path.insert(0, str(ROOT / "tests"))
    from accelerator import install  # pyright: ignore[reportMissingImports]

    install()


def device_of(options: GpuOptions) -> torch.device:
    """The device that is measured."""
    if options.rehearse:
        return torch.device("sim", 0)
    return torch.device("cuda", 0)


def card_name(options: GpuOptions) -> str:
    """The card in the words of its driver."""
    return "simulated" if options.rehearse else torch.cuda.get_device_name(0)


def kind_of(card: str) -> str | None:
    """The word of the forecast's table that a card's name holds; None where it holds none."""
    name = card.lower().replace(" ", "").replace("-", "")
    found = [kind for kind in ACCELERATORS if kind.replace("-", "") in name]
    return max(found, key=len) if found else None


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fresh_memory(device: torch.device) -> None:
    """Give back what is cached and count the peak from here."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        with contextlib.suppress(RuntimeError):  # a statistic that cannot be had costs no row
            torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """Peak of the memory that tensors took, GiB."""
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.max_memory_allocated(device) / 2**30
    except RuntimeError:
        return None


def timed(call: Callable[[], Any], device: torch.device, seconds: float, warm_up: int) -> tuple[float, int]:
    """Seconds of one call after `warm_up` others, over about so many seconds; and the number of calls."""
    for _ in range(warm_up):
        call()
    synchronize(device)
    start, calls = time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - start < seconds:
        call()
        calls += 1
        if calls % 5 == 0:
            synchronize(device)  # else the host runs ahead of the clock
    synchronize(device)
    return (time.perf_counter() - start) / calls, calls


def device_work(call: Callable[[], Any], device: torch.device) -> Row:
    """Milliseconds for which one call keeps the card busy, and its launches; nothing elsewhere.

    Where the card is busy for less than the call takes, it waits for the host.
    """
    if device.type != "cuda":
        return {}
    calls = 3
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(calls):
            call()
        synchronize(device)
    rows = found.key_averages()
    busy = sum(row.self_device_time_total for row in rows if row.device_type == DeviceType.CUDA)  # µs
    launches = sum(row.count for row in rows if "Launch" in row.key and row.device_type == DeviceType.CPU)
    return {"busy_ms": busy / calls / 1e3, "launches": launches / calls}


@contextlib.contextmanager
def guarded(row: Row, note: Note) -> Iterator[Row]:
    """Note a row with what was measured, or with the error that ended it."""
    start = time.monotonic()
    try:
        yield row
    except Exception as error:  # one row must not lose the others
        row["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[
            :300
        ]
    row["took_seconds"] = round(time.monotonic() - start, 1)
    note(row)
    gc.collect()


# -- tests -------------------------------------------------------------------------------------------------------------


def run_tests(options: GpuOptions, budget: Budget, note: Note) -> None:
    """Run the tests marked gpu; in a rehearsal only collect them."""
    files = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-W", "default", *files]
    if options.rehearse:
        words.append("--collect-only")
    with guarded({"name": "tests marked gpu", "files": len(files)}, note) as row:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=budget.left, check=False)
        lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"]
        row["result"] = lines[-1].strip("= ")
        row["failed"] = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        if done.returncode not in (0, 5):
            row["error"] = f"exit code {done.returncode}"
            row["output"] = "\n".join(lines[-30:])


# -- training ----------------------------------------------------------------------------------------------------------


def run_training(options: GpuOptions, budget: Budget, note: Note) -> None:
    """Time updates of our trainer and of Diffusers' loop on one network, data in memory."""
    for code, precision, compiled in (
        ("ddpm_ext", "bf16", False),
        ("Diffusers", "bf16", False),
        ("ddpm_ext", "no", False),
        ("ddpm_ext", "bf16", True),
        ("Diffusers", "bf16", True),
    ):
        row: Row = {"code": code, "precision": precision, "compile": compiled, "batch": options.batch_size}
        with guarded(row, note), tempfile.TemporaryDirectory() as folder:
            check_compiler(compiled, options, budget, "training")
            time_training(row, training_config(options, Path(folder), precision, compiled), options, budget)


def check_compiler(wanted: bool, options: GpuOptions, budget: Budget, part: str) -> None:
    """Raise where a row is to be compiled and cannot be, or not in time."""
    if wanted and options.rehearse:
        raise NotImplementedError("the simulated device has no compiler")
    if wanted and budget.left < COMPILE_SECONDS[part]:
        raise TimeoutError("no time left to compile")


def time_training(row: Row, config: TrainConfig, options: GpuOptions, budget: Budget) -> None:
    """Add to a row what its updates take."""
    device = device_of(options)
    fresh_memory(device)
    start = time.perf_counter()
    update = (our_update if row["code"] == "ddpm_ext" else diffusers_update)(config, device)
    update()
    synchronize(device)
    row["first_seconds"] = time.perf_counter() - start  # building, and compiling where asked for
    seconds, row["updates"] = timed(update, device, min(6.0, max(1.0, budget.left / 15)), warm_up=4)
    row["images_per_second"] = options.batch_size / seconds
    row["peak_gib"] = peak_gib(device)
    row |= device_work(update, device)
    row |= beside(config.mixed_precision, options, row["images_per_second"])


def training_config(options: GpuOptions, folder: Path, precision: str, compiled: bool) -> TrainConfig:
    """The paper's CIFAR-10 training on random images in memory, at the settings of a row."""
    from .speed import write_pictures

    preset = PRESETS["digits" if options.rehearse else "cifar10"].config
    write_pictures(folder / "pictures", unet_config(str(preset.unet)))
    return dataclasses.replace(
        preset,
        dataset_name=None,
        train_data_dir=str(folder / "pictures"),
        output_dir=str(folder / "run"),
        cache_dir=str(folder / "cache"),
        train_batch_size=options.batch_size,
        global_batch_size=options.batch_size,
        mixed_precision=precision,
        allow_tf32=True,
        channels_last=True,
        fused_optimizer=True,
        compile=compiled,
        logging_steps=100,
    )


def our_update(config: TrainConfig, device: torch.device) -> Callable[[], Any]:
    """`Trainer.update`."""
    from accelerate.state import AcceleratorState, GradientState

    from ddpm_ext.distributed import make_accelerator
    from ddpm_ext.run_dir import RunDir
    from ddpm_ext.training.setup import make_trainer

    AcceleratorState._reset_state(reset_partial_state=True)  # it holds the precision of the row before
    GradientState._reset_state()
    run = RunDir(str(config.output_dir))
    trainer = make_trainer(config, make_accelerator(config, run), run)
    assert trainer.accelerator.device.type == device.type
    return trainer.update


def diffusers_update(config: TrainConfig, device: torch.device) -> Callable[[], Any]:
    """The loop of Diffusers' train_unconditional.py with the same network, batch, precision and fused Adam.

    Its images are on the device already, which spares it the DataLoader; like the script it reads the loss back at
    every update and averages with EMAModel.
    """
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    unet: Any = build_unet(str(config.unet), seed=0, dropout=config.dropout).train()
    unet = unet.to(device).to(memory_format=torch.channels_last)
    size, channels, batch = unet.config["sample_size"], unet.config["in_channels"], config.train_batch_size
    pixels = torch.randint(0, 256, (256, channels, size, size), dtype=torch.uint8).to(device)
    scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True)
    lr_scheduler = get_constant_schedule_with_warmup(optimizer, config.lr_warmup_steps)
    ema = EMAModel(unet.parameters(), decay=config.ema_max_decay)
    network = torch.compile(unet) if config.compile else unet
    half = contextlib.nullcontext
    if config.mixed_precision == "bf16" and device.type == "cuda":
        half = lambda: torch.autocast(device.type, torch.bfloat16)  # noqa: E731

    def update() -> None:
        clean = pixels[torch.randint(len(pixels), (batch,), device=device)].float() / 127.5 - 1
        clean = clean.contiguous(memory_format=torch.channels_last)
        clean = torch.where(torch.rand(batch, 1, 1, 1, device=device) < 0.5, clean.flip(-1), clean)
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (batch,), device=device)
        noisy = scheduler.add_noise(clean, noise, t)  # pyright: ignore[reportArgumentType]
        with half():
            output = network(noisy, t).sample
        loss = mse_loss(output.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        loss.detach().item()

    return update


def beside(precision: str, options: GpuOptions, images_per_second: float) -> Row:
    """Model FLOPs utilisation, and the forecast of the same settings; nothing for a card that the table lacks."""
    found = forecast_of(precision, options)
    if found is None:
        return {}
    achieved = images_per_second * found.costs.flops_per_image / 1e12
    return {
        "tflops": achieved,
        "mfu": achieved / found.tflops,
        "forecast_gib": found.peak / 2**30,
        "forecast_images_per_second": found.images_per_second,
        "utilisation": found.utilisation,
    }


@lru_cache
def forecast_of(precision: str, options: GpuOptions) -> Forecast | None:
    """The forecast of a row's training on this card."""
    kind = kind_of(card_name(options))
    with tempfile.TemporaryDirectory() as folder:
        return None if kind is None else forecast(training_config(options, Path(folder), precision, False), kind)


# -- sampling ----------------------------------------------------------------------------------------------------------


def run_sampling(options: GpuOptions, budget: Budget, note: Note) -> None:
    """Time 50 steps of the two pipelines, and of ours as a CUDA graph, compiled, and with both."""
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    dtype = torch.float32 if options.rehearse else torch.bfloat16
    plain: dict[int, Tensor] = {}
    # What can fail or last longest comes last: a capture that fails may leave the device unusable to this process.
    for name, stock, compiled, graph in (
        ("ddpm_ext", False, False, False),
        ("Diffusers", True, False, False),
        ("ddpm_ext, compiled", False, True, False),
        ("ddpm_ext, CUDA graph", False, False, True),
        ("ddpm_ext, compiled, CUDA graph", False, True, True),
    ):
        for batch in (2,) if options.rehearse else (64, 1):
            row: Row = {"name": name, "batch": batch, "steps": 2 if options.rehearse else SAMPLING_STEPS}
            row["dtype"] = str(dtype).removeprefix("torch.")
            with guarded(row, note):
                check_compiler(compiled, options, budget, "sampling")
                if graph and options.rehearse:
                    raise NotImplementedError("the simulated device has no graphs")
                fresh_memory(device_of(options))
                time_sampling(row, (stock, compiled, graph), device_of(options), dtype, budget, plain)


def time_sampling(
    row: Row,
    kind: tuple[bool, bool, bool],
    device: torch.device,
    dtype: torch.dtype,
    budget: Budget,
    plain: dict[int, Tensor],
) -> None:
    """Add to a row what its images take, and how far they are from the plain ones."""
    start = time.perf_counter()
    call = sampler(row, *kind, device, dtype)
    images = call()
    row["first_seconds"] = time.perf_counter() - start  # building, compiling and recording
    if row["name"] != "Diffusers":
        difference = images - plain.setdefault(row["batch"], images)
        row["largest_difference"] = float(difference.abs().max()) * 255
    seconds, row["calls"] = timed(call, device, min(4.0, max(0.5, budget.left / 20)), warm_up=1)
    row["images_per_second"] = row["batch"] / seconds
    row["step_ms"] = seconds / row["steps"] * 1e3
    row["peak_gib"] = peak_gib(device)


def sampler(
    row: Row, stock: bool, compiled: bool, graph: bool, device: torch.device, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """A call that samples a batch with random weights, on the CPU in [0, 1]."""
    name = "digits" if device.type == "sim" else "cifar10"
    network: Any = build_unet(name, seed=0, init="torch").eval()
    network = network.to(device, dtype).to(memory_format=torch.channels_last)
    if compiled:
        network.compile(dynamic=False)
    if graph:
        record_graph(network, row["batch"], device, dtype)
    pipeline: Any = DDPMPipeline(network, DDPMScheduler()) if stock else DDPMExtPipeline(network, DDPMExtScheduler())
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)

    def call() -> Tensor:
        generator = torch.Generator(device).manual_seed(0)
        # "np" would fail in stock: NumPy has no bfloat16.
        found = pipeline(row["batch"], generator, num_inference_steps=row["steps"], output_type="pt")
        return found.images.float().cpu()

    return call


def record_graph(network: Any, batch: int, device: torch.device, dtype: torch.dtype) -> None:
    """Record the network's forward pass once and let `forward` replay it."""
    size = network.config["sample_size"]
    x = torch.zeros(batch, network.config["in_channels"], size, size, device=device, dtype=dtype)
    t, forward = torch.zeros((), dtype=torch.int64, device=device), network.forward
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            forward(x, t)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = forward(x, t)

    def replay(sample: Tensor, timestep: Tensor, *_: Any, **__: Any) -> Any:
        x.copy_(sample)
        t.copy_(timestep)
        graph.replay()
        return output

    network.forward = replay


# -- CIFAR-10 ----------------------------------------------------------------------------------------------------------


def run_cifar10(options: GpuOptions, budget: Budget, note: Note) -> None:
    """Train on CIFAR-10 for the time that is left, measure the result briefly and write its card beside the page."""
    page = page_of(options)
    folder = page.parent / f"{page.stem}-cifar10"
    if options.data is None and not options.rehearse:
        note({"name": "CIFAR-10", "skipped": "no --data"})
        return
    run = Path(tempfile.mkdtemp(prefix="ddpm-ext-gpu-")) / "cifar10"
    row: Row = {"name": "CIFAR-10", "card": str(Path(folder.name) / "README.md")}
    try:
        with guarded(row, note):
            reserve = 45 + 0.2 * budget.left  # start, decoding, the last grid, evaluation, card
            rate, compiled = measured_rate(options, budget.left - reserve)
            updates = 2 if options.rehearse else max(2, int((budget.left - reserve) * 0.8 * rate / options.batch_size))
            row |= {"updates": updates, "expected_rate": rate, "compiled": compiled}
            command(options, "train", budget.left - 5, **cifar10_options(options, run, updates, compiled))
            log = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
            status = read_json(run / "status.json")
            row |= {"status": status["status"], "update": status["update"], "loss": log[-1]["loss"] if log else None}
            row["images_per_second"] = max((line["images_per_second"] for line in log), default=None)
            if (run / "pipeline").exists():
                with contextlib.suppress(subprocess.SubprocessError, OSError):
                    command(options, "evaluate", budget.left - 5, **evaluation_options(options, run))
                write_card(run, folder, row)
    finally:
        shutil.rmtree(run.parent, ignore_errors=True)


def cifar10_options(options: GpuOptions, run: Path, updates: int, compiled: bool) -> dict[str, Any]:
    """Options of the training command."""
    if options.rehearse:
        return {"preset": "digits", "max_train_steps": updates, "ddpm_num_inference_steps": 2, "output_dir": run}
    short = updates < 50_000  # the paper's average needs some 10,000 updates to forget the first weights
    return {
        "preset": "cifar10",
        "dataset_name": options.data,
        "max_train_steps": updates,
        "train_batch_size": options.batch_size,
        "mixed_precision": "bf16",
        "allow_tf32": True,
        "compile": compiled,
        "lr_warmup_steps": min(5000, updates // 10),
        "ema_max_decay": 0.999 if short else 0.9999,
        "ddpm_num_inference_steps": 100 if short else 1000,
        "dataloader_num_workers": min(8, os.cpu_count() or 1),
        "logging_steps": max(1, min(100, updates // 20)),
        "checkpointing_steps": 10**9,
        "output_dir": run,
    }


def evaluation_options(options: GpuOptions, run: Path) -> dict[str, Any]:
    """Options of a brief evaluation: a distance between pixels and bits/dim of some test images."""
    if options.rehearse:
        return {
            "model": run / "pipeline",
            "metrics": "fid",
            "extractor": "pixels",
            "num_samples": 40,
            "num_inference_steps": 2,
            "batch_size": 20,
        }
    brief = {"metrics": "fid", "num_samples": 2000, "max_reference_images": 10000}
    full = {"metrics": "bpd,fid", "num_samples": 5000, "max_bpd_images": 256, "num_timesteps_sampled": 50}
    return {
        "model": run / "pipeline",
        "dataset_name": options.data,
        "extractor": options.extractor,
        "num_inference_steps": 100,
        **(brief if options.minutes < LONG else full),
    }


def measured_rate(options: GpuOptions, seconds: float) -> tuple[float, bool]:
    """Images/s that our bf16 training is to reach in so many seconds, by the rows measured before, and if compiled.

    Compiled where that makes more images in the time, compiling counted; a slow guess where nothing was measured.
    """
    rates = [
        (row["images_per_second"] * max(0.0, 1 - row["first_seconds"] / seconds), bool(row["compile"]))
        for row in read_rows(options).get("training", [])
        if "images_per_second" in row and (row["code"], row["precision"]) == ("ddpm_ext", "bf16")
    ]
    return max(rates, default=(500.0, False))


def command(options: GpuOptions, name: str, seconds: float, **words: Any) -> None:
    """Run `ddpm-ext NAME` in a process of its own, on the simulated device in a rehearsal.

    Raises:
        subprocess.SubprocessError: it failed, or was not done in time; its last lines are the message.
    """
    loader = "from benchmarks.gpu import use_simulator; use_simulator(); " if options.rehearse else ""
    code = f"import sys; {loader}from ddpm_ext.cli.main import main; sys.exit(main(sys.argv[1:]))"
    flags = [f"--{key}={value}" for key, value in words.items()]
    done = subprocess.run(
        [sys.executable, "-c", code, name, *flags], cwd=ROOT, capture_output=True, text=True, timeout=max(seconds, 1)
    )
    if done.returncode:
        last = " | ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise subprocess.SubprocessError(f"ddpm-ext {name} ended with {done.returncode}: {last}")


def write_card(run: Path, folder: Path, row: Row) -> None:
    """The model card, its images and the files behind its numbers."""
    from ddpm_ext.publishing.model_card import export_card

    shutil.rmtree(folder, ignore_errors=True)
    export_card(run, folder, repo_id=folder.name)
    row["card_written"] = True
    results = read_json(run / "eval.json") if (run / "eval.json").exists() else {}
    row["evaluation"] = (run / "eval.md").read_text("utf-8") if results and (run / "eval.md").exists() else None


# -- the whole ---------------------------------------------------------------------------------------------------------

RUN = {"tests": run_tests, "training": run_training, "sampling": run_sampling, "cifar10": run_cifar10}


def page_of(options: GpuOptions) -> Path:
    """The page to write: the one named, or that of the card."""
    if options.output is not None:
        return Path(options.output)
    return ROOT / "docs" / "gpu" / f"{re.sub(r'[^a-z0-9]+', '-', card_name(options).lower()).strip('-')}.md"


def command_words(options: GpuOptions) -> str:
    """What the page says of the command."""
    rehearsal = " `--rehearse`: a rehearsal on the simulated device, no number here means anything"
    return f"`make gpu`, or `python -m benchmarks.gpu --minutes {options.minutes:g}`" + rehearsal * options.rehearse


def rows_file(options: GpuOptions) -> Path:
    """Where the parts note their rows, one JSON record a line."""
    return Path(options.results) if options.results else page_of(options).with_suffix(".jsonl")


def read_rows(options: GpuOptions) -> dict[str, list[Row]]:
    """The rows noted so far, by part."""
    found: dict[str, list[Row]] = {}
    path = rows_file(options)
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        record = json.loads(line)
        found.setdefault(record["part"], []).append(record)
    return found


def run_part(options: GpuOptions) -> int:
    """Run one part in this process, each row noted as soon as it is there."""
    part = str(options.part)
    if options.rehearse:
        use_simulator()
    torch.zeros(1, device=device_of(options))  # CUDA is initialised: its memory statistics ask for that

    def note(row: Row) -> None:
        print(json.dumps(row), flush=True)
        with rows_file(options).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"part": part, **row}) + "\n")

    started = time.time() - psutil.Process().create_time()  # importing took it from the part's time
    RUN[part](options, Budget(options.seconds - started - 2), note)
    return 0


def run_all(options: GpuOptions) -> int:
    """Run the parts one after the other and write the page after each."""
    budget, page, rows = Budget(options.minutes * 60), page_of(options), rows_file(options)
    page.parent.mkdir(parents=True, exist_ok=True)
    asked = options.parts.split(",")
    kept = [row for part, found in read_rows(options).items() if part not in asked for row in found]
    rows.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    for part in asked:
        share, most = PARTS[part]
        seconds = (
            budget.left - 5
            if part == asked[-1]
            else min(max(60, min(most, share * options.minutes * 60)), budget.left - 5)
        )
        print(f"== {part}, at most {seconds:.0f} s", flush=True)
        if seconds < 5:
            outcome = "no time was left"
        else:
            outcome = run_guarded(options, part, seconds)
        if outcome is not None:
            print(f"== {part}: {outcome}", flush=True)
            with rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"part": part, "name": "the part", "error": outcome}) + "\n")
        page.write_text(markdown(card_name(options), command_words(options), read_rows(options)), encoding="utf-8")
    print(page.read_text("utf-8"))
    print(f"Written to {page}, the rows to {rows}.")
    return 0


def run_guarded(options: GpuOptions, part: str, seconds: float) -> str | None:
    """Run a part in a process group of its own; None, or why it did not end well."""
    given = {**dataclasses.asdict(options), "part": part, "seconds": seconds, "results": rows_file(options)}
    flags = [f"--{key}={value}" for key, value in given.items() if value is not None and value is not False]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", **os.environ}  # everything is at hand
    words = [sys.executable, "-m", "benchmarks.gpu", *flags]
    process = subprocess.Popen(words, cwd=ROOT, start_new_session=True, env=offline)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold on to it: then it ends by itself
            process.wait(10)
        return f"stopped after {seconds:.0f} s, its whole time"
    return None if code == 0 else f"ended with exit code {code}"


def main() -> int:
    """Run what the command line asks for."""
    options = parse_options(GpuOptions, __doc__ or "")
    if not options.rehearse and not torch.cuda.is_available():
        raise SystemExit("error: there is no CUDA device here; --rehearse runs tiny sizes on a simulated one.")
    return run_all(options) if options.part is None else run_part(options)


if __name__ == "__main__":
    sys.exit(main())
