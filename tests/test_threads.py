"""Threads by default: cores, quota, load and processes; the user's number wins, then the recorded one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_ext import threads
from ddpm_ext.threads import chosen_by_user, default_threads, set_thread_defaults

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("loads", "processes", "expected"),
    [
        ([3.0, 0, 0, 10, 0, 0, 0, 7], 1, 8),
        ([100.0, 0, 0, 0, 0, 0, 0, 0], 1, 7),
        ([95.0, 90, 80, 70, 4, 0, 0, 0], 1, 5),  # 3.4 cores
        ([100.0] * 8, 1, 1),
        ([0.0] * 8, 2, 4),
        ([50.0, 50.0], 1, 1),
        ([0.0], 4, 1),
    ],
)
def test_threads_are_the_cores_that_others_leave(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loads: list[float], processes: int, expected: int
) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(len(loads))))
    monkeypatch.setattr(threads.psutil, "cpu_percent", lambda *_, percpu: loads)
    assert default_threads(processes, tmp_path) == expected


def test_only_the_cores_that_the_process_may_run_on_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(threads.psutil, "cpu_percent", lambda *_, percpu: [100.0] * 60 + [0.0] * 3 + [100.0])
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {60, 61, 62, 63})
    assert default_threads(1, tmp_path) == 3
    (tmp_path / "cpu.max").write_text("200000 100000")  # the quota is of what is free, not lessened by it
    assert default_threads(1, tmp_path) == 2


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core is taken whatever others do")
def test_a_busy_neighbour_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(threads, "WATCHED", 1.0)
    program = "print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as neighbour:
        assert neighbour.stdout is not None
        neighbour.stdout.read(1)
        found = default_threads(1, tmp_path)
        neighbour.kill()
    assert found < len(os.sched_getaffinity(0))


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
    monkeypatch.setattr(threads.psutil, "cpu_percent", lambda *_, percpu: [0.0] * 16)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert default_threads(1, tmp_path) == expected


def test_what_the_user_sets_wins() -> None:
    given = {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "PASSIVE"}
    environ = dict(given)
    set_thread_defaults(environ)
    assert environ == given and chosen_by_user(environ) == 3
    environ = {}
    set_thread_defaults(environ)
    assert int(environ["OMP_NUM_THREADS"]) >= 1 and environ["GOMP_SPINCOUNT"] == "10000"
    assert chosen_by_user(environ) is None  # ours


@pytest.mark.slow
def test_a_number_set_at_resume_wins_over_the_recorded_one(tmp_path: Path) -> None:
    """Four starts of one run: one by the environment, then the record, two by the environment, then the record."""
    numbers = []
    for updates, number in ((1, "1"), (2, None), (3, "2"), (4, None)):
        more = {} if number is None else {"OMP_NUM_THREADS": number}
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
    assert numbers == [1, 1, 2, 2]
