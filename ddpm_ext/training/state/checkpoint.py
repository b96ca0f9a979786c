"""Checkpoints: a folder of safetensors and JSON with a list of checksums, complete or absent, never pickled.

    step-00000500/model.safetensors        weights
                  ema.safetensors          averaged weights (ema-1.safetensors ... for further widths)
                  optimizer.safetensors    moments, named <parameter>/<moment>
                  timesteps.safetensors    recent losses of each t, where t is drawn by them
                  state.json               format, seed, step, update, position, batch, data, versions, configuration
                  SHA256SUMS               one line per file above

Where weights are sharded they are stored whole, so a checkpoint does not depend on the number of processes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...hub.checksums import sha256
from ...run_dir import JsonRecord, RunError

__all__ = [
    "BrokenCheckpoint",
    "checkpoint_name",
    "delete",
    "flatten",
    "list_checkpoints",
    "newest_intact",
    "prune",
    "read_state",
    "read_tensors",
    "set_aside",
    "sweep",
    "unflatten",
    "update_of",
    "verify",
    "write_checkpoint",
]

FORMAT = 1
SUMS = "SHA256SUMS"
STATE = "state.json"
SPARE_BYTES = 1 << 20  # headers, JSON and the file system's own blocks


class BrokenCheckpoint(RunError):
    """A checkpoint's files do not agree with its list of checksums."""


def checkpoint_name(update: int) -> str:
    """Return the folder's name: update 12 is step-00000012."""
    return f"step-{update:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first. Whether they are intact is not looked at."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def update_of(path: Path) -> int:
    """Return the update in the name of a checkpoint or of a snapshot, step-00000500-0.05.safetensors."""
    return int(path.name.removeprefix("step-").split("-")[0])


def write_checkpoint(
    folder: Path,
    update: int,
    tensors: dict[str, dict[str, Tensor]],
    state: JsonRecord,
    abandoned: Sequence[Path] = (),
) -> Path:
    """Write one checkpoint under a temporary name, flush it to disk, rename it.

    Args:
        folder: The run's checkpoints folder.
        update: Names the checkpoint.
        tensors: File stem -> name -> tensor.
        state: Plain JSON.
        abandoned: Later checkpoints and snapshots, of a branch that was abandoned. They go when the new checkpoint is
            complete and before it has its name, so that the newest one never belongs to the other branch.

    Raises:
        RunError: the disk is full. The half-written folder is gone, older checkpoints are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, temporary = folder / checkpoint_name(update), folder / f".{checkpoint_name(update)}.{os.getpid()}.tmp"
    needed = SPARE_BYTES + sum(t.numel() * t.element_size() for file in tensors.values() for t in file.values())
    refuse_full_disk(final, needed)
    try:
        temporary.mkdir()
        for stem, named in tensors.items():
            on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
            save_file(on_cpu, temporary / f"{stem}.safetensors")
        (temporary / STATE).write_text(json.dumps({"format": FORMAT, **state}, indent=2) + "\n", encoding="utf-8")
        write_sums(temporary)
        doomed = set_aside([*abandoned, final])
        temporary.rename(final)
        flush(folder)
        delete(doomed)
    except (OSError, SafetensorError) as error:
        if not disk_is_full(error):
            raise
        raise full_disk(final, needed) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def write_sums(folder: Path) -> None:
    """List every file's SHA-256 in the format of sha256sum, and flush all of them to disk."""
    lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
    for path in folder.iterdir():
        flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_full_disk(path: Path, needed: int) -> None:
    """Raise RunError where the disk has no room for so many bytes."""
    if shutil.disk_usage(path.parent).free < needed:
        raise full_disk(path, needed)


def full_disk(path: Path, needed: int) -> RunError:
    """Return the error that says which path needs how many bytes."""
    free = shutil.disk_usage(path.parent).free
    return RunError(
        f"The disk is full: {path} needs {needed:,} bytes and {free:,} are free. The checkpoints before it are intact; "
        "make room and run the same command again."
    )


def disk_is_full(error: BaseException) -> bool:
    """Whether an error, also one of safetensors' own words, says that no room or no quota is left."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "os error 28" in str(error) or "os error 122" in str(error)  # the same two, as safetensors says them


def verify(folder: Path) -> None:
    """Compare a checkpoint with its list of checksums.

    Raises:
        BrokenCheckpoint: a file is missing, changed or not in the list, or there is no list.
    """
    if not (folder / SUMS).is_file():
        raise BrokenCheckpoint(f"{folder} has no {SUMS}: it is no complete checkpoint.")
    try:
        compare_with_sums(folder)
    except (OSError, ValueError) as error:  # a disk that does not give the bytes, or gives others that are no text
        raise BrokenCheckpoint(f"{folder} cannot be read, it is damaged: {error}.") from error


def compare_with_sums(folder: Path) -> None:
    """Raise BrokenCheckpoint unless the folder holds the files of its list, each with its checksum."""
    listed = {}
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        listed[name] = digest
    present = {path.name for path in folder.iterdir()} - {SUMS}
    for name in sorted(listed.keys() ^ present):
        raise BrokenCheckpoint(f"{folder / name} is {'missing' if name in listed else f'not in {SUMS}'}.")
    for name, digest in listed.items():
        if sha256(folder / name) != digest:
            raise BrokenCheckpoint(f"{folder / name} does not have the SHA-256 that {SUMS} lists: it is damaged.")
    if STATE not in listed:
        raise BrokenCheckpoint(f"{folder} has no {STATE}.")


def newest_intact(folder: Path) -> Path | None:
    """Return the newest checkpoint whose checksums hold; each damaged one before it is named in a warning.

    Raises:
        BrokenCheckpoint: there are checkpoints and none is intact.
    """
    checkpoints = list_checkpoints(folder)
    for path in reversed(checkpoints):
        try:
            verify(path)
        except BrokenCheckpoint as error:
            warnings.warn(f"{error} The checkpoint before it is used.", stacklevel=2)
            continue
        return path
    if checkpoints:
        raise BrokenCheckpoint(f"No checkpoint in {folder} is intact. To start afresh give --overwrite_output_dir.")
    return None


def read_state(folder: Path) -> JsonRecord:
    """Return the counters and conditions of a checkpoint; RunError where a later version wrote it."""
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if state["format"] != FORMAT:
        raise RunError(f"{folder} has format {state['format']}, this version reads {FORMAT}.")
    return state


def read_tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """Return the tensors of one file of a checkpoint, by name."""
    return load_file(folder / f"{stem}.safetensors")


def prune(folder: Path, limit: int | None, newest: Path) -> None:
    """Delete the oldest checkpoints beyond the limit, never the one just written.

    Args:
        folder: That of the checkpoints.
        limit: How many stay; None for all.
        newest: The one just written.
    """
    others = [path for path in list_checkpoints(folder) if path != newest]
    delete(set_aside(others[: len(others) + 1 - limit] if limit and limit <= len(others) else []))


def set_aside(paths: Sequence[Path]) -> list[Path]:
    """Give those that are there a hidden name, all at once: a kill while deleting then leaves no half checkpoint."""
    return [path.rename(path.with_name(f".{path.name}.old")) for path in paths if path.exists()]


def delete(paths: Sequence[Path]) -> None:
    """Remove files and folders."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def sweep(folder: Path) -> None:
    """Delete what kills left behind: temporary and half-deleted folders. Call it under the run's lock."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def flatten(state: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Optimiser state {parameter: {moment: tensor}} as <parameter>/<moment>, tensor."""
    for parameter, moments in state.items():
        for moment, tensor in moments.items():
            yield f"{parameter}/{moment}", tensor


def unflatten(named: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the inverse of `flatten`."""
    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in named.items():
        parameter, _, moment = name.rpartition("/")
        state.setdefault(parameter, {})[moment] = tensor
    return state
