"""The page of a GPU: tables of what `benchmarks.gpu` has noted, as markdown."""

from __future__ import annotations

import os
import re
from typing import Any

import torch

from ddpm_ext.run_dir import environment

Row = dict[str, Any]


def markdown(card: str, command: str, rows: dict[str, list[Row]]) -> str:
    """Return the page: what was measured, on what, by which command; failures by name.

    Args:
        card: The card's name.
        command: Words on the command that measured.
        rows: What the parts noted, by part.
    """
    made_by = environment()
    versions = ", ".join(f"{name} {number}" for name, number in made_by["versions"].items())
    cuda = getattr(torch.version, "cuda", None)
    lines = [
        f"# {card}",
        "",
        f"{command}. See [docs/gpu.md](../gpu.md) for what each table says.",
        "",
        f"- Versions: {versions}, CUDA {cuda or 'none'}",
        f"- Machine: {made_by['hardware']['processor']}, {os.cpu_count()} cores",
        f"- Commit: {made_by['commit'] or 'unknown'}",
    ]
    for part, render in (
        ("tests", tests_lines),
        ("training", training_lines),
        ("sampling", sampling_lines),
        ("cifar10", cifar10_lines),
    ):
        if part in rows:
            lines += ["", *render(rows[part])]
    errors = [row for part in rows.values() for row in part if "error" in row]
    if errors:
        lines += ["", "## What did not run", ""]
        for row in errors:
            words = [str(row[key]) for key in ("name", "code", "precision", "batch") if row.get(key) is not None]
            words += ["compiled"] if row.get("compile") else []
            lines.append(f"- {row['part']}, {', '.join(words)}: {row['error']}")
    return "\n".join(lines) + "\n"


def number(value: Any, form: str = ",.0f") -> str:
    """A number, or nothing where none was measured."""
    return "" if value is None else format(value, form)


def tests_lines(rows: list[Row]) -> list[str]:
    """The tests' closing line and what failed."""
    lines = ["## Tests marked gpu", ""]
    for row in rows:
        if "result" in row:
            lines += [f"{row['result']}", *(f"- {name}" for name in row["failed"])]
    return lines


def training_lines(rows: list[Row]) -> list[str]:
    """The table of training."""
    measured = [row for row in rows if "images_per_second" in row]
    lines = [
        "## Training",
        "",
        "The paper's CIFAR-10 network (35.7M), channels_last, fused AdamW, one process, images in memory. Diffusers is "
        "the loop of its train_unconditional.py with its images on the device; compiled, both are torch.compile "
        "of the whole network, ours as CUDA graphs. Busy is the card's own work of one update, launches those that the "
        "host makes for it. MFU is the share of the card's dense peak in the row's precision; the forecast is that of "
        "`--forecast` at the utilisation it states.",
        "",
        "| | precision | compiled | batch | images/s | ms | busy ms | launches | MFU | peak GiB | forecast GiB "
        "| forecast images/s | first |",
        f"| --- | --- | --- |{' ---: |' * 10}",
    ]
    for row in measured:
        cells = (
            row["code"],
            "tf32" if row["precision"] == "no" else row["precision"],
            "yes" if row["compile"] else "no",
            str(row["batch"]),
            number(row["images_per_second"]),
            number(row["batch"] / row["images_per_second"] * 1e3, ".1f"),
            number(row.get("busy_ms"), ".1f"),
            number(row.get("launches")),
            number(row.get("mfu"), ".1%"),
            number(row.get("peak_gib"), ".2f"),
            number(row.get("forecast_gib"), ".2f"),
            number(row.get("forecast_images_per_second")),
            f"{row['first_seconds']:.1f} s",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def sampling_lines(rows: list[Row]) -> list[str]:
    """The table of sampling."""
    lines = [
        "## Sampling",
        "",
        "The same network, random weights. The difference is the largest of any pixel from the plain row, in grey "
        "levels of 255.",
        "",
        "| | dtype | batch | steps | images/s | ms a step | peak GiB | first call | difference |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if "images_per_second" in row:
            cells = (
                row["name"],
                row["dtype"],
                str(row["batch"]),
                str(row["steps"]),
                number(row["images_per_second"], ",.1f"),
                number(row["step_ms"], ".2f"),
                number(row.get("peak_gib"), ".2f"),
                f"{row['first_seconds']:.1f} s",
                number(row.get("largest_difference"), ".2f"),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def cifar10_lines(rows: list[Row]) -> list[str]:
    """What the run did, and where its card lies."""
    lines = ["## CIFAR-10", ""]
    for row in rows:
        if "skipped" in row:
            lines.append(f"Not run: {row['skipped']}.")
        if "update" in row:
            lines.append(
                f"{row['update']:,} updates, {row['status']}; last logged loss {number(row['loss'], '.4f')}, at best "
                f"{number(row['images_per_second'])} images/s; {row['took_seconds']:.0f} s with start, compilation, "
                "samples and evaluation."
            )
        if row.get("card_written"):
            lines.append(f"\n[The card]({row['card']})")
        if row.get("evaluation"):
            lines += ["", re.sub(r"^#", "###", row["evaluation"].strip(), flags=re.M)]
    return lines
