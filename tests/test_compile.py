"""--compile: what is compiled and how, the numbers of an eager run, exact resume, grids that compile nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import UNet2DModel
from networks import TINY_UNET
from torch.testing import assert_close
from training import assert_bitwise_equal, run_here, weights

from ddpm_ext.training.builders import compile_network
from ddpm_ext.training.config import TrainConfig
from ddpm_ext.training.outputs.export import Exporter

PLAIN = TrainConfig(dataset_name="digits", max_train_steps=1)
COMPILED = replace(PLAIN, compile=True)


@pytest.mark.parametrize(
    ("device", "kind", "accumulation", "mode"),
    [
        ("cuda", "NO", 1, "reduce-overhead"),
        ("cuda", "NO", 2, None),  # a graph's own memory would hold the sum of the gradients
        ("cuda", "MULTI_GPU", 1, None),
        ("cuda", "DEEPSPEED", 1, None),
        ("cpu", "NO", 1, None),
    ],
)
def test_one_gpu_and_one_pass_an_update_record_graphs(
    monkeypatch: pytest.MonkeyPatch, device: str, kind: str, accumulation: int, mode: str | None
) -> None:
    asked = compiled_modules(monkeypatch)
    there = accelerator(device, kind)
    assert compile_network(COMPILED, network := tiny(), there, accumulation, None)
    assert asked == [(network, {"dynamic": False, "mode": mode})]
    assert not compile_network(PLAIN, network, there, accumulation, None) and len(asked) == 1
    assert compile_network(PLAIN, network, there, accumulation, {"backend": "aot_eager"})
    assert asked[1] == (network, {"backend": "aot_eager"})


def test_sharded_weights_are_compiled_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = compiled_modules(monkeypatch)
    assert compile_network(COMPILED, tiny(), accelerator("cuda", "FSDP", sharded=True), 1, None)
    kinds = {type(module).__name__ for module, _ in asked}
    assert kinds == {"ResnetBlock2D", "Attention"} and len(asked) > 2
    assert all(arguments == {"dynamic": False, "mode": None} for _, arguments in asked)


def tiny() -> UNet2DModel:
    return UNet2DModel(**TINY_UNET)


def compiled_modules(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.nn.Module, dict[str, Any]]]:
    """The modules that are asked to compile, with the arguments; none is compiled."""
    asked: list[tuple[torch.nn.Module, dict[str, Any]]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **arguments: asked.append((self, arguments)))
    return asked


def accelerator(device: str, kind: str, sharded: bool = False) -> Accelerator:
    there = SimpleNamespace(
        distributed_type=DistributedType(kind), device=torch.device(device), is_fsdp2=sharded, is_main_process=True
    )
    return cast(Accelerator, there)


# Each says what it compiles on. On a GPU the passes are replayed as CUDA graphs.
DEVICES = [pytest.param(True, marks=pytest.mark.slow), pytest.param(False, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("cpu", DEVICES)
@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own doings
def test_a_compiled_run_has_the_numbers_of_an_eager_one_and_resumes_bitwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu: bool
) -> None:
    compiled_in_grids: list[int] = []
    sample = Exporter.sample

    def counting(self: Exporter, *arguments: Any, **named: Any) -> Any:
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        found = sample(self, *arguments, **named)
        compiled_in_grids.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
        return found

    monkeypatch.setattr(Exporter, "sample", counting)
    short = {"cpu": cpu, "checkpointing_steps": 3, "eval_batch_size": 3, "save_images_steps": 2, "dropout": 0.1}
    for name, updates, more in (
        ("eager", 6, {}),
        ("whole", 6, {"compile": True}),
        ("halves", 3, {"compile": True}),
        ("halves", 6, {"compile": True}),
    ):
        torch.compiler.reset()
        assert run_here(tmp_path / name, max_train_steps=updates, **short, **more) == 0
    assert_bitwise_equal(tmp_path / "whole", tmp_path / "halves", 6)
    assert compiled_in_grids and not any(compiled_in_grids)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("eager", "whole")
    ]
    # The compiler drops out other values: the losses of the first updates are near each other, not equal.
    assert lines[0][0]["loss"] == pytest.approx(lines[1][0]["loss"], rel=0.05)


@pytest.mark.parametrize("cpu", DEVICES)
@pytest.mark.filterwarnings("ignore")
def test_without_dropout_the_gradients_are_those_of_an_eager_run(tmp_path: Path, cpu: bool) -> None:
    for name, compiled in (("eager", False), ("compiled", True)):
        torch.compiler.reset()
        changes = {"cpu": cpu, "compile": compiled, "dropout": 0.0, "max_train_steps": 1, "checkpointing_steps": 1}
        assert run_here(tmp_path / name, **changes) == 0
    eager, compiled = (weights(tmp_path / name, 1, "optimizer") for name in ("eager", "compiled"))
    gradients = [name for name in eager if name.endswith("exp_avg")]  # a tenth of them, after one update
    assert len(gradients) > 50
    for name in gradients:
        assert_close(compiled[name], eager[name], rtol=1e-3, atol=1e-5)
