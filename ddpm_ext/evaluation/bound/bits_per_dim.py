r"""Network + scheduler + images -> bits per dimension, and the rows of rate against distortion.

    bits/dim = (L_0 + Σ L_{t-1} + L_T) / ln 2                           Ho et al. 2020, arXiv:2006.11239, Eq. (5)

One fresh noise per (image, t). The network runs in its own precision, every sum in float64. A perfect network still
pays L_0 = 1.3057 bits on an interior grey level with the linear schedule: a floor of the model class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...errors import UserError
from ...schedulers.checks import Generators
from .checks import grid_images
from .records import BitsPerDim, RateDistortion, rate_distortion_rows
from .sampled import sampled_bound
from .terms import BoundOptions, Network, full_sweep, make_bound

if TYPE_CHECKING:
    from ...schedulers.contract import Scheduler

__all__ = ["BitsPerDim", "BoundOptions", "RateDistortion", "bits_per_dim", "rate_distortion"]


def bits_per_dim(
    model: Network,
    scheduler: Scheduler,
    images: Tensor,
    options: BoundOptions | None = None,
    *,
    generator: Generators = None,
    class_labels: Tensor | Sequence[int] | None = None,
    **changes: Any,
) -> BitsPerDim:
    r"""Return the variational bound on -log₂ p(x_0) of each image, in bits per dimension.

    Args:
        model: A UNet2DModel, or anything callable as (x_t, t) whose result is a tensor or has `.sample`. Put into eval
            mode while it runs.
        scheduler: A DDPMExtScheduler, or a stock scheduler, which is turned into one. It is left as it is.
        images: Shape (B, C, H, W): levels (uint8, above 8 bits int32) or floats on the grid 2k/(2^bits - 1) - 1.
        options: Which bound; see `BoundOptions`.
        generator: Source of the noise; a list of one per image makes every image independent of its batch, but for
            num_timesteps_sampled.
        class_labels: The class of each image, shape (B,), for a class-conditional network: the bound on
            -log₂ p(x_0 | class), from the network's `class_labels`.
        **changes: Fields of `options` by name, as in `bits_per_dim(..., num_timesteps_sampled=50)`.

    Raises:
        ValueError: images off the grid, of wrong range or shape, or NaN, or not of the network's channels and
            size; a network whose output is NaN or does not fit; a scheduler without betas; steps that the scheduler
            refuses; a list of generators that is not one per image.

    Example:
        >>> from ddpm_ext import DDPMExtScheduler, load_images
        >>> digits = load_images("digits", split="test").batch(range(2)).pixels
        >>> bits = bits_per_dim(lambda x_t, t: x_t, DDPMExtScheduler(), digits, num_inference_steps=10)
        >>> tuple(bits.total.shape), bool((bits.total > 0).all())
        ((2,), True)
    """
    options = replace(options or BoundOptions(), **changes)
    x_0 = grid_images(images, options.bits)
    bound = make_bound(model, scheduler, images, options, class_labels)
    if options.num_timesteps_sampled is None:
        return full_sweep(bound, x_0, generator).bits_per_dim
    return sampled_bound(bound, x_0, options.num_timesteps_sampled, generator)


def rate_distortion(
    model: Network,
    scheduler: Scheduler,
    images: Tensor,
    options: BoundOptions | None = None,
    *,
    generator: Generators = None,
    class_labels: Tensor | Sequence[int] | None = None,
    **changes: Any,
) -> RateDistortion:
    """Return the rows of DDPM Table 4, averaged over the images.

    Args:
        model: As for `bits_per_dim`, and so on.
        scheduler: As there.
        images: As there.
        options: As there, but that every step is taken.
        generator: As there.
        class_labels: As there.
        **changes: As there.

    Raises:
        ValueError: num_timesteps_sampled is given, or as there.

    Example:
        >>> from ddpm_ext import DDPMExtScheduler, load_images
        >>> digits = load_images("digits", split="test").batch(range(2)).pixels
        >>> rows = rate_distortion(lambda x_t, t: x_t, DDPMExtScheduler(), digits, num_inference_steps=10)
        >>> len(rows.timesteps), bool((rows.rate_bits_per_dim.diff() >= 0).all())
        (10, True)
    """
    options = replace(options or BoundOptions(), **changes)
    x_0 = grid_images(images, options.bits)
    if options.num_timesteps_sampled is not None:
        raise UserError("rate_distortion needs every step: leave num_timesteps_sampled out.")
    bound = make_bound(model, scheduler, images, options, class_labels)
    return rate_distortion_rows(full_sweep(bound, x_0, generator), bound.chain.tables.num_timesteps)
