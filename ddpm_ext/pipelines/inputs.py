"""What a caller gives a pipeline and what it gets: latents, timesteps, images, checked before the first step."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from ..diffusion.images import to_x_0
from ..diffusion.schedules import respaced_timesteps
from ..errors import UserError, check_word
from ..models.unet import check_resolution
from ..models.values import image_size
from ..schedulers.checks import Generators, check_generators

__all__ = [
    "Images",
    "OutputType",
    "check_scheduler",
    "checked_output_type",
    "clean_image",
    "prepare_latents",
    "set_timesteps",
    "times_from",
    "to_output",
]

OutputType = Literal["pil", "np", "pt", "latent"]
Images = Any  # a tensor, an array or a list of PIL images, as the word says


def prepare_latents(
    unet: UNet2DModel, batch_size: int, generator: Generators, latents: Tensor | None, device: torch.device
) -> Tensor:
    """Return x_T, drawn or as it was given, on a device in the network's precision.

    Args:
        unet: The network.
        batch_size: B.
        generator: Source of the noise, or one per image.
        latents: x_T in place of drawn noise, shape (B, C, H, W).
        device: Where to.

    Raises:
        UserError: a batch size that is none, or latents of another shape.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"batch_size must be an int of at least 1, got {batch_size!r}.")
    generator = check_generators(generator, batch_size)
    if latents is None:
        shape = (batch_size, unet.config["in_channels"], *image_size(unet.config))
        latents = randn_tensor(shape, generator=generator, device=device, dtype=unet.dtype)
    elif (
        not isinstance(latents, Tensor)
        or latents.ndim != 4
        or latents.shape[:2] != (batch_size, unet.config["in_channels"])
    ):
        got = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise UserError(f"latents must have shape ({batch_size}, {unet.config['in_channels']}, H, W), got {got}.")
    check_resolution(unet.config, (latents.shape[2], latents.shape[3]))
    return latents.to(device=device, dtype=unet.dtype)


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler that does not run a chain of x_t of this kind, as those of flow matching and of tokens.

    Args:
        scheduler: Any of Diffusers'.

    Raises:
        UserError: names it and what it lacks.
    """
    missing = [name for name in ("set_timesteps", "scale_model_input", "step") if not hasattr(scheduler, name)]
    missing += [] if "num_train_timesteps" in scheduler.config else ["option num_train_timesteps"]
    missing += [name for name in ("init_noise_sigma", "alphas_cumprod") if not hasattr(scheduler, name)]
    why = f"it has no {' and no '.join(missing)}"
    if not missing:
        needs = list(inspect.signature(scheduler.step).parameters.values())
        needed = [one.name for one in needs if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
        if len(needed) <= 3:
            return
        why = f"its step needs {', '.join(needed)}"
    raise UserError(
        f"The scheduler must run a chain as DDPMScheduler does, by step(model_output, timestep, sample), and "
        f"{type(scheduler).__name__} does not: {why}. Use DDPMExtScheduler, or another of diffusers for DDPM."
    )


def set_timesteps(
    scheduler: Any, num_inference_steps: int | None, timesteps: Sequence[int] | None, device: torch.device
) -> None:
    """Choose the chain of any scheduler: a number of steps, or the steps themselves.

    Raises:
        UserError: the scheduler takes no steps of one's own, or not these.
    """
    name, parameters = type(scheduler).__name__, inspect.signature(scheduler.set_timesteps).parameters
    if timesteps is not None and "timesteps" not in parameters:
        raise UserError(f"{name} takes no custom timesteps: use num_inference_steps, or our scheduler.")
    try:
        if timesteps is None:
            scheduler.set_timesteps(num_inference_steps, device=device)
        else:
            scheduler.set_timesteps(timesteps=timesteps, device=device)
    except UserError:
        raise
    except (ValueError, TypeError) as error:  # what those of Diffusers say
        asked = f"num_inference_steps {num_inference_steps}" if timesteps is None else f"timesteps {timesteps}"
        raise UserError(f"{name} does not take {asked}: {error} Choose other steps, or DDPMExtScheduler.") from error


def times_from(timestep: int, num_inference_steps: int | None, T: int) -> list[int]:
    """Return the steps of the way back from a timestep, descending; every one of them where no number is given."""
    if isinstance(timestep, bool) or not isinstance(timestep, int) or not 0 <= timestep < T:
        raise UserError(f"timestep must be an int in 0..{T - 1}, got {timestep!r}.")
    steps = timestep + 1 if num_inference_steps is None else num_inference_steps
    if steps == 1:
        return [timestep]
    return respaced_timesteps("linspace", timestep + 1, steps)[::-1]


def clean_image(image: Tensor | Image.Image, unet: UNet2DModel, device: torch.device) -> Tensor:
    """Return an image as x_0, shape (1, C, H, W), on a device in the network's precision."""
    channels, (height, width) = unet.config["in_channels"], image_size(unet.config)
    if isinstance(image, Image.Image):
        pixels = np.array(image.convert("L" if channels == 1 else "RGB"), ndmin=3)
        image = to_x_0(torch.from_numpy(pixels if channels == 1 else pixels.transpose(2, 0, 1)))
    image = image.squeeze(0) if image.ndim == 4 else image
    if image.shape != (channels, height, width) or image.abs().max() > 1:
        raise UserError(
            f"An image must have shape {(channels, height, width)} and values in [-1, 1], got shape "
            f"{tuple(image.shape)} and values up to {image.abs().max().item():.3g}."
        )
    return image.unsqueeze(0).to(device=device, dtype=unet.dtype)


def checked_output_type(output_type: str, channels: int) -> OutputType:
    """Return the word for what comes out; a UserError for none of them, or PIL images of too many channels."""
    output_type = "np" if output_type == "numpy" else output_type  # stock's older word
    check_word("output_type", output_type, get_args(OutputType))
    if output_type == "pil" and channels > 4:
        raise UserError(f'output_type "pil" shows 1 to 4 channels, this network has {channels}. Use "np" or "pt".')
    return cast(OutputType, output_type)


def to_output(x_0: Tensor, output_type: OutputType) -> Images:
    """Return x_0, about [-1, 1], as what was asked for: values in [0, 1], PIL images, or itself."""
    if output_type == "latent":
        return x_0
    images = (x_0 / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    images = images.float().permute(0, 2, 3, 1).cpu().numpy()
    return images if output_type == "np" else DiffusionPipeline.numpy_to_pil(images)
