"""Threads by default: cores, quota, load and processes; the user's number wins; a small network takes one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_ext import threads
from ddpm_ext.models.unet import UNET_PRESETS
from ddpm_ext.threads import chosen_by_user, default_threads, set_thread_defaults
from ddpm_ext.training.builders import fitting_threads_of

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("cores", "load", "processes", "expected"),
    [(8, 0.2, 1, 8), (8, 1.0, 1, 7), (8, 3.4, 1, 5), (8, 50.0, 1, 1), (8, 0.0, 2, 4), (2, 1.0, 1, 1), (1, 0.0, 4, 1)],
)
def test_threads_are_the_cores_that_others_leave(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cores: int, load: float, processes: int, expected: int
) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(cores)))
    assert default_threads(processes, tmp_path, load) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000"}, 16),
        ({"cpu.max": "400000 100000"}, 4),
        ({"cpu.max": "150000 100000"}, 1),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        ({"cpu.max": "nonsense"}, 16),
    ],
)
def test_a_containers_quota_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(16)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert default_threads(1, tmp_path, 0.0) == expected


def test_what_the_user_sets_wins() -> None:
    given = {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "PASSIVE"}
    environ = dict(given)
    set_thread_defaults(environ)
    assert environ == given and chosen_by_user(environ) == 3
    environ = {}
    set_thread_defaults(environ)
    assert int(environ["OMP_NUM_THREADS"]) >= 1 and environ["GOMP_SPINCOUNT"] == "1000"
    assert chosen_by_user(environ) is None  # ours


def test_small_networks_take_one_thread() -> None:
    fitting = {name: fitting_threads_of(preset.config) for name, preset in UNET_PRESETS.items()}
    assert fitting.pop("digits") == 1
    assert set(fitting.values()) == {None}


@pytest.mark.slow
def test_a_number_set_at_resume_wins_over_the_recorded_one(tmp_path: Path) -> None:
    """Three starts of one run: the default, which is one for the digits; two by the environment; then the record."""
    numbers = []
    for updates, more in ((1, {}), (2, {"OMP_NUM_THREADS": "2"}), (3, {})):
        env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "DDPM_EXT_"))}
        words = [
            "train",
            "--cpu=true",
            f"--max_train_steps={updates}",
            "--lr_scheduler=constant",
            "--eval_batch_size=1",
            "--ddpm_num_inference_steps=1",
            "--train_batch_size=4",
            f"--output_dir={tmp_path}",
        ]
        done = subprocess.run([sys.executable, "-m", "ddpm_ext", *words], cwd=ROOT, env=env | more, capture_output=True,
                              text=True, timeout=240, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr[-1500:]
        numbers.append(json.loads((tmp_path / "config.json").read_text())["starts"][-1]["num_threads"])
    assert numbers == [1, 2, 2]
