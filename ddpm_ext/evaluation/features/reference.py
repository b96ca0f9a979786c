"""Features of a data set, computed once and kept: what generated images are compared with.

The file's key is data set fingerprint, extractor with weights and input, resolution, quantization, number of images:
a reference made with anything else is refused, never compared with.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from datasets.config import HF_DATASETS_CACHE
from torch import Tensor

from ...diffusion.images import to_unit
from ...errors import UserError
from ...pipelines.identity import key_hash
from ..sharded import Shards, load_checked, save_whole
from ..words import Quantization
from .extractors import Extractor, Features, check_quantization, extract
from .metrics import FeatureStatistics, feature_statistics

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ...data.dataset import ImageSet

__all__ = ["Reference", "as_features", "as_tensors", "load_reference", "make_reference"]

SHARD_SIZE = 2048


class Reference(NamedTuple):
    """Features of the images of a data set, and what they are of."""

    features: Tensor  # (N, d), float32
    statistics: FeatureStatistics
    key: dict[str, object]


def reference_key(images: ImageSet, extractor: Extractor, kind: Quantization, num_images: int) -> dict[str, object]:
    """Everything that reference features depend on."""
    check_quantization(extractor, kind)
    return {
        "dataset": images.fingerprint,
        "extractor": extractor.description,
        "resolution": list(images.shape),
        "hand_off": kind,
        "num_images": num_images,
    }


def default_cache() -> Path:
    """Where references are kept when no folder is named."""
    return Path(HF_DATASETS_CACHE) / "ddpm_ext" / "references"


def make_reference(
    images: ImageSet,
    extractor: Extractor,
    kind: Quantization,
    accelerator: Accelerator,
    *,
    cache_dir: Path | str | None = None,
    num_images: int | None = None,
    batch_size: int = 256,
) -> Reference:
    """The reference of the first `num_images` images of a set, from the cache or computed over all processes.

    Args:
        images: The data set.
        extractor: Makes the features.
        kind: The pixel quantization; it is recorded even where 8-bit images make no difference.
        accelerator: Knows the processes; each of them must call.
        cache_dir: Folder of the references; None for `default_cache()`.
        num_images: None for all.
        batch_size: Images at a time.
    """
    count = min(num_images or len(images), len(images))
    if count < 2:
        raise UserError(
            f"A reference needs at least 2 images for its covariance, got {count}: see max_reference_images."
        )
    key = reference_key(images, extractor, kind, count)
    folder = Path(cache_dir or default_cache())
    path = folder / f"reference-{key_hash(key)}.safetensors"
    accelerator.wait_for_everyone()
    there = path.exists()
    accelerator.wait_for_everyone()
    if not there:

        def work(piece: range) -> dict[str, Tensor]:
            starts = range(0, len(piece), batch_size)
            found = (images.batch(piece[i : i + batch_size]).pixels for i in starts)
            batches = (to_unit(pixels, images.spec.bits) for pixels in found)
            return as_tensors(extract(extractor, batches, kind))

        pieces = Shards(folder, key, accelerator)
        tensors = pieces.run("reference", {}, count, SHARD_SIZE, work)
        if accelerator.is_main_process:
            statistics = feature_statistics(tensors["features"])
            save_whole({**tensors, "mean": statistics.mean, "covariance": statistics.covariance}, path, key)
            shutil.rmtree(pieces.place("reference", {**key, "shard_size": SHARD_SIZE}), ignore_errors=True)
        accelerator.wait_for_everyone()
    return load_reference(path, key)


def load_reference(path: Path | str, key: dict[str, object]) -> Reference:
    """A reference from its file, when it is the one that `key` describes.

    Raises:
        ValueError: it was made with another extractor, from other images or at another size; names what differs.
    """
    tensors = load_checked(Path(path), key)
    mean, covariance = tensors.pop("mean"), tensors.pop("covariance")
    statistics = FeatureStatistics(mean, covariance, len(tensors["features"]))
    return Reference(tensors["features"], statistics, key)


def as_tensors(found: Features) -> dict[str, Tensor]:
    """Features as the tensors of a file: no logits, no tensor."""
    return {name: part for name, part in found._asdict().items() if isinstance(part, torch.Tensor)}


def as_features(tensors: dict[str, Tensor]) -> Features:
    """The features in the tensors of a file."""
    return Features(tensors["features"], tensors.get("logits"))
