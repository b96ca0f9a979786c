"""`make gpu` on a machine without a GPU: its words, its page, and a rehearsal on the simulated accelerator."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import GpuOptions

ROOT = Path(__file__).resolve().parent.parent


def test_cards_are_known_by_their_drivers_names() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA L40S": "l40s",
        "NVIDIA L4": "l4",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA GeForce RTX 4090": "rtx4090",
        "Quadro P600": None,
    }
    assert {name: gpu.kind_of(name) for name in names} == names


def test_a_row_that_fails_is_noted_and_the_next_one_runs() -> None:
    noted: list[gpu.Row] = []
    for bad in (True, False):
        with gpu.guarded({"name": "row"}, noted.append) as row:
            if bad:
                raise RuntimeError("CUDA out of memory\nmore")
            row["images_per_second"] = 1.0
    assert noted[0]["error"] == "RuntimeError: CUDA out of memory"
    assert "error" not in noted[1] and noted[1]["images_per_second"] == 1.0


def test_a_part_that_hangs_or_dies_is_ended_at_its_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = GpuOptions(output=str(tmp_path / "page.md"))
    for program, outcome in (
        ("import time; time.sleep(60)", "stopped after 1 s, its whole time"),
        ("exit(3)", "ended with exit code 3"),
    ):
        script = tmp_path / "program"
        script.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{program}'\n")
        script.chmod(0o755)
        monkeypatch.setattr(gpu.sys, "executable", str(script))
        assert gpu.run_guarded(options, "training", 1) == outcome
        monkeypatch.undo()


def test_options_out_of_range_are_refused() -> None:
    for wrong in ({"minutes": 0.0}, {"parts": "training,dancing"}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=r"minutes|parts"):
            GpuOptions(**wrong)


def test_a_run_is_compiled_where_that_makes_more_images_in_its_time(tmp_path: Path) -> None:
    options = GpuOptions(output=str(tmp_path / "page.md"))
    assert gpu.measured_rate(options, 300) == (500.0, False), "nothing was measured"
    row = {"part": "training", "code": "ddpm_ext", "precision": "bf16", "images_per_second": 1000.0}
    rows = [row | {"compile": False, "first_seconds": 0.0}, row | {"compile": True, "first_seconds": 60.0}]
    rows[1]["images_per_second"] = 2000.0
    rows.append(rows[1] | {"code": "Diffusers", "images_per_second": 9000.0})
    rows.append({"part": "training", "code": "ddpm_ext", "precision": "bf16", "error": "out of memory"})
    gpu.rows_file(options).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert gpu.measured_rate(options, 300) == (2000 * 0.8, True)
    assert gpu.measured_rate(options, 90) == (1000.0, False)  # compiling takes two thirds of it


def test_a_page_keeps_the_rows_of_the_parts_that_are_not_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = GpuOptions(output=str(tmp_path / "page.md"), parts="sampling", rehearse=True)
    rows = [
        {"part": part, "name": "tests marked gpu", "result": f"old {part}", "failed": []}
        for part in ("tests", "sampling")
    ]
    gpu.rows_file(options).write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(gpu, "run_guarded", lambda *_: None)
    assert gpu.run_all(options) == 0
    assert gpu.read_rows(options) == {"tests": rows[:1]}
    assert "old tests" in (tmp_path / "page.md").read_text("utf-8")


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path: Path) -> None:
    page = tmp_path / "sim.md"
    words = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--minutes=10", "--batch_size=4", f"--output={page}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=700, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    text = page.read_text("utf-8")
    for said in (
        "## Tests marked gpu",
        "| ddpm_ext | bf16 | no | 4 |",
        "| Diffusers | bf16 | no |",
        "2 updates, finished",
    ):
        assert said in text
    assert (tmp_path / "sim-cifar10" / "README.md").is_file()
    reasons = text.split("## What did not run")[1]
    assert all("the simulated device has no" in line for line in reasons.splitlines() if line.startswith("- ")), reasons
