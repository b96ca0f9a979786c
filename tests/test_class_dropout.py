"""Training with the class left out for a share of the images: what the network is told, and what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from training import options, run_here

from ddpm_ext.cli.arguments import parse_train_config
from ddpm_ext.errors import UserError
from ddpm_ext.models.classes import classes_of
from ddpm_ext.pipelines.ddpm import DDPMExtPipeline
from ddpm_ext.training.config import TrainConfig


def test_the_share_is_told_the_null_label_and_the_others_their_own(tmp_path: Path, monkeypatch: Any) -> None:
    """Of 3 updates of 64 digits at p = 0.3 some 58 get label 10; no other label changes, whatever the micro-batch."""
    told: dict[int, list[torch.Tensor]] = {}
    forward = UNet2DModel.forward

    def listen(self: UNet2DModel, x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor, **options: Any) -> Any:
        if self.training:
            told[size].append(class_labels.clone())
        return forward(self, x, t, class_labels=class_labels, **options)

    monkeypatch.setattr(UNet2DModel, "forward", listen)
    for dropout, size in ((0.0, 1), (0.3, 64), (0.3, 16)):
        told[size] = []
        micro = {"train_batch_size": max(size, 16), "global_batch_size": 64, "max_train_steps": 3}
        changes = {"class_conditional": True, "class_dropout": dropout or None, **micro}
        assert run_here(tmp_path / f"{dropout}-{size}", **changes) == 0
    without, whole, parts = (torch.cat(told[size]) for size in (1, 64, 16))
    dropped = whole == 10
    assert torch.equal(whole, parts) and torch.equal(whole[~dropped], without[~dropped])
    assert without.max() == 9 and 38 <= dropped.sum() <= 78


def test_the_exported_network_knows_its_null_label_and_is_guided(tmp_path: Path) -> None:
    given = {"class_conditional": True, "class_dropout": 0.1, "use_ema": "false", "lr_warmup_steps": 0}
    assert run_here(tmp_path / "run", max_train_steps=2, **given) == 0
    pipeline = DDPMExtPipeline.from_pretrained(tmp_path / "run")
    pipeline.set_progress_bar_config(disable=True)
    classes = classes_of(pipeline.unet.config)
    assert classes is not None and (classes.number, classes.null_label) == (10, 10)
    assert pipeline.unet.class_embedding.weight.shape[0] == 11
    made: list[torch.Tensor] = []
    for scale in (0.0, 1.0):
        asked: dict[str, Any] = {"class_labels": [0, 9], "guidance_scale": scale, "num_inference_steps": 2}
        generator = torch.Generator().manual_seed(0)
        made.append(pipeline(2, generator=generator, output_type="pt", **asked).images)  # pyright: ignore
    assert torch.isfinite(made[1]).all() and not torch.equal(*made)


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_a_share_is_at_least_0_and_below_1(p: float) -> None:
    with pytest.raises(ValueError, match="class_dropout must be"):
        TrainConfig(max_train_steps=1, class_conditional=True, class_dropout=p)


def test_without_classes_it_would_have_no_effect_and_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="class_dropout"):
        parse_train_config(options(tmp_path, class_dropout=0.1))
