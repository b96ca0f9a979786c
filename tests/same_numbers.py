"""Print what must not change: SHA-256 of weights and samples of the digits preset, and the scores of a small eval.json.

    python tests/same_numbers.py [checkout]

It uses the scripts alone, so that any commit can be asked: 60 updates of the preset, 4 samples of 20 steps, bits/dim of
8 test digits at 20 steps and the Fréchet distance of 16 samples. One thread; the last digits depend on the processor.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def run(checkout: Path, *words: str) -> None:
    """Run a script of a checkout, quietly."""
    env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *words], cwd=checkout, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{words[0]} ended with {done.returncode}:\n{done.stderr}")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def numbers(checkout: Path, folder: Path) -> dict[str, object]:
    """Train, sample and evaluate in a folder; return checksums and scores by name."""
    model, samples, few = folder / "run" / "pipeline", folder / "samples", ["--num_inference_steps", "20", "--cpu"]
    train = [
        "--max_train_steps",
        "60",
        "--lr_warmup_steps",
        "10",
        "--cpu",
        "--eval_batch_size",
        "4",
        "--ddpm_num_inference_steps",
        "5",
    ]
    run(checkout, "scripts/train.py", *train, "--output_dir", str(folder / "run"))
    run(checkout, "scripts/sample.py", "--model", str(model), "--num_samples", "4", "--output_dir", str(samples), *few)
    measured = "--metrics bpd,fid --num_samples 16 --extractor pixels --max_bpd_images 8 --max_reference_images 200"
    words = ["--model", str(model), *measured.split(), "--output_dir", str(folder / "eval"), *few]
    run(checkout, "scripts/evaluate.py", *words)
    checkpoint = folder / "run" / "checkpoints" / "step-00000060"
    found: dict[str, object] = {path.name: sha256(path) for path in sorted(checkpoint.glob("*.safetensors"))}
    found["pipeline"] = sha256(model / "unet" / "diffusion_pytorch_model.safetensors")
    found |= {path.name: sha256(path) for path in sorted(samples.glob("0*.png"))}
    record = json.loads((folder / "eval" / "eval.json").read_text(encoding="utf-8"))
    return {**found, **scores(record)}


def scores(record: object, name: str = "") -> dict[str, float]:
    """Return every number of an eval.json but seconds, by its path in the record."""
    if isinstance(record, dict):
        parts = [scores(value, f"{name}/{key}") for key, value in record.items()]
    elif isinstance(record, list):
        parts = [scores(value, f"{name}/{i}") for i, value in enumerate(record)]
    else:
        told = isinstance(record, float) and not any(word in name for word in ("second", "time"))
        return {name: record} if told else {}  # pyright: ignore[reportReturnType]
    return {key: value for part in parts for key, value in part.items()}


if __name__ == "__main__":
    here = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve()
    with tempfile.TemporaryDirectory() as temporary:
        for name, value in numbers(here, Path(temporary)).items():
            print(name, value)
