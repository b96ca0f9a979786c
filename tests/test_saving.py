"""A pipeline saved over an earlier one of any kind loads as what was saved last; weights that lack are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline
from networks import tiny_unet
from safetensors.torch import load_file, save_file

from ddpm_ext.errors import UserError
from ddpm_ext.pipelines.ddpm import DDPMExtPipeline
from ddpm_ext.schedulers.ddpm import DDPMExtScheduler

KINDS: dict[str, dict[str, Any]] = {
    "single": {},
    "shards": {"max_shard_size": "20KB"},
    "larger shards": {"max_shard_size": "60KB"},
    "pickle": {"safe_serialization": False},
    "sharded pickle": {"safe_serialization": False, "max_shard_size": "20KB"},
    "fp16": {"variant": "fp16"},
    "sharded fp16": {"variant": "fp16", "max_shard_size": "10KB"},
    "other variant": {"variant": "ema"},
}


def pipeline(seed: int, dtype: torch.dtype = torch.float32) -> DDPMExtPipeline:
    unet = tiny_unet(seed)
    torch.nn.Module.to(unet, dtype=dtype)
    return DDPMExtPipeline(unet, DDPMExtScheduler())


def holds(folder: Path, saved: DDPMExtPipeline, cls: Any = DDPMExtPipeline, **options: Any) -> bool:
    loaded = cls.from_pretrained(folder, use_safetensors=None, **options).unet.state_dict()
    weights = saved.unet.state_dict()
    return loaded.keys() == weights.keys() and all(
        torch.equal(value.half(), weights[name].half()) for name, value in loaded.items()
    )


@pytest.mark.parametrize("second", ["single", "shards", "pickle", "fp16"])
@pytest.mark.parametrize("first", KINDS)
def test_what_was_saved_last_is_what_loads(first: str, second: str, tmp_path: Path) -> None:
    pipeline(1).save_pretrained(tmp_path, **KINDS[first])
    last = pipeline(2)
    last.save_pretrained(tmp_path, **KINDS[second])
    variant = KINDS[second].get("variant")
    for cls in (DDPMExtPipeline, DDPMPipeline):
        assert holds(tmp_path, last, cls, variant=variant)
    if variant is None and KINDS[first].get("variant"):  # the old variant is gone, and not loaded in place of the new
        with pytest.raises(ValueError):
            DDPMExtPipeline.from_pretrained(tmp_path, variant=KINDS[first]["variant"])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".saving")] == []


@pytest.mark.parametrize("order", [("single", "fp16"), ("sharded fp16", "shards")])
def test_another_precision_of_the_same_weights_stays(order: tuple[str, str], tmp_path: Path) -> None:
    made = pipeline(1)
    for kind in order:
        made.save_pretrained(tmp_path, **KINDS[kind])
    assert holds(tmp_path, made) and holds(tmp_path, made, variant="fp16")
    pipeline(2, torch.float16).save_pretrained(tmp_path)
    assert holds(tmp_path, pipeline(2)) and not list(tmp_path.rglob("*.fp16*"))


def test_a_save_that_fails_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pipeline(1), pipeline(2)
    first.save_pretrained(tmp_path)

    def full(*_args: Any, **_options: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(second.scheduler, "save_pretrained", full, raising=False)
    monkeypatch.setattr(type(second.scheduler), "save_pretrained", full)
    with pytest.raises(OSError, match="no space left"):
        second.save_pretrained(tmp_path)
    assert holds(tmp_path, first)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".saving")] == []


@pytest.mark.parametrize("kind", ["single", "shards", "fp16", "pickle"])
@pytest.mark.parametrize("name", ["conv_out.weight", "time_embedding.linear_1.bias"])
def test_a_missing_weight_is_named(kind: str, name: str, tmp_path: Path) -> None:
    pipeline(1).save_pretrained(tmp_path, **KINDS[kind])
    for path in (tmp_path / "unet").iterdir():
        if path.suffix == ".safetensors":
            weights = load_file(path)
            weights.pop(name, None)
            save_file(weights, path, metadata={"format": "pt"})
        elif path.suffix == ".bin":
            weights = torch.load(path, weights_only=True)
            weights.pop(name)
            torch.save(weights, path)
    for options in ({}, {"low_cpu_mem_usage": False}) if kind != "pickle" else ({},):
        with pytest.raises(UserError, match=name):
            DDPMExtPipeline.from_pretrained(tmp_path, variant=KINDS[kind].get("variant"), **options)
    given = pipeline(3).unet
    assert DDPMExtPipeline.from_pretrained(tmp_path, unet=given).unet is given  # then the file is not needed
