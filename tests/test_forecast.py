"""A forecast counts what the papers and a real pass say, and allocates nothing."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor

from ddpm_ext.models.unet import UNET_PRESETS
from ddpm_ext.run_dir import RunError
from ddpm_ext.training.plan.forecast import ACCELERATORS, GIB, forecast, forecast_lines, pass_costs
from ddpm_ext.training.plan.summary import amount, duration
from ddpm_ext.training.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(UNET_PRESETS["cifar10-tiny"].config)


def test_the_papers_network_costs_37_3_gflop_per_training_image() -> None:
    found = forecast(dataclasses.replace(PRESETS["cifar10"].config, max_train_steps=1000), "h100")
    assert found.costs.flops_per_image / 1e9 == pytest.approx(37.3, abs=0.05)
    assert found.weights / GIB == pytest.approx(0.133, abs=5e-4)  # 35,746,307 weights of 4 bytes
    assert found.adam == 2 * found.weights and found.averages == found.weights == found.gradients
    assert found.images_per_second == pytest.approx(0.2 * 66.9e12 / 37.324e9, rel=1e-3)
    assert found.hours == pytest.approx(1000 * 128 / found.images_per_second / 3600)


def test_memory_and_work_of_a_pass_grow_with_the_batch() -> None:
    one, two = pass_costs(TINY, 8), pass_costs(TINY, 16)
    assert two.flops == 2 * one.flops
    assert two.peak / one.peak == pytest.approx(2, rel=0.02)


def test_checkpointing_costs_work_and_saves_memory() -> None:
    plain, checkpointed = pass_costs(TINY, 8), pass_costs(TINY, 8, gradient_checkpointing=True)
    assert plain.flops < checkpointed.flops <= 4 / 3 * plain.flops  # at most the forward pass once more
    assert checkpointed.kept < 0.6 * plain.kept and checkpointed.peak < plain.peak


def test_the_lines_say_what_fits() -> None:
    config = dataclasses.replace(PRESETS["cifar10-small"].config, mixed_precision="bf16")
    text = "\n".join(
        forecast_lines(
            forecast(dataclasses.replace(config, forecast_processes=2, dry_run=True, forecast="l4")), price_per_hour=2.0
        )
    )
    for said in ("2 x NVIDIA L4 24 GB", "GFLOP per training image", "fits into 22.5 GiB", "--gradient_checkpointing"):
        assert said in text
    assert "at 20% of 121 TFLOP/s (bf16)" in text and "20,000 updates" in text and "at 2 an hour" in text


def test_the_lines_say_what_is_assumed_and_a_short_run_is_in_minutes() -> None:
    config = dataclasses.replace(PRESETS["cifar10-small"].config, max_train_steps=1, train_data_dir=None)
    text = "\n".join(forecast_lines(forecast(config, "h100"), price_per_hour=0.01))
    assert "assumed     cifar10-small, on images of 32 x 32 and 3 channels; the data are not opened" in text
    assert "1 process, passes of" in text and "whole run   1 update: " in text
    assert " minutes, without sample grids" in text and "0.00 at" not in text and "e-" in text.splitlines()[-1]


@pytest.mark.parametrize("share", [1.01, 20])
def test_more_than_the_whole_of_a_peak_is_refused(share: float) -> None:
    config = dataclasses.replace(PRESETS["digits"].config, dry_run=True, forecast="l4", forecast_utilisation=share)
    with pytest.raises(RunError, match=f"above 0 and at most 1, got {share:g}"):
        forecast(config)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(PRESETS["digits"].config, dataset_name=None, train_data_dir=str(tmp_path / "none"))
    with pytest.raises(RunError, match=r"there is none at .*none"):
        forecast(config, "l4")


@pytest.mark.parametrize(
    ("hours", "said"),
    [(1234.5, "1,234.50 hours"), (0.01, "0.01 hours"), (0.006, "0.36 minutes"), (0.00001, "0.0006 minutes")],
)
def test_a_duration_is_never_nought(hours: float, said: str) -> None:
    assert duration(hours) == said
    assert (amount(3.5), amount(0.0042), amount(0)) == ("3.50", "0.0042", "0.00")


def test_an_unknown_machine_is_refused() -> None:
    with pytest.raises(RunError, match="h100"):
        forecast(PRESETS["digits"].config, "h1000")
    assert all(card.memory_gib > 0 and card.bf16 >= card.tf32 >= card.fp32 for card in ACCELERATORS.values())


@pytest.mark.parametrize("name", ["cifar10", "cifar10-tiny"])
def test_what_a_pass_keeps_is_what_autograd_saves(name: str) -> None:
    """Real tensors: the storages that `saved_tensors_hooks` sees, without the weights."""
    network = {**UNET_PRESETS[name].config, "dropout": 0.1}
    unet = UNet2DModel(**network)
    weights = {weight.untyped_storage()._cdata for weight in unet.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        unet(torch.randn(2, 3, 32, 32), torch.tensor([1, 999]), return_dict=False)[0].square().mean()
    total = sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in weights)
    assert pass_costs(network, 2).kept == pytest.approx(total, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--gradient_checkpointing=true"]])
@pytest.mark.parametrize(("name", "batch"), [("cifar10-tiny", 64), ("cifar10-small", 32)])
def test_on_a_cpu_forecast_and_measurement_agree_within_15_percent(
    name: str, batch: int, more: list[str], tmp_path: Path
) -> None:
    """32 x 32 in colour: the activations are most of what the process takes."""
    network = tmp_path / "network.json"
    network.write_text(json.dumps({"_class_name": "UNet2DModel", **UNET_PRESETS[name].config}))
    words = [
        "train",
        f"--model_config_name_or_path={network}",
        f"--train_batch_size={batch}",
        "--max_train_steps=10",
        "--cpu",
        f"--output_dir={tmp_path / 'run'}",
        "--dry_run=true",
        "--eval_batch_size=4",
        "--ddpm_num_inference_steps=2",
        *more,
    ]
    sizes = []
    for extra in ([], ["--forecast=cpu"]):
        command = [sys.executable, "-m", "ddpm_ext", *words, *extra]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-1500:]
        line = next(line for line in done.stdout.splitlines() if line.startswith("memory"))
        size, unit = line.split()[1:3]
        sizes.append(float(size.replace(",", "")) * (1024 if unit == "GiB" else 1))
    measured, said = sizes
    assert said == pytest.approx(measured, rel=0.15)
