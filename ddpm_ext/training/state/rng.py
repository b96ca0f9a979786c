"""Everything random in training, as a function of (seed, step, place in the global batch) and of nothing else.

So the draws of an image depend neither on the number of processes, nor on accumulation, nor on a resume.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from ...diffusion.losses import uniform_timesteps
from ...distributed import move

__all__ = ["BLOCK", "draw", "seed_dropout", "seed_of"]

BLOCK = 16  # neighbours in the global batch that share one generator: drawing image by image costs a third more


class Draws(NamedTuple):
    t: Tensor  # (B,) int64, 0 <= t < T
    flip: Tensor  # (B,) bool
    eps: Tensor  # (B, C, H, W), standard normal


def seed_of(*words: int | str) -> int:
    """Return a 63-bit seed from words: equal words give equal seeds, others unrelated ones.

    A CPU generator of PyTorch 2.13 uses the low 32 bits alone, so n blocks have about n²/2³³ pairs that share their
    draws: 4,768 pairs, 0.15% of the 6.4 million blocks of 16 images of the cifar10 preset. They meet other images and
    other weights. More bits would change what the checkpoints of today go on to.
    """
    digest = blake2b("/".join(map(str, words)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draw(seed: int, step: int, rows: range, shape: tuple[int, ...], num_timesteps: int, device: torch.device) -> Draws:
    """Timesteps, flips and noise of some rows of one step's global batch.

    The global batch is cut into blocks of 16 rows, each with a generator seeded by (seed, step, block). Noise is drawn
    on the device of the images; another kind of device draws other noise.

    Args:
        seed: The run's seed.
        step: The batch's number in the run, from 0.
        rows: Places in the global batch, step 1.
        shape: (C, H, W) of one image.
        num_timesteps: T.
        device: Where the draws are needed.

    Returns:
        One record for these rows; the same rows give the same values in whatever range they are asked for.
    """
    blocks = range(rows.start // BLOCK, -(-rows.stop // BLOCK))
    parts = [draw_block(seed, step, block, shape, num_timesteps, device) for block in blocks]
    first = rows.start - blocks.start * BLOCK
    mine = slice(first, first + len(rows))
    t, flip, eps = (torch.cat(part)[mine] if len(parts) > 1 else part[0][mine] for part in zip(*parts, strict=True))
    return Draws(move(t, device), move(flip, device), eps)


def draw_block(
    seed: int, step: int, block: int, shape: tuple[int, ...], num_timesteps: int, device: torch.device
) -> Draws:
    """All draws of one block, always of BLOCK rows, so that the batch's size does not enter."""
    generator = torch.Generator().manual_seed(seed_of("draw", seed, step, block))
    t = uniform_timesteps(BLOCK, num_timesteps, generator=generator)
    flip = torch.rand(BLOCK, generator=generator) < 0.5
    if device.type != "cpu":
        generator = torch.Generator(device).manual_seed(seed_of("noise", seed, step, block))
    return Draws(t, flip, torch.randn((BLOCK, *shape), generator=generator, device=device))


def uniforms(word: str, seed: int, step: int, rows: range) -> Tensor:
    """Return a number in [0, 1) for each of some rows of a step's global batch, float64, drawn in blocks as all is.

    Args:
        word: What they are for; each word has draws of its own.
        seed: The run's seed.
        step: The batch's number in the run, from 0.
        rows: Places in the global batch, step 1.
    """
    blocks = range(rows.start // BLOCK, -(-rows.stop // BLOCK))
    generators = [torch.Generator().manual_seed(seed_of(word, seed, step, block)) for block in blocks]
    parts = [torch.rand(BLOCK, generator=generator, dtype=torch.float64) for generator in generators]
    first = rows.start - blocks.start * BLOCK
    return torch.cat(parts)[first : first + len(rows)]


def seed_dropout(seed: int, step: int, micro_batch: int, rank: int) -> None:
    """Seed the global generators, of which dropout masks are drawn. Masks depend on the rank: they are not elastic.

    Args:
        seed: That of the run.
        step: Updates done.
        micro_batch: Which pass of the update.
        rank: Which process.
    """
    torch.manual_seed(seed_of("dropout", seed, step, micro_batch, rank))
