"""The page: what its buttons do, without and with a browser, and its upload as a Space."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import Hub
from hub_worker import Client, fixture_client, fixture_hub  # noqa: F401
from networks import tiny_scheduler, tiny_unet
from PIL import Image

from ddpm_ext import DIGITS, DDPMExtPipeline, DDPMExtScheduler
from ddpm_ext.cli.commands import demo
from ddpm_ext.data.dataset import load_images
from ddpm_ext.demo import SHOWN_STEPS, SIDE, Buttons, Studio, fitted, in_a_row, make_page, space_files
from ddpm_ext.errors import UserError
from ddpm_ext.evaluation.bound.bits_per_dim import bits_per_dim
from ddpm_ext.evaluation.samplers import make_scheduler

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def model(tiny_unet: Any, tmp_path: Path) -> str:
    scheduler = DDPMExtScheduler(num_train_timesteps=100, beta_start=1e-3, beta_end=0.2)
    DDPMExtPipeline(tiny_unet, scheduler).save_pretrained(tmp_path / "pipeline")
    return str(tmp_path / "pipeline")


@pytest.fixture
def other(tmp_path: Path) -> str:
    """A class-conditional model of fewer steps."""
    unet = tiny_unet(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), num_class_embeds=3
    )
    scheduler = DDPMExtScheduler(num_train_timesteps=40, beta_start=1e-3, beta_end=0.4)
    DDPMExtPipeline(unet, scheduler).save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_generate_ends_with_what_the_pipeline_draws(model: str, sampler: Any) -> None:
    studio = Studio(model)
    shown = list(studio.generate(60, sampler, seed=3, count=2))
    assert len(shown) <= 60 // (60 // SHOWN_STEPS) + 1
    assert shown[-1][1].endswith("step 60 of 60")
    assert shown[-1][0].size == (2 * SIDE, SIDE)

    pipe: Any = DDPMExtPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler(pipe.scheduler, sampler)
    generator = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    x_0 = pipe(2, generator, num_inference_steps=60, output_type="latent").images
    assert np.array_equal(shown[-1][0], in_a_row(x_0))
    assert isinstance(studio.pipeline.scheduler, DDPMExtScheduler)


def drawn(model: str, sampler: Any, seed: int, steps: int, **labels: Any) -> Image.Image:
    """Two pictures that a pipeline of its own draws, side by side."""
    from ddpm_ext.evaluation.samplers import make_scheduler

    pipe: Any = DDPMExtPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler(pipe.scheduler, sampler)
    generator = [torch.Generator().manual_seed(seed + i) for i in range(2)]
    return in_a_row(pipe(2, generator, num_inference_steps=steps, output_type="latent", **labels).images)


def test_two_generations_at_once_do_not_disturb_each_other(model: str) -> None:
    studio = Studio(model)
    runs = [studio.generate(steps, sampler, 3, count=2) for sampler, steps in (("ddim", 20), ("ddpm", 60))]
    last: list[Any] = [next(run) for run in runs]
    for _ in range(60):  # in turn, so that the first ends within the second
        last = [next(run, former) for run, former in zip(runs, last, strict=True)]
    assert np.array_equal(last[0][0], drawn(model, "ddim", 3, 20))
    assert np.array_equal(last[1][0], drawn(model, "ddpm", 3, 60))
    assert type(studio.pipeline.scheduler) is DDPMExtScheduler
    assert len(studio.pipeline.scheduler.timesteps) == 100  # the studio's own was never set to a chain


def test_a_model_loaded_during_a_generation_keeps_its_scheduler(model: str, other: str) -> None:
    studio = Studio(model)
    run = studio.generate(20, "ddim", 3, count=2)
    next(run)
    studio.load(other)
    shown = list(run)
    assert np.array_equal(shown[-1][0], drawn(model, "ddim", 3, 20))  # goes on with the model that it began with
    assert (type(studio.pipeline.scheduler), len(studio.pipeline.scheduler)) == (DDPMExtScheduler, 40)


def test_an_interpolation_leaves_the_scheduler(model: str) -> None:
    studio = Studio(model)
    grey = Image.fromarray(np.full((8, 8), 99, np.uint8))
    studio.interpolate(grey, grey, 50, 0.5, seed=0)
    assert len(studio.pipeline.scheduler.timesteps) == 100


def test_an_empty_seed_is_0(model: str) -> None:
    studio = Studio(model)
    shown = [list(studio.generate(5, "ddpm", seed, count=1))[-1][0] for seed in (None, 0, 1)]
    assert np.array_equal(shown[0], shown[1]) and not np.array_equal(shown[0], shown[2])
    grey = Image.fromarray(np.full((8, 8), 99, np.uint8))
    between = [studio.interpolate(grey, grey, 5, 0.5, seed) for seed in (None, 0)]
    assert np.array_equal(between[0], between[1])


def test_an_interpolation_ends_at_its_pictures(model: str) -> None:
    studio = Studio(model)
    a, b = (Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (0, 255))
    ends = [np.asarray(studio.interpolate(a, b, 0, weight, seed=0)) for weight in (0, 1)]
    assert ends[0].mean() < 40 < 215 < ends[1].mean()  # one step's noise is 0.1% of the variance
    small = studio.interpolate(a.resize((20, 20)).convert("RGB"), b, 50, 0.5, seed=0)  # brought to size and channels
    assert small.size == (SIDE, SIDE)


def test_bits_of_an_uploaded_picture(model: str) -> None:
    words = Studio(model).bits(Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)), num_timesteps_sampled=5)
    assert words.startswith("at most ") and "±" in words and words.endswith("bits/dim (5 steps sampled)")


@pytest.mark.parametrize("T", [2, 20, 21])
def test_bits_of_a_process_of_few_steps(tiny_unet: Any, tmp_path: Path, T: int) -> None:
    DDPMExtPipeline(tiny_unet, DDPMExtScheduler(T, 1e-3, 0.999)).save_pretrained(tmp_path / "few")
    words = Studio(str(tmp_path / "few")).bits(Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)))
    assert words.startswith("at most ") and words.endswith("(20 steps sampled)" if T > 20 else f"(all {T} steps)")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"seed": 2**64}, r"seed must be a whole number from -2\^63 to 2\^63 - 1, got 18446744073709551616"),
        ({"seed": -(2**70)}, "seed must be a whole number from"),
        ({"seed": 0.5}, "The seed must be a whole number, got 0.5"),
        ({"steps": None}, "The number of steps must be a whole number, got None"),
        ({"steps": 2.5}, "The number of steps must be a whole number, got 2.5"),
        ({"steps": float("inf")}, "The number of steps must be a whole number, got inf"),
        ({"count": None}, "The number of images must be a whole number, got None"),
        ({"label": 1.5}, "The class must be a whole number from 0 to 2, or empty, got 1.5"),
        ({"label": True}, "The class must be a whole number from 0 to 2, or empty, got True"),
        ({"label": "1"}, "The class must be a whole number from 0 to 2, or empty, got 1"),
    ],
)
def test_numbers_that_are_none_are_refused(other: str, wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        list(Studio(other).generate(**{"steps": 2, "sampler": "ddpm", "seed": 0, **wrong}))


def test_an_interpolation_refuses_numbers_that_are_none(model: str) -> None:
    grey = Image.fromarray(np.full((8, 8), 99, np.uint8))
    for timestep, seed, sentence in ((1.5, 0, "timestep must be a whole number"), (5, 2**64, "The seed must be")):
        with pytest.raises(UserError, match=sentence):
            Studio(model).interpolate(grey, grey, timestep, 0.5, seed)  # pyright: ignore[reportArgumentType]


def test_an_upload_is_cut_as_training_cuts_it_and_not_bent(model: str, tmp_path: Path) -> None:
    """Scaled until it covers the network's size and cropped in the middle, as `load_images` does."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 40), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    trained = load_images(train_data_dir=str(tmp_path), resolution=8, channels=1).batch([0]).pixels[0]
    assert torch.equal(fitted(Studio(model).pipeline, Image.fromarray(pixels)), trained)


def as_trained(file: Path, **options: Any) -> torch.Tensor:
    """An image as training reads it from a folder of its own."""
    return load_images(train_data_dir=str(file.parent), resolution=8, **options).batch([0]).pixels[0]


@pytest.mark.parametrize("turn", [1, 3, 6, 7])
@pytest.mark.parametrize(("kind", "options"), [("jpg", {"quality": 100}), ("png", {}), ("tif", {}), ("webp", {})])
def test_an_upload_stands_upright_as_in_training(
    model: str, tmp_path: Path, turn: int, kind: str, options: dict[str, Any]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    file = tmp_path / "images" / f"a.{kind}"
    file.parent.mkdir()
    pixels = np.random.default_rng(turn).integers(0, 256, (9, 20), dtype=np.uint8)
    Image.fromarray(pixels).save(file, exif=exif, **options)
    with file.open("rb") as opened, Image.open(opened) as image:  # Pillow 13 turns a TIFF twice that it opens by path
        assert torch.equal(fitted(Studio(model).pipeline, image), as_trained(file, channels=1))


def test_an_upload_of_any_mode_is_read_as_in_training_or_refused(model: str, tmp_path: Path) -> None:
    pipeline = Studio(model).pipeline
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    cmyk = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 8, 4), dtype=np.uint8), mode="CMYK")
    deep = Image.fromarray(np.arange(0, 65536, 700, dtype=np.uint16)[:64].reshape(8, 8))
    cmyk.save(tmp_path / "a" / "a.jpg")
    deep.save(tmp_path / "b" / "b.png")
    for file in (tmp_path / "a" / "a.jpg", tmp_path / "b" / "b.png"):
        with Image.open(file) as image:
            assert torch.equal(fitted(pipeline, image), as_trained(file, channels=1))
    values = np.linspace(0, 3, 64, dtype=np.float32).reshape(8, 8)
    for image, sentence in (
        (cmyk, "must be grey or RGB, with or without alpha, got CMYK: convert it to RGB"),
        (cmyk.convert("RGB").convert("HSV"), "got HSV: convert it"),
        (Image.fromarray(values), "float32 values from 0 to 3, and this network records no range"),
        (Image.fromarray(values.astype(np.int32)), "int32 values from 0 to 3, .* give an image of 8 or 16 bits"),
    ):
        with pytest.raises(UserError, match=sentence):
            fitted(pipeline, image)


def test_an_upload_of_floats_is_read_in_the_range_of_the_network(model: str, tmp_path: Path) -> None:
    pipeline = Studio(model).pipeline
    pipeline.unet.register_to_config(_ddpm_ext={"bits": 16, "value_range": [-1, 4]})
    image = Image.fromarray(np.linspace(-1, 4, 64, dtype=np.float32).reshape(8, 8))
    image.save(tmp_path / "a.tif")
    assert torch.equal(fitted(pipeline, image), as_trained(tmp_path / "a.tif", channels=1, value_range=(-1, 4)))


def test_a_network_of_four_channels_takes_what_has_four_and_shows_all(tmp_path: Path) -> None:
    unet = tiny_unet(in_channels=4, out_channels=4)
    DDPMExtPipeline(unet, DDPMExtScheduler(100, 1e-3, 0.2)).save_pretrained(str(tmp_path / "four"))
    studio = Studio(str(tmp_path / "four"))
    assert list(studio.generate(4, "ddpm", 0, count=2))[-1][0].mode == "RGBA"
    clear = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(8, 8, 4), mode="RGBA")
    assert "bits/dim" in studio.bits(clear, num_timesteps_sampled=2)
    with pytest.raises(UserError, match="does not fit the network: it holds RGB, and the network has 4 channels: give"):
        studio.bits(clear.convert("RGB"))


def test_loading_another_model(model: str) -> None:
    studio = Studio(model)
    former = studio.pipeline
    assert "cannot be loaded" in studio.load("/no/such/folder")
    assert studio.pipeline is former
    assert studio.load(model).endswith("images of 8, 100 steps of training.")
    assert studio.pipeline is not former


def test_a_class_conditional_model(other: str) -> None:
    studio = Studio(other)
    in_turn = list(studio.generate(10, "ddpm", 3, count=2))[-1][0]
    chosen = list(studio.generate(10, "ddpm", 3, 2, count=2))[-1][0]
    assert np.array_equal(in_turn, drawn(other, "ddpm", 3, 10, class_labels=[0, 1]))
    assert np.array_equal(chosen, drawn(other, "ddpm", 3, 10, class_labels=[2, 2]))
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for label, said in ((None, 0), (0, 0), (2, 2)):
        found = bits_per_dim(
            studio.pipeline.unet,
            studio.pipeline.scheduler,
            torch.from_numpy(pixels)[None, None],
            num_timesteps_sampled=20,
            generator=torch.Generator().manual_seed(0),
            class_labels=[said],
        )
        words = studio.bits(Image.fromarray(pixels), label)
        assert words.startswith(f"at most {found.total.item():.3f} ") and f"bits/dim given class {said} (" in words
    a, b = (Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (0, 255))
    mixed = [np.asarray(studio.interpolate(a, b, 30, 0.5, 0, label)) for label in (None, 0, 2)]
    assert np.array_equal(mixed[0], mixed[1]) and not np.array_equal(mixed[0], mixed[2])
    with pytest.raises(ValueError, match="whole number from 0 to 2, or empty, got 3"):
        studio.bits(a, 3)


@pytest.fixture(scope="module")
def digits() -> Studio:
    """The page as it opens without a model: the trained network of the package."""
    return Studio(DIGITS)


def test_the_digits_of_the_package_offer_the_solvers_that_are_fitted_and_no_other(digits: Studio) -> None:
    fitted_calls = json.loads((Path(DIGITS) / "scheduler" / "scheduler_config.json").read_text())["_ddpm_ext"]
    calls = sorted(fitted_calls["solver"]["steps"], key=int)
    assert digits.samplers() == [*(f"solver {K}" for K in calls), "ddpm", "ddim"] and "3" in calls
    *_, (shown, line) = digits.generate(100, "solver 3", seed=5, count=2)
    assert line.endswith("step 3 of 3")
    pipeline = DDPMExtPipeline.from_pretrained(DIGITS)
    pipeline.scheduler = make_scheduler(pipeline.scheduler, "solver")
    generators = [torch.Generator().manual_seed(5 + i) for i in range(2)]
    drawn = pipeline(2, generators, 3, output_type="latent").images
    assert np.array_equal(np.asarray(shown), np.asarray(in_a_row(drawn)))
    with pytest.raises(UserError, match="num_inference_steps must be one of 3, 4"):
        list(digits.generate(100, "solver 7", seed=5))


def test_the_digits_of_the_package_tell_a_digit_from_noise(digits: Studio) -> None:
    real = load_images("digits", split="test").batch([0]).pixels[0, 0].numpy()
    noise = np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.uint8)
    a, b = (float(digits.bits(Image.fromarray(x)).split()[2]) for x in (real, noise))
    assert a < b / 2
    between = np.asarray(digits.interpolate(Image.fromarray(real), Image.fromarray(real), 0, 0.5, 0))
    shown = np.asarray(in_a_row(torch.from_numpy(real.astype(np.float32) / 127.5 - 1)[None, None]))
    assert np.abs(between.astype(int) - shown).mean() < 8


def test_the_command_opens_the_digits_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    class Page:
        def launch(self, **_: Any) -> None: ...

    monkeypatch.setattr("ddpm_ext.demo.make_page", lambda studio, model: opened.append(model) or Page())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert demo([]) == 0 and opened == [DIGITS]


def test_bands_are_chosen_by_number(tmp_path: Path) -> None:
    unet = tiny_unet(in_channels=6, out_channels=6)
    DDPMExtPipeline(unet, tiny_scheduler()).save_pretrained(tmp_path / "six")
    studio = Studio(str(tmp_path / "six"))
    *_, bands = studio.ranges(5, 5)
    assert bands["visible"] and "of 1 to 6" in str(bands["label"])
    pipeline = DDPMExtPipeline.from_pretrained(tmp_path / "six")
    drawn = pipeline(1, [torch.Generator().manual_seed(0)], 2, output_type="latent").images

    def shown(bands: str) -> Image.Image:
        return list(studio.generate(2, "ddpm", 0, bands=bands, count=1))[-1][0]

    for words, chosen in (("", [0]), ("5", [4]), ("3, 2,1", [2, 1, 0]), ("6 6 1", [5, 5, 0])):
        assert np.array_equal(np.asarray(shown(words)), np.asarray(in_a_row(drawn[:, chosen])))
    for words in ("7", "0", "1 2", "red", "-1"):
        with pytest.raises(UserError, match="one or three whole numbers from 1 to 6, got"):
            shown(words)


class Told(Exception):
    """In place of gradio.Error."""


def test_loading_sets_the_ranges_of_the_fields(model: str, other: str) -> None:
    buttons = Buttons(Studio(model), Told, dict)
    status, steps, timestep, label, guidance, sampler, bands = buttons.load(other, 100, 50, None)
    assert sampler == {"choices": ["ddpm", "ddim"], "value": "ddpm"} and not bands["visible"]
    assert guidance == {"visible": False, "value": 0}  # it was trained with a class for every image
    assert status.endswith("40 steps of training.")
    assert (steps, timestep) == ({"maximum": 40, "value": 40}, {"maximum": 39, "value": 39})
    assert label["visible"] and label["value"] is None and label["label"].startswith("Class, 0 to 2")
    status, steps, timestep, label, *_ = buttons.load(f"{other}/no", 30, 20, 2)  # the former one stays
    assert "cannot be loaded: There is no folder" in status
    assert (steps["value"], timestep["value"], label["value"]) == (30, 20, 2)
    _, steps, timestep, label, *_ = buttons.load(model, 30, 20, 2)
    assert (steps, timestep) == ({"maximum": 100, "value": 30}, {"maximum": 99, "value": 20})
    assert not label["visible"] and label["value"] is None


def test_a_failure_reaches_the_page_as_its_sentence(model: str, other: str) -> None:
    buttons = Buttons(Studio(model), Told, dict)
    grey = Image.fromarray(np.full((8, 8), 99, np.uint8))
    with pytest.raises(Told, match="= 100, got 101"):
        list(buttons.generate(101, "ddpm", 0, None))
    with pytest.raises(Told, match=r"timestep must be an int in 0\.\.99, got 200"):
        buttons.interpolate(grey, grey, 200, 0.5, 0, None)
    with pytest.raises(Told, match="knows no classes, got class 1: leave the field empty"):
        buttons.bits(grey, 1)
    assert buttons.bits(None, None) == "Upload an image." and buttons.interpolate(None, grey, 1, 0.5, 0, None) is None


def run_script(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """scripts/demo.py in this process, without Gradio: its exit code."""
    monkeypatch.setattr(sys, "argv", ["scripts/demo.py", *words])
    monkeypatch.setitem(sys.modules, "gradio", None)
    return runpy.run_path(str(ROOT / "scripts" / "demo.py"))["main"]()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--model {model}", "pip install 'ddpm-ext[demo]'"),
        ("--model nosuch/dir/here", "There is no folder nosuch/dir/here, and a model of the Hub is named user/model"),
        ("--model {tmp}/here", "a folder with model_index.json, and {tmp}/here holds none."),
        ("--model {model} --push_to_space a/b", "named user/model, and {model} is a path on this machine"),
        ("--model here/too --push_to_space a/b", "named user/model, and here/too is a path on this machine"),
        ("--model runs/no/pipeline --push_to_space a/b", "and runs/no/pipeline is no such name. Push it first"),
        ("--model digits --push_to_space a/b", "named user/model, and digits is no such name"),
        ("--modle {model}", "There is no option --modle. Did you mean --model?"),
        ("--port many", "Argument --port: invalid int value: 'many'"),
    ],
)
def test_the_script_says_what_is_wrong(
    words: str,
    sentence: str,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "here" / "too").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    usage = "Did you mean" in sentence or "Argument" in sentence
    assert run_script(monkeypatch, *words.format(model=model, tmp=tmp_path).split()) == (2 if usage else 1)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and sentence.format(model=model, tmp=tmp_path) in said


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # Gradio's sockets, left to the collector
def test_the_buttons_of_the_real_page(model: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", reason="no gradio (pip install ddpm-ext[demo])")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    from gradio_client import Client as PageClient  # pyright: ignore[reportMissingImports]

    page = make_page(Studio(other), other)
    page.launch(server_name="127.0.0.1", server_port=free_port(), prevent_thread_lock=True, quiet=True)
    try:
        client: Any = PageClient(page.local_url, verbose=False)
        assert client.predict(40, "ddim", None, 2, api_name="/generate")[1] == "t = 0, step 40 of 40"
        with pytest.raises(Exception, match="whole number from 0 to 2, or empty, got 7"):
            client.predict(40, "ddpm", 3, 7, api_name="/generate")
        with pytest.raises(Exception, match="greater than maximum value 40"):  # Gradio's own
            client.predict(100, "ddpm", 3, None, api_name="/generate")
        status, steps, timestep, label = client.predict(model, 40, 20, 2, api_name="/load")
        assert status.endswith("100 steps of training.")
        assert (steps["maximum"], steps["value"], timestep["maximum"]) == (100, 40, 99)
        assert not label["visible"] and label["value"] is None
        assert client.predict(100, "ddpm", 3, None, api_name="/generate")[1] == "t = 0, step 100 of 100"
    finally:
        page.close()


def push_page(repo_id: str, staging: str) -> tuple[str, bool]:
    from ddpm_ext.hub.upload import push_space

    Path(staging).mkdir(exist_ok=True)
    push = push_space(space_files("alice/digits", repo_id, Path(staging)), repo_id, token="tok-alice")
    return push.url, push.changed


def test_the_page_is_pushed_as_a_space(hub: Hub, client: Client, tmp_path: Path) -> None:
    pushed = client(push_page, "alice/digits-demo", str(tmp_path / "staging"))
    assert tuple(pushed) == (f"{hub.url}/spaces/alice/digits-demo", True)
    files = hub.head("alice/digits-demo").files
    assert b"sdk: gradio" in files["README.md"] and b"app_file: app.py" in files["README.md"]
    assert b"Studio('alice/digits')" in files["app.py"]
    assert {"gradio"} < {line.split(">")[0] for line in files["requirements.txt"].decode().split()}
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "ddpm_ext").rglob("*.py")} < files.keys()
    assert hub.requests("POST", "/api/spaces/alice/digits-demo/commit")
    assert client(push_page, "alice/digits-demo", str(tmp_path / "staging"))[1] is False
    assert len(hub.history("alice/digits-demo")) == 2


class Browser:
    """A headless Chromium, driven over the WebDriver protocol."""

    def __init__(self, port: int) -> None:
        self.base = f"http://127.0.0.1:{port}"
        chrome = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]}
        capabilities = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": chrome}}
        self.base += "/session/" + self("POST", "/session", capabilities=capabilities)["sessionId"]

    def __call__(self, method: str, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, script: str) -> Any:
        return self("POST", "/execute/sync", script=script, args=[])

    def wait(self, script: str, seconds: float = 60) -> Any:
        """The first true value of a script."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"{script} did not become true: {self.run('return document.body.innerText')}"
            time.sleep(0.3)
        return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, "the process ended before it listened"
        time.sleep(0.2)
    raise TimeoutError(f"nothing listens on port {port}")


@pytest.fixture
def browser() -> Iterator[Browser]:
    driver = shutil.which("chromedriver")
    if driver is None or shutil.which("chromium") is None:
        pytest.skip("no chromium and chromedriver (Debian: apt install chromium chromium-driver)")
    port = free_port()
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port, process)
        opened = Browser(port)
        yield opened
        opened("DELETE", "")
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.mark.slow
def test_a_click_on_generate_shows_an_image(browser: Browser, model: str) -> None:
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("no gradio (pip install ddpm-ext[demo])")
    port = free_port()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GRADIO_ANALYTICS_ENABLED": "False"}
    command = [sys.executable, "scripts/demo.py", "--model", model, "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, env=env)
    try:
        wait_for(port, process)
        browser("POST", "/url", url=f"http://127.0.0.1:{port}")
        button = "document.querySelector('button#generate, #generate button')"
        shown = "document.querySelector('#generated img')"
        browser.wait(f"return {button} !== null")
        assert browser.run(f"return {shown}") is None
        browser.run(f"{button}.click()")
        browser.wait("return document.body.innerText.includes('step 100 of 100')")
        width = browser.wait(f"return {shown} && {shown}.complete && {shown}.naturalWidth")
        assert width == 4 * SIDE
    finally:
        process.terminate()
        process.wait(timeout=20)
