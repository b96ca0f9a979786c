"""Pipeline + images -> measurements over any number of processes: features of generated images, bits of real ones.

Image i of a measurement draws all its noise from a generator seeded by seed + i, so that neither batches nor processes
change what it measures but for the last digits of the network's sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from torch import Tensor

from ..data.dataset import ImageSet
from ..diffusion.analytic import optimal_variance
from ..diffusion.likelihood import gaussian_kl
from ..diffusion.process import jump
from ..diffusion.reverse import reverse_log_var, variance_bounds
from ..diffusion.words import Cdf, DecoderVariance
from ..pipelines.ddpm import DDPMExtPipeline
from ..pipelines.sampling import images_from_seeds
from ..schedulers.config import extension
from ..schedulers.ddpm import DDPMExtScheduler
from .bits_per_dim import BitsPerDim, Bound, Sweep, full_sweep, make_bound, rate_distortion_rows, sampled_bound
from .checks import grid_images
from .features import Extractor, Features, extract, hand_off
from .reference import as_features, as_tensors
from .sharded import run_shards
from .words import HandOff

KEPT_IMAGES = 64  # generated images that are kept for a grid
SAMPLE_SHARD, SWEEP_SHARD, SAMPLED_SHARD = 500, 32, 256


class Samples(NamedTuple):
    """What is kept of generated images."""

    features: Features
    images: Tensor  # uint8, (n, C, H, W): the first KEPT_IMAGES


class SetBound(NamedTuple):
    """The bound of the images of a set."""

    bits_per_dim: BitsPerDim  # per image; standard_error that of the mean over the set
    sweep: Sweep | None  # None where the steps were sampled


def labels_in_turn(pipeline: DDPMExtPipeline, numbers: range) -> list[int] | None:
    """Labels of images by number, which go round the classes; None for a network without classes."""
    classes = pipeline.unet.config.get("num_class_embeds")
    return None if classes is None else [i % classes for i in numbers]


def sample_features(
    pipeline: DDPMExtPipeline,
    extractor: Extractor,
    kind: HandOff,
    *,
    num_samples: int,
    num_inference_steps: int,
    seed: int,
    batch_size: int,
    folder: Path,
    key: dict[str, Any],
    accelerator: Accelerator,
) -> Samples:
    """Features of generated images, piece by piece; the images themselves are not held.

    Args:
        pipeline: Network and scheduler.
        extractor: Makes the features.
        kind: The pixel hand-off.
        num_samples: Number of images.
        num_inference_steps: Denoising steps.
        seed: Image i is drawn from seed + i.
        batch_size: Images of one process at a time.
        folder: Where the pieces go.
        key: What tells this model and sampler from others.
        accelerator: Knows the processes; each of them must call.
    """

    def work(piece: range) -> dict[str, Tensor]:
        kept: list[Tensor] = []

        def batches() -> Iterator[Tensor]:
            for images in images_from_seeds(
                pipeline,
                [seed + i for i in piece],
                batch_size=batch_size,
                num_inference_steps=num_inference_steps,
                class_labels=labels_in_turn(pipeline, piece),
            ):
                room = max(0, KEPT_IMAGES - piece.start - sum(map(len, kept)))
                kept.append((hand_off(images[:room], "uint8") * 255).round().to(torch.uint8).cpu())
                yield images

        found = extract(extractor, batches(), kind)
        return {**as_tensors(found), "images": torch.cat(kept)}

    key = {
        **key,
        "extractor": extractor.description,
        "hand_off": kind,
        "num_inference_steps": num_inference_steps,
        "seed": seed,
    }
    tensors = run_shards(folder, "samples", key, num_samples, SAMPLE_SHARD, work, accelerator)
    return Samples(as_features(tensors), tensors["images"])


def images_and_labels(unet: UNet2DModel, images: ImageSet, numbers: range) -> tuple[Tensor, Tensor | None]:
    """(pixels, classes) of images by number; classes where the network asks for them, else None.

    Raises:
        ValueError: it asks for them and the set has none.
    """
    pixels, labels = images.batch(list(numbers))
    if unet.config.get("num_class_embeds") is None:
        return pixels, None
    if labels is None:
        raise ValueError("The network is class-conditional, and these images have no classes: name their label_column.")
    return pixels, labels


def set_bound(
    unet: UNet2DModel,
    scheduler: Any,
    images: ImageSet,
    *,
    num_images: int,
    seed: int,
    batch_size: int | None,
    num_inference_steps: int | None = None,
    num_timesteps_sampled: int | None = None,
    decoder_variance: DecoderVariance = "base",
    cdf: Cdf = "tanh",
    folder: Path,
    key: dict[str, Any],
    accelerator: Accelerator,
) -> SetBound:
    """`bits_per_dim` of the first images of a set, piece by piece over all processes; see there."""
    options = (num_inference_steps, None, decoder_variance, cdf, True, batch_size)
    depth = images.spec.bits

    def bound_of(piece: range) -> tuple[Bound, Tensor]:
        pixels, labels = images_and_labels(unet, images, piece)
        return make_bound(unet, scheduler, pixels, *options, labels, depth), pixels

    times = bound_of(range(1))[0].times

    def work(piece: range) -> dict[str, Tensor]:
        bound, pixels = bound_of(piece)
        generators = [torch.Generator().manual_seed(seed + i) for i in piece]
        if num_timesteps_sampled is not None:
            bits = sampled_bound(bound, grid_images(pixels, depth), num_timesteps_sampled, generators)
            found = bits._replace(standard_error=None)._asdict()
            assert bits.standard_error is not None
            found["spread"] = (bits.standard_error * len(piece)).square().reshape(1)
        else:
            sweep = full_sweep(bound, grid_images(pixels, depth), generators)
            found = {**sweep.bits_per_dim._asdict(), "squared_error": sweep.squared_error}
        return {name: part.cpu() for name, part in found.items() if part is not None}

    key = {
        **key,
        "dataset": images.fingerprint,
        "seed": seed,
        "timesteps": [times[0], times[-1], len(times)],
        "num_timesteps_sampled": num_timesteps_sampled,
        "decoder_variance": decoder_variance,
        "cdf": cdf,
    }
    size = SWEEP_SHARD if num_timesteps_sampled is None else SAMPLED_SHARD
    found = run_shards(folder, "bits", key, num_images, size, work, accelerator)
    if num_timesteps_sampled is not None:
        error = found["spread"].sum().sqrt() / num_images
        return SetBound(BitsPerDim(found["prior"], None, found["decoder"], found["total"], error), None)
    bits = BitsPerDim(found["prior"], found["steps"], found["decoder"], found["total"], None)
    return SetBound(bits, Sweep(times, bits, found["squared_error"], depth))


def is_fixed(scheduler: Any) -> bool:
    """Whether a scheduler's reverse variance is one number per step, and its steps do not depend on which."""
    return str(scheduler.config.variance_type).startswith("fixed_") and extension(scheduler.config).trajectory != (
        "optimal"
    )


def under_fixed_variance(found: SetBound, scheduler: DDPMExtScheduler, times: list[int] | None = None) -> SetBound:
    r"""The same network and the same noise judged with another variance or chain, without running the network again.

        mean_dims L_{t-1} = ½ [β̃/σ² - 1 - log(β̃/σ²) + (c1²/σ²) mean_dims (x_0 - x̂_0)²]

    A fixed or analytic σ² is one number per step, so the squared errors of the sweep are all that it needs. L_T and L_0
    depend neither on which of these variances it is nor on the kept times between the first and the last.

    Args:
        found: A full sweep under any fixed variance.
        scheduler: The other variance, and the same noise schedule.
        times: Kept times, descending: some of the sweep's, its first and last among them; None for all.
    """
    assert found.sweep is not None
    bits, kept = found.sweep.bits_per_dim, found.sweep.timesteps
    times = kept if times is None else times
    if (times[0], times[-1]) != (kept[0], kept[-1]):
        raise ValueError(f"times must run from {kept[0]} to {kept[-1]} as the sweep does, got {times[0]}..{times[-1]}.")
    squared_error = found.sweep.squared_error[:, [kept.index(t) for t in times]]
    t, s = torch.tensor(times[:-1]), torch.tensor(times[1:])
    step = jump(scheduler.tables, t, s)
    small, large = variance_bounds(step, step.var.log())
    log_optimal, mse_eps = None, extension(scheduler.config).mse_eps
    if mse_eps is not None:
        log_optimal = optimal_variance(scheduler.tables, torch.tensor(mse_eps, dtype=torch.float64), s, t).log()
    variance_type, last = scheduler.config["variance_type"], torch.zeros_like(t, dtype=torch.bool)
    log_var = reverse_log_var(variance_type, small, large, last, log_optimal=log_optimal)
    rmse = squared_error[:, :-1].sqrt()
    steps = gaussian_kl(step.c1 * rmse, small, torch.zeros_like(rmse), log_var) / math.log(2)
    bits = bits._replace(steps=steps, total=bits.prior + steps.sum(1) + bits.decoder)
    return SetBound(bits, Sweep(times, bits, squared_error, found.sweep.bits))


def bits_of(found: SetBound) -> dict[str, Any]:
    """Mean bits/dim and its three parts. The error is of sampled steps; that of other images stands beside it."""
    bits = found.bits_per_dim
    total, prior, decoder = (part.mean().item() for part in (bits.total, bits.prior, bits.decoder))
    return {
        "value": total,
        "standard_error": None if bits.standard_error is None else bits.standard_error.item(),
        "parts": {
            "prior": prior,
            "rate": total - prior - decoder,
            "decoder": decoder,
            "standard_error_over_images": standard_error_of_mean(bits.total),
        },
    }


def rows_of(found: SetBound, num_timesteps: int) -> dict[str, Any]:
    """About ten rows of DDPM Table 4; value is the distortion of the last."""
    assert found.sweep is not None
    rows = rate_distortion_rows(found.sweep, num_timesteps)
    count = len(rows.label)
    chosen = sorted({math.ceil(count * k / 10) - 1 for k in range(1, 11)})
    names = ("label", "timesteps", "rate_bits_per_dim", "distortion_rmse")
    columns = (rows.label, rows.timesteps, rows.rate_bits_per_dim.tolist(), rows.distortion_rmse.tolist())
    return {
        "value": columns[-1][-1],
        "rows": [{name: column[i] for name, column in zip(names, columns, strict=True)} for i in chosen],
    }


def standard_error_of_mean(x: Tensor) -> float:
    """σ/√N of a value per image: how far the mean of another N images of the same kind would lie."""
    return x.std().item() / math.sqrt(len(x)) if len(x) > 1 else math.nan
