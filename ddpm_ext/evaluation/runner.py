"""One measurement: a model on its device, the images that it is measured on, where pieces go, and the results' record.

What is measured stands elsewhere: the bound in `bound.sets`, generated images in `features.samples`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from ..distributed import check_world
from ..models.classes import number_of_classes
from ..pipelines.identity import network_hash, scheduler_options, weights_hash
from ..pipelines.locate import run_folder
from ..run_dir import environment, read_json
from .config import recorded
from .images import MeasuredImages
from .results import Provenance, Result
from .sharded import Shards

if TYPE_CHECKING:
    from diffusers import UNet2DModel

    from ..pipelines.ddpm import DDPMExtPipeline
    from ..schedulers.contract import Scheduler
    from .config import CalibrateConfig, EvalConfig

__all__ = ["Runner"]


class Runner:
    """One model under measurement.

    Args:
        config: The options.
        pipeline: The model, as they name it.
        folder: Where the pieces of long work go.
    """

    def __init__(self, config: EvalConfig | CalibrateConfig, pipeline: DDPMExtPipeline, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.accelerator = Accelerator(cpu=config.cpu or not torch.accelerator.is_available())
        check_world(self.accelerator)
        self.pipeline = pipeline.to(self.accelerator.device)
        self.unet: UNet2DModel = self.pipeline.unet
        self.scheduler: Scheduler = self.pipeline.scheduler
        self.images = MeasuredImages(config, self.unet)
        self.weights, self.network = weights_hash(self.unet), network_hash(self.unet)
        self.started, self._environment = time.perf_counter(), environment()

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.accelerator.is_main_process

    @property
    def num_classes(self) -> int | None:
        """Classes of a class-conditional network; None for another."""
        return number_of_classes(self.unet.config)

    @contextmanager
    def sampling(self, scheduler: Scheduler, unet: UNet2DModel | None = None) -> Iterator[None]:
        """Let the pipeline sample under a scheduler, and with a network in place of its own, for a while."""
        self.pipeline.register_modules(scheduler=scheduler, unet=unet or self.unet)
        try:
            yield
        finally:
            self.pipeline.register_modules(scheduler=self.scheduler, unet=self.unet)

    def shards(self, scheduler: Scheduler) -> Shards:
        """Return where the pieces of this network under a scheduler go."""
        key = {"weights": self.weights, "network": self.network, "scheduler": scheduler_options(scheduler)}
        return Shards(self.folder, key, self.accelerator)

    def start_clock(self) -> None:
        """Let the wall time of the next results begin now."""
        self.started = time.perf_counter()

    def result(self, metric: str, **of_result: Any) -> Result:
        """Make a result of this model, its wall time since `start_clock`; fields of `Result` by name."""
        made = Provenance(
            **self._environment,
            options=recorded(self.config),
            num_processes=self.accelerator.num_processes,
            device=str(self.accelerator.device),
            wall_time_s=round(time.perf_counter() - self.started, 1),
            date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        of_model = {"model": self.config.model, "weights": self.weights, "network": self.network}
        return Result(metric=metric, **of_model, averaged=self.averaged, **of_result, provenance=made)

    @cached_property
    def averaged(self) -> bool | None:
        """Whether the weights are averages, as the option or the run's record says; None where nothing does."""
        run = run_folder(self.config.model)
        if self.config.averaged is not None or run is None or not (run / "config.json").is_file():
            return self.config.averaged
        return read_json(run / "config.json").get("config", {}).get("use_ema")
