"""Nothing asks a tensor for its value: scheduler, losses and tables run on the meta device, which has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_ext.diffusion.losses import LossOptions, training_loss
from ddpm_ext.diffusion.process import jump
from ddpm_ext.diffusion.reverse import decoder_log_var
from ddpm_ext.diffusion.schedules import make_tables
from ddpm_ext.schedulers.ddpm import DDPMExtScheduler

OPTIONS: list[dict[str, Any]] = [
    {},
    {"variance_type": "learned_range"},
    {"variance_type": "learned", "prediction_type": "v_prediction"},
    {"variance_type": "fixed_large", "thresholding": True},
    {"prediction_type": "posterior_mean", "clip_sample": False},
    {"prediction_type": "sample", "variance_type": "fixed_small_log"},
    {"variance_type": "analytic"},
]
STEPS: list[Any] = [  # of the chain 980, 960, ...
    500,
    torch.tensor(500),
    torch.tensor([500]),
    torch.tensor([500, 980]),
    torch.tensor(500, device="meta"),
    torch.tensor([500, 980], device="meta"),
]


def images(scheduler: DDPMExtScheduler) -> tuple[Tensor, Tensor]:
    channels = 6 if scheduler.variance_type.startswith("learned") else 3
    return torch.empty(2, 3, 8, 8, device="meta"), torch.empty(2, channels, 8, 8, device="meta")


@pytest.mark.parametrize("timestep", STEPS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_scheduler_looks_at_no_value(options: dict[str, Any], timestep: Any) -> None:
    scheduler = DDPMExtScheduler(**options)
    if scheduler.variance_type == "analytic":
        scheduler.register_to_config(_ddpm_ext={"mse_eps": [0.5] * 1000})
    scheduler.set_timesteps(50, device="meta")
    x, output = images(scheduler)
    found = [
        scheduler.step(output, timestep, x, return_dict=False)[0],
        scheduler.p_mean_variance(output, timestep, x).mean,
        scheduler.q_posterior(x, x, timestep).mean,
        scheduler.add_noise(x, x, timestep),
        scheduler.get_velocity(x, x, timestep),
    ]
    assert {(one.device.type, one.shape) for one in found} == {("meta", x.shape)}


@pytest.mark.parametrize("options", OPTIONS[:-1], ids=str)
@pytest.mark.parametrize("loss", ["simple", "vlb", "hybrid"])
def test_losses_look_at_no_value(loss: Any, options: dict[str, Any]) -> None:
    scheduler = DDPMExtScheduler(**options)
    variance = scheduler.variance_type
    try:
        words = LossOptions(loss, scheduler.options.prediction_type, variance)
    except ValueError:
        pytest.skip("do not go together")
    x, output = images(scheduler)
    t, tables = torch.empty(2, dtype=torch.int64, device="meta"), scheduler.tables.to("meta")
    found = training_loss(output, x, x, x, t, tables, words)
    assert found.shape == (2,) and found.device.type == "meta"


@pytest.mark.parametrize("T", [1, 2, 1000])
@pytest.mark.filterwarnings("ignore:.*far from 0")
def test_the_decoders_variance_is_that_of_the_jump(T: int) -> None:
    """Written out without a look-up by a tensor, it is the jump's β̃ to the last bit."""
    tables = make_tables(num_timesteps=T)
    assert decoder_log_var(tables.to("meta")).device.type == "meta"
    if T == 1:
        assert decoder_log_var(tables).item() == tables.beta[0].log().item()
        return
    for kept, (s, t) in ((None, (0, 1)), ([0, T - 1], (0, T - 1))):
        convention: Any = "base" if kept is None else "respaced"
        expected = jump(tables, torch.tensor(t), torch.tensor(s)).var.log()
        assert decoder_log_var(tables, kept, convention).item() == expected.item()
