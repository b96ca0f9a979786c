"""A folder on disk -> the files of a Hub repository: what is pushed, under which name, and by which checksum known.

    model_index.json
    unet/            config.json, diffusion_pytorch_model.safetensors, diffusion_pytorch_model.fp16.safetensors
    scheduler/       scheduler_config.json
    README.md        the card, and the pictures that it shows
    eval.json, config.json      of the run

Nothing else of a run folder: no checkpoints, no optimiser state, no logs, no pickles.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .retry import HubError

Files = dict[str, Path]  # name in the repository -> file on disk
INDEX = "model_index.json"
RUN_FILES = ("README.md", "config.json", "eval.json")
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
RENDERED = "<!-- Rendered by ddpm_ext from "  # begins the line that a card written by hand does not have
TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")

MINIMAL_CARD = """---
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


def collect(folder: str | os.PathLike[str], staging: Path, variant: str | None = None) -> Files:
    """The files to push of a run folder or of a saved pipeline.

    Args:
        folder: A run folder, which holds pipeline/, or a folder that holds model_index.json.
        staging: An empty folder for what has to be made; nothing is written to `folder`.
        variant: "fp16" or "bf16": also weights of that precision, made from the full ones where they are missing.

    Raises:
        HubError: the folder holds no pipeline, its weights are pickles, or the variant is not what its name says.
    """
    folder = Path(folder)
    pipeline = next((path for path in (folder, folder / "pipeline") if (path / INDEX).is_file()), None)
    if pipeline is None:
        raise HubError(
            f"{folder} holds neither {INDEX} nor pipeline/{INDEX}: it is no saved pipeline and no finished run. Give "
            "the folder of one; scripts/train.py writes it."
        )
    files = pipeline_files(pipeline)
    check_whole(files)
    if variant is not None:
        files |= variant_files(files, variant, staging)
    files |= {name: folder / name for name in RUN_FILES if (folder / name).is_file()}
    return files | pictures(folder)


def pipeline_files(pipeline: Path) -> Files:
    """The index and each component's configuration and safetensors."""
    files = {INDEX: pipeline / INDEX}
    for name in components(pipeline / INDEX):
        present = sorted(path for path in (pipeline / name).glob("*") if path.suffix in (".json", ".safetensors"))
        pickled = [path.name for path in (pipeline / name).glob("*") if path.suffix in PICKLES]
        if pickled and not any(path.suffix == ".safetensors" for path in present):
            raise HubError(
                f"{pipeline / name} holds its weights as a pickle ({pickled[0]}), which can run code where it is "
                "loaded. Convert it first: python scripts/convert.py --source diffusers --checkpoint "
                f"{pipeline} --output_dir <folder>"
            )
        files |= {f"{name}/{path.name}": path for path in present}
    return files


def check_whole(files: Files) -> None:
    """Raise HubError where a pipeline lacks the weights of a network, or holds a file that cannot be read."""
    for name, path in files.items():
        try:
            if name.endswith(".json"):
                json.loads(path.read_text(encoding="utf-8"))
            elif name.endswith(".safetensors"):
                with safe_open(path, "pt") as weights:  # reads the header, and compares it with the file's size
                    weights.keys()
        except (ValueError, SafetensorError) as error:
            raise HubError(
                f"{path} is broken ({error}) and is not pushed. Save the pipeline again, then push."
            ) from error
    networks = [Path(name).parent.as_posix() for name in files if re.fullmatch(r"[^/]+/config\.json", name)]
    for folder in networks:
        if not any(name.startswith(f"{folder}/") and name.endswith(".safetensors") for name in files):
            raise HubError(
                f"{files[f'{folder}/config.json'].parent} holds a network's config.json and no weights "
                "(*.safetensors). Save the pipeline again, then push."
            )


def components(index: Path) -> list[str]:
    """Sub-folders that a model_index.json names."""
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HubError(f"{index} is broken ({error}) and is not pushed. Save the pipeline again, then push.") from error
    return [name for name, entry in entries.items() if isinstance(entry, list) and entry[0] is not None]


def pictures(folder: Path) -> Files:
    """The pictures that the card shows, and the newest grid of samples."""
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    named = set(re.findall(r"[\w./-]+\.(?:png|jpe?g|gif|webp)", text))
    grids = sorted(path for path in (folder / "samples").glob("*") if path.suffix in PICTURES)
    named |= {f"samples/{grids[-1].name}"} if grids else set()
    inside = folder.resolve()
    return {
        name: folder / name
        for name in sorted(named)
        if (folder / name).is_file() and (folder / name).resolve().is_relative_to(inside)
    }


def variant_files(files: Files, variant: str, staging: Path) -> Files:
    """Weights of half the precision beside every full one, really of the precision that their name says."""
    if variant not in VARIANTS:
        raise HubError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}.")
    made: Files = {}
    for name, path in files.items():
        stem, suffix = os.path.splitext(name)
        if suffix != ".safetensors" or stem.split(".")[-1] in VARIANTS:
            continue
        if re.search(r"-\d{5}-of-\d{5}$", stem):
            raise HubError(
                f"{name} is one of several shards: save the {variant} variant with "
                f'pipeline.save_pretrained(folder, variant="{variant}"), then push the folder.'
            )
        half = f"{stem}.{variant}{suffix}"
        if half not in files:
            made[half] = staging / half
            write_half(path, made[half], VARIANTS[variant])
        elif not is_of(files[half], VARIANTS[variant]):
            raise HubError(
                f"{files[half]} is named {variant}, but its weights are not of that precision. Delete it, and it is "
                f"made from {path.name}."
            )
    return made


def write_half(full: Path, half: Path, dtype: torch.dtype) -> None:
    """Write weights of another precision; what is not floating-point stays."""
    weights = load_file(full)
    half.parent.mkdir(parents=True, exist_ok=True)
    halved = {name: w.to(dtype) if w.is_floating_point() else w for name, w in weights.items()}
    save_file(halved, half, metadata={"format": "pt"})


def is_of(path: Path, dtype: torch.dtype) -> bool:
    """Whether every floating-point tensor of a safetensors file has this precision."""
    word = {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    with safe_open(path, "pt") as weights:
        words = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118 (not a dict)
    return words.isdisjoint({"F64", "F32", "F16", "BF16"} - {word})


def minimal_card(repo_id: str, files: Files) -> str:
    """A card that says how to load the pipeline, with its own number of steps and, if it has classes, a class."""

    def config(name: str) -> dict[str, Any]:
        return json.loads(files[name].read_text(encoding="utf-8")) if name in files else {}

    steps = config("scheduler/scheduler_config.json").get("num_train_timesteps", 1000)
    conditional = config("unet/config.json").get("num_class_embeds") is not None
    return MINIMAL_CARD.format(
        repo_id=repo_id,
        name=repo_id.split("/")[-1],
        package="ddpm_ext" if conditional else "diffusers",
        kind="DDPMExtPipeline" if conditional else "DDPMPipeline",
        arguments=f"num_inference_steps={steps}" + (", class_labels=0" if conditional else ""),
    )


def stale(known: Mapping[str, str], files: Files, changed: list[str]) -> list[str]:
    """Files of earlier pushes in the pipeline's folders; none where a variant alone is pushed.

    Half-precision weights beside full ones that stay as they are stay, too: they are of the same network.

    Args:
        known: Name -> checksum of the repository's files.
        files: Those of this push.
        changed: Names of those among them whose content the repository does not hold.
    """
    folders = components(files[INDEX]) if INDEX in files else []
    if all(variant_of(name) for name in files if name.endswith(".safetensors")):
        return []
    gone = [name for name in known if "/" in name and name.split("/")[0] in folders and name not in files]
    return [name for name in gone if not (variant_of(name) and full_name_of(name) in files.keys() - set(changed))]


def variant_of(name: str) -> str | None:
    """The variant in the name of a file of weights, as fp16; None for full ones."""
    word = Path(name).stem.split(".")[-1]
    return word if word in VARIANTS else None


def full_name_of(name: str) -> str:
    """The name of the full weights beside those of a variant."""
    return name.replace(f".{variant_of(name)}.", ".")


def stage(files: Files, staging: Path) -> Files:
    """The same files under `staging`, as they are now: linked where the disk allows it, else copied.

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
            if TOKEN.search(content) or (token and token.encode() in content):
                raise HubError(
                    f"{path} holds what looks like a token of the Hub, and {name} would be pushed for all to see. "
                    f"Delete it from the file, revoke it at the Hub's settings/tokens, and push again."
                )


# Checksums ------------------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """The checksum by which the Hub knows a large file."""
    return digest(path, hashlib.sha256())


def git_sha1(path: Path) -> str:
    """The checksum by which git knows any other file: SHA-1 of "blob", its size, a zero byte, the content."""
    return digest(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size))


def digest(path: Path, state: "hashlib._Hash") -> str:  # noqa: UP037 (a name of the type stubs alone)
    """A file's content through a hash, in hexadecimal."""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def has_checksum(path: Path, checksum: str) -> bool:
    """Whether a file's content is the one known by this SHA-256 (64 letters) or git SHA-1 (40)."""
    return (sha256(path) if len(checksum) == 64 else git_sha1(path)) == checksum


def checksums(siblings: object) -> dict[str, str]:
    """Name -> checksum of a repository's files, from `model_info(files_metadata=True).siblings`."""
    known: dict[str, str] = {}
    for file in siblings or ():  # pyright: ignore[reportGeneralTypeIssues]
        lfs = file.lfs
        checksum = (lfs["sha256"] if isinstance(lfs, Mapping) else lfs.sha256) if lfs else file.blob_id
        if checksum:
            known[file.rfilename] = checksum
    return known
