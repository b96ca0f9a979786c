"""Saved pipeline -> N images, each from its own seed: any batch size, any number of processes, resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from ..distributed import check_world
from ..run_dir import RunError, read_json, write_json
from ..signals import PREEMPTED, StopRequest, die_with_launcher, exit_process
from .ddpm import DDPMExtPipeline

Poll = Callable[[], bool]
POLL_EVERY = 10  # denoising steps between two looks at the stop flag: with several processes a look is an all-reduce


class SamplingStopped(Exception):
    """A stop was asked for while sampling."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Options of scripts/sample.py."""

    model: str = field(metadata={"help": "Folder or Hub name of a pipeline."})
    output_dir: str = field(default="samples", metadata={"help": "Folder for 000000.png ... and grid.png."})
    num_samples: int = field(default=64, metadata={"help": "Number of images."})
    batch_size: int = field(default=64, metadata={"help": "Images of one process at a time."})
    seed: int = field(default=0, metadata={"help": "Image i is drawn from torch.Generator().manual_seed(seed + i)."})
    num_inference_steps: int = field(default=1000, metadata={"help": "Denoising steps."})
    class_label: int | None = field(default=None, metadata={"help": "Class of all images, for conditional networks."})
    dtype: Literal["float32", "float16", "bfloat16"] = field(default="float32", metadata={"help": "Of the weights."})
    cpu: bool = field(default=False, metadata={"help": "Use the CPU even where there is an accelerator."})

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


def sample_images(
    pipeline: DDPMExtPipeline,
    seeds: Sequence[int],
    *,
    batch_size: int,
    num_inference_steps: int,
    class_labels: Sequence[int] | None = None,
    poll: Poll | None = None,
) -> Iterator[np.ndarray]:
    """Images in batches, uint8, shape (b, H, W, C), image i drawn from a CPU generator of seeds[i] alone.

    The noise of an image does not depend on its batch; its network's sums do in their last digits, so that a pixel
    may differ by one grey level between batch sizes.

    Args:
        pipeline: Network and scheduler.
        seeds: One per image.
        batch_size: Images at a time.
        num_inference_steps: Denoising steps.
        class_labels: One per image, for conditional networks.
        poll: Asked every POLL_EVERY steps whether to stop.

    Raises:
        SamplingStopped: poll said so.
    """

    def look(_pipeline: Any, step: int, _t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if poll is not None and step % POLL_EVERY == 0 and poll():
            raise SamplingStopped
        return tensors

    for start in range(0, len(seeds), batch_size):
        mine = slice(start, start + batch_size)
        labels = None if class_labels is None else torch.tensor(class_labels[mine], device=pipeline.device)
        (images,) = pipeline(
            batch_size=len(seeds[mine]),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[mine]],
            num_inference_steps=num_inference_steps,
            class_labels=labels,
            output_type="np",
            callback_on_step_end=look,
            return_dict=False,
        )
        yield (np.asarray(images) * 255).round().astype(np.uint8)


def make_grid(images: np.ndarray, min_side: int = 48) -> np.ndarray:
    """Images in rows, as near to a square as can be, a grey line around each; small ones enlarged by whole pixels.

    Args:
        images: uint8, shape (N, H, W, C).
        min_side: Shortest side of one image in the grid.

    Returns:
        uint8, shape (rows · H', columns · W', C); places without an image are grey.
    """
    number, height, width, channels = images.shape
    columns = int(np.ceil(np.sqrt(number)))
    rows = -(-number // columns)
    times = -(-min_side // min(height, width))
    border = times // 2 + 1
    tall, wide = height * times + 2 * border, width * times + 2 * border
    cells = np.full((rows * columns, tall, wide, channels), 128, dtype=np.uint8)
    cells[:number, border:-border, border:-border] = images.repeat(times, axis=1).repeat(times, axis=2)
    return cells.reshape(rows, columns, tall, wide, channels).swapaxes(1, 2).reshape(rows * tall, columns * wide, -1)


def save_png(image: np.ndarray, path: Path) -> None:
    """One uint8 image (H, W, C), C 1, 3 or 4, written whole or not at all; of other C the first channel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    flat = image[..., 0] if image.shape[-1] not in (3, 4) else image
    Image.fromarray(flat).save(temporary, format="png")
    temporary.replace(path)


def sample_to_folder(config: SampleConfig) -> int:
    """Write `num_samples` images and their grid; images that are there already are kept.

    Returns:
        Exit code: 0, or 75 when a stop was asked for; the same command continues.

    Raises:
        RunError: the folder holds images of another model or other settings.
    """
    stop = StopRequest()
    die_with_launcher()
    accelerator = Accelerator(cpu=config.cpu or not torch.accelerator.is_available())
    check_world(accelerator)
    folder = Path(config.output_dir)
    claim(folder, config, accelerator)
    pipeline = DDPMExtPipeline.from_pretrained(config.model).to(accelerator.device)
    if config.dtype != "float32":
        pipeline.to(getattr(torch, config.dtype))
    pipeline.set_progress_bar_config(disable=not accelerator.is_main_process)

    missing = [i for i in range(config.num_samples) if not image_path(folder, i).exists()]
    accelerator.wait_for_everyone()  # all have looked before the first writes
    with accelerator.split_between_processes(missing) as share:
        try:
            write_images(pipeline, cast(list[int], share), folder, config, poll=lambda: bool(stop))
        except SamplingStopped:
            return exit_process(PREEMPTED, accelerator.num_processes)
        finally:
            stop.release()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        images = np.stack([np.asarray(Image.open(image_path(folder, i))) for i in range(min(config.num_samples, 64))])
        save_png(make_grid(images[..., None] if images.ndim == 3 else images), folder / "grid.png")
        print(f"{config.num_samples} images in {folder}, the first of them in {folder / 'grid.png'}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return exit_process(0, accelerator.num_processes)


def claim(folder: Path, config: SampleConfig, accelerator: Accelerator) -> None:
    """Record what the folder's images are made of, or compare with the record."""
    free = ("output_dir", "num_samples", "batch_size", "cpu")
    record = {name: value for name, value in asdict(config).items() if name not in free}
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "samples.json").exists():
            write_json(folder / "samples.json", record)
    accelerator.wait_for_everyone()
    there = read_json(folder / "samples.json")
    if there != record:
        changed = [f"{name} {there.get(name)!r} -> {new!r}" for name, new in record.items() if there.get(name) != new]
        raise RunError(f"{folder} holds images of other settings ({', '.join(changed)}); give another --output_dir.")


def image_path(folder: Path, i: int) -> Path:
    """The file of image i."""
    return folder / f"{i:06d}.png"


def write_images(
    pipeline: DDPMExtPipeline, numbers: Sequence[int], folder: Path, config: SampleConfig, poll: Poll
) -> None:
    """The images of these numbers, each written when its batch is done."""
    labels = None if config.class_label is None else [config.class_label] * len(numbers)
    batches = sample_images(
        pipeline,
        [config.seed + i for i in numbers],
        batch_size=config.batch_size,
        num_inference_steps=config.num_inference_steps,
        class_labels=labels,
        poll=poll,
    )
    done = iter(numbers)
    for batch in batches:
        for image in batch:
            save_png(image, image_path(folder, next(done)))
