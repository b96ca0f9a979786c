"""Large sets, end to end: time to the first update, images/s, memory; beside Diffusers' train_unconditional.py.

    python benchmarks/volume.py --folder /data/volume --script train_unconditional.py     # 200,000 images of 64 x 64
    python benchmarks/volume.py --folder /data/volume --script train_unconditional.py --num_images 2000

Every row is the training command itself in a fresh process, twice: with nothing prepared, then again. Its clock runs
from the start of the process to the end of the first update of a tiny network; then the batches of its own data set or
DataLoader are counted for some seconds. The script is that of Diffusers' repository and needs torchvision. The set is
written once, as parquet shards and as loose JPEG files. What was measured is kept beside it: run again, a broken
measurement goes on.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import NoReturn

import numpy as np
import psutil
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

from ddpm_ext.cli.arguments import parse_options
from ddpm_ext.models.unet import build_unet
from ddpm_ext.options import option, required

SHARD, BATCH = 10_000, 64
COLUMNS = ("first update, s", "again, s", "images/s delivered", "memory, MiB", "with mapped files, MiB")
FORMS = {"parquet": "shards", "loose files": "files"}
LOADERS = ("decoded once and mapped", "--streaming", "Diffusers' script")
NETWORK = {  # the smallest there is: what is measured is how images reach it
    "sample_size": 64,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}


@dataclass(frozen=True)
class VolumeOptions:
    """What is measured and where it is written."""

    folder: str = required("Where sets and results are kept, about 4 KB an image and 12 KB while it is measured.")
    script: str | None = option(None, "Diffusers' train_unconditional.py; none: its rows are left out.")
    num_images: int = option(200_000, "Images of 64 x 64.", at_least=BATCH)
    seconds: float = option(10.0, "How long batches are counted.", above=0)
    workers: int = option(2, "--dataloader_num_workers of every row: threads of ours, processes of the script.")
    output: str = option("runs/volume.md", "Markdown file to write.")
    row: str | None = option(None, "The one row that this process measures, as the command itself starts it.")
    started: float = option(0.0, "When that process was started, in seconds since 1970.")

    @property
    def place(self) -> Path:
        """Where the set of this size lies."""
        return Path(self.folder) / str(self.num_images)


# The set --------------------------------------------------------------------------------------------------------------


def write_set(folder: Path, count: int) -> None:
    """Write the same images as parquet shards and as files; shards that are there are not written again."""
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(_write_shard, folder, count), range(-(-count // SHARD))))


def _write_shard(folder: Path, count: int, shard: int) -> None:
    """Write one parquet file and its images as files; the parquet file comes last and by renaming."""
    import datasets

    table = folder / "shards" / f"train-{shard:05}-of-{-(-count // SHARD):05}.parquet"
    if table.exists():
        return
    waves = np.sin(np.linspace(0, 6, 64))
    noise = np.random.default_rng(shard).normal(128, 20, size=(64 + 97, 64, 3))
    cells = []
    for i in range(shard * SHARD, min(count, (shard + 1) * SHARD)):
        pixels = noise[i % 97 :][:64] + (60 * np.outer(waves, np.roll(waves, i % 64)))[..., None] + i % 31
        file = BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=85)
        loose = folder / "files" / f"{i // 1000:04}" / f"{i:07}.jpg"
        loose.parent.mkdir(parents=True, exist_ok=True)
        loose.write_bytes(file.getvalue())
        cells.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features=features).to_parquet(f"{table}.part")
    os.rename(f"{table}.part", table)


# One row, in its own process ------------------------------------------------------------------------------------------


def run_row(options: VolumeOptions) -> NoReturn:
    """Run the training command of a row up to its first update, count its batches, print both and end the process."""
    form, loader = (options.row or "").split(", ")
    data, cache = options.place / FORMS[form], options.place / "cache"
    output = tempfile.mkdtemp(dir=options.place, prefix="run-")
    common = [f"--model_config_name_or_path={options.place / 'network'}", "--resolution=64", "--center_crop"]
    common += [f"--train_batch_size={BATCH}", f"--dataloader_num_workers={options.workers}", f"--output_dir={output}"]
    batches = _our_batches() if loader != LOADERS[2] else _their_batches()

    def after_first_update(*_: object) -> None:
        first = time.time() - options.started
        next(batches)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < options.seconds:
            next(batches)
            count += BATCH
        shutil.rmtree(output)
        print(json.dumps({"first": first, "speed": count / (time.perf_counter() - start)}), flush=True)
        os._exit(0)  # the training is not finished, nor are its workers

    register_optimizer_step_post_hook(after_first_update)
    if loader == LOADERS[2]:
        # The script reads a folder of images by --train_data_dir, any other set by its name.
        where = "train_data_dir" if form == "loose files" else "dataset_name"
        sys.argv = [str(options.script), *common, f"--{where}={data}", f"--cache_dir={cache / 'datasets'}"]
        runpy.run_path(str(options.script), run_name="__main__")
    else:
        streaming = ["--max_train_steps=1000", *["--streaming"] * (loader == "--streaming")]
        sys.argv = ["ddpm-ext", "train", *common, f"--train_data_dir={data}", f"--cache_dir={cache}", *streaming]
        runpy.run_module("ddpm_ext", run_name="__main__")
    raise SystemExit(f"{options.row}: the training ended before its first update.")


def _our_batches() -> Iterator[object]:
    """Batches of the data set that the training opens, read ahead as it does."""
    from ddpm_ext.data.order import prefetch
    from ddpm_ext.training import builders

    build, opened = builders.build_data, []
    builders.build_data = lambda *arguments: opened.append(build(*arguments)) or opened[-1]

    def batches() -> Iterator[object]:
        starts = range(8 * BATCH, 1 << 60, BATCH)  # behind what the training itself has asked for
        yield from prefetch(lambda start: opened[-1].at(range(start, start + BATCH), seed=0), iter(starts))

    return batches()


def _their_batches() -> Iterator[object]:
    """Batches of the DataLoader that the script makes."""
    made: list[torch.utils.data.DataLoader] = []

    class Recorded(torch.utils.data.DataLoader):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # pyright: ignore
            made.append(self)

    torch.utils.data.DataLoader = Recorded

    def batches() -> Iterator[object]:
        while True:
            yield from made[0]

    return batches()


# All rows -------------------------------------------------------------------------------------------------------------


def measure(row: str, options: VolumeOptions) -> dict[str, float]:
    """Time, speed and peak memory of a row in a process of its own."""
    given = {field.name: getattr(options, field.name) for field in fields(options)}
    given |= {"row": row, "started": time.time()}
    words = [f"--{name}={value}" for name, value in given.items() if value is not None]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([sys.executable, __file__, *words], stdout=out, stderr=errors)
        held = mapped = 0.0
        while process.poll() is None:
            now = memory(process.pid)
            held, mapped = max(held, now[0]), max(mapped, now[1])
            time.sleep(0.5)
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            raise SystemExit(f"{row}: {errors.read()[-3000:]}")
        return json.loads(out.read().splitlines()[-1]) | {"held": held, "mapped": mapped}


def memory(pid: int) -> tuple[float, float]:
    """MiB of a process and its children, pages that several share counted once: its own, and with files it maps."""
    held = whole = 0
    with suppress(psutil.NoSuchProcess):
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with suppress(OSError):  # it has ended
                lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
                kib = {name: int(value) for name, value, *_ in (line.split() for line in lines)}
                held += kib["Pss_Anon:"] + kib["Pss_Shmem:"]
                whole += kib["Pss:"]
    return held / 1024, whole / 1024


def training_need(name: str) -> float:
    """Images per second that a network preset takes at 64 x 64 in training on this machine's CPU."""
    network = build_unet(name, sample_size=64)
    images, steps = torch.randn(16, 3, 64, 64), torch.zeros(16, dtype=torch.int64)
    network(images, steps).sample.mean().backward()
    start = time.perf_counter()
    network(images, steps).sample.mean().backward()
    return 16 / (time.perf_counter() - start)


def table(results: dict[str, dict[str, float]], options: VolumeOptions) -> str:
    """The results as markdown."""
    lines = [f"| {options.num_images:,} images of 64 x 64 | {' | '.join(COLUMNS)} |", "|---" * 6 + "|"]
    for row in dict.fromkeys(name.removesuffix(", again") for name in results):
        once, again = results[row], results[f"{row}, again"]
        held, mapped = (max(once[name], again[name]) for name in ("held", "mapped"))
        numbers = (f"{once['first']:,.1f}", f"{again['first']:,.1f}", f"{again['speed']:,.0f}")
        lines.append(f"| {row} | {' | '.join(numbers)} | {held:,.0f} | {mapped:,.0f} |")
    lines += ["", f"`cifar10-tiny` takes {training_need('cifar10-tiny'):,.0f} images/s in training here."]
    command = f"python benchmarks/volume.py --num_images {options.num_images} --script train_unconditional.py"
    lines += ["", f"`{command}`: {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the set, measure every row that is not measured yet, write the table."""
    options = parse_options(VolumeOptions, __doc__ or "")
    if options.row is not None:
        run_row(options)
    kept, network = options.place / "results.json", options.place / "network" / "config.json"
    write_set(options.place, options.num_images)
    network.parent.mkdir(exist_ok=True)
    network.write_text(json.dumps({"_class_name": "UNet2DModel", **NETWORK}))
    results: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.exists() else {}
    for row in [f"{form}, {loader}" for form in FORMS for loader in LOADERS]:
        if row.endswith(LOADERS[2]) and options.script is None:
            print(f"{row}: left out, --script names no train_unconditional.py.")
            continue
        if row not in results:
            shutil.rmtree(options.place / "cache", ignore_errors=True)
        for name in (row, f"{row}, again"):
            if name not in results:
                results[name] = measure(row, options)
                kept.write_text(json.dumps(results, indent=1))
                print(f"{name}: {results[name]}", flush=True)
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text(table(results, options), encoding="utf-8")
    print(Path(options.output).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
