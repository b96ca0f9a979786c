"""The scheduler's options: their words and ranges, and their portable form on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from .process import PredictionType
from .reverse import VarianceType
from .schedules import Tables, check_word, warn_if_signal_remains

EXTENSION_KEY = "_ddpm_ext"  # the one config key of ours: stock classes neither warn about nor drop a leading "_"
PLAIN_VARIANCE = {"fixed_small_log": "fixed_small", "fixed_large_log": "fixed_large"}
SPACINGS = ("linspace", "leading", "trailing")


def stock_words(config: dict[str, Any]) -> dict[str, str]:
    """The config values that must read differently for a stock scheduler."""
    words: dict[str, str] = {}
    if config["variance_type"] in PLAIN_VARIANCE:
        words["variance_type"] = PLAIN_VARIANCE[config["variance_type"]]
    if config["variance_type"] == "learned":
        # Stock would take the root of the head, which is a logarithm, and paint the NaN black; this word it refuses.
        words["prediction_type"] = f"{config['prediction_type']} with learned log-variance"
    return words


def check_options(config: Mapping[str, Any]) -> None:
    """Raise a ValueError for an option that is not one of its words or outside its range."""
    check_word("variance_type", config["variance_type"], get_args(VarianceType))
    check_word("prediction_type", config["prediction_type"], get_args(PredictionType))
    check_word("timestep_spacing", config["timestep_spacing"], SPACINGS)
    ranges = {
        "clip_sample_range": (config["clip_sample_range"] > 0, "a positive number"),
        "sample_max_value": (config["sample_max_value"] > 0, "a positive number"),
        "dynamic_thresholding_ratio": (0 <= config["dynamic_thresholding_ratio"] <= 1, "between 0 and 1"),
        "steps_offset": (
            isinstance(config["steps_offset"], int) and 0 <= config["steps_offset"] < config["num_train_timesteps"],
            f"an int from 0 to {config['num_train_timesteps'] - 1}",
        ),
    }
    for name, (fits, expected) in ranges.items():
        if not fits:
            raise ValueError(f"{name} must be {expected}, got {config[name]!r}.")


def check_terminal_snr(config: Mapping[str, Any], tables: Tables) -> None:
    """Refuse epsilon prediction where ᾱ_T = 0 is sure to be visited; warn where ᾱ_T is far from 0."""
    gone = tables.alpha_bar[-1].item() == 0
    if gone and config["prediction_type"] == "epsilon" and config["timestep_spacing"] != "leading":
        raise ValueError(
            f"timestep_spacing {config['timestep_spacing']!r} visits the last step, whose signal is gone (ᾱ_T = 0): "
            'epsilon prediction is undefined there. Use prediction_type "v_prediction" or "sample".'
        )
    warn_if_signal_remains(tables)
