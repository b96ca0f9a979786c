"""What is saved loads for everyone: stock pipelines in a process of their own, with ddpm_ext imported and without it.

Two processes do all of it, since each pays the imports: in one `import ddpm_ext` fails, the other imports it first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    UNet2DModel,
)
from networks import tiny_unet
from safetensors.torch import load_file

from ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from ddpm_ext.diffusion.words import EXTENSION_KEY

STEPS = 5  # "leading" with T / STEPS whole: stock's jumps end where its next step begins only there
# Stock's float32 tables: its samples are ours to this accuracy (images in [0, 1]).
STOCK_ACCURACY = 2e-4

# Runs in a process of its own: loads every folder with stock classes, samples, saves again; warnings are errors.
STRANGER = """
import json, logging, sys, warnings
from pathlib import Path

mode, root = sys.argv[1], Path(sys.argv[2])
if mode == "without":
    sys.modules["ddpm_ext"] = None  # importing it fails
else:
    import ddpm_ext

import numpy as np
import torch
from diffusers import DDPMPipeline, DiffusionPipeline
from diffusers.pipelines import pipeline_utils
from diffusers.utils import logging as diffusers_logging

lines = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: lines.append(record.getMessage())
for name in ("diffusers", "transformers", "huggingface_hub"):
    logging.getLogger(name).addHandler(handler)
diffusers_logging.set_verbosity_warning()
warnings.simplefilter("error")
report = {}
for folder in sorted(path for path in root.iterdir() if (path / "model_index.json").exists()):
    for loader in (DDPMPipeline, DiffusionPipeline):
        lines.clear()
        entry = report.setdefault(f"{folder.name}/{loader.__name__}", {})
        word = "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"  # of older Diffusers
        options = {"variant": "fp16", word: torch.float16} if folder.name == "half" else {}
        pipe = loader.from_pretrained(folder, **options)
        pipe.set_progress_bar_config(disable=True)
        entry["classes"] = [type(pipe).__name__, type(pipe.scheduler).__name__, type(pipe.unet).__name__]
        entry["modules"] = sorted({type(part).__module__.split(".")[0] for part in (pipe, pipe.scheduler, pipe.unet)})
        entry["dtype"] = str(pipe.unet.dtype)
        entry["extension"] = pipe.scheduler.config.get("_ddpm_ext")
        try:
            images = pipe(generator=torch.manual_seed(0), num_inference_steps=5, output_type="np").images
            np.save(root / f"{folder.name}-{loader.__name__}-{mode}.npy", images)
            entry["finite"] = bool(np.isfinite(images).all())
        except Exception as error:
            entry["error"] = f"{type(error).__name__}: {error}"
        entry["warnings"] = list(lines)
    pipe.save_pretrained(root / f"{folder.name}-again-{mode}" / "x")
(root / f"{mode}.json").write_text(json.dumps(report))
"""


def unet(**config: Any) -> UNet2DModel:
    usual = {"in_channels": 3, "out_channels": 3, "block_out_channels": (4, 8), "norm_num_groups": 2}
    return tiny_unet(**{**usual, **config}).eval()


OURS: dict[str, dict[str, Any]] = {
    "plain": {},
    "options": {"variance_type": "fixed_large", "beta_schedule": "squaredcos_cap_v2", "clip_sample_range": 1.5},
    "words": {"variance_type": "fixed_large_log"},
    "small_log": {"variance_type": "fixed_small_log"},
    "betas": {"trained_betas": [0.02 * (i + 1) for i in range(30)], "num_train_timesteps": 30},
    "v": {"prediction_type": "v_prediction"},
    "learned_range": {"variance_type": "learned_range"},
    "posterior_mean": {"prediction_type": "posterior_mean"},
    "learned": {"variance_type": "learned"},
    "even": {EXTENSION_KEY: {"trajectory": "even", "eta": 0.5}},
    "analytic": {"variance_type": "analytic", EXTENSION_KEY: {"mse_eps": [0.5] * 1000}},
}
REFUSED = ["posterior_mean", "learned"]  # by stock, which has nothing like them
NEAREST = ["even", "analytic"]  # stock samples these by its own rules: another chain of the same network
SAMPLED = [*(name for name in OURS if name not in REFUSED + NEAREST), "stock", "ddim"]
LOADERS = ["DDPMPipeline", "DiffusionPipeline"]


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any) -> np.ndarray:
    return quiet(pipe)(generator=torch.manual_seed(0), num_inference_steps=STEPS, output_type="np").images


def build(name: str) -> DDPMExtPipeline:
    channels = 6 if OURS[name].get("variance_type", "").startswith("learned") else 3
    return DDPMExtPipeline(unet(out_channels=channels), DDPMExtScheduler.from_config(OURS[name]))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders saved by us and by stock, and what two strangers found in them."""
    root = tmp_path_factory.mktemp("folders")
    for name in OURS:
        build(name).save_pretrained(root / name)
    DDPMExtPipeline(unet(), DDIMScheduler(steps_offset=1)).save_pretrained(root / "ddim")
    DDPMExtPipeline(unet(), DDPMExtScheduler()).save_pretrained(root / "half", variant="fp16")
    DDPMPipeline(unet(), DDPMScheduler(variance_type="fixed_large", clip_sample_range=2.0)).save_pretrained(
        root / "stock"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    strangers = [
        subprocess.Popen([sys.executable, "-c", STRANGER, mode, str(root)], env=environment, stderr=subprocess.PIPE)
        for mode in ("without", "with")
    ]
    for stranger in strangers:
        _, errors = stranger.communicate(timeout=300)
        assert stranger.returncode == 0, errors.decode()[-4000:]
    return root


def report(root: Path, mode: str) -> dict[str, Any]:
    return json.loads((root / f"{mode}.json").read_text())


# -- stock reads ours --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["without", "with"])
def test_stock_loads_and_samples_every_folder_without_a_warning(root: Path, mode: str) -> None:
    found = report(root, mode)
    assert set(found) == {f"{name}/{loader}" for name in (*OURS, "ddim", "half", "stock") for loader in LOADERS}
    for name, entry in found.items():
        assert entry["warnings"] == [], name
        assert entry["modules"] == ["diffusers"], name
        scheduler = "DDIMScheduler" if name.startswith("ddim") else "DDPMScheduler"
        assert entry["classes"] == ["DDPMPipeline", scheduler, "UNet2DModel"], name
        if name.split("/")[0] not in REFUSED:
            assert entry.get("error") is None, name
            assert entry["finite"], name


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", SAMPLED)
def test_the_same_generator_gives_the_same_picture_in_stock_and_here(root: Path, name: str, loader: str) -> None:
    expected = draw(DDPMExtPipeline.from_pretrained(root / name))
    for mode in ("without", "with"):
        actual = np.load(root / f"{name}-{loader}-{mode}.npy")
        np.testing.assert_allclose(actual, expected, atol=STOCK_ACCURACY)
    assert expected.std() > 0.05  # a picture, not one colour


@pytest.mark.parametrize("mode", ["without", "with"])
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("posterior_mean", "prediction_type given as posterior_mean must be one of"),
        ("learned", "prediction_type given as"),
    ],
)
def test_what_stock_cannot_sample_it_refuses(root: Path, mode: str, name: str, sentence: str) -> None:
    for loader in LOADERS:
        entry = report(root, mode)[f"{name}/{loader}"]
        assert entry["error"].startswith("ValueError")
        assert sentence in entry["error"]
        assert not (root / f"{name}-{loader}-{mode}.npy").exists()


def test_stock_reads_a_half_variant_as_half(root: Path) -> None:
    assert report(root, "without")["half/DDPMPipeline"]["dtype"] == "torch.float16"
    stored = load_file(root / "half/unet/diffusion_pytorch_model.fp16.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.float16}


def test_the_config_on_disk_holds_stocks_words_and_ours_in_one_key(root: Path) -> None:
    stock_keys = set(DDPMScheduler().config) | {"_class_name", "_diffusers_version"}
    for name in OURS:
        config = json.loads((root / name / "scheduler/scheduler_config.json").read_text())
        assert set(config) <= stock_keys | {EXTENSION_KEY}, name
        assert (EXTENSION_KEY in config) == (name in ("words", "small_log", "learned", *NEAREST)), name
    words = json.loads((root / "words/scheduler/scheduler_config.json").read_text())
    assert words["variance_type"] == "fixed_large"
    assert words[EXTENSION_KEY] == {"words": {"variance_type": "fixed_large_log"}}
    analytic = json.loads((root / "analytic/scheduler/scheduler_config.json").read_text())
    assert analytic["variance_type"] == "fixed_small"
    assert analytic[EXTENSION_KEY]["mse_eps"] == [0.5] * 1000


def test_only_our_scheduler_is_renamed(root: Path) -> None:
    index = json.loads((root / "ddim/model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert json.loads((root / "ddim/scheduler/scheduler_config.json").read_text())["_class_name"] == "DDIMScheduler"


# -- we read ours and stock's ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_ours_come_back_with_every_word(root: Path, name: str) -> None:
    saved, loaded = build(name), DDPMExtPipeline.from_pretrained(root / name)
    assert type(loaded.scheduler) is DDPMExtScheduler
    for key in DDPMScheduler().config:
        if not key.startswith("_"):
            assert loaded.scheduler.config[key] == saved.scheduler.config[key], key
    assert loaded.scheduler.config.get(EXTENSION_KEY) == OURS[name].get(EXTENSION_KEY)
    np.testing.assert_allclose(draw(loaded), draw(saved), atol=1e-4)  # the loaded weights lie elsewhere in memory


@pytest.mark.parametrize("mode", ["without", "with"])
@pytest.mark.parametrize("name", [*OURS, "stock", "ddim"])
def test_the_words_survive_a_stock_pipeline_that_saves_again(root: Path, name: str, mode: str) -> None:
    folder = root / f"{name}-again-{mode}" / "x"
    first, again = (DDPMExtPipeline.from_pretrained(path) for path in (root / name, folder))
    assert type(again.scheduler) is type(first.scheduler)
    for key, value in first.scheduler.config.items():
        if key == EXTENSION_KEY or not key.startswith("_"):
            assert again.scheduler.config[key] == value, key
    again.save_pretrained(root / f"{name}-third-{mode}")
    for part in ("model_index.json", "scheduler/scheduler_config.json"):
        third = json.loads((root / f"{name}-third-{mode}" / part).read_text())
        assert third == json.loads((root / name / part).read_text()), part


def test_stock_folders_load_here_as_ours(root: Path) -> None:
    loaded = DDPMExtPipeline.from_pretrained(root / "stock")
    assert type(loaded.scheduler) is DDPMExtScheduler
    assert loaded.scheduler.config["variance_type"] == "fixed_large"
    assert loaded.scheduler.config["clip_sample_range"] == 2.0
    np.testing.assert_allclose(draw(loaded), draw(DDPMPipeline.from_pretrained(root / "stock")), atol=STOCK_ACCURACY)


def test_ours_loads_without_a_warning(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in (*OURS, "stock", "ddim"):
        DDPMExtPipeline.from_pretrained(root / name)  # Python's warnings are errors here
    assert [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


def test_the_scheduler_can_be_chosen_at_loading(root: Path) -> None:
    for scheduler in (DDIMScheduler(), DDPMExtScheduler(variance_type="fixed_large")):
        assert DDPMExtPipeline.from_pretrained(root / "plain", scheduler=scheduler).scheduler is scheduler
    turned = DDPMExtPipeline.from_pretrained(root / "plain", scheduler=DDPMScheduler(variance_type="fixed_large"))
    assert type(turned.scheduler) is DDPMExtScheduler
    assert turned.scheduler.config["variance_type"] == "fixed_large"
    other = unet(out_channels=6)
    assert DDPMExtPipeline.from_pretrained(root / "plain", unet=other).unet is other


def test_the_scheduler_loads_by_itself(root: Path) -> None:
    for name in OURS:
        ours = DDPMExtScheduler.from_pretrained(root / name, subfolder="scheduler")
        for key, value in OURS[name].items():
            assert ours.config[key] == value
    assert type(DDPMScheduler.from_pretrained(root / "words", subfolder="scheduler")) is DDPMScheduler


def test_from_pipe_goes_both_ways(root: Path) -> None:
    stock = DDPMPipeline.from_pretrained(root / "words")
    ours = DDPMExtPipeline.from_pipe(stock)
    assert type(ours) is DDPMExtPipeline
    assert type(ours.scheduler) is DDPMExtScheduler
    assert ours.scheduler.config["variance_type"] == "fixed_large_log"
    assert ours.unet is stock.unet
    assert type(stock.scheduler) is DDPMScheduler
    back = DDPMPipeline.from_pipe(ours)  # Diffusers hands our scheduler over as it is
    assert type(back) is DDPMPipeline
    np.testing.assert_allclose(draw(back), draw(stock), atol=STOCK_ACCURACY)


def test_the_generic_loader_takes_our_class_too(root: Path) -> None:
    assert type(DiffusionPipeline.from_pretrained(root / "plain")) is DDPMPipeline  # the index is stock's


def test_the_dtype_of_loading_and_saving(root: Path, tmp_path: Path) -> None:
    loaded = DDPMExtPipeline.from_pretrained(root / "plain", dtype=torch.bfloat16)
    assert loaded.unet.dtype == torch.bfloat16
    loaded.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "unet/diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
