"""What the tests of README and docs share: blocks, commands and links of a document."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from ddpm_ext.cli.arguments import parse_options, parse_train_config
from ddpm_ext.cli.commands import COMMANDS, ConfigsOptions, DemoOptions, EnvOptions, PushOptions
from ddpm_ext.conversion.config import ConvertOptions
from ddpm_ext.evaluation.config import CalibrateConfig, EvalConfig
from ddpm_ext.pipelines.config import SampleConfig
from ddpm_ext.training.config import ReconstructConfig

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = re.findall(r'^Homepage = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[0]
RAW = ADDRESS.replace("github.com", "raw.githubusercontent.com") + "/main/"
OPTIONS = {
    "sample": SampleConfig,
    "evaluate": EvalConfig,
    "calibrate": CalibrateConfig,
    "convert": ConvertOptions,
    "push": PushOptions,
    "demo": DemoOptions,
    "reconstruct-ema": ReconstructConfig,
    "configs": ConfigsOptions,
    "env": EnvOptions,
}
SCRIPTS = {"push_to_hub": "push", "reconstruct_ema": "reconstruct-ema"}


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Every command of the shell blocks, comments dropped, continued lines joined."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines) if line]


def subcommand(command: str) -> tuple[str, list[str]] | None:
    """The subcommand of `ddpm-ext` that a command runs, and its options; None for other programs."""
    words = shlex.split(command)
    for place, word in enumerate(words):
        if word in ("ddpm-ext", "ddpm_ext") and (place == 0 or words[place - 1] == "-m"):
            return words[place + 1], words[place + 2 :]
        if (script := re.fullmatch(r"scripts/(\w+)\.py", word)) and words[0] in ("python", "accelerate", "torchrun"):
            name = SCRIPTS.get(script[1], script[1])
            return (name, words[place + 1 :]) if name in COMMANDS else None
    return None


def check_command(command: str) -> object:
    """Parse the options of a command as it would be and return them, None where there are none; nothing is run."""
    found = subcommand(command)
    if found is None or "--help" in found[1]:
        return None
    name, arguments = found
    if name == "train":
        return parse_train_config(arguments)
    return None if name.startswith("-") else parse_options(OPTIONS[name], "", arguments)


def links(path: Path) -> list[str]:
    """Links of a document to files of this repository that are not there."""
    missing = []
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", path.read_text(encoding="utf-8")):
        for prefix in (f"{ADDRESS}/blob/main/", f"{ADDRESS}/tree/main/", RAW):
            if link.startswith(prefix) and not (ROOT / link.removeprefix(prefix)).exists():
                missing.append(link)
        if "://" not in link and not (path.parent / link).exists():
            missing.append(link)
    return missing
