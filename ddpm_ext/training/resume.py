"""What a run is at one update, to disk and back: weights, averages, moments, counters; and whether it may go on.

Nothing random is stored: draws, order and dropout seeds are functions of (seed, step).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ..data.dataset import ImageSet
from ..data.streaming import ImageStream
from ..distributed import copy_into, full_tensor
from ..run_dir import RunDir, RunError, package_versions
from . import checkpoint
from .builders import BatchPlan, length, plan_batch
from .config import TrainConfig, config_changes, recorded
from .ema import ForeachEMA
from .monitor import Meter, Unreadable
from .timestep_samplers import STEM, Timesteps

NETWORK_OPTIONS = ("model_config_name_or_path", "unet", "dropout", "class_conditional", "resolution")
DATA_OPTIONS = (
    *("dataset_name", "dataset_config_name", "train_data_dir", "train_split", "image_column", "label_column"),
    *("resolution", "center_crop"),
)
BATCH_OPTIONS = ("train_batch_size", "gradient_accumulation_steps", "global_batch_size")


class Found(NamedTuple):
    """An intact checkpoint to go on from."""

    folder: Path
    state: dict[str, Any]
    course: str | None  # the checkpoint by whose name this course of training began; None for the first one
    left: list[Path]  # later checkpoints and snapshots, of the course that is left


class RunState:
    """What a checkpoint holds of a run: its objects and counters. The trainer is one."""

    config: TrainConfig
    accelerator: Accelerator
    run: RunDir
    data: ImageSet | ImageStream
    plan: BatchPlan
    updates: int  # length of the run
    network: Any  # the UNet2DModel without what the launcher wraps around it
    found: Found | None
    course: str | None  # see Found
    left: list[Path]  # still to be deleted
    parameters: list[torch.nn.Parameter]
    averages: list[ForeachEMA]
    optimizer: AcceleratedOptimizer
    meter: Meter
    timesteps: Timesteps
    unreadable: Unreadable
    numerics: dict[str, Any]
    update_count: int  # optimiser updates done
    step: int  # global batches seen: the updates and the skipped steps
    skipped: int
    bad_in_a_row: int

    def update(self) -> None:
        """One optimiser update; the trainer's."""
        raise NotImplementedError

    def tell_unreadable(self) -> None:
        """Name the pictures that could not be read since the last call. Every process must call this."""
        new = self.unreadable.learn(self.data.skipped, self.accelerator)
        if new and self.accelerator.is_main_process:
            some = "; ".join(new[:10]) + (" …" if len(new) > 10 else "")
            print(f"{len(new)} pictures cannot be read and are left out, others stand in: {some}", file=sys.stderr)

    @property
    def num_images(self) -> int | None:
        """Pictures of one epoch; None for a stream."""
        return length(self.data)

    @property
    def position(self) -> int:
        """Global position of the next picture."""
        return self.step * self.plan.global_batch


def find(config: TrainConfig, run: RunDir, accelerator: Accelerator) -> Found | None:
    """The checkpoint to go on from; the main process looks, all others hear of it.

    Raises:
        RunError: checkpoints are there and none is intact, the one named is damaged, or resuming was refused.
    """
    return on_main(accelerator, lambda: choose(config, run))


def choose(config: TrainConfig, run: RunDir) -> Found | None:
    """The checkpoint to go on from, on the main process; None for a run that begins."""
    wanted = config.resume_from_checkpoint
    if config.dry_run and config.overwrite_output_dir:
        return None  # as if the folder had been emptied
    if not config.dry_run:
        checkpoint.sweep(run.checkpoints)
    if wanted not in (None, "latest"):
        return choose_named(config, run, Path(str(wanted)))
    if wanted is None and checkpoint.list_checkpoints(run.checkpoints):
        raise RunError(
            f"{run.path} holds checkpoints and --resume_from_checkpoint is none. Give --resume_from_checkpoint latest, "
            "another --output_dir, or --overwrite_output_dir to delete them."
        )
    newest = checkpoint.newest_intact(run.checkpoints)
    return None if newest is None else found_at(newest, run)


def choose_named(config: TrainConfig, run: RunDir, wanted: Path) -> Found:
    """The checkpoint that was named or, where the same command went on from it before, the newest that came of it."""
    folder = wanted if wanted.is_dir() or len(wanted.parts) > 1 else run.checkpoints / wanted
    course = folder.name if is_of(run, folder) else str(folder.resolve())
    for path in reversed(checkpoint.list_checkpoints(run.checkpoints)):
        if came_of(path, course, config):
            print(
                f"Going on from {path.name}, which came of {course}. To go back once more, delete it.", file=sys.stderr
            )
            return found_at(path, run)
    if not folder.is_dir():
        names = ", ".join(path.name for path in checkpoint.list_checkpoints(run.checkpoints)) or "none"
        raise RunError(
            f"--resume_from_checkpoint {wanted}: there is no such checkpoint. {run.checkpoints} has {names}."
        )
    checkpoint.verify(folder)
    return found_at(folder, run)._replace(course=course)


def is_of(run: RunDir, folder: Path) -> bool:
    """Whether a checkpoint is one of the run's own."""
    return folder.parent.resolve() == run.checkpoints.resolve()


def came_of(path: Path, course: str, config: TrainConfig) -> bool:
    """Whether a checkpoint is intact and was written by this command after it went back to the one it names."""
    try:
        checkpoint.verify(path)
    except checkpoint.BrokenCheckpoint:
        return False
    state = checkpoint.read_state(path)
    return state.get("course") == course and not config_changes(state["config"], recorded(config))


def found_at(folder: Path, run: RunDir) -> Found:
    """A checkpoint, and what the run holds beyond it: all of it where the checkpoint is another run's."""
    state = checkpoint.read_state(folder)
    end = state["update"] if is_of(run, folder) else -1
    left = [path for path in checkpoint.list_checkpoints(run.checkpoints) if checkpoint.update_of(path) > end]
    if left:
        left += [path for path in run.snapshots.glob("step-*") if checkpoint.update_of(path) > end]
    return Found(folder, state, state.get("course"), left)


def on_main(accelerator: Accelerator, work: Any) -> Any:
    """Run something on the main process; its result, or the sentence of its error, reaches every process.

    Raises:
        RunError: on every process, in place of a RunError, OSError or ValueError of the main one.
    """
    result: list[Any] = [None, None]
    cause: Exception | None = None
    if accelerator.is_main_process:
        try:
            result[0] = work()
        except (RunError, OSError, ValueError) as error:  # or the others would wait for a word that never comes
            result[1], cause = str(error), error
    if accelerator.num_processes > 1:
        broadcast_object_list(result)
    if result[1] is not None:
        raise RunError(result[1]) from cause
    return result[0]


# May it go on? --------------------------------------------------------------------------------------------------------


def global_batch_to_keep(config: TrainConfig, found: Found | None) -> int | None:
    """The recorded global batch, which rules on another number of processes as long as the options are the same."""
    if found is None:
        return None
    old = found.state["config"]
    same = all(getattr(config, name) == old[name] for name in BATCH_OPTIONS)
    return found.state["global_batch"] if same else None


def differences(state: RunState, old: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What alters the weights and is not as it was: name -> (old, new).

    Options that only lead to a network or to pictures, as a path does, may change where these came out the same.
    """
    config, old_options = state.config, old["config"]
    found = config_changes(old_options, recorded(config))
    parts = (
        ("network", NETWORK_OPTIONS, old["network"], plain(state.network.config)),
        ("data", DATA_OPTIONS, old["data"]["fingerprint"], state.data.fingerprint),
    )
    for part, leading, was, now in parts:
        named = {name: found.pop(name) for name in leading if name in found}
        if was != now:
            found |= named or {part: (was, now)}
    if state.plan.global_batch != old["global_batch"]:
        for name in BATCH_OPTIONS:
            if getattr(config, name) != old_options[name]:
                found[name] = (old_options[name], getattr(config, name))
    if state.updates != old["updates"] and config.lr_scheduler not in ("constant", "constant_with_warmup"):
        name = "max_train_steps" if config.max_train_steps is not None else "num_epochs"
        found[name] = (old_options[name] or old["updates"], getattr(config, name))
    return found


def plain(config: Any) -> dict[str, Any]:
    """A network's configuration as JSON gives it back, without Diffusers' own remarks."""
    return json.loads(json.dumps({name: value for name, value in config.items() if not name.startswith("_")}))


def refuse_changes(config: TrainConfig, changes: dict[str, Any]) -> None:
    """Only changes that `allow_config_change` names are let through.

    Raises:
        RunError: with the list of the others.
    """
    unknown = [name for name in changes if name not in config.allow_config_change]
    if unknown:
        lines = [f"  {name}: {old!r} -> {new!r}" for name, (old, new) in sorted(changes.items()) if name in unknown]
        raise RunError(
            "The run in the folder was started with other options, and going on would give other weights:\n"
            + "\n".join(lines)
            + "\nGive the old values, another --output_dir, or --allow_config_change "
            + " ".join(sorted(unknown))
            + "."
        )


def note_other_conditions(old: dict[str, Any], new: dict[str, Any]) -> None:
    """The last digits depend on threads, processes, device and version: a resume elsewhere is right, not bitwise."""
    changed = [f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]]
    if changed:
        print(
            f"Going on under other conditions ({', '.join(changed)}): the weights will not be bitwise those of an "
            "uninterrupted run.",
            file=sys.stderr,
        )


# To disk --------------------------------------------------------------------------------------------------------------


def save(trainer: RunState) -> None:
    """Write a checkpoint, then delete those beyond the limit. Every process must call this.

    The first one after going back to an earlier checkpoint deletes what lies beyond that, see `Found.left`.

    Raises:
        RunError: the disk is full; raised on every process.
    """
    tensors, state = gather(trainer)
    folder, limit = trainer.run.checkpoints, trainer.config.checkpoints_total_limit

    def write() -> None:
        written = checkpoint.write_checkpoint(folder, trainer.update_count, tensors, state, trainer.left)
        checkpoint.prune(folder, limit, written)

    on_main(trainer.accelerator, write)
    trainer.left = []


def leave_course(trainer: RunState) -> None:
    """Delete what lies beyond the checkpoint that the run went back to. Every process must call this."""
    on_main(trainer.accelerator, lambda: checkpoint.delete(checkpoint.set_aside(trainer.left)))
    trainer.left = []


def gather(trainer: RunState) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Everything of a run, in full: tensors by file, and plain JSON. Every process must call this."""
    trainer.tell_unreadable()
    names = [name for name, _ in trainer.network.named_parameters()]
    tensors = {"model": {name: full_tensor(p) for name, p in zip(names, trainer.parameters, strict=True)}}
    for i, average in enumerate(trainer.averages):
        stem = "ema" if i == 0 else f"ema-{i}"
        tensors[stem] = {name: full_tensor(p) for name, p in zip(names, average.shadow_params, strict=True)}
    inner = trainer.optimizer.optimizer
    moments = {name: inner.state[p] for name, p in zip(names, trainer.parameters, strict=True) if p in inner.state}
    tensors["optimizer"] = {key: full_tensor(tensor) for key, tensor in checkpoint.flatten(moments)}
    return {**tensors, **trainer.timesteps.state()}, state_of(trainer)


def state_of(trainer: RunState) -> dict[str, Any]:
    """What state.json of a checkpoint holds."""
    scaler = trainer.accelerator.scaler
    return {
        "seed": trainer.config.seed,
        "epoch": None if trainer.num_images is None else trainer.position // trainer.num_images,
        "update": trainer.update_count,
        "course": trainer.course,
        "step": trainer.step,
        "global_position": trainer.position,
        "global_batch": trainer.plan.global_batch,
        "updates": trainer.updates,
        "skipped": trainer.skipped,
        "bad_in_a_row": trainer.bad_in_a_row,
        "unreadable": list(trainer.unreadable.names),
        "data": {"fingerprint": trainer.data.fingerprint, "state": trainer.data.state_dict(trainer.position)},
        "meter": trainer.meter.total(trainer.accelerator).tolist(),
        "averages": [average.optimization_step for average in trainer.averages],
        "scaler": None if scaler is None else scaler.state_dict(),
        "numerics": trainer.numerics,
        "network": plain(trainer.network.config),
        "versions": package_versions(),
        "config": recorded(trainer.config),
    }


# And back -------------------------------------------------------------------------------------------------------------


def restore(trainer: RunState, found: Found) -> None:
    """Bring a new trainer to the checkpoint's update, on any number of processes.

    Raises:
        RunError: options that alter the weights have changed.
    """
    folder, state = found.folder, found.state
    changes = differences(trainer, state)
    refuse_changes(trainer.config, changes)
    if trainer.accelerator.is_main_process:
        note_other_conditions(state["numerics"], trainer.numerics)

    named = dict(trainer.network.named_parameters())
    restore_tensors(dict(zip(named, trainer.parameters, strict=True)), checkpoint.read_tensors(folder, "model"))
    for i, (average, updates) in enumerate(zip(trainer.averages, state["averages"], strict=False)):
        saved = checkpoint.read_tensors(folder, "ema" if i == 0 else f"ema-{i}")
        restore_tensors(dict(zip(named, average.shadow_params, strict=True)), saved)
        average.optimization_step = updates
    restore_optimizer(trainer, list(named), checkpoint.unflatten(checkpoint.read_tensors(folder, "optimizer")))
    if trainer.accelerator.scaler is not None and state["scaler"]:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])

    trainer.update_count, trainer.step = state["update"], state["global_position"] // trainer.plan.global_batch
    trainer.unreadable.names = dict.fromkeys(state.get("unreadable", []))
    trainer.skipped, trainer.bad_in_a_row = state["skipped"], state["bad_in_a_row"]
    if trainer.accelerator.is_main_process:
        trainer.meter.sums.copy_(torch.tensor(state["meter"], dtype=trainer.meter.sums.dtype))
    trainer.data.load_state_dict(state["data"]["state"])
    if trainer.timesteps.history is not None and state["config"].get("timestep_sampler") == "loss_aware":
        trainer.timesteps.restore(checkpoint.read_tensors(folder, STEM))


def restore_tensors(targets: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Fill weights from a checkpoint's; RunError where it is of another network."""
    if targets.keys() != saved.keys():
        names = sorted(targets.keys() ^ saved.keys())
        raise RunError(f"The checkpoint is of another network: {len(names)} weights differ by name, as {names[0]}.")
    for name, target in targets.items():
        copy_into(target, saved[name])


def restore_optimizer(trainer: RunState, names: list[str], moments: dict[str, dict[str, Tensor]]) -> None:
    """Put Adam's moments back."""
    inner = trainer.optimizer.optimizer
    state: dict[int, dict[str, Tensor]] = {}
    for i, (name, parameter) in enumerate(zip(names, trainer.parameters, strict=True)):
        for moment, tensor in moments.get(name, {}).items():
            if tensor.shape == parameter.shape and tensor.ndim:
                placed = torch.empty_like(parameter)
                copy_into(placed, tensor)
                tensor = placed
            state.setdefault(i, {})[moment] = tensor
    inner.load_state_dict({"state": state, "param_groups": inner.state_dict()["param_groups"]})


def planned(config: TrainConfig, found: Found | None, processes: int) -> BatchPlan:
    """The batch plan of a fresh or resumed run."""
    return plan_batch(config, processes, global_batch_to_keep(config, found))
