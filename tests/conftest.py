"""What every test starts from: one thread, no network, a home of its own, fixed seeds."""

from __future__ import annotations

import os
import tempfile

# Before torch and the Hugging Face libraries are imported: they read these once. With more threads than free cores the
# same small run takes up to a hundred times longer, and one and two threads differ in the last digit.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", os.environ["HF_HUB_OFFLINE"])
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "Agg")
_home = tempfile.TemporaryDirectory(prefix="ddpm_ext_hf_")
os.environ.setdefault("HF_HOME", _home.name)

import random

import numpy as np
import pytest
import torch
from accelerator import is_installed

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Draw the same numbers in every test, whichever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs an accelerator where there is none, not even a simulated one."""
    if torch.cuda.is_available() or is_installed():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def tiny_unet() -> torch.nn.Module:
    """A network of two levels for 8x8 grey images that runs in milliseconds."""
    from networks import tiny_unet

    return tiny_unet()
