"""Draws depend on seed, step and place in the global batch, and on nothing else."""

from __future__ import annotations

import torch

from ddpm_ext.training.state.rng import BLOCK, draw, seed_dropout, seed_of

CPU = torch.device("cpu")
SHAPE = (2, 3, 3)


def rows(first: int, last: int, seed: int = 0, step: int = 5):
    return draw(seed, step, range(first, last), SHAPE, 1000, CPU)


def test_a_row_has_the_same_draws_in_every_cut_of_the_batch() -> None:
    whole = rows(0, 3 * BLOCK)
    for first, last in ((0, 1), (3, 7), (BLOCK - 1, BLOCK + 1), (BLOCK, 2 * BLOCK), (5, 3 * BLOCK), (47, 48)):
        part = rows(first, last)
        for all_rows, some in zip(whole, part, strict=True):
            assert torch.equal(all_rows[first:last], some)


def test_seed_step_and_place_change_the_draws() -> None:
    first = rows(0, BLOCK)
    for other in (rows(0, BLOCK, seed=1), rows(0, BLOCK, step=6), rows(BLOCK, 2 * BLOCK)):
        assert not torch.equal(first.t, other.t) and not torch.equal(first.eps, other.eps)


def test_draws_have_their_distributions() -> None:
    draws = draw(0, 0, range(4096), (1, 4, 4), 10, CPU)
    counts = torch.bincount(draws.t, minlength=10)
    assert draws.t.dtype == torch.int64 and len(counts) == 10
    # 4 standard deviations of a binomial count, a binomial share, a mean and a variance of 65,536 normals.
    assert (counts - 409.6).abs().max() < 4 * (4096 * 0.09) ** 0.5
    assert abs(draws.flip.float().mean() - 0.5) < 4 * 0.5 / 64
    assert draws.eps.mean().abs() < 4 / 256
    assert (draws.eps.var() - 1).abs() < 4 * 2**0.5 / 256


def test_seeds_do_not_depend_on_the_process() -> None:
    golden = 8275812041639655200  # a run of today goes on tomorrow with the same noise
    assert seed_of("draw", 0, 0, 0) == golden
    seeds = {seed_of("draw", s, u, b) for s in range(10) for u in range(100) for b in range(10)}
    assert len(seeds) == 10_000 and all(0 <= seed < 2**63 for seed in seeds)


def test_dropout_masks_come_from_seed_step_and_rank() -> None:
    def mask(*where: int) -> torch.Tensor:
        seed_dropout(0, *where)
        return torch.rand(8)

    assert torch.equal(mask(1, 0, 0), mask(1, 0, 0))
    assert len({tuple(mask(*where).tolist()) for where in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1))}) == 4
