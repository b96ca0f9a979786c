"""During training, every --eval_steps updates: a small evaluation of the averaged weights; the best ones are kept.

log.jsonl   a line {"update": ..., "eval/fid": ..., "eval/bits_per_dim": ...}
best/       the pipeline that was best by --eval_metric, and best.json: its update and scores
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from diffusers import UNet2DModel

from ..data.dataset import ImageSet, load_images
from ..evaluation.features import make_extractor
from ..pipelines.ddpm import DDPMExtPipeline
from ..pipelines.sampling import POLL_EVERY, SamplingStopped
from ..run_dir import RunDir, read_json, write_json
from . import builders
from .config import TrainConfig
from .ema import swapped
from .export import write_pipeline
from .resume import on_main
from .small_evaluation import SmallEvaluation


class Watch:
    """The evaluation of one run, a `train.Trainer`. Every process must make it and call it at the same updates."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        config = trainer.config
        self.measure = SmallEvaluation(
            eval_images(config, config.train_split),
            None if config.eval_split is None else eval_images(config, config.eval_split),
            make_extractor(config.eval_extractor, device=trainer.accelerator.device),
            trainer.accelerator,
            num_samples=config.eval_samples,
            num_inference_steps=min(config.eval_num_inference_steps, config.ddpm_num_steps),
            batch_size=config.train_batch_size,
            seed=config.seed,
        )

    def __call__(self) -> dict[str, float]:
        """Measure the averaged weights, log the scores, keep the weights if they are the best so far.

        Raises:
            SamplingStopped: a stop was asked for.
        """
        trainer = self.trainer
        with swapped(trainer.parameters, trainer.averages[0] if trainer.averages else None), self.heard():
            scores = self.measure(trainer.network, trainer.scheduler)
        record = {f"eval/{name}": value for name, value in scores.items()}
        trainer.accelerator.log(record, step=trainer.update_count)
        if trainer.accelerator.is_main_process:
            trainer.run.append_log({"update": trainer.update_count, **record})
        if on_main(trainer.accelerator, lambda: is_better(trainer.run, scores, trainer.config.eval_metric)):
            self.keep(scores)
        return scores

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Look at the stop flag while the network is used, in steps that every process makes."""
        trainer, config, calls = self.trainer, self.trainer.config, 0
        world = trainer.accelerator.num_processes
        # With several processes a look is an all-reduce: only generation surely takes as many calls on each of them.
        batches = -(-(config.eval_samples // world) // config.train_batch_size)
        last = math.inf if world == 1 else batches * self.measure.num_inference_steps

        def look(*_: Any) -> None:
            nonlocal calls
            if calls < last and calls % POLL_EVERY == 0 and trainer.must_stop():
                raise SamplingStopped
            calls += 1

        handle = trainer.network.register_forward_pre_hook(look)
        try:
            yield
        finally:
            handle.remove()

    def keep(self, scores: dict[str, float]) -> None:
        """best/ and best.json; every process must call this."""
        trainer = self.trainer
        weights = trainer.averaged()

        def write() -> None:
            network = cast(UNet2DModel, UNet2DModel.from_config(trainer.network.config))
            network.load_state_dict(weights)
            write_pipeline(trainer.run, DDPMExtPipeline(network, trainer.scheduler), trainer.run.best)
            write_json(trainer.run.best_record, {"update": trainer.update_count, **scores})

        on_main(trainer.accelerator, write)


def is_better(run: RunDir, scores: dict[str, float], metric: str) -> bool:
    """Whether a score is below the one in best.json; all metrics here are better when lower."""
    path = run.best_record
    return not path.exists() or scores[metric] < read_json(path).get(metric, float("inf"))


def eval_images(config: TrainConfig, split: str) -> ImageSet:
    """A split at the network's size, by number also where training streams."""
    arguments = builders.network_config(config)
    size = config.size or arguments["sample_size"]
    return load_images(
        config.dataset_name,
        config.dataset_config_name,
        config.train_data_dir,
        split,
        config.image_column,
        config.label_column,
        resolution=tuple(size) if isinstance(size, list) else size,
        channels=arguments["in_channels"],
        cache_dir=config.cache_dir,
        max_images=config.eval_max_images,
    )
