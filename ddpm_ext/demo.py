"""A page to look at a model: images appearing step by step, interpolations, bits/dim of an image.

`Studio` holds the model and makes the images; `make_page` puts it behind Gradio, which is an extra.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image
from torch import Tensor

from .data.decoding.formats import UNREADABLE
from .data.decoding.levels import ImageFormat, decode_image, orientation
from .data.decoding.samples import TURNS
from .diffusion.images import to_uint8, to_x_0
from .errors import UserError
from .evaluation.bound.bits_per_dim import bits_per_dim
from .evaluation.samplers import make_scheduler
from .models import classes
from .models.values import image_size, values_of
from .pipelines.ddpm import DDPMExtPipeline, load_pipeline
from .pipelines.guidance import make_guidance, setting_of
from .pipelines.locate import is_hub_name
from .pipelines.sampling import shown_bands
from .run_dir import JsonRecord
from .schedulers.solver import fitted_solvers

__all__ = ["SHOWN_STEPS", "SIDE", "Buttons", "Studio", "fitted", "in_a_row", "make_page", "space_files"]

SIDE = 384  # of a shown image, in screen pixels
SHOWN_STEPS = 25  # at most so many images of a chain are sent to the browser


class Studio:
    """A model, and what the page does with it.

    Every visitor may load another model at any time: what runs goes on with the model that it began with, and with a
    scheduler of its own.

    Args:
        model: Folder or Hub name of a pipeline.
    """

    pipeline: DDPMExtPipeline

    def __init__(self, model: str) -> None:
        self._open(model)

    def load(self, model: str) -> str:
        """Take another model; return a sentence that says which, or why not, in which case the former stays."""
        try:
            pipeline = self._open(model)
        except (OSError, ValueError) as error:  # HubError with them
            return f"{model} cannot be loaded: {error}"
        size = pipeline.unet.config["sample_size"]
        return f"{model}: images of {size}, {len(pipeline.scheduler)} steps of training."

    def _open(self, model: str) -> DDPMExtPipeline:
        pipeline: Any = load_pipeline(model)
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.pipeline = pipeline = pipeline.to(device or torch.device("cpu"))
        return pipeline

    def generate(
        self,
        steps: int,
        sampler: str,
        seed: int | None,
        label: int | None = None,
        guidance_scale: float = 0.0,
        bands: str = "",
        count: int = 4,
    ) -> Iterator[tuple[Image.Image, str]]:
        """Yield the predicted images x̂_0 as the chain runs, the finished ones last, each with a line about it.

        Args:
            steps: Length of the chain, at most T.
            sampler: One of `samplers()`; "solver 5" is the fitted one of 5 steps, whatever `steps` says.
            seed: Image i is drawn from seed + i; None is 0.
            label: Class of every image; None: all classes in turn.
            guidance_scale: w of class guidance; 0 is none.
            bands: Those shown; see `bands_of`.
            count: How many images.
        """
        word, _, calls = sampler.partition(" ")
        steps, shown = whole("number of steps", calls or steps), bands_of(self.pipeline, bands)
        pipeline, first = with_own_scheduler(self.pipeline, word), seed_of(seed)
        seeds = range(first, first + whole("number of images", count))
        labels, guidance = labels_of(pipeline, label, len(seeds)), float(guidance_scale or 0)
        remarks = remarks_on_guidance(pipeline, guidance)
        chain = pipeline.progressive(
            len(seeds), _generators(seeds), steps, class_labels=labels, guidance_scale=guidance
        )
        every = max(1, steps // SHOWN_STEPS)
        for i, progress in enumerate(chain, start=1):
            if progress.x_0 is not None and (i % every == 0 or i == steps) and not (calls and i == steps):
                yield in_a_row(progress.x_0, shown), f"t = {progress.t}, step {i} of {steps}{remarks}"
        if calls:  # its last jump mixes the estimates of several steps: the image is the x̂_0 of none
            images = pipeline(
                len(seeds),
                _generators(seeds),
                steps,
                output_type="latent",
                class_labels=labels,
                guidance_scale=guidance,
            )[0]
            yield in_a_row(torch.as_tensor(images), shown), f"step {steps} of {steps}{remarks}"

    def interpolate(
        self,
        a: Image.Image,
        b: Image.Image,
        timestep: int,
        weight: float,
        seed: int | None,
        label: int | None = None,
    ) -> Image.Image:
        """Return an image between two, mixed after `timestep` forward steps; 0 is a, 1 is b."""
        pipeline, timestep = with_own_scheduler(self.pipeline, "ddpm"), whole("timestep", timestep)
        bits = values_of(pipeline.unet.config).bits
        images: Any = pipeline.interpolate(
            to_x_0(fitted(pipeline, a), bits),
            to_x_0(fitted(pipeline, b), bits),
            timestep,
            [float(weight)],
            torch.Generator().manual_seed(seed_of(seed)),
            num_inference_steps=min(timestep + 1, 50),
            output_type="latent",
            class_labels=labels_of(pipeline, label, 1),
        )
        return in_a_row(images.images)

    def bits(self, image: Image.Image, label: int | None = None, num_timesteps_sampled: int = 20) -> str:
        """Return bits/dim of an image in words: the bound, from some of the steps or, of few, from all."""
        pipeline = self.pipeline
        labels, T = labels_of(pipeline, label, 1), len(pipeline.scheduler)
        sampled = num_timesteps_sampled if num_timesteps_sampled < T else None
        found = bits_per_dim(
            pipeline.unet,
            pipeline.scheduler,  # is copied there
            fitted(pipeline, image).unsqueeze(0).to(pipeline.device),
            bits=values_of(pipeline.unet.config).bits,
            num_timesteps_sampled=sampled,
            generator=torch.Generator(pipeline.device).manual_seed(0),
            class_labels=labels,
        )
        error = "" if found.standard_error is None else f" ± {found.standard_error.item():.2g}"
        given = "" if labels is None else f" given class {labels[0]}"
        steps = f"all {T} steps" if sampled is None else f"{sampled} steps sampled"
        return f"at most {found.total.item():.3f}{error} bits/dim{given} ({steps})"

    def samplers(self) -> list[str]:
        """Return the samplers of the model: the fitted solver first, once for every number of calls it is fitted to."""
        fits = fitted_solvers(self.pipeline.scheduler.config)
        return [*(f"solver {calls}" for calls in (() if fits is None else fits.solvers)), "ddpm", "ddim"]

    def ranges(self, steps: int, timestep: int, label: int | None = None) -> tuple[JsonRecord, ...]:
        """Return what fits the model in the page's fields, whose values stay where they fit.

        Args:
            steps: Value of the field of steps.
            timestep: Of that of the interpolation's timestep.
            label: Of that of the class.

        Returns:
            Properties of the fields of steps, timestep, class, guidance, sampler and bands.
        """
        pipeline = self.pipeline
        T, classes = len(pipeline.scheduler), number_of_classes(pipeline)
        about = f"Class, 0 to {(classes or 1) - 1}; empty: all in turn (an interpolation's and bits/dim's is 0)"
        fits = label is not None and 0 <= label < (classes or 0)
        return (
            {"maximum": T, "value": min(steps, T)},
            {"maximum": T - 1, "value": min(timestep, T - 1)},
            {"visible": classes is not None, "label": about, "value": label if fits else None},
            {"visible": knows_no_class(pipeline), "value": 0},
            {"choices": self.samplers(), "value": self.samplers()[0]},
            {"visible": channels_of(pipeline) > 4, "value": "", "label": bands_label(channels_of(pipeline))},
        )


def channels_of(pipeline: DDPMExtPipeline) -> int:
    """Return C, the channels of a network's images."""
    return pipeline.unet.config["in_channels"]


def bands_label(channels: int) -> str:
    """Return what the page says at its field of bands."""
    return f"Bands shown, of 1 to {channels}: one, or three as red, green and blue; empty: 1"


def bands_of(pipeline: DDPMExtPipeline, bands: str) -> list[int] | None:
    """Return the bands that words name: "5", or "3, 2, 1" for red, green and blue; None for nothing.

    Raises:
        UserError: they are neither one nor three, or no bands of the network's images.
    """
    found, channels = bands.replace(",", " ").split(), channels_of(pipeline)
    if not found:
        return None
    if len(found) not in (1, 3) or not all(word.isdecimal() and 1 <= int(word) <= channels for word in found):
        raise UserError(f"The bands must be one or three whole numbers from 1 to {channels}, got {bands!r}.")
    return [int(word) for word in found]


def _generators(seeds: Iterable[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def with_own_scheduler(pipeline: DDPMExtPipeline, sampler: str) -> DDPMExtPipeline:
    """Return the same network under a scheduler of its own, so that two chains at once do not disturb each other."""
    own = DDPMExtPipeline(pipeline.unet, cast(SchedulerMixin, make_scheduler(pipeline.scheduler, sampler)))
    own.set_progress_bar_config(disable=True)
    return own


def number_of_classes(pipeline: DDPMExtPipeline) -> int | None:
    """Return the number of classes of a network; None for any other."""
    return classes.number_of_classes(pipeline.unet.config)


def knows_no_class(pipeline: DDPMExtPipeline) -> bool:
    """Return whether a network can be guided: it was trained to draw without a class, too."""
    found = classes.classes_of(pipeline.unet.config)
    return found is not None and found.null_label is not None


def remarks_on_guidance(pipeline: DDPMExtPipeline, guidance_scale: float) -> str:
    """Return what a chain warns of, for the page: variances or a solver that were fitted under another guidance."""
    T, warn = len(pipeline.scheduler), getattr(pipeline.scheduler, "warn_of_guidance", None)
    if warn is None:
        return ""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warn(setting_of(make_guidance(pipeline.unet.config, T, guidance_scale=guidance_scale), T))
    return "".join(f". {one.message}" for one in told)


def whole(name: str, value: Any) -> int:
    """Return a whole number that a field or a caller gives, as a number or in digits.

    Args:
        name: What the number is, for the error.
        value: It.

    Raises:
        UserError: it is none.
    """
    try:
        number = int(value)
        if isinstance(value, str) or (number == value and not isinstance(value, bool)):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise UserError(f"The {name} must be a whole number, got {value!r}.")


def seed_of(seed: int | None) -> int:
    """Return a seed from which a page's images count on; 0 for None.

    Raises:
        UserError: PyTorch takes no such seed.
    """
    found = 0 if seed is None else whole("seed", seed)
    if not -(2**63) <= found < 2**63:
        raise UserError(f"The seed must be a whole number from -2^63 to 2^63 - 1, got {found}: give a smaller one.")
    return found


def labels_of(pipeline: DDPMExtPipeline, label: int | None, count: int) -> list[int] | None:
    """Return the class of each of `count` images, for a class-conditional network: `label`, or 0, 1, 2, ... in turn."""
    classes = number_of_classes(pipeline)
    if label is None:
        return None if classes is None else [i % classes for i in range(count)]
    if classes is None:
        raise UserError(f"This network knows no classes, got class {label}: leave the field empty.")
    if label not in range(classes) or isinstance(label, bool):
        raise UserError(f"The class must be a whole number from 0 to {classes - 1}, or empty, got {label}.")
    return [int(label)] * count


def fitted(pipeline: DDPMExtPipeline, image: Image.Image) -> Tensor:
    """Bring an uploaded image to the network's size, channels and depth as training does: upright, scaled, cropped.

    Args:
        pipeline: Of the network. Where it records a value_range, that is the range of values deeper than 8 bits.
        image: Of any mode that training reads.

    Returns:
        Levels, shape (C, H, W).

    Raises:
        UserError: it has not the network's channels, or colours or values that the network cannot place.
    """
    config, values = pipeline.unet.config, values_of(pipeline.unet.config)
    form = ImageFormat(*image_size(config), config["in_channels"], center_crop=True, bits=values.bits)
    if image.mode[0] in "IF":
        form = form._replace(value_range=values.value_range)
    try:
        levels = decode_image(_encoded(_upright(image), image.format, form), form)
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"The image does not fit the network: {error}") from error
    return torch.from_numpy(levels.astype(np.uint8 if form.bits <= 8 else np.int32))


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # which turns a TIFF's
    turn = TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def _encoded(image: Image.Image, stored_as: str | None, form: ImageFormat) -> bytes | np.ndarray:
    """An image as decoding takes it: a PNG, or its values where they are no integers of up to 16 bits.

    Args:
        image: It, upright.
        stored_as: Format of its file.
        form: What it becomes.
    """
    if image.mode == "F" or (image.mode == "I" and stored_as not in ("PNG", "PPM")):
        found = np.asarray(image)
        if form.value_range is None:
            raise UserError(
                f"The image holds {found.dtype} values from {found.min():g} to {found.max():g}, and this network "
                "records no range for them (it was trained without --value_range): give an image of 8 or 16 bits."
            )
        return found
    if image.mode == "CMYK" and stored_as in ("JPEG", "MPO"):
        image = image.convert("RGB")
    if image.mode in ("CMYK", "LAB", "YCbCr", "HSV"):
        raise UserError(f"The image must be grey or RGB, with or without alpha, got {image.mode}: convert it to RGB.")
    mode = {"La": "LA", "RGBa": "RGBA", "PA": "RGBA", "RGBX": "RGB"}.get(image.mode, image.mode)
    file = io.BytesIO()
    (image if mode == image.mode else image.convert(mode)).save(file, format="png", exif=b"")
    return file.getvalue()


def in_a_row(x_0: Tensor, bands: Sequence[int] | None = None) -> Image.Image:
    """Show images side by side, enlarged without smoothing.

    Args:
        x_0: Shape (B, C, H, W), values in [-1, 1].
        bands: One band or three, counted from 1; None shows RGB with or without alpha, and else the first band.
    """
    row = shown_bands(torch.cat(list(to_uint8(x_0.float().cpu())), dim=2).permute(1, 2, 0).numpy(), bands)
    shown = Image.fromarray(row if row.shape[-1] in (3, 4) else row[..., 0])
    scale = max(1, SIDE // shown.height)
    return shown.resize((shown.width * scale, shown.height * scale), Image.Resampling.NEAREST)


class Buttons:
    """What the page calls. Failures become Gradio's kind of error, whose sentence reaches the browser.

    Args:
        studio: The model behind the page.
        error: The exception whose message is shown (`gradio.Error`); of others the browser says no more than "Error".
        update: Makes the change of a field of the page of its new properties (`gradio.update`).
    """

    def __init__(self, studio: Studio, error: type[Exception], update: Callable[..., Any]) -> None:
        self.studio, self.error, self.update = studio, error, update

    def load(self, model: str, steps: int, timestep: int, label: int | None) -> tuple[Any, ...]:
        """Return the line about a new model, and the fields whose properties it sets, in the order of `ranges`."""
        with self._told():
            status = self.studio.load(model)
            return status, *(self.update(**properties) for properties in self.studio.ranges(steps, timestep, label))

    def generate(
        self,
        steps: int,
        sampler: str,
        seed: int | None,
        label: int | None,
        guidance_scale: float = 0.0,
        bands: str = "",
    ) -> Iterator[tuple[Image.Image, str]]:
        """Yield the images as the chain runs, each with a line about it."""
        with self._told():
            yield from self.studio.generate(steps, sampler, seed, label, guidance_scale, bands)

    def interpolate(
        self, a: Any, b: Any, timestep: int, weight: float, seed: int | None, label: int | None
    ) -> Image.Image | None:
        """Return None until there are two images."""
        with self._told():
            return None if a is None or b is None else self.studio.interpolate(a, b, timestep, weight, seed, label)

    def bits(self, image: Any, label: int | None) -> str:
        """Return bits/dim of an uploaded image, or ask for one."""
        with self._told():
            return "Upload an image." if image is None else self.studio.bits(image, label)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise self.error(str(error) or type(error).__name__) from error


def import_gradio() -> Any:
    """Return Gradio, or say how to get it."""
    try:
        import gradio  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise UserError(f"The page needs Gradio ({error}): pip install 'ddpm-ext[demo]'") from error
    return gradio


def make_page(studio: Studio, model: str) -> Any:
    """Make the Gradio page of a studio.

    Raises:
        UserError: Gradio is not installed.
    """
    gr = import_gradio()
    T = len(studio.pipeline.scheduler)
    for_steps, for_timestep, for_label, for_guidance, for_sampler, for_bands = studio.ranges(100, T // 2)
    with gr.Blocks(title="ddpm_ext") as page:
        gr.Markdown("# Denoising diffusion, step by step")
        with gr.Row():
            name = gr.Textbox(model, label="Folder or Hub name", scale=4)
            load = gr.Button("Load")
        status = gr.Markdown(f"{model}")
        with gr.Row():
            seed = gr.Number(0, precision=0, label="Seed; empty: 0")
            label = gr.Number(precision=0, **for_label)
        with gr.Tab("Generate"):
            with gr.Row():
                steps = gr.Slider(1, step=1, label="Steps", **for_steps)
                sampler = gr.Dropdown(label="Sampler; a fitted solver has steps of its own", **for_sampler)
                guidance = gr.Slider(0, 8, label="Class guidance w; 0: none", **for_guidance)
                bands = gr.Textbox(**for_bands)
            start = gr.Button("Generate", variant="primary", elem_id="generate")
            picture = gr.Image(label="x̂_0", elem_id="generated", type="pil", format="png")
            line = gr.Markdown()
        with gr.Tab("Interpolate"):
            with gr.Row():
                a, b = (gr.Image(label=side, type="pil") for side in ("a", "b"))
            timestep = gr.Slider(0, step=1, label="Mixed after t forward steps", **for_timestep)
            weight = gr.Slider(0, 1, value=0.5, label="From a to b", elem_id="weight")
            between = gr.Image(label="between", type="pil", format="png")
        with gr.Tab("Bits/dim"):
            judged = gr.Image(label="An image", type="pil")
            measure, bits = gr.Button("Measure"), gr.Markdown()

        buttons, fields = Buttons(studio, gr.Error, gr.update), [steps, timestep, label, guidance, sampler, bands]
        load.click(buttons.load, [name, *fields[:3]], [status, *fields])
        start.click(buttons.generate, [steps, sampler, seed, label, guidance, bands], [picture, line])
        for slider in (timestep, weight):
            slider.release(buttons.interpolate, [a, b, timestep, weight, seed, label], between)
        measure.click(buttons.bits, [judged, label], bits)
    return page


# As a Space -----------------------------------------------------------------------------------------------------------

APP = """from ddpm_ext.demo import Studio, make_page

make_page(Studio({model!r}), {model!r}).launch()
"""
README = """---
title: {title}
sdk: gradio
app_file: app.py
pinned: false
models:
- {model}
---

Images of [{model}](https://huggingface.co/{model}) as they appear, step by step; made with ddpm_ext.
"""


def space_files(model: str, repo_id: str, staging: Path) -> dict[str, Path]:
    """Return the files of a Space that shows a model of the Hub: the page, this package, and what it needs.

    Raises:
        UserError: the model is none of the Hub: a Space reads no folder of this machine.
    """
    if Path(model).exists() or not is_hub_name(model):
        here = "a path on this machine" if Path(model).exists() else "no such name"
        raise UserError(
            f"A Space shows a model of the Hub, named user/model, and {model} is {here}. Push it first "
            f"(ddpm-ext push --model {model} --hub_model_id user/model), then give that name."
        )
    try:
        needed = [need.split(";")[0].strip() for need in requires("ddpm-ext") or () if "extra ==" not in need]
    except PackageNotFoundError:
        needed = ["torch", "diffusers", "transformers", "accelerate", "datasets", "safetensors", "pillow"]
    texts = {
        "app.py": APP.format(model=model),
        "README.md": README.format(title=repo_id.split("/")[-1], model=model),
        "requirements.txt": "\n".join([*needed, "gradio"]) + "\n",
    }
    files: dict[str, Path] = {}
    for name, text in texts.items():
        files[name] = staging / name
        files[name].write_text(text, encoding="utf-8")
    package = Path(__file__).parent
    sources = (
        path for path in package.rglob("*") if path.suffix in {".py", ".md", ".parquet"} or path.name == "py.typed"
    )
    return files | {path.relative_to(package.parent).as_posix(): path for path in sources}
