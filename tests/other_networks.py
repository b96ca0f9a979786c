"""The networks of other codes, written here from their descriptions, under the names that their checkpoints use.

For random weights in float64; nothing of the package is imported.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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


class OpenAIAttention(nn.Module):
    """Heads of their own rows in one 1x1 convolution: [head][q, k, v][channel], or in the new order [q, k, v][head]."""

    def __init__(self, c: int, heads: int, new_order: bool) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm, self.qkv, self.proj_out = nn.GroupNorm(32, c), nn.Conv1d(c, 3 * c, 1), nn.Conv1d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        split = (3, self.heads, -1) if self.new_order else (self.heads, 3, -1)
        q, k, v = self.qkv(self.norm(flat)).unflatten(1, split).unbind(1 if self.new_order else 2)  # (B, heads, d, i)
        scores = torch.einsum("bhdi,bhdj->bhij", q, k) / math.sqrt(q.shape[2])
        h = torch.einsum("bhij,bhdj->bhdi", scores.softmax(-1), v).flatten(1, 2)
        return (flat + self.proj_out(h)).reshape(x.shape)


class OpenAIResidual(nn.Module):
    """As PTResidual, but time may scale and shift the second norm: norm(h) (1 + scale) + shift.

    Where it resamples ("down", "up"), both branches are averaged over 2x2 or repeated; the main one after norm, SiLU.
    """

    def __init__(self, c_in: int, c: int, t: int, scale_shift: bool, resample: str = "") -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers, self.out_layers = norm_silu_conv(c_in, to=c), norm_silu_conv(c, to=c, dropout=True)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(t, 2 * c if scale_shift else c))
        self.skip_connection = nn.Conv2d(c_in, c, 1) if c_in != c else nn.Identity()

    def resized(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3) if self.resample == "up" else x

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.in_layers[2](self.resized(self.in_layers[:2](x)))
        x, time = self.resized(x), self.emb_layers(e)[..., None, None]
        if not self.scale_shift:
            return self.skip_connection(x) + self.out_layers(h + time)
        scale, shift = time.chunk(2, 1)
        return self.skip_connection(x) + self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)


class OpenAIDown(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class OpenAIUp(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def through(layers: Any, x: Tensor, e: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x, e) if isinstance(layer, OpenAIResidual) else layer(x)
    return x


class OpenAINetwork(nn.Module):
    """The network of openai/improved-diffusion, and with `updown`, `head_channels`, `new_order` of guided-diffusion.

    It is given τ = 1000 t / T where its steps are rescaled.
    """

    def __init__(
        self,
        c: int = 32,
        mults: tuple[float, ...] = (1, 2),
        attend: Any = (1,),
        n: int = 3,
        heads: int = 4,
        head_channels: int | None = None,
        new_order: bool = False,
        updown: bool = False,
        scale_shift: bool = True,
        channels: int = 3,
        out: int = 6,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        self.c, t = c, 4 * c
        self.time_embed = nn.Sequential(nn.Linear(c, t), nn.SiLU(), nn.Linear(t, t))
        if classes:
            self.label_emb = nn.Embedding(classes, t)

        def residual(c_in: int, c: int, resample: str = "") -> nn.Module:
            return OpenAIResidual(c_in, c, t, scale_shift, resample)

        def attention(c: int) -> nn.Module:
            return OpenAIAttention(c, c // head_channels if head_channels else heads, new_order)

        now = int(mults[0] * c)
        self.input_blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(channels, now, 3, padding=1))])
        self.output_blocks = nn.ModuleList()
        widths = [now]
        for level, mult in enumerate(mults):
            for _ in range(n):
                block = [residual(now, now := int(c * mult))]
                self.input_blocks.append(nn.Sequential(*block, *([attention(now)] if level in attend else [])))
                widths.append(now)
            if level + 1 < len(mults):
                self.input_blocks.append(nn.Sequential(residual(now, now, "down") if updown else OpenAIDown(now)))
                widths.append(now)
        self.middle_block = nn.Sequential(residual(now, now), attention(now), residual(now, now))
        for level, mult in reversed(list(enumerate(mults))):
            for i in range(n + 1):
                block = [residual(now + widths.pop(), now := int(c * mult))]
                block += [attention(now)] if level in attend else []
                if level and i == n:
                    block.append(residual(now, now, "up") if updown else OpenAIUp(now))
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


class HoAttention(nn.Module):
    """One head of all channels; norms have eps 1e-6, as TensorFlow's."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, c, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = (q.transpose(1, 2) @ k / math.sqrt(x.shape[1])).softmax(-1)
        return x + self.proj_out((v @ weights.transpose(1, 2)).reshape(x.shape))


class HoResidual(nn.Module):
    def __init__(self, c_in: int, c: int, t: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, c_in, eps=1e-6), nn.Conv2d(c_in, c, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(32, c, eps=1e-6), nn.Conv2d(c, c, 3, padding=1)
        self.temb_proj = nn.Linear(t, c)
        if c_in != c:
            self.nin_shortcut = nn.Conv2d(c_in, c, 1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(F.silu(e))[..., None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class HoNetwork(nn.Module):
    """The network of Ho et al. as ermongroup/ddim and pesser/pytorch_diffusion name it.

    Stride 2 pads on the right and below alone (TensorFlow's SAME); the frequencies are exp(-ln(1e4) i / (half - 1)).
    """

    def __init__(
        self, c: int = 32, mults: tuple[int, ...] = (1, 2), attend: Any = (1,), n: int = 2, channels: int = 3
    ) -> None:
        super().__init__()
        self.c, t, levels = c, 4 * c, len(mults)
        widths = [c * mult for mult in mults]
        self.temb: Any = nn.ModuleDict({"dense": nn.ModuleList([nn.Linear(c, t), nn.Linear(t, t)])})
        self.conv_in = nn.Conv2d(channels, c, 3, padding=1)
        kept, now = [c], c
        self.down: Any = nn.ModuleList()
        self.up: Any = nn.ModuleList([nn.Module()] * levels)
        for level, width in enumerate(widths):
            parts: dict[str, Any] = {"block": nn.ModuleList(), "attn": nn.ModuleList()}
            for _ in range(n):
                parts["block"].append(HoResidual(now, now := width, t))
                parts["attn"].extend([HoAttention(now)] if level in attend else [])
                kept.append(now)
            if level + 1 < levels:
                parts["downsample"] = nn.ModuleDict({"conv": nn.Conv2d(now, now, 3, stride=2)})
                kept.append(now)
            self.down.append(nn.ModuleDict(parts))
        ends = {"block_1": HoResidual(now, now, t), "attn_1": HoAttention(now), "block_2": HoResidual(now, now, t)}
        self.mid: Any = nn.ModuleDict(ends)
        for level, width in reversed(list(enumerate(widths))):
            parts = {"block": nn.ModuleList(), "attn": nn.ModuleList()}
            for _ in range(n + 1):
                parts["block"].append(HoResidual(now + kept.pop(), now := width, t))
                parts["attn"].extend([HoAttention(now)] if level in attend else [])
            if level:
                parts["upsample"] = nn.ModuleDict({"conv": nn.Conv2d(now, now, 3, padding=1)})
            self.up[level] = nn.ModuleDict(parts)
        self.norm_out, self.conv_out = nn.GroupNorm(32, now, eps=1e-6), nn.Conv2d(now, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.c // 2
        phase = t[:, None].double() * torch.exp(-math.log(10000) * torch.arange(half).double() / (half - 1))
        first, second = self.temb["dense"]
        e = second(F.silu(first(torch.cat([phase.sin(), phase.cos()], 1))))
        kept = [x := self.conv_in(x)]
        for parts in self.down:
            for i, block in enumerate(parts["block"]):
                x = block(x, e)
                kept.append(x := parts["attn"][i](x) if len(parts["attn"]) else x)
            if "downsample" in parts:
                kept.append(x := parts["downsample"]["conv"](F.pad(x, (0, 1, 0, 1))))
        x = self.mid["block_2"](self.mid["attn_1"](self.mid["block_1"](x, e)), e)
        for parts in reversed(self.up):
            for i, block in enumerate(parts["block"]):
                x = block(torch.cat([x, kept.pop()], 1), e)
                x = parts["attn"][i](x) if len(parts["attn"]) else x
            if "upsample" in parts:
                x = parts["upsample"]["conv"](F.interpolate(x, scale_factor=2, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))
