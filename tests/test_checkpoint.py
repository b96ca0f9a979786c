"""Checkpoints are complete, intact or refused; run folders are locked and written whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ddpm_ext.run_dir import RunDir, RunError, commit, environment, without_token, write_atomically
from ddpm_ext.training.state import checkpoint
from ddpm_ext.training.state.checkpoint import BrokenCheckpoint, newest_intact, prune, sweep, verify, write_checkpoint

TENSORS = {"model": {"w": torch.arange(6.0).reshape(2, 3)}, "ema": {"w": torch.ones(2, 3, dtype=torch.float64)}}


def write(folder: Path, update: int) -> Path:
    return write_checkpoint(folder, update, TENSORS, {"update": update})


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    assert path.name == "step-00000005"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # nothing temporary is left
    for stem, named in TENSORS.items():
        loaded = checkpoint.read_tensors(path, stem)
        assert all(
            torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in named.items()
        )
    assert checkpoint.read_state(path) == {"format": 1, "update": 5}


def test_the_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    lines = dict(line.split("  ")[::-1] for line in (path / "SHA256SUMS").read_text().splitlines())
    assert lines.keys() == {"model.safetensors", "ema.safetensors", "state.json"}
    for name, digest in lines.items():
        assert hashlib.sha256((path / name).read_bytes()).hexdigest() == digest


def damage_truncate(path: Path) -> None:
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-1])


def damage_bit(path: Path) -> None:
    data = bytearray((path / "ema.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "ema.safetensors").write_bytes(bytes(data))


def damage_missing(path: Path) -> None:
    (path / "ema.safetensors").unlink()


def damage_unlisted(path: Path) -> None:
    lines = (path / "SHA256SUMS").read_text().splitlines(keepends=True)
    (path / "SHA256SUMS").write_text("".join(line for line in lines if "ema" not in line))


def damage_no_sums(path: Path) -> None:
    (path / "SHA256SUMS").unlink()


def damage_sums(path: Path) -> None:
    (path / "SHA256SUMS").write_bytes(b"\xff\xfe\x00 no text")


def damage_nothing_readable(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").mkdir()  # reading it is an OSError, as of a disk that fails


DAMAGES = {
    damage_sums: "cannot be read, it is damaged",
    damage_nothing_readable: "cannot be read, it is damaged",
    damage_truncate: "does not have the SHA-256",
    damage_bit: "does not have the SHA-256",
    damage_missing: "is missing",
    damage_unlisted: "is not in SHA256SUMS",
    damage_no_sums: "has no SHA256SUMS",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(damage, tmp_path: Path) -> None:
    older, newest = write(tmp_path, 5), write(tmp_path, 10)
    damage(newest)
    with pytest.raises(BrokenCheckpoint, match=DAMAGES[damage]):
        verify(newest)
    with pytest.warns(UserWarning, match=DAMAGES[damage]):
        assert newest_intact(tmp_path) == older
    damage(older)
    with pytest.warns(UserWarning), pytest.raises(BrokenCheckpoint, match=r"No checkpoint in .* is intact"):
        newest_intact(tmp_path)


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    assert newest_intact(tmp_path / "none") is None


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_the_limit_keeps_the_newest(limit: int | None, tmp_path: Path) -> None:
    for update in (5, 10, 15):
        write(tmp_path, update)
    prune(tmp_path, limit, tmp_path / "step-00000015")
    names = [path.name for path in checkpoint.list_checkpoints(tmp_path)]
    assert names == ["step-00000005", "step-00000010", "step-00000015"][-limit if limit else 0 :]


def test_the_limit_never_takes_the_one_just_written(tmp_path: Path) -> None:
    for update in (5, 12):
        write(tmp_path, update)
    prune(tmp_path, 1, write(tmp_path, 9))
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000009"]


def test_what_a_new_checkpoint_leaves_behind_goes_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 8)
    left = [write(tmp_path, 12), tmp_path / "step-00000012-0.05.safetensors"]
    left[1].write_bytes(b"a snapshot")
    named: list[list[str]] = []
    rename = Path.rename

    def watched(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            named.append([path.name for path in checkpoint.list_checkpoints(tmp_path)])
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    write_checkpoint(tmp_path, 9, TENSORS, {"update": 9}, left)
    assert named == [["step-00000008"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000008", "step-00000009"]


def test_every_file_is_on_the_disk_before_the_checkpoint_has_its_name_and_the_name_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int | str] = []
    fsync, rename = os.fsync, Path.rename

    def watched_fsync(handle: int) -> None:
        done.append(os.fstat(handle).st_ino)
        fsync(handle)

    def watched_rename(self: Path, target: Path) -> Path:
        done.append("named")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    path = write(tmp_path, 5)
    named = done.index("named")
    assert {file.stat().st_ino for file in (path, *path.iterdir())} == set(done[:named])
    assert done[named + 1 :] == [tmp_path.stat().st_ino]


def test_what_kills_leave_behind_is_no_checkpoint_and_is_swept(tmp_path: Path) -> None:
    write(tmp_path, 5)
    half = tmp_path / ".step-00000010.1234.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000005"]
    sweep(tmp_path)
    assert not half.exists()


def test_a_full_disk_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 5)
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(RunError, match=r"step-00000010 needs 1,048,6\d\d bytes and 1,000 are free"):
        write(tmp_path, 10)
    verify(tmp_path / "step-00000005")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_while_writing_leaves_the_last_checkpoint(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 5)

    def fail(*_: object) -> None:
        raise OSError(number, "no room")

    monkeypatch.setattr(checkpoint, "write_sums", fail)
    with pytest.raises(RunError, match="The disk is full"):
        write(tmp_path, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path) -> None:
    for path in write(tmp_path, 5).iterdir():
        head = path.read_bytes()[:2]
        assert head != b"PK" and not head.startswith(b"\x80")  # zip of torch.save, pickle
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())


def test_optimiser_state_is_flattened_and_back() -> None:
    state = {"a.b": {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}, "c": {"step": torch.tensor(1.0)}}
    flat = dict(checkpoint.flatten(state))
    assert flat.keys() == {"a.b/step", "a.b/exp_avg", "c/step"}
    assert checkpoint.unflatten(flat) == state


# The run folder -------------------------------------------------------------------------------------------------------


def test_a_second_writer_is_stopped_with_a_sentence(tmp_path: Path) -> None:
    first, second = RunDir(tmp_path / "run"), RunDir(tmp_path / "run")
    first.lock()
    with pytest.raises(RunError, match=rf"is being written by another run \(process {os.getpid()}\)"):
        second.lock()  # a lock belongs to the opened file, so two in one process are as two processes
    first.unlock()
    second.lock()
    second.unlock()


def test_an_interrupted_write_leaves_the_file_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "status.json"
    write_atomically(file, "old")
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no room")))
    with pytest.raises(OSError, match="no room"):
        write_atomically(file, "new")
    assert file.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_the_log_is_rewound_to_the_checkpoint(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for update in (3, 6, 9):
        run.append_log({"update": update})
    with run.log.open("a") as file:
        file.write('{"update": 12, "lo')  # a kill while writing
    assert [record["update"] for record in run.read_log()] == [3, 6, 9]
    run.rewind_log(6)
    assert run.log.read_text() == '{"update": 3}\n{"update": 6}\n'


def test_clearing_deletes_what_a_run_writes_and_nothing_else(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    write(run.checkpoints, 5)
    run.append_log({"update": 5})
    (tmp_path / "notes.txt").write_text("mine")
    run.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_record_says_what_made_the_numbers() -> None:
    record = environment()
    assert record["versions"]["torch"] == version("torch") and record["versions"]["python"] == sys.version.split()[0]
    assert record["hardware"]["cores"] == os.cpu_count() and record["hardware"]["processor"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    if head.returncode == 0:
        assert (commit() or "").startswith(head.stdout.strip())


def test_the_token_is_not_in_the_recorded_command() -> None:
    assert without_token(["--hub_token", "hf_x", "--seed", "1"]) == ["--hub_token", "***", "--seed", "1"]
    assert without_token(["--hub-token=hf_x"]) == ["--hub-token=***"]
