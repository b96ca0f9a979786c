"""Checkpoints of other codes: the converted network computes the same, and what does not fit is named.

The two original networks are written here from their descriptions, in float64, with random weights, under the names
that their checkpoints use.
"""

from __future__ import annotations

import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_ext import DDPMExtPipeline
from ddpm_ext.conversion.convert import ConvertOptions, convert, convert_weights, read_weights, sinusoids
from ddpm_ext.conversion.state_dict_maps import ConvertError

ROOT = Path(__file__).resolve().parent.parent


def norm_silu_conv(*before: int, to: int, dropout: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [nn.GroupNorm(32, before[0]), nn.SiLU()]
    return nn.Sequential(*layers, *([nn.Dropout(0.1)] if dropout else []), nn.Conv2d(before[0], to, 3, padding=1))


class PTAttention(nn.Module):
    """Single-head self-attention over pixels, by 1x1 convolutions; scores are scaled by C^-1/2."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(32, c)
        self.proj_q, self.proj_k, self.proj_v, self.proj = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.proj_q, self.proj_k, self.proj_v))
        scores = torch.einsum("bci,bcj->bij", q, k) / math.sqrt(x.shape[1])
        return x + self.proj(torch.einsum("bij,bcj->bci", scores.softmax(-1), v).reshape(x.shape))


class PTResidual(nn.Module):
    """norm-SiLU-conv, plus the projected time, norm-SiLU-dropout-conv, plus the shortcut; then attention or nothing."""

    def __init__(self, c_in: int, c: int, t: int, attend: bool) -> None:
        super().__init__()
        self.block1, self.block2 = norm_silu_conv(c_in, to=c), norm_silu_conv(c, to=c, dropout=True)
        self.temb_proj = nn.Sequential(nn.SiLU(), nn.Linear(t, c))
        self.shortcut = nn.Conv2d(c_in, c, 1) if c_in != c else nn.Identity()
        self.attn = PTAttention(c) if attend else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return self.attn(self.shortcut(x) + self.block2(self.block1(x) + self.temb_proj(e)[..., None, None]))


class PTResize(nn.Module):
    """Stride 2 with symmetric padding, or nearest neighbours and a convolution."""

    def __init__(self, c: int, up: bool) -> None:
        super().__init__()
        self.up, self.main = up, nn.Conv2d(c, c, 3, stride=1 if up else 2, padding=1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return self.main(x.repeat_interleave(2, 2).repeat_interleave(2, 3) if self.up else x)


class PyTorchDDPM(nn.Module):
    """The network of w86763777/pytorch-ddpm: a table of interleaved sin and cos for each t, then the U of Ho et al."""

    def __init__(
        self, T: int = 1000, c: int = 32, mults: tuple[int, ...] = (1, 2), attend: Any = (1,), n: int = 2
    ) -> None:
        super().__init__()
        omega = torch.exp(-torch.arange(0, c, 2) / c * math.log(10000))
        phase = torch.arange(T)[:, None] * omega
        table = torch.stack([phase.sin(), phase.cos()], dim=2).flatten(1)
        layers = nn.Linear(c, 4 * c), nn.SiLU(), nn.Linear(4 * c, 4 * c)
        self.time_embedding = nn.ModuleDict(
            {"timembedding": nn.Sequential(nn.Embedding.from_pretrained(table), *layers)}
        )
        self.head = nn.Conv2d(3, c, 3, padding=1)
        self.downblocks, self.upblocks = nn.ModuleList(), nn.ModuleList()
        widths, now = [c], c
        for level, mult in enumerate(mults):
            for _ in range(n):
                self.downblocks.append(PTResidual(now, c * mult, 4 * c, level in attend))
                widths.append(now := c * mult)
            if level + 1 < len(mults):
                self.downblocks.append(PTResize(now, up=False))
                widths.append(now)
        self.middleblocks = nn.ModuleList([PTResidual(now, now, 4 * c, attend) for attend in (True, False)])
        for level, mult in reversed(list(enumerate(mults))):
            for _ in range(n + 1):
                self.upblocks.append(PTResidual(now + widths.pop(), c * mult, 4 * c, level in attend))
                now = c * mult
            if level:
                self.upblocks.append(PTResize(now, up=True))
        self.tail = norm_silu_conv(now, to=3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        e = self.time_embedding["timembedding"](t)
        kept = [x := self.head(x)]
        for layer in self.downblocks:
            kept.append(x := layer(x, e))
        for layer in self.middleblocks:
            x = layer(x, e)
        for layer in self.upblocks:
            x = layer(torch.cat([x, kept.pop()], 1) if isinstance(layer, PTResidual) else x, e)
        return self.tail(x)


class IDAttention(nn.Module):
    """Heads of their own rows in one 1x1 convolution: [head][q, k, v][channel]; q and k are each scaled by d^-1/4."""

    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm, self.qkv, self.proj_out = (
            heads,
            nn.GroupNorm(32, c),
            nn.Conv1d(c, 3 * c, 1),
            nn.Conv1d(c, c, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        rows = self.qkv(self.norm(flat)).unflatten(1, (self.heads, 3, -1))
        q, k, v = rows.unbind(2)  # each (B, heads, d, pixels)
        scores = torch.einsum("bhdi,bhdj->bhij", q, k) / math.sqrt(q.shape[2])
        h = torch.einsum("bhij,bhdj->bhdi", scores.softmax(-1), v).flatten(1, 2)
        return (flat + self.proj_out(h)).reshape(x.shape)


class IDResidual(nn.Module):
    """As PTResidual, but time scales and shifts the second norm: norm(h) (1 + scale) + shift."""

    def __init__(self, c_in: int, c: int, t: int, scale_shift: bool) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers, self.out_layers = norm_silu_conv(c_in, to=c), norm_silu_conv(c, to=c, dropout=True)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(t, 2 * c if scale_shift else c))
        self.skip_connection = nn.Conv2d(c_in, c, 1) if c_in != c else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h, time = self.in_layers(x), self.emb_layers(e)[..., None, None]
        if not self.scale_shift:
            return self.skip_connection(x) + self.out_layers(h + time)
        scale, shift = time.chunk(2, 1)
        return self.skip_connection(x) + self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)


class IDDown(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class IDUp(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def through(layers: Any, x: Tensor, e: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x, e) if isinstance(layer, IDResidual) else layer(x)
    return x


class ImprovedDiffusion(nn.Module):
    """The network of openai/improved-diffusion; it is given τ = 1000 t / T where its steps are rescaled."""

    def __init__(
        self,
        c: int = 32,
        mults: tuple[int, ...] = (1, 2),
        attend: Any = (1,),
        n: int = 3,
        heads: int = 4,
        scale_shift: bool = True,
        out: int = 6,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        self.c, t = c, 4 * c
        self.time_embed = nn.Sequential(nn.Linear(c, t), nn.SiLU(), nn.Linear(t, t))
        if classes:
            self.label_emb = nn.Embedding(classes, t)
        self.input_blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(3, c, 3, padding=1))])
        self.output_blocks = nn.ModuleList()
        widths, now = [c], c
        for level, mult in enumerate(mults):
            for _ in range(n):
                block: list[nn.Module] = [IDResidual(now, now := c * mult, t, scale_shift)]
                self.input_blocks.append(nn.Sequential(*block, *([IDAttention(now, heads)] if level in attend else [])))
                widths.append(now)
            if level + 1 < len(mults):
                self.input_blocks.append(nn.Sequential(IDDown(now)))
                widths.append(now)
        ends = (IDResidual(now, now, t, scale_shift) for _ in range(2))
        self.middle_block = nn.Sequential(next(ends), IDAttention(now, heads), next(ends))
        for level, mult in reversed(list(enumerate(mults))):
            for i in range(n + 1):
                block = [IDResidual(now + widths.pop(), now := c * mult, t, scale_shift)]
                block += [IDAttention(now, heads)] if level in attend else []
                block += [IDUp(now)] if level and i == n else []
                self.output_blocks.append(nn.Sequential(*block))
        self.out = norm_silu_conv(now, to=out)

    def forward(self, x: Tensor, tau: Tensor, y: Tensor | None = None) -> Tensor:
        omega = torch.exp(-math.log(10000) * torch.arange(self.c // 2, dtype=torch.float64) / (self.c // 2))
        phase = tau[:, None].double() * omega
        e = self.time_embed(torch.cat([phase.cos(), phase.sin()], 1))
        e = e + self.label_emb(y) if y is not None else e
        kept = []
        for block in self.input_blocks:
            kept.append(x := through(block, x, e))
        x = through(self.middle_block, x, e)
        for block in self.output_blocks:
            x = through(block, torch.cat([x, kept.pop()], 1), e)
        return self.out(x)


def options(source: Any, **more: Any) -> ConvertOptions:
    return ConvertOptions(source=source, checkpoint="", output_dir="", resolution=16, **more)


def assert_same_outputs(original: nn.Module, unet: Any, t: Tensor, tau: Tensor, **labels: Tensor) -> None:
    """Equal to 1e-5 of outputs of about 1, in float32 on either side."""
    x = torch.randn(len(t), 3, 16, 16)
    with torch.no_grad():
        theirs = original.eval().double()(x.double(), tau, *labels.values())
        ours = unet(x, t, class_labels=labels.get("y")).sample
    assert theirs.std() > 0.05
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)


T_SEEN = torch.tensor([0, 1, 500, 999])


@pytest.mark.parametrize(("mults", "attend", "n"), [((1, 2), (1,), 2), ((1, 1, 2), (0, 2), 1), ((1,), (), 1)])
def test_pytorch_ddpm_converts(mults: tuple[int, ...], attend: tuple[int, ...], n: int) -> None:
    original = PyTorchDDPM(mults=mults, attend=attend, n=n)
    pipe = convert_weights(original.state_dict(), options("pytorch-ddpm"))
    assert_same_outputs(original, pipe.unet, T_SEEN, T_SEEN)
    assert (pipe.scheduler.config.variance_type, pipe.scheduler.config.clip_sample) == ("fixed_large", False)
    assert pipe.scheduler.config.num_train_timesteps == 1000


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"mults": (1, 2, 2), "attend": (1, 2), "n": 2, "heads": 2},
        {"scale_shift": False, "out": 3, "heads": 1},
        {"classes": 10, "attend": ()},
    ],
)
def test_improved_diffusion_converts(more: dict[str, Any]) -> None:
    original = ImprovedDiffusion(**more)
    chosen = options("improved-diffusion", num_timesteps=1000, num_heads=more.get("heads", 4))
    pipe = convert_weights(original.state_dict(), chosen)
    labels = {"y": torch.tensor([0, 3, 5, 9])} if "classes" in more else {}
    assert_same_outputs(original, pipe.unet, T_SEEN, T_SEEN, **labels)
    learned = more.get("out", 6) == 6
    assert pipe.scheduler.config.variance_type == ("learned_range" if learned else "fixed_large")


def test_rescaled_steps_of_improved_diffusion_are_in_the_pipeline() -> None:
    original, t = ImprovedDiffusion(), torch.tensor([0, 1, 2, 3999])
    pipe = convert_weights(original.state_dict(), options("improved-diffusion"))
    assert_same_outputs(original, pipe.unet, t, t * 0.25)
    assert (len(pipe.scheduler), pipe.scheduler.config.beta_schedule) == (4000, "squaredcos_cap_v2")
    plain = convert_weights(original.state_dict(), options("improved-diffusion", rescale_timesteps=False))
    assert_same_outputs(original, plain.unet, t, t)


def test_the_linear_schedule_keeps_its_end_for_every_number_of_steps() -> None:
    weights = ImprovedDiffusion().state_dict()
    ends = []
    for T in (1000, 4000):
        pipe = convert_weights(weights, options("improved-diffusion", num_timesteps=T, noise_schedule="linear"))
        ends.append(pipe.scheduler.tables.log_alpha_bar[-1])
    torch.testing.assert_close(ends[0], ends[1], rtol=0.02, atol=0)  # the sum of β, and of β²/2 that gets smaller


def test_sinusoids_by_hand() -> None:
    table = sinusoids(4000, 4)  # τ = t / 4, ω = 1, 1/100
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
    weights = changed(ImprovedDiffusion(classes=10).state_dict(), name, change)
    with pytest.raises(ConvertError, match=sentence):
        convert_weights(weights, options("improved-diffusion", num_timesteps=1000))


@pytest.mark.slow  # some hundred networks
@pytest.mark.parametrize("source", ["pytorch-ddpm", "improved-diffusion"])
def test_no_tensor_may_be_missing_or_a_number(source: Any) -> None:
    original: Any = PyTorchDDPM if source == "pytorch-ddpm" else ImprovedDiffusion
    weights = original(mults=(1,), attend=(0,), n=1).state_dict()
    for name in weights:
        for change in (None, ()):
            with pytest.raises(ConvertError, match=re.escape(repr(name))):
                convert_weights(changed(weights, name, change), options(source))


def test_architectures_that_cannot_be_expressed_are_refused() -> None:
    with pytest.raises(ConvertError, match=r"no tensor 'head.weight', .* Its first is 'time_embed.0.weight'"):
        convert_weights(ImprovedDiffusion().state_dict(), options("pytorch-ddpm"))
    with pytest.raises(ConvertError, match=r"'head.weight' of the checkpoint has the shape \(32, 3, 3, 3\)"):
        convert_weights(PyTorchDDPM(mults=(2,), attend=()).state_dict(), options("pytorch-ddpm"))
    with pytest.raises(ConvertError, match="several attention widths"):
        convert_weights(ImprovedDiffusion(attend=(0, 1)).state_dict(), options("improved-diffusion"))
    with pytest.raises(ConvertError, match="--num_heads"):
        convert_weights(ImprovedDiffusion().state_dict(), options("improved-diffusion", num_heads=3))
    with pytest.raises(ConvertError, match="source must be one of"):
        options("guided-diffusion")


@pytest.mark.parametrize(
    ("source", "more", "sentence"),
    [
        ("improved-diffusion", {"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ("improved-diffusion", {"num_timesteps": 0}, "num_timesteps must be at least 1, got 0"),
        ("pytorch-ddpm", {"resolution": -3}, "resolution must be at least 1, got -3"),
        ("pytorch-ddpm", {"num_heads": 2}, "--num_heads has an effect only with --source improved-diffusion"),
        ("pytorch-ddpm", {"noise_schedule": "linear"}, "--noise_schedule has an effect only with"),
        ("pytorch-ddpm", {"num_timesteps": 500}, "--num_timesteps has an effect only with"),
        ("pytorch-ddpm", {"rescale_timesteps": False}, "--rescale_timesteps has an effect only with"),
        ("pytorch-ddpm", {"token": "t"}, "--token has an effect only with --source diffusers"),
        ("improved-diffusion", {"weights": "net_model"}, "--weights has an effect only with --source pytorch-ddpm"),
        ("improved-diffusion", {"token": "t"}, "--token has an effect only with --source diffusers"),
        (
            "diffusers",
            {"resolution": 64},
            "--resolution has .* pytorch-ddpm and improved-diffusion, and source is 'diff",
        ),
        ("diffusers", {"weights": "net_model"}, "--weights has an effect only with"),
        ("diffusers", {"num_heads": 1}, "--num_heads has an effect only with"),
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
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(ConvertError, match="no checkpoint that can be read"):
        read_weights(tmp_path / "text.pt")


def test_the_average_is_taken_from_a_training_checkpoint(tmp_path: Path) -> None:
    one = {"module.head.weight": torch.ones(1)}
    torch.save({"net_model": {"head.weight": torch.zeros(1)}, "ema_model": one, "step": 3}, tmp_path / "ckpt.pt")
    assert read_weights(tmp_path / "ckpt.pt") == {"head.weight": torch.ones(1)}
    assert read_weights(tmp_path / "ckpt.pt", "net_model")["head.weight"] == 0
    with pytest.raises(ConvertError, match="it has net_model, ema_model"):
        read_weights(tmp_path / "ckpt.pt", "model")
    torch.save(one, tmp_path / "bare.pt")
    with pytest.raises(ConvertError, match="one set of weights under no name, got --weights net_model"):
        read_weights(tmp_path / "bare.pt", "net_model")


def test_the_folder_loads_with_stock_diffusers(tmp_path: Path) -> None:
    original = PyTorchDDPM()
    torch.save({"net_model": original.state_dict(), "ema_model": original.state_dict()}, tmp_path / "ckpt.pt")
    folder = convert(
        ConvertOptions("pytorch-ddpm", str(tmp_path / "ckpt.pt"), str(tmp_path / "pipeline"), resolution=16)
    )
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
        improved = ImprovedDiffusion(c=128, mults=(1, 2, 2, 2), attend=(1, 2))
    table = 1000 * 128
    assert sum(w.numel() for w in pytorch_ddpm.state_dict().values()) - table == 35_746_307
    assert sum(w.numel() for w in improved.parameters()) == 52_546_438
