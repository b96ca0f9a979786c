"""Weights that leave a run: pipeline/, snapshots/, the Hub."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import HubError
from ..pipelines.ddpm import DDPMExtPipeline, load_pipeline
from ..publishing.publisher import Publisher
from ..publishing.training_record import base_model
from ..run_dir import RunDir, RunError, whole_file
from .config import ReconstructConfig, TrainConfig, recorded
from .state.checkpoint import checkpoint_name
from .state.ema import reconstruction_weights, weighted_sum

__all__ = ["finish_upload", "make_publisher", "reconstruct", "write_pipeline", "write_snapshot"]


def write_snapshot(run: RunDir, weights: dict[str, Tensor], update: int, sigma_rel: float) -> None:
    """snapshots/step-N-sigma.safetensors, whole or not at all; update and width stand in its metadata.

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


def write_pipeline(run: RunDir, pipeline: DDPMExtPipeline, target: Path | None = None) -> None:
    """pipeline/ or another folder of the run, replaced as a whole.

    Args:
        run: The run folder.
        pipeline: What is written.
        target: The folder; None for pipeline/.
    """
    target = target or run.pipeline
    temporary, old = run.path / f".{target.name}.tmp", run.path / f".{target.name}.old"
    for folder in (temporary, old):
        shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(str(temporary))
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def reconstruct(config: ReconstructConfig) -> int:
    """Write the pipeline of another width; the run's own pipeline gives network and scheduler.

    Returns:
        Number of snapshots used.

    Raises:
        RunError: the run has no snapshots, or no pipeline yet.
    """
    run = RunDir(config.run)
    paths = sorted(run.snapshots.glob("step-*.safetensors"))
    if not paths or not run.pipeline.exists():
        raise RunError(f"{run.path} needs snapshots/ and pipeline/, as a finished run with --ema power_function has.")
    marks = [read_mark(path) for path in paths]
    end = config.update or max(update for update, _ in marks)
    used = [(path, mark) for path, mark in zip(paths, marks, strict=True) if mark[0] <= end]
    weights = reconstruction_weights([n for _, (n, _) in used], [s for _, (_, s) in used], end, config.sigma_rel)
    pipeline = load_pipeline(run.pipeline)
    pipeline.unet.load_state_dict(weighted_sum((load_file(path) for path, _ in used), weights))
    assert config.output_dir is not None  # set when the options were built
    pipeline.save_pretrained(config.output_dir)
    return len(used)


def read_mark(path: Path) -> tuple[int, float]:
    """Update and relative width of a snapshot."""
    with safe_open(path, "pt") as file:
        mark = file.metadata()
    return int(mark["update"]), float(mark["sigma_rel"])


def make_publisher(config: TrainConfig, run: RunDir, origin: dict[str, Any] | None) -> Publisher | None:
    """Return the uploads that --push_to_hub asks for, or None. A missing token is told here, before the training.

    Args:
        config: The options.
        run: The run folder.
        origin: The record of what the run started from (--init_from), whose licence the uploads have.
    """
    if not config.push_to_hub:
        return None
    name = config.hub_model_id or run.path.name
    try:
        base = base_model({"config": recorded(config), "init_from": origin})
        return Publisher(run.path, name, token=config.hub_token, base=base, private=config.hub_private_repo or None)
    except HubError as error:
        raise RunError(str(error)) from error


def finish_upload(publisher: Publisher) -> int:
    """Make the last upload and wait for it.

    A run whose upload fails is finished all the same: the same command uploads it again.

    Returns:
        Exit code: 0, or 1 where it failed.
    """
    try:
        publisher.finish()
    except HubError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
