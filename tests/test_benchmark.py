"""The benchmark measures what it says and writes a table; no test looks at a time."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import speed as benchmark
from benchmarks.speed import BenchmarkOptions, Row, by_turns, markdown, scheduler_rows, shown
from ddpm_ext.training.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "TURN_SECONDS", 0.0)


def positive(rows: list[Row]) -> None:
    assert all(math.isfinite(row.ours) and row.ours > 0 and row.stock > 0 for row in rows)


def test_calls_are_made_by_turns() -> None:
    order: list[str] = []
    medians = by_turns([lambda: order.append("A"), lambda: order.append("B"), lambda: order.append("C")], 4)
    assert len(medians) == 3
    assert "".join(order).endswith("ABC" * 4)


def test_ratios_are_stocks_time_over_ours() -> None:
    row = Row("step", ours=2.0, stock=6.0, noise=1.0)
    assert row.ratio == 3.0
    assert row.ratio_without_noise == 5.0
    assert [shown(value) for value in (2.5, 0.0123, 4.56e-5)] == ["2.5 s", "12.3 ms", "45.6 µs"]


def test_the_scheduler_rows() -> None:
    rows = scheduler_rows((2, 1, 4, 4), 1)
    assert [row.name for row in rows] == [f"`{name}`, 2×1×4×4" for name in ("step", "add_noise", "get_velocity")]
    positive(rows)
    assert rows[0].noise > 0
    names = [row.name for row in benchmark.set_up_rows(1)]
    assert names == ["`set_timesteps(50)` and 50 `step`s", "`set_timesteps(50)` alone", "making a scheduler"]


def test_both_updates_train_the_network_that_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = dataclasses.replace(PRESETS["digits"].config, train_batch_size=2, global_batch_size=2, random_flip=True)
    kept: list[Any] = []
    monkeypatch.setattr(benchmark, "by_turns", lambda calls, turns: [kept.extend(calls), 1.0, 1.0][1:])
    row = benchmark.training_row(preset, 1, torch.get_num_threads())
    assert row.name == "training update, `digits`, batch 2"
    trainer = kept[0].__self__
    closure = dict(zip(kept[1].__code__.co_freevars, (cell.cell_contents for cell in kept[1].__closure__), strict=True))
    theirs = closure["unet"]
    for ours, stock in zip(trainer.parameters, theirs.parameters(), strict=True):
        assert torch.equal(ours, stock)  # the same first weights
    assert closure["batch_size"] == trainer.plan.global_batch == 2
    assert theirs.config["dropout"] == trainer.network.config["dropout"]
    before = [weight.clone() for weight in theirs.parameters()]
    for _ in range(2):  # the warm-up begins at a learning rate of 0
        kept[0]()
        kept[1]()
    assert trainer.state.update == 2
    # Adam's second step of a warm-up of n: lr / n or a little more on every weight that has a gradient, on both sides.
    size = preset.learning_rate / preset.lr_warmup_steps
    for weights in (trainer.parameters, list(theirs.parameters())):
        moved = torch.cat([(weight - first).abs().flatten() for weight, first in zip(weights, before, strict=True)])
        assert 0.5 * size < moved.max() < 1.5 * size


def test_the_sampling_row_and_the_table() -> None:
    rows = [benchmark.sampling_row("digits", 1, 2, 1), Row("`step`", 1e-3, 3e-3, 5e-4)]
    positive(rows)
    report = markdown(rows, BenchmarkOptions(quick=True, num_threads=1))
    assert "| `step` | 1 ms | 3 ms | 3.00 | 5.00 |" in report
    assert re.search(r"\| 2 sampling steps, `digits`, batch 1 \| .+ \| .+ \| \d+\.\d\d \|  \|", report)
    for said in ("torch ", "diffusers ", "Commit: ", "1 thread for every row", "--quick", "Machine: "):
        assert said in report


def test_a_whole_run_holds_every_row_that_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SHAPES", ((1, 3, 4, 4), (2, 3, 4, 4)))
    monkeypatch.setattr(benchmark, "training_row", lambda *_: Row("training update", 1.0, 1.0))
    monkeypatch.setattr(benchmark, "sampling_row", lambda *_: Row("50 sampling steps", 1.0, 1.0))
    monkeypatch.setattr(benchmark, "import_row", lambda *_: Row("import of", 1.0, 1.0))
    report = benchmark.run_benchmark(BenchmarkOptions(quick=True, num_threads=torch.get_num_threads()))
    for said in ("`step`, 1×3×4×4", "`add_noise`, 2×3×4×4", "`get_velocity`", "training update", "50 sampling steps"):
        assert said in report


def test_the_shapes_are_those_of_the_claims() -> None:
    assert benchmark.SHAPES == ((1, 3, 32, 32), (64, 3, 32, 32), (16, 3, 256, 256))


@pytest.mark.slow
def test_the_script_writes_its_file(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/benchmark.py", "--quick", "--output", str(tmp_path / "sub/table.md")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| training update, `cifar10-small`, batch 64 |" in (tmp_path / "sub/table.md").read_text()
