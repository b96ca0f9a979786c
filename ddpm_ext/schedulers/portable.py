"""Configs as others write and read them: stock's words on disk, swapped schedulers, option words of old Diffusers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache

import diffusers

from ..diffusion.words import EXTENSION_KEY, Arguments, Config
from ..errors import UserError

__all__ = ["stock_words", "true_config", "true_defaults"]

_PLAIN_VARIANCE = {"fixed_small_log": "fixed_small", "fixed_large_log": "fixed_large", "analytic": "fixed_small"}
_RENAMED = {"timesteps": "num_train_timesteps", "clip_predicted_image": "clip_sample"}  # Diffusers 0.0
_WITHOUT_EFFECT = ("tensor_format",)  # Diffusers up to 0.4: NumPy or PyTorch
_REFUSED = {
    "timestep_values": "fixed the noise levels of Diffusers 0.0",
    "snr_shift_scale": "shifts the noise schedule of CogVideoX",
}


def stock_words(config: Config) -> dict[str, str]:
    """Return the config values that must read differently for a stock scheduler."""
    words: dict[str, str] = {}
    if config["variance_type"] in _PLAIN_VARIANCE:
        words["variance_type"] = _PLAIN_VARIANCE[config["variance_type"]]
    if config["variance_type"] == "learned":
        # Stock would take the root of the head, which is a logarithm, and draw NaN as black; it refuses this word.
        words["prediction_type"] = f"{config['prediction_type']} with learned log-variance"
    return words


def true_config(config: Config, cls: type) -> Arguments:
    """Return a config read from disk or from a stock scheduler as it is meant.

    The true words that a portable config keeps in `_ddpm_ext` go back to their places, except where the word on disk
    has been changed since: what a user of the stock class chose there is meant. Option words of old Diffusers are
    translated. What the class in between only filled in with its defaults is left to `cls`.

    Args:
        config: Options by name, with Diffusers' notes on them.
        cls: The class that is to be built.

    Raises:
        UserError: an option that has another meaning here, or words of `_ddpm_ext` that are none.
    """
    origin = _origin(config, cls)
    foreign = "_class_name" in config and origin is not None and "beta_start" not in _defaults(origin)
    if foreign and not config.keys() & {"beta_start", "beta_schedule", "trained_betas"}:
        raise UserError(
            f"The config of a {config['_class_name']} describes no DDPM: it has no betas. Build {cls.__name__} with "
            "the options of the process that the network was trained on."
        )
    unset = true_defaults(config, origin)
    config = _without_old_words({**config, "_use_default_values": unset})
    if not isinstance(config.get(EXTENSION_KEY), dict):
        return config
    extension = dict(config.pop(EXTENSION_KEY))
    words = extension.pop("words", {})
    if not isinstance(words, Mapping):
        raise UserError(f"words of {EXTENSION_KEY} must map options to their true words, got {words!r}.")
    saved_as = stock_words({"variance_type": None, "prediction_type": None, **config, **words})
    words = {key: word for key, word in words.items() if config.get(key) == saved_as.get(key)}
    return {**config, **words, **({EXTENSION_KEY: extension} if extension else {})}


def true_defaults(config: Config, cls: type | None) -> list[str]:
    """Return the names in `_use_default_values` whose values are the defaults of `cls`, sorted; all where it is None.

    Diffusers lists there every option that came without a keyword, positional arguments too, and `from_config` drops
    what is listed.
    """
    defaults = {} if cls is None else _defaults(cls)
    names = sorted(config.get("_use_default_values") or [])
    return [name for name in names if name not in defaults or _is_default(config, name, defaults)]


def _origin(config: Config, cls: type) -> type | None:
    """The class that filled in the defaults of a config: the one that explains the most of them."""
    listed = set(config.get("_use_default_values") or [])
    named = getattr(diffusers, str(config.get("_class_name")), None)
    if not listed or isinstance(named, type):
        return named
    fits = {
        one: len(listed) - len(true_defaults(config, one))
        for one in (cls, *_stock_classes())
        if listed <= _defaults(one).keys() <= config.keys()
    }
    return min(fits, key=lambda one: fits[one], default=None)


@cache
def _stock_classes() -> tuple[type, ...]:
    names = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    found = [getattr(diffusers, name) for name in names]
    return tuple(one for one in found if isinstance(one, type) and hasattr(one, "from_config"))


def _defaults(cls: type) -> Arguments:
    parameters = inspect.signature(cls).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is not one.VAR_KEYWORD}


def _is_default(config: Config, name: str, defaults: Config) -> bool:
    return repr(config.get(name)) == repr(defaults[name])


def _without_old_words(config: Arguments) -> Arguments:
    """The config in today's words; what is listed as a default counts as not said."""
    old = {name: config.pop(name) for name in (*_RENAMED, "predict_epsilon", *_WITHOUT_EFFECT) if name in config}
    said = {_RENAMED[name]: value for name, value in old.items() if name in _RENAMED}
    if old.get("predict_epsilon") is not None:  # Diffusers 0.6 to 0.12
        said["prediction_type"] = "epsilon" if old["predict_epsilon"] else "sample"
    unset = config["_use_default_values"]
    for name, value in said.items():
        if name in config and name not in unset and config[name] != value:
            raise UserError(
                f"{name} is {config[name]!r} and an option of an older Diffusers ({', '.join(old)}) says {value!r}. "
                "Remove the one that is not meant."
            )
    for name, reason in _REFUSED.items():
        if config.get(name) is not None and name not in unset:
            raise UserError(f"{name} {reason}, which DDPMExtScheduler cannot do, got {config[name]!r}.")
    return {**config, **said, "_use_default_values": [name for name in unset if name not in said]}
