"""A file of another code -> its state dict, read as data alone."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .config import ConvertError

__all__ = ["read_weights"]

_AVERAGE = "ema_model"  # pytorch-ddpm's entry that its own evaluation takes
_PREFIXES = ("module", "model", "_orig_mod", "net_model", "ema_model", "ema")
# What PyTorch raises for a file that is cut short, or that is none of its own; it reads any text as a pickle.
_UNREADABLE = (
    *(pickle.UnpicklingError, SafetensorError, EOFError, OSError, RuntimeError),
    *(KeyError, IndexError, ValueError, TypeError, AttributeError),
)
_OPTIMISER = {"state", "param_groups"}


def read_weights(path: str | os.PathLike[str], which: str | None = None) -> dict[str, Tensor]:
    """Return the state dict in a checkpoint file; no code in the file runs.

    Args:
        path: The file.
        which: The entry that holds the weights, where there are several; None takes the only one, or ema_model.

    Raises:
        ConvertError: there is no such file, it is no checkpoint, or it has no such entry.
    """
    if not Path(path).is_file():
        found = "a folder" if Path(path).is_dir() else "nothing"
        raise ConvertError(f"checkpoint must be a file of another code, and there is {found} at {path}. Name the file.")
    content = _load(Path(path))
    entries = _entries(content, "")
    if not entries:
        if _has_optimiser(content):
            raise ConvertError(
                f"{path} holds the state of an optimiser, not weights. They lie beside it, as ema_0.9999_500000.pt or "
                "model500000.pt beside opt500000.pt."
            )
        raise ConvertError(f"{path} holds no weights, but a {type(content).__name__}.")
    if which is None:
        if len(entries) > 1 and _AVERAGE not in entries:
            raise ConvertError(
                f"{path} holds several sets of weights: {', '.join(entries)}. Name one with --weights; samples are "
                "usually drawn with the average."
            )
        return entries[_AVERAGE if len(entries) > 1 else next(iter(entries))]
    if which not in entries:
        if list(entries) == [""]:
            raise ConvertError(f"{path} holds one set of weights under no name, got --weights {which}: leave it out.")
        raise ConvertError(f"{path} has no weights {which!r}; it has {', '.join(entries)} (--weights).")
    return entries[which]


def _load(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [""])[0].split(". ")[0] or type(error).__name__
        raise ConvertError(
            f"{path} is no checkpoint that can be read as data alone, and others are not opened, since they can run "
            f"code: {reason}"
        ) from error


def _entries(content: object, name: str) -> dict[str, dict[str, Tensor]]:
    """Return name -> state dict of every set of weights in a checkpoint; "" where it has no name of its own."""
    if isinstance(content, list | tuple):  # of ermongroup/ddim: weights, optimiser, epoch, step and the average
        parts = [part for part in content if isinstance(part, Mapping) and not _OPTIMISER <= part.keys()]
        content = dict(zip(("model", "ema"), parts, strict=False))
    if not isinstance(content, Mapping) or _OPTIMISER <= content.keys():
        return {}
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    inner = {str(key): value for key, value in content.items() if isinstance(value, Mapping)}
    if tensors and not any(isinstance(value, Mapping | list) for value in content.values()):
        return _without_prefixes(tensors, name)
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in inner.items():
        for deeper, state in _entries(value, key).items():
            found[key if deeper == key else f"{key}.{deeper}"] = state
    return found


def _without_prefixes(state: dict[str, Tensor], name: str) -> dict[str, dict[str, Tensor]]:
    """Return the sets of weights in a flat state dict: of wrapped modules, or several beside each other."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        head, dot, rest = key.partition(".")
        known = dot and head in _PREFIXES
        groups.setdefault(head if known else "", {})[rest if known else key] = value
    if "" in groups:  # some names have none: they are the code's own
        return {name: state}
    if len(groups) == 1:
        return _without_prefixes(next(iter(groups.values())), name)
    return {head: next(iter(_without_prefixes(group, head).values())) for head, group in groups.items()}


def _has_optimiser(content: object) -> bool:
    if isinstance(content, Mapping):
        return content.keys() >= _OPTIMISER or any(_has_optimiser(value) for value in content.values())
    return isinstance(content, list | tuple) and any(_has_optimiser(value) for value in content)
