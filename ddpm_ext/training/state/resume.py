"""Which checkpoint a run resumes from, and whether it may: options that alter the weights must be as they were."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator

from ...distributed import launcher_accumulation, on_main
from ...run_dir import JsonRecord, RunDir, RunError
from ..config import TrainConfig, config_changes, recorded
from ..plan.batch import BatchPlan, plan_batch
from . import checkpoint

if TYPE_CHECKING:
    from ..trainer import Trainer

__all__ = [
    "ResumePoint",
    "compare",
    "find_checkpoint",
    "is_of",
    "obey_launcher",
    "plain_config",
    "resumed_plan",
    "warn_of_other_conditions",
]

_NETWORK_OPTIONS = ("model_config_name_or_path", "unet", "dropout", "class_conditional", "class_dropout", "resolution")
_DATA_OPTIONS = (
    *("dataset_name", "dataset_config_name", "train_data_dir", "train_split", "image_column", "label_column"),
    *("resolution", "center_crop", "bits", "preserve_input_precision", "value_range", "channel_axis", "array_key"),
)
_TENSOR_OPTIONS = ("lora_rank",)  # they decide which tensors a checkpoint holds
_BATCH_OPTIONS = ("train_batch_size", "gradient_accumulation_steps", "global_batch_size")


@dataclass(frozen=True)
class ResumePoint:
    """An intact checkpoint to resume from.

    Attributes:
        folder: The checkpoint.
        record: Its state.json.
        branch: Name of the checkpoint at which this branch of the training began by going back to it; None for the
            first branch.
        abandoned: Later checkpoints and snapshots, of the branch that is left. The next save deletes them.
    """

    folder: Path
    record: JsonRecord
    branch: str | None
    abandoned: list[Path] = field(default_factory=list)


def find_checkpoint(config: TrainConfig, run: RunDir, accelerator: Accelerator) -> ResumePoint | None:
    """Find the checkpoint to resume from; the main process looks, all others hear of it.

    Args:
        config: The options.
        run: The run folder.
        accelerator: Knows the processes.

    Raises:
        RunError: checkpoints are there and none is intact, the one named is damaged, or resuming was refused.
    """
    return on_main(accelerator, lambda: _choose(config, run))


def _choose(config: TrainConfig, run: RunDir) -> ResumePoint | None:
    """Choose on the main process; None for a run that begins."""
    wanted = config.resume_from_checkpoint
    if run.starts_empty or (config.dry_run and config.overwrite_output_dir):
        return _elsewhere(config, run)
    if not config.dry_run:
        checkpoint.sweep(run.checkpoints)
    if wanted not in (None, "latest"):
        return _choose_named(config, run, Path(str(wanted)))
    if wanted is None and checkpoint.list_checkpoints(run.checkpoints):
        raise RunError(
            f"{run.path} holds checkpoints and --resume_from_checkpoint is none. Give --resume_from_checkpoint latest, "
            "another --output_dir, or --overwrite_output_dir to delete them."
        )
    newest = checkpoint.newest_intact(run.checkpoints)
    return None if newest is None else _point(newest, run)


def _elsewhere(config: TrainConfig, run: RunDir) -> ResumePoint | None:
    """Choose for a run whose folder is emptied: nothing, or the checkpoint of another run that was named.

    Raises:
        RunError: the one named is the run's own, and would be deleted.
    """
    if config.resume_from_checkpoint in (None, "latest"):
        return None
    folder = Path(str(config.resume_from_checkpoint))
    if not folder.is_dir() or is_of(run, folder):
        raise RunError(
            f"--resume_from_checkpoint {folder} names a checkpoint of the folder that --overwrite_output_dir empties, "
            "or none at all; drop one of the two options."
        )
    checkpoint.verify(folder)
    return ResumePoint(folder, checkpoint.read_state(folder), str(folder.resolve()))


def _choose_named(config: TrainConfig, run: RunDir, wanted: Path) -> ResumePoint:
    """Choose the checkpoint that was named or, where this command continued it, the newest that followed."""
    folder = wanted if wanted.is_dir() or len(wanted.parts) > 1 else run.checkpoints / wanted
    branch = folder.name if is_of(run, folder) else str(folder.resolve())
    for path in reversed(checkpoint.list_checkpoints(run.checkpoints)):
        if _came_of(path, branch, config):
            print(
                f"Resuming from {path.name}, which continues {branch}. To go back there again, delete it.",
                file=sys.stderr,
            )
            return _point(path, run)
    if not folder.is_dir():
        names = ", ".join(path.name for path in checkpoint.list_checkpoints(run.checkpoints)) or "none"
        raise RunError(
            f"--resume_from_checkpoint {wanted}: there is no such checkpoint. {run.checkpoints} has {names}."
        )
    checkpoint.verify(folder)
    found = _point(folder, run)
    return ResumePoint(found.folder, found.record, branch, found.abandoned)


def is_of(run: RunDir, folder: Path) -> bool:
    """Return whether a checkpoint is one of the run's own."""
    return folder.parent.resolve() == run.checkpoints.resolve()


def _came_of(path: Path, branch: str, config: TrainConfig) -> bool:
    """Return whether a checkpoint is intact and was written by this command after it went back to the one it names."""
    try:
        checkpoint.verify(path)
    except checkpoint.BrokenCheckpoint:
        return False
    record = checkpoint.read_state(path)
    return _branch_of(record) == branch and not config_changes(record["config"], recorded(config))


def _branch_of(record: JsonRecord) -> str | None:
    """Return the branch that a checkpoint belongs to; the first commits wrote it as "course"."""
    return record.get("branch", record.get("course"))


def _point(folder: Path, run: RunDir) -> ResumePoint:
    """Read a checkpoint, and list what the run holds beyond it: all of it where the checkpoint is another run's."""
    record = checkpoint.read_state(folder)
    end = record["update"] if is_of(run, folder) else -1
    abandoned = [path for path in checkpoint.list_checkpoints(run.checkpoints) if checkpoint.update_of(path) > end]
    if abandoned:
        abandoned += [path for path in run.snapshots.glob("step-*") if checkpoint.update_of(path) > end]
    return ResumePoint(folder, record, _branch_of(record), abandoned)


# May it resume? -------------------------------------------------------------------------------------------------------


def obey_launcher(config: TrainConfig) -> TrainConfig:
    """Return the options with the accumulation that the launcher was given, where nobody gave the script one.

    Raises:
        RunError: both were given, and they differ.
    """
    asked, own = launcher_accumulation(), config.gradient_accumulation_steps
    if asked in (1, own):
        return config
    if own != 1 or "gradient_accumulation_steps" in config.asked:
        raise RunError(
            f"The launcher was given gradient_accumulation_steps {asked} and the script {own}; drop one of them."
        )
    whole = config.global_batch_size if "global_batch_size" in config.asked else None  # else a preset's
    return replace(config, gradient_accumulation_steps=asked, global_batch_size=whole)


def resumed_plan(config: TrainConfig, found: ResumePoint | None, processes: int) -> BatchPlan:
    """Plan the batch of a fresh or resumed run.

    The recorded global batch rules on another number of processes as long as the options are the same.

    Args:
        config: The options.
        found: The checkpoint, or None for a fresh run.
        processes: Their number now.
    """
    kept = None
    if found is not None:
        old = found.record["config"]
        if all(getattr(config, name) == old[name] for name in _BATCH_OPTIONS):
            kept = found.record["global_batch"]
    return plan_batch(config, processes, kept)


def compare(trainer: Trainer, old: JsonRecord) -> None:
    """Let only changes through that `allow_config_change` names, or that alter no weight.

    Options that only lead to a network or to images, as a path does, may change where these came out the same.

    Args:
        trainer: What this start has made of its options.
        old: state.json of the checkpoint.

    Raises:
        RunError: with the list of the changes that are not allowed.
    """
    config, was = trainer.config, old["config"]
    changes = config_changes(was, recorded(config))
    parts = (
        ("network", _NETWORK_OPTIONS, old["network"], plain_config(trainer.network.config)),
        ("data", _DATA_OPTIONS, old["data"]["fingerprint"], trainer.data.fingerprint),
    )
    for part, leading, before, now in parts:
        named = {name: changes.pop(name) for name in leading if name in changes}
        if before != now:
            changes |= named or {part: (before, now)}
    if trainer.plan.global_batch != old["global_batch"]:
        for name in _BATCH_OPTIONS:
            if getattr(config, name) != was[name]:
                changes[name] = (was[name], getattr(config, name))
    if trainer.intervals.length != old["updates"] and config.lr_scheduler not in ("constant", "constant_with_warmup"):
        name = "max_train_steps" if config.max_train_steps is not None else "num_epochs"
        changes[name] = (was[name] or old["updates"], getattr(config, name))
    if other := [
        f"{name}: {changes[name][0]!r} -> {changes[name][1]!r}" for name in _TENSOR_OPTIONS if name in changes
    ]:
        raise RunError(
            f"A resumed run cannot change {', '.join(other)}, since its checkpoints hold other tensors. Give the "
            "old value, or --init_from this run with another --output_dir."
        )
    refused = sorted(name for name in changes if name not in config.allow_config_change)
    if refused:
        lines = [f"  {name}: {changes[name][0]!r} -> {changes[name][1]!r}" for name in refused]
        raise RunError(
            "The run in the folder was started with other options, and resuming would give other weights:\n"
            + "\n".join(lines)
            + "\nGive the old values, another --output_dir, or --allow_config_change "
            + " ".join(refused)
            + "."
        )


def plain_config(config: Mapping[str, object]) -> JsonRecord:
    """Return a network's configuration as JSON gives it back, without Diffusers' own remarks."""
    return json.loads(json.dumps({name: value for name, value in config.items() if not name.startswith("_")}))


def warn_of_other_conditions(old: JsonRecord, new: JsonRecord) -> None:
    """Say what differs of threads, processes, device and versions, which decide the last digits."""
    names = dict.fromkeys([*new, *old])
    changed = [f"{name} {old.get(name)} -> {new.get(name)}" for name in names if old.get(name) != new.get(name)]
    if changed:
        print(
            f"Resuming under other conditions ({', '.join(changed)}): the weights will not be bitwise those of an "
            "uninterrupted run.",
            file=sys.stderr,
        )
