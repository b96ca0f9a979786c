r"""Class guidance: the conditional prediction, driven away from the one without a class.

    ε̃ = (1 + w) ε̂(x_t, c) - w ε̂(x_t, ∅)                                  Ho & Salimans 2022, arXiv:2207.12598, Eq. (6)

Every prediction is affine in ε with the same share of x_t (`process.eps_weights`), and the weights add up to 1, so the
same mixture of x_0, v or posterior means is this ε̃. What is not linear, rescaling and Diffusers' guiders, is done on ε.
w = 0 is no guidance at all; Diffusers' usual guidance_scale is 1 + w.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeGuard

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..diffusion.process import compute_dtype, eps_weights, per_image
from ..diffusion.words import Config
from ..errors import UserError, did_you_mean
from ..models.classes import classes_of
from ..schedulers.config import GuidanceSetting, guidance_setting
from .config import GuidanceOptions

__all__ = [
    "Guidance",
    "guided_eps",
    "guided_prediction",
    "make_guidance",
    "rescaled",
    "setting_of",
    "warn_of_no_guidance",
]

Network = Callable[[Tensor, Tensor], Tensor]  # (x_t, labels) -> output, of any number of images


@dataclass(frozen=True)
class Guidance:
    """How predictions are guided.

    Attributes:
        scale: w >= 0.
        null_label: The row of the embedding that stands for no class.
        interval: (low, high): guided at low <= t <= high only; None for everywhere.
        rescale: φ in [0, 1]: how far ε̃ is brought back to the deviation of the conditional ε̂.
        guider: One of Diffusers' guiders in place of the formula.
    """

    scale: float
    null_label: int
    interval: tuple[int, int] | None = None
    rescale: float = 0.0
    guider: Any = None


def make_guidance(config: Config, T: int, **options: Unpack[GuidanceOptions]) -> Guidance | None:
    """Return the guidance that was asked for, checked against the network; None for none.

    Args:
        config: The network's.
        T: Steps of the process.
        **options: What was asked for.

    Raises:
        UserError: numbers out of range, options without effect, or a network that has no null label.
        TypeError: an option that there is not.
    """
    for name in options.keys() - GuidanceOptions.__annotations__.keys():
        raise TypeError(f"There is no option {name} of guidance.{did_you_mean(name, GuidanceOptions.__annotations__)}")
    scale, rescale = options.get("guidance_scale", 0.0), options.get("guidance_rescale", 0.0)
    interval, guider = options.get("guidance_interval"), options.get("guider")
    if not _is_number(scale) or not 0 <= scale < math.inf:
        raise UserError(f"guidance_scale must be a number of at least 0, where 0 is no guidance, got {scale!r}.")
    if not _is_number(rescale) or not 0 <= rescale <= 1:
        raise UserError(f"guidance_rescale must lie between 0 and 1, got {rescale!r}.")
    if interval is not None:
        ends = list(interval) if isinstance(interval, tuple | list) else []
        if len(ends) != 2 or not all(_is_number(end) for end in ends) or not ends[0] <= ends[1]:
            raise UserError(f"guidance_interval must be (low, high), two steps with low <= high, got {interval!r}.")
        if ends[1] < 0 or ends[0] >= T:
            raise UserError(f"guidance_interval must hold steps of the process, 0..{T - 1}, got {interval!r}.")
    if guider is not None:
        if scale or interval is not None or rescale:
            raise UserError("A guider brings its own scale, interval and rescaling: leave guidance_* out.")
        _check_guider(guider)
    elif not scale:
        if interval is not None or rescale:
            raise UserError("guidance_interval and guidance_rescale need a guidance_scale above 0, got 0.")
        return None
    classes = classes_of(config)
    if classes is None or classes.null_label is None:
        raise UserError(
            "Guidance needs what the network draws without a class, and this one "
            + ("knows no classes" if classes is None else "was trained with a class for every image")
            + ". Train with --class_conditional --class_dropout 0.1."
        )
    return Guidance(float(scale), classes.null_label, interval, float(rescale), guider)


def warn_of_no_guidance(guidance: Guidance | None, times: Sequence[float]) -> None:
    """Warn of a chain none of whose steps lies in the interval: its images are those without guidance.

    Args:
        guidance: None for none.
        times: The chain, descending.
    """
    if guidance is None or guidance.interval is None:
        return
    low, high = guidance.interval
    if not any(low <= t <= high for t in times):
        shown = ", ".join(f"{t:g}" for t in times) if len(times) <= 10 else f"{times[0]:g}, …, {times[-1]:g}"
        warnings.warn(
            f"guidance_interval ({low:g}, {high:g}) holds none of the steps of this chain, {shown}: it draws without "
            "guidance. Take a wider one or more steps.",
            stacklevel=3,
        )


def setting_of(guidance: Guidance | None, T: int) -> GuidanceSetting:
    """Return the setting that measured variances and fitted solvers are compared with.

    Args:
        guidance: None for none.
        T: Steps of the chain: an interval of all of them is none.
    """
    if guidance is None:
        return GuidanceSetting()
    if (guider := guidance.guider) is not None:
        name, range_of_steps = type(guider).__name__, (guider._start, guider._stop)
        if name != "ClassifierFreeGuidance" or range_of_steps != (0, 1):
            return GuidanceSetting(guider=name)  # a formula of its own
        w = guider.guidance_scale - (0 if guider.use_original_formulation else 1)
        return guidance_setting({"guidance_scale": w, "guidance_rescale": guider.guidance_rescale}, T)
    names = ("scale", "interval", "rescale")
    return guidance_setting({f"guidance_{name}": getattr(guidance, name) for name in names}, T)


def guided_eps(guidance: Guidance, eps: Tensor, eps_without: Tensor, t: Tensor) -> Tensor:
    """Return ε̃ of images that are each at a step of their own, rescaled where that was asked for.

    Args:
        guidance: How; no guider.
        eps: ε̂(x_t, c), shape (B, C, H, W).
        eps_without: ε̂(x_t, ∅), same shape.
        t: Steps, shape (B,).
    """
    guided = _mixed(guidance, eps, eps_without)
    if guidance.interval is None:
        return guided
    low, high = guidance.interval
    return torch.where(per_image((low <= t) & (t <= high), eps, torch.bool), guided, eps)


def guided_prediction(
    guidance: Guidance, network: Network, x_t: Tensor, labels: Tensor, t: float, place: tuple[int, int], scheduler: Any
) -> Tensor:
    """Return the guided output of a network, with the variance head of its conditional output if it has one.

    Args:
        guidance: How.
        network: Called once.
        x_t: What the network takes, shape (B, C, H, W).
        labels: int64, shape (B,).
        t: The step.
        place: (i, K): the i-th of K steps.
        scheduler: Says what the network predicts.
    """
    guider, channels = guidance.guider, x_t.shape[1]
    if guider is not None:
        guider.set_state(step=place[0], num_inference_steps=place[1], timestep=torch.tensor(t))
        active = guider.num_conditions == 2
    else:
        active = guidance.interval is None or guidance.interval[0] <= t <= guidance.interval[1]
    if not active:
        return network(x_t, labels)
    nothing = torch.full_like(labels, guidance.null_label)
    output = network(torch.cat([x_t, x_t]), torch.cat([labels, nothing]))
    conditional, head = output[: len(x_t), :channels], output[: len(x_t), channels:]
    without_class = output[len(x_t) :, :channels]
    if guider is None and not guidance.rescale:
        guided = _mixed(guidance, conditional, without_class)
    else:
        of_x_t, of_output = _eps_weights(scheduler, t)
        eps, eps_without = (of_x_t * x_t + of_output * one for one in (conditional, without_class))
        mixed = _mixed(guidance, eps, eps_without) if guider is None else _ask(guider, eps, eps_without)
        guided = (mixed - of_x_t * x_t) / of_output
    return torch.cat([guided, head], dim=1) if head.shape[1] else guided


def rescaled(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    r"""Return φ · ε̃ std(ε̂) / std(ε̃) + (1 - φ) ε̃, the deviations over all dimensions of each image.

    Args:
        guided: ε̃, shape (B, …).
        conditional: ε̂(x_t, c), same shape.
        share: φ in [0, 1].

    Source: Lin et al. 2023, arXiv:2305.08891, Eqs. (15)-(16).
    """
    dtype, shape = compute_dtype(guided), (-1, *(1,) * (guided.ndim - 1))
    ratio = conditional.to(dtype).flatten(1).std(1) / guided.to(dtype).flatten(1).std(1)
    return guided * (share * ratio + (1 - share)).reshape(shape).to(guided.dtype)


def _mixed(guidance: Guidance, conditional: Tensor, without_class: Tensor) -> Tensor:
    """(1 + w) · conditional - w · without_class, rescaled where that was asked for."""
    guided = conditional + guidance.scale * (conditional - without_class)
    return rescaled(guided, conditional, guidance.rescale) if guidance.rescale else guided


def _eps_weights(scheduler: Any, t: float) -> tuple[float, float]:
    """ε̂ = of_x_t · x_t + of_output · output at t; (0, 1) where ᾱ_t = 0, since ε̂ says nothing of the output there."""
    prediction = scheduler.config.get("prediction_type")
    if prediction is None:
        raise UserError(
            f"Rescaled guidance and guiders work on ε, and {type(scheduler).__name__} does not say what the network "
            "predicts: it has no option prediction_type. Use DDPMExtScheduler, or guidance_scale alone."
        )
    if prediction == "epsilon":
        return 0.0, 1.0
    tables = getattr(scheduler, "tables", None)
    if tables is None or int(t) != t:
        raise UserError(
            f"Rescaled guidance and guiders work on ε, which {type(scheduler).__name__} does not tell of a "
            f"{prediction} network. Use DDPMExtScheduler, or guidance_scale alone."
        )
    weights = eps_weights(tables, torch.tensor([int(t)]), prediction)
    of_x_t, of_output = weights.of_x_t.item(), weights.of_output.item()
    return (of_x_t, of_output) if of_output else (0.0, 1.0)


def _ask(guider: Any, eps: Tensor, eps_without: Tensor) -> Tensor:
    """The prediction of a guider, whose results some versions of Diffusers wrap."""
    key, names = type(guider)._identifier_key, type(guider)._input_predictions
    answers = zip(names, (eps, eps_without), strict=True)
    found = guider([SimpleNamespace(noise_pred=one, **{key: name}) for name, one in answers])
    return found if isinstance(found, Tensor) else found.pred


def _check_guider(guider: object) -> None:
    """Refuse an object that is no guider, or one that changes the network instead of mixing two predictions."""
    names = getattr(type(guider), "_input_predictions", None)
    prepare = getattr(getattr(type(guider), "prepare_models", None), "__qualname__", "")
    if names != ["pred_cond", "pred_uncond"] or prepare != "BaseGuidance.prepare_models":
        raise UserError(
            "guider must be one of diffusers.guiders that mixes a prediction with and one without a class, such as "
            f"ClassifierFreeGuidance or AdaptiveProjectedGuidance, got {type(guider).__name__}."
        )


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
