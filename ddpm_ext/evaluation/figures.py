"""Pipeline -> the pictures of the paper: progressive generation, shared latents, interpolation, nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.dataset import ImageSet
from ..diffusion.images import to_uint8, to_x_0
from ..pipelines.ddpm import DDPMExtPipeline
from .bits_per_dim import Sweep, rate_distortion_rows
from .measure import Samples, images_and_labels
from .metrics import nearest
from .plots import plot_against_steps, plot_bits_per_step, plot_images, plot_rate_distortion
from .reference import Reference
from .report import groups_of_scores, of_newest_weights, row_words

AMONG = 32  # training images of which the interpolation takes the two farthest apart


def spread(num_timesteps: int, count: int) -> list[int]:
    """`count` steps from T - 1 down to 0, evenly spaced."""
    return [round((num_timesteps - 1) * (1 - k / (count - 1))) for k in range(count)]


def draw_progressive(
    pipeline: DDPMExtPipeline, path: Path, num_images: int = 6, columns: int = 10, seed: int = 0
) -> Path:
    """DDPM Figure 6: x̂_0 as generation goes on."""
    T = pipeline.scheduler.config.num_train_timesteps
    at = spread(T, columns)
    generator = [torch.Generator().manual_seed(seed + i) for i in range(num_images)]
    labels = round_the_classes(pipeline, num_images)
    views = list(pipeline.progressive(num_images, generator, num_inference_steps=T, at=at, class_labels=labels))
    guesses = torch.stack([as_pixels(view.x_0) for view in views], dim=1)
    return plot_images(list(guesses), path, column_labels=[f"t = {view.t}" for view in views])


def draw_shared_latents(
    pipeline: DDPMExtPipeline, path: Path, times: Sequence[int] | None = None, num_samples: int = 8, seed: int = 0
) -> Path:
    """DDPM Figure 7: images that share x_t, and class 0 where there are classes; the later t, the less they share."""
    T = pipeline.scheduler.config.num_train_timesteps
    times = list(times or (round((T - 1) * share) for share in (1, 0.75, 0.5, 0.25)))
    label, rows = round_the_classes(pipeline, 1), []
    chain = {"num_inference_steps": T, "at": times, "class_labels": label}
    for view in list(pipeline.progressive(1, torch.Generator().manual_seed(seed), **chain)):
        generators = [torch.Generator().manual_seed(seed + 1 + i) for i in range(num_samples)]
        options: dict[str, Any] = {"output_type": "latent", "class_labels": label}
        found = pipeline.continue_from(view.x_t, view.t, num_samples, generators, **options)
        rows.append(as_pixels(found.images))  # pyright: ignore[reportArgumentType]
    return plot_images(rows, path, row_labels=[f"share x_t, t = {t}" for t in sorted(times, reverse=True)])


def draw_interpolation(
    pipeline: DDPMExtPipeline,
    images: Tensor,
    path: Path,
    times: Sequence[int] | None = None,
    seed: int = 0,
    classes: Tensor | None = None,
) -> Path:
    """DDPM Figure 8: between two images, mixed after t forward steps.

    Args:
        pipeline: Network and scheduler.
        images: x_0 of the two, shape (2, C, H, W), values in [-1, 1].
        path: The file.
        times: Where they are mixed; None for four times.
        seed: Of the shared noise.
        classes: Of the two, shape (2,), where the network asks for them; a mixture takes that of the nearer image.
    """
    T = pipeline.scheduler.config.num_train_timesteps
    weights = [k / 8 for k in range(9)]
    times = list(times or (round((T - 1) * share) for share in (0.125, 0.25, 0.5, 0.75)))
    labels = None if classes is None else [int(classes[round(weight)]) for weight in weights]
    options: dict[str, Any] = {"output_type": "latent", "class_labels": labels}
    rows = []
    for t in times:
        generator = torch.Generator().manual_seed(seed)
        found = pipeline.interpolate(images[0], images[1], t, weights, generator, **options)
        rows.append(as_pixels(found.images))  # pyright: ignore[reportArgumentType]
    columns = [f"λ = {weight:g}" for weight in weights]
    return plot_images(rows, path, row_labels=[f"mixed at t = {t}" for t in times], column_labels=columns)


def draw_paper(pipeline: DDPMExtPipeline, training: ImageSet, folder: Path, seed: int = 0) -> None:
    """Figures 6, 7 and 8 of the paper, at every step of the chain; Figure 8 between two training images far apart."""
    draw_progressive(pipeline, folder / "progressive.png", seed=seed)
    draw_shared_latents(pipeline, folder / "shared_latents.png", seed=seed)
    first = range(min(AMONG, len(training)))
    pixels, classes = images_and_labels(pipeline.unet, training, first)
    pair = farthest_pair(pixels)
    labels = None if classes is None else classes[pair]
    x_0 = to_x_0(pixels[pair], training.spec.bits)
    draw_interpolation(pipeline, x_0, folder / "interpolation.png", seed=seed, classes=labels)


def farthest_pair(pixels: Tensor) -> list[int]:
    """Numbers of the two images that differ most, the first such pair; pixels uint8, shape (n, C, H, W), n >= 2."""
    flat = pixels.flatten(1).double()
    distance = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    return list(divmod(int(distance.argmax()), len(flat)))


def round_the_classes(pipeline: DDPMExtPipeline, count: int) -> list[int] | None:
    """Labels 0, 1, ... of images of a class-conditional network; None for another."""
    classes = pipeline.unet.config.get("num_class_embeds")
    return None if classes is None else [i % classes for i in range(count)]


def draw_bound(sweep: Sweep, num_timesteps: int, folder: Path, name: str | None) -> None:
    """Rate against distortion, and the bits of every step."""
    rows = rate_distortion_rows(sweep, num_timesteps)
    plot_rate_distortion(
        rows.label, rows.rate_bits_per_dim, rows.distortion_rmse, folder / f"rate_distortion_{name}.png"
    )
    bits = sweep.bits_per_dim
    assert bits.steps is not None
    terms = torch.cat([bits.steps, bits.decoder[:, None]], dim=1).mean(0)
    plot_bits_per_step(sweep.timesteps, terms, folder / f"bits_per_step_{name}.png")


def draw_quality(figures: list[dict[str, Any]], folder: Path) -> None:
    """Every score of the newest weights against denoising steps, a plot per table; those of before are deleted."""
    for path in folder.glob("*_against_steps.png"):
        path.unlink()
    groups = [group for group in groups_of_scores(of_newest_weights(figures)) if group.metric != "prdc"]
    stems = [f"{group.metric}_{group.num_samples}_{Path(group.extractor).name}" for group in groups]
    for i, (group, stem) in enumerate(zip(groups, stems, strict=True)):
        curves: dict[str, list[tuple[int, float]]] = {}
        for name, figure in zip(row_words(group.figures), group.figures, strict=True):
            curves.setdefault(name, []).append((figure["num_inference_steps"], figure["value"]))
        if len({steps for points in curves.values() for steps, _ in points}) > 1:
            # Where groups differ in hand-off or reference alone, the later ones get a number.
            name = stem if stem not in stems[:i] else f"{stem}_{stems[:i].count(stem) + 1}"
            how = "" if stems.count(stem) == 1 else f", {group.hand_off}, to {group.reference}"
            plot_against_steps(curves, f"{stem}{how}", folder / f"{name}_against_steps.png")


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
    rows = {"generated": images, "nearest in pixels": shown_pixels(training, in_pixels)}
    rows[f"nearest in {Path(name).name}"] = shown_pixels(training, in_features[:, 0])  # for pixels the same row
    return plot_images(list(rows.values()), path, row_labels=list(rows))


def shown_pixels(images: ImageSet, numbers: Sequence[int] | Tensor) -> Tensor:
    """Return images of a set as they are shown: 8 bits, whatever their depth."""
    pixels = images.batch(numbers).pixels
    return pixels if images.spec.bits == 8 else to_uint8(to_x_0(pixels, images.spec.bits))


def nearest_in_pixels(samples: Tensor, training: ImageSet, number: int, chunk: int = 4096) -> Tensor:
    """Numbers of the nearest of the first training images, shape (n,), a chunk of them in memory at a time."""
    best = torch.full((len(samples),), torch.inf, dtype=torch.float64)
    index = torch.zeros(len(samples), dtype=torch.int64)
    for start in range(0, number, chunk):
        some = shown_pixels(training, list(range(start, min(start + chunk, number))))
        distance, found = (part[:, 0] for part in nearest(samples.flatten(1), some.flatten(1)))
        index = torch.where(distance < best, found + start, index)
        best = torch.minimum(distance, best)
    return index


def as_pixels(x_0: Tensor | None) -> Tensor:
    """uint8 images of x_0 in about [-1, 1]."""
    assert x_0 is not None
    return to_uint8(x_0.detach().float().cpu())
