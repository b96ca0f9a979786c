"""What is written in several files is written alike: version, licence, the tested set."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import ddpm_ext

ROOT = Path(__file__).resolve().parent.parent


def pyproject() -> str:
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def constraints() -> dict[str, str]:
    """Name -> version of every line of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split(";")[0].strip().split("==") for line in lines if line and not line.startswith("#"))


def test_version_agrees_in_every_file_that_states_it() -> None:
    stated = re.search(r'^version = "(.+)"$', pyproject(), re.MULTILINE)
    assert stated is not None
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changes = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert changes is not None
    assert ddpm_ext.__version__ == stated[1] == citation["version"] == changes[1]


def test_licence_agrees_in_every_file_that_states_it() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert 'license = "Apache-2.0"' in pyproject()
    assert citation["license"] == "Apache-2.0"
    assert "Apache License\n" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_every_dependency_has_one_exact_version_in_the_tested_set() -> None:
    block = re.search(r"^dependencies = \[(.*?)^\]", pyproject(), re.MULTILINE | re.DOTALL)
    extra = re.search(r"^test = \[(.*?)\]", pyproject(), re.MULTILINE)
    assert block is not None
    assert extra is not None
    named = re.findall(r'"([A-Za-z0-9_-]+)>=', block[1] + extra[1])
    assert {"torch", "diffusers", "pytest", "ruff"} <= set(named)
    assert {name.replace("_", "-") for name in named} <= set(constraints())
    assert constraints()["torch"] == "2.13.0"
    assert constraints()["diffusers"] == "0.42.1"


def test_torchvision_is_not_asked_for() -> None:
    assert "torchvision" not in pyproject()
    assert "torchvision" not in constraints()


def test_every_target_of_the_readme_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    asked = set(re.findall(r"\bmake ([a-z][a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert {"train", "test", "style", "bench"} <= targets
    assert asked <= targets


def test_every_file_of_the_package_is_packed() -> None:
    packed = re.search(r"^ddpm_ext = \[(.*)\]$", pyproject(), re.MULTILINE)
    assert packed is not None
    patterns = re.findall(r'"(.+?)"', packed[1])
    package = ROOT / "ddpm_ext"
    data = [path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert {"py.typed", "train.parquet", "test.parquet", "SOURCE.md"} <= {path.name for path in data}
    missing = [path.name for path in data if not any(path.relative_to(package).match(glob) for glob in patterns)]
    assert missing == []
