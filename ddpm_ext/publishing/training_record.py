"""What the config.json and log of a run say of its training, in the words of its card; the unknown is left out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..pipelines.locate import is_hub_name
from ..run_dir import RunDir

__all__ = [
    "BaseModel",
    "Record",
    "base_model",
    "compute_cost",
    "hub_datasets",
    "summary",
    "training_data",
    "training_hours",
    "training_rows",
]

Record = Mapping[str, Any]  # of a JSON file

# Rows of the table: label and text, whose fields are options or entries of config.json. A row with an unknown field is
# left out.
_ROWS = (
    ("Data", "{data}, {images:,} images, fingerprint {data_fingerprint}"),
    ("Depth", "{depth}"),
    ("Classes", "{classes}"),
    ("Network", "UNet2DModel, preset {unet}"),
    ("Parameters", "{parameters:,}"),
    ("Diffusion steps T", "{ddpm_num_steps}"),
    ("Noise schedule", "{ddpm_beta_schedule}"),
    ("Prediction, variance, loss", "{prediction_type}, {variance_type}, {loss}"),
    ("Updates × batch", "{updates:,} × {global_batch}"),
    (
        "Optimiser",
        "Adam, learning rate {learning_rate:g}, β {adam_beta1}, {adam_beta2}, weight decay {adam_weight_decay:g}",
    ),
    ("Learning rate", "{lr_scheduler}, {lr_warmup_steps} updates of warm-up"),
    ("Gradient clipping", "global norm {max_grad_norm:g}"),
    ("Averaged weights", "{averaged}"),
    ("Dropout", "{dropout}"),
    ("Mirrored images", "{mirrored}"),
    ("Precision", "{precision}"),
    ("Seed", "{seed}"),
    ("Commit of ddpm_ext", "{commit}"),
    ("Versions", "{versions}"),
)


@dataclass(frozen=True)
class BaseModel:
    """The model that a training started from.

    Attributes:
        source: As `--init_from` was given: a Hub name, or a folder.
        is_on_hub: Whether it is a Hub name.
        changes: What the training changed, in words.
        before: What it was itself started or converted from, the nearest first; of each the source, and whether that
            is a Hub name.
    """

    source: str
    is_on_hub: bool
    changes: list[str]
    before: list[tuple[str, bool]] = field(default_factory=list)

    @property
    def chain(self) -> list[tuple[str, bool]]:
        """Return it and what was before it: sources, and whether they are Hub names."""
        return [(self.source, self.is_on_hub), *self.before]

    @property
    def names(self) -> list[str]:
        """Return the Hub names of the chain, or those of the folders without their place on the machine."""
        return [source if is_on_hub else Path(source).resolve().name for source, is_on_hub in self.chain]

    @property
    def name(self) -> str:
        """Return the first of the names."""
        return self.names[0]

    @property
    def on_hub(self) -> str | None:
        """Return the nearest of the chain that is on the Hub, None where none is."""
        return next((source for source, is_on_hub in self.chain if is_on_hub), None)


def base_model(record: Record) -> BaseModel | None:
    """Return the model that a run started from (`--init_from`), None where it started from random weights."""
    start, config = record.get("init_from"), record.get("config") or {}
    if start is None:
        return None
    on = f" on {data}" if (data := training_data(record)) else ""
    changes = [f"all weights were trained further{on}"]
    if config.get("freeze"):
        changes = [f"its weights but for {', '.join(config['freeze'])} were trained further{on}"]
    if config.get("lora_rank") is not None:
        changes = [f"low-rank adapters of its attention (rank {config['lora_rank']}) were trained{on} and merged"]
    if start.get("new"):
        changes.append(f"begun anew: {', '.join(start['new'])}")
    before = [(str(one["source"]), one.get("base_model") is not None) for one in start.get("before") or ()]
    return BaseModel(str(start["source"]), start.get("base_model") is not None, changes, before)


def hub_datasets(record: Record) -> list[str] | None:
    """Return the data set, where it is one of the Hub: a name with one slash that is no folder."""
    name = record.get("config", {}).get("dataset_name")
    return [name] if name and is_hub_name(name) and not Path(name).exists() else None


def training_data(record: Record) -> str | None:
    """Return the training data in words."""
    config = record.get("config")
    if config is None:
        return None
    if config.get("train_data_dir"):
        return f"the folder {Path(config['train_data_dir']).name}"
    if config.get("dataset_name") in (None, "digits"):
        return "handwritten digits (UCI Optical Recognition of Handwritten Digits, CC BY 4.0)"
    name = str(config["dataset_name"])
    return name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else f"the folder {Path(name).name}"


def summary(record: Record, size: str | None) -> str:
    """Return one sentence: what the model is.

    Args:
        record: config.json of its run.
        size: Of its images, in words.
    """
    sentence = "A denoising diffusion probabilistic model (DDPM)" + (f" for images of {size}" if size else "")
    if (base := base_model(record)) is not None:
        sentence += f", fine-tuned from {base.name}" + (f" on {data}" if (data := training_data(record)) else "")
    elif data := training_data(record):
        sentence += f", trained on {data}"
    return f"{sentence}."


def _depth_words(data: Record) -> str | None:
    """The depth of the levels that a run was trained on, in words; None for the usual 8 bits of files of 8 bits."""
    bits, limits = data.get("bits", 8), data.get("value_range")
    if limits is not None:
        return f"{bits} bits, stored values {limits[0]:g} to {limits[1]:g}"
    return None if bits == 8 else f"{bits} bits"


def _class_words(data: Record, shown: int = 10) -> str | None:
    """The classes of a training and how many images of each it saw; None where it has no classes."""
    counts = data.get("class_counts")
    if not counts:
        return None
    names = data.get("class_names") or range(len(counts))
    some = ", ".join(f"{name}: {count:,}" for name, count in list(zip(names, counts, strict=True))[:shown])
    return some + (f", … ({len(counts):,} classes)" if len(counts) > shown else "")


def training_rows(record: Record) -> list[tuple[str, str]]:
    """Return the table of the training: label and value, without what is not known."""
    config, start = record.get("config") or {}, (record.get("starts") or [{}])[-1]
    known = {
        **config,
        **{name: record.get(name) for name in ("images", "parameters", "updates", "global_batch", "data_fingerprint")},
        "data": training_data(record),
        "depth": _depth_words(record.get("data") or {}),
        "classes": _class_words(record.get("data") or {}),
        "averaged": None if not config else _fill("{ema}, decay {ema_max_decay:g}", config) or None,
        "mirrored": ("yes" if config["random_flip"] else "no") if "random_flip" in config else None,
        "precision": "float32" if config.get("mixed_precision") == "no" else config.get("mixed_precision"),
        "commit": start.get("commit"),
        "versions": ", ".join(f"{name} {version}" for name, version in start.get("versions", {}).items()) or None,
        "seed": record.get("seed", config.get("seed")),
    }
    if config and not config.get("use_ema"):
        known["averaged"] = "none"
    filled = [(label, _fill(text, known)) for label, text in _ROWS]
    return [(label, value) for label, value in filled if value]


def _fill(text: str, known: Record) -> str:
    """Return the text with its fields filled in; nothing where one of them is not known."""
    fields = re.findall(r"\{(\w+)", text)
    if any(known.get(name) is None for name in fields):
        return ""
    return text.format(**{name: known[name] for name in fields})


def compute_cost(run: Path, record: Record) -> str | None:
    """Return hardware and hours of the training; None where neither is known."""
    devices = [device for start in record.get("starts") or [] if (device := _device_words(start))]
    parts = [f"Hardware: {', then '.join(dict.fromkeys(devices))}."] if devices else []
    if hours := training_hours(RunDir(run).read_log(), record.get("global_batch")):
        parts.append(f"Training time by the log: {hours:.2g} hours.")
    return " ".join(parts) or None


def _device_words(start: Record) -> str | None:
    """Return what one start of a training ran on; None where it is not known."""
    hardware = start.get("hardware") or {}
    if hardware.get("gpu"):
        return f"{start.get('processes', 1)} × {hardware['gpu']}"
    return f"{hardware['processor']}, {hardware.get('cores')} cores" if hardware.get("processor") else None


def training_hours(log: Iterable[Record], global_batch: int | None) -> float | None:
    """Return the hours spent in updates: the images of each log interval over its speed."""
    seconds, before = 0.0, 0
    for line in log:
        if global_batch and line.get("images_per_second"):
            seconds += (line["update"] - before) * global_batch / line["images_per_second"]
            before = line["update"]
    return seconds / 3600 or None
