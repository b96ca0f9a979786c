"""Draw the strips of docs/ddpm.md: images under more and more noise, and images coming out of it.

python scripts/draw_strips.py                          # the digits under noise, runs/strips/forward.png
python scripts/draw_strips.py --model runs/digits      # the images that a run was trained on, and the reverse process
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ddpm_ext import load_images
from ddpm_ext.cli.arguments import parse_options
from ddpm_ext.data.dataset import ImageSet
from ddpm_ext.data.spec import DataSpec
from ddpm_ext.diffusion.images import to_uint8, to_x_0
from ddpm_ext.diffusion.process import q_sample
from ddpm_ext.diffusion.schedules import Tables, make_tables
from ddpm_ext.evaluation.samplers import ancestral
from ddpm_ext.models.classes import number_of_classes
from ddpm_ext.options import option
from ddpm_ext.pipelines.ddpm import load_pipeline
from ddpm_ext.pipelines.locate import local_pipeline

STEPS = (0, 50, 100, 200, 300, 500, 700, 999)


@dataclass(frozen=True)
class Options:
    """What to draw, and where."""

    model: str | None = option(
        None, "Run folder, or folder or Hub name of a pipeline; none: the digits, forward alone."
    )
    rows: int = option(6, "Images in a strip.")
    scale: int = option(6, "Screen pixels per image pixel.")
    output_dir: str = option("runs/strips", "Where the images go.")


def save(columns: list[Tensor], path: Path, scale: int) -> None:
    """Write one row per image, one column per step; of other bands than grey and RGB the first."""
    framed = [torch.nn.functional.pad(x, (0, 1, 0, 1), value=1.0) for x in columns]
    rows = to_uint8(torch.cat([torch.cat(list(x), dim=1) for x in framed], dim=2))  # (C, rows·H, steps·W)
    strip = Image.fromarray((rows if len(rows) == 3 else rows[:1]).permute(1, 2, 0).squeeze(-1).numpy())
    strip.resize((strip.width * scale, strip.height * scale), Image.Resampling.NEAREST).save(path, optimize=True)
    print(f"{path}: {strip.width}x{strip.height} pixels, {scale} times enlarged")


def draw_forward(images: ImageSet, tables: Tables, steps: Sequence[int], options: Options) -> None:
    """Draw images of a set under more and more noise."""
    chosen = torch.arange(options.rows) * (len(images) // options.rows)  # spread over the set
    x_0 = to_x_0(images.batch(chosen).pixels, images.spec.bits)
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    columns = [q_sample(x_0, torch.full((len(x_0),), t), eps, tables) for t in steps]
    save(columns, Path(options.output_dir) / "forward.png", options.scale)


def main(options: Options) -> None:
    """Draw forward.png of the digits; of a model reverse.png, and forward.png of the images of its run."""
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    if options.model is None:
        return draw_forward(load_images(dataset_name="digits"), make_tables(), STEPS, options)
    pipe, spec = load_pipeline(options.model), DataSpec.from_run(local_pipeline(options.model) or options.model)
    T = pipe.scheduler.config.num_train_timesteps
    steps = [round(t * (T - 1) / 999) for t in STEPS]
    if spec is None:
        print(f"forward.png is not drawn: nothing says on which images {options.model} was trained.")
    else:
        draw_forward(spec.load(), ancestral(pipe.scheduler).tables, steps, options)
    classes = number_of_classes(pipe.unet.config)
    labels = None if classes is None else [i % classes for i in range(options.rows)]
    chain = {"num_inference_steps": T, "class_labels": labels, "at": steps}
    views = pipe.progressive(options.rows, torch.Generator().manual_seed(0), **chain)
    return save([view.x_t for view in views], Path(options.output_dir) / "reverse.png", options.scale)


if __name__ == "__main__":
    main(parse_options(Options, "Draw the strips of docs/ddpm.md."))
