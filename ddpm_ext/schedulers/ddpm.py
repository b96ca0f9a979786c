r"""DDPMExtScheduler: the diffusion process behind Diffusers' scheduler signatures. No formula of its own.

Diffusers' words (`sample`, `model_output`, `timestep`) are kept in the signatures and renamed on the first lines.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ..diffusion import images, process, reverse
from ..diffusion.process import Gaussian
from ..diffusion.reverse import ReverseStep
from ..diffusion.words import (
    EXTENSION_KEY,
    LEARNED_VARIANCES,
    DecoderVariance,
    Trajectory,
)
from ..errors import UserError
from .arithmetic import add_to_noise, draw_noise, mix
from .base import BaseScheduler
from .checks import (
    Generators,
    Timesteps,
    as_int,
    as_steps,
    check_generators,
    check_ints,
    check_one_per_image,
)
from .config import (
    GuidanceSetting,
    SchedulerOptions,
    guidance_setting,
    warn_of_other_guidance,
)
from .portable import stock_words
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


class DDPMExtScheduler(BaseScheduler, SchedulerMixin):
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

    # -- options ----------------------------------------------------------------------------------------------------

    def _options_changed(self) -> None:
        self._table: StepTable = make_step_table(self.tables, self._times, self.options)

    def warn_of_guidance(self, here: GuidanceSetting) -> None:
        """Warn when the network is used with another class guidance than variances and steps were measured with."""
        options, extra = self.options, self.options.extension
        if options.variance_type == "analytic" or extra.trajectory == "optimal":
            there = guidance_setting(vars(extra), len(self))
            warn_of_other_guidance("The variances of this scheduler were measured", there, here)

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
            assert num_inference_steps is not None  # one of the two is given
            times = chosen_timesteps(self.tables, self.options, num_inference_steps, trajectory)[::-1]
        table = make_step_table(self.tables, times, self.options)
        check_usable(table)
        self._visit(times, device)
        self._table = table
        self.num_inference_steps = len(times)
        self.custom_timesteps = timesteps is not None

    def previous_timestep(self, timestep: Timesteps) -> Tensor:
        """Return the step that the reverse chain visits after `timestep`; -1 is the clean image.

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
        r"""Take one step back: x_s = c1 x̂_0 + c2 x_t + σ z, without noise on the last jump.

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
            x_s = mix(x_0, weights.c1, x_t, weights.c2)
        else:
            z = draw_noise(sample, generator).to(dtype)
            std = weights.std if head is None else _learned_std(weights, head.to(dtype), options)
            x_s = add_to_noise(z, std, x_0, weights.c1, x_t, weights.c2)
        if options.extension.eta != 1:
            x_s = x_s + weights.c3 * prediction

        x_s, x_0 = x_s.to(sample.dtype), x_0.to(sample.dtype)
        return DDPMSchedulerOutput(prev_sample=x_s, pred_original_sample=x_0) if return_dict else (x_s, x_0)

    def p_mean_variance(
        self, model_output: Tensor, timestep: Timesteps, sample: Tensor, *, decoder_variance: DecoderVariance = "base"
    ) -> ReverseStep:
        """Return p(x_s | x_t) of the current chain as (mean, var, log_var, x̂_0); see `reverse.p_mean_variance`.

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
        last = reverse.decoder_log_var(self.tables, self._times[::-1], decoder_variance).item()
        return reverse.p_mean_variance(
            model_output,
            sample,
            t,
            self._tables_on(t.device),
            prediction_type=options.prediction_type,
            variance_type=options.variance_type,
            clip=options.clip,
            respaced=reverse.Respaced(s, last, table.on(t.device).log_optimal[t] if analytic else None),
        )

    def q_posterior(self, x_0: Tensor, x_t: Tensor, timestep: Timesteps) -> Gaussian:
        """Return q(x_s | x_t, x_0) of the current chain as (mean, var); `process.q_posterior`.

        Args:
            x_0: Clean images in [-1, 1], shape (B, C, H, W).
            x_t: Noised images, same shape.
            timestep: As in `step`.
        """
        t, s = self._jump_times(timestep, x_t)
        return process.q_posterior(x_0, x_t, t, self._tables_on(t.device), s)

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

    def _current_table(self) -> StepTable:
        options = self.options
        if self._table.options is not options:  # an option was registered anew
            self._table = make_step_table(self.tables, self._times, options)
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


def _predict_x_0(prediction: Tensor, x_t: Tensor, weights: Weights, options: SchedulerOptions) -> Tensor:
    if options.prediction_type == "sample":
        return images.clip_x_0(prediction, options.clip)
    x_0 = mix(x_t, weights.of_x_t, prediction, weights.of_output)
    clip = options.clip
    return x_0.clamp_(-clip, clip) if isinstance(clip, int | float) else images.clip_x_0(x_0, clip)


def _learned_std(weights: Weights, head: Tensor, options: SchedulerOptions) -> Tensor:
    # Floats stay floats: copying them to an accelerator would make the host wait.
    small, large, noisy = weights.log_small, weights.log_large, weights.noisy
    log_var = reverse.reverse_log_var(options.variance_type, small, large, noisy == 0, head)
    return (0.5 * log_var).exp() * noisy
