r"""DDPMExtScheduler: the diffusion process behind Diffusers' scheduler signatures. No formula of its own.

Diffusers' words (`sample`, `model_output`, `timestep`) are kept in the signatures and renamed on the first lines.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from torch import Tensor

from ..diffusion import images, process, reverse
from ..diffusion.process import Gaussian
from ..diffusion.reverse import ReverseStep
from ..diffusion.schedules import make_tables
from ..diffusion.tables import Tables
from ..diffusion.words import (
    EXTENSION_KEY,
    LEARNED_VARIANCES,
    BetaSchedule,
    DecoderVariance,
    PredictionType,
    TimestepSpacing,
    Trajectory,
    VarianceType,
)
from ..errors import UserError
from .checks import (
    Generators,
    Timesteps,
    as_int,
    as_steps,
    check_generators,
    check_ints,
    check_one_per_image,
    draw_noise,
)
from .config import (
    GuidanceSetting,
    SchedulerOptions,
    check_terminal_snr,
    guidance_setting,
    parse_options,
    warn_of_other_guidance,
)
from .portable import stock_words, true_config, true_defaults
from .step_table import (
    StepTable,
    Weights,
    check_usable,
    checked_timesteps,
    chosen_timesteps,
    make_step_table,
    measured_errors,
)

__all__ = ["DDPMExtScheduler"]


class DDPMExtScheduler(SchedulerMixin, ConfigMixin):
    r"""Ancestral sampling of DDPM with float64 tables, any respacing, per-image timesteps and strict input.

        x̂_0     = of_x_t · x_t + of_output · output, clipped                              DDPM Eq. (15)
        x_s      = c1 x̂_0 + c2 x_t + σ z,  z ~ N(0, I), no noise on the last jump          DDPM Eqs. (6)-(7), (11)

    It has every option of `diffusers.DDPMScheduler` under the same name with the same default, and is saved as one:
    a stock pipeline loads what it writes.

    Args:
        num_train_timesteps: T.
        beta_start: β_1, in (0, 1].
        beta_end: β_T, in (0, 1].
        beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2", "laplace" or "sigmoid" (`make_tables`).
        trained_betas: The T betas themselves, in place of a named schedule.
        variance_type: "fixed_small" (β̃), "fixed_large" (b), their "_log" twins (the same variances), "learned" (the
            network's second half is log σ²) or "learned_range" (it interpolates between log β̃ and log b).
        clip_sample: Clamp x̂_0 to ±clip_sample_range.
        prediction_type: "epsilon", "sample", "v_prediction" or "posterior_mean" (μ̃ of the training jump t -> t - 1).
        thresholding: Dynamic thresholding of x̂_0 in place of clipping.
        dynamic_thresholding_ratio: Its quantile, in [0, 1].
        clip_sample_range: In units of x_0, where images span [-1, 1].
        sample_max_value: Largest threshold of dynamic thresholding.
        timestep_spacing: "leading", "linspace" or "trailing" (`respaced_timesteps`).
        steps_offset: Added to "leading" timesteps.
        rescale_betas_zero_snr: Make ᾱ_T exactly 0; needs a prediction other than epsilon where T - 1 is visited.

    Raises:
        UserError: an option that is not one of its words, betas outside (0, 1] or NaN, trained_betas whose length is
            not T, T < 1, or epsilon prediction where ᾱ_t = 0 would be used.

    Example:
        >>> scheduler = DDPMExtScheduler(variance_type="fixed_large")
        >>> scheduler.set_timesteps(4)
        >>> scheduler.timesteps.tolist()
        [750, 500, 250, 0]

    Source: Ho et al. 2020, arXiv:2006.11239.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]  # noqa: RUF012 (Diffusers' contract)
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: BetaSchedule = "linear",
        trained_betas: np.ndarray | Sequence[float] | Tensor | None = None,
        variance_type: VarianceType = "fixed_small",
        clip_sample: bool = True,
        prediction_type: PredictionType = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: TimestepSpacing = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        betas = None if trained_betas is None else torch.as_tensor(trained_betas, dtype=torch.float64)
        if betas is not None:
            self.register_to_config(trained_betas=betas.tolist())  # what JSON can hold
        self.tables: Tables = make_tables(
            beta_schedule, num_train_timesteps, beta_start, beta_end, betas, rescale_betas_zero_snr
        )
        options = parse_options(self.config)
        check_terminal_snr(options, self.tables)
        self._device_tables: dict[torch.device, Tables] = {}
        self._device_roots: dict[tuple[torch.device, torch.dtype], Tensor] = {}

        # Float32 views, for code that reads a stock scheduler's attributes.
        self.betas = self.tables.beta.float()
        self.alphas = self.tables.alpha.float()
        self.alphas_cumprod = self.tables.alpha_bar.float()
        self.init_noise_sigma = 1.0

        self.custom_timesteps = False
        self.num_inference_steps: int | None = None
        # Nobody has asked for the full chain yet: `step` refuses the one timestep that epsilon may not be able to take.
        full_chain = list(range(num_train_timesteps - 1, -1, -1))
        self._start(make_step_table(self.tables, full_chain, options), device=None)

    # -- config: one key of ours, stock words on disk ---------------------------------------------------------------

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Return a scheduler from the config of this class or of any compatible stock scheduler; see `true_config`."""
        if isinstance(config, dict):
            config = true_config(config, cls)
            kwargs = {k: v for k, v in true_config(kwargs, cls).items() if k != "_use_default_values"}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def register_to_config(self, **kwargs: Any) -> None:
        """Options registered after construction take effect at once, or not at all when they are not allowed.

        Diffusers' `from_config` and pipelines register in this way. The schedule itself stays what it was built as.
        """
        before = self.__dict__.get("_internal_dict")
        if "_use_default_values" in kwargs:
            kwargs["_use_default_values"] = true_defaults(kwargs, type(self))
        super().register_to_config(**kwargs)
        if "_table" in self.__dict__:
            try:
                self._current_table()  # here and not in the first step, which may be compiled
            except UserError:
                self._internal_dict = before
                raise

    @property
    def options(self) -> SchedulerOptions:
        """The options that a step needs, parsed once from the config."""
        return self._current_table().options

    def warn_of_guidance(self, here: GuidanceSetting) -> None:
        """Warn when the network is used with another class guidance than variances and steps were measured with."""
        options, extra = self.options, self.options.extension
        if options.variance_type == "analytic" or extra.trajectory == "optimal":
            there = guidance_setting(vars(extra), len(self))
            warn_of_other_guidance("The variances of this scheduler were measured", there, here)

    @property
    def variance_type(self) -> VarianceType:
        """The config's, under the name by which stock schedulers read it."""
        return self.config["variance_type"]

    def to_json_string(self) -> str:
        """Return the portable config: stock's class name and values that stock samples rightly, ours in `_ddpm_ext`.

        What stock cannot sample at all keeps a word that stock refuses, so that it raises instead of drawing a wrong
        image.
        """
        text = super().to_json_string()
        if type(self) is not DDPMExtScheduler:
            return text
        config = json.loads(text)
        words = stock_words(config)
        if words:
            true_words = {key: config[key] for key in words}
            config[EXTENSION_KEY] = {**config.get(EXTENSION_KEY, {}), "words": true_words}
        config = {**config, **words, "_class_name": "DDPMScheduler"}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    # -- timesteps --------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | Tensor | np.ndarray | None = None,
        trajectory: Trajectory | None = None,
    ) -> None:
        """Choose the steps that sampling visits.

        Args:
            num_inference_steps: K, an int in [1, T], spaced by the config's `timestep_spacing`.
            device: Where `.timesteps` lives; None leaves it on the CPU.
            timesteps: The steps themselves, strictly descending ints in [0, T), in place of K.
            trajectory: "even" (both ends, equal distances) or "optimal" (`analytic.optimal_trajectory`, from the
                measured mse_eps) in place of the spacing; None is the default that `_ddpm_ext` names.

        Raises:
            UserError: neither or both given, K that is not an int in [1, T], or timesteps that are empty, fractional,
                repeated, ascending or outside [0, T). The scheduler stays as it was.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise UserError(
                "set_timesteps needs num_inference_steps or timesteps, one of the two, got "
                + ("neither." if timesteps is None else "both.")
            )
        if timesteps is not None:
            if trajectory is not None:
                raise UserError("timesteps and trajectory both name the steps: give one of them.")
            times = checked_timesteps(timesteps, len(self))
        else:
            times = chosen_timesteps(self.tables, self.options, num_inference_steps, trajectory)[::-1]
        table = make_step_table(self.tables, times, self.options)
        check_usable(table)
        self._start(table, device)
        self.num_inference_steps = len(times)
        self.custom_timesteps = timesteps is not None

    def previous_timestep(self, timestep: Timesteps) -> Tensor:
        """The step that the reverse chain visits after `timestep`; -1 is the clean image.

        Args:
            timestep: int, 0-d or (B,) tensor of steps in the current schedule.

        Returns:
            int64, the shape and device of timestep.
        """
        t = as_steps("timestep", timestep)
        self._check_steps(t)
        return process.entries(self._current_table().on(t.device).previous, t)

    # -- the reverse process ----------------------------------------------------------------------------------------

    def step(
        self,
        model_output: Tensor,
        timestep: Timesteps,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        r"""One step back: x_s = c1 x̂_0 + c2 x_t + σ z, without noise on the last jump.

        Args:
            model_output: The network's output, shape (B, C, …), or (B, 2C, …) for the learned variances.
            timestep: The step of the sample: an int, a 0-d tensor, or one per image, shape (B,); 0 <= t < T and in the
                current schedule.
            sample: x_t, shape (B, C, …).
            generator: Source of z; a list of B makes every image independent of its batch.
            return_dict: False for the tuple (prev_sample, pred_original_sample).

        Returns:
            prev_sample x_s and pred_original_sample x̂_0, in the sample's shape and dtype.

        Raises:
            UserError: shapes that do not fit, a timestep that is not in the schedule (on an accelerator, where
                looking would make the host wait, the result is NaN instead), or a list of generators that is not one
                per image.

        Source: Ho et al. 2020, arXiv:2006.11239, Algorithm 2, Eqs. (6)-(7).
        """
        table = self._current_table()
        options = table.options
        if options.lacks_errors:
            measured_errors(options, 'variance_type "analytic"')
        prediction, head = reverse.split_output(model_output, sample, options.variance_type)
        dtype = process.compute_dtype(sample)
        x_t, prediction = sample.to(dtype), prediction.to(dtype)
        weights = self._weights(table, timestep, x_t)

        x_0 = _predict_x_0(prediction, x_t, weights, options)
        if isinstance(weights.noisy, float) and not weights.noisy:
            check_generators(generator, sample.shape[0])
            x_s = _mix(x_0, weights.c1, x_t, weights.c2)
        else:
            z = draw_noise(sample, generator).to(dtype)
            std = weights.std if head is None else _learned_std(weights, head.to(dtype), options)
            x_s = _add_to_noise(z, std, x_0, weights.c1, x_t, weights.c2)
        if options.extension.eta != 1:
            x_s = x_s + weights.c3 * prediction

        x_s, x_0 = x_s.to(sample.dtype), x_0.to(sample.dtype)
        return DDPMSchedulerOutput(prev_sample=x_s, pred_original_sample=x_0) if return_dict else (x_s, x_0)

    def p_mean_variance(
        self, model_output: Tensor, timestep: Timesteps, sample: Tensor, *, decoder_variance: DecoderVariance = "base"
    ) -> ReverseStep:
        """p(x_s | x_t) of the current chain as (mean, var, log_var, pred_original_sample); `reverse.p_mean_variance`.

        Args:
            model_output: As in `step`.
            timestep: As in `step`.
            sample: x_t.
            decoder_variance: Which log σ² stands at the last jump (`reverse.decoder_log_var`).
        """
        table = self._current_table()
        options = table.options
        if options.extension.eta != 1:
            raise UserError("p(x_s | x_t) of the bound is DDPM's: it needs eta = 1 in the config's _ddpm_ext.")
        if options.lacks_errors:
            measured_errors(options, 'variance_type "analytic"')
        t, s = self._jump_times(timestep, sample)
        analytic = options.variance_type == "analytic"
        last = reverse.decoder_log_var(self.tables, table.timesteps[::-1], decoder_variance)
        return reverse.p_mean_variance(
            model_output,
            sample,
            t,
            self._tables_on(t.device),
            s=s,
            prediction_type=options.prediction_type,
            variance_type=options.variance_type,
            clip=options.clip,
            last_log_var=last.item(),
            log_optimal=table.on(t.device).log_optimal[t] if analytic else None,
        )

    def q_posterior(self, x_0: Tensor, x_t: Tensor, timestep: Timesteps) -> Gaussian:
        """q(x_s | x_t, x_0) of the current chain as (mean, var); `process.q_posterior`.

        Args:
            x_0: Clean images in [-1, 1], shape (B, C, H, W).
            x_t: Noised images, same shape.
            timestep: As in `step`.
        """
        t, s = self._jump_times(timestep, x_t)
        return process.q_posterior(x_0, x_t, t, self._tables_on(t.device), s)

    # -- the forward process ----------------------------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Timesteps) -> Tensor:
        r"""x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε.

        Args:
            original_samples: x_0, shape (B, …).
            noise: ε, same shape.
            timesteps: 0 <= t < T; one per image, shape (B,), or one for all: an int, shape () or (1,).

        Returns:
            x_t in x_0's shape and dtype.

        Source: Ho et al. 2020, arXiv:2006.11239, Eq. (4).
        """
        process.check_same_shape("original_samples", original_samples, "noise", noise)
        signal, spread = self._marginal(timesteps, original_samples)
        return _mix(original_samples, signal, noise, spread).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Timesteps) -> Tensor:
        r"""v = √ᾱ_t ε - √(1-ᾱ_t) x_0.

        Args:
            sample: x_0, shape (B, …).
            noise: ε, same shape.
            timesteps: As in `add_noise`.

        Source: Salimans & Ho 2022, arXiv:2202.00512, Appendix D.
        """
        process.check_same_shape("sample", sample, "noise", noise)
        signal, spread = self._marginal(timesteps, sample)
        return _mix(noise, signal, sample, -spread).to(sample.dtype)

    def scale_model_input(self, sample: Tensor, timestep: Timesteps | None = None) -> Tensor:
        """The sample itself: DDPM's network takes x_t as it is."""
        return sample

    def __len__(self) -> int:
        return self.tables.num_timesteps

    # -- inside -----------------------------------------------------------------------------------------------------

    def _get_variance(self, t: Timesteps, predicted_variance: Tensor | None = None) -> Tensor:
        """σ² with which `step` samples at t, 0 at the last jump. Diffusers' name for it."""
        t = as_steps("timestep", t)
        weights = self._weights(self._current_table(), t, torch.empty(t.numel(), dtype=torch.float64))
        if self.variance_type not in LEARNED_VARIANCES:
            return torch.as_tensor(weights.std, dtype=torch.float64) ** 2
        if predicted_variance is None:
            raise UserError(f'variance_type "{self.variance_type}" needs predicted_variance, got none.')
        return _learned_std(weights, predicted_variance, self.options) ** 2

    def _start(self, table: StepTable, device: str | torch.device | None) -> None:
        self.timesteps = torch.tensor(table.timesteps, dtype=torch.int64, device=device)
        self._table, self._parsed = table, self._internal_dict

    def _current_table(self) -> StepTable:
        if self._parsed is not self._internal_dict:  # an option was registered anew
            self._table = make_step_table(self.tables, self._table.timesteps, parse_options(self.config))
            self._parsed = self._internal_dict
        return self._table

    def _weights(self, table: StepTable, timestep: Timesteps, x: Tensor) -> Weights:
        if torch.compiler.is_compiling():
            timestep = torch.as_tensor(timestep, device=x.device)
        elif not isinstance(timestep, Tensor) or (timestep.ndim == 0 and timestep.device.type == "cpu"):
            index = as_int(timestep)
            if index not in table.floats:
                raise UserError(self._not_scheduled(index))
            return table.floats[index]
        self._check_steps(timestep)
        check_one_per_image("timestep", timestep, x)
        return table.weights(as_steps("timestep", timestep, x.device), x)

    def _jump_times(self, timestep: Timesteps, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_steps(timestep if isinstance(timestep, Tensor) else as_steps("timestep", timestep))
        t = as_steps("timestep", timestep, x.device)
        check_one_per_image("timestep", t, x)
        t = t.reshape(-1).expand(x.shape[0])
        return t, self._current_table().on(t.device).previous[t]

    def _check_steps(self, t: Tensor) -> None:
        check_ints("timestep", t)
        if t.device.type == "cpu" and not torch.compiler.is_compiling():
            visited = self._current_table().floats
            for index in set(t.reshape(-1).tolist()):
                if index not in visited:
                    raise UserError(self._not_scheduled(index))

    def _not_scheduled(self, index: int) -> str:
        times = self._current_table().timesteps
        if index in times:
            return (
                f"At timestep {index} the signal is gone (ᾱ_t = 0) and epsilon prediction has no x_0 there. Use "
                'prediction_type "v_prediction" or "sample", or timesteps that leave it out.'
            )
        shown = ", ".join(map(str, times[:3])) + (f", …, {times[-1]}" if len(times) > 3 else "")
        return (
            f"timestep {index} is not in the current schedule of {len(times)} steps ({shown}). Take it from "
            ".timesteps, or choose the steps with set_timesteps."
        )

    def _marginal(self, timesteps: Timesteps, x: Tensor) -> tuple[Tensor, Tensor]:
        """(√ᾱ_t, √(1-ᾱ_t)) of each image, shaped beside it, in the dtype in which it is computed."""
        t = as_steps("timesteps", timesteps, x.device)
        check_one_per_image("timesteps", t, x)
        roots = self._roots_on(x.device, process.compute_dtype(x))
        try:
            signal, spread = roots.index_select(1, t.reshape(-1))
        except (
            IndexError,
            RuntimeError,
        ):  # on the CPU the look-up itself checks; on an accelerator it stops the kernel
            low, high = int(t.min()), int(t.max())
            if 0 <= low and high < len(self):
                raise
            raise UserError(f"timesteps must lie in 0..{len(self) - 1}, got values from {low} to {high}.") from None
        shape = (-1, *(1,) * (x.ndim - 1))
        return signal.view(shape), spread.view(shape)

    def _tables_on(self, device: torch.device) -> Tables:
        if device.type == "cpu":
            return self.tables
        if device not in self._device_tables:
            self._device_tables[device] = self.tables.to(device)
        return self._device_tables[device]

    def _roots_on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Rows √ᾱ and √(1-ᾱ) of all steps, rounded once to the dtype, (2, T)."""
        if (device, dtype) not in self._device_roots:
            tables = self._tables_on(device)
            roots = torch.stack([tables.alpha_bar.sqrt(), tables.one_minus_alpha_bar.sqrt()])
            self._device_roots[device, dtype] = roots.to(dtype)
        return self._device_roots[device, dtype]


def _predict_x_0(prediction: Tensor, x_t: Tensor, weights: Weights, options: SchedulerOptions) -> Tensor:
    if options.prediction_type == "sample":
        return images.clip_x_0(prediction, options.clip)
    x_0 = _mix(x_t, weights.of_x_t, prediction, weights.of_output)
    clip = options.clip
    return x_0.clamp_(-clip, clip) if isinstance(clip, int | float) else images.clip_x_0(x_0, clip)


def _learned_std(weights: Weights, head: Tensor, options: SchedulerOptions) -> Tensor:
    # Floats stay floats: copying them to an accelerator would make the host wait.
    small, large, noisy = weights.log_small, weights.log_large, weights.noisy
    log_var = reverse.reverse_log_var(options.variance_type, small, large, noisy == 0, head)
    return (0.5 * log_var).exp() * noisy


def _mix(x: Tensor, x_weight: Any, y: Tensor, y_weight: Any) -> Tensor:
    """x_weight · x + y_weight · y in two passes; floats for one t, (B, 1, 1, 1) tensors for one t per image."""
    if isinstance(x_weight, float):
        return torch.mul(x, x_weight).add_(y, alpha=y_weight)
    return torch.addcmul(x * x_weight, y.to(x_weight.dtype), y_weight)  # the weights' dtype is at least float32


def _add_to_noise(z: Tensor, std: Any, x: Tensor, x_weight: Any, y: Tensor, y_weight: Any) -> Tensor:
    """std · z + x_weight · x + y_weight · y in the noise's own memory where floats allow it, in y's layout."""
    z = z if z.stride() == y.stride() else torch.empty_like(y).copy_(z)
    noise = z.mul_(std) if isinstance(std, float) else std * z
    if isinstance(x_weight, float):
        return noise.add_(x, alpha=x_weight).add_(y, alpha=y_weight)
    return noise.addcmul(x, x_weight).addcmul(y, y_weight)
