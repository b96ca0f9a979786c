"""What is measured or fitted under class guidance: against a Gaussian mixture, and what says so when it is another."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import diffusers.guiders
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from mixture import CLASSES, MEANS, Mixture, S, conditional_eps, guided_pipeline, unconditional_eps
from training import TORCHRUN, finish, start

from ddpm_ext.demo import Studio
from ddpm_ext.diffusion.analytic import optimal_variance
from ddpm_ext.errors import UserError
from ddpm_ext.evaluation import plots
from ddpm_ext.evaluation.bound.bits_per_dim import BoundOptions, bits_per_dim, make_bound
from ddpm_ext.evaluation.bound.denoising_errors import denoising_errors
from ddpm_ext.evaluation.calibrate import calibrate
from ddpm_ext.evaluation.config import CalibrateConfig, EvalConfig
from ddpm_ext.evaluation.evaluate import evaluate
from ddpm_ext.models.classes import class_options
from ddpm_ext.pipelines.config import SampleConfig
from ddpm_ext.pipelines.ddpm import DDPMExtPipeline
from ddpm_ext.pipelines.guidance import make_guidance, setting_of
from ddpm_ext.pipelines.sampling import sample_to_folder
from ddpm_ext.schedulers.ddpm import DDPMExtScheduler

W = 1.5


def exact_error(alpha_bar: float, label: int, w: float) -> float:
    r"""E (ε - ε̃)² of one class: ᾱ s²/v + w² E (ε̂(x|c) - ε̂(x))², v = ᾱ s² + 1 - ᾱ, by Gauss-Hermite quadrature.

    The two terms add up because ε̂(x|c) is the mean of ε given x and c, and the rest of ε̃ a function of x and c.
    """
    var = alpha_bar * S**2 + 1 - alpha_bar
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(200))
    x = alpha_bar**0.5 * MEANS[label] + var**0.5 * nodes
    gap = conditional_eps(x, alpha_bar, label) - unconditional_eps(x, alpha_bar)
    return alpha_bar * S**2 / var + w**2 * (weights * gap**2).sum().item() / (2 * torch.pi) ** 0.5


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_errors_under_guidance_are_the_mixtures_own(kind: Any) -> None:
    """To three standard errors at every step; outside the interval those of no guidance."""
    scheduler = DDPMExtScheduler(20, 1e-3, 0.6, prediction_type=kind, variance_type="analytic")
    labels = torch.arange(CLASSES).repeat(40)
    x_0 = MEANS[labels].reshape(-1, 1, 1, 1) + S * torch.randn(len(labels), 1, 8, 8, dtype=torch.float64)
    bound = make_bound(Mixture(scheduler), scheduler, x_0, BoundOptions(clip_sample=False), labels)
    guidance = make_guidance(
        class_options(CLASSES, with_null_label=True), 20, guidance_scale=W, guidance_interval=(5, 14)
    )
    found = denoising_errors(bound, x_0, torch.Generator().manual_seed(0), guidance).mse_eps
    for t, alpha_bar in enumerate(scheduler.tables.alpha_bar.tolist()):
        w = W if 5 <= t <= 14 else 0.0
        for label in range(CLASSES):
            of_class = found[labels == label, t]
            error = of_class.std() / len(of_class) ** 0.5
            assert abs(of_class.mean() - exact_error(alpha_bar, label, w)) < 4 * error, (t, label)
    plain = denoising_errors(bound, x_0, torch.Generator().manual_seed(0)).mse_eps
    assert torch.equal(found[:, :5], plain[:, :5]) and (found[:, 8] > plain[:, 8]).all()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guided") / "model"
    guided_pipeline(DDPMExtScheduler(20, 1e-3, 0.6), classes=10).save_pretrained(folder)
    return folder


def options(model: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "model": str(model),
        "output_dir": str(folder),
        "dataset_name": "digits",
        "num_inference_steps": "4",
        "metrics": "none",
        "extractor": "pixels",
        "num_samples": 6,
        "max_reference_images": 30,
        "reference_cache": str(folder / "references"),
        "cpu": True,
    }
    return {**usual, **changes}


GUIDED: dict[str, Any] = {"guidance_scale": W, "guidance_interval": [3, 15], "guidance_rescale": 0.5}


@pytest.fixture(scope="module")
def calibrated(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Variances and a solver, measured and fitted under one guidance."""
    folder = tmp_path_factory.mktemp("calibrated")
    fit = {"solver_steps": "3", "num_noises": 4, "num_held_out": 2, "num_images": 6, "plots": False}
    record = calibrate(CalibrateConfig(**options(model, folder, **fit, **GUIDED)))
    assert record["guidance"] == GUIDED
    plain = calibrate(CalibrateConfig(**options(model, folder / "plain", **{**fit, "solver_steps": None})))
    assert plain["guidance"] == {}
    inside = np.array(record["mse_eps"]) != np.array(plain["mse_eps"])
    assert inside.tolist() == [3 <= t <= 15 for t in range(20)]
    return folder / "pipeline"


def chain_of(folder: Path, solver: bool) -> tuple[DDPMExtPipeline, int]:
    """The calibrated pipeline as a solver of 3 calls, or as 4 steps of the analytic variance."""
    pipeline: Any = DDPMExtPipeline.from_pretrained(folder)
    if not solver:
        pipeline.scheduler = DDPMExtScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, 3 if solver else 4


@pytest.mark.parametrize("solver", [False, True], ids=["variances", "solver"])
def test_every_way_to_draw_with_another_guidance_warns_and_with_its_own_does_not(
    solver: bool, calibrated: Path
) -> None:
    pipeline, K = chain_of(calibrated, solver)
    ask: dict[str, Any] = {"num_inference_steps": K, "class_labels": [0, 2]}

    def said(**guidance: Any) -> list[str]:
        found: list[list[str]] = []
        for draw in (pipeline, lambda *words, **more: list(pipeline.progressive(*words, **more))):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                draw(2, **ask, **guidance)
            found.append([str(one.message) for one in caught])
        assert found[0] == found[1]
        return found[0]

    own = r"with guidance_scale 1.5 at 3 <= t <= 15, rescaled 0.5, and the network is used with "
    assert said(**GUIDED) == []
    guider = diffusers.guiders.AdaptiveProjectedGuidance()
    for other, name in (
        ({}, "no guidance"),
        ({"guidance_scale": W}, "guidance_scale 1.5:"),
        ({**GUIDED, "guidance_interval": (3, 14)}, "guidance_scale 1.5 at 3 <= t <= 14, rescaled 0.5"),
        ({**GUIDED, "guidance_rescale": 0.25}, "guidance_scale 1.5 at 3 <= t <= 15, rescaled 0.25"),
        ({"guider": guider}, "AdaptiveProjectedGuidance"),
    ):
        (sentence,) = said(**other)
        assert own + name in sentence and "Calibrate with this guidance" in sentence


def test_settings_that_guide_alike_are_equal() -> None:
    config = class_options(CLASSES, with_null_label=True)
    guide = diffusers.guiders.ClassifierFreeGuidance

    def setting(**asked: Any) -> Any:
        return setting_of(make_guidance(config, 1000, **asked), 1000)

    assert setting() == setting(guidance_scale=0.0)
    assert setting(guidance_scale=2.0) == setting(guidance_scale=2, guidance_interval=(0, 999))
    assert setting(guidance_scale=2.0) == setting(guider=guide(guidance_scale=3.0))
    same = setting(guider=guide(2.0, guidance_rescale=0.5, use_original_formulation=True))
    assert setting(guidance_scale=2.0, guidance_rescale=0.5) == same
    assert setting(guidance_scale=2.0) != setting(guider=guide(guidance_scale=3.0, start=0.1))


def test_sampling_evaluation_bits_and_the_demo_warn_too(calibrated: Path, tmp_path: Path) -> None:
    analytic = tmp_path / "analytic"
    chain_of(calibrated, solver=False)[0].save_pretrained(analytic)
    words = "measured with guidance_scale 1.5 at 3 <= t <= 15, rescaled 0.5, and the network is used with "
    sampled: dict[str, Any] = {"model": str(analytic), "num_samples": 2, "num_inference_steps": 4, "class_label": "1"}
    with pytest.warns(UserWarning, match=words + "no guidance"):
        sample_to_folder(SampleConfig(**sampled, output_dir=str(tmp_path / "samples"), cpu=True))
    asked = options(analytic, tmp_path / "eval", metrics="fid", guidance_scale=1.0)
    with pytest.warns(UserWarning, match=words + "guidance_scale 1"):
        evaluate(EvalConfig(**asked))
    with pytest.warns(UserWarning, match=words + "no guidance"):
        pixels = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
        pipeline: Any = DDPMExtPipeline.from_pretrained(analytic)
        bits_per_dim(pipeline.unet, pipeline.scheduler, pixels, class_labels=[0])
    with pytest.warns(UserWarning, match=words + "guidance_scale 1"):
        shown = list(Studio(str(analytic)).generate(4, "ddpm", 0, label=1, guidance_scale=1.0, count=1))
    assert all(words + "guidance_scale 1" in line for _, line in shown)  # in the page, too


def test_the_page_says_that_a_solver_was_fitted_under_another_guidance(calibrated: Path, tmp_path: Path) -> None:
    chain_of(calibrated, solver=True)[0].save_pretrained(tmp_path)
    studio = Studio(str(tmp_path))
    assert "solver 3" in studio.samplers()
    with pytest.warns(UserWarning, match="and the network is used with no guidance"):
        lines = [line for _, line in studio.generate(3, "solver 3", 0, label=1, count=1)]
    assert lines[-1].startswith("step 3 of 3. ") and all("is used with no guidance" in line for line in lines)
    plain = guided_pipeline(DDPMExtScheduler(20, 1e-3, 0.6), classes=10)
    plain.save_pretrained(tmp_path / "plain")
    (*_, (_, line)) = Studio(str(tmp_path / "plain")).generate(4, "ddpm", 0, label=1, guidance_scale=2.0, count=1)
    assert line == "t = 0, step 4 of 4"


@pytest.mark.filterwarnings("ignore:guidance_interval")  # two images mixed at t = 2 are below it
def test_the_papers_plots_of_a_guided_evaluation_are_guided(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures 6, 7 and 8: each call of the network has every image twice where t lies in the interval, once else."""
    seen: set[tuple[bool, bool]] = set()
    forward = UNet2DModel.forward

    def listen(self: UNet2DModel, x: Any, t: Any, class_labels: Any, **more: Any) -> Any:
        half = len(x) // 2
        twice = len(x) % 2 == 0 and torch.equal(x[:half], x[half:]) and bool((class_labels[half:] == 10).all())
        seen.add((3 <= int(t) <= 15, twice))
        return forward(self, x, t, class_labels=class_labels, **more)

    pytest.importorskip("matplotlib")
    asked = {**options(model, tmp_path, metrics="fid"), **GUIDED, "plots": True}
    config = EvalConfig(**asked)
    drawn: dict[str, Any] = {}

    def draw(*words: Any, **more: Any) -> None:
        monkeypatch.setattr(UNet2DModel, "forward", listen)
        drawn["options"] = words[4]
        plots.draw_paper(*words, **more)

    monkeypatch.setattr("ddpm_ext.evaluation.evaluate.draw_paper", draw)
    evaluate(config)
    assert drawn["options"] == {"guidance_scale": W, "guidance_interval": [3, 15], "guidance_rescale": 0.5}
    assert seen == {(True, True), (False, False)}
    assert {path.name for path in (tmp_path / "plots").iterdir()} > {"progressive.png", "interpolation.png"}


@pytest.mark.filterwarnings("error::UserWarning")
def test_stock_reads_none_of_it(calibrated: Path, tmp_path: Path) -> None:
    """A stock scheduler of the folder takes the step of one made by hand."""
    chain_of(calibrated, solver=False)[0].save_pretrained(tmp_path / "analytic")
    found: Any = DDPMScheduler.from_pretrained(tmp_path / "analytic", subfolder="scheduler")
    by_hand = DDPMScheduler(num_train_timesteps=20, beta_start=1e-3, beta_end=0.6, variance_type="fixed_small")
    x_t, eps, steps = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), []
    scheduler: Any
    for scheduler in (found, by_hand):
        scheduler.set_timesteps(4)
        seed = torch.Generator().manual_seed(0)
        steps.append(scheduler.step(eps, scheduler.timesteps[0], x_t, generator=seed).prev_sample)
    assert torch.equal(*steps)


def test_the_analytic_variance_follows_the_guided_errors(calibrated: Path) -> None:
    pipeline, _ = chain_of(calibrated, solver=False)
    scheduler: Any = pipeline.scheduler
    mse = torch.tensor(scheduler.config["_ddpm_ext"]["mse_eps"], dtype=torch.float64)
    s, t = torch.tensor([9]), torch.tensor([10])
    expected = optimal_variance(scheduler.tables, mse, s, t)
    found = scheduler.p_mean_variance(torch.zeros(1, 1, 8, 8), t, torch.zeros(1, 1, 8, 8)).log_var
    torch.testing.assert_close(found.exp().double().flatten()[:1], expected, rtol=1e-5, atol=0)


def test_bits_of_a_guided_calibration_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bpd of a guided chain are not measured"):
        CalibrateConfig(**options(model, tmp_path, metrics="bpd,fid", guidance_scale=1.0))


@pytest.mark.slow
def test_two_processes_measure_a_guided_model_as_one_does(model: Path, tmp_path: Path) -> None:
    words = ["scripts/evaluate.py", "--cpu", f"--model={model}", "--dataset_name=digits", "--extractor=pixels"]
    words += ["--metrics=fid,fid_per_class", "--num_samples=60", "--num_inference_steps=4", "--guidance_scale=2"]
    words += [
        "--guidance_interval",
        "3",
        "15",
        "--guidance_rescale=0.5",
        f"--reference_cache={tmp_path / 'references'}",
    ]
    found: list[list[dict[str, Any]]] = []
    for name, launcher in (("one", (sys.executable,)), ("two", (*TORCHRUN, "2"))):
        code, said = finish(start([*words, f"--output_dir={tmp_path / name}"], launcher))
        assert code == 0, said
        found.append(json.loads((tmp_path / name / "eval.json").read_text())["figures"])
    more = {"metrics": "fid,fid_per_class", "num_samples": 60, "max_reference_images": 3000}
    config = EvalConfig(**options(model, tmp_path / "plain", **more))
    for one, two, plain in zip(*found, evaluate(config), strict=True):
        assert two["certificate"]["num_processes"] == 2
        assert two["certificate"]["options"]["guidance_interval"] == [3, 15]
        assert one["value"] == pytest.approx(two["value"], rel=1e-6) != plain.value


def test_few_step_rows_of_a_guided_evaluation_are_guided(model: Path, tmp_path: Path) -> None:
    """A row of DDIM is what the sampler "ddim" draws with the same guidance."""
    asked = options(model, tmp_path, metrics="fid", num_inference_steps="3,4", **GUIDED)
    results = evaluate(EvalConfig(**asked, sampler="ddim"))
    for K in (3, 4):
        own, row = (
            next(r for r in results if r.sampler == name and r.num_inference_steps == K) for name in ("ddim", "DDIM")
        )
        assert row.value == pytest.approx(own.value, rel=1e-9) and row.guidance_scale == own.guidance_scale == W
    assert row.guidance_interval == [3, 15] and row.guidance_rescale == 0.5
