"""A file of another code -> its state dict, read as data alone."""

from __future__ import annotations

import json
import logging
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
logger = logging.getLogger(__name__)

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
_TOP = "top"  # the name of weights that lie under none, beside others that have one
_AVERAGES = re.compile(r"(?<![a-z])(emas?|swa|shadow|averaged?)(?![a-z])", re.IGNORECASE)


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
    lists = {name: tensors for name, tensors in _lists(content, "").items() if name not in entries}
    named = {name: state for name, tensors in lists.items() if (state := _with_names(tensors, entries)) is not None}
    nameless = {name: tensors for name, tensors in lists.items() if name not in named and _AVERAGES.search(name)}
    entries |= named
    if "" in entries:
        _say_what_is_left(path, content, {*entries, *nameless})
        if len(entries) + len(nameless) > 1:
            entries = {name or _TOP: state for name, state in entries.items()}
    taken = _choose(path, [*entries, *nameless], which)
    if taken in nameless:
        count = len(next(iter(entries.values())).keys() - set(SCHEDULE))
        raise ConvertError(
            f"{taken!r} in {path} is a list of {len(nameless[taken])} tensors without names, which are not one for "
            f"each of the {count} of {next(iter(entries))}, in order: save the average under its names, or name "
            "another with --weights."
        )
    return {**_schedule(content), **entries[taken]}


def _choose(path: str | os.PathLike[str], names: list[str], which: str | None) -> str:
    """Return the name of the weights that are taken.

    Raises:
        ConvertError: there are several and none is named, or there is none of this name.
    """
    if which is None:
        if len(names) == 1:
            return names[0]
        if _AVERAGE not in names:
            raise ConvertError(
                f"{path} holds several sets of weights: {', '.join(names)}. Name one with --weights; samples are "
                "usually drawn with the average."
            )
        others = ", ".join(name for name in names if name != _AVERAGE)
        logger.warning("%s holds several sets of weights: %s is taken, and not %s.", path, _AVERAGE, others)
        return _AVERAGE
    if which not in names:
        if names == [""]:
            raise ConvertError(f"{path} holds one set of weights under no name, got --weights {which}: leave it out.")
        raise ConvertError(f"{path} has no weights {which!r}; it has {', '.join(names)} (--weights).")
    return which


def _say_what_is_left(path: str | os.PathLike[str], content: object, names: set[str]) -> None:
    """Warn of what lies beside weights that have no entry of their own, and is not read."""
    parts = content.items() if isinstance(content, Mapping) else ()
    heads = {name.split(".")[0] for name in names}
    left = [str(key) for key, value in parts if isinstance(value, Mapping | list | tuple) and str(key) not in heads]
    if left and any(isinstance(value, Tensor) for _, value in parts):
        logger.warning("%s: beside the weights lies %s, no set of weights: not read.", path, ", ".join(left))


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
        parts = [part for part in content if isinstance(part, Mapping) and _entries(part, "")]
        content = dict(zip(("model", "ema"), parts, strict=False))
    if not isinstance(content, Mapping) or _OPTIMISER <= content.keys():
        return {}
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    inner = {str(key): value for key, value in content.items() if isinstance(value, Mapping)}
    found = _flat(tensors, name)
    for key, value in inner.items():
        for deeper, state in _entries(value, key).items():
            found[key if deeper == key else f"{key}.{deeper}"] = state
    heads = {key.split(".")[0] for key in found}
    if len(found) > 1 and len(heads) == 1:  # all lie in one container
        return {key.partition(".")[2]: state for key, state in found.items()}
    return found


def _flat(tensors: dict[str, Tensor], name: str) -> dict[str, dict[str, Tensor]]:
    """Return the sets of weights among tensors that lie beside each other; scores, noise and the like are none."""
    ends = {key: key.rsplit(".", 1)[-1] for key in tensors}
    schedule = {end: tensors[key] for key, end in ends.items() if end in SCHEDULE}
    extra = {key for key, end in ends.items() if end in _TABLES or (end in _COUNTERS and tensors[key].numel() == 1)}
    sets = _without_prefixes({key: value for key, value in tensors.items() if key not in extra}, name)
    networks = {key: state for key, state in sets.items() if any(one.endswith(("weight", "bias")) for one in state)}
    return {key: {**state, **schedule} for key, state in networks.items()}


def _lists(content: object, name: str) -> dict[str, list[Tensor]]:
    """Return name -> tensors of every list of them in a checkpoint, as averages are that keep no names."""
    if isinstance(content, Mapping) and content.keys() >= _OPTIMISER:
        return {}
    if isinstance(content, Mapping):
        parts = list(content.items())
    else:
        parts = list(enumerate(content)) if isinstance(content, list | tuple) else []
    numbered = [value for key, value in parts if isinstance(key, int)]
    tensors = [value for value in numbered if isinstance(value, Tensor) and value.is_floating_point()]
    if name and len(tensors) == len(parts) and any(value.ndim for value in tensors):
        return {name: tensors}
    found: dict[str, list[Tensor]] = {}
    for key, value in parts:
        found |= _lists(value, f"{name}.{key}" if name else str(key))
    return found


def _with_names(tensors: list[Tensor], entries: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor] | None:
    """Return tensors under the names of weights that have the same shapes in the same order; None for others."""
    for state in entries.values():
        own = {name: weight for name, weight in state.items() if name not in SCHEDULE}
        if [one.shape for one in tensors] == [one.shape for one in own.values()]:
            return dict(zip(own, tensors, strict=True))
    return None


def _schedule(content: object) -> dict[str, Tensor]:
    """Return the betas that lie anywhere in a checkpoint; the two numbers of Adam have the same name and are none."""
    if not isinstance(content, Mapping) or content.keys() >= _OPTIMISER:
        return {}
    found: dict[str, Tensor] = {}
    deeper: dict[str, Tensor] = {}
    for key, value in content.items():
        end = str(key).rsplit(".", 1)[-1]
        if end in SCHEDULE and isinstance(value, list | tuple) and all(isinstance(one, float) for one in value):
            value = torch.tensor(value, dtype=torch.float64)
        if end in SCHEDULE and isinstance(value, Tensor) and value.numel() > 2:
            found[end] = value
        deeper = {**_schedule(value), **deeper}
    return {**deeper, **found}


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
