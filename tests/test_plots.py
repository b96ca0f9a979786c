"""Plots exist, show what they were given, and say what is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

pytest.importorskip("matplotlib", reason="matplotlib (extra plots) is not installed")

from evaluations import score, small
from networks import tiny_scheduler, tiny_unet

from ddpm_ext.data.dataset import load_images
from ddpm_ext.diffusion.images import to_uint8
from ddpm_ext.evaluation import plots
from ddpm_ext.evaluation.evaluate import evaluate
from ddpm_ext.evaluation.results import Result
from ddpm_ext.pipelines.ddpm import DDPMExtPipeline


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were saved."""
    found: list[Any] = []
    plain = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: found.append(figure) or plain(figure, path))
    return found


def pixels(n: int, value: int = 0) -> torch.Tensor:
    return torch.full((n, 1, 8, 8), value, dtype=torch.uint8)


def is_picture(path: Path) -> bool:
    with Image.open(path) as image:
        return np.asarray(image.convert("L")).std() > 0


def test_rate_and_distortion_curves_hold_the_rows(drawn: list[Any], tmp_path: Path) -> None:
    rate, distortion = torch.tensor([0.1, 0.4, 1.5]), torch.tensor([60.0, 20.0, 1.0])
    assert is_picture(plots.plot_rate_distortion([1, 500, 1000], rate, distortion, tmp_path / "a" / "x.png"))
    lines = [axes.lines[0].get_xydata().tolist() for axes in drawn[0].axes]
    assert lines[0] == [[1, 60], [500, 20], [1000, 1]]
    np.testing.assert_allclose(lines[1], [[1, 0.1], [500, 0.4], [1000, 1.5]], rtol=1e-6)
    np.testing.assert_allclose(lines[2], [[0.1, 60], [0.4, 20], [1.5, 1]], rtol=1e-6)


def test_bits_per_step_and_scores_against_steps(drawn: list[Any], tmp_path: Path) -> None:
    assert is_picture(plots.plot_bits_per_step([9, 5, 0], torch.tensor([0.1, 0.2, 1.9]), tmp_path / "x.png"))
    steps, decoder = drawn[0].axes[0].lines
    np.testing.assert_allclose(steps.get_xydata(), [[9, 0.1], [5, 0.2]], rtol=1e-6)
    np.testing.assert_allclose(decoder.get_xydata(), [[0, 1.9]], rtol=1e-6)
    curves = {"ddpm": [(1000, 3.0), (10, 40.0)], "ddim": [(10, 13.0)]}
    assert is_picture(plots.plot_against_steps(curves, "fid", tmp_path / "y.png"))
    assert drawn[1].axes[0].lines[0].get_xydata().tolist() == [[10, 40], [1000, 3]]
    assert (drawn[1].axes[0].get_xscale(), drawn[1].axes[0].get_yscale()) == ("log", "log")


def test_scores_below_zero_are_on_the_plot(drawn: list[Any], tmp_path: Path) -> None:
    plots.plot_against_steps({"ddpm": [(10, 0.01), (50, -0.002), (100, 0.0)]}, "kid", tmp_path / "x.png")
    axes = drawn[0].axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    assert axes.get_ylim()[0] < -0.002


def test_a_grid_shows_each_image_in_its_place(drawn: list[Any], tmp_path: Path) -> None:
    rows = [torch.cat([pixels(1, 10), pixels(1, 20)]), pixels(1, 30)]
    path = plots.plot_images(rows, tmp_path / "x.png", row_labels=["a", "b"], column_labels=["t = 1", "t = 0"])
    assert is_picture(path)
    shown = [axes.images[0].get_array().max() if axes.images else None for axes in drawn[0].axes]
    assert shown == [10, 20, 30, None]
    assert [axes.get_title() for axes in drawn[0].axes[:2]] == ["t = 1", "t = 0"]
    with pytest.raises(ValueError, match="must have one size"):
        plots.plot_images([pixels(1), torch.zeros((1, 3, 8, 8), dtype=torch.uint8)], tmp_path / "y.png")


def test_colour_and_odd_numbers_of_channels_are_drawn(drawn: list[Any], tmp_path: Path) -> None:
    for channels in (3, 2):
        image = torch.arange(channels * 64, dtype=torch.uint8).reshape(1, channels, 8, 8)
        plots.plot_images([image], tmp_path / "x.png")
        shown = image[0].permute(1, 2, 0) if channels == 3 else image[0, 0]  # colour, or the first channel
        assert np.array_equal(drawn[-1].axes[0].images[0].get_array(), shown.numpy())


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install ddpm-ext\[plots\]"):
        plots.figure_class()


# The paper's figures --------------------------------------------------------------------------------------------------


@pytest.fixture
def rows_of_grids(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the grids were made of, undrawn."""
    found: list[dict[str, Any]] = []

    def keep(rows: list[torch.Tensor], path: Path, **labels: Any) -> Path:
        found.append({"rows": rows, **labels})
        return path

    monkeypatch.setattr(plots, "plot_images", keep)
    return found


@pytest.fixture
def pipeline() -> DDPMExtPipeline:
    made = DDPMExtPipeline(tiny_unet(), tiny_scheduler())
    made.set_progress_bar_config(disable=True)
    return made


def test_progressive_generation_ends_in_the_images(
    pipeline: DDPMExtPipeline, rows_of_grids: list[dict[str, Any]], tmp_path: Path
) -> None:
    plots.draw_progressive(pipeline, tmp_path / "x.png", num_images=3, columns=4, seed=5)
    grid = rows_of_grids[0]
    assert grid["column_labels"] == ["t = 19", "t = 13", "t = 6", "t = 0"]
    seeds = [torch.Generator().manual_seed(5 + i) for i in range(3)]
    images: Any = pipeline(3, generator=seeds, num_inference_steps=20, output_type="latent")
    expected = to_uint8(images.images)
    assert torch.equal(torch.stack([row[-1] for row in grid["rows"]]), expected)


def test_shared_latents_share_less_the_earlier_they_part(
    pipeline: DDPMExtPipeline, rows_of_grids: list[dict[str, Any]], tmp_path: Path
) -> None:
    plots.draw_shared_latents(pipeline, tmp_path / "x.png", times=[19, 2], num_samples=4)
    grid = rows_of_grids[0]
    assert grid["row_labels"] == ["share x_t, t = 19", "share x_t, t = 2"]
    early, late = (row.float().std(0).mean() for row in grid["rows"])
    assert [len(row) for row in grid["rows"]] == [4, 4]
    assert late < early


def test_interpolation_goes_from_one_image_to_the_other(
    pipeline: DDPMExtPipeline, rows_of_grids: list[dict[str, Any]], tmp_path: Path
) -> None:
    pair = torch.cat([torch.full((1, 1, 8, 8), -1.0), torch.full((1, 1, 8, 8), 1.0)])
    plots.draw_interpolation(pipeline, pair, tmp_path / "x.png", times=[0, 3])
    grid = rows_of_grids[0]
    assert grid["row_labels"] == ["mixed at t = 0", "mixed at t = 3"]
    assert [len(row) for row in grid["rows"]] == [9, 9]
    brightness = grid["rows"][0].float().mean((1, 2, 3))
    assert brightness[0] < 20 and brightness[-1] > 235
    assert bool((brightness.diff() > 0).all())


def test_interpolation_takes_the_training_images_farthest_apart() -> None:
    levels = torch.tensor([50, 60, 250, 55, 10, 250], dtype=torch.uint8)
    images = levels[:, None, None, None].expand(-1, 1, 8, 8)
    assert plots.farthest_pair(images) == [2, 4]  # and not [4, 5], which is as far
    digits = load_images("digits", split="train").batch(range(32)).pixels.flatten(1).double().numpy()
    distances = np.linalg.norm(digits[:, None] - digits[None], axis=2)
    assert plots.farthest_pair(load_images("digits", split="train").batch(range(32)).pixels) == list(
        np.unravel_index(distances.argmax(), distances.shape)
    )
    assert distances.max() > 2 * distances[0, 1]


def test_a_class_conditional_model_is_drawn_in_its_classes(
    rows_of_grids: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    unet = UNet2DModel.from_config(tiny_unet().config, num_class_embeds=10)
    pipeline = DDPMExtPipeline(unet, tiny_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    asked: list[list[int]] = []
    plain = UNet2DModel.forward

    def forward(self: Any, *args: Any, class_labels: torch.Tensor, **more: Any) -> Any:
        asked.append(class_labels.tolist())
        return plain(self, *args, class_labels=class_labels, **more)

    monkeypatch.setattr(UNet2DModel, "forward", forward)
    training = load_images("digits", split="train")
    plots.draw_paper(pipeline, training, tmp_path)
    assert len(rows_of_grids) == 3
    assert asked[0] == [0, 1, 2, 3, 4, 5]  # Figure 6
    assert asked[20] == [0] and asked[40] == [0] * 8  # Figure 7
    batch = training.batch(range(32))
    assert batch.labels is not None
    a, b = batch.labels[plots.farthest_pair(batch.pixels)].tolist()
    assert asked[-1] == [a] * 5 + [b] * 4  # Figure 8, λ up to 1/2 and beyond


def test_each_curve_is_of_one_condition_and_of_the_newest_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: dict[str, Any] = {}
    monkeypatch.setattr(plots, "plot_against_steps", lambda curves, title, path: found.update({path.name: curves}))
    (tmp_path / "kid_7_pixels_against_steps.png").touch()  # of former weights
    old = [score(K, weights="old", num_inference_steps=K) for K in (5, 10)]
    new = [score(K + seed, num_inference_steps=K, seed=seed) for seed in (0, 1) for K in (5, 10)]
    rounded = [score(K / 2, num_inference_steps=K, hand_off="float") for K in (5, 10)]
    plots.draw_results([Result.from_json(entry) for entry in (*old, *new, *rounded)], tmp_path)
    assert found == {
        "fid_50_pixels_against_steps.png": {
            "ddpm, fixed_small, seed 0": [(5, 5), (10, 10)],
            "ddpm, fixed_small, seed 1": [(5, 6), (10, 11)],
        },
        "fid_50_pixels_2_against_steps.png": {"ddpm, fixed_small": [(5, 2.5), (10, 5)]},
    }
    assert list(tmp_path.iterdir()) == []


def test_copies_would_show_beside_their_originals(rows_of_grids: list[dict[str, Any]], tmp_path: Path) -> None:
    from types import SimpleNamespace

    training = load_images("digits", split="train")
    copies = training.batch([700, 31]).pixels
    features = training.batch(range(800)).pixels.flatten(1).float()
    samples = SimpleNamespace(images=copies, features=SimpleNamespace(features=features[[3, 4]]))
    plots.draw_nearest(samples, SimpleNamespace(features=features), training, "a/name", tmp_path / "x.png")  # type: ignore[arg-type]
    grid = rows_of_grids[0]
    assert grid["row_labels"] == ["generated", "nearest in pixels", "nearest in name"]
    assert torch.equal(grid["rows"][1], copies)
    assert torch.equal(grid["rows"][2], training.batch([3, 4]).pixels)
    assert plots.nearest_in_pixels(copies, training, 800, chunk=100).tolist() == [700, 31]


def test_the_command_draws_what_it_measured(drawn: list[Any], tmp_path: Path) -> None:
    DDPMExtPipeline(tiny_unet(), tiny_scheduler()).save_pretrained(tmp_path / "pipeline")
    options = {"metrics": "bpd,fid", "plots": True, "num_inference_steps": "3,5"}
    bits, *distances = evaluate(small(tmp_path / "pipeline", tmp_path, **options))
    lines = {axes.get_ylabel(): axes.lines for figure in drawn for axes in figure.axes if axes.lines}
    steps, decoder = lines["bits/dim of the step"]
    assert bits.parts is not None
    assert steps.get_ydata().sum() == pytest.approx(bits.parts["rate"], rel=1e-9)
    assert decoder.get_ydata().tolist() == pytest.approx([bits.parts["decoder"]], rel=1e-9)
    assert lines["rate (bits/dim)"][0].get_ydata()[-1] == pytest.approx(
        bits.parts["prior"] + bits.parts["rate"], rel=1e-9
    )
    (curve,) = next(lines[label] for label in lines if label.startswith("Fréchet distance"))
    assert curve.get_xydata().tolist() == [[result.num_inference_steps, result.value] for result in distances[:2]]
    names = {path.name for path in (tmp_path / "out" / "plots").iterdir()}
    assert names == {
        "rate_distortion_fixed_small.png",
        "bits_per_step_fixed_small.png",
        "fid_12_pixels_against_steps.png",
        "progressive.png",
        "shared_latents.png",
        "interpolation.png",
        "nearest.png",
    }
