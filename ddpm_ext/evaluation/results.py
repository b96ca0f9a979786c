"""One score and what made it: the record that eval.json and calibration.json hold, tables show and cards quote.

    eval.json   {"format": 1, "figures": [{"metric": "fid", "value": ..., conditions ..., "certificate": {...}}]}

The keys of the file are those of format 1: a result is a "figure", its provenance the "certificate", the quantization
of generated pixels the "hand_off".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TypedDict, get_args

from ..errors import UserError
from ..run_dir import JsonRecord, read_json, write_json
from .words import Sampler

__all__ = ["Dataset", "Outcome", "Provenance", "Result", "read_results", "write_results"]

_KEYS = {"provenance": "certificate", "quantization": "hand_off"}  # field -> its key in the file
_OUTCOME = ("value", "values", "std", "standard_error", "parts", "rows", "note", "certificate", "model")
_CHAIN = ("variance_type", "timestep_spacing", "trajectory", "eta")  # written as null where a sampler has none


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What made a result beside its conditions: command, versions, commit, hardware, options, processes, time."""

    command: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    hardware: dict[str, object] = field(default_factory=dict)
    options: dict[str, object] = field(default_factory=dict)
    num_processes: int = 1
    device: str = ""
    wall_time_s: float = 0.0
    date: str = ""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The images that a result rests on.

    Attributes:
        name: Hub name, folder or "digits".
        split: Which split.
        num_images: How many of its images, from the first.
        fingerprint: Of the whole split, cut to size.
        resolution: (C, H, W) as the network takes them; images of other sizes were brought to it.
        center_crop: Where they were cropped.
        bits: Depth of their levels 0 … 2^bits - 1, which bits/dim count; None for 8.
        value_range: Stored values of the lowest and the highest level; None for the files' own range.
        departures: What differs from the training's own images, a sentence each; None where there is no record.
    """

    name: str
    split: str
    num_images: int
    fingerprint: str | None = None
    resolution: list[int] | None = None
    center_crop: bool | None = None
    bits: int | None = None
    value_range: list[float] | None = None
    departures: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """One score, the conditions that identify it, and its provenance; None where a field does not apply.

    Attributes:
        metric: "bpd", "rate_distortion", "fid", "fid_per_class", "kid", "cmmd", "is" or "prdc".
        value: The score: bits/dim, a distance, or a score of its own unit.
        weights: Hash of the weights, and network that of the network's options.
        averaged: Whether the weights are averages.
        dataset: Real images that bits/dim judges.
        reference: Real images that generated ones are compared with.
        sampler: A word of the option --sampler, or the name of a setting of a calibration, which says all of the chain.
        when: "before" or "after" a calibration.
        eta: η of the DDIM family; 1 is DDPM.
        extractor: Name, hash of the weights and input of the features' network.
        class_labels: How the classes of generated images were chosen.
        std: Spread over subsets, splits or seeds.
        standard_error: Of value, in its unit; of sampled steps for bits/dim.
        values: One of each seed.
        parts: What value is made of, or comes with.
        rows: Of rate and distortion.
    """

    metric: str
    value: float
    model: str = ""
    weights: str | None = None
    network: str | None = None
    averaged: bool | None = None
    dataset: Dataset | None = None
    sampler: str | None = None
    when: str | None = None
    variance_type: str | None = None
    num_inference_steps: int = 0
    timestep_spacing: str | None = None
    trajectory: str | None = None
    eta: float | None = None
    num_timesteps_sampled: int | None = None
    decoder_variance: str | None = None
    cdf: str | None = None
    num_samples: int | None = None
    seed: int | None = None
    extractor: Mapping[str, str | None] | None = None
    quantization: str | None = None
    reference: Dataset | None = None
    class_labels: str | None = None
    guidance_scale: float | None = None
    guidance_interval: list[int] | None = None
    guidance_rescale: float | None = None
    kid_subsets: int | None = None
    kid_subset_size: int | None = None
    std: float | None = None
    standard_error: float | None = None
    values: list[float] | None = None
    parts: dict[str, float] | None = None
    rows: list[dict[str, float]] | None = None
    note: str | None = None
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise UserError(f"{self.metric} came out as {self.value}: look at the weights and at the extractor.")

    def to_json(self) -> dict[str, object]:
        """Return the entry of eval.json: no number that JSON does not know, no field that does not apply."""
        chain = self.sampler is not None or self.timestep_spacing is not None or self.trajectory is not None
        setting = self.sampler is not None and self.sampler not in get_args(Sampler)
        null = {"when"} if setting else set()
        null |= {"averaged", *(_CHAIN if chain else ()), *(["num_timesteps_sampled"] if self.cdf else [])}
        record = {name: value for name, value in asdict(self).items() if value is not None or name in null}
        for name in ("dataset", "reference"):
            if name in record:
                record[name] = {key: some for key, some in asdict(getattr(self, name)).items() if some is not None}
        return _finite({_KEYS.get(name, name): value for name, value in record.items()})

    @classmethod
    def from_json(cls, record: JsonRecord) -> Result:
        """Read an entry of eval.json, of this version or an earlier one; keys that are not known are left out."""
        names = {_KEYS.get(f.name, f.name): f.name for f in fields(cls)}
        known = {names[key]: value for key, value in record.items() if key in names}
        for name, kind in (("dataset", Dataset), ("reference", Dataset), ("provenance", Provenance)):
            if known.get(name) is not None:
                words = {f.name for f in fields(kind)}
                known[name] = kind(**{key: value for key, value in known[name].items() if key in words})
        return cls(**known)


class Outcome(TypedDict, total=False):
    """What a measurement found: fields of a `Result`."""

    value: float
    std: float | None
    standard_error: float | None
    parts: dict[str, float]
    rows: list[dict[str, float]]
    note: str | None
    kid_subsets: int
    kid_subset_size: int


def read_results(path: Path | str) -> list[Result]:
    """Read the results of an eval.json or calibration.json; none where there is no file."""
    path = Path(path)
    return [Result.from_json(entry) for entry in read_json(path).get("figures", [])] if path.is_file() else []


def write_results(path: Path, results: list[Result]) -> list[Result]:
    """Put results into eval.json in the place of those measured under the same conditions; return all it holds.

    A result of an earlier version, which said less of its conditions, makes room when all that it says is the same.

    Args:
        path: The file, made with its folder if missing.
        results: The new ones.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    there = read_json(path)["figures"] if path.exists() else []
    new = [result.to_json() for result in results]
    kept = [entry for entry in there if not any(_agrees(_identity(entry), _identity(other)) for other in new)]
    write_json(path, {"format": 1, "figures": kept + new})
    return [Result.from_json(entry) for entry in kept + new]


def _identity(entry: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in entry.items() if name not in _OUTCOME}


def _agrees(former: object, new: object) -> bool:
    """Return whether all that a former entry says is said by a new one, too."""
    if isinstance(former, dict) and isinstance(new, dict):
        return all(_agrees(value, new.get(name)) for name, value in former.items())
    return former == new


def _finite(record: dict[str, object]) -> dict[str, object]:
    """Return a record without the numbers that JSON does not know, such as the error of a mean of one image."""
    kept = {name: value for name, value in record.items() if not isinstance(value, float) or math.isfinite(value)}
    return {name: _finite(value) if isinstance(value, dict) else value for name, value in kept.items()}
