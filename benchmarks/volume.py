"""How fast images reach training from large sets, beside a loader as in Diffusers' train_unconditional.py.

    python benchmarks/volume.py --folder /data/volume                    # 200,000 images of 64 x 64, about an hour
    python benchmarks/volume.py --folder /data/volume --num_images 20000

Every row is a fresh process: opening the set until its first batch (data already in place, nothing decoded before),
then images per second of the batches after it, and the process's peak memory. The set is written once, as parquet
shards and as loose JPEG files, and kept in the folder.
"""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ddpm_ext.cli.arguments import parse_options
from ddpm_ext.options import option, required

SHARD, BATCH = 10_000, 64
COLUMNS = ("first batch, s", "again, s", "images/s", "peak memory, MiB")


@dataclass(frozen=True)
class VolumeOptions:
    """What is measured and where it is written."""

    folder: str = required("Where the set is kept, about 2 KB an image in each of two forms.")
    num_images: int = option(200_000, "Images of 64 x 64.")
    seconds: float = option(20.0, "How long batches are taken of each row.")
    workers: int = option(2, "Threads of ours, processes of the other loader.")
    output: str = option("runs/volume.md", "Markdown file to write.")
    row: str | None = option(None, "Of one row, by its process.")


def write_sets(folder: Path, count: int) -> None:
    """Write the same images as parquet shards and as files, unless they are there."""
    import datasets

    done = folder / "done.json"
    if done.exists() and json.loads(done.read_text()) == count:
        return
    features = datasets.Features({"image": datasets.Image()})
    numbers = np.random.default_rng(0)
    waves = np.sin(np.linspace(0, 6, 64))
    for shard in range(-(-count // SHARD)):
        cells = []
        for i in range(shard * SHARD, min(count, (shard + 1) * SHARD)):
            phase = numbers.normal(size=(3, 64, 1)) * 20 + 60 * np.outer(waves, np.roll(waves, i % 64)) + 128
            image = io.BytesIO()
            Image.fromarray(phase.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(image, "jpeg", quality=85)
            file = folder / "files" / f"{i // 1000:04}" / f"{i:07}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(image.getvalue())
            cells.append({"bytes": image.getvalue(), "path": None})
        (folder / "shards").mkdir(exist_ok=True)
        name = folder / "shards" / f"train-{shard:05}-of-{-(-count // SHARD):05}.parquet"
        datasets.Dataset.from_dict({"image": cells}, features=features).to_parquet(name)
    done.write_text(json.dumps(count))


def ours(form: str, options: VolumeOptions, *, streaming: bool) -> Iterator[Any]:
    """Batches of this package, one ahead."""
    from ddpm_ext.data.dataset import load_images, prefetch
    from ddpm_ext.data.streaming import stream_images

    place: dict[str, Any] = {"train_data_dir": str(Path(options.folder) / form), "resolution": 64, "channels": 3}
    place |= {"num_workers": options.workers, "cache_dir": str(Path(options.folder) / "cache")}
    images = stream_images(**place) if streaming else load_images(**place, memory_bytes=0)  # mapped, as large sets are
    starts = (range(start, start + BATCH) for start in range(0, 1 << 60, BATCH))
    return prefetch(lambda positions: images.at(positions, seed=0), starts)


def theirs(form: str, options: VolumeOptions) -> Iterator[Any]:
    """Batches as Diffusers' script makes them: `datasets`, transforms of each image, a shuffling DataLoader."""
    import datasets

    kind = {"files": "imagefolder", "shards": "parquet"}[form]
    suffix = {"files": "**/*.jpg", "shards": "*.parquet"}[form]
    table: Any = datasets.load_dataset(
        kind,
        data_files=str(Path(options.folder) / form / suffix),
        split="train",
        cache_dir=str(Path(options.folder) / "cache_datasets"),
    )

    def transform(batch: dict[str, Any]) -> dict[str, Any]:
        pixels = [np.asarray(image.convert("RGB").resize((64, 64))) for image in batch["image"]]
        return {"input": [torch.from_numpy(p.copy()).permute(2, 0, 1).float() / 127.5 - 1 for p in pixels]}

    table.set_transform(transform)
    loader = torch.utils.data.DataLoader(table, batch_size=BATCH, shuffle=True, num_workers=options.workers)
    while True:
        yield from loader


ROWS: dict[str, Callable[[VolumeOptions], Iterator[Any]]] = {
    "parquet, decoded once, mapped": lambda o: ours("shards", o, streaming=False),
    "parquet, --streaming": lambda o: ours("shards", o, streaming=True),
    "parquet, Diffusers' loader": lambda o: theirs("shards", o),
    "loose files, decoded once, mapped": lambda o: ours("files", o, streaming=False),
    "loose files, --streaming": lambda o: ours("files", o, streaming=True),
    "loose files, Diffusers' loader": lambda o: theirs("files", o),
}


def measure(options: VolumeOptions) -> dict[str, float]:
    """One row, in this process."""
    assert options.row is not None
    start = time.perf_counter()
    batches = ROWS[options.row](options)
    next(batches)
    first, count = time.perf_counter() - start, 0
    start = time.perf_counter()
    while time.perf_counter() - start < options.seconds:
        next(batches)
        count += BATCH
    speed = count / (time.perf_counter() - start)
    memory = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"first": first, "speed": speed, "memory": memory / 1024}


def run_row(name: str, options: VolumeOptions) -> dict[str, float]:
    """One row in a process of its own."""
    given = [f"--{key}={getattr(options, key)}" for key in ("folder", "num_images", "seconds", "workers")]
    done = subprocess.run(
        [sys.executable, __file__, *given, f"--row={name}"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def training_need() -> float:
    """Images per second that the smallest network for 64 x 64 takes in training on this machine's CPU."""
    from ddpm_ext.models.unet import build_unet

    network = build_unet("cifar10-tiny", sample_size=64)
    images, steps = torch.randn(BATCH, 3, 64, 64), torch.zeros(BATCH, dtype=torch.int64)
    network(images, steps).sample.mean().backward()
    start = time.perf_counter()
    network(images, steps).sample.mean().backward()
    return BATCH / (time.perf_counter() - start)


def main() -> None:
    """Measure every row and write the table."""
    options = parse_options(VolumeOptions, __doc__ or "")
    if options.row is not None:
        print(json.dumps(measure(options)))
        os._exit(0)  # workers of the other loader may be asked for batches still
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_sets(folder, options.num_images)
    lines = [f"| {options.num_images:,} images of 64 x 64 | {' | '.join(COLUMNS)} |", "|---" * 5 + "|"]
    for name in ROWS:
        once, again = run_row(name, options), run_row(name, options)
        numbers = f"{once['first']:.1f} | {again['first']:.1f} | {again['speed']:,.0f} | {again['memory']:,.0f}"
        lines.append(f"| {name} | {numbers} |")
        print(lines[-1], flush=True)
    lines += ["", f"Training `cifar10-tiny` at 64 x 64 takes {training_need():,.0f} images/s here."]
    command = f"python benchmarks/volume.py --num_images {options.num_images} --workers {options.workers}"
    lines += ["", f"`{command}`, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}."]
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    Path(options.output).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
