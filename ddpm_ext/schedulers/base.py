"""What the schedulers of ours share: Diffusers' options, the schedule's tables, the forward process, a portable config.

Diffusers' words (`sample`, `model_output`, `timestep`) are kept in the signatures and renamed on the first lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from torch import Tensor

from ..diffusion import process
from ..diffusion.schedules import Tables, make_tables
from ..diffusion.words import BetaSchedule, PredictionType, TimestepSpacing, VarianceType
from ..errors import UserError
from .arithmetic import mix
from .checks import Timesteps, as_steps, check_one_per_image
from .config import SchedulerOptions, check_terminal_snr, read_options
from .portable import true_config, true_defaults

__all__ = ["BaseScheduler"]


class BaseScheduler(SchedulerMixin, ConfigMixin):
    """Options and forward process of a DDPM; a subclass takes the steps back.

    What the options mean stands at `DDPMExtScheduler`.
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
        self._take_options()
        check_terminal_snr(self.options, self.tables)
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
        self._visit(list(range(num_train_timesteps - 1, -1, -1)), device=None)
        self._options_changed()

    # -- options ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Return a scheduler from the config of this class or of any compatible stock scheduler; see `true_config`."""
        if isinstance(config, dict):
            config = true_config(config, cls)
            kwargs = {k: v for k, v in true_config(kwargs, cls).items() if k != "_use_default_values"}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def register_to_config(self, **kwargs: Any) -> None:
        """Register options after construction: they take effect at once, or not at all when they are not allowed.

        Diffusers' `from_config` and pipelines register in this way. The schedule itself stays what it was built as.
        """
        before = self.__dict__.get("_internal_dict")
        if "_use_default_values" in kwargs:
            kwargs["_use_default_values"] = true_defaults(kwargs, type(self))
        super().register_to_config(**kwargs)
        if "_options" in self.__dict__:
            try:
                self._take_options()
                self._options_changed()  # here and not in the first step, which may be compiled
            except UserError:
                self._internal_dict = before
                raise

    @property
    def options(self) -> SchedulerOptions:
        """The options that a step needs, parsed once from the config."""
        if self._parsed is not self._internal_dict:  # an option was registered anew
            self._take_options()
        return self._options

    def _take_options(self) -> None:
        self._options: SchedulerOptions = read_options(self.config)
        self._parsed = self._internal_dict

    def _options_changed(self) -> None:
        """Make what rests on the options, here nothing: called when they are given, and when one is registered anew."""

    @property
    def variance_type(self) -> VarianceType:
        """The config's, under the name by which stock schedulers read it."""
        return self.config["variance_type"]

    # -- the forward process ----------------------------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Timesteps) -> Tensor:
        r"""Return x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε.

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
        return mix(original_samples, signal, noise, spread).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Timesteps) -> Tensor:
        r"""Return v = √ᾱ_t ε - √(1-ᾱ_t) x_0.

        Args:
            sample: x_0, shape (B, …).
            noise: ε, same shape.
            timesteps: As in `add_noise`.

        Source: Salimans & Ho 2022, arXiv:2202.00512, Appendix D.
        """
        process.check_same_shape("sample", sample, "noise", noise)
        signal, spread = self._marginal(timesteps, sample)
        return mix(noise, signal, sample, -spread).to(sample.dtype)

    def scale_model_input(self, sample: Tensor, timestep: Timesteps | None = None) -> Tensor:
        """Return the sample itself: DDPM's network takes x_t as it is."""
        return sample

    def __len__(self) -> int:
        return self.tables.num_timesteps

    # -- inside -----------------------------------------------------------------------------------------------------

    def _visit(self, times: list[int], device: str | torch.device | None) -> None:
        """Take the steps that sampling visits, code indices, descending."""
        self._times, self.timesteps = times, torch.tensor(times, dtype=torch.int64, device=device)

    def _not_scheduled(self, index: int) -> str:
        times = self._times
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
