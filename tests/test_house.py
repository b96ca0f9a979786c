"""What is written in several files is written alike: version, licence, the tested set."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from documents import ADDRESS, RAW

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


MODULES = sorted((ROOT / "ddpm_ext").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every `from … import …` of a file, and (module, "") of every `import …`."""
    found: list[tuple[str, str]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found += [("." * node.level + (node.module or ""), alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_says_what_is_public_and_takes_nothing_private(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "a module says what it owns"
    public = [ast.literal_eval(value) for name, value in assignments(tree) if name == "__all__"]
    assert len(public) == 1, "a module has __all__"
    assert [name for name in public[0] if name.startswith("_") and name != "__version__"] == []
    private = [
        name
        for module, name in imports(path)
        if module.startswith((".", "ddpm_ext")) and name.startswith("_") and name != "__version__"
    ]
    assert private == []


def assignments(tree: ast.Module) -> list[tuple[str, ast.expr]]:
    """(name, value) of the assignments at the top of a module."""
    found: list[tuple[str, ast.expr]] = []
    for node in tree.body:
        if isinstance(node, ast.Assign):
            found += [(target.id, node.value) for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            found.append((node.target.id, node.value))
    return found


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_a_test_file_imports_no_test_file(path: Path) -> None:
    assert [module for module, name in imports(path) if re.search(r"(^|\.)test_", f"{module}.{name}")] == []


def arguments(function: ast.FunctionDef) -> list[str]:
    """Names of what a function takes, self left out."""
    every = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [one.arg for one in every if one.arg not in ("self", "cls")]


def public_functions(tree: ast.Module) -> list[tuple[str, ast.FunctionDef]]:
    """Functions that a module exports, and the public methods of its exported classes."""
    (names,) = (ast.literal_eval(value) for name, value in assignments(tree) if name == "__all__")
    found = [(node.name, node) for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    for owner in (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in names):
        methods = [node for node in owner.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
        found += [(f"{owner.name}.{node.name}", node) for node in methods]
    return found


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if path.relative_to(ROOT).parts[1] in ("data", "evaluation", "publishing", "training")],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_arguments_of_public_functions_are_described(path: Path) -> None:
    """Each of three or more; that no Args section leaves one out is ruff's D417."""
    silent = []
    for name, function in public_functions(ast.parse(path.read_text(encoding="utf-8"))):
        if len(arguments(function)) >= 3 and "Args:\n" not in (ast.get_docstring(function) or ""):
            silent.append(name)
    assert silent == []


# Diffusers prescribes what a scheduler is made of and a pipeline called with.
PRESCRIBED = {("schedulers/base.py", "__init__"), ("pipelines/ddpm.py", "__call__")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_functions_are_short_and_take_at_most_eight_arguments(path: Path) -> None:
    """More arguments are a record that has no name yet; sixty lines, docstring left out, hold more than one job."""
    tree, place = ast.parse(path.read_text(encoding="utf-8")), path.relative_to(ROOT / "ddpm_ext").as_posix()
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    many = [f.name for f in functions if len(arguments(f)) > 8 and (place, f.name) not in PRESCRIBED]
    long = [f.name for f in functions if code_lines(f) > 60]
    assert (many, long) == ([], [])


def code_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    first, whole = function.body[0], (function.end_lineno or 0) - function.lineno + 1
    return whole - ((first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(function) is not None else 0)


def test_a_folder_holds_at_most_a_dozen_files() -> None:
    folders = Counter(path.parent.relative_to(ROOT).as_posix() for path in MODULES)
    assert {folder: files for folder, files in folders.items() if files > 12} == {}


def test_the_address_of_the_project_is_that_of_pyproject_wherever_it_stands() -> None:
    """README and cards, read elsewhere, repeat it whole: where the project moves to, they are named here."""
    texts = [ROOT / "pyproject.toml", *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("model_cards/**/*.md")]
    texts += [*(ROOT / "ddpm_ext").rglob("*.md"), *MODULES]
    own = (ADDRESS, RAW.removesuffix("/main/"))
    pattern = r"https://[^/\s]+/[\w.-]*ddpm[-_]ext[\w.-]*/[\w.-]+|https://[^/\s]+/[\w.-]+/ddpm[-_]ext\b"
    found = {path: re.findall(pattern, path.read_text(encoding="utf-8")) for path in texts}
    assert len(found[ROOT / "README.md"]) > 10
    assert {path.name: links for path, links in found.items() if any(link not in own for link in links)} == {}
