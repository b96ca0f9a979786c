"""A run that is killed, stopped or moved goes on as if nothing had happened, or refuses with a sentence."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from training import (
    TORCHRUN,
    assert_bitwise_equal,
    finish,
    log_without_speed,
    options,
    run_here,
    start,
    status,
    stopping_after,
    weights,
)

from ddpm_ext.distributed import on_main
from ddpm_ext.run_dir import RunError
from ddpm_ext.signals import PREEMPTED
from ddpm_ext.training.config import TrainConfig
from ddpm_ext.training.plan.batch import BatchPlan, plan_batch, plan_intervals, total_updates
from ddpm_ext.training.state.resume import warn_of_other_conditions
from ddpm_ext.training.trainer import Trainer

ALL_DRAWS = {"dropout": 0.1, "random_flip": True}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run_here(folder, **ALL_DRAWS) == 0
    return folder


def wait_for(path: Path, process, seconds: float = 120) -> None:
    """Until a file is there; the process must not have ended before."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end and process.poll() is None, finish(process)[1]
        time.sleep(0.005)


def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    process = start(options(folder, **ALL_DRAWS))
    wait_for(folder / "checkpoints" / "step-00000004", process)
    process.kill()
    process.communicate()
    assert status(folder)["status"] == "running"
    assert run_here(folder, **ALL_DRAWS) == 0
    assert_bitwise_equal(uninterrupted, folder, 12)
    assert log_without_speed(uninterrupted) == log_without_speed(folder)
    grid = Path("samples") / "step-00000012.png"
    assert (folder / grid).read_bytes() == (uninterrupted / grid).read_bytes()
    assert status(folder)["status"] == "finished"


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2, "fused_optimizer": "false", "channels_last": True},
        {"ema": "power_function"},
        {"mixed_precision": "bf16", "ema": "warmup"},
        {"use_ema": "false", "lr_scheduler": "cosine"},
        {"gradient_checkpointing": True, "class_conditional": True, "prediction_type": "v_prediction"},
        {"variance_type": "learned_range", "loss": "hybrid", "dataloader_num_workers": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_stopped_after_any_update_it_goes_on_bitwise(changes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = {"max_train_steps": 6, "checkpointing_steps": 100, **ALL_DRAWS, **changes}
    assert run_here(tmp_path / "whole", **short) == 0
    update = Trainer.update
    first, second = stopping_after(2), stopping_after(5)
    monkeypatch.setattr(Trainer, "update", first)
    assert run_here(tmp_path / "stopped", **short) == PREEMPTED
    assert status(tmp_path / "stopped") | {"time": ""} == {"status": "preempted", "update": 2, "updates": 6, "time": ""}
    monkeypatch.setattr(Trainer, "update", second)
    assert run_here(tmp_path / "stopped", **short) == PREEMPTED
    monkeypatch.setattr(Trainer, "update", update)
    assert run_here(tmp_path / "stopped", **short) == 0
    stems = ("model", "optimizer") if changes.get("use_ema") else ("model", "ema", "optimizer")
    for stem in stems:
        left, right = weights(tmp_path / "whole", 6, stem), weights(tmp_path / "stopped", 6, stem)
        assert all(left[name].equal(right[name]) for name in left)


def test_skipped_steps_before_a_stop_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 1 and 3 are no updates: weights, log and counters go on from behind them."""
    loss, update, bad = Trainer.loss, Trainer.update, {1, 3}
    monkeypatch.setattr(
        Trainer,
        "loss",
        lambda self, batch, micro: loss(self, batch, micro) * (float("nan") if self.state.step in bad else 1),
    )
    given = {**ALL_DRAWS, "max_train_steps": 6}
    assert run_here(tmp_path / "whole", **given) == 0
    monkeypatch.setattr(Trainer, "update", stopping_after(3))
    assert run_here(tmp_path / "stopped", **given) == PREEMPTED
    monkeypatch.setattr(Trainer, "update", update)
    assert run_here(tmp_path / "stopped", **given) == 0
    assert_bitwise_equal(tmp_path / "whole", tmp_path / "stopped", 6)
    assert log_without_speed(tmp_path / "whole") == log_without_speed(tmp_path / "stopped")
    state = json.loads((tmp_path / "stopped" / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert (state["update"], state["step"], state["skipped"], state["global_position"]) == (6, 8, 2, 64)


def test_a_finished_run_has_nothing_to_do(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = (uninterrupted / "config.json").stat().st_mtime_ns
    assert run_here(uninterrupted, **ALL_DRAWS) == 0
    assert "is finished at update 12: nothing to do" in capsys.readouterr().out
    assert (uninterrupted / "config.json").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"learning_rate": 0.5}, "learning_rate: 0.001 -> 0.5"),
        ({"seed": 3}, "seed: 0 -> 3"),
        ({"train_batch_size": 16}, "train_batch_size: 8 -> 16"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: 1 -> 2"),
        ({"dropout": 0.5}, "dropout: 0.1 -> 0.5"),
        ({"ddpm_beta_schedule": "sigmoid"}, "ddpm_beta_schedule: 'linear' -> 'sigmoid'"),
        ({"channels_last": True}, "channels_last: False -> True"),
        ({"train_split": "test"}, "train_split: 'train' -> 'test'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_alter_the_weights_may_not_change(changes, difference: str, uninterrupted: Path) -> None:
    with pytest.raises(RunError, match="was started with other options") as refused:
        run_here(uninterrupted, **{**ALL_DRAWS, **changes, "max_train_steps": 14})
    assert f"  {difference}" in str(refused.value)
    assert f"--allow_config_change {next(iter(changes))}" in str(refused.value).splitlines()[-1]


def test_a_change_that_is_allowed_by_name_is_made(uninterrupted: Path, tmp_path: Path) -> None:
    folder = copy_of(uninterrupted, tmp_path)
    allowed = {"learning_rate": 0.5, "max_train_steps": 14, "allow_config_change": ["learning_rate"]}
    assert run_here(folder, **{**ALL_DRAWS, **allowed}) == 0
    # Only the changed learning rate explains a step of that size.
    moved = (weights(folder, 14)["conv_in.weight"] - weights(folder, 12)["conv_in.weight"]).abs().max()
    assert moved > 0.1


def test_the_length_is_free_only_where_the_learning_rate_does_not_depend_on_it(tmp_path: Path) -> None:
    cosine = {"lr_scheduler": "cosine", "max_train_steps": 2}
    assert run_here(tmp_path / "cosine", **cosine) == 0
    with pytest.raises(RunError, match="max_train_steps: 2 -> 3"):
        run_here(tmp_path / "cosine", **{**cosine, "max_train_steps": 3})
    assert run_here(tmp_path / "constant", max_train_steps=2) == 0
    assert run_here(tmp_path / "constant", max_train_steps=3) == 0


def copy_of(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "copy"))


def test_a_damaged_newest_checkpoint_costs_one_interval(uninterrupted: Path, tmp_path: Path) -> None:
    folder = copy_of(uninterrupted, tmp_path)
    damaged = folder / "checkpoints" / "step-00000012" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4])
    (folder / "status.json").unlink()
    with pytest.warns(UserWarning, match="The checkpoint before it is used"):
        assert run_here(folder, **ALL_DRAWS) == 0
    assert_bitwise_equal(uninterrupted, folder, 12)
    with pytest.raises(RunError, match="does not have the SHA-256"):
        damaged.write_bytes(b"")
        run_here(folder, **ALL_DRAWS, resume_from_checkpoint="step-00000012")


def test_a_named_checkpoint_is_resumed(uninterrupted: Path, tmp_path: Path) -> None:
    folder = copy_of(uninterrupted, tmp_path)
    (folder / "status.json").unlink()
    assert run_here(folder, **ALL_DRAWS, resume_from_checkpoint="step-00000008") == 0
    assert_bitwise_equal(uninterrupted, folder, 12)


def test_resuming_can_be_refused_and_the_folder_emptied(uninterrupted: Path, tmp_path: Path) -> None:
    folder = copy_of(uninterrupted, tmp_path)
    with pytest.raises(RunError, match="holds checkpoints and --resume_from_checkpoint is none"):
        run_here(folder, **ALL_DRAWS, resume_from_checkpoint="none")
    assert run_here(folder, overwrite_output_dir=True, max_train_steps=2, seed=9) == 0
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]


# Elasticity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "processes", "kept", "plan"),
    [
        ({"train_batch_size": 16}, 2, None, BatchPlan(32, 2, 1)),
        ({"train_batch_size": 16, "gradient_accumulation_steps": 4}, 2, None, BatchPlan(128, 2, 4)),
        ({"train_batch_size": 128, "global_batch_size": 128}, 8, None, BatchPlan(128, 8, 1)),
        ({"train_batch_size": 16, "global_batch_size": 128}, 2, None, BatchPlan(128, 2, 4)),
        ({"train_batch_size": 16}, 1, 32, BatchPlan(32, 1, 2)),
        ({"train_batch_size": 16}, 4, 32, BatchPlan(32, 4, 1)),
        ({"train_batch_size": 5, "global_batch_size": 12}, 1, None, BatchPlan(12, 1, 3)),
    ],
)
def test_the_global_batch_is_cut_equally(changes, processes: int, kept: int | None, plan: BatchPlan) -> None:
    config = TrainConfig(max_train_steps=1, **changes)
    assert plan_batch(config, processes, kept) == plan
    rows = [row for rank in range(processes) for micro in range(plan.accumulation) for row in plan.rows(rank, micro)]
    assert rows == list(range(plan.global_batch))
    assert plan.micro_batch <= config.train_batch_size


def test_epochs_are_whole_updates_the_last_one_begun() -> None:
    """Two passes over 10 images in batches of 8 are 20 images, 3 updates; one is 2."""
    config = TrainConfig(num_epochs=2, train_batch_size=8, save_images_epochs=1)
    plan = BatchPlan(8, 1, 1)
    assert total_updates(config, 10, plan) == 3
    assert plan_intervals(config, 3, 10, plan).grid == 2


def test_what_decides_the_last_digits_is_said_where_it_has_changed(capsys: pytest.CaptureFixture[str]) -> None:
    before = {"num_threads": 1, "processes": 2, "device": "cpu"}
    warn_of_other_conditions(before, dict(before))
    assert capsys.readouterr().err == ""
    warn_of_other_conditions(before, {"num_threads": 1, "processes": 1, "tf32": True})
    said = "Resuming under other conditions (processes 2 -> 1, tf32 None -> True, device cpu -> None): the weights"
    assert capsys.readouterr().err.startswith(said)


def test_a_batch_that_cannot_be_shared_is_an_error() -> None:
    with pytest.raises(RunError, match="global batch of 10 cannot be shared equally among 4 processes"):
        plan_batch(TrainConfig(max_train_steps=1, global_batch_size=10), 4)


def test_an_accumulation_that_contradicts_the_global_batch_is_an_error_and_a_resumed_run_adapts() -> None:
    config = TrainConfig(max_train_steps=1, train_batch_size=16, gradient_accumulation_steps=4, global_batch_size=64)
    assert plan_batch(config, 1) == BatchPlan(64, 1, 4)
    with pytest.raises(RunError, match=r"64 contradicts .* 16 x .* 4 x 2 processes = 128"):
        plan_batch(config, 2)
    assert plan_batch(config, 2, 64) == BatchPlan(64, 2, 2)


def test_passes_far_below_what_a_process_holds_are_warned_of() -> None:
    config = TrainConfig(max_train_steps=1, train_batch_size=16, global_batch_size=31)
    with pytest.warns(UserWarning, match="31 images of one process .* only into 31 passes of 1, which is slow"):
        assert plan_batch(config, 1) == BatchPlan(31, 1, 31)


def test_two_processes_equal_one_and_each_goes_on_with_the_others_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = {"double": True, "random_flip": True, "global_batch_size": 8, "max_train_steps": 20}
    exact |= {"checkpointing_steps": 10, "checkpoints_total_limit": "none"}
    assert run_here(tmp_path / "one", **exact) == 0
    code, output = finish(start(options(tmp_path / "two", **exact), [*TORCHRUN, "2"]))
    assert code == 0, output
    assert_same_algorithm(tmp_path / "one", tmp_path / "two", 20)
    moved = copy_of(tmp_path / "two", tmp_path)
    (moved / "status.json").unlink()
    capsys.readouterr()
    assert run_here(moved, **exact, resume_from_checkpoint="step-00000010") == 0
    assert "Resuming under other conditions (processes 2 -> 1)" in capsys.readouterr().err
    assert_same_algorithm(tmp_path / "one", moved, 20)


def assert_same_algorithm(a: Path, b: Path, update: int) -> None:
    """Float64 weights within 1e-11: the same sums in another order, and nothing else."""
    for stem in ("model", "ema"):
        left, right = weights(a, update, stem), weights(b, update, stem)
        assert max(float((left[name] - right[name]).abs().max()) for name in left) < 1e-11


@pytest.mark.slow
def test_one_processs_checkpoint_goes_on_with_two(tmp_path: Path) -> None:
    exact = {"double": True, "global_batch_size": 8, "max_train_steps": 20, "checkpointing_steps": 10}
    exact["checkpoints_total_limit"] = "none"
    assert run_here(tmp_path / "one", **exact) == 0
    moved = copy_of(tmp_path / "one", tmp_path)
    (moved / "status.json").unlink()
    words = options(moved, **exact, resume_from_checkpoint="step-00000010")
    code, output = finish(start(words, [*TORCHRUN, "2"]))
    assert code == 0, output
    assert_same_algorithm(tmp_path / "one", moved, 20)


@pytest.mark.slow
def test_killed_at_ten_random_moments_saves_included(tmp_path: Path) -> None:
    long = {**ALL_DRAWS, "max_train_steps": 60, "checkpointing_steps": 3}
    assert run_here(tmp_path / "whole", **long) == 0
    folder, moments = tmp_path / "killed", random.Random(0)
    for kill in range(10):
        process = start(options(folder, **long))
        before = newest(folder)
        wait_for_progress(folder, process, before)
        time.sleep(moments.uniform(0, 0.6))  # some updates and saves: a save is near every third update
        process.kill()
        process.communicate()
        reached = logged_or_saved(folder)
        assert newest(folder) >= reached - 3, f"kill {kill} lost more than one interval"
    assert run_here(folder, **long) == 0
    assert_bitwise_equal(tmp_path / "whole", folder, 60)
    assert log_without_speed(tmp_path / "whole") == log_without_speed(folder)


def newest(folder: Path) -> int:
    """Update of the newest complete checkpoint, 0 without one."""
    return max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")), default=0)


def logged_or_saved(folder: Path) -> int:
    return max([record["update"] for record in log_without_speed(folder)] + [newest(folder)])


def wait_for_progress(folder: Path, process, before: int) -> None:
    """Until the run has saved something new or ended."""
    end = time.monotonic() + 120
    while newest(folder) == before and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("error", [OSError("the disk does not answer"), ValueError("no JSON"), RunError("a sentence")])
def test_an_error_of_the_main_process_is_told_to_all(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr("ddpm_ext.distributed.broadcast_object_list", told.extend)

    def fail() -> None:
        raise error

    with pytest.raises(RunError, match=str(error)):
        on_main(cast(Any, SimpleNamespace(is_main_process=True, num_processes=2)), fail)
    assert told == [None, str(error)]


# Going back -----------------------------------------------------------------------------------------------------------


def checkpoints_of(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


def snapshots_of(folder: Path) -> list[int]:
    return sorted(int(path.name[5:13]) for path in (folder / "snapshots").glob("step-*-0.05.safetensors"))


@pytest.mark.parametrize("limit", [1, 2])
def test_going_back_leaves_the_other_course_behind_also_over_a_preemption(
    limit: int, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back from update 12 to 8 at another learning rate, stopped at 9: the same command goes on from 9."""
    folder = copy_of(uninterrupted, tmp_path)
    again = {**ALL_DRAWS, "resume_from_checkpoint": "step-00000008", "learning_rate": 0.5}
    again |= {"allow_config_change": ["learning_rate"], "checkpoints_total_limit": limit}
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "update", stopping_after(9))
        assert run_here(folder, **again) == PREEMPTED
    assert checkpoints_of(folder) == [8, 9][-limit:]
    assert run_here(folder, **again) == 0
    starts = json.loads((folder / "config.json").read_text())["starts"]
    assert [(start["update"], start["branch"]) for start in starts[-2:]] == [(8, "step-00000008"), (9, "step-00000008")]
    assert checkpoints_of(folder) == [9, 12][-limit:]
    # Only the other learning rate explains a step of that size.
    assert (weights(folder, 12)["conv_in.weight"] - weights(uninterrupted, 8)["conv_in.weight"]).abs().max() > 0.1
    assert run_here(folder, **again) == 0 and len(json.loads((folder / "config.json").read_text())["starts"]) == len(
        starts
    )


def test_snapshots_of_the_course_that_was_left_go_before_the_first_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"ema": "power_function", "ema_snapshot_steps": 5}
    assert run_here(tmp_path / "run", **given) == 0
    assert snapshots_of(tmp_path / "run") == [5, 10, 12]
    monkeypatch.setattr(Trainer, "update", stopping_after(10))
    back = {"resume_from_checkpoint": "step-00000008", "allow_config_change": ["learning_rate"], "learning_rate": 0.5}
    assert run_here(tmp_path / "run", **given, **back) == PREEMPTED
    assert snapshots_of(tmp_path / "run") == [5, 10]
    assert checkpoints_of(tmp_path / "run") == [8, 10]


def test_another_runs_checkpoint_takes_the_place_of_the_runs_own(uninterrupted: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    assert run_here(own, **ALL_DRAWS, max_train_steps=4) == 0
    there = uninterrupted / "checkpoints" / "step-00000008"
    given = {**ALL_DRAWS, "resume_from_checkpoint": there, "max_train_steps": 10}
    assert run_here(own, **given) == 0
    assert checkpoints_of(own) == [10]
    assert run_here(own, **{**given, "max_train_steps": 12}) == 0  # and goes on from its own 10
    assert checkpoints_of(own) == [10, 12]
    assert_bitwise_equal(uninterrupted, own, 12)


def test_a_checkpoint_that_is_not_there_is_a_sentence(uninterrupted: Path) -> None:
    with pytest.raises(RunError, match=r"no such checkpoint\. .* has step-00000008, step-00000012\."):
        run_here(uninterrupted, **ALL_DRAWS, resume_from_checkpoint="step-00000003")


# Emptying the folder --------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file but the lock: time of writing and bytes."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.parametrize("changes", [{}, {"seed": 5}, {"train_split": "nowhere"}], ids=["same", "other", "failing"])
def test_a_dry_run_that_would_empty_the_folder_alters_nothing(changes, uninterrupted: Path, tmp_path: Path) -> None:
    folder = copy_of(uninterrupted, tmp_path)
    (folder / "checkpoints" / ".step-00000016.1.tmp").mkdir()
    (folder / "checkpoints" / ".step-00000016.1.tmp" / "state.json").write_text("left by a kill")
    before = contents(folder)
    given = {**ALL_DRAWS, **changes, "dry_run": True, "overwrite_output_dir": True}
    if "train_split" in changes:
        with pytest.raises(RunError, match="nowhere"):
            run_here(folder, **given)
    else:
        assert run_here(folder, **given) == 0
    assert contents(folder) == before


@pytest.mark.parametrize("ended", ["preempted", "running", "finished"])
def test_a_requeued_command_that_empties_the_folder_goes_on_with_its_own_run(
    ended: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"overwrite_output_dir": True, "max_train_steps": 6}
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "update", stopping_after(4))
        assert run_here(tmp_path / "run", **given) == PREEMPTED
    file = tmp_path / "run" / "status.json"
    file.write_text(file.read_text().replace("preempted", ended))
    capsys.readouterr()
    assert run_here(tmp_path / "run", **given) == 0
    starts = json.loads((tmp_path / "run" / "config.json").read_text())["starts"]
    assert [start["update"] for start in starts] == ([0] if ended == "finished" else [0, 4])
    assert ("resumes in spite of --overwrite_output_dir" in capsys.readouterr().out) == (ended != "finished")


def test_a_command_with_other_options_empties_an_unfinished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"overwrite_output_dir": True, "max_train_steps": 3}
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "update", stopping_after(2))
        assert run_here(tmp_path / "run", **given) == PREEMPTED
    assert run_here(tmp_path / "run", **given, train_batch_size=4) == 0
    (begin,) = json.loads((tmp_path / "run" / "config.json").read_text())["starts"]
    assert begin["update"] == 0
