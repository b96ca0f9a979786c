"""The README's promises: its Python and its commands run (shrunk, when slow), its links are absolute and there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from documents import ADDRESS, RAW, ROOT, blocks, check_command, commands, subcommand
from PIL import Image

from ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, build_unet

README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = shlex.split(
    "--cpu --unet digits --resolution 8 --max_train_steps 2 --train_batch_size 4 --eval_batch_size 2 "
    "--ddpm_num_inference_steps 2 --checkpointing_steps 1"
)
# Run elsewhere: uploads in test_round_trip, conversions in test_convert, the page in test_demo.
ELSEWHERE = ("push", "convert", "demo")


def digits_pipeline(folder: Path) -> None:
    """An untrained pipeline of the digits' shape where the README's examples look for the trained one."""
    pipeline = DDPMExtPipeline(build_unet("digits"), DDPMExtScheduler(variance_type="fixed_large"))
    pipeline.save_pretrained(folder / "runs" / "digits" / "pipeline")


def test_it_fits_on_150_lines_and_its_links_work_elsewhere() -> None:
    assert len(README.splitlines()) <= 150
    found = re.findall(r"\]\(([^)\s]+)\)", README)
    assert [link for link in found if not link.startswith("https://")] == []
    images = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", README)
    assert images and all(link.startswith(RAW) for link in images)
    assert f'Homepage = "{ADDRESS}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_python_blocks_run_as_one_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    digits_pipeline(tmp_path)
    namespace: dict[str, object] = {}
    found = blocks(README, "python")
    assert len(found) == README.count("```python") >= 3
    for i, block in enumerate(found):
        exec(compile(block, f"README.md, Python block {i + 1}", "exec"), namespace)
    with Image.open(tmp_path / "digit.png") as image:
        assert image.size == (128, 128)


@pytest.mark.parametrize("command", commands(README))
def test_commands_name_what_is_there(command: str) -> None:
    """Make targets, launch files and options of every command exist."""
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for word in words:
        if word.startswith(("scripts/", "accelerate_configs/")):
            assert (ROOT / word).is_file(), word
    assert words[0] in ("make", "pip", "accelerate", "ddpm-ext")
    check_command(command)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Sixteen images of two classes in folders."""
    values = torch.randint(256, (16, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for i, value in enumerate(values):
        path = tmp_path / "my_pictures" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(value.numpy()).save(path)
    return tmp_path / "my_pictures"


def shrunk(command: str, images: Path, out: Path) -> list[str]:
    """The same training on tiny data: two CPU processes for many GPUs, two updates of the digits' network."""
    words = shlex.split(command)
    found = subcommand(command)
    assert found is not None
    arguments = [images.as_posix() if word == "my_pictures" else word for word in found[1]]
    head = [sys.executable]
    if words[0] == "accelerate":
        head += ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--num_processes", "2"]
        head += ["--config_file", (ROOT / "accelerate_configs/cpu.yaml").as_posix()]
        arguments = [word for word in arguments if word not in ("--mixed_precision", "bf16")]
    if "--train_data_dir" not in arguments:
        arguments += ["--train_data_dir", images.as_posix()]
    tiny = [word for word in TINY if word not in ("--unet", "digits")] if "--init_from" in arguments else TINY
    return [*head, "-m", "ddpm_ext", "train", *arguments, *tiny, "--output_dir", out.as_posix()]


def succeed(words: list[str], folder: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def of(names: tuple[str, ...], others: bool = False) -> list[str]:
    """The README's commands of these subcommands, or of all others."""
    found = [(command, subcommand(command)) for command in commands(README)]
    return [command for command, run in found if run is not None and (run[0] in names) is not others]


@pytest.mark.slow
@pytest.mark.parametrize("command", of(("train",)))
def test_training_commands_run(command: str, tmp_path: Path, pictures: Path) -> None:
    digits_pipeline(tmp_path)
    succeed(shrunk(command, pictures, tmp_path / "run"), tmp_path)
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file() is ("--dry_run" not in command)


@pytest.mark.slow
@pytest.mark.parametrize("command", of((*ELSEWHERE, "train"), others=True))
def test_other_commands_run(command: str, tmp_path: Path) -> None:
    """The rest run as they stand, in a folder that holds an untrained runs/digits, with fewer samples and steps."""
    digits_pipeline(tmp_path)
    found = subcommand(command)
    assert found is not None
    name, words = found
    fewer = {"--num_samples": "4" if name == "sample" else "100", "--num_inference_steps": "2"}
    for option, value in fewer.items():
        if option in words:
            words[words.index(option) + 1] = value
    if name in ("evaluate", "calibrate"):
        words += ["--cpu", "--dataset_name", "digits", "--max_bpd_images", "2", "--max_reference_images", "100"]
    if name == "calibrate":
        words += ["--num_images", "2", "--num_inference_steps", "2", "--fid_num_inference_steps", "2"]
    succeed([sys.executable, "-m", "ddpm_ext", name, *words], tmp_path)
