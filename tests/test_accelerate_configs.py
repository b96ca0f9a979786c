"""The launch files: each parses to what its name says, and the one for CPUs starts as many processes as it says."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser

FOLDER = Path(__file__).resolve().parent.parent / "accelerate_configs"
NAMES = ("one_gpu", "multi_gpu", "two_machines", "cpu", "fsdp2", "deepspeed_zero2")


def load(name: str) -> ClusterConfig:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    return config


def test_these_files_and_no_others() -> None:
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_comment_is_a_command_that_uses_the_file(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    commands = re.findall(r"^# accelerate launch (.+)$", text, re.MULTILINE)
    assert len(commands) == (2 if name == "two_machines" else 1)
    for command in commands:
        parsed = launch_command_parser().parse_args(command.split())
        assert parsed.config_file == f"accelerate_configs/{name}.yaml"
        assert (parsed.module, parsed.training_script) == (True, "ddpm_ext")
        assert parsed.training_script_args[0] == "train"


@pytest.mark.parametrize("name", NAMES)
def test_the_file_says_what_its_name_says(name: str) -> None:
    config = load(name)
    kinds = {"one_gpu": "NO", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED"}
    assert config.distributed_type == kinds.get(name, "MULTI_GPU")
    assert config.num_machines == (2 if name == "two_machines" else 1)
    assert config.use_cpu == (name == "cpu")
    assert config.mixed_precision == "no"
    assert (config.num_processes > 1) == (name != "one_gpu")


def test_fsdp2_cuts_the_blocks_of_the_network_and_is_version_two() -> None:
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D

    config = load("fsdp2").fsdp_config
    assert config["fsdp_version"] == 2
    wrapped = config["fsdp_transformer_layer_cls_to_wrap"].split(",")
    assert wrapped == [ResnetBlock2D.__name__, Attention.__name__]


def test_deepspeed_reads_its_part() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    from accelerate.utils import DeepSpeedPlugin

    stated = yaml.safe_load((FOLDER / "deepspeed_zero2.yaml").read_text(encoding="utf-8"))["deepspeed_config"]
    plugin = DeepSpeedPlugin(
        zero_stage=stated["zero_stage"],
        gradient_accumulation_steps=stated["gradient_accumulation_steps"],
        gradient_clipping=stated["gradient_clipping"],
        offload_optimizer_device=stated["offload_optimizer_device"],
        offload_param_device=stated["offload_param_device"],
        zero3_init_flag=stated["zero3_init_flag"],
    )
    assert plugin.deepspeed_config["zero_optimization"]["stage"] == 2


@pytest.mark.slow
def test_the_cpu_file_starts_two_processes_that_know_of_each_other(tmp_path: Path) -> None:
    script = tmp_path / "count.py"
    script.write_text(
        "from accelerate import Accelerator\n"
        "a = Accelerator(cpu=True)\n"
        "print(f'process {a.process_index} of {a.num_processes}', flush=True)\n"
        "a.wait_for_everyone()\n"
        "a.end_training()\n"
    )
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(FOLDER / "cpu.yaml"),
        str(script),
    ]
    done = subprocess.run(
        launch, capture_output=True, text=True, timeout=180, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert sorted(re.findall(r"process \d of \d", done.stdout)) == ["process 0 of 2", "process 1 of 2"], done.stderr
