"""DDPMExtPipeline: noise -> images with a UNet2DModel, and the paper's views of the chain.

What it saves is portable: a stock `diffusers.DDPMPipeline` loads and samples it without this package.
"""

import inspect
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, ImagePipelineOutput, UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from typing_extensions import Unpack

from ..diffusion.words import LEARNED_VARIANCES
from ..errors import UserError, check_word
from ..models.classes import ClassLabels, check_labels
from ..schedulers.base import BaseScheduler
from ..schedulers.checks import Generators
from ..schedulers.ddpm import DDPMExtScheduler
from ..schedulers.solver import DDPMExtSolverScheduler, is_portable_solver
from .config import GuidanceOptions
from .guidance import Guidance, guided_prediction, make_guidance, setting_of, warn_of_no_guidance
from .inputs import (
    Images,
    OutputType,
    check_scheduler,
    checked_output_type,
    clean_image,
    prepare_latents,
    set_timesteps,
    times_from,
    to_output,
)
from .loading import check_parts
from .locate import find_pipeline
from .portable import PortablePipeline

__all__ = ["DDPMExtPipeline", "DivergenceError", "OutputType", "Progress", "load_pipeline"]

Callback = Callable[["DDPMExtPipeline", int, Tensor, dict[str, Tensor | None]], dict[str, Tensor] | None]

AfterStep = Callable[[int, Tensor, Tensor, Tensor | None], Tensor]  # (number, t, x_s, x̂_0) -> x_s


class DivergenceError(UserError, FloatingPointError):
    """The network's output or the images are not finite."""


class Progress(NamedTuple):
    """One step of the reverse process, before it is taken."""

    t: int  # code index, 0 <= t < T
    x_t: Tensor  # (B, C, H, W)
    x_0: Tensor | None  # x̂_0(x_t), (B, C, H, W), about [-1, 1]; None where the scheduler does not tell


class DDPMExtPipeline(PortablePipeline):
    """Unconditional or class-conditional image generation by ancestral sampling.

    Args:
        unet: A `UNet2DModel` that predicts what the scheduler's `prediction_type` says.
        scheduler: `DDPMExtScheduler`, or any Diffusers scheduler. A stock `DDPMScheduler` is turned into
            `DDPMExtScheduler` with the same options, a calibrated one into the `DDPMExtSolverScheduler` it is.

    Example:
        >>> from ddpm_ext import DDPMExtScheduler, build_unet
        >>> pipe = DDPMExtPipeline(build_unet("digits"), DDPMExtScheduler())  # or .from_pretrained("user/model")
        >>> pipe.set_progress_bar_config(disable=True)
        >>> pipe(batch_size=2, num_inference_steps=3).images[0].size
        (8, 8)
    """

    unet: UNet2DModel
    scheduler: Any  # SchedulerMixin declares no step: what it offers is asked of the object
    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents", "pred_original_sample"]  # noqa: RUF012 (Diffusers' contract)

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin):
        super().__init__()
        if type(scheduler) is DDPMScheduler:
            scheduler = DDPMExtScheduler.from_config(scheduler.config)
        elif type(scheduler) is DPMSolverMultistepScheduler and is_portable_solver(scheduler.config):
            scheduler = DDPMExtSolverScheduler.from_config(scheduler.config)
        self.register_modules(unet=unet, scheduler=scheduler)
        self._interrupt = False

    @property
    def num_timesteps(self) -> int:
        """Length of the chain chosen last. Diffusers' name for it, which callbacks read."""
        return len(self.scheduler.timesteps)

    # -- sampling ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 1000,
        timesteps: Sequence[int] | None = None,
        latents: Tensor | None = None,
        class_labels: ClassLabels = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **guidance: Unpack[GuidanceOptions],
    ) -> ImagePipelineOutput | tuple[Images]:
        """Draw images from noise: Algorithm 2 of DDPM.

        Args:
            batch_size: B, the number of images.
            generator: Source of all noise; a list of B makes every image independent of its batch.
            num_inference_steps: Length of the chain, at most T.
            timesteps: The chain itself, strictly descending, in place of num_inference_steps.
            latents: x_T in place of drawn noise, shape (B, C, H, W).
            class_labels: For class-conditional networks: one label for all images or one per image, or their names.
            output_type: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W) with values in [0, 1], or "latent": x_0 itself,
                about [-1, 1].
            return_dict: False for the tuple (images,).
            callback_on_step_end: Called as (pipeline, i, t, tensors) after every step; what it returns replaces them.
                Setting `pipeline._interrupt = True` in it ends the chain there.
            callback_on_step_end_tensor_inputs: Which tensors it gets: "latents", "pred_original_sample".
            **guidance: Class guidance: guidance_scale w, where 0 is none and Diffusers' usual number is 1 + w, with
                guidance_interval and guidance_rescale, or a guider of Diffusers; see `guidance.GuidanceOptions`.

        Raises:
            UserError: input that does not fit network or scheduler, before the first step.
            DivergenceError: the network's output is not finite; names the step.
        """
        output_type = checked_output_type(output_type, self.unet.config["in_channels"])
        for name in callback_on_step_end_tensor_inputs:
            check_word("callback_on_step_end_tensor_inputs", name, self._callback_tensor_inputs)
        guided = make_guidance(self.unet.config, self._length(), **guidance)
        x_T, labels = self._start(batch_size, generator, num_inference_steps, timesteps, latents, class_labels)

        def after_step(i: int, t: Tensor, x_s: Tensor, x_0: Tensor | None) -> Tensor:
            if callback_on_step_end is None:
                return x_s
            tensors = {"latents": x_s, "pred_original_sample": x_0}
            chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
            return (callback_on_step_end(self, i, t, chosen) or {}).get("latents", x_s)

        images = self._run(x_T, generator, labels, output_type, guided, after_step)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def progressive(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 1000,
        timesteps: Sequence[int] | None = None,
        latents: Tensor | None = None,
        class_labels: ClassLabels = None,
        at: Collection[int] | None = None,
        **guidance: Unpack[GuidanceOptions],
    ) -> Iterator[Progress]:
        """Yield the chain as it runs: (t, x_t, x̂_0(x_t)) at chosen steps (DDPM Figure 6).

        Args:
            batch_size: As in calling the pipeline, and so on.
            generator: As above.
            num_inference_steps: As above.
            timesteps: As above.
            latents: As above.
            class_labels: As above.
            at: The steps to show, each of them in the chain; None for all. The x̂_0 of the last one is the image,
                but under a fitted solver, whose last jump mixes the estimates of several steps.
            **guidance: As above.

        Raises:
            UserError: a step of `at` is not in the chain, or as in calling.
        """
        guided = make_guidance(self.unet.config, self._length(), **guidance)
        x_T, labels = self._start(batch_size, generator, num_inference_steps, timesteps, latents, class_labels)
        missing = set(at or ()) - {int(t) for t in self.scheduler.timesteps}
        if missing:
            raise UserError(f"at must hold steps of the chain, got {sorted(missing)}. The chain is in .timesteps.")
        steps = self._denoise(x_T, generator, labels, guided)
        return (progress for progress, _ in steps if at is None or progress.t in at)

    def interpolate(
        self,
        image_a: Tensor | Image.Image,
        image_b: Tensor | Image.Image,
        timestep: int,
        weights: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
        generator: torch.Generator | None = None,
        num_inference_steps: int | None = None,
        output_type: OutputType = "pil",
        class_labels: ClassLabels = None,
        **guidance: Unpack[GuidanceOptions],
    ) -> ImagePipelineOutput:
        r"""Draw images between two images, mixed after `timestep` forward steps (DDPM Figure 8).

            x_t = (1 - λ) (√ᾱ_t a + √(1-ᾱ_t) ε) + λ (√ᾱ_t b + √(1-ᾱ_t) ε)

        The noise ε, and the noise of the way back, are shared by all λ: only the mixture differs.

        Args:
            image_a: Shape (C, H, W) in [-1, 1], or an image of the network's size.
            image_b: The other.
            timestep: Where they are mixed, 0 <= t < T; large t mix coarse features.
            weights: The λ; 0 is image_a, 1 is image_b.
            generator: Source of the shared noise.
            num_inference_steps: Steps of the way back; None for every step from timestep to 0.
            output_type: As in calling the pipeline.
            class_labels: For class-conditional networks: one label for all images or one per weight.
            **guidance: As in calling the pipeline.

        Returns:
            One image per weight.

        Raises:
            UserError: images that do not fit the network, no weights, or a timestep outside [0, T).
        """
        a, b = (clean_image(image, self.unet, self._execution_device) for image in (image_a, image_b))
        if not len(weights):
            raise UserError("weights must hold at least one number, got none.")
        times = times_from(timestep, num_inference_steps, self._length())
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**63 - 1, ())))
        set_timesteps(self.scheduler, None, times, self._execution_device)
        self._check_units()
        eps = randn_tensor(a.shape, generator=generator, device=a.device, dtype=a.dtype)
        t = torch.full((1,), timestep, device=a.device)
        ends = [self.scheduler.add_noise(image, eps, t) for image in (a, b)]
        mixed = torch.cat([(1 - weight) * ends[0] + weight * ends[1] for weight in weights])
        shared = [generator.clone_state() for _ in weights]
        return self._run_from(mixed, times, shared, class_labels, output_type, guidance)

    def continue_from(
        self,
        x_t: Tensor,
        timestep: int,
        num_samples: int = 1,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        output_type: OutputType = "pil",
        class_labels: ClassLabels = None,
        **guidance: Unpack[GuidanceOptions],
    ) -> ImagePipelineOutput:
        """Draw images that share the latent x_t: p(x_0 | x_t) sampled several times (DDPM Figure 7).

        Args:
            x_t: A latent at `timestep`, shape (C, H, W) or (1, C, H, W).
            timestep: Its step, 0 <= t < T; the images share what is decided at or above it.
            num_samples: How many.
            generator: One, or a list of one per sample.
            num_inference_steps: Steps of the way back; None for every step from timestep to 0.
            output_type: As in calling the pipeline.
            class_labels: For class-conditional networks: one label for all images or one per sample.
            **guidance: As in calling the pipeline.

        Raises:
            UserError: a latent that does not fit the network, or a timestep outside [0, T).
        """
        x_t = x_t.unsqueeze(0) if x_t.ndim == 3 else x_t
        if x_t.shape[0] != 1 or num_samples < 1:
            raise UserError(
                f"continue_from expects one latent and num_samples of at least 1, got {x_t.shape[0]} and {num_samples}."
            )
        times = times_from(timestep, num_inference_steps, self._length())
        x_t = x_t.repeat(num_samples, 1, 1, 1)
        return self._run_from(x_t, times, generator, class_labels, output_type, guidance)

    def to_json_string(self) -> str:
        """Return the portable index: stock's class names, so that every Diffusers installation loads the folder."""
        text = super().to_json_string()
        if type(self) is not DDPMExtPipeline:
            return text
        index = {**json.loads(text), "_class_name": "DDPMPipeline"}
        index.pop("_name_or_path", None)  # a folder of this machine, which no one else has
        if type(self.scheduler) in (DDPMExtScheduler, DDPMExtSolverScheduler):
            index["scheduler"] = ["diffusers", json.loads(self.scheduler.to_json_string())["_class_name"]]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    # -- inside -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _denoise(
        self,
        x_t: Tensor,
        generator: Generators,
        labels: Tensor | None,
        guidance: Guidance | None = None,
        after_step: AfterStep | None = None,
    ) -> Iterator[tuple[Progress, Tensor]]:
        """The one sampling loop: yields each step with x_s, the images after it."""
        scheduler, unet = self.scheduler, self.unet
        options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        times = scheduler.timesteps
        on_host = times.tolist()  # the one wait; ints need none later
        own = isinstance(scheduler, BaseScheduler)
        if (warn := getattr(scheduler, "warn_of_guidance", None)) is not None:
            warn(setting_of(guidance, len(scheduler)))
        warn_of_no_guidance(guidance, on_host)
        former_modes, self._interrupt = [(module, module.training) for module in unet.modules()], False
        first_bad = torch.full((), len(on_host), device=x_t.device)
        unet.eval()
        try:
            bar: Any = self.progress_bar
            for i, t in enumerate(bar(times.to(x_t.device))):
                x_in, place = scheduler.scale_model_input(x_t, t), (i, on_host[i], len(on_host))
                output = self._predict(x_in, t, labels, guidance, place)
                first_bad = first_bad.minimum(torch.where(output.isfinite().all(), len(on_host), i))
                if first_bad.device.type == "cpu":
                    self._check_finite(first_bad, on_host)
                step = scheduler.step(self._without_head(output, x_t), on_host[i] if own else t, x_t, **options)
                x_0 = getattr(step, "pred_original_sample", None)
                x_s = step.prev_sample if after_step is None else after_step(i, t, step.prev_sample, x_0)
                yield Progress(int(on_host[i]), x_t, x_0), x_s
                x_t = x_s
                if self._interrupt:
                    break
            self._check_finite(first_bad, on_host)
            if not torch.isfinite(x_t).all():
                raise DivergenceError(f"The images are not finite after the last step, t = {on_host[-1]}.")
        finally:
            for module, training in former_modes:
                module.training = training
            self.maybe_free_model_hooks()

    def _predict(
        self, x_t: Tensor, t: Tensor, labels: Tensor | None, guidance: Guidance | None, place: tuple[int, float, int]
    ) -> Tensor:
        """One call of the network, guided or not; `place`: the step's number, the step, the number of steps."""
        if labels is None:
            return self.unet(x_t, t).sample

        def network(x: Tensor, c: Tensor) -> Tensor:
            return self.unet(x, t, class_labels=c).sample

        if guidance is None:
            return network(x_t, labels)
        i, step, steps = place
        return guided_prediction(guidance, network, x_t, labels, step, (i, steps), self.scheduler)

    def _check_finite(self, first_bad: Tensor, times: list[int]) -> None:
        if (i := int(first_bad)) < len(times):
            raise DivergenceError(
                f"The network's output is not finite at t = {times[i]} (step {i + 1} of {len(times)}). Half precision "
                "overflows first: try bfloat16 or float32 weights."
            )

    def _without_head(self, output: Tensor, x_t: Tensor) -> Tensor:
        """A variance head is dropped for schedulers that know none; ours checks for itself."""
        learned = self.scheduler.config.get("variance_type") in LEARNED_VARIANCES
        if isinstance(self.scheduler, BaseScheduler) or learned or output.shape[1] != 2 * x_t.shape[1]:
            return output
        return output[:, : x_t.shape[1]]

    def _start(
        self,
        batch_size: int,
        generator: Generators,
        num_inference_steps: int,
        timesteps: Sequence[int] | None,
        latents: Tensor | None,
        class_labels: ClassLabels,
    ) -> tuple[Tensor, Tensor | None]:
        """x_T and labels of a chain, everything checked and the timesteps set."""
        labels = self._labels(class_labels, batch_size)
        x_T = prepare_latents(self.unet, batch_size, generator, latents, self._execution_device)
        set_timesteps(self.scheduler, num_inference_steps, timesteps, self._execution_device)
        return x_T * self.scheduler.init_noise_sigma, labels  # of these timesteps

    def _run(
        self, x_t: Tensor, generator: Generators, labels: Tensor | None, output_type: OutputType, *args: Any
    ) -> Images:
        for step in self._denoise(x_t, generator, labels, *args):
            x_t = step[1]
        return to_output(x_t, output_type)

    def _run_from(
        self,
        x_t: Tensor,
        times: list[int],
        generator: Generators,
        class_labels: ClassLabels,
        output_type: OutputType,
        guidance: GuidanceOptions,
    ) -> ImagePipelineOutput:
        output_type = checked_output_type(output_type, self.unet.config["in_channels"])
        guided = make_guidance(self.unet.config, self._length(), **guidance)
        labels = self._labels(class_labels, x_t.shape[0])
        x_t = prepare_latents(self.unet, x_t.shape[0], generator, x_t, self._execution_device)
        set_timesteps(self.scheduler, None, times, self._execution_device)
        self._check_units()
        return ImagePipelineOutput(images=self._run(x_t, generator, labels, output_type, guided))

    def _length(self) -> int:
        """T, of a scheduler that runs a chain."""
        check_scheduler(self.scheduler)
        return self.scheduler.config["num_train_timesteps"]

    def _check_units(self) -> None:
        if float(self.scheduler.init_noise_sigma) != 1:
            raise UserError(
                f"{type(self.scheduler).__name__} keeps latents in other units than √ᾱ_t x_0 + √(1-ᾱ_t) ε "
                f"(init_noise_sigma is {float(self.scheduler.init_noise_sigma):.4g}, not 1). Use DDPMExtScheduler here."
            )

    def _labels(self, class_labels: ClassLabels, batch_size: int) -> Tensor | None:
        return check_labels(class_labels, batch_size, self.unet.config, self._execution_device)


def load_pipeline(model: str | os.PathLike[str], token: str | None = None) -> DDPMExtPipeline:
    """Load a pipeline of a UNet2DModel and a scheduler, its progress bars off.

    Args:
        model: A run folder, the folder of a pipeline, or user/model on the Hub.
        token: For a private repository; None takes the stored one.

    Raises:
        UserError: there is none of that name, it is incomplete, or it is of another kind.
        HubError: it cannot be had from the Hub.
    """
    folder = find_pipeline(model)
    if not Path(folder).is_dir():
        folder = DDPMExtPipeline.download(folder, token=token)
    check_parts(Path(folder))
    try:
        pipeline: Any = DDPMExtPipeline.from_pretrained(folder)
    except UserError:
        raise
    except (OSError, ValueError, AttributeError, SafetensorError) as error:  # what Diffusers says of files and classes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"The pipeline {model} cannot be loaded: {reason}") from error
    if not isinstance(pipeline.unet, UNet2DModel):
        raise UserError(
            f"model must be a pipeline of a UNet2DModel, got a {type(pipeline.unet).__name__} in {os.fspath(model)}."
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
