"""Figures of eval.json -> markdown tables."""

from __future__ import annotations

from typing import Any, NamedTuple

NAMES = {
    "bpd": "bits/dim",
    "fid": "Fréchet distance",
    "kid": "KID",
    "cmmd": "CMMD",
    "is": "Inception score",
    "prdc": "precision / recall / density / coverage",
}


RESULTS = ("value", "std", "standard_error", "parts", "rows", "note", "certificate")  # the rest identifies a figure
IN_EVERY_TABLE = ("metric", "weights", "network", "sampler", "variance_type", "num_inference_steps")
IN_TITLES = ("num_samples", "hand_off", "name", "split", "num_images")


class Group(NamedTuple):
    """Scores that share a table and a plot."""

    metric: str
    extractor: str
    num_samples: int
    hand_off: str
    reference: str | None  # in words; None where the score has none
    figures: list[dict[str, Any]]


def markdown(figures: list[dict[str, Any]]) -> str:
    """All tables of the weights measured last: bits/dim with its parts, scores against steps, rate and distortion."""
    kept = of_newest_weights(figures)
    left_out = len(figures) - len(kept)
    tables = [
        f"Left out: {left_out} figures of other weights; they are in eval.json." if left_out else "",
        table_of_bits([figure for figure in kept if figure["metric"] == "bpd"]),
        *map(table_of_scores, groups_of_scores(kept)),
        *tables_of_rows([figure for figure in kept if figure["metric"] == "rate_distortion"]),
    ]
    return "\n\n".join(table for table in tables if table) + "\n"


def of_newest_weights(figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures of the network that the last of them is of; one that names none is taken for its."""
    names = ("weights", "network")
    return [f for f in figures if all(f.get(name, figures[-1].get(name)) == figures[-1].get(name) for name in names)]


def groups_of_scores(figures: list[dict[str, Any]]) -> list[Group]:
    """Scores of generated images by what a table's title says."""
    groups: dict[tuple[str, str, int, str, str | None], list[dict[str, Any]]] = {}
    for figure in figures:
        if "num_samples" in figure:
            reference = None if figure["metric"] == "is" else data_words(figure["reference"])
            title = (
                figure["metric"],
                figure["extractor"]["name"],
                figure["num_samples"],
                figure["hand_off"],
                reference,
            )
            groups.setdefault(title, []).append(figure)
    return [Group(*title, figures=members) for title, members in groups.items()]


def conditions(figure: dict[str, Any]) -> dict[str, str]:
    """What a figure was measured under, in words, beside what every table and title shows; nothing for None."""
    found = {"steps": chosen_by(figure)}
    for name, value in figure.items():
        if name in (*RESULTS, *IN_EVERY_TABLE, *IN_TITLES, "timestep_spacing", "trajectory"):
            continue
        if not isinstance(value, dict):
            found[name] = condition_words(name, value)
        elif not (name == "reference" and figure["metric"] == "is"):
            inner = {f"{name} {key}": some for key, some in value.items() if key not in IN_TITLES}
            found |= {key: condition_words(key, some) for key, some in inner.items()}
    return found


def chosen_by(figure: dict[str, Any]) -> str:
    """How the steps of a figure's chain were chosen."""
    if figure.get("trajectory") is not None:
        return f"{figure['trajectory']} trajectory"
    spacing = figure.get("timestep_spacing")
    return "" if spacing is None else f"{spacing} spacing"


def condition_words(name: str, value: Any) -> str:
    """One condition as it stands in a row."""
    if value is None:
        return ""
    if name == "averaged":
        return "averaged" if value else "not averaged"
    return f"η = {value:g}" if name == "eta" else f"{name.replace('_', ' ')} {value}"


def differing(figures: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The conditions of each figure in which it differs from another of them."""
    found = [conditions(figure) for figure in figures]
    ancestral = [figure.get("sampler", "ddpm") == "ddpm" for figure in figures]  # only these have an η to choose
    names = dict.fromkeys(name for words in found for name in words)

    def differs(name: str) -> bool:
        return (
            len({w.get(name, "") for w, has_eta in zip(found, ancestral, strict=True) if name != "eta" or has_eta}) > 1
        )

    names = [name for name in names if differs(name)]
    return [{name: words[name] for name in names if words.get(name)} for words in found]


def row_words(figures: list[dict[str, Any]]) -> list[str]:
    """Sampler and variance of each figure, and every condition in which some of them differ."""
    return [
        ", ".join([sampler_words(figure), *words.values()])
        for figure, words in zip(figures, differing(figures), strict=True)
    ]


def table(head: list[str], rows: list[list[str]]) -> str:
    """One markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table_of_bits(figures: list[dict[str, Any]]) -> str:
    """Bits/dim: prior + rate + decoder."""
    rows = []
    for figure, words in zip(figures, differing(figures), strict=True):
        parts, error = figure["parts"], figure.get("standard_error")
        rows.append(
            [
                data_words(figure["dataset"]),
                ", ".join([figure["variance_type"], *words.values()]),
                str(figure["num_inference_steps"]),
                *(f"{parts[name]:.4f}" for name in ("prior", "rate", "decoder")),
                f"{figure['value']:.4f}" + ("" if error is None else f" ± {error:.4f}"),
            ]
        )
    head = ["bits/dim of", "variance", "steps", "prior L_T", "rate Σ L_{t-1}", "decoder L_0", "total"]
    return table(head, rows) if rows else ""


def table_of_scores(group: Group) -> str:
    """One metric, extractor, reference and number of samples: samplers down, steps across."""
    names = row_words(group.figures)
    steps = sorted({figure["num_inference_steps"] for figure in group.figures}, reverse=True)
    cells = {(name, f["num_inference_steps"]): score_words(f) for name, f in zip(names, group.figures, strict=True)}
    rows = [[name, *(cells.get((name, count), "") for count in steps)] for name in dict.fromkeys(names)]
    to = "" if group.reference is None else f" to {group.reference}"
    how = f"{group.extractor}, {group.num_samples:,} samples, hand-off {group.hand_off}"
    return f"{NAMES[group.metric]}{to} ({how}):\n\n" + table(["sampler", *(f"{n} steps" for n in steps)], rows)


def tables_of_rows(figures: list[dict[str, Any]]) -> list[str]:
    """Rate and distortion, as DDPM Table 4, from the last step; a table for each figure."""
    tables = []
    for figure, words in zip(figures, differing(figures), strict=True):
        rows = [
            [str(row["label"]), f"{row['rate_bits_per_dim']:.5f}", f"{row['distortion_rmse']:.5f}"]
            for row in reversed(figure["rows"])
        ]
        how = ", ".join([figure["variance_type"], f"{figure['num_inference_steps']} steps", *words.values()])
        title = f"Rate and distortion of {data_words(figure['dataset'])}, {how}:\n\n"
        head = ["reverse steps (T − t + 1)", "rate (bits/dim)", "distortion (RMSE, 0..255)"]
        tables.append(title + table(head, rows))
    return tables


def data_words(dataset: dict[str, Any]) -> str:
    """Images in words: how many, of which set and split."""
    return f"{dataset['num_images']:,} images of {dataset['name']} {dataset['split']}"


def sampler_words(figure: dict[str, Any]) -> str:
    """A sampler in words, with its variance where it has one to choose."""
    return figure["sampler"] if figure["variance_type"] is None else f"{figure['sampler']}, {figure['variance_type']}"


def score_words(figure: dict[str, Any]) -> str:
    """A score as it stands in a table, with its spread where it has one."""
    if figure["metric"] == "prdc":
        return " / ".join(f"{value:.3f}" for value in figure["parts"].values())
    spread = f" ± {figure['std']:.2g}" if "std" in figure else ""
    return f"{figure['value']:.4g}{spread}"
