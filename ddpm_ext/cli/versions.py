"""The versions of other packages that the tests run with: the oldest and the newest."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

__all__ = ["TESTED", "describe_versions"]

# constraints-lowest.txt and constraints.txt say the same, and a test compares them.
TESTED: dict[str, tuple[str, str]] = {
    "python": ("3.10", "3.14"),
    "torch": ("2.6.0", "2.13.0"),
    "diffusers": ("0.37.0", "0.42.1"),
    "transformers": ("4.56.0", "5.23.0"),
    "accelerate": ("1.10.0", "1.15.0"),
    "datasets": ("4.0.0", "5.2.0"),
    "safetensors": ("0.5.0", "0.8.0"),
    "huggingface_hub": ("0.34.0", "2.4.0"),
    "numpy": ("1.26.0", "2.4.6"),
    "pillow": ("11.0.0", "13.0.0"),
    "pyarrow": ("17.0.0", "26.0.1"),
}


def describe_versions(installed: dict[str, str] | None = None) -> list[str]:
    """Return a line for each package: its version, and whether that lies outside the tested range.

    Args:
        installed: Versions by package; None looks them up.
    """
    found = _installed() if installed is None else installed
    lines = []
    for name, (oldest, newest) in TESTED.items():
        if name not in found:
            lines.append(f"{name}: not installed (tested {oldest} to {newest})")
            continue
        depth = min(len(oldest.split(".")), len(newest.split(".")))
        low, here, high = (_numbers(text)[:depth] for text in (oldest, found[name], newest))
        verdict = "" if low <= here <= high else f": OLDER than tested, {oldest}" if here < low else ""
        verdict = verdict or ("" if here <= high else f": newer than tested, {newest}")
        lines.append(f"{name}: {found[name]}{verdict}")
    return lines


def _installed() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in TESTED:
        try:
            found.setdefault(name, version(name) if name != "python" else "")
        except PackageNotFoundError:
            continue
    return found


def _numbers(text: str) -> list[int]:
    """Return the numbers of a version, without what follows them: 2.13.0+cpu is 2, 13, 0."""
    numbers = []
    for part in text.split("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit()) if part[:1].isdigit() else ""
        if not digits:
            break
        numbers.append(int(digits))
    return numbers
