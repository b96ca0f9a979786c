"""Images from their own seeds: the same in every batch and on every process, kept over kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerator import is_installed
from diffusers import DDIMScheduler, UNet2DModel
from networks import tiny_scheduler
from networks import tiny_unet as small_unet
from PIL import Image
from training import TORCHRUN, finish, forget_accelerator, run_here, start, weights

from ddpm_ext import DIGITS, DDPMExtPipeline, DDPMExtScheduler
from ddpm_ext.cli.arguments import parse_options
from ddpm_ext.errors import UserError
from ddpm_ext.pipelines.sampling import SampleConfig, make_grid, sample_to_folder, save_png
from ddpm_ext.pipelines.seeds import SamplingStopped, sample_images
from ddpm_ext.signals import Stopped
from ddpm_ext.training.config import ReconstructConfig
from ddpm_ext.training.outputs.reconstruct import reconstruct


@pytest.fixture
def pipeline(tiny_unet: Any) -> DDPMExtPipeline:
    pipe = DDPMExtPipeline(tiny_unet, DDPMExtScheduler(variance_type="fixed_large"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def saved(pipeline: DDPMExtPipeline, tmp_path: Path) -> Path:
    pipeline.save_pretrained(str(tmp_path / "pipeline"))
    return tmp_path / "pipeline"


def drawn(pipeline: DDPMExtPipeline, seeds: list[int], batch_size: int) -> np.ndarray:
    return np.concatenate(list(sample_images(pipeline, seeds, batch_size=batch_size, num_inference_steps=5)))


@pytest.mark.parametrize("bits", [8, 16])
def test_levels_are_the_nearest_to_the_pipelines_images(pipeline: DDPMExtPipeline, bits: int) -> None:
    (ours,) = sample_images(pipeline, [5, 6], batch_size=2, num_inference_steps=5, bits=bits)
    seeds = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    images: Any = pipeline(2, generator=seeds, num_inference_steps=5, output_type="np")
    assert np.abs(ours - images.images * np.float64(2**bits - 1)).max() <= 0.5 + 1e-2  # float32 at 16 bits


def sample(model: Path, folder: Path, **changes: Any) -> int:
    forget_accelerator()
    given = {"num_samples": 5, "batch_size": 2, "num_inference_steps": 4, "cpu": not is_installed(), **changes}
    return sample_to_folder(SampleConfig(model=str(model), output_dir=str(folder), **given))


def read(folder: Path) -> dict[str, np.ndarray]:
    images = {}
    for path in sorted(folder.glob("0*.png")):
        with Image.open(path) as image:
            images[path.name] = np.asarray(image)
    return images


def test_an_image_is_that_of_its_seed_in_every_batch(pipeline: DDPMExtPipeline) -> None:
    whole = drawn(pipeline, [3, 4, 5, 6, 7], 5)
    assert whole.dtype == np.uint8 and whole.shape == (5, 8, 8, 1)
    for batch_size in (1, 2, 3):
        cut = drawn(pipeline, [3, 4, 5, 6, 7], batch_size)
        assert np.abs(cut.astype(int) - whole.astype(int)).max() <= 1  # a network's sums may round another way
    by_hand = pipeline(generator=torch.Generator().manual_seed(6), num_inference_steps=5, output_type="np").images
    assert np.abs((by_hand[0] * 255).round() - whole[3]).max() <= 1
    assert len({image.tobytes() for image in whole}) == 5


def test_a_folder_is_filled_and_what_is_there_is_kept(saved: Path, tmp_path: Path) -> None:
    assert sample(saved, tmp_path / "out", num_samples=3) == 0
    first = read(tmp_path / "out")
    assert list(first) == ["000000.png", "000001.png", "000002.png"]
    written = (tmp_path / "out" / "000001.png").stat().st_mtime_ns
    (tmp_path / "out" / "000002.png").unlink()
    assert sample(saved, tmp_path / "out", num_samples=5) == 0
    assert (tmp_path / "out" / "000001.png").stat().st_mtime_ns == written
    second = read(tmp_path / "out")
    assert len(second) == 5 and all(np.array_equal(second[name], first[name]) for name in first)
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.size[0] > 100
    with pytest.raises(UserError, match=r"other settings \(seed 0 -> 9\)"):
        sample(saved, tmp_path / "out", seed=9)


def test_files_deeper_than_the_networks_images_have_a_grid_of_8_bits(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample(saved, tmp_path / "out", num_samples=1, bits=16)
    assert capsys.readouterr().out.rstrip().endswith("grid.png (drawn at 8 bits)")


def test_images_of_other_weights_schedulers_or_options_are_refused(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sample(saved, out)
    before = read(out)
    other = DDPMExtPipeline.from_pretrained(saved)
    with torch.no_grad():
        next(other.unet.parameters()).add_(1e-3)
    other.save_pretrained(str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"other settings \(weights '\w{16}' -> '\w{16}'\)"):
        sample(tmp_path / "other", out)
    again = DDPMExtPipeline.from_pretrained(saved)
    DDPMExtPipeline(again.unet, DDIMScheduler.from_config(again.scheduler.config)).save_pretrained(
        str(tmp_path / "ddim")
    )
    with pytest.raises(UserError, match="scheduler's class DDPMExtScheduler -> DDIMScheduler"):
        sample(tmp_path / "ddim", out)
    with pytest.raises(UserError, match="dtype 'float32' -> 'bfloat16'"):
        sample(saved, out, dtype="bfloat16")
    # The same weights anew at the same path are the old path's images no longer; elsewhere they are the same.
    shutil.rmtree(saved)
    shutil.copytree(tmp_path / "other", saved)
    with pytest.raises(UserError, match="weights"):
        sample(saved, out)
    again.save_pretrained(str(tmp_path / "renamed"))
    assert sample(tmp_path / "renamed", out, num_samples=6, batch_size=3) == 0
    assert all(np.array_equal(read(out)[name], image) for name, image in before.items()) and len(read(out)) == 6


def test_a_record_that_names_no_weights_is_settled_by_its_first_image(saved: Path, tmp_path: Path) -> None:
    """Folders of the version before samples.json held hashes: they go on, but not with another model."""
    out = tmp_path / "out"
    sample(saved, out, num_samples=2)
    former = {"model": "elsewhere", "seed": 0, "num_inference_steps": 4, "class_label": None, "dtype": "float32"}
    (out / "samples.json").write_text(json.dumps(former))
    other = DDPMExtPipeline.from_pretrained(saved)
    with torch.no_grad():
        other.unet.conv_out.bias.add_(0.3)
    other.save_pretrained(str(tmp_path / "other"))
    with pytest.raises(UserError, match="weights None -> "):
        sample(tmp_path / "other", out)
    (out / "000000.png").rename(tmp_path / "kept.png")  # the first that is there decides
    assert sample(saved, out) == 0
    assert (out / "000000.png").read_bytes() == (tmp_path / "kept.png").read_bytes()
    assert "weights" in json.loads((out / "samples.json").read_text())


def test_without_a_number_of_steps_the_chain_is_the_models_own(tiny_unet: Any, tmp_path: Path) -> None:
    scheduler = DDPMExtScheduler(num_train_timesteps=60, beta_end=0.2)
    DDPMExtPipeline(tiny_unet, scheduler).save_pretrained(str(tmp_path / "short"))
    sample(tmp_path / "short", tmp_path / "own", num_inference_steps=None)
    sample(tmp_path / "short", tmp_path / "named", num_inference_steps=60)
    assert json.loads((tmp_path / "own" / "samples.json").read_text())["num_inference_steps"] == 60
    assert all(np.array_equal(image, read(tmp_path / "named")[name]) for name, image in read(tmp_path / "own").items())
    with pytest.raises(UserError, match="must be one of 3, 4, 5, 6, 8, 10, for which a solver was fitted"):
        sample(DIGITS, tmp_path / "digits", num_inference_steps=None)


@pytest.mark.parametrize("changes", [{"num_inference_steps": 2000}, {"class_label": "3"}])
def test_a_start_that_fails_leaves_nothing(changes: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        sample(saved, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()
    with pytest.raises((ValueError, OSError)):
        sample(tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_that_no_png_holds_are_arrays_beside_a_preview(tiny_unet: Any, tmp_path: Path) -> None:
    unet = UNet2DModel(**{**tiny_unet.config, "in_channels": 6, "out_channels": 6})
    DDPMExtPipeline(unet, DDPMExtScheduler()).save_pretrained(str(tmp_path / "six"))
    assert sample(tmp_path / "six", tmp_path / "out", num_samples=3) == 0
    pipe = DDPMExtPipeline.from_pretrained(tmp_path / "six")
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(generator=torch.Generator().manual_seed(1), num_inference_steps=4, output_type="np").images[0]
    there = np.load(tmp_path / "out" / "000001.npy")
    assert there.dtype == np.uint8 and there.shape == (8, 8, 6)
    assert np.abs(there - (drawn * 255).round()).max() <= 1
    assert np.array_equal(read(tmp_path / "out")["000001.png"], there[..., 0])
    (tmp_path / "out" / "000001.npy").unlink()  # the preview alone is no image
    assert sample(tmp_path / "six", tmp_path / "out", num_samples=3) == 0
    assert np.array_equal(np.load(tmp_path / "out" / "000001.npy"), there)


def test_a_stop_keeps_what_is_done_and_the_same_command_continues(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = DDPMExtScheduler.step, []

    def stopping(self: DDPMExtScheduler, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:  # in the second batch
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(DDPMExtScheduler, "step", stopping)
    with pytest.raises(Stopped, match=r"The images in .*out are kept; the same command continues"):
        sample(saved, tmp_path / "out")
    assert list(read(tmp_path / "out")) == ["000000.png", "000001.png"]
    monkeypatch.setattr(DDPMExtScheduler, "step", step)
    assert sample(saved, tmp_path / "out") == 0
    assert len(read(tmp_path / "out")) == 5


def test_polling_stops_within_a_batch(pipeline: DDPMExtPipeline) -> None:
    with pytest.raises(SamplingStopped):
        list(sample_images(pipeline, [0], batch_size=1, num_inference_steps=30, poll=lambda: True))


def test_a_grid_shows_every_image_in_its_place() -> None:
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 3), np.uint8)
    grid = make_grid(images, min_side=8)
    assert grid.shape == (2 * 12, 3 * 16, 3)  # twice 4x6, two grey lines around each
    for i in range(5):
        row, column = divmod(i, 3)
        assert (grid[12 * row + 2 : 12 * row + 10, 16 * column + 2 : 16 * column + 14] == i).all()
    assert (grid[12:, 32:] == 128).all()


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA"), (5, "L")])
def test_a_picture_of_any_channels_is_written(channels: int, mode: str, tmp_path: Path) -> None:
    save_png(np.zeros((2, 2, channels), np.uint8), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == mode
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_wrong_options_are_sentences() -> None:
    with pytest.raises(ValueError, match=r"no option --num_sample. Did you mean --num_samples\?"):
        parse_options(SampleConfig, "", ["--model", "a", "--num_sample", "3"])
    with pytest.raises(ValueError, match="arguments are required: --model"):
        parse_options(SampleConfig, "", [])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        parse_options(SampleConfig, "", ["--model", "a", "--batch_size", "0"])


def test_another_width_is_reconstructed_from_a_finished_run(tmp_path: Path) -> None:
    widths = {"ema": "power_function", "ema_snapshot_steps": 2, "max_train_steps": 24, "checkpointing_steps": 24}
    assert run_here(tmp_path / "run", **widths, ema_sigma_rel=[0.05, 0.2]) == 0
    assert run_here(tmp_path / "tracked", **widths, ema_sigma_rel=[0.1]) == 0
    config = ReconstructConfig(run=str(tmp_path / "run"), sigma_rel=0.1)
    assert reconstruct(config) == 24
    rebuilt = DDPMExtPipeline.from_pretrained(tmp_path / "run" / "pipeline-0.1").unet.state_dict()
    wanted, other = weights(tmp_path / "tracked", 24, "ema"), weights(tmp_path / "run", 24, "ema")
    error = sum(float((rebuilt[name] - wanted[name]).square().sum()) for name in wanted)
    apart = sum(float((other[name] - wanted[name]).square().sum()) for name in wanted)
    assert error < 0.01 * apart  # far nearer to the tracked average than the stored one is
    with pytest.raises(UserError, match="needs snapshots/ and pipeline/"):
        reconstruct(ReconstructConfig(run=str(tmp_path / "none"), sigma_rel=0.1))


@pytest.mark.slow
def test_two_processes_make_the_same_images(saved: Path, tmp_path: Path) -> None:
    assert sample(saved, tmp_path / "one", num_samples=7) == 0
    words = ["scripts/sample.py", "--model", str(saved), "--output_dir", str(tmp_path / "two"), "--num_samples", "7"]
    code, output = finish(start([*words, "--num_inference_steps", "4", "--cpu"], [*TORCHRUN, "2"]))
    assert code == 0, output
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert list(one) == list(two)
    assert all(np.abs(one[name].astype(int) - two[name].astype(int)).max() <= 1 for name in one)


@pytest.mark.parametrize(
    ("classes", "word", "sentence"),
    [
        (3, None, r"class-conditional: pass class_labels \(--class_label\)"),
        (3, "9", r"--class_label must be a number in 0\.\.2, got 9\."),
        (3, "cat", r"--class_label must be a number in 0\.\.2, got 'cat'"),
        (None, "1", r"not trained with class labels: leave class_labels \(--class_label\) out"),
    ],
)
def test_a_class_that_does_not_fit_is_told_by_the_name_of_the_option(
    classes: int | None, word: str | None, sentence: str, tmp_path: Path
) -> None:
    DDPMExtPipeline(small_unet(num_class_embeds=classes), tiny_scheduler()).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=sentence):
        sample(tmp_path / "model", tmp_path / "images", class_label=word)
