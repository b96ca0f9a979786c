"""Evaluation during training: logged, repeatable, without effect on the run, and its best weights kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from training import assert_bitwise_equal, forget_accelerator, options, run_here

from ddpm_ext.cli.arguments import parse_train_config
from ddpm_ext.data.dataset import load_images
from ddpm_ext.evaluation.bound.bits_per_dim import bits_per_dim
from ddpm_ext.evaluation.features.extractors import make_extractor
from ddpm_ext.pipelines.ddpm import DDPMExtPipeline
from ddpm_ext.run_dir import RunDir
from ddpm_ext.training.outputs.export import is_better
from ddpm_ext.training.outputs.validation import Validation, ValidationOptions

EVALUATED = {
    "eval_steps": 4,
    "eval_samples": 6,
    "eval_num_inference_steps": 3,
    "eval_split": "test",
    "eval_max_images": 40,
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ddpm_ext.evaluation.features.reference.default_cache", lambda: tmp_path / "references")


def test_scores_are_logged_the_best_weights_kept_and_the_run_is_the_same(tmp_path: Path) -> None:
    assert run_here(tmp_path / "plain") == 0
    assert run_here(tmp_path / "watched", **EVALUATED) == 0
    plain, watched = RunDir(tmp_path / "plain"), RunDir(tmp_path / "watched")
    assert_bitwise_equal(plain.path, watched.path, 12)

    scores = {record["update"]: record for record in watched.read_log() if "eval/fid" in record}
    assert sorted(scores) == [4, 8, 12]
    best = json.loads((watched.best_record).read_text())
    assert best["update"] == min(scores, key=lambda update: scores[update]["eval/fid"])
    assert best["fid"] == scores[best["update"]]["eval/fid"]
    assert best["bits_per_dim"] == scores[best["update"]]["eval/bits_per_dim"]

    forget_accelerator()
    sets = (load_images("digits", split=split, max_images=40) for split in ("train", "test"))
    kept = DDPMExtPipeline.from_pretrained(watched.best)
    measure = Validation(
        *sets,
        make_extractor("pixels"),
        Accelerator(cpu=True),
        ValidationOptions(num_samples=6, num_inference_steps=3, batch_size=8),
    )
    again = measure(kept.unet, kept.scheduler)
    assert again["fid"] == pytest.approx(best["fid"], rel=1e-4)
    assert again["bits_per_dim"] == pytest.approx(best["bits_per_dim"], rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*x_T:UserWarning")  # the linear betas of 20 steps leave an image in x_T
def test_of_a_short_chain_every_step_is_judged_and_image_i_is_drawn_from_seed_plus_i(tmp_path: Path) -> None:
    """Both scores measured again by hand; of longer chains fifty steps are drawn."""
    given = {**EVALUATED, "eval_samples": 100, "ddpm_num_steps": 20, "ddpm_num_inference_steps": 20, "seed": 5}
    assert run_here(tmp_path / "short", **given) == 0
    run = RunDir(tmp_path / "short")
    best, kept = json.loads(run.best_record.read_text()), DDPMExtPipeline.from_pretrained(run.best)
    kept.set_progress_bar_config(disable=True)

    held_out = load_images("digits", split="test", max_images=40).batch(range(40)).pixels
    bits = bits_per_dim(kept.unet, kept.scheduler, held_out, generator=seeds(5, 40)).total.mean()
    assert best["bits_per_dim"] == pytest.approx(bits.item(), rel=1e-5)  # float32 of the network, in other batches

    images = kept(batch_size=100, generator=seeds(5, 100), num_inference_steps=3, output_type="np").images
    made = (images * 255).round().reshape(100, 64) / 255
    real = load_images("digits", max_images=40).batch(range(40)).pixels.reshape(40, 64).numpy() / 255
    overlap = np.sqrt(np.linalg.eigvals(np.cov(real.T) @ np.cov(made.T)).real.clip(0)).sum()
    distance = ((real.mean(0) - made.mean(0)) ** 2).sum() + np.cov(real.T).trace() + np.cov(made.T).trace()
    assert best["fid"] == pytest.approx(distance - 2 * overlap, rel=1e-3)  # a pixel may round to the next grey level


def seeds(first: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def test_a_score_is_better_below_the_best_so_far(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert is_better(run, {"fid": 9.0}, "fid")
    run.best_record.write_text('{"update": 3, "fid": 5.0}')
    assert is_better(run, {"fid": 4.9}, "fid")
    assert not is_better(run, {"fid": 5.0}, "fid")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"eval_samples": 10}, "--eval_samples has an effect only with --eval_steps"),
        ({"eval_steps": 4, "eval_samples": 1}, "eval_samples must be at least 2"),
        ({"eval_steps": 4, "eval_metric": "bits_per_dim"}, "needs the held-out split"),
        ({"eval_steps": 0}, "eval_steps must be at least 1"),
    ],
)
def test_wrong_options_are_sentences(changes: dict[str, object], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse_train_config(options(tmp_path / "x", **changes))
