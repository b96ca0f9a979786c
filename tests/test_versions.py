"""The versions that are said to be tested are those of the constraints, and the floors that pip is told."""

from __future__ import annotations

import re
from pathlib import Path

from ddpm_ext.cli.versions import TESTED, describe_versions

ROOT = Path(__file__).resolve().parent.parent


def pinned(name: str) -> dict[str, str]:
    """The versions of a file; of several of a package the first, which is the oldest."""
    lines = (ROOT / name).read_text("utf-8").splitlines()[::-1]
    pairs = (re.match(r"([\w.-]+)==([\w.]+)", line) for line in lines)
    return {match[1].replace("-", "_").lower(): match[2] for match in pairs if match}


def test_the_tested_range_is_that_of_the_constraints() -> None:
    lowest, newest = pinned("constraints-lowest.txt"), pinned("constraints.txt")
    for name, versions in TESTED.items():
        if name != "python":
            assert versions == (lowest[name], newest[name]), name


def test_the_oldest_versions_are_the_floors_of_the_package() -> None:
    text, lowest = (ROOT / "pyproject.toml").read_text("utf-8"), pinned("constraints-lowest.txt")
    for name, floor in re.findall(r'"([\w-]+)>=([\d.]+)"', text):
        if name.replace("-", "_").lower() in lowest:
            oldest = lowest[name.replace("-", "_").lower()]
            assert oldest == floor or re.fullmatch(re.escape(floor) + r"(\.0)*", oldest), (name, floor, oldest)
    assert f'requires-python = ">={TESTED["python"][0]}"' in text


def test_what_lies_outside_is_named() -> None:
    here = {name: newest for name, (_, newest) in TESTED.items()} | {"torch": "2.5.1+cu124", "numpy": "3.0.0"}
    del here["datasets"]
    said = dict(line.split(": ", 1) for line in describe_versions(here))
    assert said["torch"] == "2.5.1+cu124: OLDER than tested, 2.6.0"
    assert said["numpy"] == "3.0.0: newer than tested, 2.4.6"
    assert said["datasets"] == "not installed (tested 4.0.0 to 5.2.0)"
    assert said["accelerate"] == "1.15.0"
    assert dict(line.split(": ", 1) for line in describe_versions(here | {"python": "3.12.1"}))["python"] == "3.12.1"
