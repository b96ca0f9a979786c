"""What commit c2a1574 wrote, before the package had folders, loads and goes on: a run, its checkpoint, its scores.

python scripts/train.py --model_config_name_or_path network.json --max_train_steps 3 … and evaluate.py made golden/.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline
from safetensors.torch import load_file
from training import options, weights

from ddpm_ext import DDPMExtPipeline
from ddpm_ext.cli.arguments import parse_train_config
from ddpm_ext.data.spec import DataSpec
from ddpm_ext.distributed import forget_accelerator
from ddpm_ext.publishing.model_card import write_card
from ddpm_ext.run_dir import processor
from ddpm_ext.training.run import run_training

GOLDEN = Path(__file__).parent / "golden" / "c2a1574"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "run", tmp_path / "run"))


def test_its_checkpoint_goes_on_to_the_weights_that_it_went_on_to(run: Path) -> None:
    given = {"train_batch_size": 8, "lr_warmup_steps": 2, "checkpointing_steps": 3, "logging_steps": 1}
    given |= {"random_flip": True, "cpu": True, "max_train_steps": 5, "checkpoints_total_limit": 1}
    words = options(run, **given, model_config_name_or_path=GOLDEN / "network.json", eval_batch_size=2)
    forget_accelerator()
    assert run_training(parse_train_config(words)) == 0
    record = json.loads((run / "config.json").read_text())
    assert [start["update"] for start in record["starts"]] == [0, 3]
    bitwise = record["starts"][0]["hardware"]["processor"] == processor()
    expected = load_file(GOLDEN / "after-5.safetensors")
    for name, tensor in weights(run, 5).items():
        # Another processor sums in another order; Adam's first steps are of 1e-3 whatever the gradient.
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0 if bitwise else 1e-4)


def test_its_pipeline_loads_with_stock_and_with_us_and_says_what_it_was_trained_on(run: Path) -> None:
    averaged = weights(run, 3, "ema")
    for loader in (DDPMPipeline, DDPMExtPipeline):
        pipeline = loader.from_pretrained(run / "pipeline")
        assert all(torch.equal(tensor, averaged[name]) for name, tensor in pipeline.unet.state_dict().items())
        assert pipeline.scheduler.config.variance_type == "fixed_large"
    spec = DataSpec.from_run(run)
    assert spec is not None and spec.name == "digits" and spec.num_images == 1500 and spec.random_flip


def test_its_scores_stand_in_the_card(run: Path) -> None:
    (bits, distance) = json.loads((run / "eval.json").read_text())["figures"]
    write_card(run, "user/golden", None)
    card = (run / "README.md").read_text()
    assert f"{bits['value']:.2f}" in card and f"{distance['value']:.2f}" in card
