"""The packaged model: half the size, offline, ours and stock's; schedulers swapped on a real network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DPMSolverMultistepScheduler
from safetensors import safe_open

import ddpm_ext
from ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, DDPMExtSolverScheduler
from ddpm_ext.data.dataset import load_images
from ddpm_ext.evaluation.features import metrics

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # stock and NumPy 2
FOLDER = Path(ddpm_ext.DIGITS)


def images(pipeline: Any, K: int, count: int = 4) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(i) for i in range(count)]
    return pipeline(count, generator=generator, num_inference_steps=K, output_type="np").images


def test_it_is_small_and_half_and_has_its_card_and_scores():
    with safe_open(FOLDER / "unet" / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 1.6e6
    entries = json.loads((FOLDER / "eval.json").read_text())["figures"]
    scores = {entry["num_inference_steps"]: entry["value"] for entry in entries}
    assert set(scores) == {3, 4, 5, 6, 8, 10} and scores[5] < 0.06
    assert "Fréchet distance" in (FOLDER / "README.md").read_text()


def test_five_calls_draw_digits():
    """As near to the training images as the card says, within what 256 samples tell."""
    pipe = DDPMExtPipeline.from_pretrained(FOLDER)
    assert type(pipe.scheduler) is DDPMExtSolverScheduler
    fake = torch.from_numpy(images(pipe, 5, 256)).flatten(1)
    pixels: Any = load_images("digits", split="train").batch(range(1500)).pixels
    real = pixels.float().flatten(1) / 255
    assert metrics.frechet_distance(*(metrics.feature_statistics(x) for x in (real, fake))) < 0.25
    with pytest.raises(ValueError, match="3, 4, 5, 6, 8, 10"):
        pipe(num_inference_steps=7)


def test_stock_diffusers_draws_with_its_own_solver(tmp_path: Path):
    stock: Any = DDPMPipeline.from_pretrained(FOLDER)
    assert type(stock.scheduler) is DPMSolverMultistepScheduler
    drawn = images(stock, 10)
    assert np.abs(drawn - images(DDPMExtPipeline.from_pretrained(FOLDER), 10)).mean() < 0.05  # of the same noises
    stock.save_pretrained(str(tmp_path))
    again = DDPMExtPipeline.from_pretrained(tmp_path)
    assert np.array_equal(images(again, 5), images(DDPMExtPipeline.from_pretrained(FOLDER), 5))


def test_schedulers_are_swapped_and_come_back():
    pipe = DDPMExtPipeline.from_pretrained(FOLDER)
    before = images(pipe, 5)
    for other in (DDPMExtScheduler, DDIMScheduler, DPMSolverMultistepScheduler):
        swapped: Any = other.from_config(pipe.scheduler.config)
        pipe.scheduler = swapped
        assert np.isfinite(images(pipe, 7)).all()
        pipe.scheduler = DDPMExtSolverScheduler.from_config(swapped.config)
        assert np.array_equal(images(pipe, 5), before)
