"""The layers of the package: a folder imports only folders before it, files import each other without a circle."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import diffusers
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ddpm_ext"

# Lowest first. What stands between two commas may import everything before it; neighbours in one entry, each other.
LAYERS: list[set[str]] = [
    {"errors", "threads", "options"},
    {"run_dir"},
    {"distributed", "signals"},
    {"diffusion"},
    {"hub"},
    {"models", "schedulers", "pipelines"},
    {"data"},
    {"evaluation"},
    {"publishing"},
    {"training"},
    {"conversion", "demo", "cli"},
    {"__init__", "__main__"},
]
# Diffusion draws no hidden number and touches no file: torch, numpy and these of the standard library.
PURE = {
    "__future__",
    "collections",
    "dataclasses",
    "enum",
    "functools",
    "itertools",
    "math",
    "operator",
    "typing",
    "warnings",
}


def _modules() -> dict[str, Path]:
    """Dotted name below ddpm_ext -> file; the package of a folder has the folder's name."""
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        if parts[-1] == "__init__" and len(parts) > 1:
            parts.pop()
        names[".".join(parts)] = path
    return names


MODULES = _modules()


def imported(module: str, source: str, *, at_import: bool = False) -> set[str]:
    """The modules of ddpm_ext that a source imports, by dotted name; `at_import`: outside functions only."""
    package = MODULES[module].name == "__init__.py" and module != "__init__"
    here = [] if module == "__init__" else module.split(".") if package else module.split(".")[:-1]
    found: set[str] = set()
    for node in _imports(ast.parse(source), at_import):
        if isinstance(node, ast.Import):
            targets = [(alias.name, None) for alias in node.names]
        else:
            base = here[: len(here) - node.level + 1] if node.level else []
            prefix = ".".join((["ddpm_ext", *base] if node.level else []) + ([node.module] if node.module else []))
            targets = [(prefix, alias.name) for alias in node.names]
        for target, name in targets:
            if target.split(".")[0] != "ddpm_ext":
                continue
            inner = target.removeprefix("ddpm_ext").lstrip(".")
            whole = f"{inner}.{name}".lstrip(".") if name else inner
            if whole not in ("__version__", "DIGITS"):  # constants that stand in ddpm_ext/__init__.py itself
                found.add(whole if whole in MODULES else inner or "__init__")
    return found


def _imports(tree: ast.AST, at_import: bool) -> list[ast.Import | ast.ImportFrom]:
    found: list[ast.Import | ast.ImportFrom] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(node)
        elif not (at_import and (isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or _for_types(node))):
            found += _imports(node, at_import)
    return found


def _for_types(node: ast.AST) -> bool:
    """Whether a statement is `if TYPE_CHECKING:`, which is never run."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def layer(module: str) -> int:
    """The layer of a module; an unknown folder has none."""
    folder = module.split(".")[0]
    return next(i for i, names in enumerate(LAYERS) if folder in names)


def upwards(module: str, source: str) -> list[str]:
    """The imports of a module from a layer above its own, in sentences."""
    return [
        f"{module} imports {other}, which stands above it."
        for other in sorted(imported(module, source))
        if layer(other) > layer(module)
    ]


def impure(source: str) -> set[str]:
    """The libraries that a source imports and mathematics may not."""
    roots: set[str] = set()
    for node in _imports(ast.parse(source), False):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif not node.level:
            roots.add((node.module or "").split(".")[0])
    return roots - PURE - {"torch", "numpy", "ddpm_ext"}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The circles of a graph, each as the list of its modules."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> None:
        if node in path:
            found.append(path[path.index(node) :])
        elif node not in done:
            for other in sorted(graph.get(node, ())):
                walk(other, [*path, node])
            done.add(node)

    for node in sorted(graph):
        walk(node, [])
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_nothing_from_a_layer_above(module: str) -> None:
    assert upwards(module, MODULES[module].read_text(encoding="utf-8")) == []


def test_files_import_each_other_without_a_circle() -> None:
    graph = {
        module: imported(module, path.read_text(encoding="utf-8"), at_import=True) - {module}
        for module, path in MODULES.items()
        if path.name != "__init__.py"
    }
    assert circles(graph) == []


LONGEST_CHAIN = 10  # modules that are imported one by the other, from the highest to the lowest


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """The longest way down a graph without circles, by its modules."""
    ways: dict[str, list[str]] = {}

    def way(node: str) -> list[str]:
        if node not in ways:
            ways[node] = [node, *max((way(other) for other in graph.get(node, ())), key=len, default=[])]
        return ways[node]

    return max((way(node) for node in graph), key=len)


def test_no_chain_of_imports_is_longer_than_ten() -> None:
    """Who opens a file knows after few others what it rests on. What functions import when called does not count."""
    graph = {
        module: imported(module, path.read_text(encoding="utf-8"), at_import=True) - {module}
        for module, path in MODULES.items()
    }
    chain = longest_chain(graph)
    assert len(chain) <= LONGEST_CHAIN, " > ".join(chain)
    assert longest_chain({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == ["a", "b", "c"]


@pytest.mark.parametrize("module", sorted(m for m in MODULES if m.startswith("diffusion")))
def test_diffusion_imports_torch_and_numpy_only(module: str) -> None:
    assert impure(MODULES[module].read_text(encoding="utf-8")) == set()


def test_no_folder_has_a_name_of_a_pipeline_of_diffusers() -> None:
    """Diffusers would look for our classes among its own: it decides by the folder of a class."""
    folders = {path.parent.name for path in PACKAGE.rglob("*.py")}
    assert {name for name in folders if hasattr(diffusers.pipelines, name)} == set()
    assert hasattr(diffusers.pipelines, "ddpm")  # the check can fail


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_a_script_imports_no_other_script(path: Path) -> None:
    scripts = {other.stem for other in (ROOT / "scripts").glob("*.py")} - set(sys.stdlib_module_names)
    roots = set()
    for node in _imports(ast.parse(path.read_text(encoding="utf-8")), False):
        roots |= {a.name.split(".")[0] for a in node.names} if isinstance(node, ast.Import) else {node.module}
    assert roots & (scripts | {"scripts"}) == set()


@pytest.mark.parametrize(
    "source",
    [
        "import ddpm_ext.training.run",
        "from ddpm_ext.training.run import train",
        "from ..training.run import train",
        "from ..training import run",
        "from ddpm_ext import DDPMExtPipeline",
        "def f():\n    from ..evaluation.features.metrics import frechet_distance",
    ],
)
def test_an_import_from_above_is_seen(source: str) -> None:
    assert len(upwards("diffusion.process", source)) == 1


def test_what_is_right_passes_and_circles_and_impurity_are_seen() -> None:
    source = "import torch\nfrom ddpm_ext import __version__\nfrom .images import to_x_0\nimport ddpm_ext.run_dir"
    assert upwards("diffusion.process", source) == []
    assert impure(source) == set()
    assert impure("import os\nfrom diffusers import UNet2DModel") == {"os", "diffusers"}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}}) == []
