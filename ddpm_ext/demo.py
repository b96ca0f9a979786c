"""A page to look at a model: pictures appearing step by step, interpolations, bits/dim of a picture.

`Studio` holds the model and makes the pictures; `make_page` puts it behind Gradio, which is an extra.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .bound import bits_per_dim
from .images import to_uint8
from .measure import make_scheduler
from .patience import HubError
from .pipeline import DDPMExtPipeline

Shown = Literal["ddpm", "ddim"]  # the samplers whose steps tell x̂_0
SIDE = 384  # of a shown picture, in screen pixels
SHOWN_STEPS = 25  # at most so many pictures of a chain are sent to the browser


class Studio:
    """A model, and what the page does with it.

    Args:
        model: Folder or Hub name of a pipeline.
    """

    pipeline: DDPMExtPipeline

    def __init__(self, model: str) -> None:
        self._open(model)

    def load(self, model: str) -> str:
        """Take another model; a sentence that says which, or why not, in which case the former stays."""
        try:
            self._open(model)
        except (HubError, OSError, ValueError) as error:
            return f"{model} cannot be loaded: {error}"
        size = self.pipeline.unet.config["sample_size"]
        return f"{model}: pictures of {size}, {len(self.pipeline.scheduler)} steps of training."

    def _open(self, model: str) -> None:
        pipeline: Any = DDPMExtPipeline.from_pretrained(model)
        pipeline.set_progress_bar_config(disable=True)
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.pipeline = pipeline.to(device or torch.device("cpu"))

    def generate(self, steps: int, sampler: Shown, seed: int, count: int = 4) -> Iterator[tuple[Image.Image, str]]:
        """The predicted pictures x̂_0 as the chain runs, the finished ones last, each with a line about it."""
        own = self.pipeline.scheduler
        self.pipeline.register_modules(scheduler=make_scheduler(own, sampler))
        try:
            generator = [torch.Generator().manual_seed(int(seed) + i) for i in range(int(count))]
            chain = self.pipeline.progressive(int(count), generator, int(steps), class_labels=self._labels(int(count)))
            every = max(1, int(steps) // SHOWN_STEPS)
            for i, progress in enumerate(chain, start=1):
                if progress.x_0 is not None and (i % every == 0 or i == int(steps)):
                    yield in_a_row(progress.x_0), f"t = {progress.t}, step {i} of {int(steps)}"
        finally:
            self.pipeline.register_modules(scheduler=own)

    def interpolate(self, a: Image.Image, b: Image.Image, timestep: int, weight: float, seed: int) -> Image.Image:
        """A picture between two, mixed after `timestep` forward steps; 0 is a, 1 is b."""
        images: Any = self.pipeline.interpolate(
            self._fitted(a),
            self._fitted(b),
            int(timestep),
            [float(weight)],
            torch.Generator().manual_seed(int(seed)),
            num_inference_steps=min(int(timestep) + 1, 50),
            output_type="latent",
            class_labels=self._labels(1),
        )
        return in_a_row(images.images)

    def bits(self, image: Image.Image, num_timesteps_sampled: int = 20) -> str:
        """Bits/dim of a picture in words: the bound, estimated from some of the steps."""
        pixels = torch.from_numpy(np.array(self._fitted(image), ndmin=3))
        pixels = pixels.permute(2, 0, 1) if pixels.shape[-1] == 3 else pixels
        found = bits_per_dim(
            self.pipeline.unet,
            self.pipeline.scheduler,
            pixels.unsqueeze(0).to(self.pipeline.device),
            num_timesteps_sampled=num_timesteps_sampled,
            generator=torch.Generator(self.pipeline.device).manual_seed(0),
        )
        error = "" if found.standard_error is None else f" ± {found.standard_error.item():.2g}"
        return f"at most {found.total.item():.3f}{error} bits/dim ({num_timesteps_sampled} steps sampled)"

    def _labels(self, count: int) -> list[int] | None:
        classes = self.pipeline.unet.config.get("num_class_embeds")
        return None if classes is None else [i % classes for i in range(count)]

    def _fitted(self, image: Image.Image) -> Image.Image:
        """An uploaded picture at the network's size and channels."""
        size = self.pipeline.unet.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        mode = "L" if self.pipeline.unet.config["in_channels"] == 1 else "RGB"
        return image.convert(mode).resize((width, height), Image.Resampling.BOX)


def in_a_row(x_0: Tensor) -> Image.Image:
    """Pictures (B, C, H, W) in [-1, 1] side by side, enlarged without smoothing."""
    row = torch.cat(list(to_uint8(x_0.float().cpu())), dim=2)
    picture = Image.fromarray(row.permute(1, 2, 0).squeeze(-1).numpy())
    scale = max(1, SIDE // picture.height)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def make_page(studio: Studio, model: str) -> Any:
    """The Gradio page of a studio."""
    import gradio as gr  # pyright: ignore[reportMissingImports]

    T = len(studio.pipeline.scheduler)
    with gr.Blocks(title="ddpm_ext") as page:
        gr.Markdown("# Denoising diffusion, step by step")
        with gr.Row():
            name = gr.Textbox(model, label="Folder or Hub name", scale=4)
            load = gr.Button("Load")
        status = gr.Markdown(f"{model}")
        with gr.Tab("Generate"):
            with gr.Row():
                steps = gr.Slider(1, T, value=min(100, T), step=1, label="Steps")
                sampler = gr.Dropdown(list(get_args(Shown)), value="ddpm", label="Sampler")
                seed = gr.Number(0, precision=0, label="Seed")
            start = gr.Button("Generate", variant="primary", elem_id="generate")
            picture = gr.Image(label="x̂_0", elem_id="generated", type="pil", format="png")
            line = gr.Markdown()
        with gr.Tab("Interpolate"):
            with gr.Row():
                a, b = (gr.Image(label=label, type="pil") for label in ("a", "b"))
            timestep = gr.Slider(0, T - 1, value=T // 2, step=1, label="Mixed after t forward steps")
            weight = gr.Slider(0, 1, value=0.5, label="From a to b", elem_id="weight")
            between = gr.Image(label="between", type="pil", format="png")
        with gr.Tab("Bits/dim"):
            judged = gr.Image(label="A picture", type="pil")
            measure, bits = gr.Button("Measure"), gr.Markdown()

        def move(a: Any, b: Any, timestep: int, weight: float, seed: int) -> Any:
            return None if a is None or b is None else studio.interpolate(a, b, timestep, weight, seed)

        load.click(studio.load, name, status)
        start.click(studio.generate, [steps, sampler, seed], [picture, line])
        for slider in (timestep, weight):
            slider.release(move, [a, b, timestep, weight, seed], between)
        measure.click(lambda image: "Upload a picture." if image is None else studio.bits(image), judged, bits)
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

Pictures of [{model}](https://huggingface.co/{model}) as they appear, step by step; made with ddpm_ext.
"""


def space_files(model: str, repo_id: str, staging: Path) -> dict[str, Path]:
    """The files of a Space that shows a model of the Hub: the page, this package, and what it needs."""
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
    return files | {f"ddpm_ext/{path.name}": path for path in (*package.glob("*.py"), package / "template.md")}
