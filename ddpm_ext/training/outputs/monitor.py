"""What a run tells: the progress line, trackers, the final plot."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from ...run_dir import JsonRecord, RunDir, read_json
from ..state.meter import QUARTERS

__all__ = [
    "Progress",
    "draw_training",
    "last_tenth",
    "sampling_bar",
    "start_trackers",
    "track_images",
]


@contextmanager
def sampling_bar(network: nn.Module, calls: int, update: int, shown: bool) -> Iterator[None]:
    """Show how far the sampling of a grid is, in calls of the network.

    Args:
        network: The network that samples.
        calls: How often it is going to be called.
        update: Names the grid.
        shown: False shows nothing.
    """
    if not shown:
        yield
        return
    bar = tqdm(
        total=calls,
        desc=f"samples of update {update}",
        unit="call",
        mininterval=0.2 if sys.stderr.isatty() else 10,
        dynamic_ncols=True,
        leave=False,
    )
    with bar:

        def count(*_: object) -> None:
            bar.update()

        handle = network.register_forward_pre_hook(count)
        try:
            yield
        finally:
            handle.remove()


class Progress:
    """The progress line on the main process: update, loss, images per second, time left."""

    def __init__(self, accelerator: Accelerator, updates: int, done: int, global_batch: int) -> None:
        self.bar = tqdm(
            total=updates,
            initial=done,
            disable=not accelerator.is_main_process,
            mininterval=0.2 if sys.stderr.isatty() else 10,  # a line now and then in a batch system's file
            dynamic_ncols=True,
            unit="step",
        )
        self.global_batch = global_batch
        self.since, self.counted = time.perf_counter(), 0

    def advance(self, updates: int = 1) -> None:
        """Count some updates."""
        self.bar.update(updates)
        self.counted += updates

    def images_per_second(self) -> float:
        """Over the updates since the last call."""
        now = time.perf_counter()
        rate = self.counted * self.global_batch / max(now - self.since, 1e-9)
        self.since, self.counted = now, 0
        return rate

    def show(self, record: JsonRecord) -> None:
        """Show loss and speed beside the bar."""
        self.bar.set_postfix_str(
            f"loss={record['loss']:.4f}, {record['images_per_second']:.0f} images/s", refresh=sys.stderr.isatty()
        )

    def close(self) -> None:
        """End the bar."""
        self.bar.close()


def start_trackers(accelerator: Accelerator, config: JsonRecord) -> None:
    """Open the tracker with the configuration; values that trackers cannot hold become text."""
    plain = {
        name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in config.items()
    }
    accelerator.init_trackers("ddpm-ext", config=plain)


def track_images(accelerator: Accelerator, grid: np.ndarray, update: int) -> None:
    """One image, uint8 (H, W, C), to the trackers, as RGB: TensorBoard takes nothing else.

    Args:
        accelerator: Knows the trackers.
        grid: uint8, shape (H, W, C).
        update: Updates done.
    """
    image = grid if grid.shape[-1] == 3 else grid[..., :1].repeat(3, axis=-1)
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": image[None]}, step=update, **layout)  # pyright: ignore
        elif tracker.name == "trackio":
            import trackio  # pyright: ignore[reportMissingImports]

            tracker.log({"samples": trackio.Image(image)}, step=update)


def draw_training(run: RunDir) -> bool:
    """Draw training.png from log.jsonl: loss, loss by quarter of t, and learning rate against updates.

    The first panel holds the mean loss of the last tenth too: a single line of the log is noisier than progress is.

    Returns:
        False where matplotlib (the extra `plots`) is not installed or nothing was logged.
    """
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    records = [record for record in run.read_log() if "loss" in record]
    if not records:
        return False
    figure = Figure(figsize=(13, 4), layout="constrained")
    whole, quarters, rate = figure.subplots(1, 3)
    _draw_curve(whole, records, "loss", "mean over all t")
    start, mean = last_tenth(records)
    whole.hlines(mean, start, records[-1]["update"], colors="black", label=f"last tenth: {mean:.4f}")
    whole.set_title("Training loss")
    total = int(read_json(run.config)["config"]["ddpm_num_steps"])
    for quarter in range(QUARTERS):
        first, end = -(-quarter * total // QUARTERS), -(-(quarter + 1) * total // QUARTERS)
        _draw_curve(quarters, records, f"loss_q{quarter + 1}", f"t = {first} … {end - 1}")
    quarters.set_title("Training loss by range of t, from least to most noise")
    _draw_curve(rate, records, "learning_rate", "learning rate")
    rate.set_title("Learning rate")
    rate.set_ylabel("learning rate (per update)")
    for axis in (whole, quarters):
        axis.set_yscale("log")
        axis.set_ylabel("loss (mean square per value, or bits/dim for vlb)")
    for axis in (whole, quarters, rate):
        axis.set_xlabel("optimiser updates")
        axis.legend()
    figure.savefig(run.plot, dpi=110)
    return True


def _draw_curve(axis: Any, records: Sequence[JsonRecord], name: str, label: str) -> None:
    """Draw one scalar of the log where it is there."""
    points = [(record["update"], record[name]) for record in records if name in record]
    if points:
        axis.plot(*zip(*points, strict=True), label=label)


def last_tenth(records: Sequence[JsonRecord]) -> tuple[int, float]:
    """Return where the last tenth of the updates begins, and the mean loss of the log's lines from there on.

    Args:
        records: Lines of the log with a loss, at least one.
    """
    start = int(records[-1]["update"] * 0.9)
    losses = [record["loss"] for record in records if record["update"] > start]
    return start, sum(losses) / len(losses)
