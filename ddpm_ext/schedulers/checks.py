"""What callers hand to a step: timesteps and generators, checked before they are used."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UserError, is_whole

__all__ = [
    "Generators",
    "Timesteps",
    "as_int",
    "as_steps",
    "check_generators",
    "check_ints",
    "check_one_per_image",
]

Generators = torch.Generator | Sequence[torch.Generator] | None
Timesteps = int | Tensor


def check_generators(generator: Generators, num_images: int) -> torch.Generator | list[torch.Generator] | None:
    """Return the generator, or the list of one per image; a UserError for anything else."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if (
        not isinstance(generator, list | tuple)
        or len(generator) != num_images
        or not all(isinstance(one, torch.Generator) for one in generator)
    ):
        count = f"a list of {len(generator)}" if isinstance(generator, list | tuple) else repr(generator)
        raise UserError(
            f"generator must be one torch.Generator or a list of one per image, {num_images} here, got {count}."
        )
    return list(generator)


def as_int(timestep: Timesteps) -> int:
    """Return one timestep as an int; a UserError for fractions, booleans and tensors of several."""
    if not isinstance(timestep, bool) and not (isinstance(timestep, Tensor) and timestep.dtype == torch.bool):
        try:
            return operator.index(timestep)  # pyright: ignore[reportArgumentType]
        except TypeError:
            pass
    raise UserError(f"timestep must be an int or a tensor of ints, got {timestep!r}.")


def as_steps(name: str, timesteps: Timesteps, device: torch.device | None = None) -> Tensor:
    """Return timesteps as an int64 tensor of their own shape, () or (B,), on a device without a wait of the host."""
    if not isinstance(timesteps, Tensor) and is_whole(timesteps):
        return torch.full((), int(timesteps), dtype=torch.int64, device=device)
    try:
        t = torch.as_tensor(timesteps)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{name} must be an int or a tensor of ints, got {timesteps!r}.") from None
    check_ints(name, t)
    if device is None or device == t.device:
        return t.long()
    if t.device.type == "cpu" and t.numel() == 1:
        return torch.full(t.shape, int(t), dtype=torch.int64, device=device)
    if t.device.type == "cpu" and device.type not in ("meta", "mps"):
        t = t.pin_memory()  # from other memory the copy would make the host wait
    return t.to(device, torch.int64, non_blocking=True)


def check_ints(name: str, t: Tensor) -> None:
    """Raise a UserError unless t holds whole numbers and has at most one dimension."""
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool or t.ndim > 1:
        raise UserError(
            f"{name} must be an int, a 0-d or a (B,) tensor of ints, got {t.dtype} of shape {tuple(t.shape)}."
        )


def check_one_per_image(name: str, t: Tensor, x: Tensor) -> None:
    """Raise a UserError unless t is one step for all images of x, or one per image."""
    if t.numel() not in (1, x.shape[0]):
        raise UserError(
            f"{name} must be one for all images or one per image, {x.shape[0]} here, got shape {tuple(t.shape)}."
        )
