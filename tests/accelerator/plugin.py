"""`PYTHONPATH=tests python -m pytest -p accelerator.plugin`: tests run with the simulated accelerator as their device.

What cannot is deselected by name: deselected.txt holds the end of a test's id and, behind a #, the reason.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from . import install

install()


def deselected() -> dict[str, str]:
    """Name of a test without its parameters -> why it cannot run on the device."""
    lines = Path(__file__).with_name("deselected.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("#", 1) for line in lines if line.strip() and not line.startswith("#"))
    return {name.strip(): reason.strip() for name, reason in pairs}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the list names; every line must name a test of the files that were collected, or of none."""
    names = deselected()
    out = [item for item in items if item.nodeid.split("/")[-1].split("[")[0] in names]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]
