"""Results -> markdown tables; what they say of their conditions is what plots and cards say, too."""

from __future__ import annotations

from dataclasses import asdict
from typing import NamedTuple, get_args

from .results import Dataset, Result
from .words import Sampler

__all__ = [
    "NAMES",
    "Group",
    "data_words",
    "groups_of_scores",
    "markdown",
    "of_newest_weights",
    "row_words",
    "sampler_words",
    "table",
]

NAMES = {
    "bpd": "bits/dim",
    "fid": "Fréchet distance",
    "fid_per_class": "Fréchet distance of the classes, mean",
    "kid": "KID",
    "cmmd": "CMMD",
    "is": "Inception score",
    "prdc": "precision / recall / density / coverage",
}
_OPTION_WORDS = get_args(Sampler)
_CONDITIONS = (  # named in a row where results of one table differ in them
    *("averaged", "eta", "seed", "cdf", "num_timesteps_sampled", "decoder_variance", "class_labels"),
    *("guidance_scale", "guidance_interval", "guidance_rescale"),
    *("kid_subsets", "kid_subset_size", "dataset", "extractor", "reference"),
)
_IN_TITLES = ("name", "split", "num_images")


class Group(NamedTuple):
    """Scores that share a table and a plot."""

    title: str
    stem: str  # of the plot's file
    results: list[Result]


def markdown(results: list[Result]) -> str:
    """Return all tables of the weights measured last: bits/dim and its parts, scores against steps, rate-distortion."""
    kept = of_newest_weights(results)
    left_out = len(results) - len(kept)
    others = "1 result" if left_out == 1 else f"{left_out} results"
    tables = [
        f"Left out: {others} of other weights; see eval.json." if left_out else "",
        _table_of_bits([result for result in kept if result.metric == "bpd" and result.sampler is None]),
        *map(_table_of_scores, groups_of_scores(kept)),
        *map(_table_of_distances, groups_of_scores(kept)),
        *_tables_of_rows([result for result in kept if result.metric == "rate_distortion"]),
    ]
    text = "\n\n".join(table for table in tables if table)
    return text + "\n" if text else ""


def of_newest_weights(results: list[Result]) -> list[Result]:
    """Return the results of the network that the last of them is of; one that names none is taken for its."""

    def fits(result: Result, name: str) -> bool:
        return getattr(result, name) in (None, getattr(results[-1], name)) or getattr(results[-1], name) is None

    return [result for result in results if fits(result, "weights") and fits(result, "network")]


def groups_of_scores(results: list[Result]) -> list[Group]:
    """Return the scores that stand against numbers of steps, grouped by what a table's title says."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if result.sampler is not None:
            groups.setdefault(_title(result), []).append(result)
    return [Group(*title, results=members) for title, members in groups.items()]


def _title(result: Result) -> tuple[str, str]:
    """Return a table's title, and the stem of its plot's file."""
    name = NAMES[result.metric]
    if result.dataset is not None:
        return f"{name} of {data_words(result.dataset)}", result.metric
    assert result.extractor is not None and result.num_samples is not None
    extractor = str(result.extractor["name"])
    to = "" if result.metric == "is" or result.reference is None else f" to {data_words(result.reference)}"
    samples = f"{result.num_samples:,} samples"
    if result.values is not None and len(result.values) > 1:
        samples += f", mean ± deviation of {len(result.values)} seeds"
    how = f"{extractor}, {samples}, quantization {result.quantization}"
    return f"{name}{to} ({how})", f"{result.metric}_{result.num_samples}_{extractor.rsplit('/', 1)[-1]}"


# Rows -----------------------------------------------------------------------------------------------------------------


def row_words(results: list[Result]) -> list[str]:
    """Return sampler and variance of each result, and every condition in which some of them differ."""
    return [
        ", ".join([sampler_words(result), *words.values()])
        for result, words in zip(results, _differing(results), strict=True)
    ]


def sampler_words(result: Result) -> str:
    """Return a sampler in words, with its variance where it has one to choose; the name of a setting says it itself."""
    name = str(result.sampler)
    return name if result.variance_type is None or not _is_option(result) else f"{name}, {result.variance_type}"


def _is_option(result: Result) -> bool:
    """Return whether the sampler is a word of the option --sampler; a setting's name says all of its chain."""
    return result.sampler is None or result.sampler in _OPTION_WORDS


def _differing(results: list[Result]) -> list[dict[str, str]]:
    """Return the conditions of each result in which it differs from another of them."""
    found = [_conditions(result) for result in results]
    ancestral = [result.sampler in (None, "ddpm") for result in results]  # only these have an η to choose
    names = dict.fromkeys(name for words in found for name in words)

    def differs(name: str) -> bool:
        those = [words.get(name, "") for words, has in zip(found, ancestral, strict=True) if name != "eta" or has]
        return len(set(those)) > 1

    names = [name for name in names if differs(name)]
    return [{name: words[name] for name in names if words.get(name)} for words in found]


def _conditions(result: Result) -> dict[str, str]:
    """Return what a result was measured under, in words, beside what every table and title shows; "" for None."""
    found = {"steps": _chosen_by(result)} if _is_option(result) else {}
    for name in _CONDITIONS:
        value = getattr(result, name)
        if name == "eta" and not _is_option(result):
            continue
        if not isinstance(value, Dataset | dict):
            found[name] = _condition_words(name, value)
        elif not (name == "reference" and result.metric == "is"):
            inner = asdict(value) if isinstance(value, Dataset) else value
            found |= {
                f"{name} {key}": _condition_words(f"{name} {key}", some)
                for key, some in inner.items()
                if key not in _IN_TITLES
            }
    return found


def _chosen_by(result: Result) -> str:
    """Return how the steps of a chain were chosen."""
    if result.trajectory is not None:
        return f"{result.trajectory} trajectory"
    return "" if result.timestep_spacing is None else f"{result.timestep_spacing} spacing"


def _condition_words(name: str, value: object) -> str:
    """Return one condition as it stands in a row."""
    if value is None or value == []:
        return ""
    if name == "averaged":
        return "averaged" if value else "not averaged"
    return f"η = {value:g}" if name == "eta" else f"{name.replace('_', ' ')} {value}"


def data_words(dataset: Dataset) -> str:
    """Return images in words: how many, of which set and split, and their depth where it is not 8 bits."""
    depth = "" if dataset.bits is None else f" at {dataset.bits} bits"
    return f"{dataset.num_images:,} images of {dataset.name} {dataset.split}{depth}"


# Tables ---------------------------------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return one markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _table_of_bits(results: list[Result]) -> str:
    """Return bits/dim as prior + rate + decoder."""
    rows = []
    for result, words in zip(results, _differing(results), strict=True):
        assert result.parts is not None and result.dataset is not None
        error = "" if result.standard_error is None else f" ± {result.standard_error:.4f}"
        rows.append(
            [
                data_words(result.dataset),
                ", ".join([str(result.variance_type), *words.values()]),
                str(result.num_inference_steps),
                *(f"{result.parts[name]:.4f}" for name in ("prior", "rate", "decoder")),
                f"{result.value:.4f}{error}",
            ]
        )
    head = ["bits/dim of", "variance", "steps", "prior L_T", "rate Σ L_{t-1}", "decoder L_0", "total"]
    return table(head, rows) if rows else ""


def _table_of_scores(group: Group) -> str:
    """Return one metric against steps: samplers down, steps across; the best of several in a column is bold."""
    names = row_words(group.results)
    steps = sorted({result.num_inference_steps for result in group.results})
    cells = {(name, r.num_inference_steps): r for name, r in zip(names, group.results, strict=True)}
    rows = [[name, *(_cell(cells, name, count) for count in steps)] for name in dict.fromkeys(names)]
    return f"{group.title}:\n\n" + table(["sampler", *(f"{n} step{'s' * (n > 1)}" for n in steps)], rows)


def _table_of_distances(group: Group) -> str:
    """Return the squared distances to a fitted solver's reference from the same noises, where they were measured."""
    found = [result for result in group.results if "squared_distance" in (result.parts or {})]
    steps = sorted({result.num_inference_steps for result in found})
    cells = {(str(r.sampler), r.num_inference_steps): (r.parts or {})["squared_distance"] for r in found}
    names = dict.fromkeys(name for name, _ in cells)
    rows = [[name, *(f"{cells[name, K]:.3g}" if (name, K) in cells else "" for K in steps)] for name in names]
    title = "Mean squared distance of the features to those of the reference, from the same noises:\n\n"
    return title + table(["sampler", *(f"{K} steps" for K in steps)], rows) if rows else ""


def _cell(cells: dict[tuple[str, int], Result], name: str, steps: int) -> str:
    """Return a score as it stands in a table, with its spread where it has one."""
    result = cells.get((name, steps))
    if result is None:
        return ""
    if result.metric == "prdc":
        return " / ".join(f"{value:.3f}" for value in (result.parts or {}).values())
    spread = "" if result.std is None else f" ± {result.std:.2g}"
    text = f"{result.value:.4f}" if result.metric == "bpd" else f"{result.value:.4g}{spread}"
    rivals = [other.value for (_, count), other in cells.items() if count == steps]
    best = max(rivals) if result.metric == "is" else min(rivals)
    return f"**{text}**" if len(rivals) > 1 and result.value == best else text


def _tables_of_rows(results: list[Result]) -> list[str]:
    """Return rate and distortion, as DDPM Table 4, from the last step; a table for each result."""
    tables = []
    for result, words in zip(results, _differing(results), strict=True):
        assert result.dataset is not None
        rows = [
            [str(row["label"]), f"{row['rate_bits_per_dim']:.5f}", f"{row['distortion_rmse']:.5f}"]
            for row in reversed(result.rows or [])
        ]
        how = ", ".join([str(result.variance_type), f"{result.num_inference_steps} steps", *words.values()])
        title = f"Rate and distortion of {data_words(result.dataset)}, {how}:\n\n"
        head = ["reverse steps (T − t + 1)", "rate (bits/dim)", "distortion (RMSE, 0..255)"]
        tables.append(title + table(head, rows))
    return tables
