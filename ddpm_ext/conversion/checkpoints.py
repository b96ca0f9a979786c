"""A file of another code -> its state dict, read as data alone."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .config import ConvertError

__all__ = ["SCHEDULE", "read_weights"]

# Buffers of a process beside the weights, as of denoising-diffusion-pytorch and CompVis: all follow from the betas.
SCHEDULE = ("betas", "alphas_cumprod")
_TABLES = {
    *SCHEDULE,
    *("alphas", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    *("lvlb_weights", "p2_loss_weight", "loss_weight"),
}
# Counters of averages: torch's AveragedModel, ema_pytorch, CompVis' LitEma.
_COUNTERS = {"n_averaged", "initted", "step", "decay", "num_updates"}
_AVERAGE = "ema_model"  # pytorch-ddpm's entry that its own evaluation takes
_PREFIXES = (
    *("module", "model", "_orig_mod", "net_model", "ema_model", "ema", "online_model", "model_ema"),
    *("diffusion_model", "denoise_fn", "denoise_model", "unet", "net", "diffusion"),
)
# What PyTorch raises for a file that is cut short, or that is none of its own; it reads any text as a pickle.
_UNREADABLE = (
    *(pickle.UnpicklingError, SafetensorError, EOFError, OSError, RuntimeError),
    *(KeyError, IndexError, ValueError, TypeError, AttributeError),
)
_OPTIMISER = {"state", "param_groups"}


def read_weights(path: str | os.PathLike[str], which: str | None = None) -> dict[str, Tensor]:
    """Return the state dict in a checkpoint file; no code in the file runs.

    Beside the weights it holds the betas of the process, where the file does, under the names in SCHEDULE.

    Args:
        path: The file, or the index of several (*.index.json).
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
    if path.name.endswith(".index.json"):
        return _load_parts(path)
    if re.search(r"-\d{5}-of-\d{5}\.\w+$", path.name):
        raise ConvertError(f"{path} is one of several files of a checkpoint: name their index, *.index.json beside it.")
    return _load_file(path)


def _load_file(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [""])[0].split(". ")[0] or type(error).__name__
        hint = (
            ". Where you trust it, save its weights alone: "
            'torch.save(torch.load(path, weights_only=False)["state_dict"], "weights.pt")'
        )
        raise ConvertError(
            f"{path} is no checkpoint that can be read as data alone, and others are not opened, since they can run "
            f"code: {reason}" + (hint if "Unsupported global" in str(error) else "")
        ) from error


def _load_parts(index: Path) -> dict[str, object]:
    """Return the tensors of a checkpoint in several files.

    Raises:
        ConvertError: the index is none, or a file or a tensor that it names is not there.
    """
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConvertError(f"{index} is no index of a checkpoint in several files: it has no weight_map.") from error
    found: dict[str, object] = {}
    for name in files:
        part = index.parent / name
        if not part.is_file():
            raise ConvertError(f"{index} names {name}, and there is no such file beside it.")
        content = _load_file(part)
        found |= content if isinstance(content, dict) else {}
    if lacking := sorted(places.keys() - found.keys()):
        raise ConvertError(f"{index} names {lacking[0]!r}, which {places[lacking[0]]} does not hold.")
    return found


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
        if not any(value.ndim for value in tensors.values()):  # scores and the like
            return {}
        ends = {key: key.rsplit(".", 1)[-1] for key in tensors}
        schedule = {end: tensors[key] for key, end in ends.items() if end in SCHEDULE}
        extra = {key for key, end in ends.items() if end in _TABLES or (end in _COUNTERS and tensors[key].numel() == 1)}
        sets = _without_prefixes({key: value for key, value in tensors.items() if key not in extra}, name)
        return {key: {**state, **schedule} for key, state in sets.items()}
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in inner.items():
        for deeper, state in _entries(value, key).items():
            found[key if deeper == key else f"{key}.{deeper}"] = state
    heads = {key.split(".")[0] for key in found}
    if len(found) > 1 and len(heads) == 1:  # all lie in one container
        return {key.partition(".")[2]: state for key, state in found.items()}
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
    if {"model", "model_ema"} <= groups.keys():  # of CompVis, whose averages have the same names without dots
        names = {key.replace(".", ""): key for key in groups["model"]}
        groups["model_ema"] = {names.get(key, key): value for key, value in groups["model_ema"].items()}
    if len(groups) == 1:
        return _without_prefixes(next(iter(groups.values())), name)
    return {head: next(iter(_without_prefixes(group, head).values())) for head, group in groups.items()}


def _has_optimiser(content: object) -> bool:
    if isinstance(content, Mapping):
        return content.keys() >= _OPTIMISER or any(_has_optimiser(value) for value in content.values())
    return isinstance(content, list | tuple) and any(_has_optimiser(value) for value in content)
