"""What earlier commits wrote still loads: a Hub repository as commit c2a1574 pushed it, in tests/fixtures."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Hub
from hub_worker import Client, fixture_client, fixture_hub, pull, push, weights  # noqa: F401

from ddpm_ext import DDPMExtPipeline
from ddpm_ext.evaluation.results import read_results
from ddpm_ext.hub.pipeline_files import check_weights
from ddpm_ext.publishing.model_card import write_card

REPOSITORY = Path(__file__).parent / "fixtures" / "hub_repository"


def files() -> dict[str, bytes]:
    return {p.relative_to(REPOSITORY).as_posix(): p.read_bytes() for p in REPOSITORY.rglob("*") if p.is_file()}


def test_a_folder_of_c2a1574_draws_what_it_drew() -> None:
    check_weights(REPOSITORY)
    pipe = DDPMExtPipeline.from_pretrained(REPOSITORY)
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.scheduler.config.variance_type, len(pipe.scheduler)) == ("learned_range", 100)
    result: Any = pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=10, output_type="np")
    golden = [0.0, 0.6586894, 0.9441556, 0.9757795, 1.0, 0.8474761]  # the first pixels, printed by c2a1574
    assert result.images.flatten()[:6].tolist() == pytest.approx(golden, abs=1e-5)
    assert result.images.mean() == pytest.approx(0.641994, abs=1e-5)


def test_its_scores_and_card_are_read(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY, tmp_path / "run")
    (result,) = read_results(tmp_path / "run" / "eval.json")
    assert (result.metric, result.value) == ("bpd", 9.25)
    assert write_card(tmp_path / "run", "alice/old") is not None  # the card there was rendered: it is written anew
    text = (tmp_path / "run" / "README.md").read_text()
    assert "license: apache-2.0" in text and "value: 9.25" in text and "at commit c2a1574" in text


def test_a_repository_of_c2a1574_is_pulled_and_pushed_again(hub: Hub, client: Client, tmp_path: Path) -> None:
    hub.create("alice/old")
    hub.commit("alice/old", "refs/heads/main", "pushed by c2a1574", files())
    assert client(pull, "alice/old", str(tmp_path / "cache"))["unet"] == weights(str(REPOSITORY))
    assert client(push, str(REPOSITORY), "alice/old", variant="fp16")["changed"] is False
