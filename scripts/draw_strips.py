"""Draw the strips of docs/ddpm.md: digits under more and more noise, and digits coming out of it.

python scripts/draw_strips.py                                  # the forward process, runs/strips/forward.png
python scripts/draw_strips.py --model runs/digits/pipeline     # the reverse process as well
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ddpm_ext import load_images
from ddpm_ext.cli.arguments import parse_options
from ddpm_ext.diffusion.images import to_uint8, to_x_0
from ddpm_ext.diffusion.process import q_sample
from ddpm_ext.diffusion.schedules import make_tables
from ddpm_ext.options import option
from ddpm_ext.pipelines.loading import load_pipeline

STEPS = (0, 50, 100, 200, 300, 500, 700, 999)


@dataclass(frozen=True)
class Options:
    """What to draw, and where."""

    model: str | None = option(None, "Folder or Hub name of a pipeline, for the way back.")
    rows: int = option(6, "Pictures in a strip.")
    scale: int = option(6, "Screen pixels per image pixel.")
    output_dir: str = option("runs/strips", "Where the images go.")


def save(columns: list[Tensor], path: Path, scale: int) -> None:
    """One row per image, one column per step."""
    framed = [torch.nn.functional.pad(x, (0, 1, 0, 1), value=1.0) for x in columns]
    rows = to_uint8(torch.cat([torch.cat(list(x), dim=1) for x in framed], dim=2))  # (C, rows·H, steps·W)
    picture = Image.fromarray(rows.permute(1, 2, 0).squeeze(-1).numpy())
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path, optimize=True)
    print(f"{path}: {picture.width}x{picture.height} pixels, {scale} times enlarged")


def main(options: Options) -> None:
    """Draw forward.png, and reverse.png where a model is given."""
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    digits = load_images(dataset_name="digits")
    chosen = torch.arange(options.rows) * (len(digits) // options.rows)  # spread over the set
    x_0 = to_x_0(digits.batch(chosen).pixels)
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    columns = [q_sample(x_0, torch.full((options.rows,), t), eps, make_tables()) for t in STEPS]
    save(columns, Path(options.output_dir) / "forward.png", options.scale)
    if options.model is not None:
        pipe = load_pipeline(options.model)
        views = pipe.progressive(options.rows, torch.Generator().manual_seed(0), at=STEPS)
        save([view.x_t for view in views], Path(options.output_dir) / "reverse.png", options.scale)


if __name__ == "__main__":
    main(parse_options(Options, "Draw the strips of docs/ddpm.md."))
