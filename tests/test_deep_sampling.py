"""Images of any depth and number of bands from training to files: what was trained is what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import UNet2DModel
from PIL import Image

from ddpm_ext.data.dataset import load_images
from ddpm_ext.data.spec import DataSpec
from ddpm_ext.models.classes import class_options, label_number
from ddpm_ext.models.values import Values, value_options, values_of
from ddpm_ext.pipelines.ddpm import DDPMExtPipeline
from ddpm_ext.pipelines.sampling import SampleConfig, sample_to_folder, save_png
from ddpm_ext.publishing.model_card import render_card
from ddpm_ext.schedulers.ddpm import DDPMExtScheduler
from tests.training import run_here

TINY: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 4,
    "add_attention": False,
}


def pipeline_of(folder: Path, channels: int, **ours: Any) -> Path:
    unet = UNet2DModel(in_channels=channels, out_channels=channels, **TINY)
    if ours:
        unet.register_to_config(_ddpm_ext=ours)
    DDPMExtPipeline(unet, DDPMExtScheduler()).save_pretrained(str(folder))
    return folder


def sample(model: Path, folder: Path, **options: Any) -> int:
    config = SampleConfig(
        model=str(model), output_dir=str(folder), num_samples=2, num_inference_steps=2, cpu=True, **options
    )
    return sample_to_folder(config)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_png_of_sixteen_bits_holds_every_bit(channels: int, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, channels)).astype(np.uint16)
    save_png(values, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        high = np.asarray(image)  # Pillow: all of grey, the high byte of colour, grey and alpha as RGBA
    high = high[..., [0, 3]] if channels == 2 else high
    assert np.array_equal(high, values[..., 0] if channels == 1 else values >> 8)
    codecs = pytest.importorskip("imagecodecs")
    assert np.array_equal(np.atleast_3d(codecs.png_decode((tmp_path / "a.png").read_bytes())), values)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(("recorded", "asked", "bits"), [({}, None, 8), ({"bits": 12}, None, 16), ({}, 16, 16)])
def test_files_have_the_depth_of_the_network_or_the_one_asked_for(
    channels: int, recorded: dict[str, Any], asked: int | None, bits: int, tmp_path: Path
) -> None:
    model = pipeline_of(tmp_path / "model", channels, **recorded)
    assert sample(model, tmp_path / "images", bits=asked) == 0
    if channels > 4:
        values = np.load(tmp_path / "images" / "000000.npy")
        assert values.dtype == (np.uint8 if bits == 8 else np.uint16) and values.shape == (8, 8, channels)
    else:
        header = (tmp_path / "images" / "000000.png").read_bytes()[16:26]
        assert header[8] == bits and header[9] == {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    record = json.loads((tmp_path / "images" / "samples.json").read_text())
    assert record.get("bits", 8) == bits
    with Image.open(tmp_path / "images" / "grid.png") as grid:
        assert grid.mode == ["L", "LA", "RGB", "RGBA", "", "L"][channels - 1]
    if asked == 16:
        with pytest.raises(ValueError, match="bits"):
            sample(model, tmp_path / "images", bits=8)


@pytest.mark.parametrize("channels", [4, 5])
def test_previews_and_grids_show_the_bands_asked_for(channels: int, tmp_path: Path) -> None:
    model = pipeline_of(tmp_path / "model", channels)
    assert sample(model, tmp_path / "images", rgb_bands=[4, 1, 3]) == 0
    if channels == 5:
        values = np.load(tmp_path / "images" / "000001.npy")
    with Image.open(tmp_path / "images" / "000001.png") as image:
        values = np.asarray(image) if channels == 4 else values
        assert np.array_equal(np.asarray(image), values[..., [3, 0, 2]] if channels == 5 else values)
    with Image.open(tmp_path / "images" / "grid.png") as grid:  # of 2 images, 6 times enlarged, borders of 4 pixels
        shown = np.asarray(grid)[4 : 4 + 48 : 6, 56 + 4 : 56 + 52 : 6]
    assert np.array_equal(shown, values[..., [3, 0, 2]])
    with pytest.raises(ValueError, match=f"between 1 and {channels}, the bands of the images"):
        sample(model, tmp_path / "images", rgb_bands=[6, 1, 1])


@pytest.mark.parametrize(
    ("channels", "ours", "rgb_bands", "preview", "grid"),
    [
        (1, {}, None, None, "8 bits"),
        (3, {"bits": 16}, None, None, "16 bits, drawn at 8 bits"),
        (2, {"bits": 12, "value_range": [0, 4095]}, None, None, None),
        (5, {"bits": 16}, None, "16 bits; band 1 of 5 as grey", "16 bits; band 1 of 5 as grey, drawn at 8 bits"),
        (5, {}, [3, 2, 1], *["8 bits; bands 3, 2, 1 of 5 as red, green, blue"] * 2),
    ],
)
def test_images_say_their_depth_and_bands(
    channels: int, ours: Any, rgb_bands: Any, preview: Any, grid: Any, tmp_path: Path, capsys: Any
) -> None:
    grid = grid or "12 bits for values of 0 to 4095; bands 1, 2 of 2 as grey, alpha, drawn at 8 bits"
    assert sample(pipeline_of(tmp_path / "model", channels, **ours), tmp_path / "images", rgb_bands=rgb_bands) == 0
    for name, words in (("000000.png", preview), ("grid.png", grid)):
        with Image.open(tmp_path / "images" / name) as image:
            assert image.info.get("Description") == words
    assert f"({grid})" in capsys.readouterr().out


def test_samples_of_a_range_say_how_levels_become_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = pipeline_of(tmp_path / "model", 1, bits=12, value_range=[-1000, 3095])
    for _ in range(2):  # and the record of the first is that of the second
        assert sample(model, tmp_path / "images") == 0
        assert "The files hold levels: value = -1000 + level * 4095 / 65535." in capsys.readouterr().out
    record = json.loads((tmp_path / "images" / "samples.json").read_text())
    assert record["value_range"] == [-1000, 3095] and record["values"] == "value = -1000 + level * 4095 / 65535"
    with pytest.raises(ValueError, match=r"its images hold levels .*: give --value_range 0 65535"):
        load_images(train_data_dir=str(tmp_path / "images"), value_range=(-1000, 3095))
    assert len(load_images(train_data_dir=str(tmp_path / "images"), value_range=(0, 65535))) == 2


def test_a_class_is_named_by_its_folder() -> None:
    numeric = class_options(3, ["1", "10", "2"])
    assert [label_number(word, numeric) for word in ("1", "10", "2")] == [0, 1, 2]
    with pytest.raises(ValueError, match="names 1, 10, 2, got '0'"):
        label_number("0", numeric)
    named, plain = class_options(2, ["cat", "dog"]), class_options(2)
    assert (label_number("dog", named), label_number("1", named), label_number("1", plain)) == (1, 1, 1)
    with pytest.raises(ValueError, match="got 'fox'"):
        label_number("fox", named)


def test_the_depth_stands_in_the_network_s_config() -> None:
    assert value_options(8) == {} and values_of({}) == Values()
    assert values_of({"_ddpm_ext": value_options(12, (0, 4095))}) == Values(12, (0.0, 4095.0))
    with pytest.raises(ValueError, match="between 1 and 16, got 40"):
        values_of({"_ddpm_ext": {"bits": 40}})


@pytest.mark.parametrize("loss", ["simple", "vlb"])
def test_six_bands_of_twelve_bits_are_trained_recorded_and_sampled(loss: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (6, 8, 8, 6)).astype(np.uint16)
    for kind in ("a", "b"):
        (tmp_path / "set" / kind).mkdir(parents=True)
    for i, value in enumerate(values):
        np.save(tmp_path / "set" / "ab"[i % 2] / f"{i}.npy", value)
    config = {**UNet2DModel(in_channels=6, out_channels=6, **TINY).config}
    (tmp_path / "net.json").write_text(json.dumps({k: v for k, v in config.items() if not k.startswith("_")}))
    options: dict[str, Any] = {"train_data_dir": str(tmp_path / "set"), "dataset_name": None, "loss": loss}
    options |= {"model_config_name_or_path": str(tmp_path / "net.json"), "unet": None, "value_range": [0, 4095]}
    options |= {"class_conditional": True, "max_train_steps": 2, "train_batch_size": 2, "eval_batch_size": 2}
    assert run_here(tmp_path / "run", **options, rgb_bands=[6, 2, 1]) == 0
    words = "12 bits for values of 0 to 4095; bands 6, 2, 1 of 6 as red, green, blue, drawn at 8 bits"
    with Image.open(tmp_path / "run" / "samples" / "step-00000002.png") as grid:
        assert (grid.mode, grid.info["Description"]) == ("RGB", words)
    card = str(render_card(tmp_path / "run"))
    assert f"![Samples after update 2 ({words})](samples/step-00000002.png)" in card
    with pytest.raises(ValueError, match="between 1 and 6"):  # before anything is trained
        run_here(tmp_path / "other", **options, rgb_bands=[7, 2, 1])
    spec = DataSpec.from_run(tmp_path / "run" / "pipeline")
    assert spec is not None
    assert (spec.bits, spec.value_range, spec.channels, spec.class_counts) == (12, (0.0, 4095.0), 6, (3, 3))
    images = spec.load()
    batch = images.batch(range(6))
    assert np.array_equal(batch.pixels.numpy(), np.moveaxis(values[[0, 2, 4, 1, 3, 5]], -1, 1))
    unet = DDPMExtPipeline.from_pretrained(str(tmp_path / "run" / "pipeline")).unet
    assert values_of(unet.config) == Values(12, (0.0, 4095.0)) and label_number("b", unet.config) == 1
    assert sample(tmp_path / "run", tmp_path / "images", class_label="b") == 0
    assert np.load(tmp_path / "images" / "000000.npy").dtype == np.uint16


def test_the_page_shows_bands_and_takes_no_image_that_lacks_them(tmp_path: Path) -> None:
    from ddpm_ext.demo import Studio

    for channels, mode, fits in ((6, "RGB", False), (4, "RGB", False), (4, "RGBA", True), (2, "LA", True)):
        studio = Studio(str(pipeline_of(tmp_path / str(channels), channels, bits=12)))
        *_, (shown, _) = studio.generate(2, "ddpm", 0, count=2)
        assert shown.mode == {6: "L", 4: "RGBA", 2: "L"}[channels]
        if not fits:
            with pytest.raises(ValueError, match=f"the network has {channels} channels: give the network 1 or 3"):
                studio.bits(Image.new(mode, (8, 8)), num_timesteps_sampled=2)
        else:
            assert "bits/dim" in studio.bits(Image.new(mode, (8, 8)), num_timesteps_sampled=2)
