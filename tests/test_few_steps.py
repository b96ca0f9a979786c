"""Solvers fitted by `calibrate`, and the rows that every few-step table carries: against samples drawn by hand."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from evaluations import on_digits
from networks import tiny_unet
from training import TORCHRUN, finish, start

from ddpm_ext.data.dataset import load_images
from ddpm_ext.diffusion.solver_fit import Problem, choose_times, fit_solver, refine_solver, restore_contrast
from ddpm_ext.diffusion.solvers import Reference, solve_reference
from ddpm_ext.errors import UserError
from ddpm_ext.evaluation.calibrate import calibrate
from ddpm_ext.evaluation.config import CalibrateConfig, EvalConfig
from ddpm_ext.evaluation.evaluate import evaluate
from ddpm_ext.evaluation.features import metrics
from ddpm_ext.evaluation.samplers import STOCK_SETTINGS
from ddpm_ext.evaluation.solvers.fit import (
    NOISE_SEED,
    REFERENCE_WORDS,
    Candidate,
    FitOptions,
    FittedNetwork,
    reference_scheduler,
)
from ddpm_ext.models.classes import class_options
from ddpm_ext.pipelines.ddpm import DDPMExtPipeline
from ddpm_ext.schedulers.ddpm import DDPMExtScheduler
from ddpm_ext.schedulers.solver import DDPMExtSolverScheduler, fitted_solvers

T = 30


def network(**options: Any) -> UNet2DModel:
    return tiny_unet(**{"block_out_channels": (8, 8), **options})


def config_of(model: Path, folder: Path, **options: Any) -> CalibrateConfig:
    usual: dict[str, Any] = {
        **on_digits(folder),
        "num_inference_steps": "none",
        "solver_steps": "2,4",
        "num_noises": 6,
        "num_held_out": 3,
        "metrics": "fid",
        "num_samples": 8,
        "batch_size": 4,
        "cpu": True,
    }
    return CalibrateConfig(model=str(model), **{**usual, **options})


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository as stock Diffusers writes it."""
    folder = tmp_path_factory.mktemp("stock")
    DDPMPipeline(network(), DDPMScheduler(T, 1e-3, 0.6, variance_type="fixed_large")).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def done(stock: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One calibration of solvers alone, with scores."""
    folder = tmp_path_factory.mktemp("few_steps")
    config = config_of(stock, folder)
    return SimpleNamespace(config=config, record=calibrate(config), out=folder / "out", folder=folder)


def solver_of(folder: Path) -> DDPMExtSolverScheduler:
    scheduler = DDPMExtPipeline.from_pretrained(folder).scheduler
    assert type(scheduler) is DDPMExtSolverScheduler
    return scheduler


def test_the_stored_solver_is_the_fit_of_the_noises_that_the_seed_says(done: SimpleNamespace) -> None:
    """Reference, steps and coefficients by hand, without pieces; calibration.json, folder and record say the same."""
    scheduler = solver_of(done.out / "pipeline")
    fitted = fitted_solvers(scheduler.config)
    assert fitted is not None and fitted.reference == done.record["solver"]["reference"]
    assert json.loads((done.out / "calibration.json").read_text()) == done.record
    made = [torch.Generator().manual_seed(NOISE_SEED + i) for i in range(9)]
    x_T = torch.stack([torch.randn(1, 8, 8, generator=one) for one in made])
    unet = network()

    @torch.no_grad()
    def predict(x: torch.Tensor, t: int) -> Any:
        return scheduler.estimate(unet(x, t).sample, t, x, fitted.reference)

    calls = done.record["solver"]["reference_steps"]
    reference: Reference = solve_reference(predict, x_T, scheduler.tables, calls)
    problem = Problem(predict, reference, scheduler.tables, 3, num_fit=6, clip=1.0)
    for K, solver in fitted.solvers.items():
        fit = fit_solver(problem, choose_times(problem, K).solver.times)
        fit = restore_contrast(problem, refine_solver(problem, fit))
        assert solver.times == fit.solver.times
        torch.testing.assert_close(solver.coefficients, fit.solver.coefficients, rtol=1e-2, atol=1e-3)  # float32
        stored = done.record["solver"]["steps"][str(K)]
        assert stored["squared_distance"] == pytest.approx(fit.squared_distance, rel=1e-3)
        assert stored["order"] == 3 and stored["num_noises"] == [6, 3]


def test_stock_loads_the_folder_and_ours_draws_with_the_solver(done: SimpleNamespace) -> None:
    plain: Any = DDPMPipeline.from_pretrained(str(done.out / "pipeline"))
    assert type(plain.scheduler) is DPMSolverMultistepScheduler and plain.scheduler.config["use_lu_lambdas"]
    pipe: Any = DDPMExtPipeline.from_pretrained(done.out / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    for K in (2, 4):
        assert pipe(2, num_inference_steps=K, output_type="pt").images.shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="2, 4"):
        pipe(num_inference_steps=3)


def samples(scheduler: Any, K: int, count: int = 8) -> torch.Tensor:
    pipe = DDPMExtPipeline(network(), scheduler)
    pipe.scheduler = scheduler  # as it is: a stock DDPMScheduler would be turned into ours
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(i) for i in range(count)]
    images: Any = pipe(count, generator=generator, num_inference_steps=K, output_type="pt").images
    return (images * 255).round().flatten(1) / 255


def distance(features: torch.Tensor) -> float:
    pixels: Any = load_images("digits", split="train").batch(range(40)).pixels
    real = pixels.float().flatten(1) / 255
    return metrics.frechet_distance(*(metrics.feature_statistics(x) for x in (real, features)))


def figure(record: dict[str, Any], sampler: str, K: int) -> dict[str, Any]:
    (found,) = [f for f in record["figures"] if (f["sampler"], f["num_inference_steps"]) == (sampler, K)]
    return found


def test_every_row_is_of_the_same_noises_and_knows_its_distance_to_the_reference(done: SimpleNamespace) -> None:
    record, kind = done.record, done.record["solver"]["reference"]
    options = {"num_train_timesteps": T, "beta_start": 1e-3, "beta_end": 0.6}
    calls = record["solver"]["reference_steps"]
    reference = samples(reference_scheduler(DDPMExtScheduler(**options), Candidate(kind, calls)), calls)
    row = figure(record, f"reference, {calls} calls ({REFERENCE_WORDS[kind]})", calls)
    assert row["value"] == pytest.approx(distance(reference), rel=1e-4)
    assert row["parts"]["squared_distance"] == 0
    drawn = {
        ("DDIM", 4): samples(DDIMScheduler(**options), 4),
        ("DPM-Solver++ 2M, lu lambdas", 4): samples(DPMSolverMultistepScheduler(**options, use_lu_lambdas=True), 4),
        (f"fitted ({REFERENCE_WORDS[kind]})", 2): samples(solver_of(done.out / "pipeline"), 2),
    }
    for (name, K), features in drawn.items():
        row = figure(record, name, K)
        assert row["value"] == pytest.approx(distance(features), rel=1e-4)
        gap = (features.double() - reference).square().mean().item()
        assert row["parts"]["squared_distance"] == pytest.approx(gap, rel=1e-4)
    fitted = figure(record, f"fitted ({REFERENCE_WORDS[kind]})", 4)
    assert fitted["when"] == "after"
    names = {f["sampler"] for f in record["figures"]}
    assert {setting.name for setting in STOCK_SETTINGS} < names
    text = (done.out / "calibration.md").read_text()
    assert "Mean squared distance of the features to those of the reference" in text
    assert (done.out / "plots").is_dir()


def test_the_reference_is_the_candidate_of_the_lowest_score(done: SimpleNamespace) -> None:
    """Every kind with every number of steps that a chain of 30 has, by the images of the noises of the fit."""
    found = done.record["solver"]
    scores = found["reference_scores"]
    assert list(scores) == [f"{kind}, {calls} calls" for kind in REFERENCE_WORDS for calls in (30, 20)]
    good = 1.05 * min(scores.values())  # the first of those that are equally good
    assert f"{found['reference']}, {found['reference_steps']} calls" == next(k for k in scores if scores[k] <= good)
    assert "lowest" in found["reason"]
    x_T = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(NOISE_SEED + i)) for i in range(9)])
    stock = DDIMScheduler(T, 1e-3, 0.6, timestep_spacing="trailing")  # raw ε̂, clipped x̂_0
    stock.set_timesteps(T)
    unet, x = network(), x_T
    with torch.no_grad():
        for t in stock.timesteps:
            x = stock.step(unet(x, t).sample, int(t), x).prev_sample
    images = ((x / 2 + 0.5).clamp(0, 1) * 255).round().flatten(1) / 255
    assert scores["clipped_raw, 30 calls"] == pytest.approx(distance(images), rel=1e-3)


def test_it_goes_on_where_it_stopped(done: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command again asks the network nothing: references, solvers and samples lie in their pieces."""

    def forward(*_: Any, **__: Any) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(UNet2DModel, "forward", forward)
    again = calibrate(done.config)
    assert again["solver"]["steps"] == done.record["solver"]["steps"]


def test_a_fit_that_was_cut_off_goes_on_with_the_next_number_of_calls(
    stock: Path, done: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest solver is on disk when the next is cut off; it is not fitted again, and the folder is the same."""
    fitted: list[int] = []
    fit_one = FittedNetwork.fit_one

    def cut(self: FittedNetwork, K: int, *rest: Any) -> Any:
        fitted.append(K)
        if fitted == [4, 2]:
            raise KeyboardInterrupt
        return fit_one(self, K, *rest)

    monkeypatch.setattr(FittedNetwork, "fit_one", cut)
    found = done.record["solver"]
    options = {"solver_reference": found["reference"], "reference_steps": str(found["reference_steps"])}
    config = config_of(stock, tmp_path, metrics="none", **options)
    with pytest.raises(KeyboardInterrupt):
        calibrate(config)
    record = calibrate(config)
    assert fitted == [4, 2, 2] and record["solver"]["steps"] == found["steps"]


@pytest.mark.slow
def test_two_processes_fit_what_one_does(stock: Path, done: SimpleNamespace, tmp_path: Path) -> None:
    found = done.record["solver"]
    options = {"solver_reference": found["reference"], "reference_steps": str(found["reference_steps"])}
    words = ["scripts/calibrate.py"]
    for name, value in vars(config_of(stock, tmp_path, metrics="none", plots=False, **options)).items():
        if value is not None:
            words.append(f"--{name}={value}")
    code, output = finish(start(words, (*TORCHRUN, "2")))
    assert code == 0, output
    together = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert together["solver"]["steps"] == found["steps"]


def test_no_data_is_asked_for_without_scores(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpm_ext.data.spec.DataSpec.load", lambda *_: pytest.fail("data were loaded"))
    config = config_of(stock, tmp_path, metrics="none", dataset_name=None, solver_steps="2")
    record = calibrate(config)
    assert record["solver"]["reference"] == "clipped" and "no extractor" in record["solver"]["reason"]
    assert record["figures"] == [] and solver_of(tmp_path / "out" / "pipeline").solver_steps == [2]


def test_errors_and_solvers_go_together(stock: Path, tmp_path: Path) -> None:
    """The folder holds both; bits/dim of a shorter chain take the optimal trajectory, images the solver."""
    options = {"metrics": "none", "num_inference_steps": "5,30", "num_images": 4, "solver_steps": "2"}
    calibrate(config_of(stock, tmp_path, **options, solver_reference="unclipped"))
    scheduler = solver_of(tmp_path / "out" / "pipeline")
    extra = scheduler.config["_ddpm_ext"]
    assert extra["trajectory"] == "even" and len(extra["mse_eps"]) == T and extra["solver"]["reference"] == "unclipped"
    ancestral = DDPMExtScheduler.from_config(scheduler.config)
    ancestral.set_timesteps(5)
    assert ancestral.timesteps.tolist()[::-1] == [0, 7, 14, 22, 29]
    shared: dict[str, Any] = {"dataset_name": "digits", "extractor": "pixels", "batch_size": 4, "cpu": True}
    results = evaluate(
        EvalConfig(
            model=str(tmp_path / "out" / "pipeline"),
            output_dir=str(tmp_path / "eval"),
            metrics="bpd,fid",
            max_bpd_images=2,
            bpd_num_inference_steps=5,
            sampler="solver",
            num_inference_steps="2",
            num_samples=4,
            max_reference_images=40,
            reference_cache=str(tmp_path / "references"),
            **shared,
        )
    )
    assert [(r.metric, r.trajectory) for r in results] == [("bpd", "optimal"), ("fid", "fitted")]


def test_a_table_of_few_steps_of_evaluate_carries_the_rows(stock: Path, done: SimpleNamespace, tmp_path: Path) -> None:
    for model, more in ((stock, 0), (done.out / "pipeline", 3)):  # and two fitted cells and the reference's
        results = evaluate(
            EvalConfig(
                model=str(model),
                output_dir=str(tmp_path / str(more)),
                metrics="fid",
                dataset_name="digits",
                extractor="pixels",
                num_inference_steps="2,4",
                num_samples=8,
                batch_size=4,
                max_reference_images=40,
                reference_cache=str(done.folder / "references"),
                cpu=True,
            )
        )
        assert len(results) == 2 + 2 * len(STOCK_SETTINGS) + more
        (ddim,) = [r for r in results if (r.sampler, r.num_inference_steps) == ("DDIM", 4)]
        assert ddim.value == pytest.approx(figure(done.record, "DDIM", 4)["value"], rel=1e-6)


@pytest.mark.parametrize(
    "setting",
    [
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False},
        {"prediction_type": "posterior_mean", "variance_type": "learned_range"},
        {"prediction_type": "sample", "thresholding": True, "clip_sample": False},
    ],
    ids=str,
)
def test_any_model_can_be_fitted(setting: dict[str, Any], tmp_path: Path) -> None:
    learned = setting.get("variance_type") == "learned_range"
    scheduler = DDPMExtScheduler(T, 1e-3, 0.6, **setting)
    DDPMExtPipeline(network(out_channels=2 if learned else 1), scheduler).save_pretrained(tmp_path / "model")
    stock_knows = setting.get("prediction_type") != "posterior_mean"
    with nullcontext() if stock_knows else pytest.warns(UserWarning, match="is left out: The sampler .* knows no"):
        record = calibrate(config_of(tmp_path / "model", tmp_path, solver_steps="2,3"))
    clips = setting.get("clip_sample", True) or setting.get("thresholding")
    assert len(record["solver"]["reference_scores"]) == (6 if clips else 2)
    pipe = DDPMExtPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert torch.isfinite(pipe(2, num_inference_steps=3, output_type="pt").images).all()
    for name, value in setting.items():
        assert pipe.scheduler.config[name] == value


def test_classes_and_guidance_are_fitted_as_they_are_used(tmp_path: Path) -> None:
    options = class_options(3, with_null_label=True)
    scheduler = DDPMExtScheduler(T, 1e-3, 0.6)
    unet = network(**{name: value for name, value in options.items() if not name.startswith("_")})
    unet.register_to_config(**options)
    DDPMExtPipeline(unet, scheduler).save_pretrained(tmp_path / "model")
    found = {}
    for scale in (0.0, 2.0):
        folder = tmp_path / str(scale)
        config = config_of(tmp_path / "model", folder, metrics="none", solver_steps="3", guidance_scale=scale)
        calibrate(config)
        pipe = DDPMExtPipeline.from_pretrained(folder / "out" / "pipeline")
        pipe.set_progress_bar_config(disable=True)
        known = fitted_solvers(pipe.scheduler.config)
        assert known is not None and known.setting.get("guidance_scale", 0.0) == scale
        found[scale] = known.solvers[3].coefficients
        with pytest.warns(UserWarning, match="guidance_scale"):
            pipe(2, num_inference_steps=3, class_labels=[0, 1], guidance_scale=1.0)
    assert not torch.equal(found[0.0], found[2.0])


def test_wrong_options_are_told_before_anything_is_measured(stock: Path, tmp_path: Path) -> None:
    for options, words in (
        ({"solver_steps": "0"}, "solver_steps must be"),
        ({"solver_steps": "four"}, "solver_steps must be"),
        ({"solver_steps": None}, "nothing to calibrate"),
        ({"solver_reference": "raw"}, "solver_reference must be"),
        ({"num_noises": 0}, "num_noises must be"),
        ({"metrics": "bpd"}, "leave it out of metrics"),
    ):
        with pytest.raises(UserError, match=words):
            config_of(stock, tmp_path, **options)
    with pytest.raises(UserError, match=f"at most T = {T}"):
        calibrate(config_of(stock, tmp_path, solver_steps="40"))
    with pytest.raises(UserError, match=r"null label|no classes"):
        calibrate(config_of(stock, tmp_path, guidance_scale=2.0, metrics="fid"))
    options = FitOptions(steps=(4,), num_noises=10**9)
    with pytest.raises(UserError, match="GiB of memory"):
        FittedNetwork(network(), DDPMExtScheduler(T, 1e-3, 0.6), options, lambda *_: {})
    assert not (tmp_path / "out" / "calibration.json").exists()
