"""The networks of two other codes as their checkpoints name them, beside the names of UNet2DModel.

pytorch-ddpm is w86763777/pytorch-ddpm, improved-diffusion is openai/improved-diffusion. Both build the network of Ho et
al. 2020 block by block in the order of UNet2DModel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .config import ConvertError

Change = Callable[[Tensor], Tensor]
CONVOLUTION = ("out", "in", "3", "3")
GROUPS = 32  # of every norm, in both codes
LABELS = "label_emb.weight"


class Code(NamedTuple):
    """Names of one code's layers, in the order of UNet2DModel's."""

    name: str
    time: str  # the sequence of the time embedding
    time_layers: tuple[int, int]
    has_table: bool  # whether it holds the embedding of every step, interleaved sin, cos
    conv_in: str
    out: str  # the sequence of norm (0), SiLU and convolution (2)
    down: str
    middle: str
    up: str
    residual: dict[str, str]  # UNet2DModel's name of a part of a residual block -> theirs


CODES = {
    "pytorch-ddpm": Code(
        "pytorch-ddpm",
        "time_embedding.timembedding",
        (1, 3),
        True,
        "head",
        "tail",
        "downblocks",
        "middleblocks",
        "upblocks",
        {
            "norm1": "block1.0",
            "conv1": "block1.2",
            "time_emb_proj": "temb_proj.1",
            "norm2": "block2.0",
            "conv2": "block2.3",
            "conv_shortcut": "shortcut",
        },
    ),
    "improved-diffusion": Code(
        "improved-diffusion",
        "time_embed",
        (0, 2),
        False,
        "input_blocks.0.0",
        "out",
        "input_blocks",
        "middle_block",
        "output_blocks",
        {
            "norm1": "in_layers.0",
            "conv1": "in_layers.2",
            "time_emb_proj": "emb_layers.1",
            "norm2": "out_layers.0",
            "conv2": "out_layers.3",
            "conv_shortcut": "skip_connection",
        },
    ),
}


class Shape(NamedTuple):
    """What a checkpoint's tensors tell of its network."""

    widths: tuple[int, ...]  # of the levels, the finest first
    layers: int  # residual blocks of a level on the way down
    attention: frozenset[int]  # levels that have it
    in_channels: int
    out_channels: int
    scale_shift: bool
    classes: int | None


def measure(weights: Mapping[str, Tensor], code: Code) -> Shape:
    """Read the network's shape off the tensors on its way down.

    Raises:
        ConvertError: one of these tensors is missing or cannot be of such a network; it is named.
    """
    own = code.name == "improved-diffusion"
    sampler, attended, residual = (".0.op.", ".1.", ".0.") if own else (".main.", ".attn.", ".")
    first = find(weights, f"{code.conv_in}.weight", CONVOLUTION, code)
    widths, counts, attention = [0], [0], set()
    index = 1 if own else 0
    while _has(weights, block := f"{code.down}.{index}", "."):
        level = len(widths) - 1
        if _has(weights, block, sampler):
            widths.append(0)
            counts.append(0)
        else:
            width = _width(weights, f"{block}{residual}{code.residual['conv1']}.weight", code)
            widths[level] = widths[level] or width
            counts[level] += 1
            attention |= {level} if _has(weights, block, attended) else set()
        index += 1
    if len(set(counts)) != 1 or not counts[0]:
        raise ConvertError(
            f"A UNet2DModel has as many residual blocks on each level, the checkpoint has {counts} ({code.down})."
        )
    projection = f"{code.down}.{1 if own else 0}{residual}{code.residual['time_emb_proj']}.weight"
    classes = find(weights, LABELS, ("classes", "width"), code).shape[0] if LABELS in weights else None
    return Shape(
        tuple(widths),
        counts[0],
        frozenset(attention),
        first.shape[1],
        _out_channels(weights, first.shape[1], code),
        find(weights, projection, ("out", "in"), code).shape[0] == 2 * widths[0],
        classes,
    )


def find(weights: Mapping[str, Tensor], name: str, layout: tuple[str, ...], code: Code) -> Tensor:
    """A tensor whose shape tells the network's.

    Args:
        weights: The state dict.
        name: The tensor's name.
        layout: What its dimensions are, a number where it is always the same.
        code: The code that named it.

    Raises:
        ConvertError: it is missing, empty, or of another layout.
    """
    expected = f"({', '.join(layout)})"
    if name not in weights:
        raise ConvertError(
            f"The checkpoint has no tensor {name!r}, which every network of {code.name} has as {expected}. Its first "
            f"is {next(iter(weights), None)!r}: is it of another code?"
        )
    found = weights[name]
    sizes = zip(found.shape, layout, strict=False)
    if found.ndim != len(layout) or not all(str(n) == part if part.isdigit() else n > 0 for n, part in sizes):
        raise ConvertError(
            f"{name!r} of the checkpoint has the shape {tuple(found.shape)}, where {code.name} has {expected}."
        )
    return found


def _has(weights: Mapping[str, Tensor], block: str, part: str) -> bool:
    return any(name.startswith(block + part) for name in weights)


def _width(weights: Mapping[str, Tensor], name: str, code: Code) -> int:
    """Channels that a residual block's first convolution makes."""
    found = find(weights, name, CONVOLUTION, code)
    if found.shape[0] % GROUPS:
        raise ConvertError(
            f"{name!r} of the checkpoint has the shape {tuple(found.shape)}, where {code.name} has a multiple of "
            f"{GROUPS} channels first: its norms are of {GROUPS} groups."
        )
    return found.shape[0]


def _out_channels(weights: Mapping[str, Tensor], in_channels: int, code: Code) -> int:
    """Channels of the output: ε̂ alone, or with the variance that improved-diffusion may learn."""
    name = f"{code.out}.2.weight"
    found = find(weights, name, CONVOLUTION, code)
    allowed = [in_channels] if code.has_table else [in_channels, 2 * in_channels]
    if found.shape[0] not in allowed:
        raise ConvertError(
            f"{name!r} of the checkpoint has the shape {tuple(found.shape)}, where {code.name} has "
            f"{' or '.join(map(str, allowed))} channels first for pictures of {in_channels}."
        )
    return found.shape[0]


# The mapping ----------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a tensor of UNet2DModel comes from."""

    target: str
    source: str
    change: Change


def same(weight: Tensor) -> Tensor:
    """The weight as it is."""
    return weight


def conv_to_linear(weight: Tensor) -> Tensor:
    """A 1x1 convolution (out, in, 1[, 1]) as a matrix (out, in)."""
    return weight.reshape(weight.shape[0], -1) if weight.ndim > 1 else weight


def split_columns(weight: Tensor) -> Tensor:
    """Columns of interleaved sin, cos -> all sin, then all cos."""
    return torch.cat([weight[:, 0::2], weight[:, 1::2]], dim=1)


def part_of_qkv(part: int, num_heads: int) -> Change:
    """Rows [head][q, k, v][channel] of one convolution -> the matrix or bias of q (0), k (1) or v (2)."""

    def take(weight: Tensor) -> Tensor:
        rows = weight.reshape(num_heads, 3, -1, *weight.shape[1:2])
        return rows[:, part].reshape(weight.shape[0] // 3, *weight.shape[1:2])

    return take


def all_places(shape: Shape, code: Code, num_heads: int) -> Iterator[Place]:
    """Every tensor of the network."""
    yield from _both("conv_in", code.conv_in)
    for number, layer in enumerate(code.time_layers, start=1):
        yield Place(f"time_embedding.linear_{number}.bias", f"{code.time}.{layer}.bias", same)
        change = split_columns if code.has_table and number == 1 else same
        yield Place(f"time_embedding.linear_{number}.weight", f"{code.time}.{layer}.weight", change)
    if shape.classes is not None:
        yield Place("class_embedding.weight", LABELS, same)
    yield from _down_and_up(shape, code, num_heads)
    yield from _both("conv_norm_out", f"{code.out}.0")
    yield from _both("conv_out", f"{code.out}.2")


def _down_and_up(shape: Shape, code: Code, num_heads: int) -> Iterator[Place]:
    own, last = code.name == "improved-diffusion", len(shape.widths) - 1
    index = 1 if own else 0
    for level in range(last + 1):
        for layer in range(shape.layers):
            yield from _block(f"down_blocks.{level}", layer, f"{code.down}.{index}", level, shape, code, num_heads)
            index += 1
        if level != last:
            sampler = f"{code.down}.{index}.0.op" if own else f"{code.down}.{index}.main"
            yield from _both(f"down_blocks.{level}.downsamplers.0.conv", sampler)
            index += 1
    ends = (0, 2) if own else (0, 1)
    for number, end in enumerate(ends):
        yield from _residual(f"mid_block.resnets.{number}", f"{code.middle}.{end}", code)
    attention = f"{code.middle}.1" if own else f"{code.middle}.0.attn"
    yield from _attention("mid_block.attentions.0", attention, code, num_heads)
    index = 0
    for number, level in enumerate(reversed(range(last + 1))):
        for layer in range(shape.layers + 1):
            yield from _block(f"up_blocks.{number}", layer, f"{code.up}.{index}", level, shape, code, num_heads)
            index += 1
        if level:
            after = 2 if level in shape.attention else 1
            sampler = f"{code.up}.{index - 1}.{after}.conv" if own else f"{code.up}.{index}.main"
            yield from _both(f"up_blocks.{number}.upsamplers.0.conv", sampler)
            index += 0 if own else 1


def _block(
    target: str, layer: int, source: str, level: int, shape: Shape, code: Code, num_heads: int
) -> Iterator[Place]:
    own = code.name == "improved-diffusion"
    yield from _residual(f"{target}.resnets.{layer}", f"{source}.0" if own else source, code)
    if level in shape.attention:
        attention = f"{source}.1" if own else f"{source}.attn"
        yield from _attention(f"{target}.attentions.{layer}", attention, code, num_heads)


def _residual(target: str, source: str, code: Code) -> Iterator[Place]:
    for ours, theirs in code.residual.items():
        yield from _both(f"{target}.{ours}", f"{source}.{theirs}")


def _attention(target: str, source: str, code: Code, num_heads: int) -> Iterator[Place]:
    own = code.name == "improved-diffusion"
    yield from _both(f"{target}.group_norm", f"{source}.norm" if own else f"{source}.group_norm")
    yield from _both(f"{target}.to_out.0", f"{source}.proj_out" if own else f"{source}.proj", conv_to_linear)
    for part, letter in enumerate("qkv"):
        theirs = f"{source}.qkv" if own else f"{source}.proj_{letter}"
        yield from _both(f"{target}.to_{letter}", theirs, part_of_qkv(part, num_heads) if own else conv_to_linear)


def _both(target: str, source: str, change: Change = same) -> Iterator[Place]:
    for kind in ("weight", "bias"):
        yield Place(f"{target}.{kind}", f"{source}.{kind}", change)
