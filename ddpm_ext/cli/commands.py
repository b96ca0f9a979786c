"""The subcommands: options -> the function that does the work, and a line that says where the result lies.

What is heavy is imported after the command line is understood, so that --help and misspelt options answer at once.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..options import option, required
from ..signals import is_rank_0
from .arguments import parse_options, parse_train_config

__all__ = [
    "COMMANDS",
    "calibrate",
    "configs",
    "convert",
    "demo",
    "env",
    "evaluate",
    "push",
    "reconstruct_ema",
    "sample",
    "train",
]


def train(argv: list[str]) -> int:
    """Train a DDPM; the same command run again continues the run."""
    config = parse_train_config(argv)
    from ..training.run import run_training

    return run_training(config)


def sample(argv: list[str]) -> int:
    """Sample N images with a saved pipeline, each from its own seed."""
    from ..pipelines.config import SampleConfig

    config = parse_options(SampleConfig, str(sample.__doc__), argv, "ddpm-ext sample")
    from ..pipelines.sampling import sample_to_folder

    return sample_to_folder(config)


def evaluate(argv: list[str]) -> int:
    """Measure a model: bits/dim, FID, KID and more into eval.json, tables and plots."""
    from ..evaluation.config import EvalConfig

    config = parse_options(EvalConfig, str(evaluate.__doc__), argv, "ddpm-ext evaluate")
    from ..evaluation.evaluate import evaluate as measure
    from ..hub.upload import open_repository
    from ..publishing.publisher import publish

    pushes = config.push_to_hub and is_rank_0()
    name = config.hub_model_id or config.folder.resolve().name
    access: dict[str, Any] = {"token": config.hub_token, "private": config.hub_private_repo or None}
    if pushes:
        open_repository(name, **access)  # what forbids the upload is told before hours of measuring
    results = measure(config)
    if pushes:
        print(publish(config.folder, name, **access).url)
    _say(f"{_count(len(results), 'result')} in {config.folder / 'eval.json'}, as tables in {config.folder / 'eval.md'}")
    return 0


def calibrate(argv: list[str]) -> int:
    """Measure a model's errors and store its best few steps beside its weights."""
    from ..evaluation.config import CalibrateConfig

    config = parse_options(CalibrateConfig, str(calibrate.__doc__), argv, "ddpm-ext calibrate")
    from ..evaluation.calibrate import calibrate as measure

    measure(config)
    _say(f"The calibrated pipeline is {config.folder / 'pipeline'}, its scores {config.folder / 'calibration.md'}")
    return 0


def convert(argv: list[str]) -> int:
    """Convert a checkpoint of another code to a pipeline that Diffusers and ddpm_ext load."""
    from ..conversion.config import ConvertOptions

    options = parse_options(ConvertOptions, str(convert.__doc__), argv, "ddpm-ext convert")
    from ..conversion.convert import convert as write

    print(f"The pipeline lies in {write(options)}.")
    return 0


@dataclass(frozen=True)
class PushOptions:
    """What to push, and where to."""

    model: str = required("Run folder, or folder of a saved pipeline.")
    hub_model_id: str | None = option(None, "user/model; none: the folder's name.")
    hub_private_repo: bool | None = option(None, "Make a new repository private.")
    hub_token: str | None = option(None, "Token; none: HF_TOKEN or `hf auth login`.")
    revision: str | None = option(None, "Branch; none: main.")
    create_pr: bool = option(False, "Open a pull request.")
    commit_message: str | None = option(None, "First line of the commit.")
    tags: list[str] = option([], "Tags for the commit, as v1.0.")
    variant: str | None = option(None, "fp16 or bf16: weights of that precision, too.")
    license: str | None = option(
        None, "Licence of the weights, by the Hub's name; none: that of the last card, or of the base model."
    )
    license_name: str | None = option(None, "With --license other: its name.")
    license_link: str | None = option(None, "With --license other: the address of its text.")
    parent_commit: str | None = option(None, "Push only while the branch is at this commit.")
    card_dir: str | None = option(None, "Write the card and its images there; no upload.")


def push(argv: list[str]) -> int:
    """Upload a finished run, or a saved pipeline, to the Hub in one checked commit, its card with it."""
    options = parse_options(PushOptions, str(push.__doc__), argv, "ddpm-ext push")
    from ..publishing.licenses import as_license
    from ..publishing.model_card import export_card
    from ..publishing.publisher import publish

    run, name = Path(options.model), options.hub_model_id or Path(options.model).resolve().name
    license = as_license(options.license, options.license_name, options.license_link)
    if options.card_dir is not None:
        print(f"The card lies in {export_card(run, options.card_dir, name, license)}.")
        return 0
    names = ("revision", "create_pr", "commit_message", "tags", "variant", "parent_commit")
    more = {"license": license, **{name: getattr(options, name) for name in names}}
    done = publish(run, name, private=options.hub_private_repo, token=options.hub_token, **more)
    print(f"{done.repo_id}: {done.pull_request or done.url}" + ("" if done.changed else " (nothing has changed)"))
    return 0


@dataclass(frozen=True)
class DemoOptions:
    """What to show, and where."""

    model: str | None = option(None, "Folder or Hub name of a pipeline; none: the digits of this package.")
    port: int = option(7860, "Port of the page on this machine.")
    push_to_space: str | None = option(None, "user/space: upload the page instead.")
    hub_token: str | None = option(None, "Token; none: HF_TOKEN or `hf auth login`.")
    hub_private_repo: bool | None = option(None, "Make a new Space private.")


def demo(argv: list[str]) -> int:
    """Show a model in the browser, step by step. Needs the extra: pip install 'ddpm-ext[demo]'."""
    options = parse_options(DemoOptions, str(demo.__doc__), argv, "ddpm-ext demo")
    from ..demo import Studio, make_page, space_files
    from ..hub.upload import push_space
    from ..pipelines.locate import DIGITS

    model = options.model or DIGITS
    if options.push_to_space is None:
        make_page(Studio(model), model).launch(server_name="127.0.0.1", server_port=options.port)
        return 0
    with tempfile.TemporaryDirectory() as staging:
        files = space_files(model, options.push_to_space, Path(staging))
        done = push_space(files, options.push_to_space, private=options.hub_private_repo, token=options.hub_token)
    print(f"The page lies at {done.url}.")
    return 0


def reconstruct_ema(argv: list[str]) -> int:
    """Average the weights of a finished run with another relative width, from its power-function snapshots."""
    from ..training.config import ReconstructConfig

    config = parse_options(ReconstructConfig, str(reconstruct_ema.__doc__), argv, "ddpm-ext reconstruct-ema")
    from ..training.outputs.reconstruct import reconstruct

    number = reconstruct(config)
    print(f"Average of width {config.sigma_rel:g} from {_count(number, 'snapshot')} in {config.output_dir}.")
    return 0


@dataclass(frozen=True)
class ConfigsOptions:
    """Where the files go."""

    output_dir: str = option("accelerate_configs", "Folder for the files.")


def configs(argv: list[str]) -> int:
    """Copy the launch files for `accelerate launch --config_file` to a folder."""
    options = parse_options(ConfigsOptions, str(configs.__doc__), argv, "ddpm-ext configs")
    source, target = Path(__file__).resolve().parent.parent / "accelerate_configs", Path(options.output_dir)
    files = sorted(source.glob("*.yaml"))
    for file in files:
        other = target / file.name
        if other.exists() and other.read_bytes() != file.read_bytes():
            raise UserError(f"{other} is there and differs from ours: give another --output_dir, or move it away.")
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        if not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)
    print(f"{_count(len(files), 'launch file')} in {target}: {', '.join(file.stem for file in files)}")
    return 0


@dataclass(frozen=True)
class EnvOptions:
    """Nothing to choose."""


def env(argv: list[str]) -> int:
    """Print versions, those outside the tested range by name, and hardware; for reports of faults."""
    parse_options(EnvOptions, str(env.__doc__), argv, "ddpm-ext env")
    from ..run_dir import environment
    from .versions import describe_versions

    print("\n".join(describe_versions()))
    print(f"hardware: {environment()['hardware']}")
    return 0


COMMANDS = {
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "calibrate": calibrate,
    "convert": convert,
    "push": push,
    "demo": demo,
    "reconstruct-ema": reconstruct_ema,
    "configs": configs,
    "env": env,
}


def _say(text: str) -> None:
    """Print once for all processes."""
    if is_rank_0():
        print(text)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
