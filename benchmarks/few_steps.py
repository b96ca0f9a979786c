"""Fitted solvers beside every stock setting, on one network: tables, plot, grids, and the calibrated pipeline.

python benchmarks/few_steps.py --cpu --model runs/digits/pipeline --dataset_name digits --extractor pixels
python benchmarks/few_steps.py --model runs/cifar10-tiny/pipeline --dataset_name data/cifar10 \
    --extractor models/cifar10-resnet --solver_steps 4,5,6,8,10,20 --batch_size 2000

Writes few_steps.md, few_steps.json, few_steps.png, grid.png and pipeline/ into --output_dir, anew after every part; run
again, it goes on. The most wanted rows come first: the fit to the best reference and the stock settings, the T-step
chain, the other references, other spacings. On a CUDA device --cuda_graphs replays the network's forward pass, which
takes the launches off a small one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_ext.cli.arguments import parse_options
from ddpm_ext.data.dataset import load_images
from ddpm_ext.diffusion.words import LEARNED_VARIANCES
from ddpm_ext.evaluation.bound.denoising_errors import drop_variance_head
from ddpm_ext.evaluation.features.extractors import extract, make_extractor
from ddpm_ext.evaluation.features.metrics import feature_statistics
from ddpm_ext.evaluation.plots import plot_against_steps
from ddpm_ext.evaluation.report import table
from ddpm_ext.evaluation.samplers import SamplerSetting, ancestral
from ddpm_ext.evaluation.sharded import Shards
from ddpm_ext.evaluation.solvers.few_steps import (
    FewStepScore,
    compare,
    fitted_setting,
    reference_setting,
    score_references,
    stock_settings,
)
from ddpm_ext.evaluation.solvers.fit import (
    REFERENCE_WORDS,
    Candidate,
    FitOptions,
    FittedNetwork,
    best_reference,
    fitted_scheduler,
)
from ddpm_ext.options import option
from ddpm_ext.pipelines.ddpm import DDPMExtPipeline
from ddpm_ext.pipelines.identity import scheduler_options, weights_hash
from ddpm_ext.pipelines.sampling import make_grid, save_png
from ddpm_ext.pipelines.seeds import images_from_seeds
from ddpm_ext.run_dir import environment, write_atomically, write_json
from ddpm_ext.schedulers.solver import DDPMExtSolverScheduler

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
    reference_steps: str = option("20,30,50,100,200", "Calls of the references that may be fitted to.")
    references: str = option("all", "all: fit to the best reference of every kind; best: to the best alone.")
    spacings: str = option("trailing", "More rows of stock solvers, with these spacings; none for none.")
    num_samples: int = option(2000, "Samples of a set.")
    num_seeds: int = option(3, "Sets of samples of a cell.")
    full_chain: int = option(1, "Seeds of the model's own T-step chain of fixed_small; 0: leave it out.")
    batch_size: int = option(250, "Images in one network call.")
    output_dir: str = option("runs/few_steps", "Folder of the results.")
    cuda_graphs: bool = option(False, "Replay the network's forward pass as a CUDA graph, one per shape.")
    cpu: bool = option(False, "Use the CPU even where there is an accelerator.")

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of calls."""
        return tuple(int(word) for word in self.solver_steps.split(","))


class _Graph(NamedTuple):
    """A recorded forward pass: what it reads, how it runs, what it writes."""

    inputs: tuple[Tensor, Tensor, Tensor | None]  # x_t, t, class labels
    graph: torch.cuda.CUDAGraph
    output: Tensor


class GraphedForward:
    """UNet2DModel.forward as a CUDA graph, recorded when a shape first comes and replayed from then on.

    Args:
        unet: The network, on its CUDA device and in eval mode; weights may change in place, nothing else may.
    """

    def __init__(self, unet: UNet2DModel) -> None:
        self.forward, self.graphs = unet.forward, {}

    @torch.no_grad()
    def __call__(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """Return the network's output, in memory of its own."""
        key = (tuple(sample.shape), sample.dtype, class_labels is None)
        if key not in self.graphs:
            self.graphs[key] = self.record(sample, class_labels)
        (x_t, t, labels), graph, output = self.graphs[key]
        x_t.copy_(sample)
        t.copy_(timestep.reshape(())) if isinstance(timestep, Tensor) else t.fill_(timestep)
        if labels is not None and class_labels is not None:
            labels.copy_(class_labels)
        graph.replay()
        return UNet2DOutput(sample=output.clone()) if return_dict else (output.clone(),)

    def record(self, sample: Tensor, class_labels: Tensor | None) -> _Graph:
        """Run the pass a few times on a side stream, as libraries choose their kernels then, and record it."""
        x_t, t = sample.detach().clone(), torch.zeros((), device=sample.device)  # t whole in float32, all T of them
        labels = None if class_labels is None else class_labels.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.forward(x_t, t, class_labels=labels, return_dict=False)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (output,) = self.forward(x_t, t, class_labels=labels, return_dict=False)
        return _Graph((x_t, t, labels), graph, output)


class Bench:
    """One network: its fits, its samples, its scores."""

    def __init__(self, config: FewStepsConfig) -> None:
        self.config, self.folder = config, Path(config.output_dir)
        self.accelerator = Accelerator(cpu=config.cpu or not torch.accelerator.is_available())
        self.pipeline = DDPMExtPipeline.from_pretrained(config.model).to(self.accelerator.device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.scheduler = ancestral(self.pipeline.scheduler)
        self.unet = self.pipeline.unet.eval()
        learned = self.scheduler.config["variance_type"] in LEARNED_VARIANCES
        self.slim = drop_variance_head(self.unet) if learned else self.unet
        self.key = {"weights": weights_hash(self.unet)}
        if config.cuda_graphs:
            for unet in {id(one): one for one in (self.unet, self.slim)}.values():
                unet.forward = GraphedForward(unet)
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
            reference_steps=tuple(map(int, config.reference_steps.split(","))),
            batch_size=config.batch_size,
        )
        self.network = FittedNetwork(
            self.unet, self.scheduler, options, run=self.run, is_main=self.accelerator.is_main_process
        )

    def run(self, label: str, key: dict[str, Any], count: int, shard_size: int, work: Any) -> dict[str, torch.Tensor]:
        """Do work in pieces that go to disk."""
        return Shards(self.folder / "pieces", self.key, self.accelerator).run(label, key, count, shard_size, work)

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
    """Fit, measure, and write the results after every part."""
    config = parse_options(FewStepsConfig, "Fitted solvers beside every stock setting.")
    bench, started = Bench(config), time.perf_counter()
    for text in Comparison(bench).parts():
        if bench.accelerator.is_main_process:
            print(f"{text}: {(time.perf_counter() - started) / 60:.1f} minutes", flush=True)
    if bench.accelerator.is_main_process:
        print((bench.folder / "few_steps.md").read_text())
    bench.accelerator.wait_for_everyone()
    return 0


class Comparison:
    """All rows of a table, the most wanted first."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.config = bench, bench.config
        self.statistics = feature_statistics(bench.real())
        self.own = score_references(bench.network, bench.network.candidates, bench.extractor, self.statistics)
        self.best = best_reference(self.own)
        kinds = dict.fromkeys(candidate.kind for candidate in self.own)
        of_kinds = [{one: score for one, score in self.own.items() if one.kind == kind} for kind in kinds]
        self.others = [one for one in map(best_reference, of_kinds) if one.kind != self.best.kind]
        self.near = (reference_setting(bench.scheduler, self.best), self.best.steps)
        self.fitted: dict[Candidate, DDPMExtSolverScheduler] = {}
        self.scores: list[FewStepScore] = []
        self.minutes: dict[str, float] = {}
        self.left_out: dict[str, str] = {}

    def parts(self) -> Iterator[str]:
        """Measure part after part; yields what has been measured and written."""
        yield f"references {self.named}"
        config = self.config
        self.measure("fitted", [self.fit(self.best)], config.steps)
        yield "fitted"
        self.measure("reference", [self.near[0]], [self.best.steps])
        self.measure("stock", stock_settings(), config.steps)
        yield "stock"
        if config.full_chain:
            self.measure("chain", [SamplerSetting("DDPM, fixed_small", lambda _: self.chain)], [len(self.chain)])
            yield "chain"
        for other in self.others:
            if config.references == "all":
                self.measure("fitted", [self.fit(other)], config.steps)
            self.measure("reference", [reference_setting(self.bench.scheduler, other)], [other.steps])
            yield str(other)
        if config.spacings != "none":
            more = stock_settings(config.spacings.split(","))[len(stock_settings()) :]
            self.measure("stock", more, config.steps)
            yield "spacings"

    @property
    def named(self) -> dict[str, float]:
        """The references' own scores."""
        return {str(candidate): score for candidate, score in self.own.items()}

    def measure(self, kind: str, settings: Sequence[SamplerSetting], steps: Sequence[int]) -> None:
        """Measure rows of one kind, and write everything so far."""
        config, bench = self.config, self.bench
        seeds, near = (config.full_chain, None) if kind == "chain" else (config.num_seeds, self.near)
        plan = [(kind, setting, steps) for setting in settings]
        self.scores += compare(bench.draw, self.statistics, bench.scheduler, plan, seeds, near, self.left_out)
        if bench.accelerator.is_main_process:
            notes = {"left_out": self.left_out, "fit_minutes": self.minutes, "own": self.named}
            write(bench, config, self.in_order(), self.fitted[self.best], self.best, notes)

    def in_order(self) -> list[FewStepScore]:
        """Return the scores with rows of one kind beside each other."""
        return sorted(self.scores, key=lambda score: ("fitted", "reference", "stock", "chain").index(score.kind))

    def fit(self, reference: Candidate) -> SamplerSetting:
        """Fit to one reference, and return the row."""
        since = time.perf_counter()
        fits = self.bench.network.fit(reference)
        self.minutes[str(reference)] = round((time.perf_counter() - since) / 60, 2)
        self.fitted[reference] = fitted_scheduler(self.bench.scheduler, reference, fits, self.bench.network.options)
        return fitted_setting(reference.kind, self.fitted[reference])

    @property
    def chain(self) -> Any:
        """The model's own T-step chain of fixed_small."""
        return ancestral(self.bench.scheduler, "fixed_small")


def write(
    bench: Bench,
    config: FewStepsConfig,
    scores: list[FewStepScore],
    fitted: Any,
    best: Candidate,
    notes: dict[str, Any],
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
            if s.kind == "fitted" and s.num_inference_steps == K and f"({REFERENCE_WORDS[best.kind]})" in s.sampler
        )
        if stock is not None:
            ratios.append(
                f"| {K} | {ours.value:.4g} | {stock.value:.4g} | {stock.sampler} | {ours.value / stock.value:.2f} |"
            )
    head = "| calls | fitted | best stock | which | ratio |\n| --- | --- | --- | --- | --- |"
    parts = [
        f"{title}:\n\n{markdown_table(scores)}",
        f"Squared distance of the features to the reference ({best}) from the same noises:\n\n"
        f"{markdown_table(scores, distances=True)}",
        "\n".join([head, *ratios]),
    ]
    write_atomically(folder / "few_steps.md", "\n\n".join(parts) + "\n")
    record = {"config": asdict(config), "environment": environment(), "device": str(bench.accelerator.device), **notes}
    write_json(
        folder / "few_steps.json", {**record, "reference": best._asdict(), "scores": [one.to_json() for one in scores]}
    )
    plot_against_steps(curves(scores), "Fréchet distance", folder / "few_steps.png")
    chosen = [K for K in (4, 5, 10) if K in config.steps]
    grids = [make_grid(bench.images_of(fitted, K)) for K in chosen]
    if any(score.kind == "chain" for score in scores):
        small = ancestral(bench.scheduler, "fixed_small")
        grids.append(make_grid(bench.images_of(small, len(small))))
    if grids:
        gap = torch.full((grids[0].shape[0], 12, grids[0].shape[2]), 255, dtype=torch.uint8).numpy()
        beside = [part for grid in grids for part in (grid, gap)][:-1]
        save_png(torch.cat([torch.from_numpy(part) for part in beside], 1).numpy(), folder / "grid.png")
    bench.pipeline.register_modules(scheduler=fitted, unet=bench.unet)
    bench.pipeline.save_pretrained(folder / "pipeline")


def best_stock(scores: Sequence[FewStepScore], steps: int) -> FewStepScore | None:
    """Return the best stock setting at a number of calls."""
    found = [score for score in scores if score.kind == "stock" and score.num_inference_steps == steps]
    return min(found, key=lambda score: score.value, default=None)


def markdown_table(scores: Sequence[FewStepScore], *, distances: bool = False) -> str:
    """Return rows of samplers against numbers of calls; the best of a column that several share is bold.

    Args:
        scores: The cells.
        distances: Show squared distances to the reference in place of Fréchet distances.
    """
    cells: dict[tuple[str, int], tuple[float, str]] = {}
    for one in scores:
        value = one.squared_distance if distances else one.value
        if value is not None:
            cells[one.sampler, one.num_inference_steps] = value, f"{value:.3g}" if distances else _words(one)
    steps = sorted({K for _, K in cells})
    columns = {K: [value for (_, other), (value, _) in cells.items() if other == K] for K in steps}
    rows = []
    for name in dict.fromkeys(name for name, _ in cells):
        row = [name]
        for K in steps:
            value, text = cells.get((name, K), (None, ""))
            best = len(columns[K]) > 1 and value == min(columns[K])
            row.append(f"**{text}**" if best else text)
        rows.append(row)
    return table(["sampler", *(f"{K} calls" for K in steps)], rows)


def curves(scores: Sequence[FewStepScore]) -> dict[str, list[tuple[int, float]]]:
    """Return the score against calls of every sampler; references and long chains are level lines."""
    few = sorted({one.num_inference_steps for one in scores if one.kind in ("fitted", "stock")})
    found: dict[str, list[tuple[int, float]]] = {}
    for one in scores:
        level = one.kind in ("reference", "chain")
        found.setdefault(one.sampler, []).extend((K, one.value) for K in (few if level else [one.num_inference_steps]))
    return found


def _words(score: FewStepScore) -> str:
    """Return a distance as it stands in a table, with its deviation over the seeds."""
    digits = 4 if score.value < 1 else 2
    spread = "" if score.std is None else f" ± {score.std:.{digits}f}"
    return f"{score.value:.{digits}f}{spread}"


if __name__ == "__main__":
    sys.exit(main())
