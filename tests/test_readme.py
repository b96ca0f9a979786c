"""The README's promises: its Python runs, its commands run (shrunk, when slow), its file map is the import order."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_docs import python_blocks
from test_import_order import ORDER

from ddpm_ext import DDPMExtPipeline, DDPMExtScheduler
from ddpm_ext.cli.arguments import parse_train_config
from ddpm_ext.models.unet import build_unet

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
TINY = shlex.split(
    "--cpu --unet digits --resolution 8 --max_train_steps 2 --train_batch_size 4 --eval_batch_size 2 "
    "--ddpm_num_inference_steps 2 --checkpointing_steps 1"
)
# Run elsewhere: trainings above, uploads in test_round_trip, conversions in test_convert.
ELSEWHERE = r"scripts/(train|push_to_hub|convert|benchmark)\.py"
SHELL = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every command of the README's shell blocks, comments dropped, continued lines joined."""
    lines = "\n".join(SHELL.findall(README)).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"\s+#.*", "", line).strip() for line in lines) if line and line[0] != "#"]


def digits_pipeline(folder: Path) -> None:
    """An untrained pipeline of the digits' shape where the README's examples look for the trained one."""
    pipeline = DDPMExtPipeline(build_unet("digits"), DDPMExtScheduler(variance_type="fixed_large"))
    pipeline.save_pretrained(folder / "runs" / "digits" / "pipeline")


def test_python_blocks_run_as_one_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    digits_pipeline(tmp_path)
    namespace: dict[str, object] = {}
    blocks = python_blocks(README)
    assert len(blocks) == README.count("```python") >= 3
    for i, block in enumerate(blocks):
        exec(compile(block, f"README.md, Python block {i + 1}", "exec"), namespace)
    with Image.open(tmp_path / "digit.png") as picture:
        assert picture.size == (128, 128)


@pytest.mark.parametrize("command", commands())
def test_commands_name_what_is_there(command: str):
    """Make targets, scripts, configurations and options of every command exist; training options are parsed whole."""
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    script = next(word for word in words if word.startswith("scripts/"))
    for word in words:
        if word.startswith(("scripts/", "accelerate_configs/")):
            assert (ROOT / word).is_file(), word
    arguments = words[words.index(script) + 1 :]
    if script == "scripts/train.py":
        parse_train_config(arguments)


def shrunk(command: str, pictures: Path, out: Path) -> list[str]:
    """The same command on tiny data: two CPU processes for many GPUs, two updates of the digits' network."""
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.startswith("scripts/"))
    head, arguments = words[:script], words[script + 1 :]
    if head[0] == "accelerate":
        head = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
        head += ["--config_file", "accelerate_configs/cpu.yaml", "--num_processes", "2"]
        arguments = [word for word in arguments if word not in ("--mixed_precision", "bf16")]
    else:
        head[0] = sys.executable
    if words[script] == "scripts/train.py":
        arguments = [pictures.as_posix() if word == "my_pictures" else word for word in arguments]
        if "--train_data_dir" not in arguments:
            arguments += ["--train_data_dir", pictures.as_posix()]
        arguments += [*TINY, "--output_dir", out.as_posix()]
    return [*head, words[script], *arguments]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Sixteen coloured pictures in a folder."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    values = torch.randint(256, (16, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for i, value in enumerate(values):
        Image.fromarray(value.numpy()).save(folder / f"{i}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands() if "scripts/train.py" in c])
def test_training_commands_run(command: str, tmp_path: Path, pictures: Path):
    done = subprocess.run(
        shrunk(command, pictures, tmp_path / "run"), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands() if "scripts/" in c and not re.search(ELSEWHERE, c)])
def test_other_commands_run(command: str, tmp_path: Path):
    """The rest run as they stand, in a folder that holds an untrained runs/digits, with fewer samples and steps."""
    digits_pipeline(tmp_path)
    words = [sys.executable, *shlex.split(command)[1:]]
    words[1] = (ROOT / words[1]).as_posix()
    if "--num_samples" in words:
        words[words.index("--num_samples") + 1] = "100" if "evaluate" in command else "4"
    if "--num_inference_steps" in words:
        words[words.index("--num_inference_steps") + 1] = "2"
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_file_map_is_the_import_order():
    listed = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    there = [name for name in ORDER if name != "__init__" and (ROOT / "ddpm_ext" / f"{name}.py").exists()]
    assert listed == there
