"""Results and pipelines -> plots with matplotlib (extra `plots`): curves, and the image grids of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..diffusion.images import to_uint8, to_x_0
from ..errors import UserError
from ..models.classes import number_of_classes
from .bound.records import Sweep, rate_distortion_rows
from .features.metrics import nearest
from .images import images_and_labels
from .report import groups_of_scores, of_newest_weights, row_words
from .results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..data.dataset import ImageSet
    from ..pipelines.config import GuidanceOptions
    from ..pipelines.ddpm import DDPMExtPipeline
    from .features.reference import Reference
    from .features.samples import Samples

__all__ = [
    "draw_bound",
    "draw_interpolation",
    "draw_nearest",
    "draw_paper",
    "draw_progressive",
    "draw_results",
    "draw_shared_latents",
    "farthest_pair",
    "figure_class",
    "nearest_in_pixels",
    "plot_against_steps",
    "plot_bits_per_step",
    "plot_images",
    "plot_rate_distortion",
    "save_figure",
]

_AMONG = 32  # training images of which the interpolation takes the two farthest apart


def figure_class() -> type[Figure]:
    """matplotlib's Figure, which needs neither a display nor pyplot's global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("Plots need matplotlib: pip install ddpm-ext[plots], or leave --plots out.") from error
    return Figure


def save_figure(figure: Figure, path: Path | str) -> Path:
    """Write a figure as the kind of file its name says."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def plot_rate_distortion(label: Sequence[int], rate: Tensor, distortion: Tensor, path: Path | str) -> Path:
    """DDPM Figure 5: distortion and rate against reverse steps, distortion against rate.

    Args:
        label: Reverse steps T - t + 1 of each row, ascending.
        rate: Bits/dim, shape (K,).
        distortion: RMSE in grey levels of 0..255, shape (K,).
        path: The file.
    """
    figure = figure_class()(figsize=(12, 3.6), layout="constrained")
    names = {"steps": "reverse process steps (T − t + 1)", "rate": "rate (bits/dim)", "distortion": "distortion (RMSE)"}
    values = {"steps": np.asarray(label), "rate": rate.numpy(), "distortion": distortion.numpy()}
    panels = (("steps", "distortion"), ("steps", "rate"), ("rate", "distortion"))
    for axes, (x, y) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.plot(values[x], values[y])
        axes.set_xlabel(names[x])
        axes.set_ylabel(names[y])
        axes.grid(alpha=0.3)
    return save_figure(figure, path)


def plot_bits_per_step(timesteps: Sequence[int], bits: Tensor, path: Path | str) -> Path:
    """Bits/dim that each step of the bound costs, L_{t-1} and L_0 last, on a logarithmic scale.

    Args:
        timesteps: Of the chain, 0 <= t < T, shape (K,).
        bits: Mean over images of each term, shape (K,); the last is the decoder's.
        path: The file.
    """
    figure = figure_class()(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(list(timesteps[:-1]), bits[:-1].numpy(), label="$L_{t-1}$")
    axes.semilogy([timesteps[-1]], [bits[-1].item()], "o", label="$L_0$ (decoder)")
    axes.set_xlabel("t (counted from 0)")
    axes.set_ylabel("bits/dim of the step")
    axes.grid(alpha=0.3)
    axes.legend()
    return save_figure(figure, path)


def plot_against_steps(curves: dict[str, list[tuple[int, float]]], metric: str, path: Path | str) -> Path:
    """A score against the number of denoising steps, one curve per sampler; logarithmic where no score forbids it.

    Args:
        curves: Name of the sampler -> (steps, score) pairs.
        metric: Name of the score.
        path: The file.
    """
    many = len(curves) > 6
    figure = figure_class()(figsize=(10, 4.8) if many else (6, 3.6), layout="constrained")
    axes = figure.subplots()
    level = {name for name, points in curves.items() if name.startswith("reference") and len(points) == 1}
    for name, points in curves.items():
        if name in level:  # one number of its own, to be reached with fewer steps
            axes.axhline(points[0][1], linestyle="--", color="black", linewidth=1.2, label=name)
            continue
        width = 2.5 if name.startswith("fitted") else 1.2
        style = "--" if name.startswith("reference") else "o-"
        axes.semilogx(*zip(*sorted(points), strict=True), style, label=name, linewidth=width, markersize=4)
    steps = sorted({step for name, points in curves.items() if name not in level for step, _ in points})
    if len(steps) <= 12:
        axes.set_xticks(steps, labels=list(map(str, steps)))
        axes.minorticks_off()
    if all(score > 0 for points in curves.values() for _, score in points):  # KID may be negative
        axes.set_yscale("log")
    axes.set_xlabel("denoising steps")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3, which="both")
    axes.legend(**({"loc": "upper left", "bbox_to_anchor": (1, 1), "fontsize": 8} if many else {}))
    return save_figure(figure, path)


def plot_images(
    rows: Sequence[Tensor], path: Path | str, row_labels: Sequence[str] = (), column_labels: Sequence[str] = ()
) -> Path:
    """Images in a grid.

    Args:
        rows: One tensor per row, uint8, shape (n, C, H, W), all of one size; rows may differ in n.
        path: The file.
        row_labels: A word beside each row, or none.
        column_labels: A word above each column, or none.
    """
    if len({tuple(row.shape[1:]) for row in rows}) != 1:
        raise UserError(f"All images of a grid must have one size, got {sorted({tuple(r.shape[1:]) for r in rows})}.")
    columns = max(map(len, rows))
    left = 0.11 * max([len(word) for word in row_labels], default=0)
    figure = figure_class()(figsize=(left + 0.8 * columns, 0.3 + 0.8 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for line, row in zip(grid, rows, strict=True):
        for axes, image in zip(line, row, strict=False):
            channels = image.permute(1, 2, 0).numpy()
            channels = channels[..., 0] if channels.shape[-1] not in (3, 4) else channels
            axes.imshow(channels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    for line, word in zip(grid[:, 0], row_labels, strict=False):
        line.text(-0.15, 0.5, word, transform=line.transAxes, ha="right", va="center", fontsize=8)
    for axes, word in zip(grid[0], column_labels, strict=False):
        axes.set_title(word, fontsize=8)
    return save_figure(figure, path)


# Plots of a model -----------------------------------------------------------------------------------------------------


def _spread(num_timesteps: int, count: int) -> list[int]:
    """`count` steps from T - 1 down to 0, evenly spaced."""
    return [round((num_timesteps - 1) * (1 - k / (count - 1))) for k in range(count)]


def draw_progressive(
    pipeline: DDPMExtPipeline,
    path: Path,
    num_images: int = 6,
    columns: int = 10,
    seed: int = 0,
    guidance: GuidanceOptions | None = None,
) -> Path:
    """DDPM Figure 6: x̂_0 as generation goes on.

    Args:
        pipeline: What draws.
        path: The PNG to write.
        num_images: Rows.
        columns: Steps that are shown.
        seed: Image i is drawn from seed + i.
        guidance: Class guidance, as the pipeline takes it; None for none.
    """
    T = pipeline.scheduler.config.num_train_timesteps
    at = _spread(T, columns)
    generator = [torch.Generator().manual_seed(seed + i) for i in range(num_images)]
    labels = _round_the_classes(pipeline, num_images)
    chain = {"num_inference_steps": T, "at": at, "class_labels": labels, **(guidance or {})}
    views = list(pipeline.progressive(num_images, generator, **chain))
    guesses = torch.stack([_as_pixels(view.x_0) for view in views], dim=1)
    return plot_images(list(guesses), path, column_labels=[f"t = {view.t}" for view in views])


def draw_shared_latents(
    pipeline: DDPMExtPipeline,
    path: Path,
    times: Sequence[int] | None = None,
    num_samples: int = 8,
    seed: int = 0,
    guidance: GuidanceOptions | None = None,
) -> Path:
    """DDPM Figure 7: images that share x_t, and class 0 where there are classes; the later t, the less they share.

    Args:
        pipeline: What draws.
        path: The PNG to write.
        times: The shared steps t; None for four of them.
        num_samples: Images of a row.
        seed: Of latents and samples.
        guidance: Class guidance, as the pipeline takes it; None for none.
    """
    T = pipeline.scheduler.config.num_train_timesteps
    times = list(times or (round((T - 1) * share) for share in (1, 0.75, 0.5, 0.25)))
    label, rows = _round_the_classes(pipeline, 1), []
    chain = {"num_inference_steps": T, "at": times, "class_labels": label, **(guidance or {})}
    for view in list(pipeline.progressive(1, torch.Generator().manual_seed(seed), **chain)):
        generators = [torch.Generator().manual_seed(seed + 1 + i) for i in range(num_samples)]
        asked = {"output_type": "latent", "class_labels": label, **(guidance or {})}
        found = pipeline.continue_from(view.x_t, view.t, num_samples, generators, **asked)
        rows.append(_as_pixels(found.images))  # pyright: ignore[reportArgumentType]
    return plot_images(rows, path, row_labels=[f"share x_t, t = {t}" for t in sorted(times, reverse=True)])


def draw_interpolation(
    pipeline: DDPMExtPipeline,
    images: Tensor,
    path: Path,
    times: Sequence[int] | None = None,
    seed: int = 0,
    classes: Tensor | None = None,
    guidance: GuidanceOptions | None = None,
) -> Path:
    """DDPM Figure 8: between two images, mixed after t forward steps.

    Args:
        pipeline: Network and scheduler.
        images: x_0 of the two, shape (2, C, H, W), values in [-1, 1].
        path: The file.
        times: Where they are mixed; None for four times.
        seed: Of the shared noise.
        classes: Of the two, shape (2,), where the network asks for them; a mixture takes that of the nearer image.
        guidance: Class guidance, as the pipeline takes it; None for none.
    """
    T = pipeline.scheduler.config.num_train_timesteps
    weights = [k / 8 for k in range(9)]
    times = list(times or (round((T - 1) * share) for share in (0.125, 0.25, 0.5, 0.75)))
    labels = None if classes is None else [int(classes[round(weight)]) for weight in weights]
    rows = []
    for t in times:
        generator = torch.Generator().manual_seed(seed)
        asked = {"output_type": "latent", "class_labels": labels, **(guidance or {})}
        found = pipeline.interpolate(images[0], images[1], t, weights, generator, **asked)
        rows.append(_as_pixels(found.images))  # pyright: ignore[reportArgumentType]
    columns = [f"λ = {weight:g}" for weight in weights]
    return plot_images(rows, path, row_labels=[f"mixed at t = {t}" for t in times], column_labels=columns)


def draw_paper(
    pipeline: DDPMExtPipeline,
    training: ImageSet,
    folder: Path,
    seed: int = 0,
    guidance: GuidanceOptions | None = None,
) -> None:
    """Figures 6, 7 and 8 of the paper, at every step of the chain; Figure 8 between two training images far apart.

    Args:
        pipeline: What draws.
        training: The training images.
        folder: Where the PNGs go.
        seed: Of all drawings.
        guidance: Class guidance, as the pipeline takes it; None for none.
    """
    draw_progressive(pipeline, folder / "progressive.png", seed=seed, guidance=guidance)
    draw_shared_latents(pipeline, folder / "shared_latents.png", seed=seed, guidance=guidance)
    first = range(min(_AMONG, len(training)))
    pixels, classes = images_and_labels(pipeline.unet, training, first)
    pair = farthest_pair(pixels)
    labels = None if classes is None else classes[pair]
    x_0 = to_x_0(pixels[pair], training.spec.bits)
    draw_interpolation(pipeline, x_0, folder / "interpolation.png", seed=seed, classes=labels, guidance=guidance)


def farthest_pair(pixels: Tensor) -> list[int]:
    """Numbers of the two images that differ most, the first such pair; pixels uint8, shape (n, C, H, W), n >= 2."""
    flat = pixels.flatten(1).double()
    distance = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    return list(divmod(int(distance.argmax()), len(flat)))


def _round_the_classes(pipeline: DDPMExtPipeline, count: int) -> list[int] | None:
    """Labels 0, 1, ... of images of a class-conditional network; None for another."""
    classes = number_of_classes(pipeline.unet.config)
    return None if classes is None else [i % classes for i in range(count)]


def draw_bound(sweep: Sweep, num_timesteps: int, folder: Path, name: str | None) -> None:
    """Rate against distortion, and the bits of every step.

    Args:
        sweep: The terms of every step.
        num_timesteps: T.
        folder: Where the PNGs go.
        name: The variance, for the files' names, or None.
    """
    rows = rate_distortion_rows(sweep, num_timesteps)
    plot_rate_distortion(
        rows.label, rows.rate_bits_per_dim, rows.distortion_rmse, folder / f"rate_distortion_{name}.png"
    )
    bits = sweep.bits_per_dim
    assert bits.steps is not None
    terms = torch.cat([bits.steps, bits.decoder[:, None]], dim=1).mean(0)
    plot_bits_per_step(sweep.timesteps, terms, folder / f"bits_per_step_{name}.png")


def draw_results(results: list[Result], folder: Path) -> None:
    """Draw every score of the newest weights against denoising steps, a plot per table; former plots are deleted."""
    for path in folder.glob("*_against_steps.png"):
        path.unlink()
    groups = [group for group in groups_of_scores(of_newest_weights(results)) if group.results[0].metric != "prdc"]
    stems: list[str] = []
    for group in groups:
        curves: dict[str, list[tuple[int, float]]] = {}
        for name, result in zip(row_words(group.results), group.results, strict=True):
            curves.setdefault(name, []).append((result.num_inference_steps, result.value))
        stems.append(group.stem)
        if len({steps for points in curves.values() for steps, _ in points}) > 1:
            # Where groups differ in quantization or reference alone, the later ones get a number.
            count = stems.count(group.stem)
            name = group.stem if count == 1 else f"{group.stem}_{count}"
            plot_against_steps(curves, group.title, folder / f"{name}_against_steps.png")


def draw_nearest(
    samples: Samples, reference: Reference, training: ImageSet, name: str, path: Path, count: int = 8
) -> Path:
    """Generated images above their nearest training images in pixels and in feature space: copies would show.

    Args:
        samples: Generated images with their features.
        reference: Features of the training images.
        training: The images themselves.
        name: Of the feature space.
        path: The file.
        count: How many.
    """
    images = samples.images[:count]
    _, in_features = nearest(samples.features.features[: len(images)], reference.features)
    in_pixels = nearest_in_pixels(images, training, len(reference.features))
    rows = {"generated": images, "nearest in pixels": _shown_pixels(training, in_pixels)}
    rows[f"nearest in {Path(name).name}"] = _shown_pixels(training, in_features[:, 0])  # for pixels the same row
    return plot_images(list(rows.values()), path, row_labels=list(rows))


def _shown_pixels(images: ImageSet, numbers: Sequence[int] | Tensor) -> Tensor:
    """Return images of a set as they are shown: 8 bits, whatever their depth."""
    pixels = images.batch(numbers).pixels
    return pixels if images.spec.bits == 8 else to_uint8(to_x_0(pixels, images.spec.bits))


def nearest_in_pixels(samples: Tensor, training: ImageSet, number: int, chunk: int = 4096) -> Tensor:
    """Numbers of the nearest of the first training images, shape (n,), a chunk of them in memory at a time.

    Args:
        samples: uint8, shape (n, C, H, W).
        training: The training images.
        number: How many of them, from the first.
        chunk: Training images in memory at a time.
    """
    best = torch.full((len(samples),), torch.inf, dtype=torch.float64)
    index = torch.zeros(len(samples), dtype=torch.int64)
    for start in range(0, number, chunk):
        some = _shown_pixels(training, list(range(start, min(start + chunk, number))))
        distance, found = (part[:, 0] for part in nearest(samples.flatten(1), some.flatten(1)))
        index = torch.where(distance < best, found + start, index)
        best = torch.minimum(distance, best)
    return index


def _as_pixels(x_0: Tensor | None) -> Tensor:
    """uint8 images of x_0 in about [-1, 1]."""
    assert x_0 is not None
    return to_uint8(x_0.detach().float().cpu())
