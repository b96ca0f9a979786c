"""Converted networks against the original codes, on random weights: the table of docs/convert.md.

    git clone https://github.com/openai/guided-diffusion codes/guided-diffusion        # and so on, four of them
    python benchmarks/originals.py --codes codes

Each original is built, every weight of it drawn, and its state dict converted; both compute the same images in float32,
at the first, the last and two other steps. Shown is the greatest difference over the deviation of the output.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddpm_ext.conversion.config import ConvertOptions
from ddpm_ext.conversion.convert import convert_weights

__all__ = ["Case", "cases", "relative_difference"]


class Case(NamedTuple):
    """An original network and what is said of it when it is converted."""

    source: Any
    words: str
    build: Callable[[], nn.Module]
    said: dict[str, Any]
    classes: int | None = None
    scale: float = 1.0  # the network is given this multiple of t


SAID: dict[str, Any] = {"prediction_type": "epsilon", "noise_schedule": "linear", "resolution": 32}
FIXED: dict[str, Any] = {"variance_type": "fixed_large"}


def cases(codes: Path) -> Iterator[Case]:
    """Yield the networks, those of CIFAR-10 and LSUN at their published sizes where a CPU does them in seconds."""
    yield from _guided_diffusion(_module(codes / "guided-diffusion", "guided_diffusion.unet").UNetModel)
    yield from _improved_diffusion(_module(codes / "improved-diffusion", "improved_diffusion.unet").UNetModel)
    paper = {"ch": 128, "ch_mult": [1, 2, 2, 2], "num_res_blocks": 2, "dropout": 0.1}
    model = _module(codes / "pytorch-ddpm", "model").UNet
    yield Case("pytorch-ddpm", "its CIFAR-10 recipe", lambda: model(T=1000, attn=[1], **paper), {**SAID, **FIXED})
    ho = _module(codes / "ddim", "models.diffusion").Model
    said = {**SAID, **FIXED, "num_timesteps": 1000}
    yield Case("ddim", "CIFAR-10 recipe", lambda: ho(_ddim(32, paper)), said)
    lsun = {**paper, "ch": 32, "ch_mult": [1, 1, 2, 2, 4, 4], "dropout": 0.0}
    yield Case("ddim", "six levels as for LSUN, narrow", lambda: ho(_ddim(64, lsun)), {**said, "resolution": 64})


def _guided_diffusion(network: Callable[..., nn.Module]) -> Iterator[Case]:
    adm = {"image_size": 32, "in_channels": 3, "out_channels": 6, "num_res_blocks": 1, "use_scale_shift_norm": True}
    adm |= {"resblock_updown": True, "model_channels": 64, "channel_mult": (1, 2, 3), "attention_resolutions": (2, 4)}
    said = {**SAID, "num_timesteps": 1000}
    for words, more, heads, classes in (
        (
            "residual resampling, classes, learned variance, heads of 32, new order",
            {"num_classes": 10, "num_head_channels": 32, "use_new_attention_order": True},
            {"num_head_channels": 32, "attention_order": "new"},
            10,
        ),
        (
            "residual resampling, attention on three levels, heads of 64, legacy order",
            {"attention_resolutions": (1, 2, 4), "num_head_channels": 64},
            {"num_head_channels": 64, "attention_order": "legacy"},
            None,
        ),
        (
            "convolutions, no scale-shift, 4 heads, new order",
            {"resblock_updown": False, "use_scale_shift_norm": False, "out_channels": 3, "num_heads": 4}
            | {"model_channels": 32, "channel_mult": (1, 2), "attention_resolutions": (2,)}
            | {"use_new_attention_order": True},
            {"num_heads": 4, "attention_order": "new", **FIXED},
            None,
        ),
        (
            "heads of 16 over widths 32, 64, 96",
            {"model_channels": 32, "attention_resolutions": (1, 2, 4), "num_head_channels": 16},
            {"num_head_channels": 16, "attention_order": "legacy"},
            None,
        ),
    ):
        options = {**adm, **more}
        yield Case("guided-diffusion", words, lambda options=options: network(**options), {**said, **heads}, classes)


def _improved_diffusion(network: Callable[..., nn.Module]) -> Iterator[Case]:
    recipe = {"in_channels": 3, "model_channels": 128, "out_channels": 6, "num_res_blocks": 3}
    recipe |= {"attention_resolutions": (2, 4), "channel_mult": (1, 2, 2, 2), "num_heads": 4}
    recipe |= {"use_scale_shift_norm": True}
    rescaled = {"num_timesteps": 4000, "rescale_timesteps": True, "num_heads": 4, "attention_order": "legacy"}
    said = {**SAID, **rescaled, "noise_schedule": "cosine"}
    narrow = {**recipe, "model_channels": 64}
    classes = {**recipe, "num_res_blocks": 1, "channel_mult": (1, 2, 3), "num_heads": 1, "num_classes": 10}
    plain = {**SAID, "num_timesteps": 1000, "num_heads": 1}
    yield Case("improved-diffusion", "its CIFAR-10 recipe", lambda: network(**recipe), said, scale=0.25)
    yield Case("improved-diffusion", "half as wide, 4000 rescaled steps", lambda: network(**narrow), said, scale=0.25)
    yield Case("improved-diffusion", "one head over several widths, classes", lambda: network(**classes), plain, 10)


def _ddim(size: int, model: dict[str, Any]) -> SimpleNamespace:
    more = {"type": "simple", "in_channels": 3, "out_ch": 3, "attn_resolutions": [16], "resamp_with_conv": True}
    return SimpleNamespace(
        model=SimpleNamespace(**model, **more),
        data=SimpleNamespace(image_size=size),
        diffusion=SimpleNamespace(num_diffusion_timesteps=1000),
    )


def _module(folder: Path, name: str) -> Any:
    """Import a module of a checkout."""
    if not folder.is_dir():
        raise SystemExit(f"--codes must hold a checkout {folder.name}, and there is none at {folder}.")
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


@torch.no_grad()
def relative_difference(case: Case) -> tuple[int, float]:
    """Return the number of parameters, and max |ours - theirs| / std(theirs) over two images at each of four steps."""
    torch.manual_seed(0)
    original = case.build().eval()
    for name, weight in original.named_parameters():  # some begin at 0, where a wrong place would not show
        if not weight.requires_grad:  # the sines and cosines of pytorch-ddpm
            continue
        centre = 1.0 if weight.ndim == 1 and name.endswith("weight") else 0.0  # of a norm
        weight.copy_(centre + torch.randn_like(weight) * (0.1 if weight.ndim < 2 else weight[0].numel() ** -0.5))
    said = case.said if case.classes is None else {**case.said, "null_label": "none"}
    unet = convert_weights(original.state_dict(), ConvertOptions(case.source, "", "", **said)).unet
    size, T = case.said["resolution"], case.said.get("num_timesteps", 1000)
    differences: list[Tensor] = []
    for t in (0, 1, T // 2, T - 1):
        x, steps = torch.randn(2, 3, size, size), torch.full((2,), t)
        labels = None if case.classes is None else torch.tensor([0, case.classes - 1])
        scaled = steps if case.scale == 1 else steps * case.scale
        theirs = original(x, scaled) if labels is None else original(x, scaled, labels)
        ours = unet(x, steps, class_labels=labels).sample
        differences.append((ours - theirs).abs().max() / theirs.std())
    return sum(weight.numel() for weight in original.parameters() if weight.requires_grad), float(max(differences))


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=Path, required=True, help="Folder of the four checkouts.")
    codes = parser.parse_args().codes
    print("| network | parameters | relative difference |\n| --- | ---: | ---: |")
    for case in cases(codes):
        count, difference = relative_difference(case)
        print(f"| {case.source}, {case.words} | {count:,} | {difference:.1e} |", flush=True)
    for name in ("guided-diffusion", "improved-diffusion", "pytorch-ddpm", "ddim"):
        commit = subprocess.run(["git", "-C", codes / name, "log", "-1", "--format=%h"], capture_output=True, text=True)
        print(f"{name} {commit.stdout.strip()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
