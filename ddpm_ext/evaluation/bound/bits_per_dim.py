r"""Network + scheduler + images -> bits per dimension, and the rows of rate against distortion.

    bits/dim = (L_0 + Σ L_{t-1} + L_T) / ln 2                           Ho et al. 2020, arXiv:2006.11239, Eq. (5)

One fresh noise per (image, t). The network runs in its own precision, every sum in float64. A perfect network still
pays L_0 = 1.3057 bits on an interior grey level with the linear schedule: a floor of the model class.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, get_args

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...diffusion.images import half_range
from ...diffusion.likelihood import BoundTerms, decoder_nll, mean_over_dims, prior_kl, step_kl
from ...diffusion.process import jump, per_image, q_sample
from ...diffusion.tables import Tables
from ...diffusion.words import Cdf, DecoderVariance
from ...errors import UserError, check_word, is_whole
from ...schedulers.checks import Generators, check_generators
from ...schedulers.config import GuidanceSetting
from ...schedulers.ddpm import DDPMExtScheduler
from .checks import as_ours, check_network, checked_labels, grid_images

__all__ = [
    "PILOT_FLOOR",
    "PILOT_IMAGES",
    "BitsPerDim",
    "Bound",
    "BoundOptions",
    "RateDistortion",
    "Sweep",
    "bits_per_dim",
    "check_sampled_steps",
    "evaluating",
    "full_sweep",
    "make_bound",
    "pilot_distribution",
    "rate_distortion",
    "rate_distortion_rows",
    "sampled_bound",
]

_PAIR_ELEMENTS, _MOST_PAIRS = 2**19, 1024  # numbers and pairs in one network call where batch_size is None
PILOT_IMAGES = 8  # whose L_t shape the distribution of sampled t
_PILOT_SEED = 2_206_069_301  # one that nobody takes for the images: p_t must not know the noise that it weighs
PILOT_FLOOR = 0.001  # uniform share of that distribution: no jump is impossible because the pilot pays nothing


class BitsPerDim(NamedTuple):
    """The bound of each image, float64, in bits/dim. Lower is better."""

    prior: Tensor  # (B,): L_T
    steps: Tensor | None  # (B, K - 1): L_{t-1} from the noisiest jump to the last but one; None where sampled
    decoder: Tensor  # (B,): L_0
    total: Tensor  # (B,)
    standard_error: Tensor | None  # 0-d: of total.mean(), images held fixed; None where every step was taken


class Sweep(NamedTuple):
    """Every jump of the chain on every image."""

    timesteps: list[int]  # K kept times, descending, 0 <= t < T
    bits_per_dim: BitsPerDim
    squared_error: Tensor  # (B, K): mean over dimensions of (x_0 - x̂_0(x_t))², images in [-1, 1]
    bits: int = 8  # depth of the images


class RateDistortion(NamedTuple):
    """DDPM Table 4 and Figure 5: one row per kept time, from the noisiest."""

    label: list[int]  # T - t + 1 of the paper's t: 1 is the first reverse step
    timesteps: list[int]  # code index t, 0 <= t < T
    rate_bits_per_dim: Tensor  # (K,): L_T + Σ_{u>t} L_{u-1}, what is sent before x_t is known
    distortion_rmse: Tensor  # (K,): √E(x_0 - x̂_0(x_t))², in levels: 127.5 of them make 1 at 8 bits


@dataclass(frozen=True, kw_only=True)
class BoundOptions:
    """Which bound of a network is measured, and how much of it.

    Attributes:
        num_inference_steps: K of a respaced chain, spaced as the scheduler says; None for all T steps.
        timesteps: The kept times themselves, descending, in place of K.
        decoder_variance: σ² of L_0: "base" (β̃_2 of the full chain, Analytic-DPM) or "respaced" (of the kept times).
        cdf: "tanh" as published, or "exact".
        clip_sample: Clip x̂_0 to the scheduler's range, as all published evaluations do. Dynamic thresholding, a trick
            of sampling, plays no part.
        num_timesteps_sampled: Jumps drawn per image instead of the whole sweep: an unbiased estimate (`sampled_bound`).
            Which jumps are likely follows from pilot images of the batch, so that an image's estimate, though not what
            it estimates, depends on the batch.
        batch_size: Pairs (image, t) in one network call; None chooses. It changes nothing but the speed.
        bits: Depth of the images.
    """

    num_inference_steps: int | None = None
    timesteps: Sequence[int] | Tensor | None = None
    decoder_variance: DecoderVariance = "base"
    cdf: Cdf = "tanh"
    clip_sample: bool = True
    num_timesteps_sampled: int | None = None
    batch_size: int | None = None
    bits: int = 8

    def __post_init__(self) -> None:
        check_word("decoder_variance", self.decoder_variance, get_args(DecoderVariance))
        check_word("cdf", self.cdf, get_args(Cdf))
        if self.batch_size is not None and (not is_whole(self.batch_size) or self.batch_size < 1):
            raise UserError(f"batch_size must be an int of at least 1, got {self.batch_size!r}.")


def bits_per_dim(
    model: Callable[..., Any],
    scheduler: Any,
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
    model: Callable[..., Any],
    scheduler: Any,
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


def rate_distortion_rows(sweep: Sweep, num_timesteps: int) -> RateDistortion:
    r"""Rows of a sweep: rate(t) = L_T + Σ_{u>t} L_{u-1}, distortion(t) = (2^bits - 1)/2 √E(x_0 - x̂_0(x_t))².

    Source: Ho et al. 2020, arXiv:2006.11239, §4.3.
    """
    found = sweep.bits_per_dim
    assert found.steps is not None
    rate = torch.cat([found.prior[:, None], found.steps], dim=1).mean(0).cumsum(0)
    return RateDistortion(
        label=[num_timesteps - t for t in sweep.timesteps],
        timesteps=sweep.timesteps,
        rate_bits_per_dim=rate,
        distortion_rmse=half_range(sweep.bits) * sweep.squared_error.mean(0).sqrt(),
    )


@dataclass(frozen=True)
class Bound:
    """A network and one chain of kept times: the bound's terms in nats, for images that need not lie on the grid."""

    model: Callable[..., Any]
    chain: DDPMExtScheduler
    tables: Tables  # on the device of the sums
    times: list[int]  # kept times, descending
    decoder_variance: DecoderVariance
    cdf: Cdf
    dtype: torch.dtype  # of the network's input
    device: torch.device  # of the network
    batch_size: int
    bits: int = 8  # depth of the images
    labels: Tensor | None = None  # (B,), classes of the images that it is asked about

    def prior(self, x_0: Tensor) -> Tensor:
        """L_T of each image, shape (B,), nats/dim."""
        return mean_over_dims(prior_kl(x_0, self.tables.alpha_bar[self.times[0]]))

    def ask(self, x_0: Tensor, t: Tensor, eps: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x_t, the network's output) of pairs: x_t rounded to the network's precision, both returned in x_0's.

        Args:
            x_0: Clean images, shape (B, C, H, W).
            t: Their steps, int64, shape (B,).
            eps: Their noise, in the shape of x_0.
            labels: Their classes, shape (B,), where the network asks for them.
        """
        condition = {} if labels is None else {"class_labels": labels.to(self.device)}
        x_t = q_sample(x_0, t, eps.to(x_0.dtype), self.tables).to(self.dtype)
        output = self.model(x_t.to(self.device), t.to(self.device), **condition)
        output = getattr(output, "sample", output)
        if not isinstance(output, Tensor):
            raise UserError(f"model must return a tensor or an object with .sample, got {type(output).__name__}.")
        return x_t.to(x_0.dtype), output.to(x_0)

    def terms(
        self, x_0: Tensor, t: Tensor, eps: Tensor, labels: Tensor | None = None, *, decoder: bool
    ) -> tuple[Tensor, Tensor]:
        """(L_{t-1}, or L_0 where `decoder`; mean of (x_0 - x̂_0)²) of pairs, each (P,), in nats/dim and x_0's unit².

        Args:
            x_0: Clean images, float64, shape (P, C, H, W).
            t: Kept times, int64, shape (P,); for the decoder all the last one, else none of them.
            eps: Noise in the shape of x_0.
            labels: Classes, int64, shape (P,), where the network asks for them.
            decoder: Which of the two terms.
        """
        x_t, output = self.ask(x_0, t, eps, labels)
        reverse = self.chain.p_mean_variance(output, t, x_t, decoder_variance=self.decoder_variance)
        x_0_hat = reverse.pred_original_sample
        if decoder:  # the mean of the last jump is x̂_0 itself
            nats = decoder_nll(x_0, x_0_hat, reverse.log_var, cdf=self.cdf, bits=self.bits)
        else:
            step = jump(self.tables, t, self.chain.previous_timestep(t))
            c1, log_posterior_var = per_image(step.c1, x_0), per_image(step.var.log(), x_0)
            nats = step_kl(x_0, x_0_hat, c1, log_posterior_var, reverse.log_var)
        return mean_over_dims(nats), mean_over_dims((x_0 - x_0_hat) ** 2)

    def columns(
        self,
        x_0: Tensor,
        t: Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        *,
        decoder: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """`terms` of every image at its own t in each column, a fresh noise each, batched over all pairs.

        Args:
            x_0: Clean images, float64, shape (B, C, H, W).
            t: int64, shape (B, M).
            generator: One, or a list of one per image. Draws one noise of x_0's shape per column, so that the batch
                size does not enter.
            decoder: As in `terms`.

        Returns:
            Two tensors (B, M).
        """
        if t.numel() == 0:  # a chain of one step has no jump before the decoder
            return x_0.new_zeros(t.shape), x_0.new_zeros(t.shape)
        shape, dtype = x_0.shape, torch.promote_types(self.dtype, torch.float32)
        found: list[tuple[Tensor, Tensor]] = []
        source = list(generator) if isinstance(generator, Sequence) else generator
        for some in t.T.split(max(1, self.batch_size // len(x_0))):
            eps = [randn_tensor(shape, generator=source, device=x_0.device, dtype=dtype) for _ in some]
            pairs = [x_0.repeat(len(some), 1, 1, 1), some.reshape(-1), torch.cat(eps)]
            pairs += [] if self.labels is None else [self.labels.repeat(len(some))]
            for pair in zip(*(part.split(self.batch_size) for part in pairs), strict=True):
                found.append(self.terms(*pair, decoder=decoder))
        nats, squared_error = (torch.cat(parts).reshape(t.T.shape).T for parts in zip(*found, strict=True))
        self._check_finite(nats, t)
        return nats, squared_error

    def _check_finite(self, nats: Tensor, t: Tensor) -> None:
        wrong = ~torch.isfinite(nats)
        if bool(wrong.any()):
            raise UserError(
                f"The network's output is not finite at timestep {int(t[wrong][0])} ({int(wrong.sum())} of "
                f"{nats.numel()} pairs of image and timestep). Look at its weights and its precision."
            )


def make_bound(
    model: Callable[..., Any],
    scheduler: Any,
    images: Tensor,
    options: BoundOptions | None = None,
    class_labels: Tensor | Sequence[int] | None = None,
) -> Bound:
    """Make the chain that `bits_per_dim` describes, on a copy of the scheduler; `images` tell the size and precision.

    With `class_labels` it is the bound of these images and of no others.

    Args:
        model: As for `bits_per_dim`, and so on.
        scheduler: As there.
        images: As there.
        options: As there.
        class_labels: As there.
    """
    options = options or BoundOptions()
    check_network(model, images)
    chain = copy.copy(as_ours(scheduler))
    chain.register_to_config(clip_sample=options.clip_sample, thresholding=False)
    timesteps = options.timesteps
    if options.num_inference_steps is None and timesteps is None:
        timesteps = range(len(chain) - 1, -1, -1)
    chain.set_timesteps(options.num_inference_steps, timesteps=timesteps)

    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    own_dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    device = images.device if parameter is None else parameter.device
    return Bound(
        model=model,
        chain=chain,
        tables=chain.tables.to(_sum_device(device)),
        times=chain.timesteps.tolist(),
        decoder_variance=options.decoder_variance,
        cdf=options.cdf,
        dtype=own_dtype if parameter is None else parameter.dtype,
        device=device,
        batch_size=options.batch_size or max(1, min(_MOST_PAIRS, _PAIR_ELEMENTS // images[0].numel())),
        bits=options.bits,
        labels=checked_labels(model, class_labels, len(images)),
    )


@torch.no_grad()
def full_sweep(bound: Bound, x_0: Tensor, generator: Generators = None) -> Sweep:
    """All K jumps on every image, from the noisiest, one fresh noise each.

    Args:
        bound: A network and a chain.
        x_0: Clean images, float64, shape (B, C, H, W).
        generator: Source of the noise.
    """
    bound.chain.warn_of_guidance(GuidanceSetting())
    generator = check_generators(generator, len(x_0))
    x_0 = x_0.to(bound.tables.beta.device)
    times = torch.tensor(bound.times, device=x_0.device).expand(len(x_0), -1)
    with evaluating(bound.model):
        steps, step_error = bound.columns(x_0, times[:, :-1], generator)
        decoder, decoder_error = bound.columns(x_0, times[:, -1:], generator, decoder=True)
    nats = BoundTerms(bound.prior(x_0), steps, decoder[:, 0])
    bits = BitsPerDim(*(part / math.log(2) for part in (*nats, nats.total)), standard_error=None)
    return Sweep(bound.times, bits, torch.cat([step_error, decoder_error], dim=1), bound.bits)


@torch.no_grad()
def sampled_bound(
    bound: Bound, x_0: Tensor, num_timesteps_sampled: int, generator: Generators = None, p: Tensor | None = None
) -> BitsPerDim:
    r"""An unbiased estimate of the bound from n of its K - 1 jumps per image, and its standard error.

        Σ L_{t-1} ≈ Σ_k L_{t_k - 1} / (n p_{t_k}),   t_k = F⁻¹((k + u) / n),  k = 0..n-1,  u ~ U(0, 1) for each image

    F is the cumulative sum of p_t ∝ E L_{t-1} (`pilot_distribution`). L_t spans orders of magnitude: uniform strata
    would be useless. L_0, which every image pays, is the mean of several draws. The variance comes from differences of
    neighbouring strata and of those draws.

    Args:
        bound: A network and a chain.
        x_0: Clean images, float64, shape (B, C, H, W).
        num_timesteps_sampled: n, at least 2.
        generator: Source of the noise and of u; with a list of one per image and with p given, every image is
            independent of its batch.
        p: p_t of the K - 1 jumps from the noisiest, shape (K - 1,), sum 1; None takes the batch's own
            `pilot_distribution`.
    """
    n, num_jumps = num_timesteps_sampled, len(bound.times) - 1
    check_sampled_steps(bound, n)
    bound.chain.warn_of_guidance(GuidanceSetting())
    generator = check_generators(generator, len(x_0))
    x_0 = x_0.to(bound.tables.beta.device)
    times = torch.tensor(bound.times, device=x_0.device)
    p = (pilot_distribution(bound, x_0) if p is None else p).to(x_0)
    with evaluating(bound.model):
        position = (torch.arange(n) + _uniform(len(x_0), generator)) / n
        index = torch.searchsorted(p.cumsum(0), position.to(p)).clamp(max=num_jumps - 1)
        steps = bound.columns(x_0, times[index], generator)[0] / (n * p[index])
        decoder = bound.columns(x_0, times[-1:].expand(len(x_0), max(2, n // 5)), generator, decoder=True)[0]

    steps_var = (steps.diff(dim=1) ** 2).mean(1) * n / 2  # two neighbours differ by √2 standard deviations
    decoder_var = decoder.var(1) / decoder.shape[1]
    standard_error = (steps_var + decoder_var).sum().sqrt() / len(x_0)
    nats = bound.prior(x_0), decoder.mean(1), bound.prior(x_0) + steps.sum(1) + decoder.mean(1), standard_error
    prior, decoder, total, standard_error = (part / math.log(2) for part in nats)
    return BitsPerDim(prior, None, decoder, total, standard_error)


def check_sampled_steps(bound: Bound, n: int) -> None:
    """Raise a UserError unless n of a chain's jumps can be drawn."""
    num_jumps = len(bound.times) - 1
    if num_jumps < 2:
        raise UserError(
            f"A chain of {num_jumps + 1} steps has no two jumps before the decoder to draw from: leave out "
            "num_timesteps_sampled."
        )
    if not is_whole(n) or not 2 <= n <= num_jumps:
        raise UserError(
            f"num_timesteps_sampled must be an int from 2 to {num_jumps}, the jumps before the decoder, got {n!r}. "
            "Leave it out to take every step."
        )


@torch.no_grad()
def pilot_distribution(bound: Bound, x_0: Tensor) -> Tensor:
    """p_t ∝ E L_{t-1} of the K - 1 jumps, shape (K - 1,), sum 1, from every jump of a few images spread over the batch.

    A share of it is uniform, so that no jump is impossible. Its noise has a seed of its own: it takes nothing from the
    generators of the images, and equal images give an equal p_t.

    Args:
        bound: A network and a chain.
        x_0: Clean images, float64, shape (B, C, H, W).
    """
    x_0 = x_0.to(bound.tables.beta.device)
    chosen = sorted({round(i) for i in torch.linspace(0, len(x_0) - 1, PILOT_IMAGES).tolist()})
    times = torch.tensor(bound.times[:-1], device=x_0.device).expand(len(chosen), -1)
    few = bound if bound.labels is None else replace(bound, labels=bound.labels[chosen])
    with evaluating(bound.model):
        found = few.columns(x_0[chosen], times, torch.Generator().manual_seed(_PILOT_SEED))[0]
    mean = found.mean(0).clamp(min=0)
    uniform = torch.full_like(mean, 1 / len(mean))
    return uniform if not bool(mean.sum() > 0) else (1 - PILOT_FLOOR) * mean / mean.sum() + PILOT_FLOOR * uniform


def _uniform(size: int, generator: Generators) -> Tensor:
    """u of each image, shape (size, 1), float64, on the CPU."""
    if isinstance(generator, Sequence):
        return torch.cat([_uniform(1, one) for one in generator])
    device = "cpu" if generator is None else generator.device
    return torch.rand((size, 1), generator=generator, dtype=torch.float64, device=device).cpu()


def _sum_device(device: torch.device) -> torch.device:
    """Where float64 sums are made: on the network's device, or on the CPU where that has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """A network in eval mode for a while, and back in its former mode after; other callables are left alone."""
    training = isinstance(model, torch.nn.Module) and model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
