"""Evaluations that tests share: small options, and entries of eval.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddpm_ext.evaluation.config import EvalConfig

__all__ = ["on_digits", "score", "small"]


def on_digits(folder: Path) -> dict[str, Any]:
    """Options of a quick measurement that keeps all it writes in a folder."""
    places = {"reference_cache": str(folder / "references"), "output_dir": str(folder / "out")}
    return {"dataset_name": "digits", "extractor": "pixels", "max_reference_images": 40, **places}


def small(model: Path, tmp_path: Path, **options: Any) -> EvalConfig:
    usual: dict[str, Any] = {
        **on_digits(tmp_path),
        "num_samples": 12,
        "num_inference_steps": "5",
        "batch_size": 5,
        "max_bpd_images": 6,
        "kid_subset_size": 6,
        "kid_subsets": 3,
        "few_steps": False,
    }
    if "data_dir" in options:
        usual["dataset_name"] = None
    return EvalConfig(model=str(model), **{**usual, **options})


def score(value: float, **more: Any) -> dict[str, Any]:
    usual = {"metric": "fid", "weights": "new", "network": "n", "sampler": "ddpm", "variance_type": "fixed_small"}
    reference = {"name": "digits", "split": "train", "num_images": 1500, "fingerprint": "f"}
    usual |= {"num_inference_steps": 10, "timestep_spacing": "leading", "trajectory": None, "eta": 1.0, "seed": 0}
    usual |= {"num_samples": 50, "hand_off": "uint8", "extractor": {"name": "pixels"}, "reference": reference}
    return {**usual, **more, "value": value}
