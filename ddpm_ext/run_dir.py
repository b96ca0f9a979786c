"""The files of a run: their names, atomic writes, the lock, and the record of what made them.

    runs/<name>/config.json      every option, versions, commit, seed, hardware
                checkpoints/     step-00000500/ ...: see checkpoint.py
                pipeline/        averaged weights, loadable by ddpm_ext and by stock Diffusers
                samples/         grids, step-00000500.png
                best/            pipeline of the best evaluation, and best.json its scores: see watch.py
                log.jsonl        one line per log interval
                snapshots/       power-function averages, where they are kept
                status.json      running, preempted, finished or failed, and the update
                training.png     loss, loss by quarter of t, learning rate

Whatever is written anew is written whole: a kill leaves the file before it.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, TypeAlias

from .errors import UserError

__all__ = [
    "JsonRecord",
    "RunDir",
    "RunError",
    "check_folder",
    "commit",
    "environment",
    "package_versions",
    "read_json",
    "whole_file",
    "without_token",
    "write_atomically",
    "write_json",
]

JsonRecord: TypeAlias = dict[str, Any]  # what a JSON file of a run holds
VERSIONED = ("ddpm-ext", "torch", "diffusers", "transformers", "accelerate", "datasets", "safetensors", "numpy")


class RunError(UserError):
    """A run cannot start or resume, and the message is the whole story: scripts print it without a traceback."""

    alone = False  # True: only this one of several processes knows, so it must say so itself


class RunDir:
    """Paths of one run folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.checkpoints = self.path / "checkpoints"
        self.snapshots = self.path / "snapshots"
        self.pipeline = self.path / "pipeline"
        self.samples = self.path / "samples"
        self.best = self.path / "best"
        self.best_record = self.path / "best.json"
        self.log = self.path / "log.jsonl"
        self.status = self.path / "status.json"
        self.plot = self.path / "training.png"
        self.lock_file = self.path / ".lock"
        self.starts_empty = False  # whether what an earlier run left is deleted when this one starts
        self._lock: IO[str] | None = None
        self._made: list[Path] = []  # folders that the lock made, innermost first

    def lock(self) -> None:
        """Hold the folder for this process until it ends.

        Raises:
            RunError: another process holds it.
        """
        check_folder("output_dir", self.path)
        self._made += [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        handle = None
        while handle is None:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = self.lock_file.open("a+")
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                handle.seek(0)
                holder = handle.read().strip() or "unknown"
                handle.close()
                raise RunError(
                    f"{self.path} is being written by another run (process {holder}). Wait for its end, stop it, or "
                    "give another --output_dir."
                ) from None
            if not self.lock_file.exists() or os.fstat(handle.fileno()).st_ino != self.lock_file.stat().st_ino:
                handle.close()  # a start that failed has just deleted it
                handle = None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        self._lock = handle

    def unlock(self) -> None:
        """Let go of the folder; where the run never began, nothing that the lock made is left."""
        if self._lock is None:
            return
        if not self.config.exists() and not self.status.exists():
            self.lock_file.unlink(missing_ok=True)
        for folder in self._made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        self._lock.close()
        self._lock = None

    def clear(self) -> None:
        """Delete what an earlier run left, and nothing that a run does not write."""
        for folder in (self.checkpoints, self.snapshots, self.pipeline, self.samples, self.best):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.config, self.log, self.status, self.plot, self.best_record):
            file.unlink(missing_ok=True)

    def write_status(self, state: str, update: int, **more: object) -> None:
        """Write status.json."""
        record = {"status": state, "update": update, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **more}
        write_json(self.status, record)

    def is_finished(self) -> bool:
        """Whether the last run in the folder ended by itself and its pipeline is there."""
        return self.status.exists() and read_json(self.status)["status"] == "finished" and self.pipeline.exists()

    def is_unfinished(self) -> bool:
        """Whether a run of this folder was stopped, killed or failed before its end, so that it may resume."""
        return self.status.exists() and read_json(self.status)["status"] != "finished"

    def was_started_with(self, options: JsonRecord) -> bool:
        """Whether config.json has these options; those that are new in this version are left out."""
        if not self.config.exists():
            return False
        options, old = json.loads(json.dumps(options)), read_json(self.config)["config"]
        return all(old[name] == value for name, value in options.items() if name in old)

    def starts(self) -> list[JsonRecord]:
        """Return the entries of config.json for earlier starts of this run."""
        return read_json(self.config)["starts"] if self.config.exists() else []

    def append_log(self, record: JsonRecord) -> None:
        """Add a line to log.jsonl."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read_log(self) -> list[JsonRecord]:
        """Every complete line of the log; a line cut off by a kill is left out."""
        records = []
        for line in self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records

    def rewind_log(self, update: int) -> None:
        """Drop the lines after an update: the resumed run writes them again."""
        kept = [record for record in self.read_log() if record["update"] <= update]
        if self.log.exists():
            write_atomically(self.log, "".join(json.dumps(record) + "\n" for record in kept))


def check_folder(name: str, folder: str | Path) -> None:
    """Refuse a folder for results that is a file, or that would lie in one.

    Args:
        name: The option that names it, for the message.
        folder: Where results shall go; it need not exist.
    """
    place = next((place for place in (Path(folder), *Path(folder).parents) if place.exists()), None)
    if place is not None and not place.is_dir():
        raise RunError(f"--{name} must be a folder, got {folder}, and {place} is a file; give a folder.")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary neighbour to write to, which then becomes the file: it is written whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text whole or not at all, flushed to disk before it replaces the one before."""
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, record: JsonRecord) -> None:
    """Write a record as indented JSON, whole or not at all."""
    write_atomically(path, json.dumps(record, indent=2) + "\n")


def read_json(path: Path) -> JsonRecord:
    """Return a record from JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def environment() -> JsonRecord:
    """Return what made the numbers beside the options: command, versions, commit, hardware."""
    import torch  # not at the top: a command that only prints its options must not wait for it

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": [_program(), *without_token(sys.argv[1:])],
        "versions": {"python": platform.python_version(), **package_versions()},
        "commit": commit(),
        "hardware": {"machine": platform.machine(), "processor": processor(), "cores": os.cpu_count(), "gpu": gpu},
    }


def _program() -> str:
    """Return the name of the program; `python -m ddpm_ext` is the command ddpm-ext."""
    name = Path(sys.argv[0]).name
    return "ddpm-ext" if name == "__main__.py" else name


def without_token(words: list[str]) -> list[str]:
    """Return the command line with the Hub token's value left out, so that no file ever holds it."""
    hidden, after_token = [], False
    for word in words:
        name = word.split("=")[0].replace("-", "_")
        if after_token:
            hidden.append("***")
        else:
            hidden.append(f"{word.split('=')[0]}=***" if name == "__hub_token" and "=" in word else word)
        after_token = name == "__hub_token" and "=" not in word
    return hidden


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of the checkout that holds this package, with "-dirty" where files differ; None outside a checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def processor() -> str:
    """Return the processor's name, as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
