"""An average of any width, reconstructed from the snapshots of a run."""

from __future__ import annotations

from safetensors.torch import load_file

from ...pipelines.ddpm import load_pipeline
from ...run_dir import RunDir, RunError
from ..config import ReconstructConfig
from ..state.ema import reconstruction_weights, weighted_sum
from ..state.snapshots import read_mark

__all__ = ["reconstruct"]


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
