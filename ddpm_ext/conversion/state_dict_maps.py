"""The networks of other codes as their checkpoints name them, beside the names of UNet2DModel.

    guided-diffusion, improved-diffusion   openai
    pytorch-ddpm                           w86763777
    ddim                                   ermongroup, and pesser/pytorch_diffusion: the weights of Ho et al.

All build the network of Ho et al. 2020 block by block in the order of UNet2DModel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .config import ConvertError

__all__ = [
    "LAYOUTS",
    "Layout",
    "Place",
    "Shape",
    "all_places",
    "find",
    "left_over",
    "measure",
]

Change = Callable[[Tensor], Tensor]
Weights = Mapping[str, Tensor]
_CONVOLUTION = ("out", "in", "3", "3")
_GROUPS = 32  # of every norm, in all codes


class Layout(NamedTuple):
    """Names of one code's layers beside UNet2DModel's."""

    name: str
    conv_in: str
    norm_out: str
    conv_out: str
    time: tuple[str, str]  # the two linear layers of the time embedding
    table: str | None  # the embedding of every step, interleaved sin and cos
    down: str  # the list of blocks on the way down
    up: str
    middle: tuple[str, str, str]  # residual block, attention, residual block
    inside: str  # what follows a block's name for its residual part
    attention_inside: tuple[str, str]  # what becomes of a block's name for its attention: old -> new, or what follows
    samplers: tuple[str, str]  # what follows a resampling block's name: down, up
    residual: dict[str, str]  # UNet2DModel's name of a part of a residual block -> theirs
    attention: dict[str, str]  # and of an attention; q, k, v of one name are rows of one convolution
    labels: str | None


_OPENAI_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OPENAI = Layout(
    "improved-diffusion",
    "input_blocks.0.0",
    "out.0",
    "out.2",
    ("time_embed.0", "time_embed.2"),
    None,
    "input_blocks",
    "output_blocks",
    ("middle_block.0", "middle_block.1", "middle_block.2"),
    ".0",
    ("", ".1"),
    (".0.op", ".conv"),
    _OPENAI_PARTS,
    {"group_norm": "norm", "to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out.0": "proj_out"},
    "label_emb.weight",
)
LAYOUTS = {
    "guided-diffusion": _OPENAI._replace(name="guided-diffusion"),
    "improved-diffusion": _OPENAI,
    "pytorch-ddpm": Layout(
        "pytorch-ddpm",
        "head",
        "tail.0",
        "tail.2",
        ("time_embedding.timembedding.1", "time_embedding.timembedding.3"),
        "time_embedding.timembedding.0.weight",
        "downblocks",
        "upblocks",
        ("middleblocks.0", "middleblocks.0.attn", "middleblocks.1"),
        "",
        ("", ".attn"),
        (".main", ".main"),
        {
            "norm1": "block1.0",
            "conv1": "block1.2",
            "time_emb_proj": "temb_proj.1",
            "norm2": "block2.0",
            "conv2": "block2.3",
            "conv_shortcut": "shortcut",
        },
        {"group_norm": "group_norm", "to_q": "proj_q", "to_k": "proj_k", "to_v": "proj_v", "to_out.0": "proj"},
        None,
    ),
    "ddim": Layout(
        "ddim",
        "conv_in",
        "norm_out",
        "conv_out",
        ("temb.dense.0", "temb.dense.1"),
        None,
        "down",
        "up",
        ("mid.block_1", "mid.attn_1", "mid.block_2"),
        "",
        (".block.", ".attn."),
        (".downsample.conv", ".upsample.conv"),
        {
            "norm1": "norm1",
            "conv1": "conv1",
            "time_emb_proj": "temb_proj",
            "norm2": "norm2",
            "conv2": "conv2",
            "conv_shortcut": "nin_shortcut",
        },
        {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"},
        None,
    ),
}


# The shape ------------------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """What a checkpoint's tensors tell of its network."""

    widths: tuple[int, ...]  # of the levels, the finest first
    layers: int  # residual blocks of a level on the way down
    attention: frozenset[int]  # levels that have it
    in_channels: int
    out_channels: int
    scale_shift: bool
    classes: int | None
    is_residual: bool  # whether residual blocks resample (resblock_updown)


def measure(weights: Weights, layout: Layout) -> Shape:
    """Return the network's shape, read off the tensors on its way down.

    Raises:
        ConvertError: one of these tensors is missing or cannot be of such a network; it is named.
    """
    first = find(weights, f"{layout.conv_in}.weight", _CONVOLUTION, layout)
    levels, layers = _levels(weights, layout)
    blocks = _down_blocks(layout, levels, layers)
    widths, attention = [], set()
    for level, names in enumerate(blocks):
        part = f"{_residual_name(names[0], layout)}.{layout.residual['conv1']}.weight"
        widths.append(_width(weights, part, layout))
        attention |= {level} if any(_has(weights, f"{_attention_name(name, layout)}.") for name in names) else set()
    projection = f"{_residual_name(blocks[0][0], layout)}.{layout.residual['time_emb_proj']}.weight"
    labels = layout.labels if layout.labels in weights else None
    return Shape(
        tuple(widths),
        layers,
        frozenset(attention),
        first.shape[1],
        _out_channels(weights, first.shape[1], layout),
        find(weights, projection, ("out", "in"), layout).shape[0] == 2 * widths[0],
        find(weights, labels, ("classes", "width"), layout).shape[0] if labels else None,
        levels > 1 and layout.labels is not None and _has(weights, f"{layout.down}.{layers + 1}.0.in_layers."),
    )


def _levels(weights: Weights, layout: Layout) -> tuple[int, int]:
    """Return the number of levels, and of residual blocks on each of them on the way down."""
    if layout.name == "ddim":
        counts = [_count(weights, f"{layout.down}.{level}.block") for level in range(_count(weights, layout.down))]
    elif layout.name == "pytorch-ddpm":
        counts = [0]
        for index in range(_count(weights, layout.down)):
            if _has(weights, f"{layout.down}.{index}{layout.samplers[0]}."):
                counts.append(0)
            else:
                counts[-1] += 1
    else:  # a block that resamples may be a residual block like any other: what follows on the way up tells them
        total = _count(weights, layout.up)
        ends = {m[1] for name in weights if (m := re.match(r"output_blocks\.(\d+)\.[12]\.(conv|in_layers)\.", name))}
        levels = len(ends) + 1
        counts = [total // levels - 1] * levels if total % levels == 0 else [0]
    if len(set(counts)) != 1 or counts[0] < 1:
        raise ConvertError(
            f"A UNet2DModel has as many residual blocks on each level, the checkpoint has {counts} ({layout.down})."
        )
    return len(counts), counts[0]


def _count(weights: Weights, folder: str) -> int:
    """Return how many numbered parts a list of layers has, from 0 on."""
    prefix = f"{folder}."
    numbers = {name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)}
    return next(count for count in range(len(numbers) + 1) if str(count) not in numbers)


def find(weights: Weights, name: str, dimensions: tuple[str, ...], layout: Layout) -> Tensor:
    """Return a tensor whose shape tells the network's.

    Args:
        weights: The state dict.
        name: The tensor's name.
        dimensions: What its dimensions are, a number where it is always the same.
        layout: The code that named it.

    Raises:
        ConvertError: it is missing, empty, or of other dimensions.
    """
    expected = f"({', '.join(dimensions)})"
    if name not in weights:
        raise ConvertError(
            f"The checkpoint has no tensor {name!r}, which every network of {layout.name} has as {expected}. Its first "
            f"is {next(iter(weights), None)!r}: is it of another code? --source auto tells."
        )
    found = weights[name]
    sizes = zip(found.shape, dimensions, strict=False)
    if found.ndim != len(dimensions) or not all(str(n) == part if part.isdigit() else n > 0 for n, part in sizes):
        raise ConvertError(
            f"{name!r} of the checkpoint has the shape {tuple(found.shape)}, where {layout.name} has {expected}."
        )
    return found


def _has(weights: Weights, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in weights)


def _width(weights: Weights, name: str, layout: Layout) -> int:
    """Return the channels that a residual block's first convolution makes."""
    found = find(weights, name, _CONVOLUTION, layout)
    if found.shape[0] % _GROUPS:
        raise ConvertError(
            f"{name!r} of the checkpoint has the shape {tuple(found.shape)}, where {layout.name} has a multiple of "
            f"{_GROUPS} channels first: its norms are of {_GROUPS} groups."
        )
    return found.shape[0]


def _out_channels(weights: Weights, in_channels: int, layout: Layout) -> int:
    """Return the channels of the output: the prediction alone, or with the variance that OpenAI's codes may learn."""
    name = f"{layout.conv_out}.weight"
    found = find(weights, name, _CONVOLUTION, layout)
    allowed = [in_channels] if layout.labels is None else [in_channels, 2 * in_channels]
    if found.shape[0] not in allowed:
        raise ConvertError(
            f"{name!r} of the checkpoint has the shape {tuple(found.shape)}, where {layout.name} has "
            f"{' or '.join(map(str, allowed))} channels first for images of {in_channels}. A network that also takes "
            "another image, as of super-resolution, is no DDPM of images alone."
        )
    return found.shape[0]


# The mapping ----------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a tensor of UNet2DModel comes from."""

    target: str
    source: str
    change: Change


def _same(weight: Tensor) -> Tensor:
    return weight


def _conv_to_linear(weight: Tensor) -> Tensor:
    """Return a 1x1 convolution (out, in, 1[, 1]) as a matrix (out, in)."""
    return weight.reshape(weight.shape[0], -1) if weight.ndim > 1 else weight


def _split_columns(weight: Tensor) -> Tensor:
    """Return columns of interleaved sin, cos as all sin, then all cos."""
    return torch.cat([weight[:, 0::2], weight[:, 1::2]], dim=1)


def _part_of_qkv(part: int, heads: Callable[[int], int], order: Literal["legacy", "new"]) -> Change:
    """Return what takes the rows of q (0), k (1) or v (2) out of one convolution.

    legacy: rows are [head][q, k, v][channel];   new: [q, k, v][head][channel]
    """

    def take(weight: Tensor) -> Tensor:
        width, rest = weight.shape[0] // 3, weight.shape[1:2]
        if order == "new":
            return weight.reshape(3, width, *rest)[part]
        return weight.reshape(heads(width), 3, -1, *rest)[:, part].reshape(width, *rest)

    return take


def all_places(
    shape: Shape, layout: Layout, heads: Callable[[int], int], order: Literal["legacy", "new"]
) -> Iterator[Place]:
    """Yield where every tensor of the UNet2DModel comes from.

    Args:
        shape: Of the network.
        layout: Its code's names.
        heads: Width of an attention -> its number of heads; of codes that hold q, k and v in one convolution.
        order: Of the rows of that convolution.
    """
    yield from _both("conv_in", layout.conv_in)
    for number, name in enumerate(layout.time, start=1):
        yield Place(f"time_embedding.linear_{number}.bias", f"{name}.bias", _same)
        change = _split_columns if layout.table and number == 1 else _same
        yield Place(f"time_embedding.linear_{number}.weight", f"{name}.weight", change)
    if layout.labels is not None and shape.classes is not None:
        yield Place("class_embedding.weight", layout.labels, _same)
    attentions: list[tuple[str, str]] = [("mid_block.attentions.0", layout.middle[1])]
    for target, name, level in _blocks(shape, layout):
        yield from _residual(target, _residual_name(name, layout), layout)
        if level in shape.attention:
            attentions.append((target.replace(".resnets.", ".attentions."), _attention_name(name, layout)))
    for target, name in (("mid_block.resnets.0", layout.middle[0]), ("mid_block.resnets.1", layout.middle[2])):
        yield from _residual(target, name, layout)
    for target, name in attentions:
        for ours, theirs in layout.attention.items():
            change = _conv_to_linear if ours != "group_norm" else _same
            if theirs == "qkv":
                change = _part_of_qkv("qkv".index(ours[-1]), heads, order)
            yield from _both(f"{target}.{ours}", f"{name}.{theirs}", change)
    for target, name in _samplers(shape, layout):
        if shape.is_residual:
            yield from _residual(target, name, layout)
        else:
            yield from _both(f"{target}.conv", name)
    yield from _both("conv_norm_out", layout.norm_out)
    yield from _both("conv_out", layout.conv_out)


def _blocks(shape: Shape, layout: Layout) -> Iterator[tuple[str, str, int]]:
    """Yield UNet2DModel's name, theirs and the level of each residual block outside the middle."""
    levels = len(shape.widths)
    for level, names in enumerate(_down_blocks(layout, levels, shape.layers)):
        for layer, name in enumerate(names):
            yield f"down_blocks.{level}.resnets.{layer}", name, level
    for number, names in enumerate(_up_blocks(layout, levels, shape.layers)):
        for layer, name in enumerate(names):
            yield f"up_blocks.{number}.resnets.{layer}", name, levels - 1 - number


def _down_blocks(layout: Layout, levels: int, layers: int) -> list[list[str]]:
    """Return their names of the residual blocks of each level on the way down."""
    if layout.name == "ddim":
        return [[f"{layout.down}.{level}.block.{layer}" for layer in range(layers)] for level in range(levels)]
    first = 0 if layout.table else 1  # OpenAI's first block is the first convolution
    starts = [first + level * (layers + 1) for level in range(levels)]
    return [[f"{layout.down}.{start + layer}" for layer in range(layers)] for start in starts]


def _up_blocks(layout: Layout, levels: int, layers: int) -> list[list[str]]:
    """Return their names of the residual blocks of each level on the way up, the coarsest first."""
    if layout.name == "ddim":
        names = [[f"{layout.up}.{level}.block.{layer}" for layer in range(layers + 1)] for level in range(levels)]
        return names[::-1]
    apart = layers + 1 + bool(layout.table)  # of pytorch-ddpm, what resamples is a block of the list
    return [[f"{layout.up}.{number * apart + layer}" for layer in range(layers + 1)] for number in range(levels)]


def _samplers(shape: Shape, layout: Layout) -> Iterator[tuple[str, str]]:
    """Yield UNet2DModel's name and theirs of what halves and doubles the size: a convolution or a residual block."""
    levels, layers = len(shape.widths), shape.layers
    down, up = layout.samplers
    for level in range(levels - 1):
        target = f"down_blocks.{level}.downsamplers.0"
        if layout.name == "ddim":
            yield target, f"{layout.down}.{level}{down}"
        else:
            last = _down_blocks(layout, levels, layers)[level][-1]
            name = f"{layout.down}.{int(last.rsplit('.', 1)[1]) + 1}"
            yield target, f"{name}.0" if shape.is_residual else f"{name}{down}"
    for number in range(levels - 1):
        target, level = f"up_blocks.{number}.upsamplers.0", levels - 1 - number
        last = _up_blocks(layout, levels, layers)[number][-1]
        if layout.name == "ddim":
            yield target, f"{layout.up}.{level}{up}"
        elif layout.table:
            yield target, f"{layout.up}.{int(last.rsplit('.', 1)[1]) + 1}{up}"
        else:
            name = f"{last}.{2 if level in shape.attention else 1}"
            yield target, name if shape.is_residual else f"{name}{up}"


def _residual_name(block: str, layout: Layout) -> str:
    return f"{block}{layout.inside}"


def _attention_name(block: str, layout: Layout) -> str:
    old, new = layout.attention_inside
    return block.replace(old, new) if old else f"{block}{new}"


def _residual(target: str, source: str, layout: Layout) -> Iterator[Place]:
    for ours, theirs in layout.residual.items():
        yield from _both(f"{target}.{ours}", f"{source}.{theirs}")


def _both(target: str, source: str, change: Change = _same) -> Iterator[Place]:
    for kind in ("weight", "bias"):
        yield Place(f"{target}.{kind}", f"{source}.{kind}", change)


def left_over(weights: Weights, used: Collection[str]) -> list[str]:
    """Return the tensors of a checkpoint that no place took; counters of batch norms are none."""
    return [name for name in weights if name not in used and not name.endswith("num_batches_tracked")]
