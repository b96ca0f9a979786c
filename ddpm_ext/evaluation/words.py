"""The words that options of an evaluation may take. Imports nothing heavy, so that command lines answer at once."""

from __future__ import annotations

from typing import Literal

__all__ = ["HandOff", "Metric", "Sampler", "Score"]

Metric = Literal["bpd", "rate_distortion", "fid", "kid", "cmmd", "is", "prdc"]
Score = Literal["bpd", "fid"]
Sampler = Literal["ddpm", "ddim", "dpm++", "dpm++-plain", "dpm++-lu", "dpm++3", "unipc", "unipc-plain"]
HandOff = Literal["uint8", "float"]
