"""A stock repository, calibrated: what is stored, what is reported, and that stock Diffusers still loads it."""

from __future__ import annotations

import json
import logging
import math
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerator import is_installed
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from evaluations import on_digits
from networks import tiny_unet
from training import TORCHRUN, finish, start

from ddpm_ext.data.dataset import load_images
from ddpm_ext.diffusion.analytic import optimal_trajectory
from ddpm_ext.evaluation import calibrate as module
from ddpm_ext.evaluation.bound.bits_per_dim import bits_per_dim
from ddpm_ext.evaluation.bound.checks import grid_images
from ddpm_ext.evaluation.bound.denoising_errors import denoising_errors, drop_variance_head
from ddpm_ext.evaluation.bound.terms import BoundOptions, make_bound
from ddpm_ext.evaluation.calibrate import calibrate
from ddpm_ext.evaluation.config import CalibrateConfig
from ddpm_ext.evaluation.features import metrics
from ddpm_ext.evaluation.samplers import STOCK_SETTINGS
from ddpm_ext.pipelines.ddpm import DDPMExtPipeline
from ddpm_ext.schedulers.ddpm import DDPMExtScheduler

T = 20


def small(model: Path, folder: Path, **options: Any) -> CalibrateConfig:
    usual: dict[str, Any] = {
        **on_digits(folder),
        "num_images": 6,
        "max_bpd_images": 4,
        "num_inference_steps": "3,5,20",
        "fid_num_inference_steps": "5",
        "num_samples": 10,
        "num_seeds": 2,
        "batch_size": 4,
        "cpu": not is_installed(),
        "trajectory": "optimal",
    }
    return CalibrateConfig(model=str(model), **{**usual, **options})


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository as stock Diffusers writes it."""
    folder = tmp_path_factory.mktemp("stock")
    scheduler = DDPMScheduler(T, 1e-3, 0.6, variance_type="fixed_large")
    DDPMPipeline(tiny_unet(), scheduler).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def done(stock: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One calibration that the tests below look at."""
    folder = tmp_path_factory.mktemp("calibration")
    config = small(stock, folder, full_chain=True)
    return SimpleNamespace(config=config, record=calibrate(config), out=folder / "out", folder=folder)


def chain(**options: Any) -> DDPMExtScheduler:
    return DDPMExtScheduler(T, 1e-3, 0.6, **options)


def figure(record: dict[str, Any], metric: str, sampler: str, K: int) -> dict[str, Any]:
    (found,) = [
        f for f in record["figures"] if (f["metric"], f["sampler"], f["num_inference_steps"]) == (metric, sampler, K)
    ]
    return found


def test_errors_are_those_of_the_first_training_images(done: SimpleNamespace) -> None:
    pixels = load_images("digits", split="train").batch(range(6)).pixels
    bound = make_bound(tiny_unet(), chain(), pixels, BoundOptions(clip_sample=False))
    errors = denoising_errors(bound, grid_images(pixels), [torch.Generator().manual_seed(i) for i in range(6)])
    record = json.loads((done.out / "calibration.json").read_text())
    assert record == done.record
    assert record["mse_eps"] == pytest.approx(errors.mse_eps.mean(0).tolist(), rel=1e-5)  # float32 in other batches
    assert record["ms_eps"] == pytest.approx(errors.ms_eps.mean(0).tolist(), rel=1e-5)
    assert record["standard_error"] == pytest.approx((errors.mse_eps.std(0) / 6**0.5).tolist(), rel=1e-4)
    assert record["standard_error_ms_eps"] == pytest.approx((errors.ms_eps.std(0) / 6**0.5).tolist(), rel=1e-4)
    mse_eps = torch.tensor(record["mse_eps"], dtype=torch.float64)
    for K in (3, 5):
        assert record["trajectories"][str(K)] == optimal_trajectory(chain().tables, mse_eps, K)
    assert record["trajectories"].keys() == {"3", "5"}  # all 20 of 20 steps need no list
    assert record["dataset"]["num_images"] == 6
    assert {"command", "commit", "hardware", "versions"} <= record["certificate"].keys()
    assert record["certificate"]["options"]["num_images"] == 6
    assert "hub_token" not in record["certificate"]["options"]


def test_the_pipeline_knows_its_errors_and_stock_diffusers_loads_it(done: SimpleNamespace) -> None:
    ours: Any = DDPMExtPipeline.from_pretrained(done.out / "pipeline")
    assert ours.scheduler.config.variance_type == "analytic"
    assert ours.scheduler.config["_ddpm_ext"]["mse_eps"] == done.record["mse_eps"]
    ours.scheduler.set_timesteps(5)
    assert ours.scheduler.timesteps.tolist() == done.record["trajectories"]["5"][::-1]

    stock = DDPMPipeline.from_pretrained(done.out / "pipeline")
    assert type(stock) is DDPMPipeline and type(stock.scheduler) is DDPMScheduler
    assert stock.scheduler.config.variance_type == "fixed_small"
    assert json.loads((done.out / "pipeline" / "model_index.json").read_text())["scheduler"][1] == "DDPMScheduler"
    stock.set_progress_bar_config(disable=True)
    images = stock(batch_size=2, num_inference_steps=5, output_type="np").images
    assert images.shape == (2, 8, 8, 1) and not math.isnan(images.sum())
    for name, weight in stock.unet.state_dict().items():
        assert torch.equal(weight, tiny_unet().state_dict()[name])


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_bits_on_the_full_chain_are_those_of_bits_per_dim(done: SimpleNamespace, variance: Any) -> None:
    pixels = load_images("digits", split="test").batch(range(4)).pixels
    seeds = [torch.Generator().manual_seed(i) for i in range(4)]
    bits = bits_per_dim(tiny_unet(), chain(variance_type=variance), pixels, generator=seeds)
    for trajectory in ("even", "optimal"):
        found = figure(done.record, "bpd", f"{variance}, {trajectory}", T)
        assert found["value"] == pytest.approx(bits.total.mean().item(), rel=1e-5)
        assert found["parts"]["decoder"] == pytest.approx(bits.decoder.mean().item(), rel=1e-5)
    assert len([f for f in done.record["figures"] if f["metric"] == "bpd"]) == (1 + 3 * 2) * 3


def own(K: int) -> DDPMScheduler:
    """The stock scheduler as its repository holds it, its K steps chosen."""
    scheduler = DDPMScheduler(num_train_timesteps=T, beta_start=1e-3, beta_end=0.6, variance_type="fixed_large")
    scheduler.set_timesteps(K)
    return scheduler


def test_before_is_the_model_as_it_was_loaded(done: SimpleNamespace) -> None:
    pixels = load_images("digits", split="test").batch(range(4)).pixels
    for K in (3, 5, T):
        times = own(K).timesteps.tolist()
        seeds = [torch.Generator().manual_seed(i) for i in range(4)]
        bits = bits_per_dim(
            tiny_unet(),
            chain(variance_type="fixed_large"),
            pixels,
            timesteps=times,
            generator=seeds,
        )
        found = figure(done.record, "bpd", "fixed_large, as loaded (leading)", K)
        assert found["value"] == pytest.approx(bits.total.mean().item(), rel=1e-5)
        assert (found["when"], found["timestep_spacing"], found["trajectory"]) == ("before", "leading", None)
    even = figure(done.record, "bpd", "fixed_large, even", 5)
    assert even["when"] is None and even["value"] != figure(done.record, "bpd", found["sampler"], 5)["value"]
    fid = figure(done.record, "fid", "fixed_large, as loaded (leading)", 5)
    assert fid["when"] == "before"
    assert fid["values"] == pytest.approx(distances_by_hand(DDPMExtPipeline(tiny_unet(), own(5))), rel=1e-4)
    assert (done.out / "calibration.md").read_text().count("| fixed_large, as loaded (leading) |") == 2


def test_before_a_second_calibration_is_the_first_one(done: SimpleNamespace, tmp_path: Path) -> None:
    options = {"num_images": 5, "metrics": "bpd", "plots": False, "num_inference_steps": "5,20"}
    record = calibrate(small(done.out / "pipeline", tmp_path, **options))
    assert record["mse_eps"] != done.record["mse_eps"]
    pixels = load_images("digits", split="test").batch(range(4)).pixels
    loaded: Any = DDPMExtPipeline.from_pretrained(done.out / "pipeline")
    for K in (5, T):
        seeds = [torch.Generator().manual_seed(i) for i in range(4)]
        bits = bits_per_dim(tiny_unet(), loaded.scheduler, pixels, num_inference_steps=K, generator=seeds)
        found = figure(record, "bpd", "analytic, as loaded (optimal)", K)
        assert found["value"] == pytest.approx(bits.total.mean().item(), rel=1e-5)
        assert found["value"] != figure(record, "bpd", "analytic, optimal", K)["value"]


def test_a_calibrated_stock_pipeline_samples_without_a_warning(done: SimpleNamespace) -> None:
    """Diffusers warns through its loggers, which pytest's filter does not see."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True, action="always") as caught:
            for kind in (DDPMPipeline, DDPMExtPipeline):
                pipeline: Any = kind.from_pretrained(str(done.out / "pipeline"))
                pipeline.set_progress_bar_config(disable=True)
                assert len(pipeline(batch_size=2, num_inference_steps=5, output_type="np").images) == 2
    finally:
        logger.removeHandler(handler)
    assert said == [] and caught == []


def distances_by_hand(pipeline: DDPMExtPipeline) -> list[float]:
    """Fréchet distances of two sets of ten samples in five steps to the first forty digits."""
    real = load_images("digits", split="train").batch(range(40)).pixels.reshape(40, -1).double() / 255
    pipeline.set_progress_bar_config(disable=True)
    distances = []
    for first in (0, 10):
        seeds = [torch.Generator().manual_seed(first + i) for i in range(10)]
        images: Any = pipeline(10, generator=seeds, num_inference_steps=5, output_type="np").images
        fake = (images * 255).round().reshape(10, -1) / 255
        statistics = [metrics.feature_statistics(x) for x in (real, fake)]
        distances.append(metrics.frechet_distance(*statistics))
    return distances


def test_frechet_distances_are_those_of_samples_made_by_hand(done: SimpleNamespace) -> None:
    pipeline = DDPMExtPipeline(tiny_unet(), chain(variance_type="fixed_large"))
    pipeline.scheduler.register_to_config(_ddpm_ext={"trajectory": "even"})
    found = figure(done.record, "fid", "fixed_large, even", 5)
    assert found["when"] is None
    distances = distances_by_hand(pipeline)
    assert found["values"] == pytest.approx(distances, rel=1e-4)  # float32 features
    assert found["value"] == pytest.approx(sum(distances) / 2, rel=1e-4)
    assert found["std"] == pytest.approx(abs(distances[0] - distances[1]) / 2**0.5, rel=1e-3)
    of_fid = [f for f in done.record["figures"] if f["metric"] == "fid"]
    stock = {setting.name for setting in STOCK_SETTINGS}  # tests/test_few_steps.py
    assert stock < {f["sampler"] for f in of_fid}
    assert {f["sampler"] for f in of_fid} - stock == {
        "fixed_large, as loaded (leading)",
        "fixed_large, even",
        "analytic, optimal",
        "analytic, optimal, η = 0",
        "analytic, even",
        "analytic, even, η = 0",
        "fixed_small, even",
    }
    assert len({f["value"] for f in of_fid if f["sampler"] not in stock}) == 7
    assert figure(done.record, "fid", "fixed_small, even", T)["when"] is None
    assert figure(done.record, "fid", "analytic, optimal", 5)["when"] == "after"


def test_tables_and_plots_are_there(done: SimpleNamespace) -> None:
    text = (done.out / "calibration.md").read_text()
    assert "bits/dim of 4 images of digits test" in text
    assert "| sampler | 3 steps | 5 steps | 20 steps |" in text
    assert "10 samples, mean ± deviation of 2 seeds" in text
    value = figure(done.record, "bpd", "fixed_small, even", 3)["value"]
    assert f"| fixed_small, even | {value:.4f} |" in text.replace("**", "")
    for stem in ("bpd", "fid_10_pixels"):
        assert (done.out / "plots" / f"{stem}_against_steps.png").stat().st_size > 1000


def test_without_matplotlib_it_says_that_no_plots_are_drawn(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    calibrate(small(stock, tmp_path, metrics="bpd", num_inference_steps="3,5"))
    assert "No plots are drawn: they need matplotlib (pip install ddpm-ext[plots])." in capsys.readouterr().out
    assert (tmp_path / "out" / "calibration.md").is_file() and not (tmp_path / "out" / "plots").exists()


def test_the_same_command_again_asks_the_network_nothing(
    done: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: Any, **__: Any) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(UNet2DModel, "forward", forward)
    again = calibrate(done.config)
    values = [[f["value"] for f in record["figures"]] for record in (again, done.record)]
    assert values[0] == values[1]
    assert again["mse_eps"] == done.record["mse_eps"]


def test_a_learned_variance_stays_and_is_judged_beside_the_others(tmp_path: Path) -> None:
    unet = tiny_unet(out_channels=2)
    DDPMExtPipeline(unet, chain(variance_type="learned_range")).save_pretrained(tmp_path / "model")
    options = {"num_inference_steps": "5,20", "num_samples": 4, "num_seeds": 1, "plots": False}
    record = calibrate(small(tmp_path / "model", tmp_path, **options))
    pixels = load_images("digits", split="test").batch(range(4)).pixels
    for variance_type, network in (("learned_range", unet), ("fixed_small", drop_variance_head(unet))):
        seeds = [torch.Generator().manual_seed(i) for i in range(4)]
        bits = bits_per_dim(network, chain(variance_type=variance_type), pixels, generator=seeds)
        found = figure(record, "bpd", f"{variance_type}, even", T)
        assert found["value"] == pytest.approx(bits.total.mean().item(), rel=1e-5)
    assert figure(record, "fid", "learned_range, optimal", 5)["when"] == "after"
    assert found["value"] == figure(record, "bpd", "fixed_small, optimal", T)["value"]
    before, even = (figure(record, "bpd", f"learned_range, {how}", T) for how in ("as loaded (leading)", "even"))
    assert before["value"] == even["value"] and (before["when"], even["when"]) == ("before", None)
    loaded: Any = DDPMExtPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    assert loaded.scheduler.config.variance_type == "learned_range"
    assert loaded.unet.config.out_channels == 2


def test_errors_of_a_velocity_network_are_stored_and_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = []
    monkeypatch.setattr(module.upload, "push_to_hub", lambda *words, **options: pushed.append((words, options)))
    DDPMExtPipeline(tiny_unet(), chain(prediction_type="v_prediction")).save_pretrained(tmp_path / "model")
    config = small(tmp_path / "model", tmp_path, metrics="none", hub_model_id="me/digits", hub_token="secret")
    record = calibrate(config)
    assert record["figures"] == []
    assert pushed == [((tmp_path / "out" / "pipeline", "me/digits"), {"private": None, "token": "secret"})]
    assert "secret" not in (tmp_path / "out" / "calibration.json").read_text()
    pixels = load_images("digits", split="train").batch(range(6)).pixels
    bound = make_bound(
        tiny_unet(),
        chain(prediction_type="v_prediction"),
        pixels,
        BoundOptions(clip_sample=False),
    )
    errors = denoising_errors(bound, grid_images(pixels), [torch.Generator().manual_seed(i) for i in range(6)])
    assert record["mse_eps"] == pytest.approx(errors.mse_eps.mean(0).tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"metrics": "kid"}, "metrics must be"),
        ({"trajectory": "best"}, "trajectory must be"),
        ({"num_images": 1}, "at least 2"),
        ({"num_inference_steps": "ten"}, "whole numbers like"),
        ({"fid_num_inference_steps": "0"}, "whole numbers like"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
    ],
)
def test_wrong_options_are_refused_at_once(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        CalibrateConfig(**options)


@pytest.mark.parametrize("options", [{"num_inference_steps": "21"}, {"fid_num_inference_steps": "1"}])
def test_steps_that_the_model_does_not_have_are_refused(stock: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must lie in 2\.\.20"):
        calibrate(small(stock, tmp_path, **options))


def test_where_the_result_goes(tmp_path: Path) -> None:
    (tmp_path / "run" / "pipeline").mkdir(parents=True)
    (tmp_path / "run" / "pipeline" / "model_index.json").touch()
    assert CalibrateConfig(model=str(tmp_path / "run" / "pipeline")).folder == tmp_path / "run" / "calibrated"
    assert CalibrateConfig(model="google/ddpm-cifar10-32").folder == Path("evals/ddpm-cifar10-32/calibrated")


@pytest.mark.slow
def test_two_processes_measure_what_one_does(done: SimpleNamespace, stock: Path, tmp_path: Path) -> None:
    options = {"num_images": 40, "metrics": "bpd", "max_bpd_images": 40, "plots": False}
    words = ["scripts/calibrate.py"]
    for name, value in {**vars(small(stock, tmp_path, **options)), "output_dir": tmp_path / "two"}.items():
        if value is not None:
            words.append(f"--{name}={value}")
    code, output = finish(start(words, (*TORCHRUN, "2")))
    assert code == 0, output
    alone = calibrate(small(stock, tmp_path, **options))
    together = json.loads((tmp_path / "two" / "calibration.json").read_text())
    assert together["mse_eps"] == alone["mse_eps"]
    assert [f["value"] for f in together["figures"]] == [f["value"] for f in alone["figures"]]
