"""The bound of the first images of a set, piece by piece over all processes; one sweep serves every fixed variance.

Image i draws all its noise from a generator seeded by seed + i, so that neither batches nor processes change what is
measured but for the last digits of the network's sums.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...diffusion.analytic import optimal_variance
from ...diffusion.likelihood import gaussian_kl
from ...diffusion.process import jump
from ...diffusion.reverse import reverse_log_var, variance_bounds
from ...errors import UserError
from ...schedulers.config import extension
from ..images import images_and_labels
from .checks import grid_images
from .records import BitsPerDim, Sweep, rate_distortion_rows
from .sampled import check_sampled_steps, sampled_bound
from .terms import SWEEP_SHARD, Bound, BoundOptions, full_sweep, make_bound

if TYPE_CHECKING:
    from diffusers import UNet2DModel

    from ...data.dataset import ImageSet
    from ...schedulers.ddpm import DDPMExtScheduler
    from ..results import Outcome
    from ..sharded import Shards

__all__ = ["SetBound", "bits_of", "check_bound", "is_fixed", "rows_of", "set_bound", "under_fixed_variance"]

_SAMPLED_SHARD = 256  # images of a piece in which steps are drawn


class SetBound(NamedTuple):
    """The bound of the images of a set."""

    bits_per_dim: BitsPerDim  # per image; standard_error that of the mean over the set
    sweep: Sweep | None  # None where the steps were sampled


def set_bound(
    unet: UNet2DModel,
    scheduler: DDPMExtScheduler,
    images: ImageSet,
    *,
    num_images: int,
    seed: int,
    options: BoundOptions,
    shards: Shards,
) -> SetBound:
    """Measure `bits_per_dim` of the first images of a set, piece by piece over all processes.

    Args:
        unet: The network.
        scheduler: Its chain.
        images: The set.
        num_images: How many of them.
        seed: Image i draws its noise from seed + i.
        options: Which bound.
        shards: Where the pieces go; each process must call.
    """
    options = replace(options, bits=images.spec.bits)
    sampled = options.num_timesteps_sampled

    def bound_of(piece: range) -> tuple[Bound, Tensor]:
        pixels, labels = images_and_labels(unet, images, piece)
        return make_bound(unet, scheduler, pixels, options, labels), pixels

    times = bound_of(range(1))[0].timesteps

    def work(piece: range) -> dict[str, Tensor]:
        bound, pixels = bound_of(piece)
        generators = [torch.Generator().manual_seed(seed + i) for i in piece]
        if sampled is not None:
            bits = sampled_bound(bound, grid_images(pixels, options.bits), sampled, generators)
            found = bits._replace(standard_error=None)._asdict()
            assert bits.standard_error is not None
            found["spread"] = (bits.standard_error * len(piece)).square().reshape(1)
        else:
            sweep = full_sweep(bound, grid_images(pixels, options.bits), generators)
            found = {**sweep.bits_per_dim._asdict(), "squared_error": sweep.squared_error}
        return {name: part.cpu() for name, part in found.items() if part is not None}

    key = {
        "dataset": images.fingerprint,
        "seed": seed,
        "timesteps": [times[0], times[-1], len(times)],
        "num_timesteps_sampled": sampled,
        "decoder_variance": options.decoder_variance,
        "cdf": options.cdf,
    }
    size = SWEEP_SHARD if sampled is None else _SAMPLED_SHARD
    found = shards.run("bits", key, num_images, size, work)
    if sampled is not None:
        error = found["spread"].sum().sqrt() / num_images
        return SetBound(BitsPerDim(found["prior"], None, found["decoder"], found["total"], error), None)
    bits = BitsPerDim(found["prior"], found["steps"], found["decoder"], found["total"], None)
    return SetBound(bits, Sweep(times, bits, found["squared_error"], options.bits))


def is_fixed(scheduler: DDPMExtScheduler) -> bool:
    """Return whether a scheduler's reverse variance is one number per step, and its steps do not depend on which."""
    return str(scheduler.config["variance_type"]).startswith("fixed_") and extension(scheduler.config).trajectory != (
        "optimal"
    )


def under_fixed_variance(found: SetBound, scheduler: DDPMExtScheduler, timesteps: list[int] | None = None) -> SetBound:
    r"""Judge the same network and noise with another variance or chain, without running the network again.

        mean_dims L_{t-1} = ½ [β̃/σ² - 1 - log(β̃/σ²) + (c1²/σ²) mean_dims (x_0 - x̂_0)²]

    A fixed or analytic σ² is one number per step, so the squared errors of the sweep are all that it needs. L_T and L_0
    depend neither on which of these variances it is nor on the timesteps between the first and the last.

    Args:
        found: A full sweep under any fixed variance.
        scheduler: The other variance, and the same noise schedule.
        timesteps: Of a shorter chain, descending: some of the sweep's, its first and last among them; None for all.

    Raises:
        UserError: the chain does not run from the sweep's first time to its last.
    """
    assert found.sweep is not None
    bits, swept = found.sweep.bits_per_dim, found.sweep.timesteps
    times = swept if timesteps is None else timesteps
    if (times[0], times[-1]) != (swept[0], swept[-1]):
        raise UserError(
            f"timesteps must run from {swept[0]} to {swept[-1]} as the sweep does, got {times[0]}..{times[-1]}."
        )
    squared_error = found.sweep.squared_error[:, [swept.index(t) for t in times]]
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


def check_bound(unet: UNet2DModel, scheduler: DDPMExtScheduler, images: ImageSet, options: BoundOptions) -> None:
    """Make the bound of one image, so that what it refuses is refused before anything is measured.

    Args:
        unet: The network.
        scheduler: The chain.
        images: The set.
        options: Which bound.
    """
    pixels, labels = images_and_labels(unet, images, range(1))
    bound = make_bound(unet, scheduler, pixels, replace(options, bits=images.spec.bits), labels)
    if options.num_timesteps_sampled is not None:
        check_sampled_steps(bound, options.num_timesteps_sampled)


def bits_of(found: SetBound) -> Outcome:
    """Return mean bits/dim and its three parts as fields of a result.

    The standard error is of sampled steps; that of other images stands among the parts.
    """
    bits = found.bits_per_dim
    total, prior, decoder = (part.mean().item() for part in (bits.total, bits.prior, bits.decoder))
    over_images = bits.total.std().item() / math.sqrt(len(bits.total)) if len(bits.total) > 1 else math.nan
    rate = total - prior - decoder
    return {
        "value": total,
        "standard_error": None if bits.standard_error is None else bits.standard_error.item(),
        "parts": {"prior": prior, "rate": rate, "decoder": decoder, "standard_error_over_images": over_images},
    }


def rows_of(sweep: Sweep, num_timesteps: int) -> Outcome:
    """Return about ten rows of DDPM Table 4 as fields of a result; value is the distortion of the last."""
    rows = rate_distortion_rows(sweep, num_timesteps)
    count = len(rows.label)
    chosen = sorted({math.ceil(count * k / 10) - 1 for k in range(1, 11)})
    columns = {name: part.tolist() if isinstance(part, Tensor) else part for name, part in rows._asdict().items()}
    return {
        "value": columns["distortion_rmse"][-1],
        "rows": [{name: column[i] for name, column in columns.items()} for i in chosen],
    }
