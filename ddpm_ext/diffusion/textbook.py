r"""The textbook class: DDPM in five short methods, for readers and notebooks.

It is built on the same files as the scheduler, so its chain equals the scheduler's on the same noise. Its argument
names x0 and xt are the textbook's; steps count from 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import check_word
from .losses import training_loss, uniform_timesteps
from .process import Gaussian, per_image, q_marginal, q_sample
from .reverse import p_mean_variance
from .schedules import make_tables, warn_if_signal_remains
from .words import VarianceType

__all__ = ["DenoiseDiffusion"]

Sigma2 = Literal["beta", "posterior"]
VARIANCES: dict[Sigma2, VarianceType] = {"beta": "fixed_large", "posterior": "fixed_small"}


class DenoiseDiffusion:
    r"""A denoising diffusion probabilistic model around a noise-predicting network.

    Args:
        eps_model: ε_θ(x_t, t): any callable of images (B, C, H, W) and steps (B,) that returns ε̂ in the shape of x_t,
            as a tensor or as an object with `.sample` (a `UNet2DModel`).
        n_steps: T.
        device: Where tables, steps and noise live.
        beta_start: β_1 of the linear schedule.
        beta_end: β_T.
        sigma2: The reverse variance, "beta" (σ² = β_t) or "posterior" (σ² = β̃_t).

    Attributes:
        beta: β_t, float64, shape (T,), as the next three.
        alpha: α_t = 1 - β_t.
        alpha_bar: ᾱ_t = Π α.
        sigma2: σ²_t of the reverse step.
        n_steps: T.

    Raises:
        UserError: sigma2 is neither word, T < 1, or betas outside (0, 1].

    Example:
        >>> diffusion = DenoiseDiffusion(lambda x_t, t: x_t, n_steps=1000, device="cpu")
        >>> print(f"{diffusion.alpha_bar[-1].item():.3e}")  # what is left of the signal at the last step
        4.036e-05

    Source: Ho et al. 2020, arXiv:2006.11239, §2-3, Algorithms 1 and 2.
    """

    def __init__(
        self,
        eps_model: Callable[[Tensor, Tensor], Any],
        n_steps: int,
        device: torch.device | str,
        *,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        sigma2: Sigma2 = "beta",
    ) -> None:
        check_word("sigma2", sigma2, get_args(Sigma2))
        self.eps_model = eps_model
        self.tables = make_tables("linear", n_steps, beta_start, beta_end).to(device)
        warn_if_signal_remains(self.tables)
        self.n_steps = n_steps
        self.beta, self.alpha, self.alpha_bar = self.tables.beta, self.tables.alpha, self.tables.alpha_bar
        before = torch.cat([self.tables.one_minus_alpha_bar.new_zeros(1), self.tables.one_minus_alpha_bar[:-1]])
        posterior = self.beta * before / self.tables.one_minus_alpha_bar
        self.sigma2 = self.beta if sigma2 == "beta" else posterior
        self._variance_type: VarianceType = VARIANCES[sigma2]

    def q_xt_x0(self, x0: Tensor, t: Tensor) -> Gaussian:
        r"""Return q(x_t | x_0) = N(√ᾱ_t x_0, (1 - ᾱ_t) I), Eq. (4).

        Args:
            x0: Clean images in [-1, 1], shape (B, C, H, W).
            t: int64, shape (B,), 0 <= t < T.

        Returns:
            (mean, var) with shapes (B, C, H, W) and (B, 1, 1, 1).
        """
        return q_marginal(x0, t, self.tables)

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor | None = None) -> Tensor:
        r"""Return x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε, Eq. (4).

        Args:
            x0: Clean images in [-1, 1], shape (B, C, H, W).
            t: int64, shape (B,), 0 <= t < T.
            eps: The noise; None draws it.
        """
        return q_sample(x0, t, torch.randn_like(x0) if eps is None else eps, self.tables)

    def p_sample(self, xt: Tensor, t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        r"""Return x_{t-1} = (x_t - β_t/√(1-ᾱ_t) ε_θ(x_t, t)) / √α_t + σ_t z, Eq. (11); no noise at t = 0.

        Args:
            xt: Noised images, shape (B, C, H, W).
            t: int64, shape (B,), 0 <= t < T.
            generator: Source of z.
        """
        step = p_mean_variance(
            self._eps(xt, t), xt, t, self.tables, prediction_type="epsilon", variance_type=self._variance_type
        )
        z = torch.randn(xt.shape, generator=generator, device=xt.device, dtype=xt.dtype)
        std = self.sigma2[t].sqrt() * (t > 0)
        return torch.addcmul(step.mean, z, per_image(std, xt, xt.dtype))

    def loss(self, x0: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        r"""Return L_simple = E ‖ε - ε_θ(√ᾱ_t x_0 + √(1-ᾱ_t) ε, t)‖² / d, Eq. (14), t uniform; Algorithm 1.

        Args:
            x0: Clean images in [-1, 1], shape (B, C, H, W).
            noise: ε; None draws it.
            generator: Source of t, then of ε.

        Returns:
            0-d, the mean over images and dimensions.
        """
        t = uniform_timesteps(x0.shape[0], self.n_steps, generator=generator, device=x0.device)
        if noise is None:
            noise = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
        x_t = q_sample(x0, t, noise, self.tables)
        return training_loss(self._eps(x_t, t), x0, x_t, noise, t, self.tables).mean()

    def _eps(self, x_t: Tensor, t: Tensor) -> Tensor:
        output = self.eps_model(x_t, t)
        return output if isinstance(output, Tensor) else output.sample
