"""Arrays -> pictures with matplotlib (extra `plots`): grids of images, rate and distortion, quality against steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


def figure_class() -> Any:
    """matplotlib's Figure, which needs neither a display nor pyplot's global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("Plots need matplotlib: pip install ddpm-ext[plots], or leave --plots out.") from error
    return Figure


def save(figure: Any, path: Path | str) -> Path:
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
    return save(figure, path)


def plot_bits_per_step(timesteps: Sequence[int], bits: Tensor, path: Path | str) -> Path:
    """Bits/dim that each step of the bound costs, L_{t-1} and L_0 last, on a logarithmic scale.

    Args:
        timesteps: Kept times, 0 <= t < T, shape (K,).
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
    return save(figure, path)


def plot_against_steps(curves: dict[str, list[tuple[int, float]]], metric: str, path: Path | str) -> Path:
    """A score against the number of denoising steps, one curve per sampler; logarithmic where no score forbids it.

    Args:
        curves: Name of the sampler -> (steps, score) pairs.
        metric: Name of the score.
        path: The file.
    """
    figure = figure_class()(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        axes.semilogx(*zip(*sorted(points), strict=True), "o-", label=name)
    if all(score > 0 for points in curves.values() for _, score in points):  # KID may be negative
        axes.set_yscale("log")
    axes.set_xlabel("denoising steps")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return save(figure, path)


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
        raise ValueError(f"All images of a grid must have one size, got {sorted({tuple(r.shape[1:]) for r in rows})}.")
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
    return save(figure, path)
