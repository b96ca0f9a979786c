"""A whole run: lock the folder, build the trainer, record the start, train, end."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor

from ..distributed import any_process, forget_accelerator, make_accelerator, on_main
from ..publishing.publisher import Publisher
from ..run_dir import RunDir, RunError, environment, read_json, write_json
from ..signals import PREEMPTED, StopRequest, die_with_launcher, exit_process
from .config import BROUGHT, TrainConfig, recorded
from .loop import TrainingLoop
from .outputs.export import Exporter
from .outputs.monitor import start_trackers
from .outputs.upload import finish_upload, make_publisher
from .outputs.validation import make_validation
from .plan.dry_run import dry_run
from .plan.forecast import forecast, forecast_lines
from .plan.summary import describe
from .setup import make_trainer
from .state.checkpoint import list_checkpoints, update_of
from .state.meter import tell_unreadable
from .state.resume import obey_launcher
from .state.saver import Saver
from .trainer import Trainer

__all__ = ["TrainResult", "run_training", "train"]


@dataclass(frozen=True)
class TrainResult:
    """What a run left.

    Attributes:
        exit_code: 0; 1 where the last upload failed; 75 where a stop was asked for, and the same call continues.
        run_dir: The run folder.
        pipeline: The averaged weights, loadable with `from_pretrained`; None before the end of the run.
        update: Optimiser updates done.
        loss: Mean training loss of the last line of the log, or None without one.
    """

    exit_code: int
    run_dir: Path
    pipeline: Path | None
    update: int
    loss: float | None


def train(config: TrainConfig) -> TrainResult:
    """Train from Python: a whole run, or what is left of it.

    Args:
        config: The options, as in `TrainConfig(unet="digits", max_train_steps=100, output_dir="runs/mine")`, or a
            preset's.

    Returns:
        Where the result lies. In one of several processes this function ends the process instead.

    Raises:
        RunError: the run cannot start or resume; the message says why and what to do.
    """
    code, run = run_training(config), RunDir(_folder(config))
    losses = [record["loss"] for record in run.read_log() if "loss" in record]
    update = read_json(run.status)["update"] if run.status.exists() else 0
    return TrainResult(
        exit_code=code,
        run_dir=run.path,
        pipeline=run.pipeline if run.is_finished() else None,
        update=update,
        loss=losses[-1] if losses else None,
    )


def run_training(config: TrainConfig) -> int:
    """Run the command: a whole run, or what is left of it.

    Returns:
        Exit code: 0, 1 when the last upload failed, or 75 when a stop was asked for; the same command continues.

    Raises:
        RunError: the run cannot start or resume; the message says why and what to do.
    """
    if config.forecast is not None:
        print("\n".join(forecast_lines(forecast(config), config.price_per_hour)))
        return 0
    stop = StopRequest()
    die_with_launcher()
    run, loop, alone = RunDir(_folder(config)), None, not AcceleratorState._shared_state
    try:
        accelerator = make_accelerator(config, run)
        config = obey_launcher(config)
        on_main(accelerator, lambda: _open(config, run))
        loop = _make_loop(make_trainer(config, accelerator, run), stop)
        code = dry_run(loop.trainer, loop.saver, loop.exporter) if config.dry_run else _run_to_its_end(loop, stop)
    except Exception as error:
        if loop is not None and loop.started:
            _record_failure(run, loop.state.update, error)
        if not isinstance(error, ValueError):
            raise
        sentence = RunError(str(error))  # options that fit no data or no network, an image that cannot be read
        sentence.alone = loop is not None
        raise sentence from error
    finally:
        run.unlock()
        stop.release()
        if alone and loop is None:
            forget_accelerator()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    exit_process(code, accelerator.num_processes)
    if alone:
        forget_accelerator()  # or the next call could not choose another precision
    return code


def _make_loop(trainer: Trainer, stop: StopRequest) -> TrainingLoop:
    """Put what writes files beside the trainer. Every process must call this."""
    config, accelerator = trainer.config, trainer.accelerator
    validation = make_validation(config, trainer.spec, accelerator) if config.eval_steps else None
    exporter = Exporter(trainer, lambda: any_process(accelerator, bool(stop)), validation)
    return TrainingLoop(trainer, Saver(trainer), exporter)


def _folder(config: TrainConfig) -> str:
    return config.output_dir or "runs/custom"


def _open(config: TrainConfig, run: RunDir) -> None:
    """Lock the folder; decide whether what a run left there, finished or with other options, goes at the start."""
    run.lock()
    if not config.overwrite_output_dir or config.dry_run:
        return
    if run.is_unfinished() and run.was_started_with(_own_options(config)):
        print(
            f"{run.path} holds this very run, not finished: it resumes in spite of --overwrite_output_dir. To start "
            "afresh delete the folder."
        )
    else:
        run.starts_empty = True


def _own_options(config: TrainConfig) -> dict[str, object]:
    """Return the options as config.json has them, without those that --init_from brings along."""
    brought = () if config.init_from is None else BROUGHT
    return {name: value for name, value in recorded(config).items() if name not in brought}


def _run_to_its_end(loop: TrainingLoop, stop: StopRequest) -> int:
    """Record the start, train, upload, and say where the result lies."""
    trainer, run = loop.trainer, loop.run
    update, length, main = loop.state.update, trainer.intervals.length, trainer.accelerator.is_main_process
    publisher = _open_publisher(trainer)
    if update >= length and run.is_finished():
        if main:
            print(f"{run.path} is finished at update {update}: nothing to do.")
        return 0 if publisher is None else finish_upload(publisher)  # but perhaps to upload it
    tell_unreadable(loop.state.unreadable, trainer.data.skipped, trainer.accelerator)
    if main:
        print("\n".join(describe(trainer)))
        if loop.saver.abandoned:
            beyond = ", ".join(path.name for path in loop.saver.abandoned)
            print(f"Resuming from update {update}; the next save deletes what lies beyond it: {beyond}.")
        _record_start(trainer)
        loop.write_status("running")
    loop.started = True
    stop.begin("a checkpoint is written after this update", lambda: _record_end_at_once(trainer))
    start_trackers(trainer.accelerator, recorded(trainer.config))
    code = loop.fit(None if publisher is None else publisher.push)
    if code == PREEMPTED:
        if main:
            print(f"Stopped at update {loop.state.update} of {length}; the same command continues.", flush=True)
        return code
    if publisher is not None:
        code = finish_upload(publisher)
    trainer.accelerator.wait_for_everyone()
    if main:
        print(f"Samples in {run.samples}, the pipeline in {run.pipeline}.")
    return code


def _open_publisher(trainer: Trainer) -> Publisher | None:
    """Open the repository of --push_to_hub, on the main process, which alone uploads."""
    opened: list[Publisher | None] = [None]

    def work() -> None:
        opened[0] = make_publisher(trainer.config, trainer.run, trainer.origin)

    on_main(trainer.accelerator, work)
    return opened[0]


def _record_start(trainer: Trainer) -> None:
    """Write config.json, one entry per start, and a log that ends where this start begins."""
    run, network, found = trainer.run, trainer.network, trainer.resumed_from
    if run.starts_empty:
        run.clear()
    start = {
        "update": trainer.state.update,
        "from": str(found.folder) if found else None,
        "branch": found.branch if found else None,
        "accumulation": trainer.plan.accumulation,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "sharded": any(isinstance(parameter, DTensor) for parameter in trainer.parameters),
        **trainer.numerics,
        **environment(),
    }
    record = {
        "config": recorded(trainer.config),
        "seed": trainer.config.seed,
        "updates": trainer.intervals.length,
        "global_batch": trainer.plan.global_batch,
        "images": trainer.num_images,
        "data_fingerprint": trainer.data.fingerprint,
        "data": trainer.spec.to_dict(),
        "skipped_images": list(trainer.state.unreadable.names),
        "network": dict(network.config),
        "parameters": sum(parameter.numel() for parameter in trainer.parameters),
        **({} if trainer.origin is None else {"init_from": trainer.origin}),
        "starts": [*run.starts(), start],
    }
    write_json(run.config, record)
    run.rewind_log(trainer.state.update)


def _record_end_at_once(trainer: Trainer) -> None:
    """Write status.json at a second Ctrl-C: the same command resumes from the newest checkpoint."""
    if trainer.accelerator.is_main_process:
        trainer.run.write_status("preempted", _last_saved(trainer.run), updates=trainer.intervals.length)


def _last_saved(run: RunDir) -> int:
    """Return the update of the newest checkpoint; 0 without any."""
    return max(map(update_of, list_checkpoints(run.checkpoints)), default=0)


def _record_failure(run: RunDir, update: int, error: Exception) -> None:
    """Write status.json: failed, at the update reached, or after an unforeseen error at the last checkpoint's.

    The first process that fails writes it; the others then fail of its absence.
    """
    expected = isinstance(error, ValueError)
    try:
        if run.status.exists() and read_json(run.status)["status"] == "failed":
            return
        if not expected:
            update = _last_saved(run)
        run.write_status("failed", update, error=str(error) if expected else f"{type(error).__name__}: {error}")
    except (OSError, ValueError) as failure:  # a full disk: the first error is the one to tell
        print(f"{run.status} cannot be written: {failure}", file=sys.stderr)
