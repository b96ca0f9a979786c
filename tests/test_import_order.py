"""The order of the house: a file imports only files above it, scripts import the package and never each other."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The road of a picture, top to bottom. `__init__` stands last; its `__version__` alone may be read by everyone.
MATHEMATICS = ["images", "schedules", "process", "reverse", "likelihood", "losses", "optimal", "denoise_diffusion"]
DIFFUSERS_SHAPE = [
    "unet",
    "step_input",
    "scheduler_options",
    "chain",
    "scheduler",
    "patience",
    "repository",
    "hub_client",
    "hub",
    "pull",
    "pipeline",
    "bound_input",
    "bound",
]
WORK = [
    "config",
    "presets",
    "arguments",
    "pictures",
    "sources",
    "decoded",
    "data",
    "stream",
    "ema",
    "run_dir",
    "signals",
    "checkpoint",
    "launch",
    "randomness",
    "timesteps",
    "sample",
    "features",
    "metrics",
    "shards",
    "reference",
    "measure",
    "plots",
    "tables",
    "figures",
    "evaluate_options",
    "evaluate",
    "small_evaluation",
    "step_errors",
    "calibrate",
    "other_codes",
    "convert",
    "card",
    "publish",
    "demo",
    "assemble",
    "progress",
    "resume",
    "updates",
    "dry_run",
    "export",
    "watch",
    "train",
    "benchmark",
]
ORDER = [*MATHEMATICS, *DIFFUSERS_SHAPE, *WORK, "__init__"]
# Mathematics opens no file, starts no process and draws no hidden number.
IMPURE = {
    "os",
    "io",
    "pathlib",
    "shutil",
    "subprocess",
    "tempfile",
    "random",
    "secrets",
    "threading",
    "multiprocessing",
}


def imported(source: str) -> set[tuple[str, str]]:
    """Every import of a file, also inside functions: (module, name), name "" for a plain `import module`."""
    found: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                module = f"ddpm_ext.{module}" if module else "ddpm_ext"
            found |= {(module, alias.name) for alias in node.names}
    return found


def files_of_package(source: str) -> set[str]:
    """The files of ddpm_ext that a source imports, by their names in ORDER."""
    names = set()
    for module, name in imported(source):
        if module == "ddpm_ext":
            if name != "__version__":
                names.add(name if name in ORDER else "__init__")
        elif module.startswith("ddpm_ext."):
            names.add(module.split(".")[1])
    return names


def broken_order(name: str, source: str) -> list[str]:
    """What a file of the package imports from itself or from below, in sentences."""
    if name not in ORDER:
        return [
            f"ddpm_ext/{name}.py is not in the order: put it into tests/test_import_order.py and the README's list."
        ]
    above = set(ORDER[: ORDER.index(name)])
    return [
        f"ddpm_ext/{name}.py imports ddpm_ext/{other}.py, which does not stand above it."
        for other in sorted(files_of_package(source) - above)
    ]


def broken_mathematics(name: str, source: str) -> list[str]:
    """What a mathematics file imports beside torch, numpy and the pure part of the standard library, in sentences."""
    allowed = (set(sys.stdlib_module_names) - IMPURE) | {"torch", "numpy", "ddpm_ext"}
    roots = {module.split(".")[0] for module, _ in imported(source)}
    return [f"ddpm_ext/{name}.py is mathematics and imports {root}." for root in sorted(roots - allowed)]


def broken_script(name: str, source: str, scripts: set[str]) -> list[str]:
    """What is wrong with a script, in sentences."""
    modules = {part for module, _ in imported(source) for part in (module, module.split(".")[0])}
    wrong = [f"scripts/{name}.py imports the script {other}." for other in sorted(modules & (scripts | {"scripts"}))]
    if (lines := len(source.splitlines())) > 60:
        wrong.append(f"scripts/{name}.py has {lines} lines, at most 60 are allowed.")
    return wrong


def sources(folder: str) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / folder).glob("*.py"))}


@pytest.mark.parametrize("name", sources("ddpm_ext"))
def test_a_file_imports_only_files_above_it(name: str) -> None:
    assert broken_order(name, sources("ddpm_ext")[name]) == []


@pytest.mark.parametrize("name", [name for name in MATHEMATICS if name in sources("ddpm_ext")])
def test_mathematics_imports_torch_and_numpy_alone(name: str) -> None:
    assert broken_mathematics(name, sources("ddpm_ext")[name]) == []


@pytest.mark.parametrize("name", sources("scripts"))
def test_a_script_is_thin_and_imports_no_other_script(name: str) -> None:
    scripts = sources("scripts")
    # A script may have the name of a file of the package ("train"): `from ddpm_ext.train import` is then the package.
    assert broken_script(name, scripts[name], set(scripts)) == []


def test_the_package_has_no_folder_of_code() -> None:
    folders = [path.parent.name for path in (ROOT / "ddpm_ext").glob("*/*.py")]
    assert folders == [], f"ddpm_ext is flat: found code in {folders}."


@pytest.mark.parametrize(
    "source",
    [
        "import ddpm_ext.train",
        "from ddpm_ext.train import train",
        "from ddpm_ext import train",
        "from .train import train",
        "from . import train",
        "from ddpm_ext import DDPMExtPipeline",
        "import ddpm_ext.process",
        "def f():\n    from ddpm_ext.losses import training_loss",
    ],
)
def test_an_import_from_below_is_seen(source: str) -> None:
    assert len(broken_order("process", source)) == 1


def test_what_is_right_passes() -> None:
    source = "import torch\nfrom ddpm_ext import __version__\nfrom .images import to_x_0\nimport ddpm_ext.schedules"
    assert broken_order("process", source) == []
    assert broken_mathematics("process", source) == []
    assert broken_script("train", "from ddpm_ext.train import train", {"train", "sample"}) == []


def test_an_unlisted_file_impure_mathematics_and_a_wrong_script_are_seen() -> None:
    assert "not in the order" in broken_order("helpers", "")[0]
    assert broken_mathematics("process", "import os") == ["ddpm_ext/process.py is mathematics and imports os."]
    assert broken_mathematics("process", "from diffusers import UNet2DModel")
    assert "imports the script sample" in broken_script("train", "from sample import main", {"train", "sample"})[0]
    assert broken_script("train", "import scripts.sample", {"train", "sample"})
    assert "61 lines" in broken_script("train", "\n" * 61, {"train"})[0]
