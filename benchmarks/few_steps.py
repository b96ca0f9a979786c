"""Fitted solvers beside every stock setting, on one network: tables, plot, grids, and the calibrated pipeline.

python benchmarks/few_steps.py --cpu --model runs/digits/pipeline --dataset_name digits --extractor pixels
python benchmarks/few_steps.py --model runs/cifar10-tiny/pipeline --dataset_name data/cifar10 \
    --extractor models/cifar10-resnet --solver_steps 4,5,6,8,10,20 --batch_size 2000

Writes few_steps.md, few_steps.json, few_steps.png, grid.png and pipeline/ into --output_dir; run again, it goes on.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ddpm_ext.cli.arguments import parse_options
from ddpm_ext.data.dataset import load_images
from ddpm_ext.diffusion.words import LEARNED_VARIANCES
from ddpm_ext.evaluation.bound.denoising_errors import drop_variance_head
from ddpm_ext.evaluation.features.extractors import extract, make_extractor
from ddpm_ext.evaluation.features.metrics import feature_statistics, frechet_distance
from ddpm_ext.evaluation.plots import plot_against_steps
from ddpm_ext.evaluation.samplers import SamplerSetting, make_scheduler
from ddpm_ext.evaluation.sharded import run_shards
from ddpm_ext.evaluation.solvers.few_steps import (
    FewStepScore,
    best_stock,
    compare,
    curves,
    fitted_setting,
    markdown_table,
    reference_setting,
    stock_settings,
)
from ddpm_ext.evaluation.solvers.fit import (
    REFERENCE_WORDS,
    FitOptions,
    FittedNetwork,
    candidate_references,
    fitted_scheduler,
    reference_scheduler,
)
from ddpm_ext.options import option
from ddpm_ext.pipelines.ddpm import DDPMExtPipeline
from ddpm_ext.pipelines.identity import scheduler_options, weights_hash
from ddpm_ext.pipelines.sampling import images_from_seeds, make_grid, save_png
from ddpm_ext.run_dir import environment, write_atomically, write_json

GRID = 16


@dataclass(frozen=True, kw_only=True)
class FewStepsConfig:
    """Options of benchmarks/few_steps.py."""

    model: str = option("runs/digits/pipeline", "Folder or Hub name of a pipeline.")
    dataset_name: str = option("digits", "Images that samples are compared with.")
    split: str = option("train", "Their split.")
    extractor: str = option("pixels", "Extractor of the features.")
    max_reference_images: int | None = option(None, "Only the first so many images; none: all.")
    solver_steps: str = option("3,4,5,6,8,10", "Numbers of calls.")
    num_noises: int = option(256, "Noises that are fitted.")
    num_held_out: int = option(128, "Noises that choose the steps.")
    order: int = option(3, "Estimates that one jump uses.")
    max_rounds: int = option(3, "Rounds of descent over the steps; 0: the best power steps alone.")
    reference_steps: int = option(200, "Calls of a reference.")
    references: str = option("all", "all: fit to every candidate reference; best: to the best alone.")
    spacings: str = option("trailing", "More rows of stock solvers, with these spacings; none for none.")
    num_samples: int = option(2000, "Samples of a set.")
    num_seeds: int = option(3, "Sets of samples of a cell.")
    full_chain: int = option(1, "Seeds of the model's own T-step chain of fixed_small; 0: leave it out.")
    batch_size: int = option(250, "Images in one network call.")
    output_dir: str = option("runs/few_steps", "Folder of the results.")
    cpu: bool = option(False, "Use the CPU even where there is an accelerator.")

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of calls."""
        return tuple(int(word) for word in self.solver_steps.split(","))


class Bench:
    """One network: its fits, its samples, its scores."""

    def __init__(self, config: FewStepsConfig) -> None:
        self.config, self.folder = config, Path(config.output_dir)
        self.accelerator = Accelerator(cpu=config.cpu or not torch.accelerator.is_available())
        self.pipeline = DDPMExtPipeline.from_pretrained(config.model).to(self.accelerator.device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.scheduler = make_scheduler(self.pipeline.scheduler)
        self.unet = self.pipeline.unet.eval()
        learned = self.scheduler.config["variance_type"] in LEARNED_VARIANCES
        self.slim = drop_variance_head(self.unet) if learned else self.unet
        self.key = {"weights": weights_hash(self.unet)}
        unet = self.unet.config
        self.images = load_images(
            config.dataset_name, split=config.split, resolution=unet["sample_size"], channels=unet["in_channels"]
        )
        self.extractor = make_extractor(config.extractor, device=self.accelerator.device)
        self.bar = tqdm(unit="set", disable=not self.accelerator.is_main_process)
        options = FitOptions(
            steps=config.steps,
            num_noises=config.num_noises,
            num_held_out=config.num_held_out,
            order=config.order,
            max_rounds=config.max_rounds,
            reference_steps=config.reference_steps,
            batch_size=config.batch_size,
        )
        self.network = FittedNetwork(
            self.unet, self.scheduler, options, run=self.run, is_main=self.accelerator.is_main_process
        )

    def run(self, label: str, key: dict[str, Any], count: int, shard_size: int, work: Any) -> dict[str, torch.Tensor]:
        """Do work in pieces that go to disk."""
        return run_shards(self.folder / "pieces", label, {**self.key, **key}, count, shard_size, work, self.accelerator)

    def real(self) -> torch.Tensor:
        """Return the features of the images that samples are compared with."""
        count = min(self.config.max_reference_images or len(self.images), len(self.images))
        batches = (
            self.images.batch(list(range(i, min(i + 500, count)))).pixels.to(self.accelerator.device)
            for i in range(0, count, 500)
        )
        return extract(self.extractor, batches).features.cpu()

    def draw(self, scheduler: Any, K: int, seed: int) -> torch.Tensor:
        """Return the features of one set of samples; of every cell the same noises."""
        config = self.config
        numbers = range(seed * config.num_samples, (seed + 1) * config.num_samples)
        learned = scheduler.config.get("variance_type") in LEARNED_VARIANCES
        self.pipeline.register_modules(scheduler=scheduler, unet=self.unet if learned else self.slim)

        def work(piece: range) -> dict[str, torch.Tensor]:
            seeds = [numbers[i] for i in piece]
            batches = images_from_seeds(self.pipeline, seeds, batch_size=config.batch_size, num_inference_steps=K)
            return {"features": extract(self.extractor, batches).features.cpu()}

        key = {"scheduler": scheduler_options(scheduler), "K": K, "seed": seed, "extractor": self.extractor.description}
        self.bar.set_postfix_str(f"{type(scheduler).__name__}, {K} calls", refresh=False)
        found = self.run("features", key, len(numbers), max(500, config.batch_size), work)["features"]
        self.bar.update()
        return found

    def images_of(self, scheduler: Any, K: int) -> Any:
        """Return GRID images of the first seeds, uint8 (GRID, H, W, C)."""
        self.pipeline.register_modules(scheduler=scheduler, unet=self.slim)
        (images,) = images_from_seeds(self.pipeline, range(GRID), batch_size=GRID, num_inference_steps=K)
        return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def main() -> int:
    """Fit, measure, and write the results."""
    config = parse_options(FewStepsConfig, "Fitted solvers beside every stock setting.")
    bench, started = Bench(config), time.perf_counter()
    real = bench.real()
    statistics, calls = feature_statistics(real), len(bench.network.grid)
    kinds = candidate_references(bench.scheduler)
    references: dict[Any, Any] = {kind: reference_scheduler(bench.scheduler, kind, calls) for kind in kinds}
    own = {k: frechet_distance(statistics, feature_statistics(bench.draw(references[k], calls, 0))) for k in kinds}
    best: Any = min(own, key=lambda kind: own[kind])
    fitted, minutes = {}, {}
    for kind in kinds if config.references == "all" else [best]:
        since = time.perf_counter()
        fits = bench.network.fit(kind)
        minutes[kind] = round((time.perf_counter() - since) / 60, 2)
        fitted[kind] = fitted_scheduler(bench.scheduler, kind, fits, bench.network.options)

    plan: list[tuple[str, SamplerSetting, list[int]]] = []
    plan += [("fitted", fitted_setting(kind, made), list(config.steps)) for kind, made in fitted.items()]
    plan += [("reference", reference_setting(kind, references[kind], calls), [calls]) for kind in kinds]
    spacings = [] if config.spacings == "none" else config.spacings.split(",")
    plan += [("stock", setting, list(config.steps)) for setting in stock_settings(spacings)]
    left_out: dict[str, str] = {}
    near = (reference_setting(best, references[best], calls), calls)
    scores = list(compare(bench.draw, statistics, bench.scheduler, plan, config.num_seeds, near, left_out))
    small = make_scheduler(bench.scheduler, "ddpm", "fixed_small")
    if config.full_chain:
        chain = [("chain", SamplerSetting("DDPM, fixed_small", lambda _: small), [len(small)])]
        scores += compare(bench.draw, statistics, bench.scheduler, chain, config.full_chain)
    if bench.accelerator.is_main_process:
        write(bench, config, scores, fitted[best], best, {"left_out": left_out, "fit_minutes": minutes, "own": own})
        print((Path(config.output_dir) / "few_steps.md").read_text())
        print(f"{(time.perf_counter() - started) / 60:.1f} minutes")
    bench.accelerator.wait_for_everyone()
    return 0


def write(
    bench: Bench, config: FewStepsConfig, scores: list[FewStepScore], fitted: Any, best: str, notes: dict[str, Any]
) -> None:
    """Write tables, plot, grids and the pipeline with the fitted scheduler."""
    folder, real = bench.folder, f"{config.dataset_name} {config.split}"
    title = f"Fréchet distance to {real} ({config.extractor}, {config.num_samples:,} samples, {config.num_seeds} seeds)"
    ratios = []
    for K in config.steps:
        stock = best_stock(scores, K)
        ours = next(
            s
            for s in scores
            if s.kind == "fitted" and s.num_inference_steps == K and f"({REFERENCE_WORDS[best]})" in s.sampler
        )
        if stock is not None:
            ratios.append(
                f"| {K} | {ours.value:.4g} | {stock.value:.4g} | {stock.sampler} | {ours.value / stock.value:.2f} |"
            )
    head = "| calls | fitted | best stock | which | ratio |\n| --- | --- | --- | --- | --- |"
    parts = [
        f"{title}:\n\n{markdown_table(scores)}",
        f"Squared distance of the features to the reference ({REFERENCE_WORDS[best]}) from the same noises:\n\n"
        f"{markdown_table(scores, distances=True)}",
        "\n".join([head, *ratios]),
    ]
    write_atomically(folder / "few_steps.md", "\n\n".join(parts) + "\n")
    record = {"config": asdict(config), "environment": environment(), "device": str(bench.accelerator.device), **notes}
    write_json(folder / "few_steps.json", {**record, "reference": best, "scores": [one.to_json() for one in scores]})
    plot_against_steps(curves(scores), "Fréchet distance", folder / "few_steps.png")
    chosen = [K for K in (4, 5, 10) if K in config.steps]
    grids = [make_grid(bench.images_of(fitted, K)) for K in chosen]
    if config.full_chain:
        small = make_scheduler(bench.scheduler, "ddpm", "fixed_small")
        grids.append(make_grid(bench.images_of(small, len(small))))
    if grids:
        gap = torch.full((grids[0].shape[0], 12, grids[0].shape[2]), 255, dtype=torch.uint8).numpy()
        beside = [part for grid in grids for part in (grid, gap)][:-1]
        save_png(torch.cat([torch.from_numpy(part) for part in beside], 1).numpy(), folder / "grid.png")
    bench.pipeline.register_modules(scheduler=fitted, unet=bench.unet)
    bench.pipeline.save_pretrained(folder / "pipeline")


if __name__ == "__main__":
    sys.exit(main())
