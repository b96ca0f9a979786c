"""`X.from_config(scheduler.config)` through every stock scheduler and back, and configs of older Diffusers."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerator import is_installed
from diffusers import DDPMScheduler
from networks import tiny_unet
from training import forget_accelerator

from ddpm_ext.errors import UserError
from ddpm_ext.models.classes import class_options
from ddpm_ext.pipelines.ddpm import DDPMExtPipeline
from ddpm_ext.pipelines.sampling import SampleConfig, sample_to_folder
from ddpm_ext.schedulers.ddpm import DDPMExtScheduler

# Some stock schedulers call NumPy as NumPy 2 no longer wants it.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
Stock: Any = diffusers  # its from_config is typed as a union
OPTIONS = tuple(inspect.signature(DDPMScheduler).parameters)
STOCK = [name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")]
GIVEN: list[dict[str, Any]] = [
    {},
    {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},  # defaults, but said
    {"beta_start": 0.00085, "beta_end": 0.012, "variance_type": "fixed_large"},
    {"num_train_timesteps": 500, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    {"clip_sample": False, "beta_schedule": "squaredcos_cap_v2", "steps_offset": 1},
]


def options_of(scheduler: Any) -> dict[str, Any]:
    return {name: scheduler.config[name] for name in OPTIONS}


def through(cls: type, stock: type, given: dict[str, Any]) -> dict[str, Any]:
    """The options of a scheduler after a journey through another class."""
    between = stock.from_config(cls(**given).config)  # pyright: ignore[reportAttributeAccessIssue]
    return options_of(cls.from_config(between.config))  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", STOCK)
def test_through_every_stock_scheduler_and_back(name: str) -> None:
    stock = getattr(diffusers, name)
    for given in GIVEN:
        try:
            expected = through(DDPMScheduler, stock, given)
        except (ImportError, TypeError, ValueError) as error:
            pytest.skip(f"{name} cannot be built from a DDPM config: {error}")
        assert through(DDPMExtScheduler, stock, given) == expected == options_of(DDPMScheduler(**given)), given


def test_through_two_classes_and_a_file(tmp_path: Path) -> None:
    ours = DDPMExtScheduler(variance_type="fixed_large", _ddpm_ext={"eta": 0.5})  # pyright: ignore[reportCallIssue]
    other = Stock.DDIMScheduler.from_config(Stock.HeunDiscreteScheduler.from_config(ours.config).config)
    back = DDPMExtScheduler.from_config(other.config)
    assert options_of(back) == options_of(ours) and back.config["_ddpm_ext"] == {"eta": 0.5}
    back.save_pretrained(tmp_path)
    assert options_of(DDPMExtScheduler.from_pretrained(tmp_path)) == options_of(ours)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "HeunDiscreteScheduler", "LCMScheduler"])
def test_positional_arguments_are_meant(name: str) -> None:
    """Diffusers lists them as left at their defaults; only what equals the defaults of that class is."""
    ours = DDPMExtScheduler.from_config(getattr(diffusers, name)(20, 1e-3, 0.6).config)
    assert [ours.config[key] for key in OPTIONS[:3]] == [20, 1e-3, 0.6]
    assert ours.config["timestep_spacing"] == "leading"  # theirs was only filled in


OLD_WORDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"predict_epsilon": False}, {"prediction_type": "sample"}),
    ({"predict_epsilon": True}, {"prediction_type": "epsilon"}),
    ({"timesteps": 900, "clip_predicted_image": False}, {"num_train_timesteps": 900, "clip_sample": False}),
    ({"tensor_format": "pt", "timestep_values": None}, {}),
]


@pytest.mark.parametrize(("old", "new"), OLD_WORDS, ids=str)
@pytest.mark.parametrize("road", ["config", "disk", "stock", "pipeline", "keyword"])
def test_words_of_older_diffusers_are_translated(
    old: dict, new: dict, road: str, tmp_path: Path, tiny_unet: Any
) -> None:
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler", **old}))
    roads: dict[str, Callable[[], Any]] = {
        "config": lambda: DDPMExtScheduler.from_config(old),
        "disk": lambda: DDPMExtScheduler.from_pretrained(tmp_path),
        "stock": lambda: DDPMExtScheduler.from_config(Stock.DDPMScheduler.from_pretrained(tmp_path).config),
        "pipeline": lambda: DDPMExtPipeline(tiny_unet, Stock.DDPMScheduler.from_pretrained(tmp_path)).scheduler,
        "keyword": lambda: DDPMExtScheduler.from_config({}, **old),
    }
    ours = roads[road]()
    assert options_of(ours) == options_of(DDPMScheduler(**new))
    assert not old.keys() & ours.config.keys() - {"timestep_values"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"predict_epsilon": False, "prediction_type": "v_prediction"}, "prediction_type is 'v_prediction' and"),
        ({"timesteps": 10, "num_train_timesteps": 20}, "num_train_timesteps is 20 and"),
        ({"timestep_values": [1, 2]}, r"timestep_values .* cannot do, got \[1, 2\]"),
        ({"snr_shift_scale": 3.0}, "snr_shift_scale .* cannot do, got 3.0"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "describes no DDPM: it has no betas"),
        ({"timestep_spacing": "even"}, r'"even" is no spacing of Diffusers.*trajectory="even"'),
    ],
    ids=str,
)
def test_what_would_change_the_process_is_refused(config: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DDPMExtScheduler.from_config(config)


def guided_pipeline(scheduler: Any) -> DDPMExtPipeline:
    """A network of three classes that can be guided, under any scheduler."""
    options = class_options(3, with_null_label=True)
    unet = tiny_unet(num_class_embeds=options["num_class_embeds"])
    unet.register_to_config(**options)
    pipeline = DDPMExtPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def refusal(draw: Callable[[], Any], name: str) -> str:
    """The sentence of a refusal; where there is none, as for images, the scheduler's name."""
    try:
        draw()
    except UserError as error:
        return str(error)
    return name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STOCK)
def test_every_stock_scheduler_draws_or_is_refused_with_a_sentence(name: str, tmp_path: Path) -> None:
    try:
        scheduler = getattr(diffusers, name)()
    except (ImportError, TypeError) as error:
        pytest.skip(f"{name} cannot be built: {error}")
    pipeline = guided_pipeline(scheduler)
    asked: dict[str, Any] = {"num_inference_steps": 4, "class_labels": 1, "output_type": "latent"}
    grey = torch.zeros(1, 8, 8)
    pipeline.save_pretrained(tmp_path / "model")
    given = {"num_samples": 1, "num_inference_steps": 4, "class_label": "1", "cpu": not is_installed()}
    forget_accelerator()
    config = SampleConfig(model=str(tmp_path / "model"), output_dir=str(tmp_path / "images"), **given)
    for draw in (
        lambda: pipeline(1, **asked),
        lambda: pipeline(1, **asked, guidance_scale=2.0),
        lambda: pipeline(1, **asked, guidance_scale=2.0, guidance_rescale=0.5),
        lambda: list(pipeline.progressive(1, num_inference_steps=4, class_labels=1)),
        lambda: pipeline.interpolate(grey, grey, 3, class_labels=1),
        lambda: pipeline.continue_from(grey, 3, class_labels=1),
        lambda: sample_to_folder(config),
    ):
        assert name in refusal(draw, name)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "FlowMatchEulerDiscreteScheduler",
            r"does not: it has no scale_model_input and no init_noise_sigma",
        ),
        (
            "CogVideoXDPMScheduler",
            "its step needs model_output, old_pred_original_sample, timestep, ",
        ),
        ("KarrasVeScheduler", "it has no option num_train_timesteps"),
        ("IPNDMScheduler", "does not: it has no alphas_cumprod"),  # images like noise came of these four
        ("EDMEulerScheduler", "does not: it has no alphas_cumprod"),
        ("EDMDPMSolverMultistepScheduler", "does not: it has no alphas_cumprod"),
        ("CMStochasticIterativeScheduler", "does not: it has no alphas_cumprod"),
    ],
)
def test_a_scheduler_of_another_kind_is_told_what_it_lacks(name: str, sentence: str) -> None:
    pipeline = guided_pipeline(getattr(diffusers, name)())
    with pytest.raises(UserError, match=sentence):
        pipeline(1, num_inference_steps=4, class_labels=1, guidance_scale=2.0, guidance_rescale=0.5)
