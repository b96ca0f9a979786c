"""A network and one chain, full or shortened: the terms of its bound, and the sweep over all its timesteps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...diffusion.likelihood import BoundTerms, decoder_nll, mean_over_dims, prior_kl, step_kl
from ...diffusion.process import jump, per_image, q_sample
from ...diffusion.schedules import Tables
from ...diffusion.words import Cdf, DecoderVariance
from ...errors import UserError, check_word, is_whole
from ...schedulers.checks import Generators, check_generators
from ...schedulers.config import GuidanceSetting
from ...schedulers.ddpm import DDPMExtScheduler
from .checks import check_network, checked_labels
from .records import BitsPerDim, Sweep

if TYPE_CHECKING:
    from ...schedulers.contract import Scheduler

__all__ = ["SWEEP_SHARD", "Bound", "BoundOptions", "Network", "evaluating", "full_sweep", "make_bound"]

Network = Callable[..., object]  # (x_t, t) -> a tensor, or something that has it as `.sample`
SWEEP_SHARD = 32  # images of a piece in which every step is taken
_PAIR_ELEMENTS, _MOST_PAIRS = 2**19, 1024  # numbers and pairs in one network call where batch_size is None


@dataclass(frozen=True, kw_only=True)
class BoundOptions:
    """Which bound of a network is measured, and how much of it.

    Attributes:
        num_inference_steps: K of a respaced chain, spaced as the scheduler says; None for all T steps.
        timesteps: The timesteps of the chain themselves, descending, in place of K.
        decoder_variance: σ² of L_0: "base" (β̃_2 of the full chain, Analytic-DPM) or "respaced" (of this chain).
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


@dataclass(frozen=True)
class Bound:
    """A network and one chain: the bound's terms in nats, for images that need not lie on the grid."""

    model: Network
    chain: DDPMExtScheduler
    tables: Tables  # on the device of the sums
    timesteps: list[int]  # of the chain, descending
    decoder_variance: DecoderVariance
    cdf: Cdf
    dtype: torch.dtype  # of the network's input
    device: torch.device  # of the network
    batch_size: int
    bits: int = 8  # depth of the images
    labels: Tensor | None = None  # (B,), classes of the images that it is asked about

    def prior(self, x_0: Tensor) -> Tensor:
        """L_T of each image, shape (B,), nats/dim."""
        return mean_over_dims(prior_kl(x_0, self.tables.alpha_bar[self.timesteps[0]]))

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
            t: Timesteps of the chain, int64, shape (P,); for the decoder all the last one, else none of them.
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
    model: Network,
    scheduler: Scheduler,
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
    chain = copy.copy(_as_ours(scheduler))
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
        timesteps=chain.timesteps.tolist(),
        decoder_variance=options.decoder_variance,
        cdf=options.cdf,
        dtype=own_dtype if parameter is None else parameter.dtype,
        device=device,
        batch_size=options.batch_size or max(1, min(_MOST_PAIRS, _PAIR_ELEMENTS // images[0].numel())),
        bits=options.bits,
        labels=checked_labels(model, class_labels, len(images)),
    )


def _as_ours(scheduler: object) -> DDPMExtScheduler:
    """Return the scheduler itself, or ours with the noise schedule of a stock one."""
    if type(scheduler) is DDPMExtScheduler:
        return scheduler
    config = getattr(scheduler, "config", None)
    if not isinstance(config, Mapping) or not {"num_train_timesteps", "beta_schedule"} <= set(config):
        raise UserError(
            "scheduler must be a DDPMExtScheduler or a stock one with a beta schedule, as DDPM's and DDIM's are, got "
            f"{type(scheduler).__name__}: the bound is that of a chain of betas."
        )
    return DDPMExtScheduler.from_config(config)


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
    times = torch.tensor(bound.timesteps, device=x_0.device).expand(len(x_0), -1)
    with evaluating(bound.model):
        steps, step_error = bound.columns(x_0, times[:, :-1], generator)
        decoder, decoder_error = bound.columns(x_0, times[:, -1:], generator, decoder=True)
    nats = BoundTerms(bound.prior(x_0), steps, decoder[:, 0])
    bits = BitsPerDim(*(part / math.log(2) for part in (*nats, nats.total)), standard_error=None)
    return Sweep(bound.timesteps, bits, torch.cat([step_error, decoder_error], dim=1), bound.bits)


def _sum_device(device: torch.device) -> torch.device:
    """Where float64 sums are made: on the network's device, or on the CPU where that has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """A network in eval mode for a while, and back in its former mode after; other callables are left alone."""
    network = model if isinstance(model, torch.nn.Module) and model.training else None
    if network is not None:
        network.eval()
    try:
        yield
    finally:
        if network is not None:
            network.train()
