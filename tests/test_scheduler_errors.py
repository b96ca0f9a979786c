"""Bad input: a ValueError that says what was expected and what came, and a scheduler that stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tensors import noise

from ddpm_ext.schedulers.ddpm import DDPMExtScheduler

X, OUTPUT = noise(0, (3, 2, 4, 4)), noise(1, (3, 2, 4, 4))
NAN, INF = float("nan"), float("inf")


def state(scheduler: DDPMExtScheduler) -> dict[str, Any]:
    """Everything a scheduler remembers, in comparable form."""
    return {
        "config": copy.deepcopy(dict(scheduler.config)),
        "timesteps": scheduler.timesteps.tolist(),
        "K": scheduler.num_inference_steps,
        "custom": scheduler.custom_timesteps,
        "previous": [int(scheduler.previous_timestep(t)) for t in scheduler.timesteps],
        "sample": scheduler.step(OUTPUT, scheduler.timesteps[0], X, generator=torch.Generator().manual_seed(0)),
    }


def assert_refused(scheduler: DDPMExtScheduler, call: Callable[[DDPMExtScheduler], Any], sentence: str) -> None:
    before, random = state(scheduler), torch.get_rng_state()
    with pytest.raises(ValueError, match=sentence):
        call(scheduler)
    after = state(scheduler)
    a, b = before.pop("sample"), after.pop("sample")
    assert before == after and torch.equal(a.prev_sample, b.prev_sample)
    assert torch.equal(random, torch.get_rng_state()), "a refused call drew random numbers"


def scheduler_of_seven() -> DDPMExtScheduler:
    scheduler = DDPMExtScheduler()
    scheduler.set_timesteps(7)
    return scheduler


# Construction ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"beta_schedule": "cosine"}, r"beta_schedule must be one of .*'squaredcos_cap_v2'.*got 'cosine'"),
        ({"variance_type": "other"}, r"variance_type must be one of 'fixed_small'.*got 'other'"),
        ({"variance_type": None}, r"variance_type must be one of .*got None"),
        ({"prediction_type": "eps"}, r"prediction_type must be one of 'epsilon'.*got 'eps'"),
        ({"timestep_spacing": "uniform"}, r"timestep_spacing must be one of .*got 'uniform'"),
        ({"beta_start": 0.0}, r"beta_start must lie in \(0, 1\], got 0.0"),
        ({"beta_end": 2}, r"beta_end must lie in \(0, 1\], got 2"),
        ({"beta_end": NAN}, r"beta_end must lie in \(0, 1\], got nan"),
        ({"trained_betas": [0.1, 0.3]}, r"num_train_timesteps = 1000, got shape \(2,\)"),
        ({"num_train_timesteps": 2, "trained_betas": [0.1, NAN]}, "got nan at step 1"),
        ({"num_train_timesteps": 2, "trained_betas": [-0.1, 0.5]}, "got -0.1 at step 0"),
        ({"num_train_timesteps": 0}, "at least 1, got 0"),
        ({"num_train_timesteps": -1}, "at least 1, got -1"),
        ({"num_train_timesteps": 10.5}, r"must be an int .*got 10.5"),
        ({"clip_sample_range": 0.0}, "clip_sample_range must be a positive number, got 0.0"),
        ({"clip_sample_range": NAN}, "clip_sample_range must be a positive number, got nan"),
        ({"sample_max_value": -1.0}, "sample_max_value must be a positive number, got -1.0"),
        ({"dynamic_thresholding_ratio": 1.5}, "dynamic_thresholding_ratio must be between 0 and 1, got 1.5"),
        ({"steps_offset": -1}, "steps_offset must be an int from 0 to 999, got -1"),
        ({"steps_offset": 1000}, "steps_offset must be an int from 0 to 999, got 1000"),
        (
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            r'"?trailing.*epsilon prediction is undefined',
        ),
        (
            {"rescale_betas_zero_snr": True, "timestep_spacing": "linspace"},
            r'"?linspace.*epsilon prediction is undefined',
        ),
        ({"num_train_timesteps": 1, "rescale_betas_zero_snr": True}, "at least 2, got 1"),
    ],
    ids=str,
)
def test_construction_refuses(options: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        DDPMExtScheduler(**options)
    with pytest.raises(ValueError, match=sentence):
        DDPMExtScheduler.from_config({**DDPMExtScheduler().config, "_use_default_values": [], **options})


def test_betas_of_exactly_one_are_allowed():
    assert DDPMExtScheduler(beta_end=1.0).tables.beta[-1] == 1
    assert DDPMExtScheduler(2, trained_betas=[0.5, 1.0], prediction_type="sample").tables.alpha_bar[-1] == 0


# set_timesteps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [0, -5, 2.5, 5.0, 1001, "5", True, NAN, torch.tensor(2.5), np.float32(5)], ids=repr)
def test_number_of_steps(K: object):
    sentence = r"num_inference_steps must be an int from 1 to num_train_timesteps = 1000, got"
    assert_refused(scheduler_of_seven(), lambda s: s.set_timesteps(K), sentence)


def test_one_of_steps_and_timesteps():
    assert_refused(scheduler_of_seven(), lambda s: s.set_timesteps(), "one of the two, got neither")
    assert_refused(scheduler_of_seven(), lambda s: s.set_timesteps(None), "one of the two, got neither")
    assert_refused(scheduler_of_seven(), lambda s: s.set_timesteps(2, timesteps=[5, 4]), "one of the two, got both")


@pytest.mark.parametrize(
    ("timesteps", "sentence"),
    [
        ([], "at least one step, got none"),
        (torch.tensor([], dtype=torch.int64), "at least one step, got none"),
        ([5, 2.5], "whole numbers, got 2.5"),
        (torch.tensor([5.5, 2.0]), "whole numbers, got 5.5"),
        ([NAN], "whole numbers, got nan"),
        ([INF], "whole numbers, got inf"),
        ([5, 5, 4], "strictly descending, got 5 before 5"),
        ([100, 87, 50, 51, 0], "strictly descending, got 50 before 51"),
        ([0, 1, 2], "strictly descending, got 0 before 1"),
        ([5, -1], r"in 0..999 .*got -1"),
        ([1000], r"in 0..999 .*got 1000"),
        (np.array([1000, 3]), r"in 0..999 .*got 1000"),
        ("abc", "whole numbers, got 'a'"),
        ([None], "whole numbers, got None"),
        ([True], "whole numbers, got True"),
        (5, "a sequence of descending steps, got 5"),
        (torch.tensor(5), "a sequence of descending steps, got tensor"),
        (torch.tensor([[5, 4]]), r"whole numbers, got \[5, 4\]"),
    ],
    ids=str,
)
def test_custom_timesteps(timesteps: object, sentence: str):
    assert_refused(scheduler_of_seven(), lambda s: s.set_timesteps(timesteps=timesteps), sentence)


def test_an_unknown_device_changes_nothing():
    scheduler = scheduler_of_seven()
    with pytest.raises(RuntimeError):
        scheduler.set_timesteps(5, device="nowhere")
    assert len(scheduler.timesteps) == 7
    assert torch.isfinite(scheduler.step(OUTPUT, scheduler.timesteps[0], X).prev_sample).all()


def test_an_offset_that_leaves_the_schedule():
    scheduler = DDPMExtScheduler(steps_offset=1)
    scheduler.set_timesteps(7)
    assert_refused(
        scheduler, lambda s: s.set_timesteps(1000), "steps_offset = 1 moves the leading timesteps to 1..1000"
    )


@pytest.mark.parametrize("choice", [{"num_inference_steps": 1000}, {"timesteps": [999, 3]}], ids=str)
def test_epsilon_where_the_signal_is_gone(choice: dict):
    scheduler = DDPMExtScheduler(rescale_betas_zero_snr=True)
    scheduler.set_timesteps(50)  # leading: never visits 999
    assert scheduler.timesteps[0] == 980
    sentence = r"timestep 999 has no signal left.*prediction_type \"v_prediction\""
    assert_refused(scheduler, lambda s: s.set_timesteps(**choice), sentence)
    fresh = DDPMExtScheduler(rescale_betas_zero_snr=True)
    for t in (999, torch.tensor(999), torch.tensor([5, 999, 7])):
        for call in (lambda t: fresh.step(OUTPUT, t, X), lambda t: fresh.p_mean_variance(OUTPUT, t, X)):
            with pytest.raises(ValueError, match="At timestep 999 the signal is gone"):
                call(t)
    assert torch.isfinite(fresh.step(OUTPUT, 998, X).prev_sample).all()


# Timesteps of a step --------------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[DDPMExtScheduler, Any], Any]] = {
    "step": lambda s, t: s.step(OUTPUT, t, X),
    "p_mean_variance": lambda s, t: s.p_mean_variance(OUTPUT, t, X),
    "q_posterior": lambda s, t: s.q_posterior(OUTPUT, X, t),
    "previous_timestep": lambda s, t: s.previous_timestep(t),
    "_get_variance": lambda s, t: s._get_variance(t),
}
FORWARD: dict[str, Callable[[DDPMExtScheduler, Any], Any]] = {
    "add_noise": lambda s, t: s.add_noise(X, OUTPUT, t),
    "get_velocity": lambda s, t: s.get_velocity(X, OUTPUT, t),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "t", [851, 1000, -1, -142, torch.tensor(851), torch.tensor([852, 851, 0]), torch.tensor([0, 142, -1])], ids=repr
)
def test_a_timestep_outside_the_schedule(name: str, t: Any):
    sentence = (
        r"timestep -?\d+ is not in the current schedule of 7 steps \(852, 710, 568, …, 0\). Take it from .timesteps"
    )
    assert_refused(scheduler_of_seven(), lambda s: CALLS[name](s, t), sentence)


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("t", [-1, 1000, torch.tensor([0, -5, 3]), torch.tensor([1000])], ids=repr)
def test_noise_levels_outside_the_schedule(name: str, t: Any):
    assert_refused(
        scheduler_of_seven(), lambda s: FORWARD[name](s, t), r"timesteps must lie in 0\.\.999, got values from"
    )


@pytest.mark.parametrize("name", [*CALLS, *FORWARD])
@pytest.mark.parametrize(
    "t",
    [142.0, torch.tensor(142.0), torch.tensor([142.0] * 3), None, "142", torch.tensor([[142]]), torch.tensor(True)],
    ids=repr,
)
def test_a_timestep_is_an_int(name: str, t: Any):
    sentence = "must be an int"
    assert_refused(scheduler_of_seven(), lambda s: {**CALLS, **FORWARD}[name](s, t), sentence)


@pytest.mark.parametrize("name", ["step", "p_mean_variance", "q_posterior", *FORWARD])
def test_one_timestep_per_image(name: str):
    sentence = r"one for all images or one per image, 3 here, got shape \(2,\)"
    assert_refused(scheduler_of_seven(), lambda s: {**CALLS, **FORWARD}[name](s, torch.tensor([142, 0])), sentence)


# Shapes and generators ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 2, 4, 4), (3, 1, 4, 4), (3, 2, 1, 4), (3, 2, 4), (3, 4, 4, 4)], ids=str)
@pytest.mark.parametrize("name", ["step", "p_mean_variance"])
def test_model_output_that_would_broadcast(name: str, shape: tuple[int, ...]):
    output = noise(1, shape)
    sentence = r"model_output must have shape \(3, 2, 4, 4\) for images of shape \(3, 2, 4, 4\).*got \(" + str(shape[0])
    assert_refused(
        scheduler_of_seven(),
        lambda s: s.step(output, 142, X) if name == "step" else s.p_mean_variance(output, 142, X),
        sentence,
    )


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_a_learned_variance_needs_its_head(variance_type: str):
    scheduler = DDPMExtScheduler(variance_type=variance_type)
    for call in (lambda: scheduler.step(OUTPUT, 142, X), lambda: scheduler.p_mean_variance(OUTPUT, 142, X)):
        with pytest.raises(
            ValueError, match=r"shape \(3, 4, 4, 4\).*got \(3, 2, 4, 4\). The network must predict mean"
        ):
            call()
    with pytest.raises(ValueError, match="needs predicted_variance, got none"):
        scheduler._get_variance(142)


def test_images_and_noise_of_different_shapes():
    for name, call in (
        ("original_samples and noise", lambda s: s.add_noise(X, OUTPUT[:1], 5)),
        ("sample and noise", lambda s: s.get_velocity(X, OUTPUT[:, :1], 5)),
        ("x_0 and x_t", lambda s: s.q_posterior(X[:1], OUTPUT, 142)),
    ):
        assert_refused(scheduler_of_seven(), call, f"{name} must have the same shape, got")


@pytest.mark.parametrize("t", [142, 0, torch.tensor([142, 0, 0])], ids=repr)
@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_list_of_generators_is_one_per_image(t: Any, count: int):
    generators = [torch.Generator() for _ in range(count)]
    sentence = f"a list of one per image, 3 here, got a list of {count}"
    assert_refused(scheduler_of_seven(), lambda s: s.step(OUTPUT, t, X, generator=generators), sentence)


def test_a_seed_is_no_generator():
    assert_refused(scheduler_of_seven(), lambda s: s.step(OUTPUT, 142, X, generator=7), "generator must be one .*got 7")
