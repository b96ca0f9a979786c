"""What is published is whole: the sdist is the repository, the wheel trains, samples and evaluates by itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


def run(*words: str, cwd: Path, **environment: str) -> str:
    """A command's output; it must succeed. It sees no checkout: PYTHONPATH is empty."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    done = subprocess.run(words, cwd=cwd, env=env | environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def tracked() -> list[str]:
    """Names of the repository's files; of an sdist, of all its files but what building it added."""
    if (ROOT / ".git").exists():
        return run("git", "ls-files", cwd=ROOT).splitlines()
    names = (path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file())
    added = ("PKG-INFO", "setup.cfg", ".egg-info", "__pycache__", ".pytest_cache", ".ruff_cache")
    return [name for name in names if not any(word in name for word in added)]


def build(source: Path, kind: str, target: Path) -> Path:
    """An sdist or a wheel, built by the backend that pyproject.toml names."""
    target.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    run(sys.executable, "-c", code, cwd=source)
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist of the tracked files as they are now."""
    folder = tmp_path_factory.mktemp("package")
    for name in tracked():
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False) if not (ROOT / name).is_dir() else os.symlink(
            os.readlink(ROOT / name), target
        )
    with tarfile.open(build(folder / "source", "sdist", folder / "sdist")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(sdist, "wheel", tmp_path_factory.mktemp("wheel") / "built")


def test_the_sdist_is_the_repository(sdist: Path) -> None:
    links = {name for name in tracked() if (ROOT / name).is_symlink()}  # folders, whose files are there twice
    missing = [name for name in tracked() if name not in links and not (sdist / name).is_file()]
    assert missing == []
    assert {path.name for path in (sdist / "accelerate_configs").iterdir()} >= {"cpu.yaml", "multi_gpu.yaml"}


def test_the_sdist_tests_itself(sdist: Path) -> None:
    said = run(
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_schedules.py",
        "tests/test_house.py",
        "tests/test_docs.py",
        cwd=sdist,
    )
    assert " passed" in said and "failed" not in said


def test_the_wheel_holds_the_package_with_its_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = {name for name in tracked() if name.startswith("ddpm_ext/")}
    assert {name for name in names if ".dist-info/" not in name} == package
    assert {"ddpm_ext/accelerate_configs/cpu.yaml", "ddpm_ext/data/digits/train.parquet"} <= package


def test_the_installed_wheel_trains_samples_and_evaluates(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    python, command = str(tmp_path / "venv/bin/python"), str(tmp_path / "venv/bin/ddpm-ext")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", str(wheel), cwd=tmp_path)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    # The libraries of this environment. A path in a .pth file brings no other .pth file with it: no editable install.
    Path(site, "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    home = tmp_path / "home"
    home.mkdir()
    where = run(python, "-c", "import ddpm_ext; print(ddpm_ext.__file__)", cwd=home).strip()
    assert where.startswith(site)

    few = ("--num_inference_steps", "2", "--cpu")
    train = "--max_train_steps 2 --lr_warmup_steps 0 --ddpm_num_inference_steps 2 --eval_batch_size 2 --cpu"
    run(command, "train", *train.split(), cwd=home)
    run(command, "sample", "--model", "runs/digits", "--num_samples", "2", *few, "--output_dir", "images", cwd=home)
    measure = "--extractor pixels --metrics fid --num_samples 100 --max_reference_images 100"
    run(command, "evaluate", "--model", "runs/digits", *measure.split(), *few, cwd=home)
    run(command, "configs", cwd=home)
    assert sorted(path.name for path in (home / "images").glob("0*.png")) == ["000000.png", "000001.png"]
    (result,) = json.loads((home / "runs/digits/eval.json").read_text())["figures"]
    assert result["metric"] == "fid" and result["value"] > 0
    assert (home / "accelerate_configs/cpu.yaml").is_file()
