"""Timesteps in proportion to their losses: unbiased, the same for any number of processes, restored by a resume."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.testing import assert_close
from training import (
    TORCHRUN,
    assert_bitwise_equal,
    finish,
    forget_accelerator,
    log_without_speed,
    options,
    run_here,
    start,
    weights,
)

from ddpm_ext.data.order import Batch
from ddpm_ext.diffusion.losses import (
    REMEMBERED,
    LossHistory,
    empty_history,
    loss_aware_probabilities,
    remember,
    weighted_timesteps,
)
from ddpm_ext.training.state.meter import Meter
from ddpm_ext.training.state.rng import uniforms
from ddpm_ext.training.state.timestep_samplers import Timesteps
from ddpm_ext.training.trainer import Trainer

T = 6
AWARE = {
    "timestep_sampler": "loss_aware",
    "ddpm_num_steps": T,
    "ddpm_beta_schedule": "squaredcos_cap_v2",
    "train_batch_size": 16,
}


def of_one_loss_each(losses: Tensor) -> LossHistory:
    """A full history in which t has always cost losses[t]."""
    return LossHistory(losses[:, None].repeat(1, REMEMBERED), torch.full((len(losses),), REMEMBERED))


def test_probabilities_are_roots_of_mean_squares_with_a_uniform_share() -> None:
    recent = torch.rand(T, REMEMBERED, dtype=torch.float64) + 0.1
    p = loss_aware_probabilities(LossHistory(recent, torch.full((T,), REMEMBERED)))
    size = [math.sqrt(sum(loss**2 for loss in row) / 10) for row in recent.tolist()]
    expected = [0.999 * one / sum(size) + 0.001 / T for one in size]
    assert_close(p, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_uniform_until_every_step_has_ten_losses() -> None:
    history = of_one_loss_each(torch.arange(1.0, T + 1, dtype=torch.float64))
    assert loss_aware_probabilities(history).std() > 0.01
    history.total[3] = 9
    assert_close(loss_aware_probabilities(history), torch.full((T,), 1 / T, dtype=torch.float64))
    assert_close(
        loss_aware_probabilities(of_one_loss_each(torch.zeros(T, dtype=torch.float64))),
        torch.full((T,), 1 / T, dtype=torch.float64),
    )


def test_weights_keep_the_mean_whatever_the_probabilities() -> None:
    losses = torch.tensor([9.0, 0.001, 3.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    p = loss_aware_probabilities(of_one_loss_each(torch.rand(T, dtype=torch.float64)))
    ends = p.cumsum(0)
    t, w = weighted_timesteps(ends - p / 2, p)  # one u in the middle of each step's share
    assert t.tolist() == list(range(T))
    assert_close((p * w * losses[t]).sum(), losses.mean(), rtol=1e-12, atol=0)
    u = (torch.arange(60_000, dtype=torch.float64) + 0.5) / 60_000  # strata: the mean of draws is the sum over p
    t, w = weighted_timesteps(u, p)
    assert_close(torch.bincount(t, minlength=T) / len(u), p.float(), rtol=0, atol=1e-4)
    assert_close((w * losses[t]).mean(), losses.mean(), rtol=1e-2, atol=0)


def test_the_ends_of_the_unit_interval_are_steps() -> None:
    p = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    t, w = weighted_timesteps(torch.tensor([0.0, 0.25, 0.7499, 1 - 1e-16], dtype=torch.float64), p)
    assert t.tolist() == [0, 1, 1, 2]
    assert_close(w, torch.tensor([4 / 3, 2 / 3, 2 / 3, 4 / 3], dtype=torch.float64))


def test_history_keeps_the_last_ten_and_leaves_the_old_one_alone() -> None:
    history = empty_history(2)
    t = torch.tensor([0] * 13 + [1])
    losses = torch.cat([torch.arange(13.0), torch.tensor([7.0])])
    losses[2] = math.inf
    after = remember(history, t, losses)
    assert history.total.tolist() == [0, 0]
    assert after.total.tolist() == [12, 1]
    assert sorted(after.recent[0].tolist()) == [3.0, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert after.recent[1].sum() == 7


def test_draws_belong_to_places_in_the_global_batch() -> None:
    whole = uniforms("timestep", 3, 5, range(100))
    assert whole.dtype == torch.float64 and whole.min() >= 0 and whole.max() < 1
    assert torch.equal(
        torch.cat([uniforms("timestep", 3, 5, range(37)), uniforms("timestep", 3, 5, range(37, 100))]), whole
    )
    assert not torch.equal(uniforms("timestep", 3, 6, range(100)), whole)
    assert not torch.equal(uniforms("timestep", 4, 5, range(100)), whole)
    assert not torch.equal(uniforms("class", 3, 5, range(100)), whole)


def test_uniform_steps_are_left_as_drawn() -> None:
    plan, t = Timesteps("uniform", T), torch.tensor([2, 5])
    assert plan.choose(t, 0, 0, range(2)) == (t, None)
    plan.see(t, torch.ones(2))
    assert plan.state() == {} and plan.seen == []


def test_what_was_seen_is_learned_once() -> None:
    forget_accelerator()
    plan = Timesteps("loss_aware", T)
    for t in (0, 1):
        plan.see(torch.tensor([t, 2]), torch.tensor([1.0, 3.0]))
    plan.learn(Accelerator(cpu=True))
    assert plan.history is not None
    assert plan.history.total.tolist() == [1, 1, 2, 0, 0, 0]
    assert plan.seen == []


def test_logged_losses_are_means_over_uniform_steps() -> None:
    forget_accelerator()
    meter = Meter(torch.device("cpu"), 4)
    meter.add_losses(torch.tensor([1.0, 3.0, math.nan]), torch.tensor([0, 3, 1]), torch.tensor([0.5, 1.5, 1.0]))
    record = meter.read(Accelerator(cpu=True))
    assert record["loss"] == pytest.approx((0.5 * 1 + 1.5 * 3) / 2)
    assert (record["loss_q1"], record["loss_q4"]) == (1.0, 3.0)


def test_the_log_weighs_losses_as_training_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Σ w L / Σ w in the log, where the loss that is minimised is Σ w L / B."""
    weight, minimised, loss = torch.linspace(0.5, 3, 16), [], Trainer.loss
    monkeypatch.setattr(Timesteps, "choose", lambda self, uniform, *_: (uniform, weight))

    def heard(self: Trainer, batch: Batch, micro: int) -> Tensor:
        minimised.append(loss(self, batch, micro))
        return minimised[-1]

    monkeypatch.setattr(Trainer, "loss", heard)
    assert run_here(tmp_path / "run", **AWARE, max_train_steps=1, logging_steps=1) == 0
    (record,) = log_without_speed(tmp_path / "run")
    assert record["loss"] == pytest.approx(minimised[0].item() * 16 / weight.sum().item(), rel=1e-5)


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path: Path) -> None:
    assert run_here(tmp_path / "whole", **AWARE) == 0
    count = weights(tmp_path / "whole", 8, "timesteps")["total"]
    assert count.sum() == 8 * 16 and count.min() >= REMEMBERED  # t is drawn by its losses before the resume
    resumed = Path(shutil.copytree(tmp_path / "whole", tmp_path / "resumed"))
    for path in ("checkpoints/step-00000012", "pipeline"):
        shutil.rmtree(resumed / path)
    (resumed / "status.json").unlink()
    assert run_here(resumed, **AWARE) == 0
    assert_bitwise_equal(tmp_path / "whole", resumed, 12)
    for name, tensor in weights(tmp_path / "whole", 12, "timesteps").items():
        assert torch.equal(tensor, weights(resumed, 12, "timesteps")[name])

    assert run_here(tmp_path / "uniform", **{**AWARE, "timestep_sampler": "uniform"}) == 0
    assert not (tmp_path / "uniform" / "checkpoints" / "step-00000012" / "timesteps.safetensors").exists()
    left, right = (weights(tmp_path / name, 12)["conv_in.weight"] for name in ("whole", "uniform"))
    assert not torch.equal(left, right)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    exact = {**AWARE, "double": True, "global_batch_size": 16}
    assert run_here(tmp_path / "one", **exact) == 0
    code, output = finish(start(options(tmp_path / "two", **exact), (*TORCHRUN, "2")))
    assert code == 0, output
    one, two = (weights(tmp_path / name, 12, "timesteps") for name in ("one", "two"))
    assert torch.equal(one["total"], two["total"])
    assert_close(one["recent"], two["recent"], rtol=1e-6, atol=0)  # losses are gathered as float32


def test_presets_of_learned_variances_are_ready() -> None:
    from ddpm_ext.training.builders import build_scheduler, network_config
    from ddpm_ext.training.presets import PRESETS

    for name, channels in (("iddpm-cifar10", 6), ("digits-learned", 2)):
        config = PRESETS[name].config
        assert (config.variance_type, config.loss) == ("learned_range", "hybrid")
        assert network_config(config)["out_channels"] == channels
    iddpm = build_scheduler(PRESETS["iddpm-cifar10"].config)
    assert len(iddpm) == 4000 and iddpm.config.beta_schedule == "squaredcos_cap_v2"
