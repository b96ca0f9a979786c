"""Write the API page from the docstrings of the public names.

python scripts/make_api.py                           # prints it
python scripts/make_api.py --output docs/api.md      # the page of the documentation
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ddpm_ext
from ddpm_ext.cli.arguments import parse_options
from ddpm_ext.cli.commands import COMMANDS
from ddpm_ext.options import option

GROUPS = {
    "Pipeline and schedulers": ("DDPMExtPipeline", "DDPMExtScheduler", "DDPMExtSolverScheduler", "DenoiseDiffusion"),
    "Networks and data": ("build_unet", "load_images", "DIGITS"),
    "Training": ("train", "TrainConfig", "PRESETS"),
    "Evaluation": ("bits_per_dim", "BitsPerDim", "rate_distortion", "RateDistortion", "evaluate", "EvalConfig"),
    "Fewer steps": ("calibrate", "CalibrateConfig"),
    "Sharing": ("push_to_hub", "convert"),
    "Errors": ("UserError",),
}


@dataclass(frozen=True)
class Options:
    """Where the page goes."""

    output: str | None = option(None, "File to write; none: print it.")


def api_page() -> str:
    """Return the page: each public name with its signature and its docstring, and the commands."""
    lines = [
        "# API",
        "",
        "Every name is importable from `ddpm_ext`. Made by `python scripts/make_api.py` from the docstrings.",
    ]
    for title, names in GROUPS.items():
        lines += ["", f"## {title}"]
        for name in (name for name in names if name in ddpm_ext.__all__):
            lines += ["", *_entry(name, getattr(ddpm_ext, name))]
    lines += ["", "## Commands", "", "`ddpm-ext COMMAND --help` lists the options of each.", ""]
    lines += [f"- `{name}`: {inspect.getdoc(command)}" for name, command in COMMANDS.items()]
    return "\n".join(lines) + "\n"


def _entry(name: str, value: Any) -> list[str]:
    """A name, its signature, its docstring, and the methods and properties that are documented."""
    if not callable(value):
        return [f"### `{name}`", "", *_data(value)]
    lines = [f"### `{name}`", "", *_text(value)]
    if not inspect.isclass(value):
        return [lines[0], "", f"`{name}{_signature(value)}`", "", *lines[2:]]
    if dataclasses.is_dataclass(value) and (fields := [f for f in dataclasses.fields(value) if "help" in f.metadata]):
        lines += ["", "| option | meaning |", "| --- | --- |"]
        lines += [f"| `{field.name}` | {field.metadata['help'].replace('|', chr(92) + '|')} |" for field in fields]
    for member, function in vars(value).items():
        plain = function.__func__ if isinstance(function, classmethod) else function
        shown = member == "__call__" or not member.startswith("_")
        if shown and inspect.isfunction(plain) and inspect.getdoc(plain):
            lines += ["", f"#### `{name}.{member}{_signature(plain)}`", "", *_text(plain)]
    return lines


def _signature(function: Any) -> str:
    """The names of the arguments, with the defaults that are numbers, words or None."""
    shown = []
    for parameter in inspect.signature(function).parameters.values():
        stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = parameter.default
        plain = default is None or isinstance(default, bool | int | float | str)
        shown.append(stars + parameter.name + (f"={default!r}" if plain else ""))
    return f"({', '.join(shown)})"


def _text(value: Any) -> list[str]:
    """A docstring as a block that keeps its lines."""
    return ["~~~text", *(inspect.getdoc(value) or "").splitlines(), "~~~"]


def _data(value: Any) -> list[str]:
    if isinstance(value, dict):
        return ["One entry per preset:", "", *(f"- `{name}`: {entry.expected}" for name, entry in value.items())]
    return [f"A `{type(value).__name__}`."]


def main(options: Options) -> None:
    """Print the page or write it."""
    if options.output is None:
        print(api_page(), end="")
    else:
        Path(options.output).write_text(api_page(), encoding="utf-8")
        print(f"The page lies in {options.output}.")


if __name__ == "__main__":
    main(parse_options(Options, "Write the API page from the docstrings of the public names."))
