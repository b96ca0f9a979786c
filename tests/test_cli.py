"""The command: one place for errors, help at once, suggestions by meaning, and what may be called a model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from hub_server import Hub

import ddpm_ext
from ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, UserError
from ddpm_ext.cli.arguments import parse_options
from ddpm_ext.cli.commands import COMMANDS
from ddpm_ext.cli.main import main
from ddpm_ext.cli.suggestions import MEANT, suggestion
from ddpm_ext.errors import UsageError
from ddpm_ext.options import option
from ddpm_ext.pipelines.ddpm import load_pipeline
from ddpm_ext.pipelines.loading import load_network_config
from ddpm_ext.pipelines.locate import find_pipeline, run_folder
from ddpm_ext.run_dir import environment

ROOT = Path(__file__).resolve().parent.parent


def python(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=400)


# Help and usage -------------------------------------------------------------------------------------------------------


def test_help_and_usage_errors_import_neither_torch_nor_diffusers() -> None:
    code = (
        "import sys\nfrom ddpm_ext.cli.commands import COMMANDS\nfrom ddpm_ext.cli.main import main\n"
        "for name in COMMANDS:\n    assert main([name, '--help']) == 0\n    assert main([name, '--nonsense']) == 2\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_option_stands_once_in_the_help_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    entries = re.findall(r"^  (--?\w.*)$", text, re.MULTILINE)
    shown = [option for entry in entries for option in re.findall(r"--\w+", entry.split("   ")[0])]
    assert len(shown) == len(set(shown)) and "--help" in shown
    assert not [option for option in shown if "-" in option[2:]]


def test_the_help_of_train_has_presets_groups_and_no_idle_negations(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--preset NAME" in text and "--config FILE" in text
    assert "--random_flip, --no_random_flip" in text  # on in a preset
    assert "--no_dry_run" not in text and "--no_push_to_hub" not in text  # off everywhere
    assert text.count("\n\n") >= 8  # groups
    assert "  cifar10: FID 3.17" in text
    assert ".py" not in text.replace("train_unconditional.py", "")  # options are named, not modules


def test_required_options_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--help"]) == 0
    text = capsys.readouterr().out
    assert "usage: ddpm-ext sample --model MODEL [options]" in text and re.search(r"--model TEXT .*\(required\)", text)
    assert main(["sample"]) == 2
    assert "required: --model" in capsys.readouterr().err


def test_lists_and_words_that_may_be_off() -> None:
    @dataclass(frozen=True)
    class Options:
        steps: list[int] | None = option([1, 2], "Steps.")
        names: list[str] = option([], "Names.")
        size: float | None = option(0.5, "Size.")
        fast: bool | None = option(None, "Fast.")

    def parsed(words: str) -> Options:
        return parse_options(Options, "", words.split())

    assert parsed("") == Options()
    assert parsed("--steps 3 4 --names a --size 2 --fast") == Options([3, 4], ["a"], 2.0, True)
    assert parsed("--steps none --size=none --no_fast") == Options(None, [], None, False)
    assert parsed("--fast=none --names").fast is None
    for words in ("--steps 1 x", "--size x", "--fast maybe", "--no_steps", "stray"):
        with pytest.raises(UsageError):
            parsed(words)


@pytest.mark.parametrize(
    ("command", "given", "meant"),
    [
        ("train", "--lr", "learning_rate"),
        ("train", "--batch_size", "train_batch_size"),
        ("train", "--batch-size", "train_batch_size"),
        ("train", "--resume", "resume_from_checkpoint"),
        ("train", "--steps", "max_train_steps"),
        ("train", "--epochs", "num_epochs"),
        ("train", "--warmup", "lr_warmup_steps"),
        ("train", "--image_size", "resolution"),
        ("train", "--data_dir", "train_data_dir"),
        ("train", "--weight_decay", "adam_weight_decay"),
        ("train", "--lerning_rate", "learning_rate"),
        ("train", "--outputdir", "output_dir"),
        ("sample", "--steps", "num_inference_steps"),
        ("sample", "--n", "num_samples"),
        ("sample", "--out", "output_dir"),
        ("sample", "--ckpt", "model"),
        ("evaluate", "--batch", "batch_size"),
        ("push", "--repo_id", "hub_model_id"),
        ("convert", "--ckpt", "checkpoint"),
        ("convert", "--T", "num_timesteps"),
    ],
)
def test_a_misspelt_option_is_answered_with_the_one_that_was_meant(
    command: str, given: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, f"{given}=3"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: There is no option --") and said.count("\n") == 1
    assert said.rstrip().endswith(f"Did you mean --{meant}?")


def test_what_is_like_nothing_gets_no_suggestion() -> None:
    assert suggestion("zzz", ["model", "seed"]) == " --help lists all options."


def test_every_suggestion_names_an_option_that_some_command_has(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
    known = set(re.findall(r"--(\w+)", capsys.readouterr().out))
    unknown = {option for options in MEANT.values() for option in options} - known
    assert unknown <= {"init_from"}


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["frain"], 2, "There is no command frain. Did you mean train?"),
        (["train", "--loss", "l2"], 2, "invalid choice: 'l2'"),
        (["train", "--max_train_steps", "0"], 2, "max_train_steps must be at least 1, got 0"),
        (["sample", "--model", "a/b", "--num_samples", "many"], 2, "invalid int value: 'many'"),
        (["sample", "--model", "runs/nothing"], 1, "no folder runs/nothing"),
    ],
)
def test_errors_are_one_sentence_and_an_exit_code(
    words: list[str], code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ") and sentence in said and said.count("\n") == 1


def command(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Callable[[], int]:
    """A command that ends with an error."""

    def fail(argv: list[str]) -> int:
        raise error

    monkeypatch.setitem(COMMANDS, "fail", fail)
    return lambda: main(["fail"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("said."), 1),
        (UsageError("said."), 2),
        (FileNotFoundError(2, "No such file or directory", "x.json"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_expected_errors_end_with_their_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, error)() == code
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("kind", [AttributeError, KeyError, TypeError, ImportError, RuntimeError, ValueError, OSError])
def test_a_bug_keeps_its_traceback(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(kind):
        command(monkeypatch, kind("a bug"))()


def test_a_value_error_of_the_package_is_expected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(COMMANDS, "fail", lambda argv: DDPMExtScheduler(variance_type="fixed") and 0)  # pyright: ignore[reportArgumentType]
    assert main(["fail"]) == 1
    assert "variance_type must be one of" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--cpu"],
        ["sample", "--model", "m"],
        ["evaluate", "--model", "m"],
        ["calibrate", "--model", "m"],
        ["convert", "--checkpoint", "c", "--source", "diffusers"],
        ["reconstruct-ema", "--run", "r", "--sigma_rel", "0.1"],
        ["configs"],
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("inside", ["", "run"])
def test_a_folder_for_results_that_is_a_file_is_refused_at_once(
    words: list[str], inside: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    target = tmp_path / "file" / inside
    assert main([*words, "--output_dir", str(target)]) == 1
    said = f"error: --output_dir must be a folder, got {target}, and {tmp_path / 'file'} is a file; give a folder.\n"
    assert capsys.readouterr().err == said and (tmp_path / "file").read_text() == "mine"


def test_a_hub_that_cannot_be_reached_is_a_sentence(tmp_path: Path) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    words = ["--preset", "cifar10", "--dry_run", "--cpu", "--output_dir", str(tmp_path / "run")]
    done = python("-m", "ddpm_ext", "train", *words, **nowhere)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    sentence = done.stderr.strip().splitlines()[-1]
    assert sentence.startswith("error: http://127.0.0.1:9 could not be reached")
    assert sentence.endswith("or set HF_HUB_OFFLINE=1 for what is cached.")


def test_a_connection_that_is_not_the_hubs_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConnectionError):
        command(monkeypatch, ConnectionError("another server"))()


# How it is called -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["train", "training.run", "evaluate", "cli.main", "sample"])
def test_a_module_that_is_no_command_says_so(module: str) -> None:
    done = python("-m", f"ddpm_ext.{module}", "--help")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert f"ddpm_ext.{module} is no command" in done.stderr and "python -m ddpm_ext" in done.stderr


def test_the_package_is_a_command_and_so_is_each_script() -> None:
    assert "usage: ddpm-ext train [options]" in python("-m", "ddpm_ext", "train", "--help").stdout
    names = {"push_to_hub": "push", "reconstruct_ema": "reconstruct-ema"}
    for path in sorted((ROOT / "scripts").glob("*.py")):
        if "cli.main" in (text := path.read_text()):
            assert f'script("{names.get(path.stem, path.stem)}")' in text
            assert len(text.split('"""', 2)[2].strip().splitlines()) <= 8


def test_a_record_names_the_command_however_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for program, name in (("/x/ddpm_ext/__main__.py", "ddpm-ext"), ("/y/bin/ddpm-ext", "ddpm-ext"), ("a/b.py", "b.py")):
        monkeypatch.setattr(sys, "argv", [program, "train", "--hub_token=secret"])
        assert environment()["command"] == [name, "train", "--hub_token=***"]


@pytest.mark.slow
def test_accelerate_launches_the_command(tmp_path: Path) -> None:
    words = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml", "-m", "ddpm_ext"]
    train = ["train", "--cpu", "--max_train_steps", "2", "--lr_warmup_steps", "0", "--ddpm_num_inference_steps", "2"]
    done = python(*words, *train, "--eval_batch_size", "2", "--output_dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["starts"][0]["processes"] == 2
    none = python(*words[:-1], "ddpm_ext.train", "--help")
    assert none.returncode != 0 and "ddpm_ext.train is no command" in none.stderr


def test_launch_files_are_copied_out_and_never_over_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", f"--output_dir={tmp_path}"]) == 0
    files = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
    assert len(files) >= 6
    assert [path.read_bytes() for path in sorted(tmp_path.glob("*.yaml"))] == [path.read_bytes() for path in files]
    (tmp_path / "cpu.yaml").write_text("mine: true")
    assert main(["configs", f"--output_dir={tmp_path}"]) == 1
    assert "cpu.yaml is there and differs" in capsys.readouterr().err
    assert (tmp_path / "cpu.yaml").read_text() == "mine: true"


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ddpm-ext {ddpm_ext.__version__}\n"


# What may be called a model -------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, tiny_unet: UNet2DModel) -> Path:
    """A run folder with a pipeline."""
    folder = tmp_path / "runs" / "mine"
    DDPMExtPipeline(tiny_unet, DDPMExtScheduler()).save_pretrained(str(folder / "pipeline"))
    (folder / "config.json").write_text('{"config": {}}')
    (folder / "status.json").write_text('{"status": "finished"}')
    return folder


def test_a_run_folder_stands_for_its_pipeline(run: Path) -> None:
    assert find_pipeline(run) == find_pipeline(run / "pipeline") == str(run / "pipeline")
    assert run_folder(run) == run_folder(run / "pipeline") == run
    weights = [load_pipeline(name).unet.state_dict() for name in (run, run / "pipeline")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for place in (run, run / "pipeline", run / "pipeline" / "unet", run / "pipeline" / "unet" / "config.json"):
        assert load_network_config(place)["block_out_channels"] == [8, 16]


@pytest.mark.parametrize(
    "name", ["runs/nothing", "./nothing/here", "/nothing", "a/b/c", "nothing", "here/model", "~/x", "a/b/", "../x/y"]
)
def test_what_looks_local_is_answered_without_the_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.socket.connect", None)
    with pytest.raises(UserError, match=f"There is no folder {re.escape(name)}"):
        load_pipeline(name)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_name_of_the_hub_is_left_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_pipeline("google/ddpm-cifar10-32") == "google/ddpm-cifar10-32"
    assert run_folder("google/ddpm-cifar10-32") is None


def broken(run: Path, how: str) -> Path:
    """The pipeline of a run, broken in one way."""
    pipeline = run / "pipeline"
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    if how == "an LFS pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    elif how == "no weights":
        weights.unlink()
    elif how == "cut weights":
        weights.write_bytes(weights.read_bytes()[:100])
    elif how == "no scheduler":
        (pipeline / "scheduler" / "scheduler_config.json").unlink()
    elif how == "no unet":
        (pipeline / "unet" / "config.json").unlink()
    elif how == "broken JSON":
        (pipeline / "scheduler" / "scheduler_config.json").write_text("{")
    elif how == "an index of nothing":
        (pipeline / "model_index.json").write_text("{}")
    elif how == "another model":
        index = json.loads((pipeline / "model_index.json").read_text())
        index["vae"] = index.pop("unet")
        (pipeline / "model_index.json").write_text(json.dumps(index))
    elif how == "a run that is not finished":
        (pipeline / "model_index.json").unlink()
    return run


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("an LFS pointer", "is a pointer of Git LFS"),
        ("no weights", "holds no weights"),
        ("cut weights", "diffusion_pytorch_model.safetensors"),
        ("no scheduler", "scheduler_config.json is missing"),
        ("no unet", "config.json is missing"),
        ("broken JSON", "scheduler_config.json is broken"),
        ("an index of nothing", "names no parts"),
        ("another model", "names vae, scheduler|names scheduler, vae"),
        ("a run that is not finished", "a run without a pipeline"),
    ],
)
def test_a_pipeline_that_is_not_whole_is_a_sentence(how: str, sentence: str, run: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        load_pipeline(broken(run, how))


def test_what_is_beside_a_pipeline_is_named(run: Path) -> None:
    with pytest.raises(UserError, match=f"Give {run / 'pipeline'}"):
        load_pipeline(run / "pipeline" / "unet")
    with pytest.raises(UserError, match="is a file"):
        load_pipeline(run / "pipeline" / "model_index.json")


@pytest.mark.parametrize("name", ["sample", "evaluate", "calibrate", "convert", "demo"])
def test_every_command_that_takes_a_model_answers_alike(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ["--source=diffusers", "--checkpoint=runs/no"] if name == "convert" else ["--model=runs/no"]
    more = ["--cpu"] if name in ("sample", "evaluate", "calibrate") else []
    more += ["--extractor=pixels", "--dataset_name=digits"] if name in ("evaluate", "calibrate") else []
    more += [] if name == "demo" else ["--output_dir=out"]
    assert main([name, *model, *more]) == 1
    assert "error: There is no folder runs/no" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_repository_that_is_not_there_is_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    hub = Hub()
    home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    out = tmp_path / "out"
    done = python("scripts/sample.py", "--cpu", "--model", "alice/none", f"--output_dir={out}", **home)
    assert done.returncode == 1 and done.stderr.startswith("error: alice/none does not exist")
    assert not out.exists()
    train = ["scripts/train.py", "--cpu", "--model_config_name_or_path", "alice/none", f"--output_dir={out}"]
    done = python(*train, **home)
    assert done.returncode == 1 and "error: alice/none does not exist" in done.stderr and "Traceback" not in done.stderr
