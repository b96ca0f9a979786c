"""Images -> features by a named extractor.

    "pixels"      the image itself, flattened                                  any size
    "inception"   Inception-v3 as ported from TensorFlow, 2048 features        FID, KID, Inception score
    "dinov2"      DINOv2 ViT-L/14, class token                                 FD-DINOv2 (arXiv:2306.04675)
    "clip"        CLIP ViT-L/14 at 336, embedding of unit length               CMMD (arXiv:2401.09603)
    other words   folder or Hub name of a `transformers` vision model, pooled output

Images enter as floats in [0, 1], shape (B, C, H, W); how generated floats become that is the *quantization*: published
codes round to 8 bits or do not, and scores differ by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from ...errors import UserError, check_word, did_you_mean
from ...pipelines.identity import weights_hash
from ..words import Quantization

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "HUB_NAMES",
    "Extractor",
    "Features",
    "Preprocessing",
    "check_quantization",
    "extract",
    "inception",
    "make_extractor",
    "pooled",
    "quantize",
]

HUB_NAMES = {"dinov2": "facebook/dinov2-large", "clip": "openai/clip-vit-large-patch14-336"}
_WORDS = ("pixels", "inception", *HUB_NAMES)
PIL_MODES = {0: "nearest", 2: "bilinear", 3: "bicubic"}


class Features(NamedTuple):
    """Features of N images, float32, on the CPU."""

    features: Tensor  # (N, d)
    logits: Tensor | None  # (N, classes), where the extractor is a classifier


@dataclass(frozen=True)
class Extractor:
    """A function of images, and what a score must say about it.

    Attributes:
        description: name, weights (a hash) and how images are resized and scaled: equal descriptions, equal features.
        forward: float images in [0, 1], shape (B, C, H, W), on the extractor's device -> Features.
        device: Where it runs.
        quantizations: Which kinds of images it takes.
    """

    description: Mapping[str, str | None]
    forward: Callable[[Tensor], Features]
    device: torch.device
    quantizations: tuple[str, ...] = get_args(Quantization)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Features of float images in [0, 1] or uint8 ones, shape (B, C, H, W)."""
        if images.ndim != 4:
            raise UserError(f"images must have shape (B, C, H, W), got {tuple(images.shape)}.")
        if images.dtype == torch.uint8:
            images = images.float() / 255
        low, high = images.min().item(), images.max().item()
        if not (low >= 0 and high <= 1):
            raise UserError(f"images must lie in [0, 1], got values from {low:.4g} to {high:.4g}.")
        found = self.forward(images.to(self.device, torch.float32))
        logits = None if found.logits is None else found.logits.float().cpu()
        return Features(found.features.float().cpu(), logits)


def quantize(images: Tensor, kind: Quantization) -> Tensor:
    """Images in [0, 1] as an extractor gets them: clamped, and for "uint8" rounded to the 256 grey levels of a file."""
    check_word("quantization", kind, get_args(Quantization))
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float().clamp(0, 1)
    return (images * 255).round() / 255 if kind == "uint8" else images


def extract(extractor: Extractor, batches: Iterable[Tensor], kind: Quantization = "uint8") -> Features:
    """Features of batches of images, one after the other; only the features are kept.

    Args:
        extractor: What computes them.
        batches: uint8 or floats in [0, 1], each of shape (B, C, H, W).
        kind: How floats are handed over: rounded to 8 bits, or as they are.
    """
    check_quantization(extractor, kind)
    parts = [extractor(quantize(batch, kind)) for batch in batches]
    if not parts:
        raise UserError("There are no images to take features from.")
    sizes = sorted({part.features.shape[1] for part in parts})
    if len(sizes) > 1:
        raise UserError(
            f"All images must have one size: the features of some have {sizes[0]}, of others {sizes[-1]} numbers."
        )
    logits = [part.logits for part in parts if part.logits is not None]
    return Features(torch.cat([part.features for part in parts]), torch.cat(logits) if logits else None)


def check_quantization(extractor: Extractor, kind: Quantization) -> None:
    """Raise a ValueError when an extractor does not take images quantized like this."""
    check_word("quantization", kind, get_args(Quantization))
    if kind not in extractor.quantizations:
        raise UserError(
            f'The extractor "{extractor.description["name"]}" takes 8-bit images only: quantization must be "uint8", '
            f"got {kind!r}."
        )


def make_extractor(
    name: str, *, device: torch.device | str = "cpu", size: int | None = None, weights: str | None = None
) -> Extractor:
    """An extractor by name.

    Args:
        name: One of the words above, or a folder or Hub name of a `transformers` vision model.
        device: Where it runs.
        size: Side to which images are scaled for a `transformers` model; None takes what its preprocessing says.
        weights: File of Inception's weights; None lets torch-fidelity download them.

    Raises:
        ValueError: an extractor that cannot be had here, or an option that it does not take.
    """
    device = torch.device(device)
    if size is not None and (name in ("pixels", "inception") or size < 1):
        raise UserError(f'size is the input side of a transformers model, at least 1; got {size} for "{name}".')
    if weights is not None and name != "inception":
        raise UserError(f'weights are those of "inception", got a file for "{name}".')
    if name == "pixels":
        description = {"name": name, "weights": None, "input": "[0, 1]"}
        return Extractor(description, lambda images: Features(images.flatten(1), None), device)
    if name == "inception":
        return inception(load_inception(weights), device)
    return transformers_extractor(name, device, size)


# Inception ------------------------------------------------------------------------------------------------------------


def load_inception(weights: str | None = None) -> torch.nn.Module:
    """The TensorFlow-ported Inception-v3 of torch-fidelity (extra `fid`); its weights are downloaded on first use."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
            FeatureExtractorInceptionV3,
        )
    except (ImportError, AttributeError, RuntimeError, OSError) as error:  # as a torchvision of another torch raises
        raise UserError(
            'The extractor "inception" needs torch-fidelity and a torchvision that fits this torch: '
            f'pip install ddpm-ext[fid]. Importing it failed with: {error}. Without them, use "dinov2", "clip", '
            '"pixels" or a transformers model.'
        ) from error
    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], weights)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        raise UserError(
            f"The weights of Inception-v3 cannot be read or downloaded ({error}). Fetch "
            "weights-inception-2015-12-05-6726825d.pth from torch-fidelity's releases and name the file."
        ) from error


def inception(network: torch.nn.Module, device: torch.device | str = "cpu") -> Extractor:
    """An extractor from a network of torch-fidelity's interface: uint8 (B, 3, H, W) -> (features, logits)."""
    network = network.eval().to(device)

    def forward(images: Tensor) -> Features:
        pixels = (with_channels(images, 3) * 255).round().to(torch.uint8)
        return Features(*network(pixels))

    description = {
        "name": "inception",
        "weights": weights_hash(network),
        "input": "299x299 bilinear as TensorFlow 1, (x - 128) / 128",
    }
    return Extractor(description, forward, torch.device(device), quantizations=("uint8",))


# transformers ---------------------------------------------------------------------------------------------------------


def transformers_extractor(name: str, device: torch.device, size: int | None) -> Extractor:
    """An extractor from a vision model of `transformers`: its pooled output, and its logits where it classifies."""
    network, config = load_transformers(HUB_NAMES.get(name, name))
    network = network.eval().to(device)
    prepare = preprocessing(HUB_NAMES.get(name, name), config, size)
    base = getattr(network, getattr(network, "base_model_prefix", ""), network)

    def forward(images: Tensor) -> Features:
        kept: list[object] = []
        handle = base.register_forward_hook(lambda module, inputs, output: kept.append(output))
        try:
            output = network(pixel_values=prepare.apply(images))
        finally:
            handle.remove()
        return Features(pooled(output, kept[-1], name), getattr(output, "logits", None))

    description = {"name": name, "weights": weights_hash(network), "input": str(prepare)}
    return Extractor(description, forward, device)


def load_transformers(name: str) -> tuple[torch.nn.Module, PretrainedConfig]:
    """A vision model and its config, from a folder or the Hub."""
    import transformers

    meant = "" if "/" in name or Path(name).is_dir() else did_you_mean(name, _WORDS)
    if meant:  # before the Hub is asked
        raise UserError(
            f'extractor must be one of {", ".join(_WORDS)} or a transformers vision model, got "{name}".{meant}'
        )
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        if config.model_type == "clip":
            return transformers.CLIPVisionModelWithProjection.from_pretrained(name), config.vision_config
        classifies = any("ImageClassification" in word for word in config.architectures or ())
        auto = transformers.AutoModelForImageClassification if classifies else transformers.AutoModel
        return auto.from_pretrained(name), config
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f'"{name}" is neither "pixels", "inception", "dinov2", "clip" nor a transformers vision model in reach: '
            f"{str(error).strip().splitlines()[0]}{did_you_mean(name, _WORDS)}"
        ) from error


def pooled(output: object, base_output: object, name: str) -> Tensor:
    """(B, d): the embedding of unit length, the pooled output, or the class token, whichever the model has.

    Args:
        output: What the model returned.
        base_output: What the model below its head returned.
        name: The model's, for messages.
    """
    embedding = getattr(output, "image_embeds", None)
    if embedding is not None:
        return normalize(embedding.float(), dim=-1)
    of_base, tokens = getattr(base_output, "pooler_output", None), getattr(base_output, "last_hidden_state", None)
    if of_base is not None:
        return of_base.flatten(1)
    if tokens is not None and tokens.ndim == 3:
        return tokens[:, 0]
    raise UserError(f'The model "{name}" has no pooled output: it cannot serve as an extractor.')


@dataclass(frozen=True)
class Preprocessing:
    """How images in [0, 1] enter a network. The whole image is scaled, none of it cropped away."""

    channels: int
    size: tuple[int, int] | None
    mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __str__(self) -> str:
        side = "own size" if self.size is None else f"{self.size[0]}x{self.size[1]} {self.mode} antialiased"
        return f"{self.channels} channels, {side}, mean {list(self.mean)}, std {list(self.std)}"

    def apply(self, images: Tensor) -> Tensor:
        """The network's input, (B, channels, H, W)."""
        images = with_channels(images, self.channels)
        if self.size is not None and images.shape[-2:] != self.size:
            smooth = self.mode != "nearest"
            images = interpolate(images, self.size, mode=self.mode, antialias=smooth).clamp(0, 1)
        mean, std = (images.new_tensor(values).reshape(-1, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


def preprocessing(name: str, config: PretrainedConfig, size: int | None) -> Preprocessing:
    """What a model's preprocessor_config.json says; without one, the model's size, and values in [-1, 1]."""
    from transformers.image_processing_base import ImageProcessingMixin

    channels = getattr(config, "num_channels", 3)
    try:
        options, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        options = {"size": getattr(config, "image_size", None), "image_mean": [0.5], "image_std": [0.5]}
    normalized = options.get("do_normalize", True)
    return Preprocessing(
        channels,
        sides(size or (options.get("do_center_crop") and options.get("crop_size")) or options.get("size")),
        PIL_MODES.get(options.get("resample", 2), "bilinear"),
        tuple(options["image_mean"]) if normalized and "image_mean" in options else (0.0,),
        tuple(options["image_std"]) if normalized and "image_std" in options else (1.0,),
    )


def sides(size: int | Sequence[int] | Mapping[str, int] | None) -> tuple[int, int] | None:
    """(height, width) of the ways in which `transformers` writes a size."""
    if isinstance(size, Mapping):
        shortest = size.get("shortest_edge")
        height, width = size.get("height", shortest), size.get("width", shortest)
    else:
        height, width = (size, size) if isinstance(size, int) or size is None else size
    return None if height is None or width is None else (int(height), int(width))


# Shared ---------------------------------------------------------------------------------------------------------------


def with_channels(images: Tensor, channels: int) -> Tensor:
    """Grey images repeated to `channels`; others must have that number already."""
    if images.shape[1] == channels:
        return images
    if images.shape[1] == 1:
        return images.expand(-1, channels, -1, -1)
    raise UserError(f"The extractor takes {channels} channels, got images with {images.shape[1]}.")
