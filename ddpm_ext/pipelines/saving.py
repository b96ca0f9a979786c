"""A saved pipeline takes the place of an earlier one: what is loaded is what was saved last."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import HubError
from ..hub.pipeline_files import Weights, weights_of

__all__ = ["replacing"]


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give a temporary folder to save into; its files then take the place of those of an earlier save.

    Weights of another kind go: one file where there are shards now or the reverse, pickles, shards of another size.
    Weights of another variant stay when they are the same in another precision, and go otherwise.

    Args:
        folder: Where the pipeline will lie; made if missing, and gone again where nothing was saved.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield temporary
        for part in (temporary, *(path for path in sorted(temporary.iterdir()) if path.is_dir())):
            _replace(part, folder / part.relative_to(temporary))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for path in made:
            if not any(path.iterdir()):
                path.rmdir()


def _replace(new: Path, old: Path) -> None:
    old.mkdir(exist_ok=True)
    files = [path for path in new.iterdir() if path.is_file()]
    if any(_is_weights(path) for path in files):
        kept = _other_variants(new, old)
        for path in old.iterdir():
            if _is_weights(path) and path not in kept:
                path.unlink()
    for path in files:
        os.replace(path, old / path.name)


def _is_weights(path: Path) -> bool:
    """Whether a file holds weights, or says where they lie: of any kind that Diffusers writes."""
    return path.name.startswith("diffusion_pytorch_model") and path.suffix in (".safetensors", ".bin", ".json")


def _other_variants(new: Path, old: Path) -> set[Path]:
    """The earlier files that hold the new weights in another precision."""
    saved = weights_of(new)
    if not saved:
        return set()  # pickles, which nothing is compared with
    try:
        earlier = [weights for weights in weights_of(old) if weights.variant != saved[0].variant]
        same = [weights for weights in earlier if _are_same(_load(saved[0]), _load(weights))]
    except (HubError, SafetensorError, OSError):
        return set()
    return {path for weights in same for path in (*weights.files, weights.shard_index) if path is not None}


def _load(weights: Weights) -> dict[str, Tensor]:
    return {name: value for path in weights.files for name, value in load_file(path).items()}


def _are_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of weights are equal in the coarser of their precisions."""
    if a.keys() != b.keys():
        return False
    for name, value in a.items():
        dtype = min(value.dtype, b[name].dtype, key=lambda one: torch.finfo(one).bits)
        if value.shape != b[name].shape or not torch.equal(value.to(dtype), b[name].to(dtype)):
            return False
    return True
