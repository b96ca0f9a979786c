"""A folder on disk -> the files of a Hub repository: what is pushed, under which name.

    model_index.json and what it needs, each part in a folder of its own: see pipeline_files.py
    README.md                   the card, and the images that it shows
    eval.json, config.json      of the run

Nothing else of a run folder: no checkpoints, no optimiser state, no logs, no pickles.
"""

from __future__ import annotations

import html
import json
import logging
import os
import re
import shutil
import unicodedata
from collections.abc import Collection, Mapping
from pathlib import Path
from urllib.parse import unquote

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..diffusion.words import INDEX
from ..errors import HubError, check_word
from ..run_dir import JsonRecord
from .pipeline_files import (
    Files,
    Weights,
    check_not_pointer,
    component_names,
    is_weights_name,
    pipeline_files,
    read_record,
    tensor_files,
    weights_of,
)

__all__ = [
    "RENDERED",
    "check_no_token",
    "collect",
    "is_rendered",
    "minimal_card",
    "shown_images",
    "stage",
    "stale",
]
logger = logging.getLogger(__name__)

RENDERED = "<!-- Rendered by ddpm_ext from "  # begins the line that a card written by hand does not have
_RUN_FILES = ("README.md", "config.json", "eval.json")
_IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".avif", ".bmp", ".mp4", ".webm")
_UNSHOWN = {"checkpoints", "snapshots", "pipeline"}  # folders of a run that hold no image of its card
_VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
# Relative targets of Markdown and HTML images.
_TARGETS = re.compile(r"!\[[^\]]*\]\(\s*<?([^)\s>]+)|<img\b[^>]*?\bsrc\s*=\s*[\"']([^\"']+)")

_MINIMAL_CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- ddpm
- unconditional-image-generation
- pytorch
---

# {name}

```python
from {package} import {kind}

image = {kind}.from_pretrained("{repo_id}")({arguments}).images[0]
```
"""


def _pipeline_in(folder: Path) -> Path | None:
    """Return the folder of the pipeline: the folder itself or its pipeline/; None where neither is one."""
    return next((path for path in (folder, folder / "pipeline") if (path / INDEX).is_file()), None)


def collect(folder: str | os.PathLike[str], staging: Path, variant: str | None = None) -> Files:
    """Return the files to push of a run folder or of a saved pipeline.

    Args:
        folder: A run folder, which holds pipeline/, or a folder that holds model_index.json.
        staging: An empty folder for what has to be made; nothing is written to `folder`.
        variant: "fp16" or "bf16": also weights of that precision, made from the full ones where they are missing.

    Raises:
        HubError: the folder holds no pipeline, a file that its index needs is missing or broken, its weights are
            pickles, or the variant is not what its name says.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "is not there"
        raise HubError(f"{folder} {found}. Give a run folder, or the folder of a saved pipeline.")
    pipeline = _pipeline_in(folder)
    if pipeline is None:
        raise HubError(
            f"{folder} holds neither {INDEX} nor pipeline/{INDEX}: it is no saved pipeline and no finished run. Give "
            "the folder of one; ddpm-ext train writes it."
        )
    files = pipeline_files(pipeline)
    files |= _variant_files(files, variant, staging)
    files |= {name: folder / name for name in _RUN_FILES if (folder / name).is_file()}
    if "config.json" in files and "_class_name" in read_record(files["config.json"]):
        del files["config.json"]  # of a flat pipeline's network: it is unet/config.json
    files |= shown_images(folder)
    for path in files.values():
        check_not_pointer(path)
    return files


# Images of the card ---------------------------------------------------------------------------------------------------


def shown_images(folder: Path) -> Files:
    """Return the images that the card of a folder shows, and the newest grid of samples.

    An image belongs to the card where its name stands in it: plainly, percent-encoded or as HTML has it.
    """
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    present = _images_of(folder)
    mentioned = _spellings(text)
    named = {name for name in present if any(_mentions(spelling, name) for spelling in mentioned)}
    for markdown, tag in _TARGETS.findall(text):
        target = unquote(html.unescape(markdown or tag)).removeprefix("./")
        if not re.match(r"[\w+.-]+:|//|#", target) and not (folder / target.split("?")[0].split("#")[0]).is_file():
            logger.warning("%s shows %s, which is not in %s and is not pushed.", readme, target, folder)
    grids = [name for name in present if name.startswith("samples/") and name.count("/") == 1]
    return {name: folder / name for name in sorted(named | set(grids[-1:]))}


def _images_of(folder: Path) -> list[str]:
    """Return the names of the images below a folder, sorted."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _UNSHOWN]
        found += [os.path.relpath(os.path.join(place, n), folder) for n in names if n.lower().endswith(_IMAGES)]
    return sorted(Path(name).as_posix() for name in found)


def _spellings(text: str) -> set[str]:
    """Return a card as it stands, and without the ways in which Markdown, HTML and URLs write characters."""
    plain = re.sub(r"(?<![\w./])\./", "", html.unescape(text))
    spellings = {text, plain, unquote(plain), re.sub(r"\\(?=[!-/:-@\[-`{-~])", "", plain)}
    return {unicodedata.normalize("NFC", spelling) for spelling in spellings}


def _mentions(text: str, name: str) -> bool:
    """Return whether a text holds a name as a whole, not as the end of a longer one."""
    name = unicodedata.normalize("NFC", name)
    return any(
        not (text[at - 1 : at].isalnum() or text[at - 1 : at] in tuple("_/.-%"))
        for at in (found.start() for found in re.finditer(re.escape(name), text))
    )


# Variants -------------------------------------------------------------------------------------------------------------


def _variant_files(files: Files, variant: str | None, staging: Path) -> Files:
    """Return half-precision weights that have to be made; those that are there must be the full ones, rounded."""
    if variant is not None:
        check_word("variant", variant, _VARIANTS, HubError)
    made: Files = {}
    for name in sorted({name.split("/")[0] for name, path in files.items() if is_weights_name(path.name)}):
        known = {weights.variant: weights for weights in weights_of(files[f"{name}/config.json"].parent)}
        full = known.get(None)
        for word in _VARIANTS.keys() & known.keys():
            if full is not None:
                _check_rounded(full, known[word])
        if full is None or variant is None or variant in known:
            continue
        if full.shard_index is not None:
            raise HubError(
                f"{full.files[0]} is one of several shards: save the {variant} variant with "
                f'pipeline.save_pretrained(folder, variant="{variant}"), then push the folder.'
            )
        half = f"{name}/{full.files[0].stem}.{variant}.safetensors"
        made[half] = staging / half
        _write_half(full.files[0], made[half], _VARIANTS[variant])
    return made


def _write_half(full: Path, half: Path, dtype: torch.dtype) -> None:
    """Write weights of another precision; what is not floating-point stays."""
    half.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: _rounded(w, dtype) for name, w in load_file(full).items()}, half, metadata={"format": "pt"})


def _rounded(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight.to(dtype) if weight.is_floating_point() else weight


def _check_rounded(full: Weights, half: Weights) -> None:
    """Raise HubError where the weights of a variant are not the full ones in its precision."""
    places, dtype = tensor_files(full), _VARIANTS[str(half.variant)]
    for name, path in tensor_files(half).items():
        with safe_open(path, "pt") as file:
            weight = file.get_tensor(name)
        if weight.is_floating_point() and weight.dtype != dtype:
            raise HubError(
                f"{path} is named {half.variant}, but its weights are not of that precision. Delete it; --variant "
                f"{half.variant} makes it from {full.files[0].name}."
            )
        with safe_open(places[name], "pt") as file:
            if not torch.equal(weight, _rounded(file.get_tensor(name), dtype)):
                raise HubError(
                    f"{path} is not {full.files[0].name} in the precision {half.variant}: {name!r} differs, so it "
                    f"is of an earlier save. Delete it; --variant {half.variant} makes it anew."
                )


# What a push replaces -------------------------------------------------------------------------------------------------


def stale(known: Mapping[str, str], files: Files, changed: Collection[str]) -> list[str]:
    """Return the files of earlier pushes that the new index would load, or that lie in the folders of its parts.

    Half-precision weights beside full ones that stay as they are stay, too: they are of the same network.

    Args:
        known: Name -> checksum of the repository's files.
        files: Those of this push.
        changed: Names of those among them whose content the repository does not hold.

    Raises:
        HubError: the push holds a variant alone, and the repository the full weights of another push.
    """
    if INDEX not in files:
        return []
    parts = component_names(files[INDEX])
    gone = [name for name in known if name.split("/")[0] in parts and name not in files]
    if any(is_weights_name(name) for name in known) or "scheduler_config.json" in known:  # it was flat
        flat = {name for name in known if is_weights_name(name)} | {"config.json", "scheduler_config.json"}
        gone += [name for name in known if name in flat and name not in files]
    for name in gone:
        if is_weights_name(name.rsplit("/", 1)[-1]) and not _variant_of(name) and name.endswith(".safetensors"):
            part = name.rpartition("/")[0]
            beside = [new for new in files if part and new.startswith(f"{part}/") and is_weights_name(Path(new).name)]
            if beside and all(_variant_of(new) for new in beside):
                raise HubError(
                    f"The repository holds the full weights {name}, and this folder {_variant_of(beside[0])} ones "
                    "only: one index would load two networks. Save the full pipeline and push it with --variant "
                    f"{_variant_of(beside[0])}, which makes both of one."
                )
    return [name for name in gone if not (_variant_of(name) and _full_name(name) in files.keys() - set(changed))]


def _variant_of(name: str) -> str | None:
    """Return the variant in the name of a file of weights, as fp16; None for full ones."""
    return next((word for word in _VARIANTS if f".{word}." in name or f".{word}-" in name), None)


def _full_name(name: str) -> str:
    """Return the name of the full weights beside those of a variant."""
    return name.replace(f".{_variant_of(name)}", "")


# Making and checking --------------------------------------------------------------------------------------------------


def is_rendered(card: Path) -> bool:
    """Whether a card was rendered by ddpm_ext, so that it may be written anew: one written by hand is kept."""
    return RENDERED in card.read_text(encoding="utf-8")


def minimal_card(repo_id: str, files: Files) -> str:
    """Return a card that says how to load the pipeline, with its number of steps and, if it has classes, a class."""

    def config(name: str) -> JsonRecord:
        return json.loads(files[name].read_text(encoding="utf-8")) if name in files else {}

    steps = config("scheduler/scheduler_config.json").get("num_train_timesteps", 1000)
    conditional = config("unet/config.json").get("num_class_embeds") is not None
    return _MINIMAL_CARD.format(
        repo_id=repo_id,
        name=repo_id.split("/")[-1],
        package="ddpm_ext" if conditional else "diffusers",
        kind="DDPMExtPipeline" if conditional else "DDPMPipeline",
        arguments=f"num_inference_steps={steps}" + (", class_labels=0" if conditional else ""),
    )


def stage(files: Files, staging: Path) -> Files:
    """Return the same files under `staging`, as they are now: linked where the disk allows it, else copied.

    A run replaces its files whole, so a link keeps the old content while the run goes on.
    """
    staged: Files = {}
    for name, path in files.items():
        staged[name] = staging / name
        staged[name].parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path.resolve(), staged[name])
        except OSError:
            shutil.copy2(path, staged[name])
    return staged


def check_no_token(files: Files, token: str | None) -> None:
    """Raise HubError where a file that would be pushed holds a token of the Hub."""
    for name, path in files.items():
        if path.suffix in (".json", ".md", ".yaml", ".yml", ".txt", ".py"):
            content = path.read_bytes()
            if _TOKEN.search(content) or (token and token.encode() in content):
                raise HubError(
                    f"{path} holds what looks like a token of the Hub, and {name} would be pushed for all to see. "
                    f"Delete it from the file, revoke it at the Hub's settings/tokens, and push again."
                )
