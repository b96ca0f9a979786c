"""Ctrl-C in a real terminal: the first press stops with everything kept, the second ends at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Hub
from hub_worker import environment, fixture_client, fixture_hub, fixture_run, tree  # noqa: F401
from networks import tiny_unet
from other_networks import PyTorchDDPM
from terminal import Terminal
from training import ROOT, TORCHRUN, options, run_here, status

from ddpm_ext.cli.main import main
from ddpm_ext.pipelines.ddpm import DDPMExtPipeline
from ddpm_ext.publishing.model_card import MARK
from ddpm_ext.publishing.publisher import publish
from ddpm_ext.schedulers.ddpm import DDPMExtScheduler
from ddpm_ext.signals import INTERRUPTED, PREEMPTED, Stopped

Start = Callable[..., Terminal]
DDPM_EXT = (sys.executable, "-m", "ddpm_ext")
ENDLESS: dict[str, Any] = {"max_train_steps": 100_000, "checkpointing_steps": 100_000, "logging_steps": 5}
TRAIN = (sys.executable, "scripts/train.py")


@pytest.fixture
def in_terminal() -> Iterator[Start]:
    """Start commands in terminals; whatever still runs at the end is killed."""
    started: list[Terminal] = []

    def start(words: Sequence[str], **environment: str) -> Terminal:
        started.append(Terminal(words, **environment))
        return started[-1]

    yield start
    for terminal in started:
        terminal.close()


def logged(folder: Path) -> bool:
    """Return whether the first line of the log is there."""
    return (folder / "log.jsonl").exists() and bool((folder / "log.jsonl").read_text())


def test_the_first_press_writes_a_checkpoint_and_the_same_command_continues(in_terminal: Start, tmp_path: Path) -> None:
    terminal = in_terminal([*TRAIN, *options(tmp_path / "run", **ENDLESS)])
    terminal.wait_for(lambda: logged(tmp_path / "run"))
    terminal.press_ctrl_c()
    code, shown = terminal.finish()
    found = status(tmp_path / "run")
    assert code == PREEMPTED and "Traceback" not in shown, shown
    assert "Stopping: a checkpoint is written after this update. Ctrl-C again ends at once." in shown
    assert f"Stopped at update {found['update']} of 100000; the same command continues." in shown
    assert found["status"] == "preempted"
    assert (tmp_path / "run" / "checkpoints" / f"step-{found['update']:08d}").is_dir()
    assert run_here(tmp_path / "run", **{**ENDLESS, "max_train_steps": found["update"] + 1}) == 0


@pytest.mark.slow
def test_the_second_press_ends_at_once_and_says_from_where_the_run_goes_on(in_terminal: Start, tmp_path: Path) -> None:
    # A grid of this length takes minutes, and looks at the stop every ten steps of a batch of 200 only.
    long = {**ENDLESS, "save_images_steps": 5, "ddpm_num_inference_steps": 1000, "eval_batch_size": 4000}
    long |= {"checkpointing_steps": 4, "train_batch_size": 200}
    terminal = in_terminal([*TRAIN, *options(tmp_path / "run", **long)])
    terminal.wait_for(lambda: "samples of update 5" in terminal.read())
    terminal.press_ctrl_c()
    terminal.wait_for(lambda: "Stopping" in terminal.read())
    terminal.press_ctrl_c()
    code, shown = terminal.finish(60)
    assert code == INTERRUPTED and "Traceback" not in shown, shown
    assert status(tmp_path / "run")["status"] == "preempted" and status(tmp_path / "run")["update"] == 4


@pytest.mark.slow
def test_before_the_first_update_it_interrupts_and_leaves_nothing(in_terminal: Start, tmp_path: Path) -> None:
    slow = "import sys, time, ddpm_ext.training.builders as b; b.build_data = lambda *_: print('read') or time.sleep(9)"
    code = f"{slow}\nfrom ddpm_ext.cli.main import main\nsys.exit(main(['train', *sys.argv[1:]]))"
    terminal = in_terminal([sys.executable, "-u", "-c", code, *options(tmp_path / "run")])
    terminal.wait_for(lambda: "read" in terminal.read())
    terminal.press_ctrl_c()
    left, shown = terminal.finish(30)
    assert left == INTERRUPTED and "Traceback" not in shown and "interrupted" in shown, shown
    assert not any((tmp_path / "run").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["make", "torchrun"])
def test_through_make_and_a_launcher(launcher: str, in_terminal: Start, tmp_path: Path) -> None:
    words = options(tmp_path / "run", **ENDLESS, global_batch_size=8)
    if launcher == "make":
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "python").symlink_to(sys.executable)
        recipe = f"train:\n\t{sys.executable} scripts/train.py {' '.join(words)}\n"
        (tmp_path / "Makefile").write_text(recipe)
        terminal = in_terminal(["make", "-C", str(ROOT), "-f", str(tmp_path / "Makefile"), "train"])
    else:
        terminal = in_terminal([*TORCHRUN, "2", "scripts/train.py", *words])
    terminal.wait_for(lambda: logged(tmp_path / "run"))
    terminal.press_ctrl_c()
    code, shown = terminal.finish()
    assert code != 0 and "the same command continues" in shown, shown
    assert status(tmp_path / "run")["status"] == "preempted"


@pytest.mark.parametrize(
    ("interruption", "code", "said"),
    [(Stopped("All is kept."), PREEMPTED, "Stopped. All is kept."), (KeyboardInterrupt(), INTERRUPTED, "interrupted.")],
    ids=["stopped", "interrupted"],
)
def test_an_object_that_was_half_built_when_the_stop_came_shows_no_traceback(
    interruption: KeyboardInterrupt,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Bar:
        """As tqdm, whose end asks for what its start had no time to set."""

        def __init__(self) -> None:
            raise interruption

        def __del__(self) -> None:
            ended.append(self)
            self.pos  # noqa: B018

    ended: list[Bar] = []
    shown: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", shown.append)
    hook = sys.unraisablehook
    monkeypatch.setattr("ddpm_ext.cli.main._command", lambda _: lambda _: Bar())
    assert main(["sample"]) == code and sys.unraisablehook is hook
    told = capsys.readouterr()
    assert told.out.strip() + told.err.strip().removeprefix("error: ") == said
    interruption.__traceback__ = None
    assert len(ended) == 1 and not shown


# Command -> options of a measurement without end, and what its kept pieces are called.
MEASURED = "--dataset_name digits --extractor pixels --metrics fid --num_samples 100000 --batch_size 64"
ENDLESS_COMMANDS = {
    "sample": ("--num_samples 100000 --num_inference_steps 10 --batch_size 4", "*.png"),
    "evaluate": (f"{MEASURED} --num_inference_steps 2", "*_pieces/*/*.safetensors"),
    "calibrate": (f"{MEASURED} --num_inference_steps 2,3 --num_images 32", "*_pieces/*/*.safetensors"),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", ENDLESS_COMMANDS)
def test_a_stop_keeps_whole_pieces_and_the_same_command_goes_on_from_them(
    command: str, in_terminal: Start, tmp_path: Path
) -> None:
    options, pieces = ENDLESS_COMMANDS[command]
    DDPMExtPipeline(tiny_unet(), DDPMExtScheduler()).save_pretrained(tmp_path / "model")
    words = [*DDPM_EXT, command, "--model", str(tmp_path / "model"), "--cpu", *options.split()]
    kept: dict[Path, tuple[int, bytes]] = {}
    for stop in (Terminal.press_ctrl_c, Terminal.terminate):
        terminal, more = in_terminal([*words, "--output_dir", str(tmp_path / "out")]), len(kept) + 1
        terminal.wait_for(lambda count=more: len(list((tmp_path / "out").glob(pieces))) >= count)
        stop(terminal)
        code, shown = terminal.finish(60)
        assert code == PREEMPTED and "Traceback" not in shown, shown
        assert "Stopped. " in shown and shown.rstrip().endswith("; the same command continues."), shown
        found = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "out").glob(pieces)}
        assert kept.items() <= found.items() and len(found) > len(kept)  # none of them is made again
        kept = found
    assert not list((tmp_path / "out").rglob("*.tmp"))


# Commands that have nothing to go on from: what was there stays as it was, and the same command does it all.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_without_checkpoints_is_interrupted_by_either_signal(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(_: list[str]) -> int:
        os.kill(os.getpid(), number)
        return 0

    former = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("ddpm_ext.cli.main._command", lambda _: command)
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores SIGINT
    try:
        assert main(["push"]) == INTERRUPTED and signal.getsignal(signal.SIGTERM) is former
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert capsys.readouterr().err == "error: interrupted.\n"


@pytest.mark.parametrize("card", ["written by hand before", None])
def test_an_interrupted_push_leaves_the_card_as_it_was(
    card: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    DDPMExtPipeline(tiny_unet(), DDPMExtScheduler()).save_pretrained(tmp_path / "pipeline")
    (tmp_path / "config.json").write_text("{}")
    if card is not None:
        (tmp_path / "README.md").write_text(f"{MARK}\n{card}")
    before = tree(tmp_path)

    def interrupted(*_: object, **__: object) -> None:
        assert tree(tmp_path) != before  # the card of today is there
        raise KeyboardInterrupt

    monkeypatch.setattr("ddpm_ext.publishing.publisher.push_to_hub", interrupted)
    monkeypatch.setattr("ddpm_ext.publishing.publisher.full_name", lambda name, *_: name)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, "alice/digits")
    assert tree(tmp_path) == before


STOPS = {"ctrl-c": Terminal.press_ctrl_c, "sigterm": Terminal.terminate}


@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS.keys())
def test_a_stopped_conversion_leaves_the_former_pipeline(
    stop: Callable[[Terminal], None], in_terminal: Start, tmp_path: Path
) -> None:
    torch.save(PyTorchDDPM().state_dict(), tmp_path / "weights.pt")
    DDPMExtPipeline(tiny_unet(), DDPMExtScheduler()).save_pretrained(tmp_path / "out")
    before = tree(tmp_path / "out")
    slow = "import sys, time\nfrom diffusers import UNet2DModel\nsave = UNet2DModel.save_pretrained\n"
    slow += "UNet2DModel.save_pretrained = lambda *a, **k: (save(*a, **k), print('written'), time.sleep(60))\n"
    slow += "from ddpm_ext.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    words = ["convert", "--source", "pytorch-ddpm", "--checkpoint", str(tmp_path / "weights.pt"), "--resolution", "16"]
    words += ["--output_dir", str(tmp_path / "out"), "--prediction_type", "epsilon", "--variance_type", "fixed_large"]
    words += ["--noise_schedule", "linear"]
    terminal = in_terminal([sys.executable, "-u", "-c", slow, *words])
    terminal.wait_for(lambda: "written" in terminal.read())
    stop(terminal)
    code, shown = terminal.finish(30)
    assert code == INTERRUPTED and "Traceback" not in shown, shown
    assert shown.rstrip().endswith("error: interrupted."), shown
    assert tree(tmp_path / "out") == before
    assert main(words) == 0
    assert tree(tmp_path / "out") != before


@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS.keys())
@pytest.mark.parametrize("request_path", ["", "/commit/"], ids=["upload", "commit"])
def test_a_stopped_push_leaves_the_folder_and_the_repository_as_they_were(
    request_path: str, stop: Callable[[Terminal], None], in_terminal: Start, hub: Hub, run: Path, tmp_path: Path
) -> None:
    (run / "README.md").unlink()
    before = tree(run)
    method = "POST" if request_path else "PUT"  # to the storage, whatever its path
    fault = hub.fail(method, request_path, "silence")
    hub_of_tests = {**environment(hub, str(tmp_path)), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "tok-alice"}
    words = [*DDPM_EXT, "push", "--model", str(run), "--hub_model_id", "alice/digits"]
    terminal = in_terminal(words, **hub_of_tests)
    terminal.wait_for(lambda: fault.met)
    stop(terminal)
    code, shown = terminal.finish(60)
    assert code == INTERRUPTED and "Traceback" not in shown, shown
    assert shown.rstrip().endswith("error: interrupted."), shown
    assert tree(run) == before and hub.history("alice/digits") == ["initial commit"]
    again = in_terminal(words, **hub_of_tests)
    code, shown = again.finish(60)
    assert code == 0 and len(hub.history("alice/digits")) == 2, shown
