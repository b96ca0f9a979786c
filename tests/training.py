"""What the tests of training share: a run small enough for milliseconds an update, in this process or in others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from networks import TINY_UNET
from safetensors.torch import load_file
from torch import Tensor

from ddpm_ext.cli.arguments import parse_train_config
from ddpm_ext.distributed import forget_accelerator
from ddpm_ext.training.run import run_training
from ddpm_ext.training.state.checkpoint import checkpoint_name
from ddpm_ext.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
TINY: dict[str, Any] = {
    "train_batch_size": 8,
    "max_train_steps": 12,
    "checkpointing_steps": 4,
    "logging_steps": 3,
    "learning_rate": 1e-3,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 4,
    "ddpm_num_inference_steps": 3,
    "eval_batch_size": 3,
    "num_threads": 1,
}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


def options(folder: Path, **changes: Any) -> list[str]:
    """Arguments of a tiny run on the digits; a value of None leaves an option out."""
    folder.mkdir(parents=True, exist_ok=True)
    network = folder.parent / "tiny_unet.json"
    network.write_text(json.dumps(TINY_UNET))
    given = {"model_config_name_or_path": network, "output_dir": folder, **TINY, **changes}
    words: list[str] = []
    for name, value in given.items():
        if isinstance(value, (list, tuple)):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def run_here(folder: Path, **changes: Any) -> int:
    """Train in this process; the exit code."""
    forget_accelerator()
    return run_training(parse_train_config(options(folder, **changes)))


def stopping_after(count: int, number: signal.Signals = signal.SIGTERM) -> Callable[[Trainer], None]:
    """`Trainer.update` as it is now, and after update `count` a signal to this process."""
    update = Trainer.update

    def stopping(self: Trainer) -> None:
        update(self)
        self.settle()  # on a device the count is known a step later
        if self.state.update == count:
            os.kill(os.getpid(), number)

    return stopping


def start(
    words: Sequence[str], launcher: Sequence[str] = (sys.executable,), **environment: str
) -> subprocess.Popen[str]:
    """Start scripts/train.py (or another script, named first) as a user would."""
    script = words[0] if words[0].endswith(".py") else "scripts/train.py"
    rest = list(words[1:] if words[0].endswith(".py") else words)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [*launcher, script, *rest], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str], timeout: float = 240) -> tuple[int, str]:
    """Exit code and all output."""
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def weights(folder: Path, update: int, stem: str = "model") -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / checkpoint_name(update) / f"{stem}.safetensors")


def assert_bitwise_equal(a: Path, b: Path, update: int) -> None:
    """Weights, averages and moments of two runs."""
    for stem in ("model", "ema", "optimizer"):
        left, right = weights(a, update, stem), weights(b, update, stem)
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert torch.equal(tensor, right[name]), f"{stem}: {name}"


def log_without_speed(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "images_per_second"} for record in records]


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())
