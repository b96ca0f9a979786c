"""8-bit pixels <-> x_0 against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ddpm_ext.diffusion.images import to_levels, to_uint8, to_unit, to_x_0

LEVELS = torch.arange(256, dtype=torch.uint8)


def test_every_level_lands_on_the_grid_of_the_paper():
    expected = torch.tensor([float(Fraction(2 * k, 255) - 1) for k in range(256)], dtype=torch.float64)
    x_0 = to_x_0(LEVELS)
    assert x_0.dtype == torch.float32
    # Two float32 roundings, of the quotient (up to 2) and of the difference.
    assert_close(x_0.double(), expected, rtol=0, atol=1.3e-7)
    assert x_0[0] == -1 and x_0[255] == 1


def test_levels_come_back():
    pixels = LEVELS.reshape(2, 2, 8, 8)
    assert torch.equal(to_uint8(to_x_0(pixels)), pixels)
    # bfloat16 moves an x_0 in [-1, 1] by at most 2^-9, a quarter of a grey level.
    assert torch.equal(to_uint8(to_x_0(pixels).bfloat16()), pixels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_uint8_takes_the_nearest_level_and_clamps(dtype: torch.dtype):
    x_0 = torch.linspace(-1.5, 1.5, 1000, dtype=dtype)  # without 0, which lies between two levels
    grid = 2 * np.arange(256) / 255 - 1
    nearest = [int(np.abs(grid - v).argmin()) for v in x_0.tolist()]
    assert to_uint8(x_0).tolist() == nearest


def test_scaling_twice_and_black_pictures_are_refused():
    with pytest.raises(ValueError, match=r"expects uint8 pixels of 8 bits, got torch.float32"):
        to_x_0(torch.zeros(2))
    with pytest.raises(ValueError, match=r"expects floats in \[-1, 1\], got torch"):
        to_uint8(LEVELS)
    with pytest.raises(ValueError, match="got NaN"):
        to_uint8(torch.tensor([0.0, float("nan")]))


@pytest.mark.parametrize("bits", [1, 4, 10, 12, 16])
def test_any_depth_lands_on_its_grid_and_comes_back(bits: int):
    top = 2**bits - 1
    levels = torch.arange(2**bits, dtype=torch.uint8 if bits <= 8 else torch.int32)
    x_0 = to_x_0(levels, bits)
    expected = torch.from_numpy(2 * np.arange(2**bits, dtype=np.float64) / top - 1)
    assert_close(x_0.double(), expected, rtol=0, atol=1.3e-7)
    assert x_0[0] == -1 and x_0[-1] == 1
    assert torch.equal(to_levels(x_0, bits), levels)
    assert torch.equal(to_levels(x_0.double(), bits), levels)
    assert_close(to_unit(levels, bits).double(), (expected + 1) / 2, rtol=0, atol=1e-7)


def test_pixels_of_another_depth_are_refused():
    with pytest.raises(ValueError, match="expects int32 pixels of 16 bits, got torch"):
        to_x_0(LEVELS, 16)
    with pytest.raises(ValueError, match="expects uint8 pixels of 8 bits, got torch"):
        to_x_0(LEVELS.int())
    with pytest.raises(ValueError, match="between 1 and 16, got 17"):
        to_x_0(LEVELS.int(), 17)
