"""DDPMExtSolverScheduler: the whole chain in a few network calls, by a solver fitted to one network (`calibrate`).

The formulas are those of `diffusion.solvers`; here is what a pipeline sees of them. On disk it is stock's
DPMSolverMultistepScheduler with lu lambdas, which every Diffusers installation samples with.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ..diffusion import images, process, reverse
from ..diffusion.schedules import Tables, widest_float
from ..diffusion.solvers import (
    REFERENCES,
    Estimate,
    EstimateWeights,
    JumpWeights,
    Solver,
    estimate,
    estimate_weights,
    jump_weights,
    solver_step,
)
from ..diffusion.words import EXTENSION_KEY, Config, ReferenceKind
from ..errors import UserError, check_word, is_whole
from ..run_dir import JsonRecord
from .base import BaseScheduler
from .checks import Generators, Timesteps, as_int, check_generators
from .config import GuidanceSetting, guidance_setting, warn_of_other_guidance

__all__ = [
    "LAMBDA_MIN_OF_COSINE",
    "DDPMExtSolverScheduler",
    "FittedSolvers",
    "fitted_record",
    "fitted_solvers",
    "is_portable_solver",
    "solver_record",
]

ON_DISK = {"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True}
LAMBDA_MIN_OF_COSINE = -5.1  # where stock starts a cosine schedule: before it λ = log SNR / 2 runs off
# Options that change what a network's output says of an image: a solver was fitted under one choice of them.
SETTING = (
    "prediction_type",
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
)


@dataclass(frozen=True)
class FittedSolvers:
    """The `solver` of a scheduler's `_ddpm_ext`, checked.

    Attributes:
        reference: What the solvers were fitted to; it decides x̂_0 and ε̂ (`estimate_weights`).
        solvers: Number of calls K -> its solver.
        setting: What they were fitted under: options, the schedule's mean ᾱ, the class guidance.
    """

    reference: ReferenceKind
    solvers: Mapping[int, Solver]
    setting: Config


def solver_record(
    reference: ReferenceKind, solvers: Mapping[int, Solver], scheduler: BaseScheduler, notes: Mapping[int, Config]
) -> JsonRecord:
    """Return the `solver` of `_ddpm_ext`: what a scheduler needs to draw with fitted solvers, as JSON holds it.

    Args:
        reference: What they were fitted to.
        solvers: By number of calls.
        scheduler: The one whose options they were fitted under.
        notes: More to record of each number of calls, such as the held-out squared distance.
    """
    steps = {
        str(K): {
            "timesteps": list(one.times),
            "coefficients": [[float(f"{c:.9g}") for c in row] for row in one.coefficients.tolist()],
            **notes.get(K, {}),
        }
        for K, one in sorted(solvers.items())
    }
    return {"reference": reference, "setting": setting_of(scheduler), "steps": steps}


def fitted_record(scheduler: BaseScheduler) -> JsonRecord:
    """Return what is stored of each number of calls: steps, coefficients, notes."""
    return dict(scheduler.config[EXTENSION_KEY]["solver"]["steps"])


def setting_of(scheduler: BaseScheduler) -> JsonRecord:
    """Return the options that a fit depends on, and the mean of ᾱ, which stands for the noise schedule."""
    alpha_bar = scheduler.tables.alpha_bar.mean().item()
    return {**{name: scheduler.config[name] for name in SETTING}, "mean_alpha_bar": float(f"{alpha_bar:.9g}")}


def fitted_solvers(config: Config) -> FittedSolvers | None:
    """Return the fitted solvers of a scheduler's config, checked; None where it has none.

    Raises:
        UserError: fields that are missing or unknown, steps that are not K strictly descending ones, or coefficients
            that are not as many finite numbers for each.
    """
    record = (config.get(EXTENSION_KEY) or {}).get("solver")
    if record is None:
        return None
    known = ("reference", "setting", "steps", "portable")
    if not isinstance(record, Mapping) or not {"reference", "steps"} <= record.keys():
        raise UserError(f'solver of {EXTENSION_KEY} must hold "reference" and "steps", got {record!r}.')
    for name in record:
        check_word(f"a field of {EXTENSION_KEY}'s solver", name, known)
    check_word("reference", record["reference"], REFERENCES)
    if not isinstance(record["steps"], Mapping) or not record["steps"]:
        raise UserError(f"steps of a fitted solver must map a number of calls to its fit, got {record['steps']!r}.")
    if not isinstance(record.get("setting") or {}, Mapping):
        raise UserError(f"setting of a fitted solver must map options to their values, got {record['setting']!r}.")
    found = [_solver_of(K, one, config["num_train_timesteps"]) for K, one in record["steps"].items()]
    solvers = {len(solver.times): solver for solver in sorted(found, key=lambda solver: len(solver.times))}
    return FittedSolvers(record["reference"], solvers, record.get("setting") or {})


def _solver_of(K: str, record: Any, T: int) -> Solver:
    expected = (
        f'steps of a fitted solver must map "K" to K strictly descending timesteps from {T - 1} on and as many rows of '
        "an even number of finite coefficients"
    )
    try:
        times, rows = list(record["timesteps"]), torch.tensor(record["coefficients"], dtype=torch.float64)
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{expected}, got {K!r}: {type(error).__name__} {error}. Calibrate again.") from None
    whole = all(isinstance(t, int) and not isinstance(t, bool) for t in times)
    ordered = (
        whole and times == sorted(set(times), reverse=True) and bool(times) and times[0] == T - 1 and times[-1] >= 0
    )
    if rows.ndim == 2 and rows.shape[1] % 2 == 1:  # of a record before there was a d_0
        c, d = rows.tensor_split([rows.shape[1] // 2 + 1], 1)
        rows = torch.cat([c, rows.new_zeros(len(rows), 1), d], 1)
    fits = str(len(times)) == K and rows.ndim == 2 and len(rows) == len(times) and rows.shape[1] > 0
    if not (ordered and fits and torch.isfinite(rows).all()):
        raise UserError(f"{expected}, got {K!r}: {record!r}. Calibrate again.")
    return Solver(tuple(times), rows)


def is_portable_solver(config: Config) -> bool:
    """Say whether a stock DPM-Solver's config is a DDPMExtSolverScheduler as it lies on disk.

    A stock solver that somebody chose in its place, or whose lu lambdas were switched off since, is none.
    """
    record = (config.get(EXTENSION_KEY) or {}).get("solver") or {}
    return bool(record.get("portable")) and bool(config.get("use_lu_lambdas"))


class _Row(NamedTuple):
    """One visited step: how its estimate and its jump are computed."""

    estimate: EstimateWeights
    jump: JumpWeights


class DDPMExtSolverScheduler(BaseScheduler, SchedulerMixin):
    r"""Deterministic sampling in K network calls by a linear multistep method fitted to the network.

        x_s = α_s [x̂_0 + d_0 x̂_0 + Σ_j d_j (x̂_0 - x̂_0^j)] + √(1-ᾱ_s) ε̂ + h [c_0 ε̂ + Σ_j c_j (ε̂ - ε̂^j)]

    The options are those of `DDPMExtScheduler`. Steps and coefficients of every K lie in the config's `_ddpm_ext`,
    where `ddpm-ext calibrate --solver_steps` puts them; `DDPMExtScheduler.from_config(solver.config)` is the
    ancestral chain of the same network, and the way back loses nothing.

    Example:
        ```py
        pipe = DDPMExtPipeline.from_pretrained("runs/digits/calibrated/pipeline")
        pipe(batch_size=16, num_inference_steps=5).images
        ```
    """

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Return a scheduler from the config of this class or of any compatible one, or from what it has on disk."""
        if isinstance(config, dict) and EXTENSION_KEY in kwargs:  # an option like any other
            config = {**config, EXTENSION_KEY: kwargs.pop(EXTENSION_KEY)}
        record = config.get(EXTENSION_KEY) if isinstance(config, dict) else None
        if isinstance(record, dict) and isinstance(record.get("solver"), dict):
            for_stock = (*ON_DISK.keys(), "lambda_min_clipped") if record["solver"].get("portable") else ()
            solver = {name: value for name, value in record["solver"].items() if name != "portable"}
            config = {name: value for name, value in config.items() if name not in for_stock}
            config[EXTENSION_KEY] = {**record, "solver": solver}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def _options_changed(self) -> None:
        """Check the solvers; steps that were chosen under other options have to be chosen again."""
        fitted_solvers(self.config)
        self._chosen = False  # whether there is a solver to step with
        self._forget()

    def to_json_string(self) -> str:
        """Return the portable config: stock's best solver of this kind, ours in `_ddpm_ext`."""
        text = super().to_json_string()
        if type(self) is not DDPMExtSolverScheduler:
            return text
        config = json.loads(text)
        extra = config.get(EXTENSION_KEY) or {}
        solver = {**(extra.get("solver") or {}), "portable": True}
        cosine = config["beta_schedule"] == "squaredcos_cap_v2" and config["trained_betas"] is None
        limit = {"lambda_min_clipped": LAMBDA_MIN_OF_COSINE} if cosine else {}
        config = {**config, **ON_DISK, **limit, EXTENSION_KEY: {**extra, "solver": solver}}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    # -- timesteps --------------------------------------------------------------------------------------------------

    @property
    def solver_steps(self) -> list[int]:
        """The numbers of calls that were fitted."""
        fitted = fitted_solvers(self.config)
        return [] if fitted is None else list(fitted.solvers)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | Tensor | np.ndarray | None = None,
        trajectory: Any = None,
    ) -> None:
        """Choose the solver of K calls.

        Args:
            num_inference_steps: K, one of `solver_steps`.
            device: Where `.timesteps` lives; None leaves it on the CPU.
            timesteps: Not here: a fitted solver has its own.
            trajectory: Not here.

        Raises:
            UserError: a K that was not fitted, or steps of the caller's own.
        """
        if timesteps is not None or trajectory is not None:
            raise UserError(
                "A fitted solver has steps of its own, from x_T to the image: give num_inference_steps alone. For "
                "other steps use DDPMExtScheduler.from_config(scheduler.config)."
            )
        fitted = fitted_solvers(self.config)
        if fitted is None:
            raise UserError(
                "This scheduler has no fitted solver. Fit one to the network with `ddpm-ext calibrate "
                "--solver_steps 4,5,10`, or sample with DDPMExtScheduler.from_config(scheduler.config)."
            )
        K = num_inference_steps
        if K is None or not is_whole(K) or int(K) not in fitted.solvers:
            raise UserError(
                f"num_inference_steps must be one of {', '.join(map(str, fitted.solvers))}, for which a solver was "
                f"fitted, got {K!r}. Fit others with `ddpm-ext calibrate --solver_steps`, or sample "
                "with DDPMExtScheduler.from_config(scheduler.config)."
            )
        K = int(K)
        self._warn_of_other_setting(fitted.setting)
        solver = fitted.solvers[K]
        self._visit(list(solver.times), device)
        self._rows = _rows_of(self.tables, solver, self.config["prediction_type"], fitted.reference)
        self._order, self._clips = solver.order, fitted.reference != "unclipped"
        self._tables_of_rows = {torch.device("cpu"): _weights_by_step(self._rows, len(self), 2 * (self._order - 1))}
        if device is not None:
            self._table_on(self.timesteps.device)  # here and not in the first step, which may be compiled
        self._forget()
        self.num_inference_steps, self.custom_timesteps, self._chosen = K, False, True

    def warn_of_guidance(self, here: GuidanceSetting) -> None:
        """Warn when the network is used with another class guidance than the solver was fitted under."""
        fitted = fitted_solvers(self.config)
        if fitted is not None:
            warn_of_other_guidance("The solver was fitted", guidance_setting(fitted.setting, len(self)), here)

    # -- the reverse process ----------------------------------------------------------------------------------------

    def step(
        self,
        model_output: Tensor,
        timestep: Timesteps,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """Take one step of the solver; the estimates of the steps before are kept inside until the first step comes.

        Args:
            model_output: The network's output, shape (B, C, …), or (B, 2C, …) for the learned variances.
            timestep: The next of `.timesteps`, the same for all images: an int, or a tensor of one element.
            sample: x_t, shape (B, C, …).
            generator: Nothing is drawn; looked at as in `DDPMExtScheduler.step`.
            return_dict: False for the tuple (prev_sample, pred_original_sample).

        Returns:
            prev_sample x_s and pred_original_sample x̂_0, in the sample's shape and dtype.

        Raises:
            UserError: a timestep that is not the next one, one per image, or shapes that do not fit. On an
                accelerator, where looking would make the host wait, the result of a wrong timestep is NaN instead.
        """
        if not self._chosen:
            raise UserError("Choose the number of calls first: scheduler.set_timesteps(K).")
        prediction, _ = reverse.split_output(model_output, sample, self.config["variance_type"])
        check_generators(generator, sample.shape[0])
        if isinstance(timestep, Tensor) and timestep.numel() != 1:
            raise UserError(
                "A fitted solver takes all images through the same steps: timestep must be one for all, got shape "
                f"{tuple(timestep.shape)}. For one per image use DDPMExtScheduler."
            )
        dtype = process.compute_dtype(sample)
        x_t, prediction = sample.to(dtype), prediction.to(dtype)
        if torch.compiler.is_compiling() or (isinstance(timestep, Tensor) and timestep.device.type != "cpu"):
            x_s, x_0 = self._step_by_table(prediction, torch.as_tensor(timestep, device=x_t.device), x_t)
        else:
            x_s, x_0 = self._step_by_number(prediction, as_int(timestep), x_t)
        x_s, x_0 = x_s.to(sample.dtype), x_0.to(sample.dtype)
        return DDPMSchedulerOutput(prev_sample=x_s, pred_original_sample=x_0) if return_dict else (x_s, x_0)

    def estimate(self, prediction: Tensor, timestep: int, sample: Tensor, reference: ReferenceKind) -> Estimate:
        """Return x̂_0 and ε̂ of one step as a reference has them, clipped as the options say.

        Args:
            prediction: The network's output without a variance head, shape (B, C, …), the sample's dtype.
            timestep: 0 <= t < T.
            sample: x_t, shape (B, C, …).
            reference: Which of them (`diffusion.solvers.estimate_weights`).
        """
        weights = estimate_weights(self.tables, timestep, self.config["prediction_type"], reference)
        return estimate(prediction, sample, weights, self.options.clip if reference != "unclipped" else None)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._before: tuple[Estimate, ...] = ()  # estimates of the steps visited before, the last one first
        self._next = 0  # place in `_rows` of the step that has to come
        self._stack: Tensor | None = None  # the same where no look at a timestep is possible: x̂_0, ε̂, x̂_0^1, …
        self._last: Tensor | None = None  # and the step that came last

    def _step_by_number(self, prediction: Tensor, t: int, x_t: Tensor) -> tuple[Tensor, Tensor]:
        times = self._times
        if t not in self._rows:
            raise UserError(self._not_scheduled(t))
        if t == times[0]:
            self._forget()
        expected = times[self._next] if self._next < len(times) else times[0]
        if t != expected or (self._before and self._before[0].x_0.shape != x_t.shape):
            raise UserError(
                f"A fitted solver starts at timestep {times[0]} and takes its steps in order with the same images: "
                f"timestep {expected} has to come now, got {t} and images of shape {tuple(x_t.shape)}. To start "
                "elsewhere use DDPMExtScheduler.from_config(scheduler.config)."
            )
        row = self._rows[t]
        now = estimate(prediction, x_t, row.estimate, self.options.clip if self._clips else None)
        if now.eps is prediction and self._order > 1:
            now = Estimate(now.x_0, prediction.clone())  # the network may reuse the memory of its output
        x_s = solver_step(now, self._before, row.jump)
        self._before, self._next = (now, *self._before)[: self._order - 1], self._next + 1
        return x_s, now.x_0

    def _step_by_table(self, prediction: Tensor, t: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """The same without a look at t: weights from a table, no branch on them, NaN for a step out of turn."""
        kept, t = 2 * (self._order - 1), t.reshape(())
        before, last = self._stack, self._last
        if before is None or last is None or before.shape[1:] != x_t.shape:
            before, last = x_t.new_zeros(kept, *x_t.shape), torch.full_like(t, -1)
        row = self._table_on(x_t.device).index_select(0, t.reshape(1))[0]
        first = row[-1] < 0
        row = torch.where(first | (row[-1] == last), row, torch.nan).to(x_t.dtype)
        before = torch.where(first, 0.0, before)
        x_0 = images.clip_x_0(row[0] * x_t + row[1] * prediction, self.options.clip if self._clips else None)
        eps = row[2] * x_t + row[3] * prediction + row[4] * x_0
        x_s = row[5] * x_0 + row[6] * eps
        if kept:
            x_s = x_s + (row[7:-1].reshape(-1, *(1,) * x_t.ndim) * before).sum(0)
        self._stack, self._last = torch.cat([x_0[None], eps[None], before])[:kept], t
        return x_s, x_0

    def _table_on(self, device: torch.device) -> Tensor:
        if device not in self._tables_of_rows:
            rows = self._tables_of_rows[torch.device("cpu")]
            self._tables_of_rows[device] = rows.to(widest_float(device)).to(device)
        return self._tables_of_rows[device]

    def _warn_of_other_setting(self, setting: Config) -> None:
        here = setting_of(self)
        changed = [
            f"{name} {setting.get(name)!r} -> {here[name]!r}" for name in here if here[name] != setting.get(name)
        ]
        if setting and changed:
            warnings.warn(
                f"The solver was fitted under other options ({', '.join(changed)}): it is not the best under these. "
                "Calibrate again.",
                stacklevel=3,
            )


def _rows_of(
    tables: Tables, solver: Solver, prediction_type: process.PredictionType, reference: ReferenceKind
) -> dict[int, _Row]:
    """The weights of every visited step, in order."""
    found: dict[int, _Row] = {}
    for i, (t, s, row) in enumerate(zip(solver.times, solver.targets, solver.coefficients.tolist(), strict=True)):
        weights = jump_weights(tables, t, s, row, min(i, solver.order - 1))
        found[t] = _Row(estimate_weights(tables, t, prediction_type, reference), weights)
    return found


def _weights_by_step(rows: Mapping[int, _Row], T: int, width: int) -> Tensor:
    """All weights by timestep, with the step that comes before in the last column; NaN where none is visited."""
    lines = []
    for before, row in zip([-1, *rows], rows.values(), strict=False):
        history = [*row.jump.of_x_0_before, *row.jump.of_eps_before]
        history[::2], history[1::2] = row.jump.of_x_0_before, row.jump.of_eps_before
        padding = [0.0] * (width - len(history))
        lines.append([*row.estimate, row.jump.of_x_0, row.jump.of_eps, *history, *padding, float(before)])
    table = torch.full((T, len(lines[0])), torch.nan, dtype=torch.float64)
    table[list(rows)] = torch.tensor(lines, dtype=torch.float64)
    return table
