"""Snapshots of power-function averages, from which an average of another width is reconstructed."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...run_dir import RunDir, whole_file
from .checkpoint import checkpoint_name

__all__ = ["read_mark", "write_snapshot"]


def write_snapshot(run: RunDir, weights: dict[str, Tensor], update: int, sigma_rel: float) -> None:
    """Write snapshots/step-N-sigma.safetensors, whole or not at all; update and width stand in its metadata.

    Args:
        run: The run folder.
        weights: The average, by name.
        update: Updates done.
        sigma_rel: Relative width of the average.
    """
    run.snapshots.mkdir(parents=True, exist_ok=True)
    path = run.snapshots / f"{checkpoint_name(update)}-{sigma_rel:g}.safetensors"
    with whole_file(path) as temporary:
        save_file(weights, temporary, metadata={"update": str(update), "sigma_rel": repr(sigma_rel)})


def read_mark(path: Path) -> tuple[int, float]:
    """Return the update and relative width of a snapshot."""
    with safe_open(path, "pt") as file:
        mark = file.metadata()
    return int(mark["update"]), float(mark["sigma_rel"])
