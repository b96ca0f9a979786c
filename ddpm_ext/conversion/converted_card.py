"""The card of a converted pipeline: where it comes from, what was said of it, and the fingerprint of its output."""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData

from ..errors import HubError
from ..hub.checksums import sha256
from ..hub.files import RENDERED, is_rendered
from ..models.values import image_size
from ..pipelines.ddpm import DDPMExtPipeline
from ..publishing.licenses import License, license_of
from ..publishing.model_card import STOCK_CANNOT
from ..run_dir import JsonRecord
from ..schedulers.base import BaseScheduler
from .config import ConvertOptions

__all__ = ["converted_card", "fingerprint"]
logger = logging.getLogger(__name__)

_MARK = f"{RENDERED}a converted checkpoint; without this line the card is yours and is kept. -->"
_TEXT = """---
{data}
---

# {name}

A denoising diffusion probabilistic model, converted from {origin} with ddpm_ext. The network
computes what the original computes; nothing was trained again.

| | |
|---|---|
{rows}

## Use

```python
from {package} import {kind}

pipe = {kind}.from_pretrained("path/to/this/folder")  # or its name on the Hub
image = pipe(num_inference_steps={steps}{labels}).images[0]
```

ddpm_ext is to be had by `pip install ddpm-ext`.

## Fingerprint

One pass through the network in float32, to compare with the original's: x has the shape {shape},
its i-th value in row-major order is sin(i), t = {t} of {T} steps counted from 0{label}.

| | |
|---|---|
| mean of the output | {mean:.6g} |
| standard deviation | {std:.6g} |
| its first eight values | {first} |

{mark}
"""


def fingerprint(pipeline: DDPMExtPipeline) -> dict[str, object]:
    """Return what the network gives for a fixed input: mean, deviation and first values of its output.

    x_i = sin(i), i the index in row-major order,   t = T / 2 rounded down,   class 0 where there are classes
    """
    config = pipeline.unet.config
    height, width = image_size(config)
    shape = (1, config["in_channels"], height, width)
    x = torch.arange(shape[1] * height * width, dtype=torch.float64).sin().float().reshape(shape)
    t = len(pipeline.scheduler) // 2
    labels = {"class_labels": torch.zeros(1, dtype=torch.long)} if config["num_class_embeds"] is not None else {}
    unet = pipeline.unet.float().eval()
    with torch.no_grad():
        output = unet(x, torch.tensor([t]), **labels).sample.double()
    std, mean = torch.std_mean(output)
    first = [float(value) for value in output.flatten()[:8]]
    return {"shape": shape, "t": t, "mean": float(mean), "std": float(std), "first": first, "labelled": bool(labels)}


def _upstream_license(options: ConvertOptions) -> License | None:
    """Return the licence that the card of a converted pipeline's source names, None where it cannot be asked."""
    try:
        return license_of(options.checkpoint, options.token)
    except HubError as error:
        logger.warning("Its licence is not known: %s", error)
        return None


def converted_card(
    folder: Path, pipeline: DDPMExtPipeline, options: ConvertOptions, precision: str | None = None
) -> str | None:
    """Return the README.md of a converted pipeline's folder; None where the one there was written by hand.

    Args:
        folder: The pipeline's, which need not be there yet.
        pipeline: With the converted weights.
        options: Of the conversion, with the source that was recognised.
        precision: What has become of numbers of another precision.
    """
    card = folder / "README.md"
    if card.is_file() and not is_rendered(card):
        return None
    seen = fingerprint(pipeline)
    checkpoint = Path(options.checkpoint)
    is_file = checkpoint.is_file()
    is_on_hub = not is_file and not checkpoint.exists()
    name = options.checkpoint if is_on_hub else checkpoint.resolve().name
    origin = f"a checkpoint of {options.source}" if is_file else f"the pipeline {name}"
    said = {
        field.name: getattr(options, field.name)
        for field in fields(options)
        if field.name not in ("checkpoint", "output_dir", "token", "license")
        and getattr(options, field.name) is not None
    }
    rows = {"Source": said.pop("source"), "Checkpoint": name}
    rows |= {"SHA-256": sha256(checkpoint)} if is_file else {}
    rows |= {"Numbers": precision} if precision is not None else {}
    rows |= {f"`--{name}`": value for name, value in said.items()}
    config = pipeline.scheduler.config
    words = {config["prediction_type"], config.get("variance_type")}  # DDIM and others have no variance of their own
    # Else Diffusers alone can sample it: its DDPMPipeline takes no steps but those of DDPM.
    own = seen["labelled"] or not words.isdisjoint(STOCK_CANNOT) or not isinstance(pipeline.scheduler, BaseScheduler)
    license = License(options.license) if options.license else (None if is_file else _upstream_license(options))
    if license is None:
        logger.warning("The card names no licence: a push asks for it, and so does the push of a fine-tune.")
    of_license: JsonRecord = {} if license is None else license.entries()
    data = ModelCardData(
        **of_license,
        base_model=name if is_on_hub else None,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["ddpm", "unconditional-image-generation", "pytorch", "ddpm_ext"],
        ignore_metadata_errors=False,
    )
    text = _TEXT.format(
        data=data.to_yaml(),
        name=folder.resolve().name,
        origin=origin,
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        package="ddpm_ext" if own else "diffusers",
        kind="DDPMExtPipeline" if own else "DDPMPipeline",
        labels=", class_labels=0" if seen["labelled"] else "",
        T=len(pipeline.scheduler),
        steps=len(pipeline.scheduler) - (config.get("steps_offset") or 0),  # more would pass the last step
        shape=seen["shape"],
        t=seen["t"],
        label=", class 0" if seen["labelled"] else "",
        mean=seen["mean"],
        std=seen["std"],
        first=", ".join(f"{value:.6g}" for value in seen["first"]),  # pyright: ignore[reportGeneralTypeIssues]
        mark=_MARK,
    )
    return str(ModelCard(text, ignore_metadata_errors=False))
