"""What leaves a run while it trains: sample grids, scores, the pipeline, snapshots of averages."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from diffusers import UNet2DModel
from torch import Tensor

from ...distributed import on_main
from ...models.classes import number_of_classes
from ...pipelines.ddpm import DDPMExtPipeline
from ...pipelines.sampling import save_png, shown_grid
from ...pipelines.seeds import sample_images
from ...run_dir import RunDir, read_json, write_json
from ..fine_tune import merged
from ..state.checkpoint import checkpoint_name
from ..state.ema import PowerFunctionEMA, swapped
from ..state.snapshots import write_snapshot
from .monitor import sampling_bar, track_images

if TYPE_CHECKING:
    from ..trainer import Trainer
    from .validation import Validation

__all__ = ["Exporter", "is_better"]


class Exporter:
    """Writes what leaves a run; all of it is of the averaged weights.

    Args:
        trainer: The objects of the run.
        must_stop: Asked now and then whether a stop was asked for, at the same point on every process.
        validation: Measures the scores of --eval_steps; None without it.
    """

    def __init__(self, trainer: Trainer, must_stop: Callable[[], bool], validation: Validation | None = None) -> None:
        self.trainer, self.must_stop, self.validation = trainer, must_stop, validation
        self.run, self.accelerator, self.state = trainer.run, trainer.accelerator, trainer.state

    def draw_grid(self) -> None:
        """Write samples/step-N.png, its images shared among the processes.

        Raises:
            SamplingStopped: a stop was asked for.
        """
        accelerator, config = self.accelerator, self.trainer.config
        with accelerator.split_between_processes(list(range(config.eval_batch_size)), apply_padding=True) as share:
            numbers = cast(list[int], share)
        images = torch.from_numpy(self.sample(numbers)).to(accelerator.device)
        gathered = accelerator.gather((images, torch.tensor(numbers, device=accelerator.device)))
        if accelerator.is_main_process:
            images = _by_number(*cast(tuple[Tensor, Tensor], gathered)).cpu().numpy()
            grid, words = shown_grid(images, self.trainer.network.config, config.rgb_bands)
            save_png(grid, self.run.samples / f"{checkpoint_name(self.state.update)}.png", words)
            track_images(accelerator, grid, self.state.update)

    def sample(self, numbers: list[int], num_inference_steps: int | None = None) -> np.ndarray:
        """Draw images, image i from seed + i; uint8, shape (N, H, W, C).

        Args:
            numbers: Which images.
            num_inference_steps: Denoising steps; None for those of the sample grids.

        Raises:
            SamplingStopped: a stop was asked for.
        """
        config, network = self.trainer.config, self.trainer.network
        steps = num_inference_steps or min(config.ddpm_num_inference_steps, config.ddpm_num_steps)
        pipeline = DDPMExtPipeline(unet=network, scheduler=self.trainer.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        classes = number_of_classes(network.config) if config.class_conditional else None
        calls = steps * -(-len(numbers) // config.train_batch_size)
        shown = self.accelerator.is_main_process and num_inference_steps is None
        with self._averaged_in_place(), sampling_bar(network, calls, self.state.update, shown):
            batches = sample_images(
                pipeline,
                [config.seed + i for i in numbers],
                batch_size=config.train_batch_size,
                num_inference_steps=steps,
                class_labels=[i % classes for i in numbers] if classes else None,
                poll=self.must_stop,
            )
            return np.concatenate(list(batches))

    @contextmanager
    def _averaged_in_place(self) -> Iterator[None]:
        """Inside, the network holds the first average, and is not compiled anew for other numbers of images."""
        with ExitStack() as stack:
            if self.trainer.compiled:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(
                swapped(self.trainer.parameters, self.state.averages[0] if self.state.averages else None)
            )
            yield

    def validate(self) -> None:
        """Measure the weights, log the scores, and keep the weights in best/ if they are the best so far.

        Raises:
            SamplingStopped: a stop was asked for.
        """
        assert self.validation is not None  # with --eval_steps
        update, metric = self.state.update, self.trainer.config.eval_metric
        with self._averaged_in_place():
            scores = self.validation(self.trainer.network, self.trainer.scheduler, self.must_stop)
        record = {f"eval/{name}": value for name, value in scores.items()}
        self.accelerator.log(record, step=update)
        if self.accelerator.is_main_process:
            self.run.append_log({"update": update, **record})
        if on_main(self.accelerator, lambda: is_better(self.run, scores, metric)):
            self.export(self.run.best)
            on_main(self.accelerator, lambda: write_json(self.run.best_record, {"update": update, **scores}))

    def write_snapshots(self) -> None:
        """Write the power-function averages as they stand, from which other widths are reconstructed."""
        for i, average in enumerate(self.state.averages):
            assert isinstance(average, PowerFunctionEMA)
            weights = self.state.averaged(i)
            if self.accelerator.is_main_process:
                write_snapshot(self.run, weights, self.state.update, average.sigma_rel)

    def export(self, folder: Path | None = None) -> None:
        """Write weights and scheduler as a pipeline that this package and stock Diffusers load.

        Args:
            folder: Of the run, replaced as a whole; None for pipeline/.
        """
        weights, trainer = self.state.averaged(), self.trainer

        def write() -> None:
            network = cast(UNet2DModel, UNet2DModel.from_config(trainer.network.config))
            network.load_state_dict(merged(weights))
            _replace(DDPMExtPipeline(unet=network, scheduler=trainer.scheduler), folder or self.run.pipeline)

        on_main(self.accelerator, write)


def _replace(pipeline: DDPMExtPipeline, folder: Path) -> None:
    """Write a pipeline in place of the one in a folder, so that a kill leaves one of the two."""
    temporary, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    for left in (temporary, old):
        shutil.rmtree(left, ignore_errors=True)
    pipeline.save_pretrained(str(temporary))
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def is_better(run: RunDir, scores: dict[str, float], metric: str) -> bool:
    """Return whether a score is below the one in best.json; all metrics here are better when lower.

    Args:
        run: The run folder.
        scores: By name.
        metric: The score that decides.
    """
    path = run.best_record
    return not path.exists() or scores[metric] < read_json(path).get(metric, float("inf"))


def _by_number(images: Tensor, numbers: Tensor) -> Tensor:
    """Return images in the order of their numbers, each once: shares of unequal length were padded with repetitions."""
    ordered = torch.empty_like(images[: int(numbers.max()) + 1])
    ordered[numbers] = images
    return ordered
