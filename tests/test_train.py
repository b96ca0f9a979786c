"""The loop against one written out by hand, its logs, its bad steps, its data, and what it leaves behind."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import DistributedType
from diffusers import DDPMPipeline, UNet2DModel
from diffusers.optimization import get_scheduler
from pictures import save_pictures
from PIL import Image
from safetensors.torch import load_file
from training import (
    TINY_UNET,
    TORCHRUN,
    finish,
    forget_accelerator,
    log_without_speed,
    options,
    run_here,
    start,
    status,
    stopping_after,
    weights,
)

from ddpm_ext import DDPMExtPipeline, distributed
from ddpm_ext.cli.arguments import parse_train_config
from ddpm_ext.data.dataset import load_images
from ddpm_ext.distributed import check_world, make_accelerator
from ddpm_ext.run_dir import RunDir, RunError
from ddpm_ext.signals import PREEMPTED, report_error
from ddpm_ext.training import builders
from ddpm_ext.training.config import TrainConfig
from ddpm_ext.training.outputs.export import Exporter, _by_number
from ddpm_ext.training.outputs.monitor import Progress, draw_training, last_tenth
from ddpm_ext.training.run import train
from ddpm_ext.training.setup import make_trainer
from ddpm_ext.training.state.meter import Meter
from ddpm_ext.training.state.rng import draw
from ddpm_ext.training.state.saver import Saver
from ddpm_ext.training.trainer import Trainer


def trainer(folder: Path, scaler: Any = None, **changes: Any) -> Trainer:
    forget_accelerator()
    config, run = parse_train_config(options(folder, **changes)), RunDir(folder)
    accelerator = make_accelerator(config, run)
    accelerator.scaler = scaler
    return make_trainer(config, accelerator, run)


# Updates --------------------------------------------------------------------------------------------------------------


def test_updates_are_those_of_a_loop_written_out_by_hand(tmp_path: Path) -> None:
    given = {"double": True, "random_flip": True, "ema_max_decay": 0.9, "adam_weight_decay": 0.01, "max_grad_norm": 0.1}
    ours = trainer(tmp_path / "run", **given, seed=4)
    by_hand = UNet2DModel(**TINY_UNET).double()
    by_hand.load_state_dict(ours.network.state_dict())

    alpha_bar = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-3, weight_decay=0.01)
    digits, average = load_images("digits"), [p.detach().clone() for p in by_hand.parameters()]
    for update in range(6):
        x_0 = digits.at(range(8 * update, 8 * update + 8), seed=4).pixels.double() / 127.5 - 1
        t, flip, eps = (one.cpu() for one in draw(4, update, range(8), (1, 8, 8), 1000, ours.accelerator.device))
        for i in range(8):
            if flip[i]:
                x_0[i] = x_0[i].flip(-1)
        a = alpha_bar[t].reshape(8, 1, 1, 1)
        loss = ((by_hand(a.sqrt() * x_0 + (1 - a).sqrt() * eps.double(), t).sample - eps.double()) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in by_hand.parameters() if p.grad is not None))
        for p in by_hand.parameters():
            assert p.grad is not None
            p.grad *= min(1.0, 0.1 / (norm + 1e-6))
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, update / 4)
        optimizer.step()
        for s, p in zip(average, by_hand.parameters(), strict=True):
            s.copy_(p.detach() if update == 0 else 0.9 * s + 0.1 * p.detach())
        ours.update()
    ours.settle()
    for a, b in zip(ours.parameters, by_hand.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=1e-9)  # float64; Adam divides by roots near 0
    for a, s in zip(ours.state.averages[0].shadow_params, average, strict=True):
        torch.testing.assert_close(a.cpu(), s, rtol=0, atol=1e-9)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_changes_nothing_but_the_order_of_sums(accumulation: int, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "a", double=True, train_batch_size=8)
    for _ in range(3):
        whole.update()
    loss = whole.state.meter.read(whole.accelerator)["loss"]
    parts = trainer(tmp_path / "b", double=True, train_batch_size=8 // accumulation, global_batch_size=8)
    assert parts.plan.accumulation == accumulation
    for _ in range(3):
        parts.update()
    for a, b in zip(whole.parameters, parts.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert parts.state.update == whole.state.update == 3 and parts.position == whole.position == 24
    assert parts.state.meter.read(parts.accelerator)["loss"] == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("fused", [True, False])
def test_every_option_of_the_optimiser_stands_in_its_step(fused: bool) -> None:
    """AdamW, Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2, by hand in float64."""
    given: dict[str, Any] = {"learning_rate": 0.3, "adam_beta1": 0.7, "adam_beta2": 0.8, "adam_epsilon": 0.05}
    config = TrainConfig(max_train_steps=9, **given, adam_weight_decay=0.2, fused_optimizer=fused)
    network = torch.nn.Linear(3, 2).double()
    frozen = network.bias.requires_grad_(False).clone()
    optimizer, theta = builders.build_optimizer(config, network), network.weight.detach().clone()
    m = v = torch.zeros_like(theta)
    for step in (1, 2, 3):
        g = torch.randn_like(theta)
        network.weight.grad = g.clone()
        optimizer.step()
        m, v = 0.7 * m + 0.3 * g, 0.8 * v + 0.2 * g**2
        theta = theta - 0.3 * 0.2 * theta
        theta = theta - 0.3 * (m / (1 - 0.7**step)) / ((v / (1 - 0.8**step)).sqrt() + 0.05)
    torch.testing.assert_close(network.weight.detach(), theta, rtol=1e-12, atol=1e-12)
    assert torch.equal(network.bias, frozen)


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"])
def test_the_learning_rate_is_diffusers_course_of_the_updates(name: Any) -> None:
    config = TrainConfig(max_train_steps=50, lr_scheduler=name, lr_warmup_steps=10, learning_rate=0.3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.3)
    stock = get_scheduler(name, optimizer, num_warmup_steps=10, num_training_steps=50)
    factor = builders.lr_factor(config, 50)
    for update in range(50):
        assert config.learning_rate * factor(update) == pytest.approx(stock.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        stock.step()


def test_constant_warms_up_if_told_to() -> None:
    factor = builders.lr_factor(TrainConfig(max_train_steps=9, lr_warmup_steps=4), 9)
    assert [factor(update) for update in (0, 1, 4, 8)] == [0.0, 0.25, 1.0, 1.0]


# Bad steps ------------------------------------------------------------------------------------------------------------


def poison(ours: Trainer, steps: set[int], value: float) -> None:
    """Make the loss of these steps non-finite."""
    loss = ours.loss

    def poisoned(batch: Any, micro: int) -> torch.Tensor:
        found = loss(batch, micro)
        return found + value if ours.state.step in steps else found

    ours.loss = poisoned  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_step_is_skipped_and_counted(value: float, tmp_path: Path) -> None:
    ours = trainer(tmp_path / "run")
    poison(ours, {2, 3}, value)
    for _ in range(2):
        ours.update()
    before = [p.detach().clone() for p in ours.parameters]
    moments = {key: tensor.clone() for key, tensor in ours.state.optimizer.optimizer.state[ours.parameters[0]].items()}
    for _ in range(2):
        ours.update()
    state = ours.state
    assert (state.update, state.step, state.skipped, state.averages[0].optimization_step) == (2, 4, 2, 2)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters, before, strict=True))
    for key, tensor in ours.state.optimizer.optimizer.state[ours.parameters[0]].items():
        assert torch.equal(tensor, moments[key])
    ours.update()
    assert (ours.state.update, ours.state.step, ours.state.bad_in_a_row) == (3, 5, 0)
    assert math.isfinite(ours.state.meter.read(ours.accelerator)["loss"])


def test_too_many_bad_steps_stop_the_run_with_what_one_must_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Trainer.loss

    def poisoned(self: Trainer, batch: Any, micro: int) -> torch.Tensor:
        return loss(self, batch, micro) * (float("nan") if self.state.step >= 6 else 1)

    monkeypatch.setattr(Trainer, "loss", poisoned)
    with pytest.raises(RunError) as stopped:
        run_here(tmp_path / "run", max_bad_steps=3)
    text = str(stopped.value)
    assert "3 steps in a row had a non-finite loss or gradient, the last at step 9 (update 6, loss nan" in text
    assert "learning rate 0.001" in text and "checkpoints/step-00000004" in text
    assert status(tmp_path / "run")["status"] == "failed" and status(tmp_path / "run")["update"] == 6


@pytest.mark.parametrize("added", [0.0, math.inf])
def test_the_loss_of_a_bad_step_is_the_mean_of_all_its_passes(
    added: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, losses = Trainer.loss, []

    def first_pass_overflows(self: Trainer, batch: Any, micro: int) -> torch.Tensor:
        found = loss(self, batch, micro) + (added if micro == 0 else 0)
        losses.append(float(found.detach()))
        return found

    monkeypatch.setattr(Trainer, "loss", first_pass_overflows)
    monkeypatch.setattr(Trainer, "_clip", lambda _: torch.tensor(math.nan))  # the gradient alone is not finite
    with pytest.raises(RunError) as stopped:
        run_here(tmp_path / "run", max_bad_steps=1, train_batch_size=4, gradient_accumulation_steps=2)
    told = re.search(r"loss (\S+), learning rate", str(stopped.value))
    assert told is not None and len(losses) in (2, 4)  # an accelerator tells how a step ended during the next one
    assert float(told[1]) == pytest.approx(sum(losses[:2]) / 2, rel=1e-6)


# Failures -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 grey pictures of 8x8 in two parquet shards, and one file that is none, row 5 of the second shard."""
    folder, numbers = tmp_path_factory.mktemp("broken"), np.random.default_rng(0)
    for shard in range(2):
        cells: list[dict[str, Any]] = []
        for _ in range(12):
            buffer = io.BytesIO()
            Image.fromarray(numbers.integers(0, 256, (8, 8), dtype=np.uint8)).save(buffer, "png")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        if shard == 1:
            cells[5] = {"bytes": b"no picture", "path": None}
        table = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features({"image": datasets.Image()}))
        table.to_parquet(folder / f"train-{shard:05d}-of-00002.parquet")
    return folder


def test_a_corrupt_picture_of_a_strict_stream_ends_in_a_sentence(broken_pictures: Path, tmp_path: Path) -> None:
    given = {"train_data_dir": broken_pictures, "resolution": "8", "streaming": True, "strict_data": True}
    process = start(options(tmp_path / "run", **given, train_batch_size=2, checkpointing_steps=1))
    code, output = finish(process)
    assert code == 1 and "Traceback" not in output, output
    assert "error: The image" in output.splitlines()[-1] and "cannot be read" in output.splitlines()[-1], output
    found = status(tmp_path / "run")
    assert found["status"] == "failed" and "cannot be read" in found["error"]
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert found["update"] == int(checkpoints[-1].name[5:]) > 0


def test_an_unforeseen_error_keeps_its_traceback_and_is_recorded_at_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Trainer.update

    def failing(self: Trainer) -> None:
        if self.state.update == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        update(self)

    monkeypatch.setattr(Trainer, "update", failing)
    with pytest.raises(torch.OutOfMemoryError):
        run_here(tmp_path / "run")
    assert status(tmp_path / "run") | {"time": ""} == {
        "status": "failed",
        "update": 4,
        "error": "OutOfMemoryError: CUDA out of memory",
        "time": "",
    }


def test_a_refused_option_leaves_the_status_as_it_was(tmp_path: Path) -> None:
    assert run_here(tmp_path / "run", max_train_steps=1) == 0
    before = (tmp_path / "run" / "status.json").read_bytes()
    for changes in ({"seed": 3}, {"train_split": "nowhere"}):
        with pytest.raises(RunError):
            run_here(tmp_path / "run", max_train_steps=2, **changes)
        assert (tmp_path / "run" / "status.json").read_bytes() == before
    with pytest.raises(RunError, match="nowhere"):
        run_here(tmp_path / "fresh", train_split="nowhere")
    assert not any((tmp_path / "fresh").iterdir())


def test_the_process_that_alone_has_met_an_error_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ddpm_ext.signals.exit_process", lambda code, processes: code)
    monkeypatch.setenv("WORLD_SIZE", "2")
    shared, alone = RunError("all know"), RunError("mine")
    alone.alone = True
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert [report_error(shared), report_error(alone)] == [1, 1]
    assert capsys.readouterr().err.splitlines() == ["error: all know", "error: mine", "error of process 1: mine"]


BROKEN = "row 5 of train-00001-of-00002.parquet"


def test_a_corrupt_picture_of_a_stream_is_told_when_met_counted_once_and_written_down(
    broken_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"train_data_dir": broken_pictures, "resolution": "8", "streaming": True, "train_batch_size": 8}
    update = Trainer.update
    monkeypatch.setattr(Trainer, "update", stopping_after(5))
    assert run_here(tmp_path / "run", **given) == PREEMPTED
    monkeypatch.setattr(Trainer, "update", update)
    assert capsys.readouterr().err.count(BROKEN) == 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["skipped_images"] == [BROKEN]
    assert run_here(tmp_path / "run", **given) == 0  # 12 updates of 8: four epochs
    assert BROKEN not in capsys.readouterr().err  # the checkpoint knows it
    assert [record["unreadable_images"] for record in log_without_speed(tmp_path / "run")] == [1, 1, 1, 1]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["skipped_images"] == [BROKEN]


@pytest.mark.slow
def test_corrupt_pictures_of_all_processes_are_counted_together(broken_pictures: Path, tmp_path: Path) -> None:
    given = {"train_data_dir": broken_pictures, "resolution": "8", "streaming": True}
    code, output = finish(start(options(tmp_path / "run", **given, train_batch_size=4), [*TORCHRUN, "2"]))
    assert code == 0 and output.count(BROKEN) == 1, output
    assert log_without_speed(tmp_path / "run")[-1]["unreadable_images"] == 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["skipped_images"] == [BROKEN]


@pytest.mark.slow
def test_a_corrupt_picture_on_one_of_two_processes_is_told_by_it(broken_pictures: Path, tmp_path: Path) -> None:
    given = {"train_data_dir": broken_pictures, "resolution": "8", "streaming": True, "strict_data": True}
    words = options(tmp_path / "run", **given, global_batch_size=4, train_batch_size=2)
    code, output = finish(start(words, [*TORCHRUN, "2"]))
    assert code == 1 and re.search(r"error( of process 1)?: The image .* cannot be read", output), output
    assert status(tmp_path / "run")["status"] == "failed" and "cannot be read" in status(tmp_path / "run")["error"]


# Logs -----------------------------------------------------------------------------------------------------------------


def test_the_meter_means_by_quarter_of_t(tmp_path: Path) -> None:
    accelerator = trainer(tmp_path / "run").accelerator
    meter, t = Meter(torch.device("cpu"), 1000), torch.tensor([0, 249, 250, 499, 500, 999])
    meter.add_losses(torch.tensor([1.0, 2.0, 3.0, float("nan"), 5.0, 6.0]), t)
    meter.add_grad_norm(torch.tensor(4.0))
    meter.add_grad_norm(torch.tensor(2.0))
    expected = {"loss": 17 / 5, "loss_q1": 1.5, "loss_q2": 3.0, "loss_q3": 5.0, "loss_q4": 6.0, "grad_norm": 3.0}
    assert meter.read(accelerator) == pytest.approx(expected)
    assert "loss_q1" not in meter.read(accelerator)  # read empties it, and nothing is not a number


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert run_here(folder, save_images_steps=6, save_model_epochs=1, ema_max_decay=0.5) == 0
    return folder


def test_the_log_holds_every_scalar_by_update(finished: Path) -> None:
    records = log_without_speed(finished)
    assert [record["update"] for record in records] == [3, 6, 9, 12]
    assert [record["images"] for record in records] == [24, 48, 72, 96]
    assert [record["learning_rate"] for record in records] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])
    assert all({"loss", "grad_norm", "skipped"} <= record.keys() and 0.5 < record["loss"] < 1.5 for record in records)


def test_a_checkpoints_state_has_these_fields(finished: Path) -> None:
    state = json.loads((finished / "checkpoints" / "step-00000012" / "state.json").read_text())
    assert sorted(state) == [
        *("averages", "bad_in_a_row", "branch", "config", "data", "epoch", "format", "global_batch", "global_position"),
        *("meter", "network", "numerics", "scaler", "seed", "skipped", "step", "unreadable", "update", "updates"),
        "versions",
    ]
    assert (state["update"], state["epoch"], state["global_batch"], state["global_position"]) == (12, 0, 8, 96)
    assert len(state["data"]["fingerprint"]) == 32 and "torch" in state["versions"]


def test_the_run_folder_is_complete(finished: Path) -> None:
    record = json.loads((finished / "config.json").read_text())
    assert record["config"]["train_batch_size"] == 8 and record["global_batch"] == 8 and record["images"] == 1500
    assert record["network"]["block_out_channels"] == [8, 16] and record["parameters"] > 1000
    (begin,) = record["starts"]
    assert begin["num_threads"] == 1 and begin["processes"] == 1 and "torch" in begin["versions"]
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["step-00000008", "step-00000012"]
    grids = sorted((finished / "samples").iterdir())
    assert [path.name for path in grids] == ["step-00000006.png", "step-00000012.png"]
    with Image.open(grids[-1]) as grid:
        assert grid.size[0] >= 96
    assert status(finished)["status"] == "finished"


def test_the_pipeline_holds_the_averaged_weights_and_loads_with_stock_diffusers(finished: Path) -> None:
    averaged, raw = weights(finished, 12, "ema"), weights(finished, 12)
    assert any(not torch.equal(averaged[name], raw[name]) for name in raw)
    for loader in (DDPMPipeline, DDPMExtPipeline):
        pipeline = loader.from_pretrained(finished / "pipeline")
        assert all(torch.equal(tensor, averaged[name]) for name, tensor in pipeline.unet.state_dict().items())
        assert pipeline.scheduler.config.variance_type == "fixed_large"


def test_sampling_during_the_run_does_not_touch_the_weights(finished: Path, tmp_path: Path) -> None:
    assert run_here(tmp_path / "plain", ema_max_decay=0.5) == 0
    for stem in ("model", "ema"):
        left, right = weights(finished, 12, stem), weights(tmp_path / "plain", 12, stem)
        assert all(torch.equal(left[name], right[name]) for name in left)


class Recorder(GeneralTracker):
    """A tracker that keeps what it is told."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.scalars: list[tuple[int, dict[str, Any]]] = []
        self.pictures: list[tuple[int, tuple[int, ...]]] = []
        self.config: dict[str, Any] = {}

    @property
    def tracker(self) -> Recorder:
        return self

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.scalars.append((step or 0, values))

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.pictures.append((step or 0, values["samples"].shape))


def test_trackers_get_configuration_scalars_and_grids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(distributed, "tracker", lambda report_to: recorder)
    assert run_here(tmp_path / "run", max_train_steps=4, hub_token=None) == 0
    assert recorder.config["train_batch_size"] == 8 and recorder.config["snr_gamma"] == "None"
    assert [step for step, _ in recorder.scalars] == [3, 4]
    assert {"loss", "loss_q4", "learning_rate", "images_per_second"} <= recorder.scalars[0][1].keys()
    ((update, shape),) = recorder.pictures
    assert update == 4 and shape[0] == 1 and shape[-1] == 3  # RGB also for grey pictures, as TensorBoard wants


def test_tensorboard_takes_scalars_grids_and_configuration(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run_here(tmp_path / "run", max_train_steps=4, report_to="tensorboard") == 0
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "ddpm-ext")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [3, 4]
    assert len(events.Images("samples")) == 1


def test_weights_and_biases_takes_scalars_grids_and_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    assert run_here(tmp_path / "run", max_train_steps=4, report_to="wandb") == 0
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (grid,) = (folder / "files" / "media" / "images").glob("samples_*.png")
    with Image.open(grid) as picture:
        assert picture.mode == "RGB"
    (record,) = folder.glob("*.wandb")  # protocol buffers: keys and values stand in them as text
    text = record.read_bytes()
    for word in (b"learning_rate", b"loss_q4", b"images_per_second", b"ema_max_decay", b"samples"):
        assert word in text


def test_trackio_takes_scalars_grids_and_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    assert run_here(tmp_path / "run", max_train_steps=4, report_to="trackio") == 0
    (name,) = SQLiteStorage.get_runs("ddpm-ext")
    logs = SQLiteStorage.get_logs("ddpm-ext", name)
    assert [record["step"] for record in logs if "loss" in record] == [3, 4]
    assert any("samples" in record for record in logs)
    assert SQLiteStorage.get_run_config("ddpm-ext", name)["train_batch_size"] == 8


def test_the_plot_has_titles_units_ranges_of_t_and_the_mean_of_the_last_tenth(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    drawn: list[Any] = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    assert draw_training(RunDir(finished)) and (finished / "training.png").read_bytes().startswith(b"\x89PNG")
    whole, quarters, rate = drawn[0].axes
    records = log_without_speed(finished)
    for axis, names in ((whole, ["loss"]), (quarters, [f"loss_q{q}" for q in (1, 2, 3, 4)]), (rate, ["learning_rate"])):
        for line, name in zip(axis.get_lines(), names, strict=True):
            points = [(record["update"], record[name]) for record in records if name in record]
            assert line.get_xydata().tolist() == [list(point) for point in points]
    assert all(axis.get_title() and axis.get_xlabel() and axis.get_ylabel() for axis in drawn[0].axes)
    words = [text.get_text() for text in quarters.get_legend().get_texts()]
    assert words == ["t = 0 … 249", "t = 250 … 499", "t = 500 … 749", "t = 750 … 999"]
    lines = [{"update": update, "loss": float(update)} for update in (10, 90, 91, 100)]
    assert last_tenth(lines) == (90, 95.5)
    mean = last_tenth(log_without_speed(finished))[1]
    assert f"last tenth: {mean:.4f}" in [text.get_text() for text in whole.get_legend().get_texts()]


def test_the_plots_ranges_of_t_are_those_that_the_meter_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10 steps a quarter is 2.5: t belongs to the first whose end lies above it."""
    figures = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    drawn, run = [], RunDir(tmp_path)
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    run.config.write_text('{"config": {"ddpm_num_steps": 10}}')
    run.append_log({"update": 1, "loss": 1.0, "learning_rate": 1.0, **{f"loss_q{q}": 1.0 for q in (1, 2, 3, 4)}})
    assert draw_training(run)
    words = [text.get_text() for text in drawn[0].axes[1].get_legend().get_texts()]
    assert words == ["t = 0 … 2", "t = 3 … 4", "t = 5 … 7", "t = 8 … 9"]
    meter = Meter(torch.device("cpu"), 10)
    meter.add_losses(torch.ones(10), torch.arange(10))
    assert meter.sums[1].tolist() == [3, 2, 3, 2]


def test_a_tracker_that_is_not_installed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"--report_to wandb needs the package: pip install 'ddpm-ext\[wandb\]'"):
        distributed.tracker("wandb")


def test_the_progress_line_shows_step_loss_images_per_second_and_time_left(tmp_path: Path) -> None:
    progress = Progress(trainer(tmp_path / "run").accelerator, updates=100, done=40, global_batch=8)
    for _ in range(20):
        progress.advance()
    progress.since -= 2
    rate = progress.images_per_second()
    assert 20 < rate <= 80  # 20 updates of 8 pictures in 2 seconds and a bit, on a machine that may be busy
    assert progress.images_per_second() == 0  # none since the call before
    progress.show({"loss": 0.5, "images_per_second": rate})
    progress.bar.start_t -= 10  # 2 updates a second, so 40 more take 20
    line = str(progress.bar)
    progress.close()
    assert re.search(r" 60/100 \[00:\d\d<00:[2-5]\d, .*step.*, loss=0\.5000, \d\d images/s\]", line), line


def test_a_stop_is_heard_during_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpm_ext.evaluation.features.reference.default_cache", lambda: tmp_path / "references")
    update = Trainer.update
    monkeypatch.setattr(Trainer, "update", stopping_after(3))
    watched = {"eval_steps": 3, "eval_samples": 6, "eval_num_inference_steps": 3, "eval_max_images": 40}
    assert run_here(tmp_path / "run", **watched) == PREEMPTED
    assert not any("eval/fid" in record for record in log_without_speed(tmp_path / "run"))
    assert status(tmp_path / "run")["update"] == 3 and (tmp_path / "run" / "checkpoints" / "step-00000003").exists()
    monkeypatch.setattr(Trainer, "update", update)
    assert run_here(tmp_path / "run", **watched, max_train_steps=6) == 0
    assert [r["update"] for r in log_without_speed(tmp_path / "run") if "eval/fid" in r] == [6]


# Data and networks ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 colour pictures of 10x14 in a folder."""
    return save_pictures(tmp_path_factory.mktemp("data") / "pictures", 24, (10, 14, 3))


def test_a_folder_of_colour_pictures_that_are_not_square(pictures: Path, tmp_path: Path) -> None:
    network = tmp_path / "colour.json"
    network.write_text(json.dumps({**TINY_UNET, "in_channels": 3, "out_channels": 3}))
    given = {"train_data_dir": pictures, "resolution": "8x12", "model_config_name_or_path": network}
    assert run_here(tmp_path / "run", **given, num_epochs=2, max_train_steps=None, train_batch_size=6) == 0
    assert status(tmp_path / "run")["update"] == 8
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000008" / "state.json").read_text())
    assert (state["epoch"], state["global_position"]) == (2, 48)  # of 24 images
    unet = DDPMExtPipeline.from_pretrained(tmp_path / "run" / "pipeline").unet
    assert list(unet.config["sample_size"]) == [8, 12]
    with Image.open(tmp_path / "run" / "samples" / "step-00000008.png") as grid:
        assert grid.mode == "RGB"


def test_a_start_says_what_it_is_small_images_that_are_enlarged_included(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = tmp_path / "colour.json"
    network.write_text(json.dumps({**TINY_UNET, "in_channels": 3, "out_channels": 3}))
    given = {"train_data_dir": pictures, "resolution": "16", "model_config_name_or_path": network, "cpu": True}
    assert run_here(tmp_path / "run", **given, max_train_steps=1) == 0
    told = capsys.readouterr()
    assert "24 images are smaller than 16 x 16 and are enlarged, the smallest from 10 x 14" in told.out + told.err
    for line in (
        r"device      cpu, float32, 1 process of 1 thread",
        r"network     4\d,\d{3} parameters, .*colour.json",
        r"images      24 images of 3 channels, 16 x 16, 8 bits",
        r"batch       8: 1 process, 1 x 8 each",
        r"updates     1, 0.333 epochs",
        r"run folder  .*run, a new run",
    ):
        assert re.search(f"^{line}$", told.out, re.MULTILINE), line
    assert run_here(tmp_path / "run", **given, max_train_steps=2) == 0
    assert "run, continuing from step-00000001 at update 1" in capsys.readouterr().out


def test_a_stream_goes_on_exactly_where_it_was_stopped(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"train_data_dir": pictures, "resolution": "8", "streaming": True, "max_train_steps": 8}
    assert run_here(tmp_path / "whole", **given) == 0
    update = Trainer.update
    monkeypatch.setattr(Trainer, "update", stopping_after(5, signal.SIGUSR1))
    assert run_here(tmp_path / "stopped", **given) == PREEMPTED
    monkeypatch.setattr(Trainer, "update", update)
    assert run_here(tmp_path / "stopped", **given) == 0
    left, right = weights(tmp_path / "whole", 8), weights(tmp_path / "stopped", 8)
    assert all(torch.equal(left[name], right[name]) for name in left)
    with pytest.raises(RunError, match="give --max_train_steps instead"):
        run_here(tmp_path / "epochs", **{**given, "max_train_steps": None, "num_epochs": 2})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train_data_dir": "/nowhere"}, "nowhere"),
        ({"resolution": "7"}, "multiples of 2"),
        ({"class_conditional": True, "train_data_dir": "pictures", "resolution": "8"}, "have no classes"),
        ({"train_data_dir": "pictures", "resolution": "8", "image_column": "photo"}, "photo"),
        ({"global_batch_size": 7, "train_batch_size": 2, "mixed_precision": "fp16"}, "fp16"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_trained_is_said_before_the_first_step(
    changes: dict[str, Any], sentence: str, pictures: Path, tmp_path: Path
) -> None:
    given = {key: str(pictures) if value == "pictures" else value for key, value in changes.items()}
    with pytest.raises(RunError, match=sentence):
        run_here(tmp_path / "run", **given)
    assert not any((tmp_path / "run").iterdir())


def test_several_sizes_are_refused_on_the_command_line_before_the_first_step(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0)
    (tmp_path / "mixed").mkdir()
    for name, width in (("a", 10), ("b", 12)):
        picture = numbers.integers(0, 256, (10, width, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "mixed" / f"{name}.png")
    words = ["--train_data_dir", str(tmp_path / "mixed"), "--output_dir", str(tmp_path / "run"), "--cpu"]
    for more, sentence in (([], "several sizes"), (["--streaming", "--max_train_steps", "1"], "needs a --resolution")):
        config = parse_train_config([*words, *more])
        with pytest.raises(ValueError, match=sentence):
            builders.build_data(config, builders.network_config(config))
    config = parse_train_config([*words, "--resolution", "16"])
    assert builders.build_data(config, builders.network_config(config)).shape == (3, 16, 16)
    for picture in (tmp_path / "mixed").iterdir():
        Image.new("RGB", (12, 10)).save(picture)
    config = parse_train_config(words)  # one size, which is scaled to the default of Diffusers' script
    assert builders.build_data(config, builders.network_config(config)).shape == (3, 64, 64)


def test_without_xformers_its_option_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = parse_train_config(["--enable_xformers_memory_efficient_attention"])
    with pytest.raises(RunError, match="needs xformers, which is not installed"):
        builders.speed_up(config, UNet2DModel(**TINY_UNET))


def test_without_a_network_option_the_network_is_that_of_diffusers_script() -> None:
    config = builders.network_config(parse_train_config(["--dataset_name", "x", "--resolution", "128"]))
    assert tuple(config["block_out_channels"]) == (128, 128, 256, 256, 512, 512)
    assert config["sample_size"] == [128, 128]


def test_learned_variances_double_the_output() -> None:
    words = ["--preset", "cifar10", "--variance_type", "learned_range", "--loss", "hybrid"]
    assert builders.network_config(parse_train_config(words))["out_channels"] == 6


def test_the_power_functions_snapshots_say_what_they_are(tmp_path: Path) -> None:
    from safetensors import safe_open

    assert run_here(tmp_path / "run", ema="power_function", ema_snapshot_steps=5) == 0
    names = sorted(path.name for path in (tmp_path / "run" / "snapshots").iterdir())
    assert names == [f"step-000000{n}-{width}.safetensors" for n in ("05", "10", "12") for width in ("0.05", "0.1")]
    with safe_open(tmp_path / "run" / "snapshots" / names[-1], "pt") as file:
        assert file.metadata() == {"update": "12", "sigma_rel": "0.1"}
    last = load_file(tmp_path / "run" / "snapshots" / names[-2])
    averaged = weights(tmp_path / "run", 12, "ema")
    assert all(torch.equal(last[name], averaged[name]) for name in last)


@pytest.mark.parametrize(("count", "processes"), [(7, 3), (2, 4), (6, 2)])
def test_the_pictures_of_a_grid_lie_in_order_whatever_the_number_of_processes(
    count: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[list[int]] = []
    for rank in range(processes):
        forget_accelerator()
        state = PartialState(cpu=True)
        state.num_processes, state.process_index = processes, rank
        monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.MULTI_CPU)
        with state.split_between_processes(list(range(count)), apply_padding=True) as share:
            shares.append(share)
    forget_accelerator()
    numbers = torch.tensor([number for share in shares for number in share])
    assert len(set(map(len, shares))) == 1
    assert _by_number(numbers[:, None], numbers).flatten().tolist() == list(range(count))


@pytest.mark.slow
def test_a_grid_of_three_processes_is_that_of_one(tmp_path: Path) -> None:
    given = {"max_train_steps": 2, "global_batch_size": 6, "eval_batch_size": 7, "double": True}
    assert run_here(tmp_path / "one", **given) == 0
    code, output = finish(start(options(tmp_path / "three", **given), [*TORCHRUN, "3"]))
    assert code == 0, output
    grids = []
    for name in ("one", "three"):
        with Image.open(tmp_path / name / "samples" / "step-00000002.png") as grid:
            grids.append(np.asarray(grid).astype(int))
    assert np.abs(grids[0] - grids[1]).max() <= 1  # rounding to grey levels


def test_a_tracked_width_is_reconstructed_by_the_script(tmp_path: Path) -> None:
    assert run_here(tmp_path / "run", ema="power_function", ema_snapshot_steps=3) == 0
    words = ["scripts/reconstruct_ema.py", "--run", str(tmp_path / "run"), "--sigma_rel", "0.1"]
    code, output = finish(start(words))
    assert code == 0 and str(tmp_path / "run" / "pipeline-0.1") in output, output
    tracked = weights(tmp_path / "run", 12, "ema-1")
    for name, tensor in DDPMPipeline.from_pretrained(tmp_path / "run" / "pipeline-0.1").unet.state_dict().items():
        torch.testing.assert_close(tensor, tracked[name], rtol=0, atol=1e-5)  # float32 sums of eight snapshots
    code, output = finish(start([*words[:-1], "0.5"]))
    assert code == 2 and "sigma_rel must lie in (0, 0.28), got 0.5" in output and "Traceback" not in output, output


def test_training_from_python_says_where_the_result_lies_and_can_be_called_again(tmp_path: Path) -> None:
    forget_accelerator()
    shown = {**parse_train_config(options(tmp_path / "run")).__dict__, "max_train_steps": 3, "logging_steps": 3}
    result = train(TrainConfig(**shown))
    assert (result.exit_code, result.run_dir, result.update) == (0, tmp_path / "run", 3)
    assert result.pipeline == tmp_path / "run" / "pipeline" and result.loss is not None and 0.5 < result.loss < 1.5
    again = train(TrainConfig(**{**shown, "output_dir": str(tmp_path / "b"), "mixed_precision": "bf16"}))
    assert again.update == 3  # another precision in the same process


# Launching ------------------------------------------------------------------------------------------------------------


def test_a_world_that_is_not_the_one_asked_for_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    accelerator = trainer(tmp_path / "run").accelerator
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="started 2 processes and this one sees 1"):
        check_world(accelerator)


def test_a_dry_run_tells_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here(tmp_path / "run", dry_run=True, price_per_hour=3.5) == 0
    text = capsys.readouterr().out
    for word in (
        "parameters",
        "MiB at the peak",
        "images/s",
        "written and read back",
        "whole run   12 updates, 4 checkpoints",
        "samples     1 grid of 3 images",
        "cost",
    ):
        assert word in text
    assert not any((tmp_path / "run").iterdir())


def test_a_dry_run_that_is_stopped_says_so_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = Exporter.sample

    def stopped(exporter: Exporter, *how: Any) -> np.ndarray:
        signal.raise_signal(signal.SIGTERM)
        return sample(exporter, *how)

    monkeypatch.setattr(Exporter, "sample", stopped)
    assert run_here(tmp_path / "run", dry_run=True) == PREEMPTED
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == "Stopped. A dry run keeps nothing; the same command begins it anew."
    assert not any((tmp_path / "run").iterdir())


def test_a_dry_run_adds_up_updates_checkpoints_and_grids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 updates of 1000 s, 12/4 + 1 checkpoints of 90 s, 2 grids of 120 s: 12,600 s, 3.5 hours."""
    monkeypatch.setattr("ddpm_ext.training.plan.dry_run._seconds_per_update", lambda _: 1000.0)
    monkeypatch.setattr("ddpm_ext.training.plan.dry_run._round_trip", lambda *_: (90.0, 3 * 2**20))
    monkeypatch.setattr("ddpm_ext.training.plan.dry_run._seconds_per_grid", lambda *_: 120.0)
    assert run_here(tmp_path / "run", dry_run=True, price_per_hour=4, save_images_steps=6) == 0
    shown = capsys.readouterr().out
    assert "speed       0.0 images/s, 1000.000 s an update" in shown
    assert "checkpoint  3.0 MiB, written and read back in 90.0 s" in shown
    assert "samples     2 grids of 3 images, 120 s each" in shown
    assert "whole run   12 updates, 4 checkpoints and the grids: 3.50 hours" in shown
    assert "cost        14.00 at 4 an hour" in shown


def test_under_fp16_an_overflow_lowers_the_scale_and_advances_nothing(tmp_path: Path) -> None:
    ours = trainer(tmp_path / "run", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    poison(ours, {1}, float("inf"))
    ours.update()
    before = [p.detach().clone() for p in ours.parameters]
    ours.update()
    assert (ours.state.update, ours.state.averages[0].optimization_step, ours.state.skipped) == (1, 1, 1)
    assert ours.accelerator.scaler is not None and ours.accelerator.scaler.get_scale() == 4.0
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters, before, strict=True))
    ours.update()
    assert ours.state.update == 2


def test_amid_bad_steps_a_resumed_run_knows_their_number_and_the_scale_of_fp16(tmp_path: Path) -> None:
    ours = trainer(tmp_path / "run", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    poison(ours, {1, 2}, float("inf"))
    for _ in range(3):
        ours.update()
    Saver(ours).save()
    resumed = trainer(tmp_path / "run", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    state = resumed.state
    assert (state.update, state.step, state.skipped, state.bad_in_a_row) == (1, 3, 2, 2)
    assert resumed.accelerator.scaler is not None and resumed.accelerator.scaler.get_scale() == 2.0


@pytest.mark.parametrize("switch", ["gradient_checkpointing", "channels_last"])
def test_switches_of_speed_and_memory_give_the_plain_runs_weights(switch: str, tmp_path: Path) -> None:
    dropout = 0.1 if switch == "gradient_checkpointing" else 0.0  # a mask is drawn in the order of memory
    plain = trainer(tmp_path / "plain", double=True, dropout=dropout)
    other = trainer(tmp_path / "other", double=True, dropout=dropout, **{switch: True})
    if switch == "gradient_checkpointing":
        assert other.network.is_gradient_checkpointing
    else:
        assert other.network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    for _ in range(4):
        plain.update()
        other.update()
    for a, b in zip(plain.parameters, other.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)  # float64; Adam divides by roots near 0


@pytest.mark.slow
def test_bf16_learns_like_float32(tmp_path: Path) -> None:
    long = {"max_train_steps": 300, "logging_steps": 1, "train_batch_size": 32, "checkpointing_steps": 1000}
    means = []
    for precision in ("no", "bf16"):
        assert run_here(tmp_path / precision, **long, mixed_precision=precision) == 0
        means.append(np.mean([record["loss"] for record in log_without_speed(tmp_path / precision)][-50:]))
    assert abs(means[1] / means[0] - 1) < 0.02


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own doings
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_learn_what_eager_ones_learn(tmp_path: Path) -> None:
    """Each block is compiled, none falls back to eager code, and the weights differ by float32 rounding alone."""
    eager, compiled = (trainer(tmp_path / str(switch), compile=switch) for switch in (False, True))
    blocks = [
        module for module in compiled.network.modules() if type(module).__name__ in ("ResnetBlock2D", "Attention")
    ]
    assert len(blocks) == 9 and all(block._compiled_call_impl is not None for block in blocks)
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(4):
            eager.update()
            compiled.update()
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4 and not torch._dynamo.utils.counters["graph_break"]
    )
    assert list(compiled.state.averaged()) == list(eager.state.averaged())  # the names of an uncompiled network
    for a, b in zip(eager.parameters, compiled.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)  # Adam's first steps are of 1e-3 whatever the gradient
