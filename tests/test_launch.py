"""Many processes: launchers, signals, kills, sharding. Each test starts a launch of its own, so most are slow."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from pictures import save_pictures
from training import (
    ROOT,
    TINY_UNET,
    TORCHRUN,
    assert_bitwise_equal,
    finish,
    log_without_speed,
    options,
    run_here,
    start,
    status,
    weights,
)

from ddpm_ext.distributed import (
    FSDP_ON_CPU,
    asked_of_accelerate,
    launch_options,
    refuse_idle_precision,
    refuse_idle_sharding,
)
from ddpm_ext.run_dir import RunError
from ddpm_ext.signals import PREEMPTED
from ddpm_ext.training.config import TrainConfig

CONFIGS = ROOT / "accelerate_configs"
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")
ENDLESS = {"max_train_steps": 100_000, "checkpointing_steps": 100_000, "logging_steps": 5}


def begin(folder: Path) -> dict[str, Any]:
    """The last start in config.json."""
    return json.loads((folder / "config.json").read_text())["starts"][-1]


def wait_for_updates(folder: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Until the first log line is there."""
    end = time.monotonic() + seconds
    while not (folder / "log.jsonl").exists() or not (folder / "log.jsonl").read_text():
        if process.poll() is not None or time.monotonic() > end:
            pytest.fail(finish(process)[1])
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """All processes below one, by /proc."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *children(child)]
    return found


def gone(pids: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def goes_on(folder: Path, **changes: Any) -> None:
    """The checkpoint that a signal left lets one process go on for two updates."""
    reached = status(folder)["update"]
    given = {**ENDLESS, "max_train_steps": reached + 2, **changes}
    assert run_here(folder, **given) == 0
    assert status(folder) | {"time": ""} == {
        "status": "finished",
        "update": reached + 2,
        "updates": reached + 2,
        "time": "",
    }


# Worlds ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_shipped_cpu_configuration_starts_two_processes(tmp_path: Path) -> None:
    launcher = [*ACCELERATE, "--config_file", str(CONFIGS / "cpu.yaml")]
    code, output = finish(start(options(tmp_path / "run"), launcher))
    assert code == 0, output
    assert begin(tmp_path / "run")["processes"] == 2


@pytest.mark.slow
def test_a_launch_that_starts_one_process_of_two_is_an_error(tmp_path: Path) -> None:
    launcher = [*ACCELERATE, "--cpu", "--num_processes", "2"]
    code, output = finish(start(options(tmp_path / "run"), launcher))
    assert code != 0 and "was asked for 2 processes and started one" in output, output
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("words", "processes"),
    [
        ("python /usr/bin/accelerate launch --cpu --num_processes 2 train.py", 2),
        ("python -m accelerate.commands.launch --num_processes=4 train.py --cpu", 4),
        ("python -m accelerate.commands.launch --config_file {file} train.py", 3),
        ("python -m accelerate.commands.launch --config_file {file} --num_processes 1 train.py", 1),
        ("python /usr/bin/accelerate launch train.py", 1),
        ("bash job.sh --num_processes 2", 1),
        ("python /usr/bin/accelerate-launch --cpu --num_processes 2 train.py", 2),
        ("python -u -m accelerate.commands.launch --cpu --num_processes 2 train.py", 2),
        ("python -X dev -W ignore -u /usr/bin/accelerate launch --num-processes 2 --cpu train.py", 2),
        ("python -m accelerate.commands.launch train.py --num_processes 2", 1),
        ("accelerate launch --cpu train.py --config_file {file}", 1),
    ],
)
def test_what_accelerate_was_asked_for_stands_in_its_command_line(words: str, processes: int, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text("num_processes: 3\ndistributed_type: MULTI_CPU\n")
    command = words.format(file=tmp_path / "file.yaml").split()
    assert asked_of_accelerate(cast(Any, SimpleNamespace(cmdline=lambda: command))) == processes


@pytest.mark.parametrize(("words", "processes"), [("", 2), ("--cpu ", 1), ("--num_processes 3 ", 3)])
def test_accelerates_default_file_is_read_where_none_is_named(
    words: str, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.commands.config import config_args

    (tmp_path / "default_config.yaml").write_text("num_processes: 2\ndistributed_type: MULTI_CPU\n")
    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "default_config.yaml"))
    command = f"python /usr/bin/accelerate launch {words}train.py".split()
    assert asked_of_accelerate(cast(Any, SimpleNamespace(cmdline=lambda: command))) == processes


@pytest.mark.parametrize(
    ("asked", "given", "refused"), [("bf16", "no", True), ("bf16", "bf16", False), ("no", "bf16", False)]
)
def test_a_precision_for_the_launcher_alone_is_refused(
    asked: str, given: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    config = TrainConfig(max_train_steps=1, mixed_precision=cast(Any, given))
    if refused:
        with pytest.raises(RunError, match="Give --mixed_precision bf16 behind the script's name"):
            refuse_idle_precision(config)
    else:
        refuse_idle_precision(config)


@pytest.mark.parametrize(
    ("environment", "kind", "sentence"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "MULTI_CPU", "it would train whole copies"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP", "give fsdp_version: 2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "NO", "DeepSpeed, which needs a GPU"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "DEEPSPEED", "launch with zero_stage: 2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "MULTI_GPU", "megatron_lm"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "MULTI_GPU", "parallelism_config"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}, "DEEPSPEED", None),
        ({}, "MULTI_CPU", None),
    ],
)
def test_ways_of_cutting_the_network_that_would_not_be_are_refused(
    environment: dict[str, str], kind: str, sentence: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    accelerator = cast(Any, SimpleNamespace(distributed_type=DistributedType(kind), is_fsdp2=False))
    if sentence is None:
        refuse_idle_sharding(accelerator)
        return
    with pytest.raises(RunError, match=sentence):
        refuse_idle_sharding(accelerator)


@pytest.mark.parametrize("asked", ["environment", "command line"])
def test_the_launchers_accumulation_is_obeyed_or_refused(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if asked == "environment":
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    else:  # without DeepSpeed the launcher keeps the number to itself
        command = ["python", "-m", "accelerate.commands.launch", "--gradient_accumulation_steps", "4", "train.py"]
        monkeypatch.setattr("ddpm_ext.distributed._launcher_options", lambda *_: launch_options(command))
    assert run_here(tmp_path / "run", max_train_steps=1, train_batch_size=2) == 0
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["starts"][-1]["accumulation"] == 4 and record["global_batch"] == 8
    for own in (1, 2):
        with pytest.raises(RunError, match=f"gradient_accumulation_steps 4 and the script {own}; drop one"):
            run_here(tmp_path / "other", max_train_steps=1, train_batch_size=2, gradient_accumulation_steps=own)
    assert run_here(tmp_path / "same", max_train_steps=1, train_batch_size=2, gradient_accumulation_steps=4) == 0


@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own doings
def test_a_compiler_of_the_launcher_renames_no_weight_and_either_goes_on_from_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"checkpointing_steps": 2, "max_train_steps": 2}
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    assert run_here(tmp_path / "compiled", **short) == 0
    assert begin(tmp_path / "compiled")["dynamo"] == "eager"
    with pytest.raises(RunError, match="the script --compile, which is inductor"):
        run_here(tmp_path / "both", **short, compile=True)
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    assert run_here(tmp_path / "plain", **short) == 0
    assert weights(tmp_path / "compiled", 2).keys() == weights(tmp_path / "plain", 2).keys()
    for loaded in (DDPMPipeline.from_pretrained(tmp_path / name / "pipeline") for name in ("compiled", "plain")):
        assert not any("_orig_mod" in name for name in loaded.unet.state_dict())
    assert run_here(tmp_path / "compiled", **{**short, "max_train_steps": 4}) == 0  # eager goes on from compiled
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    assert run_here(tmp_path / "plain", **{**short, "max_train_steps": 4}) == 0
    apart = [(weights(tmp_path / "compiled", 4)[n] - w).abs().max() for n, w in weights(tmp_path / "plain", 4).items()]
    assert max(map(float, apart)) < 1e-4  # float32 sums in another order, divided by roots near 0


def test_deepspeed_is_told_its_batch_before_prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unset = {"train_micro_batch_size_per_gpu": "auto"}
    plugin, seen = SimpleNamespace(deepspeed_config=unset, enable_msamp=False), []
    prepare = Accelerator.prepare

    def watched(self: Accelerator, *objects: Any) -> Any:
        seen.append(dict(plugin.deepspeed_config))
        return prepare(self, *objects)

    monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", property(lambda self: plugin))
    monkeypatch.setattr(Accelerator, "prepare", watched)
    assert run_here(tmp_path / "run", max_train_steps=1, gradient_accumulation_steps=2, max_grad_norm="none") == 0
    told = {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 2, "gradient_clipping": 0.0}
    assert seen == [told]


@pytest.mark.slow
def test_two_machines_on_loopback(tmp_path: Path) -> None:
    words = ["--multi_gpu", "--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    words += ["--main_process_port", "29517", "--mixed_precision", "no", "--dynamo_backend", "no"]
    given = options(tmp_path / "run", global_batch_size=8)
    machines = [start(given, [*ACCELERATE, *words, "--machine_rank", str(rank)]) for rank in (0, 1)]
    for machine in machines:
        code, output = finish(machine)
        assert code == 0, output
    assert begin(tmp_path / "run")["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
def test_updates_are_counted_alike_whatever_processes_and_accumulation(accumulation: int, tmp_path: Path) -> None:
    given = {
        "lr_scheduler": "cosine",
        "logging_steps": 1,
        "max_train_steps": 8,
        "gradient_accumulation_steps": accumulation,
    }
    assert run_here(tmp_path / "one", **given, train_batch_size=4) == 0
    code, output = finish(start(options(tmp_path / "two", **given, train_batch_size=2), [*TORCHRUN, "2"]))
    assert code == 0, output
    one, two = log_without_speed(tmp_path / "one"), log_without_speed(tmp_path / "two")
    assert [record["update"] for record in two] == [*range(1, 9)]
    for name in ("update", "images", "learning_rate"):
        assert [record[name] for record in one] == [record[name] for record in two]
    # Float32: the same algorithm, sums in another order.
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5)
    left, right = weights(tmp_path / "one", 8), weights(tmp_path / "two", 8)
    apart = sum(float((left[name] - right[name]).square().sum()) for name in left)
    assert apart**0.5 < 1e-4 * sum(float(tensor.square().sum()) for tensor in left.values()) ** 0.5


@pytest.mark.slow
def test_twenty_launches_of_two_processes_all_end_well(tmp_path: Path) -> None:
    for number in range(20):
        words = options(tmp_path / str(number), max_train_steps=2, eval_batch_size=2, ddpm_num_inference_steps=1)
        code, output = finish(start(words, [*TORCHRUN, "2"]))
        assert code == 0, f"launch {number}:\n{output}"


@pytest.mark.slow
def test_a_stream_of_two_processes_is_that_of_one(tmp_path: Path) -> None:
    given = {
        "train_data_dir": save_pictures(tmp_path / "pictures", 24, (8, 8)),
        "resolution": "8",
        "streaming": True,
        "double": True,
    }
    given |= {"global_batch_size": 8}
    assert run_here(tmp_path / "one", **given) == 0
    code, output = finish(start(options(tmp_path / "two", **given), [*TORCHRUN, "2"]))
    assert code == 0, output
    left, right = weights(tmp_path / "one", 12), weights(tmp_path / "two", 12)
    assert max(float((left[name] - right[name]).abs().max()) for name in left) < 1e-11


# Signals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_to_one_process_ends_it_with_75_and_a_checkpoint(number: signal.Signals, tmp_path: Path) -> None:
    process = start(options(tmp_path / "run", **ENDLESS))
    wait_for_updates(tmp_path / "run", process)
    process.send_signal(number)
    code, output = finish(process, timeout=60)
    assert code == PREEMPTED, output
    assert status(tmp_path / "run")["status"] == "preempted" and "the same command continues" in output
    goes_on(tmp_path / "run")


USR1 = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        ([*TORCHRUN, "2"], signal.SIGTERM),
        ([*TORCHRUN[:-1], *USR1, "--nproc_per_node", "2"], signal.SIGUSR1),
        ([*ACCELERATE, "--config_file", str(CONFIGS / "cpu.yaml")], signal.SIGTERM),
    ],
    ids=["torchrun-TERM", "torchrun-USR1", "accelerate-TERM"],
)
def test_a_signal_to_the_launcher_reaches_the_ranks(
    launcher: list[str], number: signal.Signals, tmp_path: Path
) -> None:
    process = start(options(tmp_path / "run", **ENDLESS, global_batch_size=8), launcher)
    wait_for_updates(tmp_path / "run", process)
    process.send_signal(number)
    code, output = finish(process, timeout=60)
    assert code == 1, output  # a launcher turns every code into 1
    assert status(tmp_path / "run")["status"] == "preempted"
    goes_on(tmp_path / "run", global_batch_size=8)


@pytest.mark.slow
def test_usr1_reaches_the_ranks_of_an_accelerate_launch_that_ignores_it(tmp_path: Path) -> None:
    # As a batch system sends it: to every process of the job. The launcher alone would die of it at once.
    launch = " ".join([*ACCELERATE, "--config_file", str(CONFIGS / "cpu.yaml")])
    launcher = ["bash", "-c", f"trap '' USR1; exec {launch} \"$@\"", "bash"]
    process = start(options(tmp_path / "run", **ENDLESS, global_batch_size=8), launcher)
    wait_for_updates(tmp_path / "run", process)
    for pid in [process.pid, *children(process.pid)]:
        os.kill(pid, signal.SIGUSR1)
    code, output = finish(process, timeout=60)
    assert code == 1, output
    assert status(tmp_path / "run")["status"] == "preempted"
    goes_on(tmp_path / "run", global_batch_size=8)


@pytest.mark.slow
def test_a_checkpoint_of_the_papers_network_is_written_before_the_launcher_kills(tmp_path: Path) -> None:
    """35.7 million weights, their average and Adam's moments: 570 MB, on two ranks, in less than 25 of 30 seconds."""
    paper = {"model_config_name_or_path": None, "unet": "cifar10", "resolution": "32", "train_batch_size": 1}
    given = {**ENDLESS, **paper, "logging_steps": 1, "random_flip": True}
    process = start(options(tmp_path / "run", **given), [*TORCHRUN, "2"])
    wait_for_updates(tmp_path / "run", process)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    while status(tmp_path / "run")["status"] != "preempted":
        assert process.poll() is None and time.monotonic() - asked < 25
        time.sleep(0.05)
    code, output = finish(process, timeout=60)
    assert code == 1, output
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) > 16 * 35_746_307


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_of_them(tmp_path: Path) -> None:
    process = start(options(tmp_path / "run", **ENDLESS), [*TORCHRUN, "2"])
    wait_for_updates(tmp_path / "run", process)
    rank = children(process.pid)[-1]
    os.kill(rank, signal.SIGTERM)
    code, output = finish(process, timeout=60)
    assert code == 1, output
    assert status(tmp_path / "run")["status"] == "preempted"


@pytest.mark.slow
def test_a_signal_while_sampling_is_heard(tmp_path: Path) -> None:
    long = {**ENDLESS, "save_images_steps": 6, "ddpm_num_inference_steps": 1000, "eval_batch_size": 64}
    process = start(options(tmp_path / "run", **long))
    wait_for_updates(tmp_path / "run", process)
    time.sleep(2)  # update 6, where the grid begins, follows update 5 at once
    process.send_signal(signal.SIGTERM)
    code, output = finish(process, timeout=60)
    assert code == PREEMPTED, output
    assert status(tmp_path / "run")["update"] == 6 and not (tmp_path / "run" / "samples").exists()


@pytest.mark.slow
def test_ranks_end_with_a_launcher_that_was_killed(tmp_path: Path) -> None:
    for launcher in ([*TORCHRUN, "2"], [*ACCELERATE, "--num_processes", "1", "--cpu"]):
        folder = tmp_path / str(len(launcher))
        process = start(options(folder, **ENDLESS), launcher, ACCELERATE_USE_CPU="true")
        wait_for_updates(folder, process)
        ranks = children(process.pid)
        process.kill()
        assert gone(ranks, 30), "orphans go on"
        process.communicate()
        assert status(folder)["status"] == "preempted"


@pytest.mark.slow
def test_a_killed_rank_ends_the_launch_and_the_same_command_resumes(tmp_path: Path) -> None:
    given = {**ENDLESS, "checkpointing_steps": 5, "global_batch_size": 8}
    process = start(options(tmp_path / "run", **given), [*TORCHRUN, "2"])
    wait_for_updates(tmp_path / "run", process)
    time.sleep(1)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    killed = time.monotonic()
    code, output = finish(process, timeout=40)
    assert code != 0 and time.monotonic() - killed < 40, output
    process = start(options(tmp_path / "run", **{**given, "max_train_steps": 400}), [*TORCHRUN, "2"])
    code, output = finish(process)
    assert code == 0, output
    assert begin(tmp_path / "run")["update"] > 0 and status(tmp_path / "run")["update"] == 400


@pytest.mark.slow
def test_a_second_writer_is_stopped_while_the_first_goes_on(tmp_path: Path) -> None:
    process = start(options(tmp_path / "run", **ENDLESS))
    wait_for_updates(tmp_path / "run", process)
    for launcher in ([sys.executable], [*TORCHRUN, "2"]):
        code, output = finish(start(options(tmp_path / "run", **ENDLESS), launcher))
        assert code == 1 and output.count("is being written by another run") == 1, output
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == PREEMPTED


# Disk -----------------------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own in memory."""
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[sys.executable], [*TORCHRUN, "2"]], ids=["one", "two"])
def test_a_full_disk_leaves_the_last_checkpoint(launcher: list[str], tmp_path: Path) -> None:
    given = {
        "checkpoints_total_limit": "none",
        "checkpointing_steps": 2,
        "max_train_steps": 400,
        "global_batch_size": 8,
    }
    with small_disk(tmp_path / "disk", "3m"):
        folder = tmp_path / "disk" / "run"
        code, output = finish(start(options(folder, **given), launcher))
        assert code == 1 and "The disk is full: " in output and "bytes and" in output, output
        assert str(folder / "checkpoints" / "step-") in output
        newest = max(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))
        shutil.copytree(folder, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    assert run_here(tmp_path / "run", **{**given, "max_train_steps": newest + 2}) == 0


# Sharding -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fsdp2_trains_resumes_in_a_fresh_process_and_exports_the_same_pipeline(tmp_path: Path) -> None:
    file = tmp_path / "fsdp2.yaml"
    config = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())
    file.write_text(yaml.safe_dump({**config, "num_processes": 2}))
    launcher = [*ACCELERATE, "--config_file", str(file)]
    given = {"global_batch_size": 8, "random_flip": True, "checkpoints_total_limit": "none"}

    def launch(folder: Path, **changes: Any) -> dict[str, Any]:
        code, output = finish(start(options(folder, **given, **changes), launcher, **{FSDP_ON_CPU: "1"}))
        assert code == 0, output
        found = begin(folder)
        assert found["distributed_type"] == "FSDP" and found["sharded"] and found["processes"] == 2
        return found

    launch(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "moved")
    (tmp_path / "moved" / "status.json").unlink()
    assert launch(tmp_path / "moved", resume_from_checkpoint="step-00000004")["update"] == 4
    assert_bitwise_equal(tmp_path / "whole", tmp_path / "moved", 12)

    # The same run without sharding, and the sharded checkpoint going on without it.
    assert run_here(tmp_path / "one", **given) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "unsharded")
    (tmp_path / "unsharded" / "status.json").unlink()
    assert run_here(tmp_path / "unsharded", **given, resume_from_checkpoint="step-00000004") == 0
    for other in ("whole", "unsharded"):
        for stem in ("model", "ema"):
            left, right = weights(tmp_path / "one", 12, stem), weights(tmp_path / other, 12, stem)
            for name in left:
                torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-4)  # 12 float32 Adam steps
    averaged = weights(tmp_path / "whole", 12, "ema")
    unet = DDPMPipeline.from_pretrained(tmp_path / "whole" / "pipeline").unet
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in unet.state_dict().items())


@pytest.mark.slow
def test_a_fine_tune_is_sharded_too(tmp_path: Path) -> None:
    assert run_here(tmp_path / "source", max_train_steps=2) == 0
    given = {"model_config_name_or_path": None, "init_from": tmp_path / "source", "freeze": ["down_blocks.*"]}
    words = options(tmp_path / "run", **given, max_train_steps=2, global_batch_size=8)
    launcher = [*ACCELERATE, "--config_file", str(CONFIGS / "fsdp2.yaml"), "--num_processes", "2"]
    code, output = finish(start(words, launcher, **{FSDP_ON_CPU: "1"}))
    assert code == 0 and begin(tmp_path / "run")["sharded"], output
    there = weights(tmp_path / "source", 2, "ema")
    for name, tensor in weights(tmp_path / "run", 2).items():
        assert torch.equal(tensor, there[name]) == name.startswith("down_blocks."), name


@pytest.mark.slow
@pytest.mark.parametrize("ema", ["constant", "warmup", "power_function"])
def test_a_sharded_fine_tune_of_a_stream_goes_on_bitwise_without_its_source(ema: str, tmp_path: Path) -> None:
    """Two processes of FSDP2: 0 updates give the source; 2 and 2 give what 4 give, and the source is gone between."""
    torch.manual_seed(7)
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    DDPMPipeline(UNet2DModel(**TINY_UNET), scheduler).save_pretrained(tmp_path / "source")  # pyright: ignore[reportArgumentType]
    there = DDPMPipeline.from_pretrained(tmp_path / "source").unet.state_dict()
    given = {"model_config_name_or_path": None, "init_from": tmp_path / "source", "streaming": True, "ema": ema}
    given |= {
        "train_data_dir": save_pictures(tmp_path / "pictures", 24, (8, 8)),
        "resolution": "8",
        "global_batch_size": 8,
    }
    given |= {"checkpointing_steps": 2, "lr_warmup_steps": 0}
    launcher = [*ACCELERATE, "--config_file", str(CONFIGS / "fsdp2.yaml"), "--num_processes", "2"]

    def launch(name: str, **changes: Any) -> Path:
        folder = tmp_path / name
        words = options(folder, **{**given, "max_train_steps": 4, **changes})
        code, output = finish(start(words, launcher, **{FSDP_ON_CPU: "1"}))
        assert code == 0 and begin(folder)["sharded"] and begin(folder)["processes"] == 2, output
        return folder

    exported = DDPMPipeline.from_pretrained(launch("none", max_train_steps=0) / "pipeline").unet.state_dict()
    assert all(torch.equal(tensor, there[name]) for name, tensor in exported.items())
    whole = launch("whole")
    shutil.copytree(whole, tmp_path / "moved")
    (tmp_path / "moved" / "status.json").unlink()
    shutil.rmtree(tmp_path / "source")
    moved = launch("moved", resume_from_checkpoint="step-00000002")
    assert begin(moved)["update"] == 2
    assert_bitwise_equal(whole, moved, 4)
    for name, tensor in weights(whole, 4).items():
        assert not torch.equal(tensor, there[name]), name
    records = [json.loads((folder / "config.json").read_text())["init_from"] for folder in (whole, moved)]
    assert records[0] == records[1] and records[0]["source"] == str(tmp_path / "source")
