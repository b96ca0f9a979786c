"""Class guidance against its scale: does a classifier see the class that was asked for, and what does it cost.

    python -m ddpm_ext train --preset digits-conditional
    python benchmarks/guidance.py --model runs/digits-conditional --output_dir docs/images/guidance

The classifier takes the class of most of the three nearest training images in pixels. Fréchet distances are of pixels,
class by class; beside them stand how much the images of a class differ and how far the nearest training image is, both
for the test images, too. Writes guidance.md, guidance.png and grid.png.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_ext.cli.arguments import parse_options
from ddpm_ext.data.dataset import load_images
from ddpm_ext.evaluation.features.metrics import frechet_distance_per_class
from ddpm_ext.evaluation.plots import figure_class, save_figure
from ddpm_ext.evaluation.samplers import make_scheduler
from ddpm_ext.models.classes import number_of_classes
from ddpm_ext.options import option
from ddpm_ext.pipelines.ddpm import load_pipeline
from ddpm_ext.pipelines.sampling import make_grid, save_png
from ddpm_ext.pipelines.seeds import images_from_seeds

SCALES = (0.0, 0.5, 1.0, 2.0, 4.0)
NEAREST = 3


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is drawn."""

    model: str = option("runs/digits-conditional", "Run folder or pipeline of a network that knows no class, too.")
    output_dir: str = option("docs/images/guidance", "Folder of the table, the plot and the grid.")
    num_samples: int = option(1000, "Images of each scale, classes in turn; image i is drawn from seed i.", at_least=20)
    num_inference_steps: int = option(20, "Steps of DDIM.", at_least=1)
    grid_scale: float = option(1.0, "Scale of the grid, a class a row.", at_least=0)


@dataclass(frozen=True)
class Row:
    """One scale."""

    scale: float
    accuracy: float  # share of images whose class the classifier sees
    frechet: dict[int, float]  # by class
    spread: float  # deviation of a pixel among the images of a class, grey levels in [0, 1], mean of the classes
    nearest: float  # distance to the nearest training image, mean of the images

    @property
    def mean(self) -> float:
        """Mean Fréchet distance over the classes."""
        return sum(self.frechet.values()) / len(self.frechet)


def classify(images: Tensor, known: Tensor, labels: Tensor) -> Tensor:
    """Return the class of most of the nearest known images; all flat, (n, d)."""
    nearest = torch.cdist(images.double(), known.double()).topk(NEAREST, largest=False).indices
    return labels[nearest].mode(dim=1).values


def spread(images: Tensor, labels: Tensor) -> float:
    """Return the deviation of a pixel among images of one class, root of the mean over pixels; mean of the classes."""
    found = [images[labels == c].var(0).mean().sqrt() for c in labels.unique()]
    return torch.stack(found).mean().item()


def nearest(images: Tensor, known: Tensor) -> float:
    """Return the mean distance of images to the nearest known one; all flat, (n, d)."""
    return torch.cdist(images, known).amin(1).mean().item()


def main(arguments: list[str]) -> None:
    """Measure every scale, then write."""
    options = parse_options(Options, "Class guidance against its scale.", arguments)
    train, test = (load_images("digits", split=split) for split in ("train", "test"))
    (real, real_labels), (held_out, held_out_labels) = (s.batch(range(len(s))) for s in (train, test))
    assert real_labels is not None and held_out_labels is not None  # the digits have classes
    real, held_out = (pixels.flatten(1).double() / 255 for pixels in (real, held_out))
    seen = (classify(held_out, real, real_labels) == held_out_labels).double().mean().item()
    of_test = Row(math.nan, seen, {}, spread(held_out, held_out_labels), nearest(held_out, real))

    pipeline = load_pipeline(options.model)
    pipeline.scheduler = make_scheduler(pipeline.scheduler, "ddim")
    classes = number_of_classes(pipeline.unet.config) or 0
    labels = [i % classes for i in range(options.num_samples)]

    def draw(labels: list[int], scale: float) -> Tensor:
        parts = images_from_seeds(
            pipeline,
            range(len(labels)),
            batch_size=250,
            num_inference_steps=options.num_inference_steps,
            class_labels=labels,
            guidance={"guidance_scale": scale},
        )
        return torch.cat([(part * 255).round() for part in parts])

    rows: list[Row] = []
    for scale in SCALES:
        fake = draw(labels, scale).flatten(1).double() / 255
        right = classify(fake, real, real_labels) == torch.tensor(labels)
        distances = frechet_distance_per_class(real, real_labels.tolist(), fake, labels)
        of_samples = spread(fake, torch.tensor(labels)), nearest(fake, real)
        rows.append(Row(scale, right.double().mean().item(), distances, *of_samples))
        print(
            f"w = {scale:g}: accuracy {rows[-1].accuracy:.3f}, Fréchet distance per class {rows[-1].mean:.3f}",
            flush=True,
        )
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "guidance.md").write_text(table(rows, of_test, options), encoding="utf-8")
    plot(rows, folder / "guidance.png")
    grid = draw([c for c in range(classes) for _ in range(8)], options.grid_scale).to(torch.uint8)
    save_png(make_rows(grid.permute(0, 2, 3, 1).numpy(), 8), folder / "grid.png")


def make_rows(images: np.ndarray, columns: int) -> np.ndarray:
    """Return a grid of so many columns: each row as `make_grid` draws it, one below the other."""
    rows = [
        np.concatenate([make_grid(image[None]) for image in row], 1) for row in np.split(images, len(images) // columns)
    ]
    return np.concatenate(rows)


def table(rows: list[Row], of_test: Row, options: Options) -> str:
    """Return the scores as Markdown."""
    classes = sorted(rows[0].frechet)
    lines = [
        "| w | accuracy | spread | nearest | Fréchet distance, mean of the classes | "
        + " | ".join(map(str, classes))
        + " |",
        "|" + "---|" * (5 + len(classes)),
    ]
    for row in rows:
        numbers = [f"{row.frechet[c]:.2f}" for c in classes]
        words = [f"{row.scale:g}", f"{row.accuracy:.1%}", f"{row.spread:.3f}", f"{row.nearest:.2f}", f"{row.mean:.3f}"]
        lines.append("| " + " | ".join([*words, *numbers]) + " |")
    test = [f"{of_test.accuracy:.1%}", f"{of_test.spread:.3f}", f"{of_test.nearest:.2f}"]
    lines.append("| test images | " + " | ".join([*test, *[""] * (1 + len(classes))]) + " |")
    what = f"{options.num_samples:,} images of {options.num_inference_steps} steps of DDIM"
    return "\n".join([*lines, "", f"{what}.", ""])


def plot(rows: list[Row], path: Path) -> None:
    """Draw accuracy and Fréchet distance against the scale."""
    figure = figure_class()(figsize=(6, 3.5), layout="constrained")
    left = figure.add_subplot(title="Class guidance, digits")
    right = left.twinx()
    scales = [row.scale for row in rows]
    left.plot(scales, [100 * row.accuracy for row in rows], "o-", color="C0")
    right.plot(scales, [row.mean for row in rows], "s--", color="C1")
    left.set_xlabel("guidance scale w (0: none)")
    left.set_ylabel("accuracy of a classifier (%)", color="C0")
    right.set_ylabel("Fréchet distance in pixels", color="C1")
    save_figure(figure, path)


if __name__ == "__main__":
    main(sys.argv[1:])
