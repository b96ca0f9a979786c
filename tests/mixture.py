"""A mixture of normal distributions, one a class, whose scores are known, and tiny networks that can be guided."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DModel
from networks import tiny_unet
from torch import Tensor

from ddpm_ext.diffusion.process import eps_weights
from ddpm_ext.models.classes import class_options
from ddpm_ext.pipelines.ddpm import DDPMExtPipeline
from ddpm_ext.schedulers.ddpm import DDPMExtScheduler

__all__ = [
    "CLASSES",
    "MEANS",
    "Mixture",
    "S",
    "conditional_eps",
    "guided_pipeline",
    "network_with_classes",
    "unconditional_eps",
]

MEANS = torch.tensor([-0.6, 0.1, 0.7], dtype=torch.float64)  # one normal distribution per class, of deviation S
S = 0.1
CLASSES = len(MEANS)


def conditional_eps(x: Tensor, alpha_bar: float, label: int) -> Tensor:
    """-√(1-ᾱ) ∇ log N(x; √ᾱ m, ᾱ s² + 1 - ᾱ)."""
    var = alpha_bar * S**2 + 1 - alpha_bar
    return (1 - alpha_bar) ** 0.5 * (x - alpha_bar**0.5 * MEANS[label]) / var


def unconditional_eps(x: Tensor, alpha_bar: float) -> Tensor:
    """The same of the mixture with equal weights, pixel by pixel: -√(1-ᾱ) ∇ log Σ_c N(x; √ᾱ m_c, ·)/C."""
    var = alpha_bar * S**2 + 1 - alpha_bar
    distances = x[..., None] - alpha_bar**0.5 * MEANS
    share = torch.softmax(-distances.square() / (2 * var), dim=-1)
    return (1 - alpha_bar) ** 0.5 * (share * distances).sum(-1) / var


class Mixture(torch.nn.Module):
    """The perfect network of a prediction type; label CLASSES is the null label. Counts its calls."""

    def __init__(self, scheduler: DDPMExtScheduler) -> None:
        super().__init__()
        self.scheduler, self.calls = scheduler, 0

    def forward(self, x: Tensor, t: int | Tensor, class_labels: Tensor) -> Tensor:
        self.calls += 1
        steps = torch.as_tensor(t).expand(len(x))
        alpha_bar = self.scheduler.tables.alpha_bar[steps].tolist()
        eps = [
            unconditional_eps(one, a) if c == CLASSES else conditional_eps(one, a, c)
            for one, a, c in zip(x, alpha_bar, class_labels.tolist(), strict=True)
        ]
        weights = eps_weights(self.scheduler.tables, steps, self.scheduler.options.prediction_type)
        of_x_t, of_output = (w.reshape(-1, 1, 1, 1) for w in weights)
        return (torch.stack(eps) - of_x_t * x) / of_output


def network_with_classes(null: bool = True, heads: int = 1, classes: int = CLASSES, **options: Any) -> UNet2DModel:
    return tiny_unet(out_channels=heads, num_class_embeds=classes + null, **options)


def guided_pipeline(
    scheduler: Any = None, heads: int = 1, names: list[str] | None = None, classes: int = CLASSES
) -> DDPMExtPipeline:
    unet = network_with_classes(heads=heads, classes=classes)
    unet.register_to_config(**class_options(classes, names, with_null_label=True))
    pipeline = DDPMExtPipeline(unet, scheduler or DDPMExtScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
