"""Pipeline + images -> measured errors and optimal trajectories, stored with its scheduler, and what they gain.

    <output_dir>/pipeline/         the pipeline with the calibrated scheduler; stock Diffusers loads it, too
                 calibration.json  errors with their standard errors, trajectories, every score with what made it
                 calibration.md    the scores as tables
                 plots/            quality against steps, a curve per sampler

One sweep of all steps over training images gives the errors, one over test images gives bits/dim of every variance,
trajectory and number of steps. Long work is done in pieces (`sharded`): the same command resumes after a kill.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch

from ..diffusion.analytic import optimal_trajectories
from ..diffusion.words import EXTENSION_KEY, LEARNED_VARIANCES, Trajectory
from ..errors import UserError
from ..hub import upload
from ..pipelines.config import guidance_conditions
from ..pipelines.ddpm import load_pipeline
from ..pipelines.guidance import make_guidance
from ..run_dir import JsonRecord, write_atomically, write_json
from ..schedulers.ddpm import DDPMExtScheduler
from ..schedulers.solver import DDPMExtSolverScheduler, fitted_record
from ..signals import interruptible
from .bound.denoising_errors import drop_variance_head, mean_error, set_errors
from .bound.sets import SetBound, bits_of, check_bound, set_bound, under_fixed_variance
from .bound.terms import BoundOptions
from .config import CalibrateConfig
from .features.metrics import FeatureStatistics, feature_statistics, frechet_distance
from .features.samples import Drawing, SampleFeatures
from .plots import draw_results, figure_class
from .report import markdown
from .results import Result
from .runner import Runner
from .samplers import SamplerSetting, ancestral, chain_conditions
from .solvers.few_steps import FEW_STEPS, few_step_results, score_references
from .solvers.fit import TIE, Candidate, FitOptions, FittedNetwork, best_reference, fitted_scheduler

if TYPE_CHECKING:
    from diffusers import UNet2DModel

    from ..data.dataset import ImageSet
    from ..schedulers.contract import Scheduler

__all__ = ["Calibration", "calibrate"]

_DIGITS = 8  # significant digits of the stored errors: far below their standard errors


class Calibration(NamedTuple):
    """What is stored with the scheduler."""

    mse_eps: list[float]  # T numbers
    ms_eps: list[float]
    standard_error: list[float]  # of mse_eps
    standard_error_ms_eps: list[float]  # for the record only
    trajectories: dict[str, list[int]]  # K -> ascending code indices
    guidance: JsonRecord  # under which all of this was measured; {} for none

    def scheduler(self, loaded: Scheduler, variance_type: str, trajectory: str, eta: float = 1.0) -> DDPMExtScheduler:
        """Return a model's scheduler, calibrated, sampling one way.

        Args:
            loaded: The scheduler as it was loaded.
            variance_type: Reverse variance.
            trajectory: "even" or "optimal".
            eta: 1 is DDPM, 0 the DDIM form.
        """
        made = DDPMExtScheduler.from_config(loaded.config, variance_type=variance_type)
        fields = self._asdict()
        del fields["standard_error_ms_eps"], fields["guidance"]
        chosen = {"trajectory": trajectory, "eta": eta, **self.guidance}
        made.register_to_config(**{EXTENSION_KEY: {**fields, **chosen}})
        return made


def calibrate(config: CalibrateConfig) -> JsonRecord:
    """Measure, store and judge; return what calibration.json holds.

    Args:
        config: The options.

    Raises:
        UserError: what cannot be measured, before anything is.
        Stopped: a signal came; what is measured is kept, and the same command continues.
    """
    with interruptible(f"What is measured is kept in {config.folder}"):
        work = _Calibration(config)
        found, of_errors = work.measure() if config.steps else (None, {})
        work.fit(found)
        if work.runner.is_main:
            work.save(found)
        measured = {} if found is None else found._asdict()
        record, results = {"format": 1, **of_errors, **measured, **work.of_solver, "figures": []}, []
        for result in work.scores(found):
            results.append(result)
            record["figures"].append(result.to_json())
            if work.runner.is_main:
                work.write(record, results)
        if work.runner.is_main:
            work.write(record, results)
            if config.plots:
                _draw(results, config.folder / "plots")
            if config.hub_model_id is not None:
                options = {"private": config.hub_private_repo, "token": config.hub_token}
                upload.push_to_hub(config.folder / "pipeline", config.hub_model_id, **options)
        work.runner.accelerator.wait_for_everyone()
        return record


def _draw(results: list[Result], folder: Path) -> None:
    """Draw the scores; without matplotlib say so, for nobody asked for the plots, which are on by default."""
    try:
        figure_class()
    except UserError:
        print("No plots are drawn: they need matplotlib (pip install ddpm-ext[plots]).")
        return
    draw_results(results, folder)


class _Calibration:
    """One calibration: its model and its images, checked."""

    def __init__(self, config: CalibrateConfig) -> None:
        self.config = config
        self.runner = runner = Runner(config, load_pipeline(config.model), config.folder / "calibration_pieces")
        self.features = SampleFeatures(runner)
        self.scheduler = ancestral(runner.scheduler)
        T = len(self.scheduler)
        wrong = [K for K in [*config.steps, *config.fid_steps] if not 2 <= K <= T]
        needs_images = config.steps or config.scores
        if wrong:
            raise UserError(f"num_inference_steps must lie in 2..{T}, the steps of this model, got {wrong[0]}.")
        self.variance = str(self.scheduler.config["variance_type"]).removesuffix("_log")
        self.loaded = chain_conditions(self.scheduler)
        self.learned = self.variance in LEARNED_VARIANCES
        make_guidance(runner.unet.config, T, **(config.guidance or {}))  # can it be guided at all
        self.guidance = guidance_conditions(config.guidance)
        self.without_head = drop_variance_head(runner.unet) if self.learned else runner.unet
        self.training: Any = runner.images.load(config.split, "split") if needs_images else None  # a solver needs none
        if config.steps:
            self.count = min(config.num_images, len(self.training))
            check_bound(runner.unet, self.scheduler, self.training, BoundOptions())
        self.fits = self._fits() if config.fitted_steps else None
        self.solver: DDPMExtSolverScheduler | None = None
        self.of_solver: JsonRecord = {}
        self.test = runner.images.load(config.test_split, "test_split") if "bpd" in config.scores else None
        if "fid" in config.scores:
            self.features.check(self.training, {"fid": 2})

    # -- measuring --------------------------------------------------------------------------------------------------

    def measure(self) -> tuple[Calibration, JsonRecord]:
        """Measure the network's errors on training images; return them with trajectories, and how they were made."""
        runner, config = self.runner, self.config
        runner.start_clock()
        errors = set_errors(
            runner.unet,
            self.scheduler,
            self.training,
            num_images=self.count,
            seed=config.seed,
            shards=runner.shards(self.scheduler),
            guidance=config.guidance,
        )
        mse, ms = mean_error(errors.mse_eps), mean_error(errors.ms_eps)
        rounded = [[float(f"{value:.{_DIGITS}g}") for value in part.tolist()] for part in (*mse, *ms)]
        mse_eps = torch.tensor(rounded[0], dtype=torch.float64)
        paths = optimal_trajectories(self.scheduler.tables, mse_eps, config.steps) if config.steps else {}
        stored = {str(K): path for K, path in paths.items() if K < len(self.scheduler)}
        found = Calibration(rounded[0], rounded[2], rounded[1], rounded[3], stored, self.guidance)
        dataset = runner.images.describe(self.training, self.count)
        made = runner.result("errors", value=mse.mean.mean().item(), dataset=dataset, seed=config.seed).to_json()
        return found, {name: value for name, value in made.items() if name not in ("value", "num_inference_steps")}

    def _fits(self) -> FittedNetwork:
        config, runner = self.config, self.runner
        options = FitOptions(
            steps=tuple(config.fitted_steps),
            num_noises=config.num_noises,
            num_held_out=config.num_held_out,
            order=config.solver_order,
            reference_steps=tuple(config.calls_of_references),
            seed=config.seed,
            batch_size=config.batch_size,
            guidance=config.guidance,
        )
        return FittedNetwork(runner.unet, self.scheduler, options, runner.shards(self.scheduler).run, runner.is_main)

    def fit(self, found: Calibration | None) -> None:
        """Fit the solvers to the best of the candidate references, and note which that is and why."""
        if self.fits is None:
            return
        reference, reason, scores = self.choose_reference(self.fits)
        fits = self.fits.fit(reference)
        base = self.scheduler if found is None else found.scheduler(self.scheduler, *self.after)
        self.solver = fitted_scheduler(base, reference, fits, self.fits.options)
        of_reference = {"reference": reference.kind, "reference_steps": reference.steps, "reason": reason}
        named = {str(candidate): score for candidate, score in scores.items()}
        self.of_solver = {"solver": {**of_reference, "reference_scores": named, "steps": fitted_record(self.solver)}}

    def choose_reference(self, fits: FittedNetwork) -> tuple[Candidate, str, dict[Candidate, float]]:
        """Return what solvers are fitted to, why, and the Fréchet distance of each candidate where it was measured."""
        config, asked = self.config, self.config.solver_reference
        candidates = [one for one in fits.candidates if asked in (None, one.kind)]
        if asked is not None and not candidates:
            candidates = [Candidate(asked, steps) for steps in fits.reference_steps]
        if len(candidates) == 1:
            return candidates[0], "the only candidate", {}
        if "fid" not in config.scores:
            return candidates[0], "no extractor: the finest, and the model's own x̂_0 and ε̂ where none is named", {}
        real = self.features.reference(self.training).statistics
        scores = score_references(fits, candidates, self.features.extractor, real, config.quantization)
        why = f"the lowest Fréchet distance of {fits.count} images of each, within {TIE:.0%}"
        return best_reference(scores), why, scores

    def save(self, found: Calibration | None) -> None:
        """Write the pipeline with the calibrated scheduler: a fitted solver, a learned variance, or the optimal one."""
        pipeline = self.runner.pipeline
        after: Any = self.solver
        if after is None:
            assert found is not None
            after = found.scheduler(self.scheduler, *self.after)
        pipeline.register_modules(scheduler=after)
        pipeline.save_pretrained(self.config.folder / "pipeline")
        pipeline.register_modules(scheduler=self.runner.scheduler)

    def write(self, record: JsonRecord, results: list[Result]) -> None:
        """Write calibration.json and calibration.md as far as they are known."""
        self.config.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.config.folder / "calibration.json", record)
        write_atomically(self.config.folder / "calibration.md", markdown(results))

    # -- ways to sample -----------------------------------------------------------------------------------------------

    @property
    def after(self) -> tuple[str, Trajectory]:
        """Variance and trajectory of the calibrated scheduler."""
        return (self.variance if self.learned else "analytic"), self.config.trajectory

    @property
    def before(self) -> SamplerSetting:
        """The scheduler as it was loaded: its own variance, spacing or trajectory, and η."""
        steps = self.loaded["trajectory"] or self.loaded["timestep_spacing"]
        eta = "" if self.loaded["eta"] == 1 else f", η = {self.loaded['eta']:g}"
        words = f"{self.scheduler.config['variance_type']}, as loaded ({steps}){eta}"
        return SamplerSetting(words, lambda _: self.scheduler, "before")

    def setting(self, found: Calibration, variance: str, trajectory: str, eta: float = 1.0) -> SamplerSetting:
        """Return the calibrated chain of one variance, trajectory and η."""
        words = f"{variance}, {trajectory}" + ("" if eta == 1 else f", η = {eta:g}")
        made = found.scheduler(self.scheduler, variance, trajectory, eta)
        when = "after" if (variance, trajectory) == self.after and eta == 1 else None
        return SamplerSetting(words, lambda _: made, when)

    def settings(self, found: Calibration) -> list[SamplerSetting]:
        """Return what Fréchet distances compare: as loaded first, then the calibrated chains."""
        ways = [(self.variance, "even", 1.0), (*self.after, 1.0)]
        ways += [("analytic", trajectory, eta) for trajectory in get_args(Trajectory) for eta in (1.0, 0.0)]
        return [self.before, *(self.setting(found, *way) for way in dict.fromkeys(ways))]

    def same_chain(self, setting: SamplerSetting, K: int) -> Any:
        """Return a setting's scheduler; the loaded one where all T steps make it the same: none is run twice."""
        made = setting.make(self.runner.scheduler)
        chain = made.config.get(EXTENSION_KEY) or {}
        whole = K == len(self.scheduler) and chain.get("eta", 1.0) == self.loaded["eta"] == 1
        return self.scheduler if whole and made.config["variance_type"] == self.variance != "analytic" else made

    # -- judging ----------------------------------------------------------------------------------------------------

    def scores(self, found: Calibration | None) -> Iterator[Result]:
        """Measure every score asked for."""
        config = self.config
        if self.test is not None and found is not None:
            yield from self.bits(found, self.test)
        if "fid" not in config.scores:
            return
        if found is not None:
            yield from self.frechet(found)
        few = sorted({*config.fitted_steps, *(K for K in config.fid_steps if K <= FEW_STEPS)})
        if few:
            yield from few_step_results(
                self.features, self.training, self.solver, few, config.num_samples, config.num_seeds
            )
        if config.full_chain and found is None:
            chain = ancestral(self.scheduler, "fixed_small")
            yield self.distance(SamplerSetting("fixed_small", lambda _: chain), len(self.scheduler))

    def bits(self, found: Calibration, test: ImageSet) -> Iterator[Result]:
        """Measure bits/dim of test images for every variance, trajectory and number of steps.

        One sweep serves all variances that are one number per step; a learned one is swept on each chain.
        """
        runner, steps = self.runner, self.config.steps
        count = min(self.config.max_bpd_images or len(test), len(test))
        conditions = {"dataset": runner.images.describe(test, count), "seed": self.config.seed}

        def bound(unet: UNet2DModel, scheduler: DDPMExtScheduler, K: int | None) -> SetBound:
            return set_bound(
                unet,
                scheduler,
                test,
                num_images=count,
                seed=self.config.seed,
                options=BoundOptions(num_inference_steps=K),
                shards=runner.shards(scheduler),
            )

        runner.start_clock()
        plain = ancestral(self.scheduler, "fixed_small")
        plain.register_to_config(**{EXTENSION_KEY: {}})
        swept = bound(self.without_head, plain, None)
        if self.loaded["eta"] == 1:  # the bound is DDPM's
            for K in steps:
                if K == len(self.scheduler) and not self.learned:  # all steps of one σ² each are in the sweep
                    score = under_fixed_variance(swept, self.scheduler)
                else:
                    score = bound(runner.unet, self.scheduler, K)
                yield self.result("bpd", self.before, K, **bits_of(score), **conditions)
        variances = ["fixed_small", "fixed_large", "analytic", *([self.variance] if self.learned else [])]
        for variance in variances:
            for trajectory in get_args(Trajectory):
                setting = self.setting(found, variance, trajectory)
                for K in steps:
                    runner.start_clock()
                    if variance in LEARNED_VARIANCES:
                        score = bound(runner.unet, self.same_chain(setting, K), K)
                    else:
                        scheduler = found.scheduler(self.scheduler, variance, trajectory)
                        scheduler.set_timesteps(K)
                        score = under_fixed_variance(swept, scheduler, scheduler.timesteps.tolist())
                    yield self.result("bpd", setting, K, **bits_of(score), **conditions)

    def frechet(self, found: Calibration) -> Iterator[Result]:
        """Measure Fréchet distances before and after, for every number of steps."""
        settings = self.settings(found)
        plan = [(setting, K) for K in self.config.fid_steps for setting in settings]
        if self.config.full_chain:
            plan.append((self.setting(found, "fixed_small", "even"), len(self.scheduler)))
        for setting, K in plan:
            yield self.distance(setting, K)

    def distance(self, setting: SamplerSetting, K: int) -> Result:
        """Measure the Fréchet distance of one setting."""
        reference = self.features.reference(self.training)
        self.runner.start_clock()
        values = self.distances(setting, K, reference.statistics)
        spread = torch.tensor(values, dtype=torch.float64)
        return self.result(
            "fid",
            setting,
            K,
            value=spread.mean().item(),
            values=values,
            std=spread.std().item() if len(values) > 1 else None,
            **self.features.conditions(self.training, len(reference.features), self.config.num_samples),
        )

    def distances(self, setting: SamplerSetting, K: int, reference: FeatureStatistics) -> list[float]:
        """Return the Fréchet distances of each set of samples of one setting."""
        config, scheduler = self.config, self.same_chain(setting, K)
        keeps_head = scheduler.config.get("variance_type") in LEARNED_VARIANCES
        unet, found = (self.runner.unet if keeps_head else self.without_head), []
        for number in range(config.num_seeds):
            seed = config.seed + number * config.num_samples
            drawing = Drawing(num_samples=config.num_samples, steps=K, seed=seed)
            samples = self.features.draw(scheduler, self.training, drawing, unet)
            found.append(frechet_distance(reference, feature_statistics(samples.features.features)))
        return found

    def result(self, metric: str, setting: SamplerSetting, K: int, **more: Any) -> Result:
        """Make one entry of calibration.json."""
        scheduler = setting.make(self.runner.scheduler)
        chain = {"variance_type": scheduler.config.get("variance_type"), **chain_conditions(scheduler)}
        return self.runner.result(
            metric, sampler=setting.name, when=setting.when, num_inference_steps=K, **chain, **more
        )
