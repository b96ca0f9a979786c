"""Network and scheduler -> what tells them from others: hashes of weights and options, the same in every process."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DModel

from ..diffusion.words import EXTENSION_KEY, Config
from ..run_dir import JsonRecord

if TYPE_CHECKING:
    from ..schedulers.contract import Scheduler
    from .ddpm import DDPMExtPipeline

__all__ = ["identity", "key_hash", "key_text", "network_hash", "scheduler_options", "weights_hash"]


def identity(pipeline: DDPMExtPipeline) -> JsonRecord:
    """Return the hashes of a pipeline's weights and network and its scheduler's options: equal ones draw alike."""
    return {
        "weights": weights_hash(pipeline.unet),
        "network": network_hash(pipeline.unet),
        "scheduler": scheduler_options(pipeline.scheduler),
    }


def weights_hash(network: torch.nn.Module) -> str:
    """Return SHA-256 over names, shapes, dtypes and values of a network's weights, 16 hex digits."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def network_hash(unet: UNet2DModel) -> str:
    """Return 16 hex digits of a network's options: weights alone do not say what function they are of."""
    return key_hash(_options_as_text(unet.config))


def scheduler_options(scheduler: Scheduler) -> dict[str, str]:
    """Return a scheduler's class and options as text."""
    return {"class": type(scheduler).__name__, **_options_as_text(scheduler.config)}


def key_hash(key: Config) -> str:
    """Return 16 hex digits that stand for everything a measurement depends on."""
    return hashlib.sha256(key_text(key).encode()).hexdigest()[:16]


def key_text(key: Config) -> str:
    """Return a key as text that is the same in every process."""
    return json.dumps(key, sort_keys=True, allow_nan=False)


def _options_as_text(config: Config) -> dict[str, str]:
    """Return the options of a Diffusers config as text, without its notes on itself.

    Which options were left at their defaults, for one, Diffusers lists in an order that changes with every process.
    """

    def plain(value: Any) -> object:
        if isinstance(value, set | frozenset):
            return sorted(map(str, value))
        return value.tolist() if hasattr(value, "tolist") else str(value)

    kept = {name: value for name, value in config.items() if not name.startswith("_") or name == EXTENSION_KEY}
    return {name: json.dumps(value, sort_keys=True, default=plain) for name, value in kept.items()}
