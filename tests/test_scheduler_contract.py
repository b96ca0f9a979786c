"""What Diffusers asks of every scheduler, and its golden numbers for DDPM; config and disk."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from tensors import noise
from torch import Tensor
from torch.testing import assert_close

from ddpm_ext.schedulers.ddpm import DDPMExtScheduler

OPTIONS: list[dict] = [
    {},
    {"variance_type": "fixed_large", "beta_schedule": "squaredcos_cap_v2", "clip_sample": False},
    {"variance_type": "fixed_small_log", "timestep_spacing": "linspace", "thresholding": True},
    {"variance_type": "fixed_large_log", "prediction_type": "sample", "clip_sample_range": 2.0},
    {"variance_type": "learned", "steps_offset": 1},
    {"variance_type": "learned_range", "prediction_type": "posterior_mean"},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    {"num_train_timesteps": 3, "trained_betas": [0.5, 0.75, 1.0], "prediction_type": "sample"},
    {"beta_start": 1e-3, "beta_end": 0.03, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 3.0},
]


def slope(shape: tuple[int, ...] = (4, 3, 8, 8), reverse: bool = False) -> Tensor:
    """Grey levels k/768 laid out with the batch as the fastest index: the input behind Diffusers' golden numbers."""
    n = int(np.prod(shape))
    values = torch.arange(n).flip(0) if reverse else torch.arange(n)
    return (values.reshape(*shape[1:], shape[0]) / n).permute(3, 0, 1, 2)


def run_chain(scheduler: DDPMExtScheduler, x: Tensor, times: list[int]) -> Tensor:
    generator = torch.manual_seed(0)
    for t in times:
        x = scheduler.step(x * t / (t + 1), t, x, generator=generator).prev_sample
    return x


@contextmanager
def stock_warnings() -> Iterator[list[str]]:
    """Everything that Diffusers' loggers say at level WARNING and above."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, listener = logging.getLogger("diffusers"), Listener(logging.WARNING)
    logger.addHandler(listener)
    try:
        yield said
    finally:
        logger.removeHandler(listener)


# Golden numbers of Diffusers' own tests -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction_type", "total", "mean"), [("epsilon", 258.9606, 0.3372), ("v_prediction", 202.0296, 0.2631)]
)
def test_golden_full_loop(prediction_type: str, total: float, mean: float):
    x = run_chain(DDPMExtScheduler(prediction_type=prediction_type), slope(), list(range(999, -1, -1)))
    assert abs(x.abs().sum().item() - total) < 1e-2
    assert abs(x.abs().mean().item() - mean) < 1e-3


def test_golden_last_two_steps_from_added_noise():
    """Stock's 387.9466 contains its float32 table error; float64 gives 387.967."""
    scheduler = DDPMExtScheduler()
    times = scheduler.timesteps[998:]
    assert times.tolist() == [1, 0]
    for dtype, tolerance in ((torch.float32, 2e-3), (torch.float64, 1e-3)):
        x = scheduler.add_noise(slope().to(dtype), slope(reverse=True).to(dtype), times[:1])
        generator = torch.manual_seed(0)
        z = torch.randn(x.shape, generator=generator)  # stock's noise, float32 in both cases
        p = scheduler.p_mean_variance(x * 1 / 2, 1, x)
        x = p.mean + p.var.sqrt() * z
        x = scheduler.step(x * 0, 0, x).prev_sample
        assert abs(x.abs().sum().item() - 387.967) < tolerance
    x = scheduler.add_noise(slope(), slope(reverse=True), times[:1])
    assert abs(run_chain(scheduler, x, [1, 0]).abs().sum().item() - 387.967) < 2e-3


def test_golden_variances():
    scheduler = DDPMExtScheduler()
    for t, var in ((0, 0.0), (487, 0.00979), (999, 0.02)):
        assert abs(scheduler._get_variance(t).item() - var) < 1e-5
    assert scheduler._get_variance(torch.tensor([0, 487])).shape == (2,)
    learned = DDPMExtScheduler(variance_type="learned_range")
    assert_close(
        learned._get_variance(487, torch.tensor([-1.0, 1.0], dtype=torch.float64)),
        torch.stack([scheduler._get_variance(487), scheduler.tables.beta[487]]),
    )


# The contract of every scheduler --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_saved_and_loaded_steps_alike(options: dict, tmp_path: Path):
    scheduler = DDPMExtScheduler(**options)
    scheduler.save_pretrained(tmp_path)
    loaded = DDPMExtScheduler.from_pretrained(tmp_path)
    assert type(loaded) is DDPMExtScheduler
    for key in inspect.signature(DDPMExtScheduler).parameters:
        assert loaded.config[key] == scheduler.config[key], key
    assert torch.equal(loaded.tables.beta, scheduler.tables.beta)
    channels = 6 if "learned" in scheduler.variance_type else 3
    output, x = noise(1, (4, channels, 4, 4)), noise(2, (4, 3, 4, 4))
    for t in (0, 1):
        a, b = (s.step(output, t, x, generator=torch.manual_seed(0)).prev_sample for s in (scheduler, loaded))
        assert torch.equal(a, b)


def test_outputs_as_record_and_as_tuple():
    scheduler, x = DDPMExtScheduler(), slope()
    for t in (0, 500):
        record = scheduler.step(0.1 * x, t, x, generator=torch.manual_seed(0))
        pair = scheduler.step(0.1 * x, t, x, generator=torch.manual_seed(0), return_dict=False)
        assert isinstance(record, DDPMSchedulerOutput) and isinstance(pair, tuple) and len(pair) == 2
        assert torch.equal(record.prev_sample, pair[0]) and torch.equal(record.pred_original_sample, pair[1])
        assert pair[0].shape == x.shape


def test_public_names():
    scheduler = DDPMExtScheduler()
    assert (scheduler.order, scheduler.init_noise_sigma, len(scheduler)) == (1, 1.0, 1000)
    assert scheduler._compatibles == DDPMScheduler._compatibles and all(scheduler.compatibles)
    assert set(scheduler.compatibles) == set(DDPMScheduler().compatibles)
    x = slope()
    assert scheduler.scale_model_input(x, 3) is x and scheduler.scale_model_input(x) is x
    assert scheduler.timesteps.tolist() == list(range(999, -1, -1)) and scheduler.num_inference_steps is None
    stock = DDPMScheduler()
    for name in ("betas", "alphas", "alphas_cumprod"):
        assert getattr(scheduler, name).dtype == torch.float32
        assert_close(getattr(scheduler, name), getattr(stock, name), rtol=1e-4, atol=1e-6)
    assert scheduler.timesteps.dtype == stock.timesteps.dtype


def test_previous_timestep_is_a_tensor():
    scheduler = DDPMExtScheduler()
    assert scheduler.previous_timestep(5).tolist() == 4 and scheduler.previous_timestep(0).tolist() == -1
    times = [100, 87, 50, 1, 0]
    scheduler.set_timesteps(timesteps=times)
    for t, expected in zip(scheduler.timesteps, [87, 50, 1, 0, -1], strict=True):
        assert scheduler.previous_timestep(t).item() == expected
    assert scheduler.previous_timestep(torch.tensor([87, 0])).tolist() == [50, -1]
    assert scheduler.custom_timesteps and scheduler.num_inference_steps == 5


@pytest.mark.parametrize("t", [7, torch.tensor(7), torch.tensor([7]), torch.tensor([7] * 4), np.int64(7)])
def test_add_noise_takes_one_timestep_or_one_per_image(t):
    scheduler, x_0, eps = DDPMExtScheduler(), slope(), slope(reverse=True)
    x_t = scheduler.add_noise(x_0, eps, t)
    # Stock's float32 1 - ᾱ_7 is off by some 1e-5, half of it in the root.
    assert_close(x_t, DDPMScheduler().add_noise(x_0, eps, torch.tensor([7] * 4)), rtol=2e-5, atol=1e-6)
    v = scheduler.get_velocity(x_0, eps, t)
    assert_close(v, DDPMScheduler().get_velocity(x_0, eps, torch.tensor([7] * 4)), rtol=2e-5, atol=1e-6)


def test_unknown_attributes_and_options_read_as_stock():
    scheduler = DDPMExtScheduler()
    scheduler.register_to_config(test_attribute=5)
    with pytest.warns(FutureWarning):
        assert scheduler.test_attribute == 5
    with pytest.raises(AttributeError, match="'DDPMExtScheduler' object has no attribute 'does_not_exist'"):
        _ = scheduler.does_not_exist


# Config ---------------------------------------------------------------------------------------------------------------


def test_options_and_defaults_are_stock():
    ours, stock = (inspect.signature(c.__init__).parameters for c in (DDPMExtScheduler, DDPMScheduler))
    assert {k: v.default for k, v in ours.items()} == {k: v.default for k, v in stock.items()}
    assert list(ours)[: len(stock)] == list(stock)


@pytest.mark.parametrize(
    "options", [o for o in OPTIONS if o.get("prediction_type") != "posterior_mean"], ids=lambda o: str(o)
)
def test_from_stock_config_and_back_loses_nothing(options: dict):
    stock = DDPMScheduler(**options)
    with stock_warnings() as said:
        ours = DDPMExtScheduler.from_config(stock.config)
        back = DDPMScheduler.from_config(ours.config)
    assert said == []
    for key in inspect.signature(DDPMScheduler).parameters:
        assert stock.config[key] == ours.config[key] == back.config[key], key


def test_from_other_schedulers_and_back():
    for other in (DDIMScheduler(beta_schedule="scaled_linear"), DPMSolverMultistepScheduler(beta_end=0.01)):
        ours = DDPMExtScheduler.from_config(other.config)
        again = type(other).from_config(ours.config)
        options = {k: v for k, v in other.config.items() if k != "_use_default_values"}  # they are given now
        assert {k: again.config[k] for k in options} == options


def test_positional_arguments_survive_every_road():
    """Diffusers lists them in `_use_default_values`, as if not given, and its `from_config` drops them."""
    stock = DDPMScheduler(20, 1e-3, 0.6)
    made = DDPMExtScheduler(20, 1e-3, 0.6)
    for ours in (DDPMExtScheduler.from_config(stock.config), made):
        assert len(ours) == 20
        assert_close(ours.betas, stock.betas, rtol=1e-6, atol=0)
        for other in (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler):
            assert_close(other.from_config(ours.config).betas, stock.betas, rtol=1e-6, atol=0)
    assert DPMSolverMultistepScheduler.from_config(made.config).config.timestep_spacing == "linspace"  # its own default


def on_disk(scheduler: DDPMExtScheduler, path: Path) -> dict:
    scheduler.save_pretrained(path)
    return json.loads((path / "scheduler_config.json").read_text())


@pytest.mark.parametrize(
    ("word", "stock_word"), [("fixed_large_log", "fixed_large"), ("fixed_small_log", "fixed_small")]
)
def test_log_words_are_saved_as_words_that_stock_samples_rightly(word: str, stock_word: str, tmp_path: Path):
    config = on_disk(DDPMExtScheduler(variance_type=word), tmp_path)
    assert config["_class_name"] == "DDPMScheduler" and config["variance_type"] == stock_word
    assert set(config) - set(DDPMScheduler().config) <= {"_class_name", "_diffusers_version", "_ddpm_ext"}
    with stock_warnings() as said:
        stock = DDPMScheduler.from_pretrained(tmp_path)
        ours = DDPMExtScheduler.from_pretrained(tmp_path)
        again = DDPMExtScheduler.from_config(stock.config)  # as a pipeline does with the scheduler it loaded
    assert said == []
    assert stock.config.variance_type == stock_word
    assert ours.variance_type == again.variance_type == word
    x = slope()
    a, b = (s.step(0.1 * x, 500, x, generator=torch.manual_seed(0)).prev_sample for s in (stock, ours))
    assert_close(a, b, rtol=0, atol=2e-4)


@pytest.mark.parametrize("options", [{"variance_type": "learned"}, {"prediction_type": "posterior_mean"}], ids=str)
def test_what_stock_cannot_sample_it_refuses(options: dict, tmp_path: Path):
    ours = DDPMExtScheduler(**options)
    config = on_disk(ours, tmp_path)
    with stock_warnings() as said:
        stock = DDPMScheduler.from_pretrained(tmp_path)
        loaded = DDPMExtScheduler.from_pretrained(tmp_path)
        again = DDPMExtScheduler.from_config(stock.config)
    assert said == []
    x = slope()
    output = torch.cat([x, x], 1) if config["variance_type"] == "learned" else x
    with pytest.raises(ValueError, match="must be one of `epsilon`"):
        stock.step(output, 500, x)
    for scheduler in (loaded, again):
        for key, word in options.items():
            assert scheduler.config[key] == word
        assert scheduler.config.prediction_type == ours.config.prediction_type
        assert torch.isfinite(scheduler.step(output, 500, x).prev_sample).all()


def test_saving_twice_changes_nothing(tmp_path: Path):
    first = on_disk(DDPMExtScheduler(variance_type="learned", prediction_type="sample"), tmp_path / "1")
    second = on_disk(DDPMExtScheduler.from_pretrained(tmp_path / "1"), tmp_path / "2")
    assert first == second
    third = on_disk(DDPMExtScheduler.from_config(DDPMScheduler.from_pretrained(tmp_path / "2").config), tmp_path / "3")
    assert third == first


def test_extension_keys_survive_every_road(tmp_path: Path):
    extension = {"eta": 0.5, "ms_eps": [0.5] * 1000}
    config = {**DDPMScheduler().config, "_ddpm_ext": extension}
    ours = DDPMExtScheduler.from_config(config)
    assert ours.config["_ddpm_ext"] == extension
    assert on_disk(ours, tmp_path)["_ddpm_ext"] == extension
    with stock_warnings() as said:
        stock = DDPMScheduler.from_pretrained(tmp_path)
        assert DDPMExtScheduler.from_config(stock.config).config["_ddpm_ext"] == extension
    assert said == []


@pytest.mark.parametrize("word", ["fixed_large_log", "learned"])
def test_a_word_changed_through_stock_is_meant(word: str, tmp_path: Path):
    DDPMExtScheduler(variance_type=word).save_pretrained(tmp_path)
    chosen = {"variance_type": "fixed_small", "prediction_type": "v_prediction"}
    stock = DDPMScheduler.from_config(DDPMScheduler.from_pretrained(tmp_path).config, **chosen)
    ours = DDPMExtScheduler.from_config(stock.config)
    assert {key: ours.config[key] for key in chosen} == chosen
    direct = DDPMExtScheduler.from_pretrained(tmp_path, **chosen)
    assert {key: direct.config[key] for key in chosen} == chosen


class Renamed(DDPMExtScheduler):
    """Someone's own scheduler."""


def test_a_subclass_keeps_its_name(tmp_path: Path):
    assert on_disk(Renamed(variance_type="fixed_large_log"), tmp_path)["_class_name"] == "Renamed"
    assert Renamed.from_pretrained(tmp_path).config.variance_type == "fixed_large_log"


@pytest.mark.parametrize("given", [[0.5, 1], np.array([0.25, 1]), torch.tensor([0.25, 1]), (0.25, 1.0)], ids=str)
def test_trained_betas_of_any_kind_are_saved_as_a_list(given, tmp_path: Path):
    scheduler = DDPMExtScheduler(2, trained_betas=given, prediction_type="sample")
    expected = [float(b) for b in given]
    assert scheduler.config.trained_betas == expected == on_disk(scheduler, tmp_path)["trained_betas"]
    assert DDPMExtScheduler.from_pretrained(tmp_path).tables.beta.tolist() == expected
    assert DDPMScheduler.from_pretrained(tmp_path).betas.tolist() == expected


def test_options_registered_later_take_effect_at_once():
    scheduler, x = DDPMExtScheduler(), slope()
    scheduler.register_to_config(variance_type="fixed_large", clip_sample=False)
    assert scheduler.variance_type == "fixed_large"
    expected = DDPMExtScheduler(variance_type="fixed_large", clip_sample=False)
    a, b = (s.step(3 * x, 5, x, generator=torch.manual_seed(0)).prev_sample for s in (scheduler, expected))
    assert torch.equal(a, b)
    before = dict(scheduler.config)
    with pytest.raises(ValueError, match=r"variance_type must be one of .*got 'other'"):
        scheduler.register_to_config(variance_type="other")
    assert dict(scheduler.config) == before
    with pytest.raises(AttributeError):
        scheduler.variance_type = "fixed_small"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copy", "pickle"])
def test_copies_are_whole_and_apart(clone: Callable):
    scheduler, x = DDPMExtScheduler(variance_type="fixed_large"), slope()
    scheduler.set_timesteps(10)
    other = clone(scheduler)
    a, b = (s.step(0.1 * x, 500, x, generator=torch.manual_seed(0)).prev_sample for s in (scheduler, other))
    assert torch.equal(a, b)
    other.set_timesteps(7)
    assert len(scheduler.timesteps) == 10 and scheduler.step(x, 900, x) is not None


def test_a_far_alpha_bar_warns_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scheduler = DDPMExtScheduler(num_train_timesteps=100)
        scheduler.set_timesteps(10)
        scheduler.step(slope(), 0, slope())
    messages = [str(w.message) for w in caught]
    assert len(messages) == 1 and "0.364 is far from 0" in messages[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DDPMExtScheduler()
        DDPMExtScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
        DDPMExtScheduler(
            num_train_timesteps=100, rescale_betas_zero_snr=True, prediction_type="sample", timestep_spacing="trailing"
        )


def test_the_name_holds_scheduler_and_diffusers_knows_the_class():
    """Diffusers finds a scheduler's save method by its base class's name in the module that defines it."""
    module = inspect.getmodule(DDPMExtScheduler)
    assert module is not None and hasattr(module, "SchedulerMixin") and "Scheduler" in DDPMExtScheduler.__name__
    assert not hasattr(diffusers, "DDPMExtScheduler")
