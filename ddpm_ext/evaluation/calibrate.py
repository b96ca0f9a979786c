"""Pipeline + images -> measured errors and optimal trajectories, stored with its scheduler, and what they gain.

    <output_dir>/pipeline/         the pipeline with the calibrated scheduler; stock Diffusers loads it, too
                 calibration.json  errors with their standard errors, trajectories, every score with what made it
                 calibration.md    the scores as tables
                 plots/            quality against steps, a curve per sampler

One sweep of all steps over training images gives the errors, one over test images gives bits/dim of every variance,
trajectory and number of steps. Long work is done in pieces (`shards`): the same command goes on after a kill.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from accelerate import Accelerator

from ..diffusion.analytic import optimal_trajectories
from ..diffusion.words import LEARNED_VARIANCES, Trajectory
from ..distributed import check_world
from ..hub import upload
from ..run_dir import write_atomically, write_json
from ..schedulers.config import EXTENSION_KEY
from ..schedulers.ddpm import DDPMExtScheduler
from .config import CalibrateConfig
from .denoising_errors import drop_variance_head, mean_error, set_errors
from .evaluate import Session
from .features import make_extractor
from .measure import SetBound, bits_of, sample_features, set_bound, under_fixed_variance
from .metrics import feature_statistics, frechet_distance
from .plots import figure_class, plot_against_steps
from .reference import make_reference
from .report import data_words, table
from .samplers import chain_conditions, make_scheduler

DIGITS = 8  # significant digits of the stored errors: far below their standard errors
TITLES = {"bpd": "bits/dim", "fid": "Fréchet distance"}


class Way(NamedTuple):
    """One way to sample from a network."""

    variance_type: str
    trajectory: Trajectory
    eta: float = 1.0

    @property
    def words(self) -> str:
        """Its name in tables and plots."""
        return f"{self.variance_type}, {self.trajectory}" + ("" if self.eta == 1 else f", η = {self.eta:g}")


class Calibration(NamedTuple):
    """What is stored with the scheduler."""

    mse_eps: list[float]  # T numbers
    ms_eps: list[float]
    standard_error: list[float]  # of mse_eps
    standard_error_ms_eps: list[float]  # for the record only
    trajectories: dict[str, list[int]]  # K -> ascending code indices

    def fields(self, way: Way) -> dict[str, Any]:
        """The scheduler's `_ddpm_ext` for one way of sampling."""
        fields = self._asdict()
        del fields["standard_error_ms_eps"]
        return {**fields, "trajectory": way.trajectory, "eta": way.eta}


def calibrate(config: CalibrateConfig) -> dict[str, Any]:
    """Measure, store and judge; returns what calibration.json holds."""
    if config.plots:
        figure_class()  # says what is missing before anything is measured
    accelerator = Accelerator(cpu=config.cpu or not torch.accelerator.is_available())
    check_world(accelerator)
    work = Work(config, accelerator)
    found = work.measure()
    if accelerator.is_main_process:
        work.save(found)
    figures = list(work.bits(found)) if "bpd" in config.scores else []
    figures += list(work.frechet(found)) if "fid" in config.scores else []
    record = {"format": 1, **work.conditions, **found._asdict(), "figures": figures}
    if accelerator.is_main_process:
        config.folder.mkdir(parents=True, exist_ok=True)
        write_json(config.folder / "calibration.json", record)
        write_atomically(config.folder / "calibration.md", markdown(figures))
        if config.plots:
            draw(figures, config.folder / "plots")
        if config.hub_model_id is not None:
            options = {"private": config.hub_private_repo, "token": config.hub_token}
            upload.push_to_hub(config.folder / "pipeline", config.hub_model_id, **options)
    accelerator.wait_for_everyone()
    return record


class Work:
    """One calibration: its model and its images."""

    def __init__(self, config: CalibrateConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.session = Session(config.of_evaluation(), accelerator)
        self.scheduler: DDPMExtScheduler = make_scheduler(self.session.scheduler)
        T = len(self.scheduler)
        wrong = [K for K in [*config.steps, *config.fid_steps] if not 2 <= K <= T]
        if wrong:
            raise ValueError(f"num_inference_steps must lie in 2..{T}, the steps of this model, got {wrong[0]}.")
        self.own_variance = self.scheduler.config["variance_type"].removesuffix("_log")
        self.loaded = chain_conditions(self.scheduler)
        self.unet = self.session.pipeline.unet
        self.learned = self.own_variance in LEARNED_VARIANCES
        self.slim = drop_variance_head(self.unet) if self.learned else self.unet
        self.training = self.session.images(config.split)
        self.pieces = config.folder / "calibration_pieces"
        self.conditions: dict[str, Any] = {}

    # -- measuring --------------------------------------------------------------------------------------------------

    def measure(self) -> Calibration:
        """The errors of the network on training images, and the trajectories that follow from them."""
        config, count = self.config, min(self.config.num_images, len(self.training))
        started = time.perf_counter()
        errors = set_errors(
            self.unet,
            self.scheduler,
            self.training,
            num_images=count,
            seed=config.seed,
            batch_size=None,
            folder=self.pieces,
            key=self.session.key(self.scheduler),
            accelerator=self.accelerator,
        )
        mse, ms = mean_error(errors.mse_eps), mean_error(errors.ms_eps)
        rounded = [[float(f"{value:.{DIGITS}g}") for value in part.tolist()] for part in (*mse, *ms)]
        mse_eps = torch.tensor(rounded[0], dtype=torch.float64)
        paths = optimal_trajectories(self.scheduler.tables, mse_eps, config.steps) if config.steps else {}
        stored = {str(K): path for K, path in paths.items() if K < len(self.scheduler)}
        dataset = self.session.dataset(self.training, config.split, count)
        self.conditions = self.figure("errors", started, dataset=dataset, seed=config.seed)
        return Calibration(rounded[0], rounded[2], rounded[1], rounded[3], stored)

    def scheduler_of(self, found: Calibration, way: Way) -> DDPMExtScheduler:
        """The model's scheduler, calibrated, sampling one way."""
        made = DDPMExtScheduler.from_config(self.scheduler.config, variance_type=way.variance_type)
        made.register_to_config(**{EXTENSION_KEY: found.fields(way)})
        return made

    def scheduler_at(self, found: Calibration, way: Way, K: int) -> DDPMExtScheduler:
        """The scheduler of a way; as loaded where all T steps make it the same chain, so that none is run twice."""
        whole = K == len(self.scheduler) and way.eta == self.loaded["eta"] == 1
        same = whole and way.variance_type == self.own_variance != "analytic"
        return self.scheduler if same else self.scheduler_of(found, way)

    @property
    def calibrated(self) -> Way:
        """How the stored scheduler samples: with its learned variance, or the optimal one."""
        return Way(self.own_variance if self.learned else "analytic", self.config.trajectory)

    def save(self, found: Calibration) -> None:
        """The pipeline beside the calibrated scheduler."""
        pipeline = self.session.pipeline
        pipeline.register_modules(scheduler=self.scheduler_of(found, self.calibrated))
        pipeline.save_pretrained(self.config.folder / "pipeline")
        pipeline.register_modules(scheduler=self.session.scheduler)

    # -- judging ----------------------------------------------------------------------------------------------------

    def bits(self, found: Calibration) -> Iterator[dict[str, Any]]:
        """Bits/dim of test images for every variance, trajectory and number of steps.

        One sweep serves all variances that are one number per step; a learned one is swept on each chain.
        """
        test = self.session.images(self.config.test_split)
        count = min(self.config.max_bpd_images or len(test), len(test))
        conditions = {"dataset": self.session.dataset(test, self.config.test_split, count), "seed": self.config.seed}
        started = time.perf_counter()
        plain = make_scheduler(self.scheduler, variance_type="fixed_small")
        plain.register_to_config(**{EXTENSION_KEY: {}})
        swept = self.bound(self.slim, plain, None, test, count)
        if self.loaded["eta"] == 1:  # the bound is DDPM's
            for K in self.config.steps:
                score = bits_of(self.bound_as_loaded(swept, K, test, count))
                yield self.figure("bpd", started, **score, **self.of_loaded(K), **conditions)
                started = time.perf_counter()
        for variance in ("fixed_small", "fixed_large", "analytic"):
            for trajectory in get_args(Trajectory):
                way = Way(variance, trajectory)
                scheduler = self.scheduler_of(found, way)
                for K in self.config.steps:
                    scheduler.set_timesteps(K)
                    score = bits_of(under_fixed_variance(swept, scheduler, scheduler.timesteps.tolist()))
                    yield self.figure("bpd", started, **score, **self.of_way(way, K), **conditions)
        if self.learned:
            for trajectory in get_args(Trajectory):
                way = Way(self.own_variance, trajectory)
                for K in self.config.steps:
                    started = time.perf_counter()
                    score = bits_of(self.bound(self.unet, self.scheduler_at(found, way, K), K, test, count))
                    yield self.figure("bpd", started, **score, **self.of_way(way, K), **conditions)

    def bound_as_loaded(self, swept: SetBound, K: int, test: Any, count: int) -> SetBound:
        """The bound of K steps of the scheduler as it was loaded; all T steps of one σ² per step are in the sweep."""
        if K == len(self.scheduler) and not self.learned:
            return under_fixed_variance(swept, self.scheduler)
        return self.bound(self.unet, self.scheduler, K, test, count)

    def bound(self, unet: Any, scheduler: DDPMExtScheduler, K: int | None, test: Any, count: int) -> SetBound:
        return set_bound(
            unet,
            scheduler,
            test,
            num_images=count,
            seed=self.config.seed,
            batch_size=None,
            num_inference_steps=K,
            folder=self.pieces,
            key=self.session.key(scheduler),
            accelerator=self.accelerator,
        )

    def frechet(self, found: Calibration) -> Iterator[dict[str, Any]]:
        """Fréchet distances before and after, for every number of steps."""
        config = self.config
        extractor = make_extractor(
            config.extractor,
            device=self.accelerator.device,
            size=config.extractor_size,
            weights=config.inception_weights,
        )
        reference = make_reference(
            self.training,
            extractor,
            config.hand_off,
            self.accelerator,
            cache_dir=config.reference_cache,
            num_images=config.max_reference_images,
        )
        conditions = {
            "num_samples": config.num_samples,
            "extractor": extractor.description,
            "hand_off": config.hand_off,
            "reference": self.session.dataset(self.training, config.split, len(reference.features)),
        }
        for way, K in self.plan():
            started, pipeline = time.perf_counter(), self.session.pipeline
            scheduler = self.scheduler if way is None else self.scheduler_at(found, way, K)
            words = self.of_loaded(K) if way is None else self.of_way(way, K)
            unet = self.unet if scheduler.variance_type in LEARNED_VARIANCES else self.slim
            pipeline.register_modules(scheduler=scheduler, unet=unet)
            distances = []
            for number in range(config.num_seeds):
                samples = sample_features(
                    pipeline,
                    extractor,
                    config.hand_off,
                    num_samples=config.num_samples,
                    num_inference_steps=K,
                    seed=config.seed + number * config.num_samples,
                    batch_size=config.batch_size,
                    folder=self.pieces,
                    key=self.session.key(scheduler),
                    accelerator=self.accelerator,
                )
                statistics = feature_statistics(samples.features.features)
                distances.append(frechet_distance(reference.statistics, statistics))
            pipeline.register_modules(scheduler=self.session.scheduler, unet=self.unet)
            values = torch.tensor(distances, dtype=torch.float64)
            score: dict[str, Any] = {"value": values.mean().item(), "values": distances}
            if len(values) > 1:
                score["std"] = values.std().item()
            yield self.figure("fid", started, **score, **words, **conditions, seed=config.seed)

    def plan(self) -> list[tuple[Way | None, int]]:
        """Ways and numbers of steps of the Fréchet distances: as loaded (None) first, then the calibrated ones."""
        ways = [None, Way(self.own_variance, "even"), self.calibrated]
        ways += [Way("analytic", trajectory, eta) for trajectory in get_args(Trajectory) for eta in (1.0, 0.0)]
        plan = [(way, K) for K in self.config.fid_steps for way in dict.fromkeys(ways)]
        return [*plan, (Way("fixed_small", "even"), len(self.scheduler))] if self.config.full_chain else plan

    # -- records ----------------------------------------------------------------------------------------------------

    def of_way(self, way: Way, K: int) -> dict[str, Any]:
        when = "after" if way == self.calibrated else None
        return {**way._asdict(), "timestep_spacing": None, **named(way.words, when, K)}

    def of_loaded(self, K: int) -> dict[str, Any]:
        """What a figure says of the scheduler as it was loaded: its own variance, spacing or trajectory, and η."""
        variance, eta = self.scheduler.config["variance_type"], self.loaded["eta"]
        steps = self.loaded["trajectory"] or self.loaded["timestep_spacing"]
        words = f"{variance}, as loaded ({steps})" + ("" if eta == 1 else f", η = {eta:g}")
        return {"variance_type": variance, **self.loaded, **named(words, "before", K)}

    def figure(self, metric: str, started: float, **more: Any) -> dict[str, Any]:
        """One entry of calibration.json."""
        self.session.started = started
        found = self.session.figure(metric, **more)
        options = {name: value for name, value in asdict(self.config).items() if name != "hub_token"}
        found["certificate"]["options"] = options
        return found


def named(words: str, when: str | None, K: int) -> dict[str, Any]:
    """The fields by which a figure of a way of sampling is known."""
    return {"sampler": words, "when": when, "num_inference_steps": K}


def markdown(figures: list[dict[str, Any]]) -> str:
    """The scores as tables: ways of sampling down, numbers of steps across; the lowest of each column is bold."""
    tables = []
    for metric in dict.fromkeys(figure["metric"] for figure in figures):
        members = [figure for figure in figures if figure["metric"] == metric]
        steps = sorted({figure["num_inference_steps"] for figure in members})
        cells = {(figure["sampler"], figure["num_inference_steps"]): figure for figure in members}
        best = {K: min(f["value"] for f in members if f["num_inference_steps"] == K) for K in steps}
        rows = [
            [way, *(score_words(cells.get((way, K)), best[K]) for K in steps)]
            for way in dict.fromkeys(figure["sampler"] for figure in members)
        ]
        head = ["variance, trajectory", *(f"{K} steps" for K in steps)]
        tables.append(f"{title(members[0])}:\n\n{table(head, rows)}\n")
    return "\n".join(tables)


def title(figure: dict[str, Any]) -> str:
    """What a table's scores are of."""
    if figure["metric"] == "bpd":
        return f"{TITLES['bpd']} of {data_words(figure['dataset'])}"
    seeds = len(figure["values"])
    sets = f"{figure['num_samples']:,} samples" + (f", mean ± deviation of {seeds} seeds" if seeds > 1 else "")
    return f"{TITLES['fid']} to {data_words(figure['reference'])} ({figure['extractor']['name']}, {sets})"


def score_words(figure: dict[str, Any] | None, best: float) -> str:
    """A score as it stands in a table."""
    if figure is None:
        return ""
    words = f"{figure['value']:.4f}" + (f" ± {figure['std']:.4f}" if "std" in figure else "")
    return f"**{words}**" if figure["value"] == best else words


def draw(figures: list[dict[str, Any]], folder: Path) -> None:
    """Each score against steps, where it was measured at several."""
    for metric in dict.fromkeys(figure["metric"] for figure in figures):
        curves: dict[str, list[tuple[int, float]]] = {}
        for figure in figures:
            if figure["metric"] == metric:
                curves.setdefault(figure["sampler"], []).append((figure["num_inference_steps"], figure["value"]))
        if len({steps for points in curves.values() for steps, _ in points}) > 1:
            plot_against_steps(curves, TITLES[metric], folder / f"{metric}_against_steps.png")
