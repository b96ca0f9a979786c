"""Command line and YAML file -> TrainConfig. Preset < YAML < flags; every option is checked alike.

`transformers.HfArgumentParser` reads the dataclass; a YAML file becomes arguments in front of the real ones.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from argparse import Action
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from ..training.config import TrainConfig, recorded
from ..training.presets import PRESETS

Options = TypeVar("Options")
ALIASES = {"logger": "report_to", "ema_decay": "ema_max_decay", "output_folder": "output_dir"}

# An option given by hand takes the place of a preset's that says the same thing another way.
REPLACES = {
    "num_epochs": ("max_train_steps",),
    "max_train_steps": ("num_epochs",),
    "train_batch_size": ("global_batch_size",),
    "gradient_accumulation_steps": ("global_batch_size",),
    "train_data_dir": ("dataset_name", "dataset_config_name"),
    "dataset_name": ("train_data_dir",),
    "save_images_epochs": ("save_images_steps",),
    "save_images_steps": ("save_images_epochs",),
    "model_config_name_or_path": ("unet", "resolution"),
    "unet": ("model_config_name_or_path", "resolution"),
    "streaming": ("save_images_epochs", "save_model_epochs"),  # a stream's epochs have no known length
}

# An option given by hand has an effect only beside another; without it the command is refused.
NEEDS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "ema_inv_gamma": ("ema", ("warmup",)),
    "ema_power": ("ema", ("warmup",)),
    "ema_max_decay": ("ema", ("constant", "warmup")),
    "ema_sigma_rel": ("ema", ("power_function",)),
    "ema_snapshot_steps": ("ema", ("power_function",)),
    "ema": ("use_ema", (True,)),
    "beta_start": ("ddpm_beta_schedule", ("linear", "scaled_linear", "sigmoid")),
    "beta_end": ("ddpm_beta_schedule", ("linear", "scaled_linear", "sigmoid")),
    "hub_model_id": ("push_to_hub", (True,)),
    "hub_token": ("push_to_hub", (True,)),
    "hub_private_repo": ("push_to_hub", (True,)),
    "hub_every": ("push_to_hub", (True,)),
    "price_per_hour": ("dry_run", (True,)),
}


def parse_train_config(argv: list[str] | None = None) -> TrainConfig:
    """The configuration of a command line.

    `--preset NAME` and `--config FILE.yaml` stand beside the fields of `TrainConfig`. Without a preset, a command that
    names data starts from the defaults of Diffusers' train_unconditional.py, one that names none from the digits.

    Raises:
        ValueError: an unknown option (the nearest name is suggested), a wrong value, or a contradiction.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    argv, preset, yaml_file = take_preset_and_file(argv)
    if yaml_file is not None:
        options = read_yaml(yaml_file)
        preset = preset or options.pop("preset", None)
        options.pop("preset", None)
        argv = [*to_argv(options), *argv]
    argv, given = canonical(argv)
    start = PRESETS[preset_name(preset, given)].config
    replaced: dict[str, Any] = {other: None for name in given for other in REPLACES.get(name, ()) if other not in given}
    if given & {"ema_inv_gamma", "ema_power"} and "ema" not in given:
        replaced["ema"] = "warmup"
    if preset_name(preset, given) == "unconditional" and preset is None:
        # Its 64 is nobody's wish: pictures of one size are scaled to it, but several sizes must be asked about.
        replaced["equal_sizes"] = not given & {"resolution", "unet", "model_config_name_or_path"}
    parser = make_parser(TrainConfig, train_help(), {**dataclasses.asdict(start), **replaced})
    values = vars(parser.parse_args(argv))
    if "ddpm_num_inference_steps" not in given:  # a preset's is for its own number of steps
        values["ddpm_num_inference_steps"] = min(start.ddpm_num_inference_steps, values["ddpm_num_steps"])
    refuse_idle_options(values, {name for name in given if values[name] != getattr(start, name)})
    return TrainConfig(**values)


def parse_options(options: type[Options], description: str, argv: list[str] | None = None) -> Options:
    """The options of a script without presets, with the same errors and spellings.

    Raises:
        ValueError: an unknown option (the nearest name is suggested), a wrong value, or one that is missing.
    """
    words, _ = canonical(list(sys.argv[1:] if argv is None else argv), options)
    return options(**vars(make_parser(options, description, {}).parse_args(words)))


def take_preset_and_file(argv: list[str]) -> tuple[list[str], str | None, str | None]:
    """The two options that choose where the others start, and the arguments that are left."""
    found: dict[str, str | None] = {"--preset": None, "--config": None}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in found:
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value or value.startswith("--"):
            raise ValueError(f"{name} needs a value, as in {name} {'digits' if name == '--preset' else 'run.yaml'}.")
        found[name] = value
    return rest, found["--preset"], found["--config"]


def preset_name(preset: str | None, given: set[str]) -> str:
    """The preset named, or the one that fits a command that names none."""
    if preset is None:
        return "unconditional" if given & {"dataset_name", "train_data_dir"} else "digits"
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
    return preset


def read_yaml(path: str) -> dict[str, Any]:
    """Options of a YAML file; the `config.json` of a run folder will do as well."""
    if not Path(path).is_file():
        raise ValueError(f"--config must name a YAML file, and there is none at {path}.")
    options = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    if isinstance(options, dict) and isinstance(options.get("config"), dict):
        options = options["config"]
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold lines like `learning_rate: 2e-4`, got a {type(options).__name__}.")
    return {str(name): value for name, value in options.items()}


def to_argv(options: dict[str, Any]) -> list[str]:
    """Options as the arguments that would give them, so that YAML and flags are read and checked by one parser."""
    argv: list[str] = []
    for name, value in options.items():
        if isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        else:
            argv.append(f"--{name}={'none' if value is None else value}")
    return argv


def to_yaml(config: TrainConfig) -> str:
    """A configuration as the YAML file that gives it again."""
    return yaml.safe_dump(recorded(config), sort_keys=False)


def canonical(argv: list[str], options: type = TrainConfig) -> tuple[list[str], set[str]]:
    """Arguments in one spelling (underscores, aliases resolved, --no_x as --x=false) and the fields they name.

    Raises:
        ValueError: an option that does not exist; the nearest name is suggested.
    """
    hints = get_type_hints(options)
    words, names = [], set()
    for word in argv:
        if not word.startswith("--") or word == "--help":
            words.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = ALIASES.get(name.replace("-", "_"), name.replace("-", "_"))
        positive = name.removeprefix("no_")
        if name not in hints and hints.get(positive) is bool and not equals:
            name, equals, value = positive, "=", "false"
        if name not in hints:
            known = [*hints, *ALIASES, "preset", "config"] if options is TrainConfig else [*hints]
            raise ValueError(f"There is no option --{name}.{nearest(name, known)}")
        names.add(name)
        words.append(f"--{name}{equals}{value}")
    return words, names


def nearest(name: str, known: list[str]) -> str:
    """The sentence " Did you mean ...?" with the nearest known name, always."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f" Did you mean --{matches[0]}?" if matches else ""


class ArgumentParser(HfArgumentParser):
    """HfArgumentParser whose errors are exceptions with a sentence, not an exit with a usage text."""

    def error(self, message: str) -> Any:
        raise ValueError(f"{message[0].upper()}{message[1:]}. --help lists all options.")


def make_parser(options: type, description: str, defaults: dict[str, Any]) -> ArgumentParser:
    """The parser of a dataclass, with other defaults; the word none switches an option off that may be off."""
    parser = ArgumentParser(options, allow_abbrev=False, description=description)  # pyright: ignore[reportArgumentType]
    hints = get_type_hints(options)
    for action in parser._actions:
        if type(None) in get_args(hints.get(action.dest)):
            if bool in get_args(hints[action.dest]):
                action.nargs, action.const, action.type = "?", True, string_to_bool  # --private alone says yes
            allow_none(action)
        if action.nargs == "+":
            action.nargs = "*"  # an empty list in a YAML file
    parser.set_defaults(**defaults)
    return parser


def allow_none(action: Action) -> None:
    """Let an option that may be off be switched off by the word none."""
    read = action.type

    def read_or_none(word: str) -> Any:
        if word.lower() in ("none", "null"):
            return None
        return read(word) if callable(read) else word

    read_or_none.__name__ = getattr(read, "__name__", "value")  # argparse names the type in its error
    action.type = read_or_none


def train_help() -> str:
    """The description above the options of --help: how they go over one another, and what each preset reaches."""
    presets = "; ".join(f"{name}: {preset.expected}" for name, preset in PRESETS.items())
    return f"Train a DDPM. --preset NAME and --config FILE.yaml come first, flags go over both. {presets}".replace(
        "%", "%%"
    )


def refuse_idle_options(values: dict[str, Any], changed: set[str]) -> None:
    """An option that would have no effect is refused: nothing is accepted and ignored."""
    idle = sorted(
        name for name in changed if name.startswith("eval_") and name not in ("eval_steps", "eval_batch_size")
    )
    if idle and values["eval_steps"] is None:
        raise ValueError(f"--{idle[0]} has an effect only with --eval_steps, which is none.")
    for name in sorted(changed & NEEDS.keys()):
        other, words = NEEDS[name]
        if values[other] not in words:
            needed = " or ".join(json.dumps(word) for word in words)
            raise ValueError(f"--{name} has an effect only with {other} {needed}, and {other} is {values[other]!r}.")
