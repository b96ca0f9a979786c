"""Figures of eval.json -> markdown tables."""

from __future__ import annotations

from typing import Any

NAMES = {
    "bpd": "bits/dim",
    "fid": "Fréchet distance",
    "kid": "KID",
    "cmmd": "CMMD",
    "is": "Inception score",
    "prdc": "precision / recall / density / coverage",
}


def markdown(figures: list[dict[str, Any]]) -> str:
    """All tables: bits/dim with its parts, scores against steps, rate and distortion."""
    tables = [
        table_of_bits([figure for figure in figures if figure["metric"] == "bpd"]),
        *tables_of_scores([figure for figure in figures if "num_samples" in figure]),
        *(table_of_rows(figure) for figure in figures if figure["metric"] == "rate_distortion"),
    ]
    return "\n\n".join(table for table in tables if table) + "\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    """One markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table_of_bits(figures: list[dict[str, Any]]) -> str:
    """Bits/dim: prior + rate + decoder."""
    rows = []
    for figure in figures:
        parts, error = figure["parts"], figure.get("standard_error")
        rows.append(
            [
                data_words(figure["dataset"]),
                figure["variance_type"],
                str(figure["num_inference_steps"]),
                *(f"{parts[name]:.4f}" for name in ("prior", "rate", "decoder")),
                f"{figure['value']:.4f}" + ("" if error is None else f" ± {error:.4f}"),
            ]
        )
    head = ["bits/dim of", "variance", "steps", "prior L_T", "rate Σ L_{t-1}", "decoder L_0", "total"]
    return table(head, rows) if rows else ""


def tables_of_scores(figures: list[dict[str, Any]]) -> list[str]:
    """One table per metric, extractor, reference and number of samples: samplers down, steps across."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for figure in figures:
        words = (
            NAMES[figure["metric"]],
            f"{figure['extractor']['name']}, {figure['num_samples']:,} samples, hand-off {figure['hand_off']}",
            data_words(figure["reference"]),
        )
        groups.setdefault(words, []).append(figure)
    found = []
    for (name, how, reference), members in groups.items():
        steps = sorted({figure["num_inference_steps"] for figure in members}, reverse=True)
        cells = {(sampler_words(figure), figure["num_inference_steps"]): score_words(figure) for figure in members}
        samplers = list(dict.fromkeys(sampler_words(figure) for figure in members))
        rows = [[sampler, *(cells.get((sampler, count), "") for count in steps)] for sampler in samplers]
        found.append(f"{name} to {reference} ({how}):\n\n" + table(["sampler", *(f"{n} steps" for n in steps)], rows))
    return found


def table_of_rows(figure: dict[str, Any]) -> str:
    """Rate and distortion, as DDPM Table 4, from the last step."""
    rows = [
        [str(row["label"]), f"{row['rate_bits_per_dim']:.5f}", f"{row['distortion_rmse']:.5f}"]
        for row in reversed(figure["rows"])
    ]
    title = f"Rate and distortion of {data_words(figure['dataset'])}, {figure['variance_type']}:\n\n"
    return title + table(["reverse steps (T − t + 1)", "rate (bits/dim)", "distortion (RMSE, 0..255)"], rows)


def data_words(dataset: dict[str, Any]) -> str:
    return f"{dataset['num_images']:,} images of {dataset['name']} {dataset['split']}"


def sampler_words(figure: dict[str, Any]) -> str:
    return figure["sampler"] if figure["variance_type"] is None else f"{figure['sampler']}, {figure['variance_type']}"


def score_words(figure: dict[str, Any]) -> str:
    """A score as it stands in a table, with its spread where it has one."""
    if figure["metric"] == "prdc":
        return " / ".join(f"{value:.3f}" for value in figure["parts"].values())
    spread = f" ± {figure['std']:.2g}" if "std" in figure else ""
    return f"{figure['value']:.4g}{spread}"
