"""On an accelerator the host never waits: not in a warm step, not in a warm update. `make test-device` runs this.

The accelerator is the simulated one of tests/accelerator; without it every test here is skipped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers.guiders
import pytest
import torch
from accelerator import Event, is_installed, watch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from networks import TINY_UNET, tiny_unet
from training import forget_accelerator, options, run_here, weights

from ddpm_ext.cli.arguments import parse_train_config
from ddpm_ext.diffusion.solvers import Solver
from ddpm_ext.distributed import make_accelerator
from ddpm_ext.models.classes import class_options
from ddpm_ext.pipelines.ddpm import DDPMExtPipeline
from ddpm_ext.run_dir import RunDir, RunError
from ddpm_ext.schedulers.ddpm import DDPMExtScheduler
from ddpm_ext.schedulers.solver import DDPMExtSolverScheduler, solver_record
from ddpm_ext.training.setup import make_trainer
from ddpm_ext.training.trainer import Trainer

pytestmark = pytest.mark.skipif(not is_installed(), reason="needs the simulated accelerator: make test-device")

WARM = 3  # updates before the one that is watched: tables, moments and buffers are made in the first


def trainer_of(folder: Path, **changes: Any) -> Trainer:
    forget_accelerator()
    config = parse_train_config(
        options(folder, **{"logging_steps": 1000, "checkpointing_steps": 1000, "max_train_steps": 10_000, **changes})
    )
    run = RunDir(folder)
    trainer = make_trainer(config, make_accelerator(config, run), run)
    assert trainer.accelerator.device.type == "sim" and trainer.outcomes is not None
    return trainer


def watched_update(trainer: Trainer) -> dict[Event, int]:
    for _ in range(WARM):
        trainer.update()
    with watch() as seen:
        trainer.update()
    return seen.blocking


# The report itself ----------------------------------------------------------------------------------------------------


def test_the_report_names_what_waits_and_what_does_not() -> None:
    x = torch.arange(4.0).to("sim")
    pinned = torch.zeros(4).pin_memory()
    for action, kinds in (
        (lambda: x.sum().item(), ["wait"]),
        (lambda: bool((x > 1).any()), ["wait"]),
        (lambda: x[x > 1], ["wait"]),
        (lambda: x.cpu(), ["copy to host"]),
        (lambda: torch.zeros(4).to("sim"), ["copy to device"]),
        (lambda: torch.zeros(4).to("sim", non_blocking=True), ["copy to device"]),
        (lambda: x[torch.tensor([1, 2])], ["copy to device"]),
        (lambda: pinned.to("sim", non_blocking=True), []),
        (lambda: pinned.copy_(x, non_blocking=True), []),
        (lambda: torch.where(x > 1, x, 0).mean() + x[1:3].square().sum(), []),
    ):
        with watch() as seen:
            action()
        assert {event.kind for event in seen.blocking} == set(kinds), kinds


def test_tensors_of_two_devices_do_not_meet() -> None:
    x = torch.zeros(3, device="sim")
    for other in (torch.zeros(3), torch.zeros(3, device="sim:1")):
        with pytest.raises(RuntimeError, match="same device"):
            x + other
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device="sim", generator=torch.Generator())
    assert not torch.empty(1000, device="sim").cpu().eq(0).any()  # nobody may count on zeros


# The scheduler --------------------------------------------------------------------------------------------------------

VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")


@pytest.mark.parametrize("variance_type", VARIANCES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "posterior_mean"])
def test_a_warm_scheduler_never_makes_the_host_wait(prediction_type: str, variance_type: str) -> None:
    scheduler = DDPMExtScheduler(prediction_type=prediction_type, variance_type=variance_type)
    scheduler.set_timesteps(20, device="sim")
    x_0, x = torch.rand(2, 3, 2, 4, 4).sub(0.5).to("sim").unbind()
    output = torch.randn(3, 4 if "learned" in variance_type else 2, 4, 4).to("sim")
    t, place = torch.tensor([950, 500, 0]).to("sim"), scheduler.timesteps[3]
    generator = torch.Generator("sim").manual_seed(0)
    calls = {
        "step": lambda t: scheduler.step(output, t, x, generator=generator),
        "add_noise": lambda t: scheduler.add_noise(x_0, x, t),
        "get_velocity": lambda t: scheduler.get_velocity(x_0, x, t),
        "p_mean_variance": lambda t: scheduler.p_mean_variance(output, t, x),
        "q_posterior": lambda t: scheduler.q_posterior(x_0, x, t),
    }
    for name, call in calls.items():
        for timestep in (t, place, 500):
            call(timestep)
            with watch() as seen:
                call(timestep)
            assert not seen.blocking, (name, timestep)


def fitted_solver(reference: Any, order: int, steps: Sequence[int], **config: Any) -> DDPMExtSolverScheduler:
    """A solver of small random coefficients for each number of steps."""
    base = DDPMExtScheduler(**config)
    solvers = {}
    for K in steps:
        times = tuple(torch.linspace(999, 20, K).long().tolist())
        solvers[K] = Solver(times, 0.1 * torch.randn(K, 2 * order - 1, dtype=torch.float64))
    record = solver_record(reference, solvers, base, {})
    return DDPMExtSolverScheduler.from_config(base.config, _ddpm_ext={"solver": record})


@pytest.mark.parametrize("reference", ["clipped", "clipped_raw", "unclipped"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_fitted_solver_never_makes_the_host_wait(prediction_type: str, reference: str) -> None:
    """A whole warm run, by timesteps of the device and by numbers, as a pipeline names them."""
    scheduler = fitted_solver(reference, 3, [6], prediction_type=prediction_type)
    x, output = torch.randn(2, 3, 2, 4, 4).to("sim").unbind()
    scheduler.set_timesteps(6, device="sim")
    for times in (list(scheduler.timesteps), scheduler.timesteps.tolist()):
        for name in ("first", "warm"):
            with watch() as seen:
                for t in times:
                    assert scheduler.step(output, t, x).prev_sample.shape == x.shape
            assert not seen.blocking or name == "first"


# Sampling -------------------------------------------------------------------------------------------------------------

CLASSES = class_options(3, ("a", "b", "c"), with_null_label=True)
GUIDANCE: dict[str, dict[str, Any]] = {
    "none": {},
    "scale": {"guidance_scale": 2.0},
    "interval": {"guidance_scale": 2.0, "guidance_interval": (200, 800)},
    "rescaled": {"guidance_scale": 2.0, "guidance_rescale": 0.7},
    "a guider": {"guider": diffusers.guiders.ClassifierFreeGuidance(guidance_scale=3.0)},
}


def waits_of_a_chain(scheduler: Any, steps: int, **more: Any) -> Counter[str]:
    """What makes the host wait while a pipeline draws three images, by its place."""
    pipeline = DDPMExtPipeline(tiny_unet(num_class_embeds=CLASSES["num_class_embeds"]).eval(), scheduler)
    pipeline.unet.register_to_config(**CLASSES)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to("sim")
    given = {"class_labels": [0, 1, 2], "output_type": "latent", "num_inference_steps": steps, **more}
    generator = torch.Generator("sim").manual_seed(0)
    pipeline(3, generator, **given)
    with watch() as seen:
        pipeline(3, generator, **given)
    return Counter({f"{kind}, {where}": number for (kind, _, where), number in seen.blocking.items()})


@pytest.mark.parametrize("name", GUIDANCE)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_longer_chain_makes_the_host_wait_no_more_often(name: str, prediction_type: str) -> None:
    """A chain waits when it starts and when its images are looked at, whatever its steps are and their guidance."""
    short, long = (
        waits_of_a_chain(DDPMExtScheduler(prediction_type=prediction_type), steps, **GUIDANCE[name]) for steps in (4, 9)
    )
    assert short == long and sum(short.values()) <= 8


def test_a_longer_chain_of_a_fitted_solver_makes_the_host_wait_no_more_often() -> None:
    short, long = (waits_of_a_chain(fitted_solver("clipped", 3, [4, 9]), steps, class_labels=1) for steps in (4, 9))
    assert short == long and sum(short.values()) <= 8


# Training -------------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "simple": {},
    "min-snr": {"snr_gamma": 5.0},
    "vlb": {"loss": "vlb"},
    "learned": {"variance_type": "learned", "loss": "hybrid"},
    "learned_range": {"variance_type": "learned_range", "loss": "hybrid"},
    "learned_range, vlb": {"variance_type": "learned_range", "loss": "vlb"},
    "fixed_small": {"variance_type": "fixed_small"},
    "v_prediction": {"prediction_type": "v_prediction"},
    "posterior_mean": {"prediction_type": "posterior_mean", "loss": "vlb"},
    "no average": {"use_ema": "false"},
    "rising average": {"ema": "warmup"},
    "power-function averages": {"ema": "power_function", "ema_snapshot_steps": 1000},
    "accumulation": {"train_batch_size": 4, "gradient_accumulation_steps": 2},
    "no clipping": {"max_grad_norm": "none"},
    "flips and workers": {"random_flip": "true", "dataloader_num_workers": 1},
    "classes": {"class_conditional": "true", "class_dropout": 0.2},
    "channels_last": {"channels_last": "true"},
    "dropout": {"dropout": 0.1},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_warm_update_never_makes_the_host_wait(name: str, tmp_path: Path) -> None:
    assert not watched_update(trainer_of(tmp_path / "run", **SETTINGS[name]))


FINE_TUNING: dict[str, dict[str, Any]] = {
    "from a pipeline": {},
    "frozen": {"freeze": ["down_blocks.*", "conv_in.*"]},
    "adapters": {"lora_rank": 2},
    "adapters, rising average": {"lora_rank": 2, "ema": "warmup"},
}


@pytest.mark.parametrize("name", FINE_TUNING)
def test_a_warm_update_of_given_weights_never_makes_the_host_wait(name: str, tmp_path: Path) -> None:
    if "lora_rank" in FINE_TUNING[name]:
        pytest.importorskip("peft", reason="peft is not installed")
    attention = {
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    }
    DDPMPipeline(UNet2DModel(**{**TINY_UNET, **attention}), DDPMScheduler()).save_pretrained(tmp_path / "source")  # pyright: ignore
    given = {"model_config_name_or_path": None, "init_from": tmp_path / "source", **FINE_TUNING[name]}
    assert not watched_update(trainer_of(tmp_path / "run", **given))


def test_loss_aware_sampling_exchanges_twice(tmp_path: Path) -> None:
    seen = watched_update(trainer_of(tmp_path / "run", timestep_sampler="loss_aware"))
    assert sum(seen.values()) == 2 and {event.kind for event in seen} == {"copy to host"}  # the steps and their losses


def test_an_update_that_is_due_for_something_is_known_at_once(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "run", logging_steps=5)
    for number in range(1, 11):
        with watch() as seen:
            trainer.update()
        assert not seen.blocking
        assert trainer.state.update == (number if number % 5 == 0 else number - 1)  # elsewhere known one step later


def test_the_device_skips_what_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path / "run", max_bad_steps=3)
    honest, bad = trainer.loss, set()
    monkeypatch.setattr(trainer, "loss", lambda *a: honest(*a) * (torch.nan if trainer.state.step in bad else 1.0))

    def everything() -> list[torch.Tensor]:
        trainer.settle()
        moments = [tensor for state in trainer.state.optimizer.state.values() for tensor in state.values()]
        tensors = [*trainer.parameters, *trainer.state.averages[0].shadow_params, *moments]
        return [tensor.detach().cpu().clone() for tensor in tensors]

    for _ in range(3):
        trainer.update()
    before, bad = everything(), {3, 4}
    for _ in range(2):
        trainer.update()
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    state = trainer.state
    assert (state.step, state.update, state.skipped, state.bad_in_a_row) == (5, 3, 2, 2)
    assert state.averages[0].optimization_step == 3
    trainer.update()
    trainer.settle()
    assert (state.step, state.update, state.bad_in_a_row) == (6, 4, 0)
    assert any(not torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    bad |= {6, 7, 8}
    with pytest.raises(RunError, match=r"3 steps in a row .* the last at step 9 "):
        for _ in range(4):
            trainer.update()


def test_runs_on_the_device_resume_bitwise(tmp_path: Path) -> None:
    """The checkpoint of update 4 lies between two that the host learns of late."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run_here(whole, seed=1) == 0
    assert run_here(halves, seed=1, max_train_steps=4, lr_scheduler="constant") == 0
    assert run_here(halves, seed=1, allow_config_change="max_train_steps") == 0
    for stem in ("model", "ema", "optimizer"):
        left, right = weights(whole, 12, stem), weights(halves, 12, stem)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [3, 6, 9, 12]
