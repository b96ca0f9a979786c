"""The words that options of an evaluation may take. Imports nothing heavy, so that command lines answer at once."""

from __future__ import annotations

from typing import Literal

__all__ = ["Metric", "Quantization", "Sampler", "Score"]

Metric = Literal["bpd", "rate_distortion", "fid", "fid_per_class", "kid", "cmmd", "is", "prdc"]
Score = Literal["bpd", "fid"]
Sampler = Literal["ddpm", "solver", "ddim", "dpm++", "dpm++-plain", "dpm++-lu", "dpm++3", "unipc", "unipc-plain"]
Quantization = Literal["uint8", "float"]
