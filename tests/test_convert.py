"""Checkpoints of other codes: the converted network computes the same, and what does not fit or tell is named."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from other_networks import HoNetwork, OpenAINetwork, PyTorchDDPM
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddpm_ext import DDPMExtPipeline
from ddpm_ext.cli.main import main
from ddpm_ext.conversion.checkpoints import read_weights
from ddpm_ext.conversion.config import ConvertError, ConvertOptions
from ddpm_ext.conversion.convert import (
    _sinusoids,  # pyright: ignore[reportPrivateUsage]
    convert,
    convert_weights,
)
from ddpm_ext.conversion.converted_card import fingerprint
from ddpm_ext.conversion.recognise import recognise
from ddpm_ext.errors import UserError
from ddpm_ext.models.classes import classes_of

ROOT = Path(__file__).resolve().parent.parent
# What no file tells, as these tests have it; `options` takes what a source has.
SAID: dict[str, Any] = {"resolution": 16, "prediction_type": "epsilon", "noise_schedule": "linear"}
OPENAI: dict[str, Any] = {"num_timesteps": 1000, "num_heads": 4, "attention_order": "legacy"}
ORIGINALS: dict[str, Any] = {
    "pytorch-ddpm": PyTorchDDPM,
    "improved-diffusion": OpenAINetwork,
    "guided-diffusion": OpenAINetwork,
    "ddim": HoNetwork,
}


CLASSES = {"null_label": "none"}  # asked for where there are classes


def options(source: Any, **more: Any) -> ConvertOptions:
    said = {**SAID, **(OPENAI if "diffusion" in source else {"variance_type": "fixed_large"})}
    said |= {"num_timesteps": 1000} if source == "ddim" else {}
    if "num_head_channels" in more:
        del said["num_heads"]
    return ConvertOptions(source=source, checkpoint="", output_dir="", **{**said, **more})


def assert_same_outputs(original: nn.Module, unet: Any, t: Tensor, tau: Tensor, **labels: Tensor) -> None:
    """Equal to 1e-5 of outputs of about 1, in float32 on either side."""
    x = torch.randn(len(t), unet.config.in_channels, 16, 16)
    with torch.no_grad():
        theirs = original.eval().double()(x.double(), tau, *labels.values())
        ours = unet(x, t, class_labels=labels.get("y")).sample
    assert theirs.std() > 0.05
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)


T_SEEN = torch.tensor([0, 1, 500, 999])


@pytest.mark.parametrize(("mults", "attend", "n"), [((1, 2), (1,), 2), ((1, 1, 2), (0, 2), 1), ((1,), (), 1)])
@pytest.mark.parametrize("source", ["pytorch-ddpm", "ddim"])
def test_networks_of_one_head_convert(source: Any, mults: tuple[int, ...], attend: tuple[int, ...], n: int) -> None:
    original = ORIGINALS[source](mults=mults, attend=attend, n=n)
    assert recognise(original.state_dict()) == source
    pipe = convert_weights(original.state_dict(), options(source))
    assert_same_outputs(original, pipe.unet, T_SEEN, T_SEEN)
    assert pipe.scheduler.config.variance_type == "fixed_large"
    assert pipe.scheduler.config.clip_sample is (source == "ddim")
    assert pipe.scheduler.config.num_train_timesteps == 1000


WIDE = {"mults": (1, 2, 3), "attend": (0, 1, 2)}
NETWORKS: list[dict[str, Any]] = [
    {},
    {"mults": (1, 2, 2), "attend": (1, 2), "n": 2, "heads": 2},
    {"scale_shift": False, "out": 3, "heads": 1},
    {"classes": 10, "attend": ()},
    {**WIDE, "n": 1, "heads": 1},
    {**WIDE, "n": 1, "head_channels": 16},
    {"channels": 1, "out": 2, "n": 1},
]
GUIDED: list[dict[str, Any]] = [
    {"updown": True, "mults": (1, 1, 2), "attend": (1, 2), "n": 2, "head_channels": 16, "new_order": True},
    {"updown": True, "mults": (1, 1), "attend": (), "n": 1, "heads": 2, "classes": 5},
    {"updown": True, "scale_shift": False, "out": 3, "n": 1, "attend": (0,), "mults": (1, 1), "heads": 1},
    {"updown": True, **WIDE, "n": 2, "head_channels": 32, "classes": 3},
    {"new_order": True},
]


@pytest.mark.parametrize(
    ("source", "more"),
    [*(("improved-diffusion", more) for more in NETWORKS), *(("guided-diffusion", more) for more in NETWORKS + GUIDED)],
)
def test_networks_of_openai_convert(source: Any, more: dict[str, Any]) -> None:
    original = OpenAINetwork(**more)
    heads = {
        name: more[key] for key, name in (("heads", "num_heads"), ("head_channels", "num_head_channels")) if key in more
    }
    learned = more.get("out", 6) != more.get("channels", 3)
    said = {} if learned else {"variance_type": "fixed_small"}
    order = "new" if more.get("new_order") else "legacy"
    said |= CLASSES if "classes" in more else {}
    pipe = convert_weights(original.state_dict(), options(source, attention_order=order, **heads, **said))
    labels = {"y": torch.tensor([0, 2, 1, more["classes"] - 1])} if "classes" in more else {}
    assert_same_outputs(original, pipe.unet, T_SEEN, T_SEEN, **labels)
    assert pipe.scheduler.config.variance_type == ("learned_range" if learned else "fixed_small")
    expected = "guided-diffusion" if more.get("updown") else "improved-diffusion"
    assert len(more.get("mults", (1, 2))) == 1 or recognise(original.state_dict()) == expected


def test_the_two_attention_orders_are_two_networks_of_the_same_names_and_shapes() -> None:
    original = OpenAINetwork(new_order=True)
    weights = original.state_dict()
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([5])
    outputs = {}
    with torch.no_grad():
        for order in ("legacy", "new"):
            pipe = convert_weights(weights, options("guided-diffusion", attention_order=order))
            outputs[order] = pipe.unet(x, t).sample.double()
        theirs = original.eval().double()(x.double(), t)
    assert (outputs["new"] - theirs).abs().max() < 1e-5 < 1e-2 < (outputs["legacy"] - theirs).abs().max()


@pytest.mark.parametrize(
    ("source", "left_out", "more"),
    [
        ("guided-diffusion", ["attention_order"], {}),
        ("guided-diffusion", ["attention_order"], {"num_head_channels": 16}),
        ("improved-diffusion", ["attention_order"], {}),
        ("improved-diffusion", ["num_heads", "attention_order"], {}),
        ("improved-diffusion", ["rescale_timesteps"], {"num_timesteps": 4000}),
        *((source, [name], {}) for source in ORIGINALS for name in SAID),
        *((source, ["num_timesteps"], {}) for source in ("ddim", "improved-diffusion", "guided-diffusion")),
        *((source, ["variance_type"], {}) for source in ("ddim", "pytorch-ddpm")),
    ],
)
def test_what_a_file_cannot_tell_is_asked_for(source: Any, left_out: list[str], more: dict[str, Any]) -> None:
    given = {**more, **dict.fromkeys(left_out)}
    with pytest.raises(ConvertError) as told:
        convert_weights(ORIGINALS[source]().state_dict(), options(source, **given))
    message = str(told.value)
    asked, usual = message.split(": give ")
    assert all(f"--{name}" in asked and f"--{name} " in usual for name in left_out)
    for name in re.findall(r"--(\w+)", message):  # every hint is an option that this source takes
        ConvertOptions(
            source,
            "a",
            "b",
            **{name: {**SAID, **OPENAI, **CLASSES, "rescale_timesteps": True}.get(name, "fixed_small")},
        )


def test_one_head_needs_no_order() -> None:
    weights = OpenAINetwork(heads=1).state_dict()
    told = [
        convert_weights(weights, options("guided-diffusion", num_heads=1, attention_order=order)).unet.state_dict()
        for order in (None, "legacy", "new")
    ]
    assert all(torch.equal(told[0][name], other[name]) for other in told[1:] for name in told[0])


@pytest.mark.parametrize("source", ["pytorch-ddpm", "ddim", "improved-diffusion", "guided-diffusion"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_what_is_predicted_reaches_the_scheduler(source: Any, prediction: Any) -> None:
    """A network that always gives x_0 = 0.5 is exact as one of x_0: each chain ends there."""
    weights = {name: w.clone() for name, w in ORIGINALS[source]().state_dict().items()}
    last = next(
        name.removesuffix("weight") for name in ("tail.2.weight", "out.2.weight", "conv_out.weight") if name in weights
    )
    weights[f"{last}weight"].zero_()
    weights[f"{last}bias"].fill_(0.5)
    pipe = convert_weights(weights, options(source, prediction_type=prediction))
    pipe.set_progress_bar_config(disable=True)
    result: Any = pipe(num_inference_steps=10, output_type="latent")
    image = result.images
    assert ((image - 0.5).abs().max() < 1e-3) == (prediction == "sample")


def test_variances_reach_the_scheduler() -> None:
    for variance in ("fixed_small", "fixed_large"):
        pipe = convert_weights(PyTorchDDPM().state_dict(), options("pytorch-ddpm", variance_type=variance))
        assert pipe.scheduler.config.variance_type == variance
    for variance in ("learned", "learned_range"):
        pipe = convert_weights(OpenAINetwork().state_dict(), options("guided-diffusion", variance_type=variance))
        assert pipe.scheduler.config.variance_type == variance
    with pytest.raises(ConvertError, match="so its variance is learned, got --variance_type fixed_small"):
        convert_weights(OpenAINetwork().state_dict(), options("guided-diffusion", variance_type="fixed_small"))
    with pytest.raises(ConvertError, match="is not learned, got --variance_type learned_range"):
        convert_weights(HoNetwork().state_dict(), options("ddim", variance_type="learned_range"))


def test_rescaled_steps_are_in_the_pipeline() -> None:
    original, t = OpenAINetwork(), torch.tensor([0, 1, 2, 3999])
    said = {"num_timesteps": 4000, "noise_schedule": "cosine"}
    pipe = convert_weights(original.state_dict(), options("improved-diffusion", rescale_timesteps=True, **said))
    assert_same_outputs(original, pipe.unet, t, t * 0.25)
    assert (len(pipe.scheduler), pipe.scheduler.config.beta_schedule) == (4000, "squaredcos_cap_v2")
    plain = convert_weights(original.state_dict(), options("improved-diffusion", rescale_timesteps=False, **said))
    assert_same_outputs(original, plain.unet, t, t)


def test_the_linear_schedule_of_openai_keeps_its_end_for_every_number_of_steps() -> None:
    weights = OpenAINetwork().state_dict()
    ends = []
    for T in (1000, 4000):
        pipe = convert_weights(weights, options("improved-diffusion", num_timesteps=T, rescale_timesteps=True))
        ends.append(pipe.scheduler.tables.log_alpha_bar[-1])
    torch.testing.assert_close(ends[0], ends[1], rtol=0.02, atol=0)  # the sum of β, and of β²/2 that gets smaller


@pytest.mark.parametrize(
    ("schedule", "more", "betas"),
    [
        ("linear", {}, lambda i: 1e-4 + i * (0.02 - 1e-4)),
        ("linear", {"beta_start": 0.001, "beta_end": 0.3}, lambda i: 0.001 + i * (0.3 - 0.001)),
        ("quad", {}, lambda i: (1e-2 + i * (0.02**0.5 - 1e-2)) ** 2),
        ("sigmoid", {}, lambda i: 1e-4 + (0.02 - 1e-4) / (1 + math.exp(6 - 12 * i))),
    ],
)
def test_schedules_of_ddim_by_hand(schedule: Any, more: dict[str, float], betas: Any) -> None:
    pipe = convert_weights(HoNetwork().state_dict(), options("ddim", noise_schedule=schedule, **more))
    expected = torch.tensor([betas(i / 999) for i in range(1000)])
    torch.testing.assert_close(pipe.scheduler.betas.float(), expected, rtol=1e-4, atol=1e-9)


def test_sinusoids_by_hand() -> None:
    table = _sinusoids(4000, 4)  # τ = t / 4, ω = 1, 1/100
    torch.testing.assert_close(table[8], torch.tensor([math.cos(2), math.cos(0.02), math.sin(2), math.sin(0.02)]))


def changed(weights: dict[str, Tensor], name: str, change: Any) -> dict[str, Tensor]:
    """Weights without a tensor (None), or with another shape of it."""
    rest = {known: weight for known, weight in weights.items() if known != name}
    return rest if change is None else {**rest, name: torch.zeros(change)}


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("head.weight", None, r"no tensor 'head.weight', .* as \(out, in, 3, 3\)"),
        ("head.weight", (), r"'head.weight' of the checkpoint has the shape \(\), where .* has \(out, in, 3, 3\)"),
        ("head.weight", (64, 64, 1, 1), r"'head.weight' .* \(64, 64, 1, 1\), where .* has \(out, in, 3, 3\)"),
        ("tail.2.weight", (), r"'tail.2.weight' of the checkpoint has the shape \(\)"),
        ("tail.2.weight", (6, 32, 3, 3), r"'tail.2.weight' .* \(6, 32, 3, 3\), where .* has 3 channels first"),
        ("downblocks.0.temb_proj.1.weight", (), "'downblocks.0.temb_proj.1.weight'.*has the shape"),
        ("downblocks.0.block1.2.weight", (7, 32, 3, 3), "'downblocks.0.block1.2.weight'.* a multiple of 32 channels"),
        ("downblocks.1.block1.2.weight", (64, 32, 3, 3), r"'downblocks.1.block1.2.weight'.*does not fit.*\(32, 32,"),
        ("downblocks.2.main.weight", None, r"would come from 'downblocks.2.main.weight'"),
        ("downblocks.3.block2.3.weight", None, r"would come from 'downblocks.3.block2.3.weight'"),
        ("downblocks.3.attn.group_norm.weight", None, "would come from 'downblocks.3.attn.group_norm.weight'"),
        ("downblocks.1.block1.2.bias", (7,), r"'downblocks.1.block1.2.bias' of the checkpoint has the shape \(7,\)"),
        ("middleblocks.0.attn.proj_k.weight", (64, 32, 1, 1), "'middleblocks.0.attn.proj_k.weight'.*does not fit"),
        ("middleblocks.0.attn.proj_k.weight", (), r"'middleblocks.0.attn.proj_k.weight'.*does not fit.*\(64, 64\)"),
        ("middleblocks.1.attn.proj_q.weight", (64, 64, 1, 1), "'middleblocks.1.attn.proj_q.weight'.*no place"),
        ("time_embedding.timembedding.0.weight", None, r"no tensor '.*timembedding.0.weight', .* as \(T, width\)"),
        ("time_embedding.timembedding.0.weight", (), r"'.*timembedding.0.weight' of the checkpoint has the shape \(\)"),
        ("time_embedding.timembedding.0.weight", (9, 7), r"'.*timembedding.0.weight'.*\(9, 7\).*not fit.*\(9, 32\)"),
        ("time_embedding.timembedding.1.weight", (128,), r"'.*timembedding.1.weight'.*\(128,\).*fit.*\(128, 32\)"),
    ],
)
def test_the_first_tensor_that_does_not_fit_is_named(name: str, change: Any, sentence: str) -> None:
    weights = changed(PyTorchDDPM().state_dict(), name, change)
    with pytest.raises(ConvertError, match=sentence):
        convert_weights(weights, options("pytorch-ddpm"))


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("input_blocks.0.0.weight", None, r"no tensor 'input_blocks.0.0.weight', .* as \(out, in, 3, 3\)"),
        ("input_blocks.0.0.weight", (), r"'input_blocks.0.0.weight' of the checkpoint has the shape \(\)"),
        ("out.2.weight", (), r"'out.2.weight' of the checkpoint has the shape \(\)"),
        ("out.2.weight", (7, 32, 3, 3), r"'out.2.weight'.* has 3 or 6 channels first"),
        ("input_blocks.1.0.emb_layers.1.weight", (), r"'input_blocks.1.0.emb_layers.1.weight'.*the shape \(\)"),
        ("time_embed.0.weight", (128,), r"'time_embed.0.weight'.*\(128,\), which does not fit .* \(128, 32\)"),
        ("time_embed.0.weight", None, "would come from 'time_embed.0.weight'"),
        ("input_blocks.4.0.op.weight", None, "would come from 'input_blocks.4.0.op.weight'"),
        ("input_blocks.5.1.norm.weight", None, "would come from 'input_blocks.5.1.norm.weight'"),
        ("label_emb.weight", (), r"'label_emb.weight'.*the shape \(\), where .* has \(classes, width\)"),
        ("label_emb.weight", (10, 7), r"'label_emb.weight'.*\(10, 7\), which does not fit .* \(10, 128\)"),
        ("middle_block.1.qkv.weight", (), r"'middle_block.1.qkv.weight'.*the shape \(\), which does not fit"),
        # Of the very shape of one of q, k and v, but no three of them: it is not taken for each.
        ("middle_block.1.qkv.bias", (64,), r"'middle_block.1.qkv.bias'.*the shape \(64,\), which does not fit"),
    ],
)
def test_the_first_tensor_of_improved_diffusion_that_does_not_fit_is_named(
    name: str, change: Any, sentence: str
) -> None:
    weights = changed(OpenAINetwork(classes=10).state_dict(), name, change)
    with pytest.raises(ConvertError, match=sentence):
        convert_weights(weights, options("improved-diffusion", **CLASSES))


@pytest.mark.slow  # some hundred networks
@pytest.mark.parametrize("source", ["pytorch-ddpm", "improved-diffusion", "ddim"])
def test_no_tensor_may_be_missing_or_a_number(source: Any) -> None:
    weights = ORIGINALS[source](mults=(1,), attend=(0,), n=1).state_dict()
    for name in weights:
        for change in (None, ()):
            with pytest.raises(ConvertError, match=re.escape(repr(name)) + r"|no tensor|residual blocks on each level"):
                convert_weights(changed(weights, name, change), options(source))


def test_architectures_that_cannot_be_expressed_are_refused() -> None:
    with pytest.raises(ConvertError, match=r"no tensor 'head.weight', .* Its first is 'time_embed.0.weight'"):
        convert_weights(OpenAINetwork().state_dict(), options("pytorch-ddpm"))
    with pytest.raises(
        ConvertError, match=r"timembedding.0.weight' .* \(1000, 32\), which does not fit .* \(1000, 64\)"
    ):
        convert_weights(PyTorchDDPM(mults=(2,), attend=()).state_dict(), options("pytorch-ddpm"))
    with pytest.raises(ConvertError, match="or --num_head_channels where the code was given that"):
        convert_weights(OpenAINetwork(attend=(0, 1)).state_dict(), options("improved-diffusion"))
    with pytest.raises(ConvertError, match="--num_heads"):
        convert_weights(OpenAINetwork().state_dict(), options("improved-diffusion", num_heads=3))
    with pytest.raises(ConvertError, match=r"num_head_channels must divide the attention's \[64\] channels, got 24"):
        convert_weights(OpenAINetwork().state_dict(), options("guided-diffusion", num_head_channels=24))
    with pytest.raises(ConvertError, match=r"must be as wide as the time embedding, 64,"):  # ADM 512: 0.5, 1, …
        weights = OpenAINetwork(c=64, mults=(0.5, 1)).state_dict()
        convert_weights(weights, options("guided-diffusion"))
    with pytest.raises(ConvertError, match="give --source guided-diffusion"):
        convert_weights(OpenAINetwork(updown=True).state_dict(), options("improved-diffusion"))
    with pytest.raises(ConvertError, match="source must be one of"):
        options("edm")


@pytest.mark.parametrize("out", [3, 6])
def test_a_network_that_takes_another_image_is_refused(out: int) -> None:
    """Super-resolution: 6 channels in; 6 out would pass for images of 6 channels without learned variance."""
    weights = OpenAINetwork(channels=6, out=out).state_dict()
    with pytest.raises(ConvertError, match="super-resolution"):
        convert_weights(weights, options("guided-diffusion", variance_type="fixed_small"))
    if out == 6:  # unless it is said
        said = {"variance_type": "fixed_small", "image_channels": 6}
        assert convert_weights(weights, options("guided-diffusion", **said)).unet.config["in_channels"] == 6


@pytest.mark.parametrize("source", list(ORIGINALS))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(source: Any, bad: float) -> None:
    weights = {name: weight.clone() for name, weight in ORIGINALS[source]().state_dict().items()}
    name = list(weights)[-3]
    weights[name].view(-1)[0] = bad
    with pytest.raises(ConvertError, match=f"'{name}' of the checkpoint holds values that are not finite"):
        convert_weights(weights, options(source))


def test_a_table_of_other_values_is_no_time_embedding() -> None:
    weights = {name: weight.clone() for name, weight in PyTorchDDPM().state_dict().items()}
    weights["time_embedding.timembedding.0.weight"] += 0.1
    with pytest.raises(ConvertError, match="does not hold the sines and cosines"):
        convert_weights(weights, options("pytorch-ddpm"))


@pytest.mark.parametrize(
    ("source", "more", "sentence"),
    [
        ("improved-diffusion", {"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ("improved-diffusion", {"num_timesteps": 0}, "num_timesteps must be at least 1, got 0"),
        ("ddim", {"beta_end": 1.5}, r"beta_end must be in \(0, 1\), got 1.5"),
        ("pytorch-ddpm", {"resolution": -3}, "resolution must be at least 1, got -3"),
        (
            "pytorch-ddpm",
            {"num_heads": 2},
            "--num_heads has an effect only with --source guided-diffusion and imp",
        ),
        ("pytorch-ddpm", {"attention_order": "new"}, "--attention_order has an effect only with"),
        ("pytorch-ddpm", {"num_timesteps": 500}, "--num_timesteps has an effect only with"),
        ("ddim", {"rescale_timesteps": False}, "--rescale_timesteps has an effect only with"),
        ("improved-diffusion", {"beta_start": 0.1}, "--beta_start has an effect only with"),
        ("pytorch-ddpm", {"token": "t"}, "--token has an effect only with --source diffusers"),
        ("diffusers", {"resolution": 64}, "--resolution has .*, and source is 'diffusers'"),
        ("diffusers", {"weights": "net_model"}, "--weights has an effect only with"),
        ("guided-diffusion", {"num_heads": 1, "num_head_channels": 64}, "give one of them"),
        ("guided-diffusion", {"attention_order": "old"}, "attention_order must be one of 'legacy', 'new', got 'old'"),
        ("ddim", {"prediction_type": "x_0"}, "prediction_type must be one of 'epsilon', 'sample'"),
    ],
)
def test_options_without_sense_or_effect_are_refused(source: Any, more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConvertError, match=sentence):
        ConvertOptions(source, "checkpoint", "folder", **more)


class Payload:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(self.path),))


def test_a_checkpoint_is_read_as_data_alone(tmp_path: Path) -> None:
    torch.save({"ema_model": Payload(str(tmp_path / "ran"))}, tmp_path / "evil.pt")
    with pytest.raises(ConvertError, match="can run code"):
        read_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
    torch.save({"head.weight": torch.ones(4000)}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    broken = {"text": b"no checkpoint", "memo": b"hi", "empty": b"", "cut": whole[:5000], "short": whole[:9]}
    for name, content in broken.items():
        (tmp_path / f"{name}.pt").write_bytes(content)
        with pytest.raises(ConvertError, match="no checkpoint that can be read"):
            read_weights(tmp_path / f"{name}.pt")


ONE = {"head.weight": torch.ones(1), "tail.2.bias": torch.full((1,), 2.0)}
OPTIMISER = {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": [{"lr": 0.1}]}


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": weight for name, weight in ONE.items()}


@pytest.mark.parametrize(
    "content",
    [
        ONE,
        *(prefixed(prefix) for prefix in ("module.", "model.", "_orig_mod.", "module._orig_mod.", "model.module.")),
        *({name: ONE, "step": 3, "optim": OPTIMISER} for name in ("state_dict", "model", "ema", "ema_model", "net")),
        {"state_dict": prefixed("model."), "epoch": 1, "optimizer_states": [OPTIMISER]},
        {"model": {"state_dict": prefixed("module.")}, "sched": {"last_epoch": 5}},
        {"net_model": {"head.weight": torch.zeros(1)}, "ema_model": prefixed("module."), "optim": OPTIMISER},
        [prefixed("module."), OPTIMISER, 3, 700],
    ],
)
def test_weights_are_taken_from_containers_and_wrapped_modules(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "ckpt.pt")
    assert read_weights(tmp_path / "ckpt.pt") == ONE


AVERAGED = {"n_averaged": torch.tensor(7), **prefixed("module.")}
BETAS = {"betas": torch.linspace(1e-4, 0.02, 5), "alphas_cumprod": torch.linspace(0.9, 0.1, 5)}
PROCESS = {**BETAS, "sqrt_alphas_cumprod": torch.ones(5), "posterior_mean_coef1": torch.ones(5)}
LIGHTNING = {"epoch": 3, "global_step": 9, "pytorch-lightning_version": "2.1", "optimizer_states": [OPTIMISER]}
LIGHTNING |= {"lr_schedulers": [], "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.1)}}}


@pytest.mark.parametrize(
    ("content", "schedule"),
    [
        (AVERAGED, {}),  # torch.optim.swa_utils.AveragedModel
        ({"ema": AVERAGED, "step": 3}, {}),
        ({**LIGHTNING, "state_dict": {**prefixed("model."), **PROCESS}}, BETAS),
        ({**LIGHTNING, "state_dict": {**prefixed("model.net."), **prefixed("ema_model.net."), **PROCESS}}, BETAS),
        ({**prefixed("denoise_fn."), "betas": BETAS["betas"]}, {"betas": BETAS["betas"]}),
        (  # ema_pytorch, beside the trainer's other entries
            {
                "model": {"model.x.weight": torch.ones(1)},
                "ema": {**prefixed("online_model.model."), **prefixed("ema_model.model.")}
                | {"initted": torch.tensor([True]), "step": torch.tensor([9])}
                | {f"ema_model.{name}": table for name, table in PROCESS.items()},
            },
            BETAS,
        ),
    ],
)
def test_what_lies_beside_the_weights_is_no_weight(content: Any, schedule: dict[str, Tensor], tmp_path: Path) -> None:
    """Counters of averages are dropped; betas come along under their own names, tables that follow from them do not."""
    torch.save(content, tmp_path / "ckpt.pt")
    which = "ema.ema_model" if "ema" in content and "model" in content else None
    found = read_weights(tmp_path / "ckpt.pt", which)
    assert found == ONE or found.keys() == {**ONE, **schedule}.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in {**ONE, **schedule}.items())


def test_averages_whose_names_have_no_dots_get_those_of_the_weights(tmp_path: Path) -> None:
    """CompVis' LitEma: model_ema.diffusion_modelheadweight is model.diffusion_model.head.weight."""
    names = {name: f"diffusion_model.{name}" for name in ONE}
    content = {f"model.{name}": ONE[key] * 0 for key, name in names.items()}
    content |= {f"model_ema.{name.replace('.', '')}": ONE[key] for key, name in names.items()}
    content |= {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(5), **PROCESS}
    torch.save({"state_dict": content}, tmp_path / "ckpt.ckpt")
    with pytest.raises(ConvertError, match=r"several sets of weights: model, model_ema\."):
        read_weights(tmp_path / "ckpt.ckpt")
    found = read_weights(tmp_path / "ckpt.ckpt", "model_ema")
    assert all(torch.equal(found[name], tensor) for name, tensor in {**ONE, **BETAS}.items())


@pytest.mark.parametrize("source", ["ddim", "improved-diffusion"])
def test_betas_in_the_file_are_compared_with_the_schedule_that_is_stated(source: Any) -> None:
    weights = ORIGINALS[source]().state_dict()
    linear = torch.linspace(1e-4, 0.02, 1000)
    t = torch.arange(1001, dtype=torch.float64) / 1000
    bar = ((t + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    cosine = (1 - bar[1:] / bar[:-1]).clamp(max=0.999).float()
    for betas, schedule in ((linear, "linear"), (cosine, "cosine")):
        if (source, schedule) == ("ddim", "cosine"):
            continue
        beside = {**weights, "betas": betas, "alphas_cumprod": (1 - betas.double()).cumprod(0).float()}
        pipe = convert_weights(beside, options(source, noise_schedule=schedule, num_timesteps=None))
        torch.testing.assert_close(pipe.scheduler.betas.float(), betas, rtol=1e-4, atol=1e-7)  # T is theirs, too
    beside = {**weights, "betas": cosine}
    words = (
        r"holds 'betas', 1000 numbers from 4.128e-05 to 0.999, and --noise_schedule linear has 1000 from 0.0001 to 0.02"
    )
    with pytest.raises(ConvertError, match=words):
        convert_weights(beside, options(source))
    with pytest.raises(ConvertError, match=r"holds 'alphas_cumprod', 1000 numbers .* has 500 from"):
        more = {"rescale_timesteps": False} if source == "improved-diffusion" else {}
        convert_weights({**weights, "alphas_cumprod": linear}, options(source, num_timesteps=500, **more))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["init_conv.weight", "time_mlp.1.weight", "final_conv.weight"], "of lucidrains/denoising-diffusion-pytorch"),
        (["time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"], "of guided-diffusion's classifier"),
        (["all_modules.0.weight", "all_modules.1.W"], "of yang-song/score_sde"),
        (["x_embedder.proj.weight", "blocks.0.attn.qkv.weight"], "a diffusion transformer, not a U-Net"),
        (["first_stage_model.quant_conv.weight", "model.x"], "a latent diffusion model"),
        (
            [
                "conv_in.weight",
                "time_embedding.linear_1.weight",
                "down_blocks.0.resnets.0.conv1.weight",
                "up_blocks.0.x",
            ],
            "of Diffusers: give --source diffusers and the folder of the pipeline",
        ),
    ],
)
def test_networks_of_other_codes_are_named(names: list[str], words: str) -> None:
    weights = dict.fromkeys(names, torch.ones(1))
    with pytest.raises(ConvertError, match=words):
        recognise(weights)
    for source in ORIGINALS:
        with pytest.raises(ConvertError, match=words):
            convert_weights(weights, options(source))


def test_whether_a_row_stands_for_no_class_is_asked_for_and_guides() -> None:
    """Ten rows are ten classes, or nine and a null label: the file cannot tell."""
    weights = OpenAINetwork(classes=10).state_dict()
    with pytest.raises(ConvertError, match=r"does not tell --null_label: .* took: .* --null_label none\."):
        convert_weights(weights, options("guided-diffusion"))
    for word, number, null in (("none", 10, None), ("last", 9, 9)):
        pipe = convert_weights(weights, options("guided-diffusion", null_label=word))
        assert classes_of(pipe.unet.config) == (number, null, None)
        pipe.set_progress_bar_config(disable=True)
        draw: Any = lambda pipe=pipe, **more: pipe(1, num_inference_steps=2, output_type="pt", **more)  # noqa: E731
        if null is None:
            with pytest.raises(UserError, match="trained with a class for every image"):
                draw(class_labels=0, guidance_scale=1.0)
        else:
            assert torch.isfinite(draw(class_labels=8, guidance_scale=1.0).images).all()
            with pytest.raises(UserError, match="9 stands for no class"):
                draw(class_labels=9)
    with pytest.raises(ConvertError, match="knows no classes, got --null_label last"):
        convert_weights(OpenAINetwork().state_dict(), options("guided-diffusion", null_label="last"))


def test_one_row_of_classes_is_no_class_and_a_null_label() -> None:
    weights = OpenAINetwork(classes=1).state_dict()
    with pytest.raises(ConvertError, match="got one row: no class would be left"):
        convert_weights(weights, options("guided-diffusion", null_label="last"))
    assert classes_of(convert_weights(weights, options("guided-diffusion", null_label="none")).unet.config) == (
        1,
        None,
        None,
    )


@pytest.mark.parametrize("source", ORIGINALS)
def test_a_resolution_that_the_levels_do_not_divide_is_refused(source: Any, tmp_path: Path) -> None:
    given = options(source, resolution=7)
    with pytest.raises(UserError, match=r"must be multiples of 2, got \(7, 7\). The nearest size .* \(8, 8\)"):
        convert_weights(ORIGINALS[source]().state_dict(), given)
    torch.save(ORIGINALS[source]().state_dict(), tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="must be multiples of 2"):
        convert(replace(given, checkpoint=str(tmp_path / "ckpt.pt"), output_dir=str(tmp_path / "a" / "out")))
    assert not (tmp_path / "a").exists()


def test_heads_of_the_way_up_are_told_as_what_a_file_does_not_tell(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConvertError, match=r"The way up \(num_heads_upsample\) must have the same number"):
        convert_weights(OpenAINetwork(attend=(0, 1)).state_dict(), options("improved-diffusion"))
    assert main(["convert", "--help"]) == 0
    assert "num_heads_upsample" in capsys.readouterr().out
    assert "`num_heads_upsample`" in (ROOT / "docs" / "convert.md").read_text()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_numbers_of_another_precision_are_kept_in_float32_and_said(
    dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = {name: weight.to(dtype) for name, weight in HoNetwork().state_dict().items()}
    torch.save(weights, tmp_path / "ckpt.pt")
    said = {**SAID, "variance_type": "fixed_large", "num_timesteps": 1000}
    folder = convert(ConvertOptions("ddim", str(tmp_path / "ckpt.pt"), str(tmp_path / "out"), **said))
    kept = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(kept["conv_in.weight"], weights["conv_in.weight"].float())
    assert f"| Numbers | {str(dtype)[6:]} in the checkpoint, float32 here |" in (folder / "README.md").read_text()
    assert "The card names no licence: a push asks for it" in caplog.text


def test_a_checkpoint_in_several_files_is_read_by_its_index(tmp_path: Path) -> None:
    for number, name in enumerate(ONE, 1):
        save_file({name: ONE[name]}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    places = {name: f"model-0000{number}-of-00002.safetensors" for number, name in enumerate(ONE, 1)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert read_weights(index) == ONE
    with pytest.raises(ConvertError, match="is one of several files of a checkpoint: name their index"):
        read_weights(tmp_path / "model-00001-of-00002.safetensors")
    index.write_text(json.dumps({"weight_map": {**places, "more.weight": places["head.weight"]}}))
    with pytest.raises(
        ConvertError, match=r"names 'more.weight', which model-00001-of-00002.safetensors does not hold"
    ):
        read_weights(index)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConvertError, match=r"names model-00002-of-00002.safetensors, and there is no such file"):
        read_weights(index)
    for odd in ("[]", "{}", "no", '{"weight_map": [1]}'):
        index.write_text(odd)
        with pytest.raises(ConvertError, match="is no index of a checkpoint in several files"):
            read_weights(index)


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file(prefixed("module."), tmp_path / "ckpt.safetensors")
    assert read_weights(tmp_path / "ckpt.safetensors") == ONE
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    with pytest.raises(ConvertError, match="no checkpoint that can be read"):
        read_weights(tmp_path / "cut.safetensors")


def test_of_several_sets_of_weights_one_must_be_named(tmp_path: Path) -> None:
    zero = {name: weight * 0 for name, weight in ONE.items()}
    path = tmp_path / "ckpt.pt"
    for content in (
        {"model": zero, "ema": ONE, "step": 3},
        [zero, OPTIMISER, 3, 700, prefixed("module.")],
        {f"{name}.{key}": w for name, state in (("model", zero), ("ema", ONE)) for key, w in state.items()},
    ):
        torch.save(content, path)
        with pytest.raises(ConvertError, match=r"several sets of weights: model, ema\. Name one with --weights"):
            read_weights(path)
        assert read_weights(path, "ema") == ONE and read_weights(path, "model") == zero
    torch.save({"net_model": zero, "ema_model": ONE}, path)
    assert read_weights(path) == ONE and read_weights(path, "net_model") == zero
    with pytest.raises(ConvertError, match=r"has no weights 'model'; it has net_model, ema_model \(--weights\)"):
        read_weights(path, "model")
    torch.save(ONE, path)
    with pytest.raises(ConvertError, match="one set of weights under no name, got --weights net_model"):
        read_weights(path, "net_model")


@pytest.mark.parametrize(
    "beside",
    [
        lambda betas: {"betas": betas},
        lambda betas: {"diffusion": {"betas": betas}},
        lambda betas: {"diffusion": {"betas": betas.tolist()}, "adam": {"betas": (0.9, 0.999)}, "optim": OPTIMISER},
        lambda betas: {"process": {"tables": {"alphas_cumprod": (1 - betas).cumprod(0)}}},
    ],
)
def test_betas_anywhere_in_the_file_are_compared(beside: Any, tmp_path: Path) -> None:
    weights = HoNetwork().state_dict()
    for end, is_right in ((0.02, True), (0.3, False)):
        content = {"state_dict": weights, **beside(torch.linspace(1e-4, end, 1000))}
        torch.save(content, tmp_path / "ckpt.pt")
        found = read_weights(tmp_path / "ckpt.pt")
        if is_right:
            assert len(convert_weights(found, options("ddim", num_timesteps=None)).scheduler) == 1000
        else:
            with pytest.raises(ConvertError, match="and --noise_schedule linear has 1000"):
                convert_weights(found, options("ddim"))


ZERO = {name: weight * 0 for name, weight in ONE.items()}


@pytest.mark.parametrize(
    ("content", "average", "raw"),
    [
        ({"model": ZERO, "ema": {"decay": 0.999, "shadow_params": list(ONE.values())}}, "ema.shadow_params", "model"),
        ({"model": ZERO, "ema": list(ONE.values()), "optim": OPTIMISER}, "ema", "model"),
        ({"model": ZERO, "ema": dict(enumerate(ONE.values()))}, "ema", "model"),
        ({**ZERO, "ema": ONE}, "ema", "top"),
        ({**ZERO, "ema": list(ONE.values())}, "ema", "top"),
        ({"state": {**ZERO, "ema": ONE}}, "ema", "top"),
        ([ZERO, OPTIMISER, 3, 700, list(ONE.values())], "4", "model"),
    ],
)
def test_an_average_beside_the_weights_is_asked_about(content: Any, average: str, raw: str, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    torch.save(content, path)
    with pytest.raises(ConvertError, match=f"several sets of weights: {raw}, {average}. Name one"):
        read_weights(path)
    assert read_weights(path, average) == ONE and read_weights(path, raw) == ZERO


def test_an_average_without_names_that_fits_no_weights_is_refused_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    torch.save({"model": ONE, "ema": {"shadow_params": [torch.ones(2)] * 3}, "rng": [torch.ones(3)]}, path)
    with pytest.raises(ConvertError, match=r"several sets of weights: model, ema.shadow_params\."):
        read_weights(path)
    assert read_weights(path, "model") == ONE
    with pytest.raises(ConvertError, match=r"is a list of 3 tensors without names, .* the 2 of model, in order"):
        read_weights(path, "ema.shadow_params")


def test_the_average_that_is_taken_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"net_model": ZERO, "ema_model": ONE}, tmp_path / "ckpt.pt")
    assert read_weights(tmp_path / "ckpt.pt") == ONE
    assert "several sets of weights: ema_model is taken, and not net_model." in caplog.text


def test_what_is_no_set_of_weights_is_left_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({**ONE, "config": {"a": 1}, "names": ["a"], "step": 3}, tmp_path / "ckpt.pt")
    assert read_weights(tmp_path / "ckpt.pt") == ONE
    assert "beside the weights lies config, names, no set of weights: not read" in caplog.text
    caplog.clear()
    torch.save([ZERO, OPTIMISER, {"last_epoch": 3, "t": torch.zeros(3)}, 1, ONE], tmp_path / "ckpt.pt")
    assert read_weights(tmp_path / "ckpt.pt", "ema") == ONE


@pytest.mark.parametrize("content", [OPTIMISER, {"optimizer": OPTIMISER, "step": 3}, [OPTIMISER, 3]])
def test_an_optimiser_is_named_as_one(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "opt500000.pt")
    with pytest.raises(ConvertError, match="holds the state of an optimiser, not weights"):
        read_weights(tmp_path / "opt500000.pt")


def test_what_holds_no_weights_is_named(tmp_path: Path) -> None:
    torch.save(torch.ones(3), tmp_path / "x.pt")
    with pytest.raises(ConvertError, match="holds no weights, but a Tensor"):
        read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("source", ["auto", "ddim"])
def test_the_card_has_the_fingerprint_of_the_original(source: Any, tmp_path: Path) -> None:
    original = HoNetwork()
    torch.save(original.state_dict(), tmp_path / "ckpt.pt")
    said = {**SAID, "variance_type": "fixed_large", "num_timesteps": 1000, "license": "mit"}
    folder = convert(ConvertOptions(source, str(tmp_path / "ckpt.pt"), str(tmp_path / "out"), **said))
    x = torch.arange(3 * 16 * 16, dtype=torch.float64).sin().reshape(1, 3, 16, 16)
    with torch.no_grad():
        output = original.double()(x, torch.tensor([500]))
    seen: Any = fingerprint(DDPMExtPipeline.from_pretrained(folder))
    assert (seen["shape"], seen["t"]) == ((1, 3, 16, 16), 500)
    assert seen["mean"] == pytest.approx(output.mean().item(), abs=1e-5)
    assert seen["first"] == pytest.approx(output.flatten()[:8].tolist(), abs=1e-5)
    card = (folder / "README.md").read_text()
    told = re.search(r"\| mean of the output \| (\S+) \|", card)
    assert told is not None and float(told[1]) == pytest.approx(seen["mean"], abs=1e-5) and "license: mit" in card
    assert "| Source | ddim |" in card and "| `--noise_schedule` | linear |" in card
    (folder / "README.md").write_text("mine")
    convert(ConvertOptions(source, str(tmp_path / "ckpt.pt"), str(folder), **said))
    assert (folder / "README.md").read_text() == "mine"


def test_the_folder_loads_with_stock_diffusers(tmp_path: Path) -> None:
    original = PyTorchDDPM()
    torch.save({"net_model": original.state_dict(), "ema_model": original.state_dict()}, tmp_path / "ckpt.pt")
    said = {**SAID, "variance_type": "fixed_large"}
    folder = convert(ConvertOptions("pytorch-ddpm", str(tmp_path / "ckpt.pt"), str(tmp_path / "pipeline"), **said))
    stock = DDPMPipeline.from_pretrained(folder)
    assert_same_outputs(original, stock.unet, T_SEEN, T_SEEN)
    stock.save_pretrained(tmp_path / "stock")
    DDPMPipeline(stock.unet, DDPMScheduler()).save_pretrained(tmp_path / "old", safe_serialization=False)
    for name in ("stock", "old"):
        upgraded = convert(ConvertOptions("diffusers", str(tmp_path / name), str(tmp_path / f"{name}-new")))
        assert not list(upgraded.rglob("*.bin"))
        assert_same_outputs(original, DDPMExtPipeline.from_pretrained(upgraded).unet, T_SEEN, T_SEEN)


def test_a_folder_is_not_converted_in_place(tmp_path: Path, tiny_unet: Any) -> None:
    folder = tmp_path / "old"
    DDPMPipeline(tiny_unet, DDPMScheduler()).save_pretrained(folder, safe_serialization=False)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (tmp_path / "link").symlink_to(folder)
    for name in (folder, tmp_path / "link", folder / ".." / "old"):
        with pytest.raises(ConvertError, match="another folder than the checkpoint"):
            convert(ConvertOptions("diffusers", str(folder), str(name)))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


PROCESSES: dict[str, Any] = {
    "DDIMScheduler": {"set_alpha_to_one": False, "steps_offset": 1},
    "PNDMScheduler": {"num_train_timesteps": 40},
    "EulerDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {"use_karras_sigmas": True},
    "DDPMScheduler": {"variance_type": "fixed_small_log"},
}


@pytest.mark.parametrize("name", PROCESSES)
def test_a_stock_folder_keeps_its_process(name: str, tmp_path: Path, tiny_unet: Any) -> None:
    """Schedulers without a variance of their own have none in the card; the card's lines run."""
    scheduler = getattr(diffusers, name)(**PROCESSES[name])
    DDPMPipeline(tiny_unet, scheduler).save_pretrained(tmp_path / "stock")
    for source in ("diffusers", "auto"):
        folder = convert(ConvertOptions(source, str(tmp_path / "stock"), str(tmp_path / source)))
        found = DDPMExtPipeline.from_pretrained(folder)
        theirs, ours = scheduler.config, found.scheduler.config
        assert {key: ours.get(key) for key in theirs if key[0] != "_"} == {
            key: value for key, value in theirs.items() if key[0] != "_"
        }
        card = (folder / "README.md").read_text()
        steps = re.search(r"num_inference_steps=(\d+)", card)
        assert steps is not None and ("DDPMExtPipeline" in card) == (name != "DDPMScheduler")
        found.scheduler.set_timesteps(int(steps[1]))
        assert 0 <= int(found.scheduler.timesteps.max()) < len(found.scheduler)
        assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model_index.json", "scheduler", "unet"]


@pytest.mark.parametrize(
    ("name", "more", "sentence"),
    [
        ("EDMEulerScheduler", {}, "is a EDMEulerScheduler .*another process"),
        ("FlowMatchEulerDiscreteScheduler", {}, "is a FlowMatchEulerDiscreteScheduler .*another process"),
        ("DDPMScheduler", {"class_embed_type": "timestep"}, "has class_embed_type 'timestep', which takes other"),
        ("DDPMScheduler", {"sample_size": None}, "names no sample_size"),
    ],
)
def test_a_stock_folder_of_another_kind_is_refused_before_anything_is_written(
    name: str, more: dict[str, Any], sentence: str, tmp_path: Path, tiny_unet: Any
) -> None:
    unet = type(tiny_unet)(**{key: value for key, value in tiny_unet.config.items() if key[0] != "_"} | more)
    DDPMPipeline(unet, getattr(diffusers, name)()).save_pretrained(tmp_path / "stock")
    for source in ("diffusers", "auto"):
        with pytest.raises(UserError, match=sentence):
            convert(ConvertOptions(source, str(tmp_path / "stock"), str(tmp_path / "a" / "out")))
        assert not (tmp_path / "a").exists()


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, tiny_unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    DDPMPipeline(tiny_unet, DDPMScheduler()).save_pretrained(tmp_path / "stock")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(type(tiny_unet), "save_pretrained", fail)
        with pytest.raises(OSError, match="the disk is full"):
            convert(ConvertOptions("diffusers", str(tmp_path / "stock"), str(tmp_path / "a" / "out")))
    assert not (tmp_path / "a").exists()


def run_script(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """scripts/convert.py in this process: its exit code."""
    monkeypatch.setattr(sys, "argv", ["scripts/convert.py", *words])
    return runpy.run_path(str(ROOT / "scripts" / "convert.py"))["main"]()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--source pytorch-ddpm --checkpoint {tmp} --output_dir {tmp}/out", "there is a folder at {tmp}"),
        ("--source pytorch-ddpm --checkpoint {tmp}/no.pt --output_dir {tmp}/out", "there is nothing at {tmp}/no.pt"),
        ("--source pytorch-ddpm --checkpoint {tmp}/file --output_dir {tmp}/file", "{tmp}/file is a file"),
        ("--source diffusers --checkpoint a/b --output_dir {tmp}/file/out", "{tmp}/file is a file"),
        ("--source diffusers --checkpoint {tmp} --output_dir {tmp}/out", "model_index.json, and {tmp} holds none"),
        (
            "--source diffusers --checkpoint {tmp}/run --output_dir {tmp}/out",
            "{tmp}/run/pipeline/model_index.json names",
        ),
        ("--source diffusers --checkpoint {tmp}/file --output_dir {tmp}/out", "and {tmp}/file is a file"),
        ("--source diffusers --checkpoint no/such/dir --output_dir {tmp}/out", "There is no folder no/such/dir"),
        ("--source diffusers --checkpoint {tmp}/no --output_dir {tmp}/out", "There is no folder {tmp}/no"),
        ("--source diffusers --checkpoint no/such --output_dir {tmp}/out", "no/such is not in the cache"),
        ("--source diffusers --checkpoint {tmp}/run/pipeline --output_dir {tmp}/out", "error: "),
        ("--source diffusers --checkpoint a/b --output_folder {tmp}/out --nun_heads 3", "Did you mean --num_heads?"),
        ("--source other --checkpoint a/b --output_dir {tmp}/out", "invalid choice: 'other'"),
        ("--source diffusers", "required: --checkpoint, --output_dir"),
        ("--source improved-diffusion --num_heads 0 --checkpoint a --output_dir b", "num_heads must be at least 1"),
    ],
)
def test_the_script_says_what_is_wrong(
    words: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no checkpoint")
    (tmp_path / "run" / "pipeline").mkdir(parents=True)
    (tmp_path / "run" / "pipeline" / "model_index.json").write_text("{}")  # an index that names nothing
    usage = any(word in sentence for word in ("Did you mean", "invalid choice", "required", "at least"))
    assert run_script(monkeypatch, *words.format(tmp=tmp_path).split()) == (2 if usage else 1)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and sentence.format(tmp=tmp_path) in said
    assert not (tmp_path / "out").exists() and (tmp_path / "file").read_text() == "no checkpoint"


@pytest.mark.slow  # a process of its own: importing takes seconds
def test_the_script_says_where_the_result_lies_or_what_is_wrong(tmp_path: Path) -> None:
    torch.save(PyTorchDDPM().state_dict(), tmp_path / "weights.pt")
    words = ["--checkpoint", str(tmp_path / "weights.pt"), "--output_dir", str(tmp_path / "out"), "--resolution", "16"]
    words += ["--prediction_type", "epsilon", "--variance_type", "fixed_large", "--noise_schedule", "linear"]
    for source, code in (("pytorch-ddpm", 0), ("improved-diffusion", 1)):
        command = [sys.executable, str(ROOT / "scripts" / "convert.py"), "--source", source, *words]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=120,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == code, done.stderr
        if code:
            assert "error: The checkpoint has no tensor" in done.stderr and "Traceback" not in done.stderr
        else:
            assert str(tmp_path / "out") in done.stdout


@pytest.mark.slow
def test_the_published_sizes_are_counted() -> None:
    with torch.device("meta"):
        pytorch_ddpm = PyTorchDDPM(c=128, mults=(1, 2, 2, 2))
        improved = OpenAINetwork(c=128, mults=(1, 2, 2, 2), attend=(1, 2))
    table = 1000 * 128
    assert sum(w.numel() for w in pytorch_ddpm.state_dict().values()) - table == 35_746_307
    assert sum(w.numel() for w in improved.parameters()) == 52_546_438
