"""The scores of a run as its card tells them: entries of the model-index, and a line of provenance for each command."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel
from huggingface_hub import EvalResult

from ..evaluation.report import NAMES, data_words, sampler_words
from ..evaluation.results import Provenance, Result, read_results
from ..pipelines.identity import weights_hash

__all__ = ["TASK", "command_words", "model_index", "provenance_lines", "results_of"]
logger = logging.getLogger(__name__)

TASK = "unconditional-image-generation"
_TYPES = {"bpd": "bits_per_dim", "rate_distortion": "distortion_rmse", "is": "inception_score"}
_NOT_CONDITIONS = ("value", "parts", "rows", "certificate", "metric", "model")


def results_of(path: Path, network: Path) -> list[Result]:
    """Return the results in an eval.json or calibration.json that were measured on a network's weights.

    Args:
        path: The file; it may be missing.
        network: Folder of the network.
    """
    results = read_results(path)
    if not results:
        return []
    # low_cpu_mem_usage would patch torch for other threads, too, and a push may run beside training.
    unet: Any = UNet2DModel.from_pretrained(str(network), low_cpu_mem_usage=False)
    weights = weights_hash(unet)
    own = [result for result in results if result.weights == weights]
    if len(own) < len(results):
        logger.warning(
            "%d of %d results in %s are of other weights than pipeline/ and are left out of the card: measure again.",
            len(results) - len(own),
            len(results),
            path,
        )
    return own


def model_index(results: Iterable[Result]) -> list[EvalResult] | None:
    """Return the entries of the model-index: one per number, with how it was measured in its name and arguments."""
    return [entry for result in results for entry in _entries(result)] or None


def _entries(result: Result) -> list[EvalResult]:
    dataset = result.dataset or result.reference
    assert dataset is not None
    arguments = {name: value for name, value in result.to_json().items() if name not in _NOT_CONDITIONS}
    if (made := result.provenance) is not None:
        arguments |= {"commit": made.commit, "hardware": made.hardware or None, "date": made.date or None}
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=dataset.name,
            dataset_name=dataset.name,
            dataset_split=dataset.split,
            metric_type=kind,
            metric_value=float(f"{value:.7g}"),
            metric_name=name,
            metric_args={name: value for name, value in arguments.items() if value is not None},
        )
        for kind, name, value in _numbers(result)
        if math.isfinite(value)
    ]


def _numbers(result: Result) -> list[tuple[str, str, float]]:
    """Return (type, name with conditions, value) of each number of a result."""
    metric, how = result.metric, _conditions(result)
    if metric == "prdc":
        return [(name, f"{name} ({how})", value) for name, value in (result.parts or {}).items()]
    name, kind = NAMES.get(metric, metric.replace("_", " ")), _TYPES.get(metric, metric)
    if metric == "fid" and (result.extractor or {}).get("name") != "inception":
        kind = "frechet_distance"  # FID is of Inception's features alone
    return [(kind, f"{name} ({how})", result.value)]


def _conditions(result: Result) -> str:
    """Return how a result was measured, in words."""
    steps = f"{result.num_inference_steps} steps"
    if result.dataset is not None:
        return f"{result.variance_type}, {steps}, {data_words(result.dataset)}"
    assert result.extractor is not None and result.reference is not None
    return (
        f"{result.extractor['name']}, {result.num_samples:,} samples of {sampler_words(result)} in {steps}, to "
        f"{data_words(result.reference)}"
    )


def provenance_lines(results: Iterable[Result]) -> list[str]:
    """Return one line per evaluation command: what was run, on which weights, with which code, where and when."""
    lines = [_provenance_line(result, result.provenance) for result in results if result.provenance is not None]
    return list(dict.fromkeys(lines))


def _provenance_line(result: Result, made: Provenance) -> str:
    hardware, version = made.hardware, (made.versions or {}).get("ddpm-ext")
    cores = f", {hardware['cores']} cores" if hardware.get("cores") else ""
    code = [*([version] if version else []), *([f"at commit {made.commit}"] if made.commit else [])]
    parts = (
        f"`{command_words(made.command)}`" if made.command else None,
        None if result.averaged is None else "averaged weights" if result.averaged else "weights as trained",
        None if result.seed is None else f"seed {result.seed}",
        f"weights {result.weights}" if result.weights else None,
        f"ddpm_ext {' '.join(code)}" if code else None,  # a checkout knows the commit alone
        hardware.get("gpu") or (f"{hardware['processor']}{cores}" if hardware.get("processor") else None),
        (made.date or "")[:10],
    )
    return ", ".join(str(part) for part in parts if part)


def command_words(words: Sequence[str]) -> str:
    """Return a command line without the folders of the machine that it ran on."""
    return " ".join(re.sub(r"(^|(?<==))/\S*/(?=\S)", "", word) for word in words)
