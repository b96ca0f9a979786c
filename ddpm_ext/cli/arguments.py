"""Command line and YAML file -> a dataclass of options. Preset < YAML < flags; every option is checked alike.

A YAML file becomes arguments in front of the real ones. Imports nothing heavy, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import textwrap
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from ..errors import UsageError, check_word, nearest
from ..run_dir import check_folder
from ..training.config import BROUGHT, TrainConfig, recorded
from ..training.presets import PRESETS
from .suggestions import suggestion

__all__ = ["parse_options", "parse_train_config", "to_yaml"]

Options = TypeVar("Options")
Values = dict[str, Any]  # of options, by name
ALIASES = {
    "logger": "report_to",
    "ema_decay": "ema_max_decay",
    "output_folder": "output_dir",
    "hand_off": "quantization",
}

_FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}


def parse_train_config(argv: list[str] | None = None) -> TrainConfig:
    """Return the configuration of a command line.

    `--preset NAME` and `--config FILE.yaml` stand beside the fields of `TrainConfig`. Without a preset, a command that
    names data starts from the defaults of Diffusers' train_unconditional.py, one that names none from the digits.

    Raises:
        UsageError: an unknown option (the one that was meant is suggested), a wrong value, or a contradiction.
    """
    with _usage():
        argv = list(sys.argv[1:] if argv is None else argv)
        argv, preset, yaml_file = _take_preset_and_file(argv)
        by_hand = _canonical(argv, TrainConfig, also=("preset", "config"))[1]
        if yaml_file is not None:
            options = _read_yaml(yaml_file)
            preset = preset or options.pop("preset", None)
            options.pop("preset", None)
            argv = [*_to_argv(options), *argv]
        argv, given = _canonical(argv, TrainConfig, also=("preset", "config"))
        chosen = _preset_name(preset, given)
        start = PRESETS[chosen].config
        replaced: Values = {
            other: None for name in given for other in _FIELDS[name].metadata.get("replaces", ()) if other not in given
        }
        if given & {"ema_inv_gamma", "ema_power"} and "ema" not in given:
            replaced["ema"] = "warmup"
        if chosen == "unconditional" and preset is None:
            # Its 64 is nobody's wish: images of one size are scaled to it, but several sizes must be asked about.
            replaced["equal_sizes"] = not given & {"resolution", "unet", "model_config_name_or_path"}
        values = _train_values(argv, {**dataclasses.asdict(start), **replaced}, chosen)
        if "ddpm_num_inference_steps" not in given:  # a preset's is for its own number of steps
            values["ddpm_num_inference_steps"] = min(start.ddpm_num_inference_steps, values["ddpm_num_steps"])
        asked = by_hand | {name for name in given if values[name] != getattr(start, name)}
        _refuse_idle_options(values, asked)
        return TrainConfig(**values, asked=frozenset(asked))


def parse_options(
    options: type[Options], description: str, argv: list[str] | None = None, prog: str | None = None
) -> Options:
    """Return the options of a command without presets, with the same errors and spellings.

    Args:
        options: A dataclass of options.
        description: What the command does, for --help.
        argv: The command line; None for the process's own.
        prog: How the command is called, for --help.

    Raises:
        UsageError: an unknown option (the one that was meant is suggested), a wrong value, or one that is missing.
        UserError: an output_dir that is a file.
    """
    with _usage():
        words, _ = _canonical(list(sys.argv[1:] if argv is None else argv), options)
        made = options(**vars(_make_parser(options, description, prog=prog).parse_args(words)))
    if (folder := getattr(made, "output_dir", None)) is not None:
        check_folder("output_dir", folder)  # before hours of work
    return made


def to_yaml(config: TrainConfig) -> str:
    """Return a configuration as the YAML file that gives it again."""
    return yaml.safe_dump(recorded(config), sort_keys=False)


@contextmanager
def _usage() -> Iterator[None]:
    """Turn what is wrong with options into what is wrong with a command line."""
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


# Presets and files ----------------------------------------------------------------------------------------------------


def _take_preset_and_file(argv: list[str]) -> tuple[list[str], str | None, str | None]:
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
            raise UsageError(f"{name} needs a value, as in {name} {'digits' if name == '--preset' else 'run.yaml'}.")
        found[name] = value
    return rest, found["--preset"], found["--config"]


def _preset_name(preset: str | None, given: set[str]) -> str:
    """The preset named, or the one that fits a command that names none."""
    if preset is None:
        return "unconditional" if given & {"dataset_name", "train_data_dir"} else "digits"
    check_word("preset", preset, PRESETS, UsageError)
    return preset


def _read_yaml(path: str) -> Values:
    """Options of a YAML file; the `config.json` of a run folder will do as well."""
    if not Path(path).is_file():
        raise UsageError(f"--config must name a YAML file, and there is none at {path}.")
    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config must name a YAML file, and {path} is none: {error}.") from error
    if isinstance(options, dict) and isinstance(options.get("config"), dict):
        options = options["config"]
    if not isinstance(options, dict):
        raise UsageError(f"{path} must hold lines like `learning_rate: 2e-4`, got a {type(options).__name__}.")
    return {str(name): value for name, value in options.items()}


def _to_argv(options: Values) -> list[str]:
    """Options as the arguments that would give them, so that YAML and flags are read and checked by one parser."""
    argv: list[str] = []
    for name, value in options.items():
        if isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        else:
            argv.append(f"--{name}={'none' if value is None else value}")
    return argv


def _train_values(argv: list[str], defaults: Values, preset: str) -> Values:
    """The value of every field of `TrainConfig`."""
    parser = _make_parser(
        TrainConfig,
        "Train a DDPM; the same command run again continues the run. A preset comes first, a YAML file goes over it, "
        f"flags go over both. The defaults below are those of the preset {preset}.",
        defaults=defaults,
        switched={name for start in PRESETS.values() for name, value in vars(start.config).items() if value is True},
        prog="ddpm-ext train",
        epilog="presets:\n"
        + "\n".join(
            textwrap.fill(f"{name}: {start.expected}", WIDTH, initial_indent="  ", subsequent_indent=" " * 6)
            for name, start in PRESETS.items()
        ),
    )
    where = parser.add_argument_group("where the options start")
    where.add_argument(
        "--preset",
        metavar="NAME",
        help="One of the presets below; none: digits, or for data of your "
        "own the defaults of Diffusers' train_unconditional.py.",
    )
    where.add_argument("--config", metavar="FILE", help="YAML file of options, or the config.json of a run.")
    parser._action_groups.insert(2, parser._action_groups.pop())  # before the fields
    values = vars(parser.parse_args(argv))
    return {name: value for name, value in values.items() if name not in ("preset", "config")}


def _refuse_idle_options(values: Values, given: set[str]) -> None:
    """Refuse an option that would have no effect: nothing is accepted and ignored."""
    for name in sorted(given):
        if values[name] is not None and values[name] is not False and (lacking := _lacking(name, values, given)):
            other, words = lacking
            needed = f"--{other}" if words is True else f"{other} " + " or ".join(json.dumps(word) for word in words)
            was = "none" if values[other] is None else repr(values[other])
            raise UsageError(f"--{name} has an effect only with {needed}, and {other} is {was}.")


def _lacking(name: str, values: Values, given: set[str]) -> tuple[str, Any] | None:
    """Return what an option needs and has not, (another option, its words), or None where it has an effect."""
    if "needs" not in _FIELDS[name].metadata:
        return None
    other, words = _FIELDS[name].metadata["needs"]
    if values["init_from"] is not None and other in BROUGHT and other not in given:
        return None  # the source tells
    there = values[other] is not None and values[other] is not False if words is True else values[other] in words
    return _lacking(other, values, given) if there else (other, words)


# Words -> values ------------------------------------------------------------------------------------------------------

WIDTH = 120  # columns of --help


def _canonical(argv: list[str], options: type, also: Collection[str] = ()) -> tuple[list[str], set[str]]:
    """Arguments in one spelling (underscores, aliases resolved, --no_x as --x=false) and the fields they name.

    Raises:
        UsageError: an option that does not exist; the one that was meant is suggested.
    """
    hints = get_type_hints(options)
    aliases = {alias: name for alias, name in ALIASES.items() if name in hints and alias not in hints}
    words, names = [], set()
    for word in argv:
        if not word.startswith("--") or word in ("--help", "--"):
            words.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = aliases.get(name.replace("-", "_"), name.replace("-", "_"))
        positive = name.removeprefix("no_")
        if name not in hints and _is_switch(hints.get(positive)) and not equals:
            name, equals, value = positive, "=", "false"
        if name not in hints:
            raise UsageError(f"There is no option --{name}.{suggestion(name, [*hints, *aliases, *also])}")
        names.add(name)
        words.append(f"--{name}{equals}{value}")
    return words, names


def _is_switch(hint: object) -> bool:
    return hint is bool or bool in get_args(hint)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help of one entry per option, with --no_x beside the switches that may be on."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=WIDTH)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, _Switch):
            return action.shown
        return super()._format_action_invocation(action)


class _Switch(argparse._StoreAction):
    """An option that is on or off: --x, --x=false, or --no_x."""

    shown = ""


class _List(argparse._StoreAction):
    """An option of several values, which the word none switches off."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, None if values == [None] else values)


class _Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors are exceptions with a sentence, not an exit with a usage text."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[0].upper()}{message[1:]}. --help lists all options.")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        """Refuse a word that is not one of the option's, in the words that can be typed: none, not None."""
        if action.choices is None or value in action.choices:
            return
        words = ["none" if word is None else str(word) for word in action.choices]
        near = nearest(value, words)
        meant = f", did you mean {near}?" if near else ""
        raise argparse.ArgumentError(action, f"invalid choice: {value!r}{meant} (choose from {', '.join(words)})")


def _make_parser(
    options: type,
    description: str,
    *,
    defaults: Mapping[str, object] | None = None,
    switched: Collection[str] = (),
    prog: str | None = None,
    epilog: str | None = None,
) -> _Parser:
    """The parser of a dataclass, its fields in groups by the class that declares them.

    Args:
        options: The dataclass.
        description: What the command does.
        defaults: In place of the fields' own.
        switched: Switches that are on somewhere, so that --no_x means something.
        prog: How the command is called.
        epilog: What stands below the options.
    """
    hints = get_type_hints(options)
    fields = [field for field in dataclasses.fields(options) if not field.metadata.get("hidden")]
    own = {field.name: _default(field) for field in fields}
    required = [field.name for field in fields if own[field.name] is dataclasses.MISSING]
    usage = " ".join(["%(prog)s", *(f"--{name} {name.upper()}" for name in required), "[options]"])
    parser = _Parser(
        prog=prog,
        usage=usage,
        description=textwrap.fill(description, WIDTH).replace("%", "%%"),
        epilog=epilog and epilog.replace("%", "%%"),
        allow_abbrev=False,
        formatter_class=_Formatter,
    )
    values = {**own, **(defaults or {})}
    for declared in reversed(options.__mro__):
        names = [name for name in vars(declared).get("__annotations__", {}) if name in own]
        if not names:
            continue
        title = (declared.__doc__ or "options").splitlines()[0].rstrip(".")
        group = parser.add_argument_group(title if declared is not options else "options of this command")
        for field in (field for field in fields if field.name in names):
            _add(group, field, hints[field.name], values[field.name], field.name in switched)
    return parser


def _default(field: dataclasses.Field[object]) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _add(
    group: argparse._ArgumentGroup, field: dataclasses.Field[object], hint: Any, default: object, switched: bool
) -> None:
    """One field as an argument."""
    optional = get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)
    kind = next(part for part in get_args(hint) if part is not type(None)) if optional else hint
    needed = default is dataclasses.MISSING
    told = "required" if needed else _told(default)
    text = field.metadata["help"].replace("%", "%%") + (f" ({told})" if told else "")
    settings: Values = {"help": text, "required": needed, "default": None if needed else default}
    if kind is bool:
        settings |= {"nargs": "?", "const": True, "type": _or_none(_boolean, optional), "action": _Switch}
    elif get_origin(kind) is Literal:
        settings |= {"type": _or_none(str, optional), "choices": [*get_args(kind), *([None] if optional else [])]}
        settings |= {"metavar": "{" + ",".join(get_args(kind)) + "}"}
    elif get_origin(kind) is list:
        settings |= {"nargs": "*", "type": _or_none(get_args(kind)[0], optional), "metavar": "VALUE", "action": _List}
    else:
        names = {int: "NUMBER", float: "NUMBER", str: "TEXT"}
        settings |= {"type": _or_none(kind, optional), "metavar": names.get(kind, "VALUE")}
    action = group.add_argument(f"--{field.name}", **settings)
    if isinstance(action, _Switch):
        may_be_off = optional or switched or default is True
        action.shown = f"--{field.name}" + (f", --no_{field.name}" if may_be_off else "")


def _told(default: object) -> str:
    """What --help says of a default; nothing where it is off."""
    if default is None or default is False or default == []:
        return ""
    if default is True:
        return "default: on"
    return "default: " + (" ".join(map(str, default)) if isinstance(default, list) else f"{default}")


def _boolean(word: str) -> bool:
    if word.lower() in ("true", "yes", "on", "1", "y", "t"):
        return True
    if word.lower() in ("false", "no", "off", "0", "n", "f"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {word!r}")


def _or_none(read: Callable[[str], object], optional: bool) -> Callable[[str], object]:
    """Let an option that may be off be switched off by the word none."""

    def read_or_none(word: str) -> object:
        return None if optional and word.lower() in ("none", "null") else read(word)

    read_or_none.__name__ = getattr(read, "__name__", "value")  # argparse names the type in its error
    return read_or_none
