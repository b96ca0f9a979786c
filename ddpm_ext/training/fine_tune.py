"""--init_from: begin with the weights, the architecture and the schedule of a pipeline, a run or a checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import TypedDict, cast

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from ..data.spec import DataSpec
from ..diffusion.schedules import respaced_timesteps
from ..diffusion.words import EXTENSION_KEY, LEARNED_VARIANCES
from ..errors import UserError
from ..models.classes import classes_of
from ..models.values import Values, values_of
from ..pipelines.ddpm import load_pipeline
from ..pipelines.locate import find_pipeline
from ..publishing.licenses import base_of_card
from ..run_dir import JsonRecord, RunError, read_json
from ..schedulers.config import OF_WEIGHTS
from ..schedulers.ddpm import DDPMExtScheduler
from .builders import NetworkOptions, build_scheduler
from .config import OF_SCHEDULE, TrainConfig
from .state import checkpoint

__all__ = [
    "Origin",
    "Start",
    "add_lora",
    "check_class_names",
    "find_start",
    "freeze",
    "load_weights",
    "merged",
    "other_values",
]

# Weights whose shape follows from the images and the process: a network that differs elsewhere is another one.
_HEADS = ("conv_in.", "conv_out.", "class_embedding.")
_CLASSES = "class_embedding.weight"
_LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class Origin(TypedDict):
    """What config.json says of the source of a run."""

    source: str
    base_model: str | None  # its name on the Hub
    checkpoint: str | None
    weights_sha256: str
    before: Sequence[JsonRecord]  # what the source itself was started from, the nearest first
    new: list[str]  # weights that began anew
    loaded: int  # weights that were there


@dataclass(frozen=True)
class Start:
    """What a run begins with, or began with.

    Attributes:
        config: The options, with the schedule of the source in them.
        network: Arguments of UNet2DModel.
        scheduler: The source's schedule and sampling options.
        origin: What config.json says of it.
        weights: Name -> tensor; None for a resumed run, whose checkpoint holds them.
    """

    config: TrainConfig
    network: NetworkOptions
    scheduler: DDPMExtScheduler
    origin: Origin
    weights: dict[str, Tensor] | None = None


# Where it comes from --------------------------------------------------------------------------------------------------


def find_start(config: TrainConfig, state: JsonRecord | None) -> Start | None:
    """Return what --init_from names, or named when the run began; None without it.

    Args:
        config: The options.
        state: state.json of the checkpoint that the run resumes from; None for a run that begins.

    Raises:
        UserError: there is no such source, or options contradict it.
    """
    if config.init_from is None:
        return None
    return _load_start(config) if state is None else _resumed_start(config, state)


def _load_start(config: TrainConfig) -> Start:
    """Load what --init_from names.

    Args:
        config: The options; `init_from` is a folder or Hub name of a pipeline, a run folder, or a checkpoint.

    Raises:
        UserError: there is none, or options contradict it.
    """
    name = str(config.init_from)
    path = Path(name).expanduser()
    folder = path if (path / checkpoint.STATE).is_file() else None
    if folder is None and (path / "checkpoints").is_dir() and not (path / "pipeline").is_dir():
        folder = checkpoint.newest_intact(path / "checkpoints")
    network, scheduler, weights = _of_pipeline(name, config) if folder is None else _of_checkpoint(folder)
    weights = {key: tensor.to(torch.float32) for key, tensor in weights.items()}
    adopted = _adopt(config, scheduler.config, network)
    _check_samples(scheduler, adopted)
    origin: Origin = {
        "source": name,
        "base_model": None if path.exists() else name,
        "checkpoint": None if folder is None else folder.name,
        "weights_sha256": _digest(weights),
        "before": [] if folder is None and not path.exists() else _before(path),
        "new": [],
        "loaded": len(weights),
    }
    return Start(adopted, _arguments(adopted, network), _trainable(scheduler, adopted), origin, weights)


def _resumed_start(config: TrainConfig, state: JsonRecord) -> Start:
    """Return the start of a resumed run from its checkpoint: the source need not be there any more.

    Args:
        config: The options.
        state: state.json of the checkpoint.

    Raises:
        UserError: options contradict it, or the run began without --init_from.
    """
    if state.get("scheduler") is None:
        raise RunError(f"The run in the folder began without --init_from {config.init_from}; leave it out.")
    scheduler = cast(DDPMExtScheduler, DDPMExtScheduler.from_config(state["scheduler"]))
    adopted = _adopt(config, scheduler.config, state["network"])
    network = {**state["network"], EXTENSION_KEY: state.get("classes")}
    return Start(adopted, network, scheduler, state["init_from"])


def _of_pipeline(name: str, config: TrainConfig) -> tuple[NetworkOptions, DDPMExtScheduler, dict[str, Tensor]]:
    """Load network options, scheduler and weights of a pipeline.

    Raises:
        RunError: its scheduler names no variance, and neither does an option.
    """
    pipeline = load_pipeline(find_pipeline(name))
    theirs = pipeline.scheduler.config
    is_unnamed = theirs.get("variance_type", "") is None  # of solvers whose steps draw nothing
    if is_unnamed and "variance_type" not in config.asked and config.variance_type == TrainConfig.variance_type:
        raise RunError(
            f"The scheduler of {name} is a {type(pipeline.scheduler).__name__}, which names no variance_type, and a "
            "training must have one: give --variance_type fixed_small or fixed_large."
        )
    said = {**theirs, "variance_type": config.variance_type} if is_unnamed else theirs
    scheduler = cast(DDPMExtScheduler, DDPMExtScheduler.from_config(said))
    return dict(pipeline.unet.config), scheduler, pipeline.unet.state_dict()


def _of_checkpoint(folder: Path) -> tuple[NetworkOptions, DDPMExtScheduler, dict[str, Tensor]]:
    """Load network options, scheduler and averaged weights of a checkpoint."""
    checkpoint.verify(folder)
    state = checkpoint.read_state(folder)
    if state.get("scheduler") is not None:
        scheduler = cast(DDPMExtScheduler, DDPMExtScheduler.from_config(state["scheduler"]))
    else:
        scheduler = build_scheduler(cast(TrainConfig, SimpleNamespace(**state["config"])))
    stem = "ema" if (folder / "ema.safetensors").is_file() else "model"
    network = {**state["network"], EXTENSION_KEY: _classes_of_state(state)}
    return network, scheduler, merged(checkpoint.read_tensors(folder, stem))


def _classes_of_state(state: JsonRecord) -> JsonRecord | None:
    """What state.json of a checkpoint says of the null label: itself, or the options of a run from random weights."""
    if "classes" in state:
        return state["classes"]
    rows = state["network"].get("num_class_embeds")
    return {"null_label": rows - 1} if rows is not None and state["config"].get("class_dropout") else None


def _before(path: Path) -> Sequence[JsonRecord]:
    """What the source itself was started or converted from, as its record or its card says, the nearest first."""
    run = path.resolve()
    run = run.parent.parent if run.parent.name == "checkpoints" else run.parent if run.name == "pipeline" else run
    record = read_json(run / "config.json") if (run / "config.json").is_file() else {}
    if (start := record.get("init_from")) is not None:
        return [{name: start.get(name) for name in ("source", "base_model")}, *start.get("before", [])]
    cards = [folder / "README.md" for folder in (path, run) if (folder / "README.md").is_file()]
    named = [base_of_card(card.read_text(encoding="utf-8")) for card in cards]
    return [{"source": name, "base_model": name} for name in named if name is not None][:1]


def _digest(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names and values."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


# What options may say beside it ---------------------------------------------------------------------------------------


def _check_samples(scheduler: DDPMExtScheduler, config: TrainConfig) -> None:
    """Raise UserError where the source's steps_offset leaves no room for the steps of the sample grids."""
    theirs = scheduler.config
    if theirs["steps_offset"] and theirs["timestep_spacing"] == "leading":
        steps = min(config.ddpm_num_inference_steps, len(scheduler))
        respaced_timesteps("leading", len(scheduler), steps, theirs["steps_offset"])


def _adopt(config: TrainConfig, schedule: Mapping[str, object], network: NetworkOptions) -> TrainConfig:
    """Return the options with the schedule and the classes of the source.

    Raises:
        RunError: with the list of what contradicts it.
    """
    theirs = {name: schedule[key] for name, key in OF_SCHEDULE.items()}
    if theirs["variance_type"] == "analytic":  # measured for the source's weights, of which these are going to differ
        theirs["variance_type"] = "fixed_small"
    if config.init_new_head and config.variance_type in LEARNED_VARIANCES:
        theirs["variance_type"] = config.variance_type
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    wrong = [
        f"  {name}: {theirs[name]!r} there, {getattr(config, name)!r} asked for"
        for name in theirs
        if getattr(config, name) != theirs[name] and (name in config.asked or getattr(config, name) != defaults[name])
    ]
    conditional = network.get("num_class_embeds") is not None
    if (
        conditional
        and "class_conditional" in config.asked
        and not config.class_conditional
        and not config.init_new_head
    ):
        wrong.append("  class_conditional: the network knows classes")
    classes = config.class_conditional or (conditional and "class_conditional" not in config.asked)
    if network.get("class_embed_type") is not None and not classes:
        wrong.append("  class_conditional: the network takes class labels, give --class_conditional")
    if config.class_dropout and not classes:
        wrong.append("  class_dropout: the network knows no classes, add them with --class_conditional --init_new_head")
    if wrong:
        raise RunError(
            f"--init_from {config.init_from} brings its own schedule and classes, and options contradict them:\n"
            + "\n".join(wrong)
            + "\nLeave these options out; a learned variance is added with --init_new_head."
        )
    return dataclasses.replace(config, **theirs, class_conditional=classes, resolved=True)


def _arguments(config: TrainConfig, network: NetworkOptions) -> NetworkOptions:
    """Return the arguments of UNet2DModel: the source's, at the size, dropout and variance head asked for.

    Raises:
        RunError: the source has a variance head, or takes another image, of which its schedule does not know.
    """
    known = inspect.signature(UNet2DModel.__init__).parameters
    found = {name: value for name, value in network.items() if name in known or name == EXTENSION_KEY}
    if config.size is not None:
        found["sample_size"] = list(config.size)
    if config.dropout is not None:
        found["dropout"] = config.dropout
    if config.variance_type in LEARNED_VARIANCES:
        found["out_channels"] = 2 * found["in_channels"]
    elif found["out_channels"] != found["in_channels"]:
        raise RunError(
            f"The network of {config.init_from} gives {found['out_channels']} channels for {found['in_channels']}, and "
            f"its schedule says variance_type {config.variance_type!r}. If it has a variance head, --variance_type "
            "learned_range --loss hybrid --init_new_head takes it as it is; others are no DDPM of images."
        )
    return found


def _trainable(scheduler: DDPMExtScheduler, config: TrainConfig) -> DDPMExtScheduler:
    """Return the scheduler with the variance that is trained, and nothing that was measured for other weights."""
    extra = scheduler.config.get(EXTENSION_KEY) or {}
    kept = {name: value for name, value in extra.items() if name not in OF_WEIGHTS}
    if scheduler.config["variance_type"] == config.variance_type and kept == extra:
        return scheduler
    if kept.get("trajectory") == "optimal":  # which followed from the errors
        del kept["trajectory"]
    if config.variance_type in LEARNED_VARIANCES:  # whose noise η does not choose
        kept.pop("eta", None)
    options = {**scheduler.config, EXTENSION_KEY: kept}
    return cast(DDPMExtScheduler, DDPMExtScheduler.from_config(options, variance_type=config.variance_type))


def check_class_names(start: Start, data: DataSpec) -> None:
    """Refuse images whose classes have other names than those that the source was trained on.

    Args:
        start: The source.
        data: The record of the images.

    Raises:
        RunError: with both lists; a new embedding is begun with --init_new_head.
    """
    config = start.config
    if not config.class_conditional or config.init_new_head or start.weights is None:
        return
    names = _class_names(start)
    if names and data.class_names and list(names) != list(data.class_names):
        raise RunError(
            f"--init_from {config.init_from} was trained on the classes {', '.join(names)}, and these images have "
            f"{', '.join(data.class_names)}. Give --init_new_head to begin the class embedding anew."
        )


def other_values(start: Start, data: DataSpec) -> str | None:
    """Return a sentence where the source's images had another depth or range of values than these; None where not.

    Args:
        start: The source.
        data: The record of the images.
    """
    spec = _source_spec(start)
    there = values_of(start.network) if spec is None else Values(spec.bits, spec.value_range)
    here = Values(data.bits, data.value_range)
    if start.weights is None or there == here:
        return None
    return (
        f"--init_from {start.config.init_from} was trained on {there}, and these images are read as {here}: equal "
        "values mean other levels to it. --bits and --value_range of the source read them as it did."
    )


def _source_spec(start: Start) -> DataSpec | None:
    """The record of the source's images; None where it left none here."""
    path = Path(str(start.config.init_from)).expanduser()
    if not path.exists():
        return None
    return DataSpec.from_run(path if not (path / checkpoint.STATE).is_file() else path.parent.parent)


def _class_names(start: Start) -> Sequence[str] | None:
    """The names of the source's classes, by its network or its run."""
    names = (start.network.get(EXTENSION_KEY) or {}).get("class_names")
    if names is None and (spec := _source_spec(start)) is not None:
        names = spec.class_names
    return names


# Weights --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def load_weights(network: UNet2DModel, start: Start) -> list[str]:
    """Copy the source's weights into a new network.

    A variance head grown with --init_new_head keeps the prediction; what it adds begins at 0, the middle of its range.
    A null label grown with it keeps the rows of the classes.

    Args:
        network: Fresh, of the architecture asked for.
        start: The source, with weights.

    Returns:
        Names of the weights that begin anew.

    Raises:
        RunError: heads differ and --init_new_head is not given, or other weights differ.
    """
    assert start.weights is not None
    ours = dict(network.named_parameters())
    shapes = {name: tuple(tensor.shape) for name, tensor in start.weights.items()}
    new = sorted(
        name for name in ours.keys() | shapes.keys() if name not in ours or tuple(ours[name].shape) != shapes.get(name)
    )
    has_same_classes = _has_the_same_classes(network, start)
    if _CLASSES in ours and _CLASSES not in new and not has_same_classes:
        new = sorted([*new, _CLASSES])  # as many rows, which would mean something else
    lines = [
        f"  {name}: {shapes.get(name, 'none')} there, {tuple(ours[name].shape) if name in ours else 'none'} needed"
        for name in new
    ]
    if any(not name.startswith(_HEADS) for name in new):
        raise RunError(f"The weights of {start.origin['source']} do not fit its own options:\n" + "\n".join(lines))
    if new and not start.config.init_new_head:
        raise RunError(
            f"The heads of {start.origin['source']} are others than these images and options need:\n"
            + "\n".join(lines)
            + "\nGive --init_new_head to begin them anew; all other weights are loaded."
        )
    for name, weight in ours.items():
        if name not in new:
            weight.copy_(start.weights[name])
        elif name.startswith("conv_out.") and len(weight) == 2 * shapes.get(name, (0,))[0]:
            half = len(weight) // 2
            if weight.shape[1:] == start.weights[name].shape[1:]:
                weight[:half].copy_(start.weights[name])
                weight[half:].zero_()
        elif name == _CLASSES and has_same_classes:
            rows = min(len(weight), shapes[name][0])  # without the null label
            weight[:rows].copy_(start.weights[name][:rows])
    return new


def _has_the_same_classes(network: UNet2DModel, start: Start) -> bool:
    """Whether labels mean the same in a new network as in the source: as many, and of no other names."""
    ours, theirs = classes_of(network.config), classes_of(start.network)
    if ours is None or theirs is None or ours.number != theirs.number:
        return False
    names = _class_names(start)
    return names is None or ours.names is None or tuple(names) == ours.names


def freeze(network: nn.Module, patterns: list[str], new: Collection[str] = ()) -> None:
    """Let the weights whose names fit a pattern stay as they are.

    Args:
        network: Changed in place.
        patterns: As in "down_blocks.*" or "*.conv1.weight"; * stands for anything.
        new: Names of the weights that begin anew.

    Raises:
        UserError: a pattern fits no weight that is trained, or one that begins anew, or nothing is left to train.
    """
    named = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    for pattern in patterns:
        fitting = [name for name in named if fnmatch(name, pattern)]
        if untrained := [name for name in fitting if name in new]:
            raise UserError(
                f"--freeze {pattern} would leave {', '.join(untrained)} as drawn: with --init_new_head they begin anew "
                "and have to be trained."
            )
        if not fitting:
            some = ", ".join(dict.fromkeys(name.split(".")[0] + ".*" for name in named))
            raise UserError(f"--freeze {pattern} fits no weight that is trained; its parts are {some}.")
        for name in fitting:
            named[name].requires_grad_(False)
    if not any(weight.requires_grad for weight in named.values()):
        raise UserError(f"--freeze {' '.join(patterns)} leaves nothing to train.")


def add_lora(network: UNet2DModel, rank: int, new: Collection[str] = ()) -> None:
    """Put low-rank adapters beside the linear layers of every attention; they, and what begins anew, are trained.

        W x + B A x,   A of shape (rank, in), B of shape (out, rank), B = 0 at the start

    Args:
        network: Changed in place.
        rank: Of B A.
        new: Names of the weights that begin anew.

    Raises:
        UserError: peft is not installed, or the network has no attention.

    Source: Hu et al. 2021, arXiv:2106.09685, Eq. (3), with α = r.
    """
    if importlib.util.find_spec("peft") is None:
        raise UserError("--lora_rank needs peft: pip install 'ddpm-ext[lora]'.")
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not any(name.endswith(_LORA_TARGETS) for name in linear):
        raise UserError("--lora_rank adapts the attention of a network, and this one has none; use --freeze instead.")
    from peft import LoraConfig, inject_adapter_in_model  # pyright: ignore[reportMissingImports]

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(_LORA_TARGETS)), network)
    for name, weight in network.named_parameters():
        if name in new:
            weight.requires_grad_(True)


def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the plain network: adapters are added to what they stand beside, W + B A."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if ".lora_" in name:
            continue
        layer, base, end = name.partition(".base_layer")
        down, up = (weights.get(f"{layer}.lora_{part}.default.weight") for part in "AB")
        if base and end == ".weight" and down is not None and up is not None:
            tensor = (tensor.double() + up.double() @ down.double()).to(tensor.dtype)
        found[layer + end] = tensor
    return found
