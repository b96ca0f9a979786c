"""The evaluation of a tiny pipeline against the same numbers computed by hand, its options, pieces and tables."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerator import is_installed
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from evaluations import score, small
from networks import tiny_scheduler, tiny_unet
from PIL import Image
from training import ROOT, TORCHRUN, finish, start

from ddpm_ext.cli.arguments import parse_options
from ddpm_ext.data.dataset import load_images
from ddpm_ext.errors import UserError
from ddpm_ext.evaluation.bound.bits_per_dim import bits_per_dim, rate_distortion
from ddpm_ext.evaluation.bound.checks import grid_images
from ddpm_ext.evaluation.bound.denoising_errors import denoising_errors, drop_variance_head, set_errors
from ddpm_ext.evaluation.bound.sets import set_bound
from ddpm_ext.evaluation.bound.terms import BoundOptions, make_bound
from ddpm_ext.evaluation.calibrate import calibrate
from ddpm_ext.evaluation.config import CalibrateConfig, EvalConfig
from ddpm_ext.evaluation.evaluate import evaluate
from ddpm_ext.evaluation.features import metrics, samples
from ddpm_ext.evaluation.features.extractors import Extractor, Features, make_extractor
from ddpm_ext.evaluation.features.reference import load_reference, make_reference
from ddpm_ext.evaluation.report import markdown as table_of
from ddpm_ext.evaluation.results import Result, write_results
from ddpm_ext.evaluation.samplers import SAMPLERS, make_scheduler
from ddpm_ext.evaluation.sharded import Shards, load_checked, save_whole
from ddpm_ext.pipelines.ddpm import DDPMExtPipeline
from ddpm_ext.pipelines.identity import network_hash, scheduler_options, weights_hash
from ddpm_ext.schedulers.ddpm import DDPMExtScheduler
from ddpm_ext.training.outputs.validation import Validation, ValidationOptions


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a pipeline and a record."""
    run = tmp_path_factory.mktemp("run")
    DDPMExtPipeline(tiny_unet(), tiny_scheduler()).save_pretrained(run / "pipeline")
    (run / "config.json").write_text(json.dumps({"config": {"use_ema": True}}))
    return run / "pipeline"


def measured(config: EvalConfig) -> list[dict[str, Any]]:
    """The entries of eval.json that an evaluation makes."""
    return [result.to_json() for result in evaluate(config)]


def markdown(entries: list[dict[str, Any]]) -> str:
    return table_of([Result.from_json(entry) for entry in entries])


def by_metric(figures: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {figure["metric"]: figure for figure in figures}


# The whole ------------------------------------------------------------------------------------------------------------


def test_every_figure_equals_what_its_functions_give(model: Path, tmp_path: Path) -> None:
    figures = measured(small(model, tmp_path, metrics="bpd,rate_distortion,fid,kid,prdc", variance_type="fixed_large"))
    found = by_metric(figures)
    pipeline: Any = DDPMExtPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    scheduler = tiny_scheduler(variance_type="fixed_large")

    test = load_images("digits", split="test").batch(range(6)).pixels
    seeds = [torch.Generator().manual_seed(i) for i in range(6)]
    bits = bits_per_dim(pipeline.unet, scheduler, test, generator=seeds)
    assert found["bpd"]["value"] == pytest.approx(bits.total.mean().item(), rel=1e-5)
    assert found["bpd"]["parts"]["decoder"] == pytest.approx(bits.decoder.mean().item(), rel=1e-5)
    assert found["bpd"]["parts"]["prior"] == pytest.approx(bits.prior.mean().item(), rel=1e-5)
    assert found["bpd"]["parts"]["rate"] == pytest.approx(bits.steps.sum(1).mean().item(), rel=1e-5)
    seeds = [torch.Generator().manual_seed(i) for i in range(6)]
    rows = rate_distortion(pipeline.unet, scheduler, test, generator=seeds)
    last = found["rate_distortion"]["rows"][-1]
    assert (last["label"], last["timesteps"]) == (20, 0)
    assert last["rate_bits_per_dim"] == pytest.approx(rows.rate_bits_per_dim[-1].item(), rel=1e-5)
    assert last["distortion_rmse"] == pytest.approx(rows.distortion_rmse[-1].item(), rel=1e-5)

    pipeline.scheduler = scheduler
    seeds = [torch.Generator().manual_seed(i) for i in range(12)]
    images = pipeline(12, generator=seeds, num_inference_steps=5, output_type="np").images
    fake = (images * 255).round().reshape(12, -1) / 255
    real = load_images("digits", split="train").batch(range(40)).pixels.reshape(40, -1).double().numpy() / 255
    statistics = [metrics.feature_statistics(x) for x in (real, fake)]
    assert found["fid"]["value"] == pytest.approx(metrics.frechet_distance(*statistics), rel=1e-4)  # float32 features
    kid = metrics.kernel_distance(real, fake, num_subsets=3, subset_size=6)
    assert found["kid"]["value"] == pytest.approx(kid.mean, rel=1e-4)
    assert found["kid"]["std"] == pytest.approx(kid.std, rel=1e-3)
    assert found["prdc"]["parts"] == pytest.approx(metrics.precision_recall(real, fake)._asdict(), abs=1e-9)


def test_a_second_fixed_variance_needs_no_second_sweep(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = measured(small(model, tmp_path / "alone", metrics="bpd", variance_type="fixed_large"))[0]
    calls, plain = [], UNet2DModel.forward
    monkeypatch.setattr(
        UNet2DModel, "forward", lambda self, *args, **more: calls.append(1) or plain(self, *args, **more)
    )
    both = measured(small(model, tmp_path, metrics="bpd", variance_type="fixed_small,fixed_large"))
    once = len(calls)
    measured(small(model, tmp_path / "first", metrics="bpd", variance_type="fixed_small"))
    assert len(calls) == 2 * once
    assert [figure["variance_type"] for figure in both] == ["fixed_small", "fixed_large"]
    assert both[1]["value"] == pytest.approx(alone["value"], rel=1e-9)
    assert both[1]["parts"] == pytest.approx(alone["parts"], rel=1e-9)
    assert both[0]["value"] != pytest.approx(both[1]["value"], rel=1e-3)


def test_a_figure_says_what_made_it(model: Path, tmp_path: Path) -> None:
    config = small(model, tmp_path, metrics="bpd,fid", num_timesteps_sampled=5)
    found = by_metric(measured(config))
    unet = UNet2DModel.from_pretrained(model, subfolder="unet")
    for figure in found.values():
        assert figure["weights"] == weights_hash(unet)
        assert figure["averaged"] is True
        assert figure["seed"] == 0
        certificate = figure["certificate"]
        assert {
            "command",
            "versions",
            "commit",
            "hardware",
            "wall_time_s",
            "num_processes",
            "date",
        } <= certificate.keys()
        assert certificate["options"]["num_samples"] == 12
    assert found["bpd"]["standard_error"] > 0
    assert found["bpd"]["dataset"]["num_images"] == 6
    assert found["bpd"]["num_timesteps_sampled"] == 5
    fid = found["fid"]
    assert (fid["sampler"], fid["variance_type"], fid["num_inference_steps"]) == ("ddpm", "fixed_small", 5)
    assert (fid["num_samples"], fid["hand_off"], fid["extractor"]["name"]) == (12, "uint8", "pixels")
    assert fid["reference"]["resolution"] == found["bpd"]["dataset"]["resolution"] == [1, 8, 8]
    assert fid["reference"]["fingerprint"] == load_images("digits", split="train", channels=1, resolution=8).fingerprint
    assert "biased upwards" in fid["note"]  # 12 images, 64 features
    assert json.loads((config.folder / "eval.json").read_text())["figures"] == list(found.values())


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Diffusers' DPM-Solver++
def test_measuring_again_replaces_and_other_conditions_add(model: Path, tmp_path: Path) -> None:
    first = measured(small(model, tmp_path, metrics="fid"))
    again = measured(small(model, tmp_path, metrics="fid"))
    other = measured(small(model, tmp_path, metrics="fid", sampler="ddim,dpm++", num_inference_steps="5,3"))
    assert first[0]["value"] == again[0]["value"]
    assert len(other) == 4
    assert len({figure["value"] for figure in [*again, *other]}) == 5
    path = tmp_path / "out" / "eval.json"
    assert len(json.loads(path.read_text())["figures"]) == 5
    table = (tmp_path / "out" / "eval.md").read_text()
    assert "| sampler | 3 steps | 5 steps |" in table
    assert f"| ddpm, fixed_small |  | {again[0]['value']:.4g} |" in table.replace("**", "")

    def merge(path: Path, entries: list[dict[str, Any]]) -> list[Result]:
        return write_results(path, [Result.from_json(entry) for entry in entries])

    assert len(merge(path, [{**again[0], "value": 7.0}])) == 5
    # A figure of an earlier version says less; one that contradicts stays.
    reference = {name: value for name, value in again[0]["reference"].items() if name != "fingerprint"}
    former = {name: value for name, value in again[0].items() if name != "network"} | {"reference": reference}
    assert len(merge(path, [former])) == 6
    assert len(merge(path, again)) == 5
    assert len(merge(path, [{**former, "seed": 1}])) == 6
    assert len(merge(path, again)) == 6


def test_the_quantization_and_the_spacing_are_conditions(model: Path, tmp_path: Path) -> None:
    rounded = measured(small(model, tmp_path, metrics="fid"))[0]
    floats = measured(small(model, tmp_path, metrics="fid", quantization="float"))[0]
    trailing = measured(small(model, tmp_path, metrics="fid", timestep_spacing="trailing"))[0]
    assert floats["hand_off"] == "float"
    assert 0 < abs(floats["value"] - rounded["value"]) < 0.1 * rounded["value"]
    assert trailing["timestep_spacing"] == "trailing"
    assert trailing["value"] != rounded["value"]


def test_samplers_keep_the_schedule_of_the_model() -> None:
    scheduler = tiny_scheduler(prediction_type="v_prediction", clip_sample=False)
    ours, ddim, dpm = (make_scheduler(scheduler, sampler) for sampler in ("ddpm", "ddim", "dpm++"))
    assert isinstance(ours, DDPMExtScheduler)
    assert isinstance(ddim, DDIMScheduler)
    assert isinstance(dpm, DPMSolverMultistepScheduler)
    assert dpm.config.algorithm_type == "dpmsolver++"
    for made in (ours, ddim, dpm):
        assert made.config.prediction_type == "v_prediction"
        torch.testing.assert_close(made.alphas_cumprod, scheduler.alphas_cumprod)
    assert make_scheduler(scheduler, "ddpm", "fixed_large").config.variance_type == "fixed_large"
    with pytest.raises(ValueError, match='variance_type is an option of the sampler "ddpm"'):
        make_scheduler(scheduler, "ddim", "fixed_large")
    with pytest.raises(ValueError, match="posterior_mean"):
        make_scheduler(tiny_scheduler(prediction_type="posterior_mean"), "ddim")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Diffusers' DPM-Solver++
@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
@pytest.mark.parametrize(
    "sampler", [word for word in SAMPLERS if word not in ("unipc-plain", "solver")]
)  # it has no such option
def test_a_network_almost_exact_leads_every_sampler_to_the_data(sampler: str, spacing: str) -> None:
    """Data N(0, 1/3): a cosine schedule starts in pure noise, where an error of 0.01 in ε̂ is hundreds in x̂_0.

    512 numbers reach 2.4; solvers that neither clip nor start the schedule at λ = -5.1 reach 10, of order 3 thousands.
    """
    generator, var = torch.Generator().manual_seed(0), 1 / 3
    own = DDPMExtScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing=spacing)
    scheduler, alpha_bar = make_scheduler(own, sampler), own.alphas_cumprod
    scheduler.set_timesteps(50)
    x_t = torch.randn((8, 1, 8, 8), generator=generator)
    for t in scheduler.timesteps:
        eps = (1 - alpha_bar[t]).sqrt() * x_t / (alpha_bar[t] * var + 1 - alpha_bar[t])
        eps_hat = eps + 0.01 * torch.randn(eps.shape, generator=generator)
        x_t = scheduler.step(eps_hat, t, x_t).prev_sample
    assert x_t.abs().max() <= (1.5 if sampler in ("ddpm", "ddim", "dpm++", "dpm++3", "unipc") else 3)


def test_clipping_follows_the_model_or_the_samplers_name() -> None:
    model, free = tiny_scheduler(), tiny_scheduler(clip_sample=False)
    for sampler, of_model, of_free in (("dpm++", True, False), ("unipc", True, True), ("dpm++-lu", False, False)):
        for own, clips in ((model, of_model), (free, of_free)):
            made = make_scheduler(own, sampler)
            found = made.config.thresholding and made._threshold_sample(torch.tensor([[[[-7.0, 0.5]]]])).tolist()
            assert found == (clips and [[[[-1.0, 0.5]]]])
    assert make_scheduler(tiny_scheduler(thresholding=True, sample_max_value=3.0), "dpm++").config.sample_max_value == 3
    with pytest.raises(UserError, match=r"clips x̂_0 to \[-1, 1\] alone, and the model to ±2"):
        make_scheduler(tiny_scheduler(clip_sample_range=2.0), "dpm++")


@pytest.mark.parametrize("own", [DDPMExtScheduler(20, 1e-3, 0.6), DDPMScheduler(20, 1e-3, 0.6)])
def test_options_that_were_given_by_position_are_kept(own: Any) -> None:
    for sampler in ("ddpm", "ddim", "dpm++"):
        made = make_scheduler(own, sampler)
        torch.testing.assert_close(made.alphas_cumprod, own.alphas_cumprod)
        assert made.config.timestep_spacing == "leading"


def test_a_spacing_asked_for_takes_the_place_of_a_stored_trajectory() -> None:
    scheduler = tiny_scheduler()
    scheduler.register_to_config(_ddpm_ext={"trajectory": "even", "eta": 0.0})
    made = make_scheduler(scheduler, "ddpm", None, "trailing")
    made.set_timesteps(4)
    stock = DDPMScheduler(num_train_timesteps=20, timestep_spacing="trailing")
    stock.set_timesteps(4)
    assert made.timesteps.tolist() == stock.timesteps.tolist()
    assert made.config["_ddpm_ext"] == {"eta": 0.0}
    made = make_scheduler(scheduler)
    made.set_timesteps(4)
    assert made.timesteps.tolist() == [19, 13, 6, 0]
    assert "_ddpm_ext" not in make_scheduler(scheduler, "ddim").config


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Diffusers' DPM-Solver++
@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_other_samplers_leave_a_learned_variance_out(sampler: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UNet2DModel.from_config(tiny_unet().config, out_channels=2)
    DDPMExtPipeline(unet, tiny_scheduler(variance_type="learned_range")).save_pretrained(tmp_path / "pipeline")
    found = measured(small(tmp_path / "pipeline", tmp_path, metrics="fid", sampler=sampler))[0]
    kind, clipped = (DDIMScheduler, {}) if sampler == "ddim" else (DPMSolverMultistepScheduler, {"thresholding": True})
    scheduler = kind(num_train_timesteps=20, beta_start=1e-3, beta_end=0.6, timestep_spacing="leading", **clipped)
    pipeline = DDPMExtPipeline(drop_variance_head(unet), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(i) for i in range(12)]
    images: Any = pipeline(12, generator=seeds, num_inference_steps=5, output_type="np").images
    fake = (images * 255).round().reshape(12, -1) / 255
    real = load_images("digits", split="train").batch(range(40)).pixels.reshape(40, -1).double() / 255
    expected = metrics.frechet_distance(*(metrics.feature_statistics(x) for x in (real, fake)))
    assert found["value"] == pytest.approx(expected, rel=1e-4)  # float32 features
    assert found["variance_type"] is None


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(model: Path, tmp_path: Path) -> None:
    words = ["scripts/evaluate.py", "--cpu", f"--model={model}", "--dataset_name=digits", "--metrics=bpd,fid"]
    words += ["--extractor=pixels", "--num_samples=600", "--num_inference_steps=3", "--max_bpd_images=40"]
    words += [f"--reference_cache={tmp_path / 'references'}", "--max_reference_images=3000"]
    found = []
    for name, launcher in (("one", (sys.executable,)), ("two", (*TORCHRUN, "2"))):
        code, said = finish(start([*words, f"--output_dir={tmp_path / name}"], launcher))
        assert code == 0, said
        assert said.count("2 results in") == 1
        found.append(json.loads((tmp_path / name / "eval.json").read_text())["figures"])
    for one, two in zip(*found, strict=True):
        assert two["certificate"]["num_processes"] == 2
        assert one["value"] == pytest.approx(two["value"], rel=1e-6)


def test_another_config_of_the_network_is_another_network(model: Path, tmp_path: Path) -> None:
    """The weights are the same, and the function is not: freq_shift moves the embedding of t."""
    other = tmp_path / "pipeline"
    shutil.copytree(model, other)
    path = other / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "freq_shift": 1}))
    first = measured(small(model, tmp_path, metrics="bpd,fid"))
    second = measured(small(other, tmp_path, metrics="bpd,fid"))
    alone = measured(small(other, tmp_path, metrics="bpd,fid", output_dir=str(tmp_path / "alone")))
    for one, two, expected in zip(first, second, alone, strict=True):
        assert two["value"] == pytest.approx(expected["value"], rel=1e-6)
        assert two["value"] != pytest.approx(one["value"], rel=1e-5)
        assert one["weights"] == two["weights"] and one["network"] != two["network"] == expected["network"]
    noted = UNet2DModel.from_config({**tiny_unet().config, "_name_or_path": "elsewhere", "_diffusers_version": "0"})
    assert network_hash(noted) == network_hash(tiny_unet()) == first[0]["network"]


def test_one_image_has_no_error_and_no_nan_is_written(model: Path, tmp_path: Path) -> None:
    (figure,) = measured(small(model, tmp_path, metrics="bpd", max_bpd_images=1))
    assert figure["parts"].keys() == {"prior", "rate", "decoder"}
    json.dumps(json.loads((tmp_path / "out" / "eval.json").read_text()), allow_nan=False)
    two = measured(small(model, tmp_path, metrics="bpd", max_bpd_images=2))[0]
    assert two["parts"]["standard_error_over_images"] > 0


def test_the_steps_of_a_calibrated_pipeline_are_conditions(tmp_path: Path) -> None:
    scheduler = tiny_scheduler()
    scheduler.register_to_config(_ddpm_ext={"trajectory": "even", "eta": 0.5})
    model = tmp_path / "pipeline"
    DDPMExtPipeline(tiny_unet(), scheduler).save_pretrained(model)
    stored = measured(small(model, tmp_path, metrics="fid", sampler="ddpm,ddim"))
    asked = measured(small(model, tmp_path, metrics="fid", timestep_spacing="trailing"))
    names = ("sampler", "timestep_spacing", "trajectory", "eta")
    assert [tuple(figure[name] for name in names) for figure in (*stored, *asked)] == [
        ("ddpm", None, "even", 0.5),
        ("ddim", "leading", None, None),
        ("ddpm", "trailing", None, 0.5),
    ]
    assert asked[0]["value"] != stored[0]["value"]
    table = (tmp_path / "out" / "eval.md").read_text()
    for words, figure in zip(("even trajectory", "trailing spacing"), (stored[0], asked[0]), strict=True):
        assert f"| ddpm, fixed_small, {words} | {figure['value']:.4g} |" in table.replace("**", "")
    scheduler.register_to_config(_ddpm_ext={"trajectory": "even"})
    DDPMExtPipeline(tiny_unet(), scheduler).save_pretrained(model)
    respaced = {"metrics": "bpd", "bpd_num_inference_steps": 5}
    bits = [measured(small(model, tmp_path, **respaced, **more))[0] for more in ({}, {"timestep_spacing": "leading"})]
    assert [(figure["timestep_spacing"], figure["trajectory"]) for figure in bits] == [
        (None, "even"),
        ("leading", None),
    ]
    pixels = load_images("digits", split="test").batch(range(6)).pixels
    for figure, times in zip(bits, ([19, 14, 10, 5, 0], [16, 12, 8, 4, 0]), strict=True):
        seeds = [torch.Generator().manual_seed(i) for i in range(6)]
        expected = bits_per_dim(tiny_unet(), tiny_scheduler(), pixels, timesteps=times, generator=seeds)
        assert figure["value"] == pytest.approx(expected.total.mean().item(), rel=1e-5)


def stand_in(name: str, classes: int = 0) -> Extractor:
    """An extractor as `clip` and `inception` are: embeddings of unit length, or features and logits; no download."""
    mix = torch.randn(64, 7, generator=torch.Generator().manual_seed(0))
    head = torch.randn(7, classes, generator=torch.Generator().manual_seed(1)) if classes else None

    def forward(images: torch.Tensor) -> Features:
        features = torch.nn.functional.normalize(images.flatten(1) @ mix, dim=1)
        return Features(features, None if head is None else 5 * features @ head)

    return Extractor({"name": name, "weights": "stand-in", "input": "as it is"}, forward, torch.device("cpu"))


@pytest.mark.parametrize(("metric", "name", "classes"), [("cmmd", "clip", 0), ("is", "inception", 5)])
def test_scores_of_other_extractors_are_those_of_their_formulas(
    metric: str, name: str, classes: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor = stand_in(name, classes)
    monkeypatch.setattr(samples, "make_extractor", lambda *_, **__: extractor)
    (figure,) = measured(small(model, tmp_path, metrics=metric, extractor=name, num_samples=20))
    assert figure["extractor"] == extractor.description

    pipeline: Any = DDPMExtPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(i) for i in range(20)]
    images = pipeline(20, generator=seeds, num_inference_steps=5, output_type="pt").images
    fake = extractor.forward((images * 255).round() / 255)
    if metric == "cmmd":
        real = extractor.forward(load_images("digits", split="train").batch(range(40)).pixels / 255).features.double()
        y = fake.features.double()

        def k(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.exp(-((a[:, None] - b[None]) ** 2).sum(2) / (2 * 10.0**2)).mean()

        expected = 1000 * (k(real, real) + k(y, y) - 2 * k(real, y)).item()
        assert "CMMD to 40 images of digits train (clip" in (tmp_path / "out" / "eval.md").read_text()
    else:
        assert fake.logits is not None
        found = []
        for logits in np.array_split(fake.logits.double().numpy(), 10):
            p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            found.append(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
        expected = float(np.mean(found))
        assert figure["std"] > 0
        assert "Inception score (inception" in (tmp_path / "out" / "eval.md").read_text()
    assert figure["value"] == pytest.approx(expected, rel=1e-3)  # float32 features, small differences of means


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_stopped(model: Path, tmp_path: Path) -> None:
    """SIGKILL after the first of three pieces; the same command takes that piece as it is and ends as one unkilled."""
    words = ["scripts/evaluate.py", "--cpu", f"--model={model}", "--dataset_name=digits", "--metrics=fid"]
    words += ["--extractor=pixels", "--num_samples=1500", "--num_inference_steps=20", "--max_reference_images=40"]
    words += [f"--reference_cache={tmp_path / 'references'}"]
    killed = [*words, f"--output_dir={tmp_path / 'killed'}"]
    process = start(killed)
    deadline = time.monotonic() + 200
    while not (pieces := sorted((tmp_path / "killed").rglob("samples-*/0*.safetensors"))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    assert not (tmp_path / "killed" / "eval.json").exists()
    former = {path: path.stat().st_mtime_ns for path in sorted(pieces[0].parent.glob("0*.safetensors"))}
    assert len(former) < 3
    for command in (killed, [*words, f"--output_dir={tmp_path / 'whole'}"]):
        code, said = finish(start(command))
        assert code == 0, said
    assert {path: path.stat().st_mtime_ns for path in former} == former
    found = [json.loads((tmp_path / name / "eval.json").read_text())["figures"] for name in ("killed", "whole")]
    assert found[0][0]["value"] == found[1][0]["value"]


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": "fid,bdp"}, "metrics must be one of 'bpd'.*got 'bdp'"),
        ({"metrics": ""}, "metrics must name at least one"),
        ({"sampler": "dpm"}, "sampler must be one of"),
        ({"variance_type": "fixed"}, "variance_type must be one of"),
        ({"timestep_spacing": "even"}, "timestep_spacing must be one of"),
        ({"cdf": "erf"}, "cdf must be one of"),
        ({"num_inference_steps": "10,x"}, "num_inference_steps must be whole numbers like 10,50,1000, got '10,x'"),
        ({"num_inference_steps": "0"}, "num_inference_steps"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"num_samples": 1}, "fid needs at least 2 generated images"),
        ({"metrics": "kid", "num_samples": 999}, "kid needs at least 1000 generated images, got num_samples = 999"),
        ({"metrics": "cmmd", "extractor": "pixels"}, 'cmmd is defined on the embeddings of the extractor "clip"'),
        ({"metrics": "is", "extractor": "pixels"}, "is needs a classifier"),
        ({"metrics": "rate_distortion", "num_timesteps_sampled": 5}, "rate_distortion needs every step"),
        ({"metrics": "fid", "sampler": "ddim,dpm++", "variance_type": "fixed_large"}, "neither is asked for"),
    ],
)
def test_wrong_options_are_sentences_before_anything_is_computed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalConfig(**options)


def test_the_command_line() -> None:
    words = ["--metrics", "bpd", "--num-samples=5", "--variance_type", "none", "--plots", "true", "--seed", "3"]
    config = parse_options(EvalConfig, "", words)
    assert (config.metrics, config.num_samples, config.variance_type, config.plots) == ("bpd", 5, None, True)
    assert config.seed == 3
    with pytest.raises(ValueError, match=r"no option --metric. Did you mean --metrics\?"):
        parse_options(EvalConfig, "", ["--metric", "bpd"])
    with pytest.raises(ValueError, match="num_samples"):
        parse_options(EvalConfig, "", ["--num_samples", "many"])


def test_a_number_asked_for_twice_is_measured_once(model: Path, tmp_path: Path) -> None:
    config = small(model, tmp_path, metrics="fid,fid", num_inference_steps="3, 5,03,5")
    assert config.steps == [3, 5]
    assert [figure["num_inference_steps"] for figure in measured(config)] == [3, 5]
    bits = small(model, tmp_path, metrics="bpd,fid", sampler="ddim", variance_type="fixed_large")
    assert bits.variances == ["fixed_large"]  # of bits/dim


def test_a_folder_that_is_no_pipeline_is_a_sentence(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(model, tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "unet")
    for folder, sentence in (("empty", "empty holds none"), ("broken", "config.json is missing")):
        with pytest.raises(ValueError, match=sentence):
            measured(small(tmp_path / folder, tmp_path))
    config = CalibrateConfig(model=str(tmp_path / "empty"), extractor="pixels", cpu=not is_installed())
    with pytest.raises(ValueError, match="A pipeline is a folder with model_index"):
        calibrate(config)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["evaluate", "calibrate"])
def test_the_command_says_so_and_ends_with_code_1(command: str, tmp_path: Path) -> None:
    words = [f"scripts/{command}.py", "--cpu", f"--model={tmp_path}", "--extractor=pixels"]
    code, said = finish(start([*words, f"--output_dir={tmp_path / 'out'}"]))
    assert code == 1
    assert "error: A pipeline is a folder with model_index.json" in said and "Traceback" not in said


def test_plots_that_cannot_be_drawn_are_refused_before_anything_is_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UNet2DModel, "forward", None)
    (tmp_path / "train").mkdir()
    Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / "train" / "0.png")
    alone = {"metrics": "bpd", "bpd_split": "train", "data_dir": str(tmp_path), "plots": True}
    with pytest.raises(ValueError, match=r'between two images of the split "train", got 1\. Leave --plots out'):
        measured(small(model, tmp_path, **alone))
    with pytest.raises(ValueError, match="validation"):
        measured(small(model, tmp_path, metrics="bpd", plots=True, reference_split="validation"))


def test_too_small_a_reference_and_a_reference_without_logits_are_sentences(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='kid needs at least 6 reference images, the split "train" gives 5'):
        measured(small(model, tmp_path, metrics="kid", max_reference_images=5))
    with pytest.raises(ValueError, match='fid needs at least 2 reference images, the split "train" gives 1: see max_'):
        measured(small(model, tmp_path, metrics="fid", max_reference_images=1))
    test, pixels = load_images("digits", split="test"), make_extractor("pixels")
    with pytest.raises(ValueError, match="A reference needs at least 2 images for its covariance, got 1"):
        make_reference(test, pixels, "uint8", Accelerator(cpu=not is_installed()), cache_dir=tmp_path, num_images=1)


def test_bits_and_errors_of_a_class_conditional_network_are_those_of_each_images_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UNet2DModel.from_config(tiny_unet().config, num_class_embeds=10)
    DDPMExtPipeline(unet, tiny_scheduler()).save_pretrained(tmp_path / "pipeline")
    (figure,) = measured(small(tmp_path / "pipeline", tmp_path, metrics="bpd"))
    accelerator = Accelerator(cpu=not is_installed())
    work: dict[str, Any] = {"seed": 0, "shards": Shards(tmp_path, {}, accelerator)}
    errors = set_errors(unet, tiny_scheduler(), load_images("digits", split="test"), num_images=6, **work)

    test, bits, mse = load_images("digits", split="test").batch(range(6)), [], []
    for i in range(6):

        def network(x: torch.Tensor, t: torch.Tensor, digit: torch.Tensor = test.labels[i]) -> torch.Tensor:
            return unet(x, t, class_labels=digit.expand(len(x))).sample

        pixels, (first, second) = test.pixels[i : i + 1], ([torch.Generator().manual_seed(i)] for _ in range(2))
        bits.append(bits_per_dim(network, tiny_scheduler(), pixels, generator=first).total.item())
        bound = make_bound(network, tiny_scheduler(), pixels, BoundOptions(clip_sample=False))
        mse.append(denoising_errors(bound, grid_images(pixels), second).mse_eps)
    assert figure["value"] == pytest.approx(sum(bits) / 6, rel=1e-5)  # float32 in other batches
    torch.testing.assert_close(errors.mse_eps, torch.cat(mse), rtol=1e-5, atol=1e-7)

    Image.new("L", (8, 8)).save(tmp_path / "cat_1.png")
    unlabelled = load_images(train_data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="have no classes: name their label_column"):
        set_bound(unet, tiny_scheduler(), unlabelled, num_images=1, options=BoundOptions(), **work)


# Pieces ---------------------------------------------------------------------------------------------------------------


class Process:
    """One of several processes, as far as pieces need to know, in a thread of its own."""

    def __init__(self, index: int, barrier: threading.Barrier) -> None:
        self.process_index, self.num_processes = index, barrier.parties
        self.is_main_process = index == 0
        self.barrier = barrier

    def wait_for_everyone(self) -> None:
        self.barrier.wait(timeout=20)


def squares(piece: range) -> dict[str, torch.Tensor]:
    return {"square": torch.tensor([i * i for i in piece])}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_pieces_over_processes_are_done_once_and_in_order(world: int, tmp_path: Path) -> None:
    barrier, done, results = threading.Barrier(world), [], {}

    def work(piece: range) -> dict[str, torch.Tensor]:
        done.append(piece)
        return squares(piece)

    def run(index: int) -> None:
        results[index] = Shards(tmp_path, {}, Process(index, barrier)).run("x", {"a": 1}, 23, 4, work)  # type: ignore[arg-type]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == world
    for found in results.values():
        assert found["square"].tolist() == [i * i for i in range(23)]
    assert sorted(len(piece) for piece in done) == [3, 4, 4, 4, 4, 4]


def test_a_kill_costs_the_piece_at_hand_alone(tmp_path: Path) -> None:
    alone, done = Process(0, threading.Barrier(1)), []

    def killed(piece: range) -> dict[str, torch.Tensor]:
        if piece.start == 8:
            raise KeyboardInterrupt
        return squares(piece)

    with pytest.raises(KeyboardInterrupt):
        Shards(tmp_path, {}, alone).run("x", {"a": 1}, 23, 4, killed)  # type: ignore[arg-type]

    def work(piece: range) -> dict[str, torch.Tensor]:
        done.append(piece.start)
        return squares(piece)

    found = Shards(tmp_path, {}, alone).run("x", {"a": 1}, 23, 4, work)  # type: ignore[arg-type]
    assert found["square"].tolist() == [i * i for i in range(23)]
    assert done == [8, 12, 16, 20]
    Shards(tmp_path, {}, alone).run("x", {"a": 2}, 23, 4, work)  # type: ignore[arg-type]
    assert len(done) == 10  # another key shares nothing


def test_a_piece_of_something_else_is_refused(tmp_path: Path) -> None:
    save_whole({"x": torch.zeros(2)}, tmp_path / "x.safetensors", {"seed": 0, "weights": "ab"})
    assert load_checked(tmp_path / "x.safetensors", {"weights": "ab", "seed": 0})["x"].tolist() == [0, 0]
    with pytest.raises(ValueError, match="made for something else: seed is 0, needed 1"):
        load_checked(tmp_path / "x.safetensors", {"seed": 1, "weights": "ab"})


KEY_OF_A_SPARSE_CONFIG = """
from diffusers import DDPMScheduler
from ddpm_ext.evaluation.samplers import make_scheduler
from ddpm_ext.pipelines.identity import key_hash, scheduler_options

sparse = DDPMScheduler.from_config({"num_train_timesteps": 50, "beta_end": 0.3, "clip_sample": False})
for sampler in ("ddpm", "ddim", "dpm++"):
    print(key_hash(scheduler_options(make_scheduler(sparse, sampler))))
"""


@pytest.mark.slow
def test_every_process_finds_the_pieces_of_a_sparse_stock_config() -> None:
    """Diffusers notes the defaults that a config leaves out as a list in the order of a set."""
    said = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        words = [sys.executable, "-c", KEY_OF_A_SPARSE_CONFIG]
        said.append(subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.split())
    assert said[0] == said[1]
    assert len(set(said[0])) == 3


def test_a_key_holds_every_option_that_matters_and_no_note() -> None:
    there = scheduler_options(tiny_scheduler())
    loaded = DDPMExtScheduler.from_config({**tiny_scheduler().config, "_class_name": "DDPMScheduler"})
    assert scheduler_options(loaded) == there
    assert not any(name.startswith("_") for name in there)
    for options in ({"clip_sample": False}, {"trained_betas": [0.3] * 20}, {"prediction_type": "sample"}):
        assert scheduler_options(tiny_scheduler(**options)) != there
    loaded.register_to_config(_ddpm_ext={"trajectory": "even", "eta": 0.5})
    other = DDPMExtScheduler.from_config(loaded.config)
    other.register_to_config(_ddpm_ext={"eta": 0.5, "trajectory": "even"})
    assert there != scheduler_options(loaded) == scheduler_options(other)
    json.dumps([scheduler_options(make_scheduler(loaded, sampler)) for sampler in ("ddim", "dpm++")], allow_nan=False)


# References -----------------------------------------------------------------------------------------------------------


def test_a_reference_is_made_once_and_is_the_features_of_the_set(tmp_path: Path) -> None:
    images, accelerator = load_images("digits", split="test"), Accelerator(cpu=not is_installed())
    extractor, calls = make_extractor("pixels"), []
    plain = extractor.forward
    object.__setattr__(extractor, "forward", lambda x: calls.append(len(x)) or plain(x))
    made = make_reference(images, extractor, "uint8", accelerator, cache_dir=tmp_path, batch_size=100)
    again = make_reference(images, extractor, "uint8", accelerator, cache_dir=tmp_path, batch_size=100)
    assert calls == [100, 100, 97]
    expected = images.batch(range(297)).pixels.reshape(297, -1) / 255
    torch.testing.assert_close(again.features, expected)
    assert torch.equal(made.features, again.features)
    statistics = metrics.feature_statistics(expected)
    torch.testing.assert_close(again.statistics.covariance, statistics.covariance)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]  # the pieces are gone
    make_reference(images, extractor, "float", accelerator, cache_dir=tmp_path)
    make_reference(images, extractor, "uint8", accelerator, cache_dir=tmp_path, num_images=50)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_reference_made_with_another_extractor_is_refused(tmp_path: Path) -> None:
    images, accelerator = load_images("digits", split="test"), Accelerator(cpu=not is_installed())
    made = make_reference(images, make_extractor("pixels"), "uint8", accelerator, cache_dir=tmp_path)
    path = next(tmp_path.iterdir())
    assert load_reference(path, made.key).key == made.key
    with pytest.raises(ValueError, match=r"extractor is .*'pixels'.*needed .*'inception'"):
        load_reference(path, {**made.key, "extractor": {"name": "inception"}})
    with pytest.raises(ValueError, match="resolution is"):
        load_reference(path, {**made.key, "resolution": [1, 16, 16]})


# During training ------------------------------------------------------------------------------------------------------


def test_a_small_evaluation_repeats_itself_and_follows_the_weights(tmp_path: Path) -> None:
    train, test = (load_images("digits", split=split) for split in ("train", "test"))
    measure = Validation(
        train,
        test,
        make_extractor("pixels"),
        Accelerator(cpu=not is_installed()),
        ValidationOptions(
            num_samples=10, num_inference_steps=4, num_held_out=5, num_timesteps_sampled=None, batch_size=4
        ),
        cache_dir=tmp_path,
    )
    unet, scheduler = tiny_unet(), tiny_scheduler()
    first, again = measure(unet, scheduler), measure(unet, scheduler)
    assert first == again
    seeds = [torch.Generator().manual_seed(i) for i in range(5)]
    bits = bits_per_dim(unet, scheduler, test.batch(range(5)).pixels, generator=seeds)
    assert first["bits_per_dim"] == pytest.approx(bits.total.mean().item(), rel=1e-6)
    with torch.no_grad():
        unet.conv_out.weight.zero_()
        unet.conv_out.bias.zero_()
    other = measure(unet, scheduler)
    assert other["fid"] != first["fid"] and other["bits_per_dim"] != first["bits_per_dim"]


def test_tables_hold_every_kind_of_figure() -> None:
    data = {"name": "digits", "split": "test", "num_images": 297}
    parts = {"prior": 0.00003, "rate": 1.5, "decoder": 1.25}
    bits = {"metric": "bpd", "value": 2.75003, "parts": parts, "dataset": data}
    bits |= {"variance_type": "fixed_small", "num_inference_steps": 1000, "standard_error": 0.012}
    rows = [{"label": n, "rate_bits_per_dim": n / 100, "distortion_rmse": 1.0 / n} for n in (500, 1000)]
    text = markdown([bits, {**bits, "metric": "rate_distortion", "rows": rows}])
    assert "| 297 images of digits test | fixed_small | 1000 | 0.0000 | 1.5000 | 1.2500 | 2.7500 ± 0.0120 |" in text
    assert text.index("| 1000 | 10.00000 | 0.00100 |") < text.index("| 500 | 5.00000 | 0.00200 |")


def test_every_condition_that_differs_names_its_row() -> None:
    other = {"name": "digits", "split": "train", "num_images": 1500, "fingerprint": "g"}
    figures = [
        score(1.0),
        score(2.0, seed=1),
        score(3.0, timestep_spacing="trailing"),
        score(4.0, timestep_spacing=None, trajectory="optimal"),
        score(5.0, eta=0.0),
        score(6.0, reference=other),
        score(7.0, sampler="ddim", variance_type=None, eta=None),
    ]
    lines = markdown(figures).replace("**", "").splitlines()
    assert len(lines) == 2 + 2 + 7
    assert "| ddpm, fixed_small, leading spacing, η = 1, seed 1, reference fingerprint f | 2 |" in lines
    assert "| ddpm, fixed_small, trailing spacing, η = 1, seed 0, reference fingerprint f | 3 |" in lines
    assert "| ddpm, fixed_small, optimal trajectory, η = 1, seed 0, reference fingerprint f | 4 |" in lines
    assert "| ddim, leading spacing, seed 0, reference fingerprint f | 7 |" in lines
    # What none of them differs in goes unsaid, and η, which DDIM has not, makes no difference.
    assert "| ddim | 7 |" in markdown([figures[0], figures[-1]])
    assert "| ddpm, fixed_small | **1** |" in markdown([figures[0], figures[-1]])
    assert "| ddpm, fixed_small, η = 0 | 5 |" in markdown([figures[0], figures[4], figures[-1]])


def test_tables_are_of_the_weights_measured_last() -> None:
    text = markdown(
        [score(1.0, weights="old"), score(2.0), score(3.0, network="other"), score(4.0, seed=1), score(5.0)]
    )
    text = text.replace("**", "")
    assert text.startswith("Left out: 2 results of other weights; see eval.json.")
    assert "| 1 |" not in text and "| 3 |" not in text and "| 4 |" in text and "| 5 |" in text
    assert "Left out" not in markdown([score(2.0), score(4.0, seed=1)])
    assert markdown([]) == ""


def test_an_inception_score_is_of_no_reference() -> None:
    figures = [score(2.0, metric="is", std=0.5), score(3.0)]
    text = markdown(figures)
    assert "Inception score (pixels, 50 samples, quantization uint8):" in text
    assert "Fréchet distance to 1,500 images of digits train (pixels, 50 samples, quantization uint8):" in text


def test_bits_under_other_conditions_are_told_apart() -> None:
    data = {"name": "digits", "split": "test", "num_images": 297}
    parts = {"prior": 0.0, "rate": 1.5, "decoder": 1.25}
    bits = {"metric": "bpd", "value": 2.75, "parts": parts, "dataset": data, "seed": 0, "cdf": "tanh"}
    bits |= {"variance_type": "fixed_small", "num_inference_steps": 1000, "num_timesteps_sampled": None}
    text = markdown([bits, {**bits, "seed": 1}, {**bits, "num_timesteps_sampled": 50, "cdf": "exact"}])
    assert "| fixed_small, seed 0, cdf tanh | 1000 |" in text
    assert "| fixed_small, seed 1, cdf tanh | 1000 |" in text
    assert "| fixed_small, seed 0, cdf exact, num timesteps sampled 50 | 1000 |" in text
    row = {"label": 1000, "rate_bits_per_dim": 1.0, "distortion_rmse": 2.0}
    rates = [{**bits, "metric": "rate_distortion", "rows": [row], "seed": seed} for seed in (0, 1)]
    assert "test, fixed_small, 1000 steps, seed 1:" in markdown(rates)
