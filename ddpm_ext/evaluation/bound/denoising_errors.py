r"""Network + images -> its errors at every step, over any number of processes.

    mse_eps[t] = E mean_dims (ε - ε̂)²        ms_eps[t] = E mean_dims ε̂²

One fresh noise per (image, t), ε̂ of whatever the network predicts, x̂_0 not clipped. Under class guidance ε̃ stands for
ε̂: with an ε̂(x_t, c) that is right, mse_eps grows by w² E (ε̂(x_t, c) - ε̂(x_t, ∅))².
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from diffusers import UNet2DModel
from torch import Tensor

from ...diffusion.likelihood import mean_over_dims
from ...diffusion.process import eps_weights, per_image
from ...diffusion.reverse import split_output
from ...errors import UserError
from ...pipelines.config import GuidanceOptions, guidance_conditions
from ...pipelines.guidance import Guidance, guided_eps, make_guidance
from ...schedulers.checks import Generators, check_generators
from ..images import images_and_labels
from .checks import grid_images
from .terms import SWEEP_SHARD, Bound, BoundOptions, evaluating, make_bound

if TYPE_CHECKING:
    from ...data.dataset import ImageSet
    from ...schedulers.ddpm import DDPMExtScheduler
    from ..sharded import Shards

__all__ = ["DenoisingErrors", "MeanError", "denoising_errors", "drop_variance_head", "mean_error", "set_errors"]


class DenoisingErrors(NamedTuple):
    """Errors of each image at each step, float64, shape (n, T), step 0 first."""

    mse_eps: Tensor  # mean over dimensions of (ε - ε̂)²
    ms_eps: Tensor  # mean over dimensions of ε̂²


class MeanError(NamedTuple):
    """A mean over images, step 0 first."""

    mean: Tensor  # (T,)
    standard_error: Tensor  # (T,): σ/√n; 0 of a single image


@dataclass(frozen=True)
class _ErrorTerms(Bound):
    """A bound whose two terms are the errors of ε̂ in place of L_{t-1} and the error of x̂_0."""

    guidance: Guidance | None = None  # ε̃ in place of ε̂

    def terms(
        self, x_0: Tensor, t: Tensor, eps: Tensor, labels: Tensor | None = None, *, decoder: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(mean_dims (ε - ε̂)², mean_dims ε̂²) of pairs, each (P,); arguments as in `Bound.terms`."""
        if self.guidance is None:
            eps_hat = self.eps_hat(x_0, t, eps, labels)
        else:
            assert labels is not None
            nothing = torch.full_like(labels, self.guidance.null_label)
            both = torch.cat([labels, nothing])
            x_0_twice, t_twice, eps_twice = (torch.cat([part, part]) for part in (x_0, t, eps))
            with_class, without = self.eps_hat(x_0_twice, t_twice, eps_twice, both).chunk(2)
            eps_hat = guided_eps(self.guidance, with_class, without, t)
        return mean_over_dims((eps.to(eps_hat) - eps_hat) ** 2), mean_over_dims(eps_hat**2)

    def eps_hat(self, x_0: Tensor, t: Tensor, eps: Tensor, labels: Tensor | None) -> Tensor:
        """ε̂ of pairs, of whatever the network predicts; arguments as in `Bound.terms`."""
        x_t, output = self.ask(x_0, t, eps, labels)
        prediction, _ = split_output(output, x_t, self.chain.config["variance_type"])
        weights = eps_weights(self.tables, t, self.chain.config["prediction_type"])
        return per_image(weights.of_x_t, x_t) * x_t + per_image(weights.of_output, x_t) * prediction


@torch.no_grad()
def denoising_errors(
    bound: Bound, x_0: Tensor, generator: Generators = None, guidance: Guidance | None = None
) -> DenoisingErrors:
    """Measure the errors of every image at every step of a full chain.

    Args:
        bound: A network and all its steps, `make_bound`.
        x_0: Clean images, float64, shape (B, C, H, W).
        generator: Source of the noise; a list of one per image makes every image independent of its batch.
        guidance: Class guidance, whose ε̃ takes the place of ε̂; None for none.
    """
    terms, generator = _ErrorTerms(**vars(bound), guidance=guidance), check_generators(generator, len(x_0))
    x_0 = x_0.to(terms.tables.beta.device)
    times = torch.tensor(terms.timesteps, device=x_0.device).expand(len(x_0), -1)
    with evaluating(terms.model):
        found = terms.columns(x_0, times, generator)
    return DenoisingErrors(*(part.flip(1) for part in found))  # times descend


def set_errors(
    unet: UNet2DModel,
    scheduler: DDPMExtScheduler,
    images: ImageSet,
    *,
    num_images: int,
    seed: int,
    shards: Shards,
    guidance: GuidanceOptions | None = None,
) -> DenoisingErrors:
    """Measure `denoising_errors` of the first images of a set, piece by piece over all processes.

    Args:
        unet: The network.
        scheduler: Its noise schedule and what it predicts.
        images: The set.
        num_images: How many of them.
        seed: Image i draws its noise from seed + i.
        shards: Where the pieces go; each process must call.
        guidance: Class guidance, as the pipeline takes it; None for none.
    """
    guided = make_guidance(unet.config, len(scheduler), **(guidance or {}))

    def work(piece: range) -> dict[str, Tensor]:
        pixels, labels = images_and_labels(unet, images, piece)
        bound = make_bound(unet, scheduler, pixels, BoundOptions(clip_sample=False), labels)
        generators = [torch.Generator().manual_seed(seed + i) for i in piece]
        found = denoising_errors(bound, grid_images(pixels, images.spec.bits), generators, guided)
        return {name: part.cpu() for name, part in found._asdict().items()}

    key = {"dataset": images.fingerprint, "seed": seed, **guidance_conditions(guidance)}
    return DenoisingErrors(**shards.run("errors", key, num_images, SWEEP_SHARD, work))


def mean_error(of_images: Tensor) -> MeanError:
    """Return the mean over images, shape (n, T) -> (T,), and its standard error."""
    n = len(of_images)
    spread = of_images.std(0) / n**0.5 if n > 1 else torch.zeros_like(of_images[0])
    return MeanError(of_images.mean(0), spread)


def drop_variance_head(unet: UNet2DModel) -> UNet2DModel:
    """Return the same network without its variance channels, as fixed and analytic variances want it.

    Args:
        unet: A network of 2C output channels, of which the last C are the variance head.
    """
    channels = unet.config["in_channels"]
    if unet.config["out_channels"] != 2 * channels:
        raise UserError(
            f"A network with a variance head has out_channels = 2 * in_channels, got {unet.config['out_channels']} "
            f"and {channels}: there is none to drop."
        )
    slim = cast(UNet2DModel, UNet2DModel.from_config(unet.config, out_channels=channels))
    weights = unet.state_dict()
    slim.load_state_dict(
        {**weights, **{f"conv_out.{name}": weights[f"conv_out.{name}"][:channels] for name in ("weight", "bias")}}
    )
    torch.nn.Module.to(slim, device=unet.device, dtype=unet.dtype)  # Diffusers' own warns
    return slim.eval()
