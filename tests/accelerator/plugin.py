"""`PYTHONPATH=tests python -m pytest -p accelerator.plugin`: tests run with the simulated accelerator as their device.

What cannot is deselected by name: deselected.txt holds the name of a test and, behind a #, the reason.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from . import install

install()


@pytest.fixture(autouse=True)
def a_new_accelerator() -> None:
    """Let no test inherit Accelerate's device from the one before, which may have asked for the CPU."""
    from ddpm_ext.distributed import forget_accelerator

    forget_accelerator()


def deselected() -> dict[str, str]:
    """Name of a test without its parameters -> why it cannot run on the device."""
    lines = Path(__file__).with_name("deselected.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("#", 1) for line in lines if line.strip() and not line.startswith("#"))
    return {name.strip(): reason.strip() for name, reason in pairs}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the list names; a name of these files that is no test, or has no reason, is an error."""
    names, found = deselected(), {item.nodeid.split("/")[-1].split("[")[0] for item in items}
    files = {name.split("::")[0] for name in found}
    wrong = [name for name, why in names.items() if not why or (name.split("::")[0] in files and name not in found)]
    if wrong and not config.option.keyword and not any("::" in word for word in config.args):
        raise pytest.UsageError(f"tests/accelerator/deselected.txt: no such test, or no reason: {', '.join(wrong)}.")
    out = [item for item in items if item.nodeid.split("/")[-1].split("[")[0] in names]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]
