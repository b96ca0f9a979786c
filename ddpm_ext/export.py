"""Weights that leave a run: pipeline/, snapshots/, the Hub."""

from __future__ import annotations

import shutil

from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import checkpoint_name
from .config import TrainConfig
from .hub import push_to_hub
from .pipeline import DDPMExtPipeline
from .run_dir import RunDir


def write_snapshot(run: RunDir, weights: dict[str, Tensor], update: int, sigma_rel: float) -> None:
    """snapshots/step-N-sigma.safetensors, whole or not at all; update and width stand in its metadata."""
    run.snapshots.mkdir(parents=True, exist_ok=True)
    path = run.snapshots / f"{checkpoint_name(update)}-{sigma_rel:g}.safetensors"
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(weights, temporary, metadata={"update": str(update), "sigma_rel": repr(sigma_rel)})
    temporary.replace(path)


def write_pipeline(run: RunDir, pipeline: DDPMExtPipeline) -> None:
    """pipeline/, replaced as a whole."""
    temporary, old = run.path / ".pipeline.tmp", run.path / ".pipeline.old"
    for folder in (temporary, old):
        shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(str(temporary))
    if run.pipeline.exists():
        run.pipeline.rename(old)
    temporary.rename(run.pipeline)
    shutil.rmtree(old, ignore_errors=True)


def push(config: TrainConfig, run: RunDir) -> None:
    """Upload the run when --push_to_hub asks for it: pipeline, samples and configuration, in one commit."""
    if config.push_to_hub:
        push_to_hub(
            run.path, config.hub_model_id or run.path.name, private=config.hub_private_repo, token=config.hub_token
        )
