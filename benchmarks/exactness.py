"""How far the schedulers' numbers are from 50-digit arithmetic: ours and Diffusers', as a markdown table.

python benchmarks/exactness.py
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from decimal import Decimal, getcontext
from importlib.metadata import version
from itertools import accumulate

import torch
from diffusers import DDPMScheduler

from ddpm_ext import DDPMExtScheduler, __version__

getcontext().prec = 50
FIRST, LAST, JUMP = Decimal("1e-4"), Decimal("0.02"), 20
# ᾱ of the linear schedule in 50 digits; ᾱ_{-1} = 1 stands at the end.
EXACT = [*accumulate((1 - (FIRST + (LAST - FIRST) * i / 999) for i in range(1000)), operator.mul), Decimal(1)]
ROWS = ("1 - ᾱ_t, all t", "β̃_t, t > 0", "b of a chain of 50 steps", "√(1-ᾱ_t) in bfloat16 `add_noise`, t = 5")


def worst(got: Callable[[int], float], exact: Callable[[int], Decimal], steps: range) -> str:
    """Largest relative error over the steps."""
    return f"{max(abs(Decimal(got(t)) / exact(t) - 1) for t in steps):.1e}"


def errors(kind: type[DDPMScheduler | DDPMExtScheduler]) -> list[str]:
    """The errors of one scheduler, in the order of ROWS."""
    full, respaced = kind(), kind(variance_type="fixed_large")
    respaced.set_timesteps(1000 // JUMP)
    ours = isinstance(full, DDPMExtScheduler)
    noise_power = full.tables.one_minus_alpha_bar if ours else 1 - full.alphas_cumprod
    eps = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    noised = full.add_noise(0 * eps, eps, torch.tensor([5])).item()  # pyright: ignore[reportArgumentType]

    def b(t: int, jump: int = 1) -> Decimal:
        return 1 - EXACT[t] / EXACT[t - jump]

    return [
        worst(lambda t: noise_power[t].item(), lambda t: 1 - EXACT[t], range(1000)),
        worst(
            lambda t: full._get_variance(t).item(), lambda t: (1 - EXACT[t - 1]) * b(t) / (1 - EXACT[t]), range(1, 1000)
        ),
        worst(lambda t: respaced._get_variance(t).item(), lambda t: b(t, JUMP), range(JUMP, 1000, JUMP)),
        worst(lambda t: noised, lambda t: (1 - EXACT[t]).sqrt(), range(5, 6)),
    ]


if __name__ == "__main__":
    print(
        f"| largest relative error | Diffusers {version('diffusers')} | ddpm_ext {__version__} |\n| --- | --- | --- |"
    )
    for row in zip(ROWS, errors(DDPMScheduler), errors(DDPMExtScheduler), strict=True):
        print("| " + " | ".join(row) + " |")
