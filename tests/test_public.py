"""The public surface: every name is there, is documented with an example that runs, and costs nothing until used."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ddpm_ext

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = sorted(path.parent.name for path in (ROOT / "ddpm_ext").glob("*/__init__.py"))
PROMISED = {
    *("DDPMExtPipeline", "DDPMExtScheduler", "DenoiseDiffusion", "build_unet", "load_images", "bits_per_dim"),
    *("rate_distortion", "BitsPerDim", "RateDistortion", "train", "TrainConfig", "PRESETS", "evaluate", "EvalConfig"),
    *("calibrate", "convert", "push_to_hub", "UserError"),
}
WITH_EXAMPLE = ("DDPMExtPipeline", "DDPMExtScheduler", "DenoiseDiffusion", "TrainConfig", "bits_per_dim", "build_unet")


def test_every_promised_name_is_offered() -> None:
    assert set(ddpm_ext.__all__) >= PROMISED
    assert set(dir(ddpm_ext)) >= PROMISED
    with pytest.raises(AttributeError, match="has no attribute 'Pipeline'"):
        _ = ddpm_ext.Pipeline  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("package", ["ddpm_ext", *(f"ddpm_ext.{folder}" for folder in FOLDERS)])
def test_every_name_of_a_package_loads_and_is_known_to_type_checkers(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__all__ == sorted(module.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert module.__doc__
    for name in module.__all__:
        assert getattr(module, name) is not None
    source = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    typed = {alias.name for node in ast.walk(source) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(module.__all__) - {"__version__", "DIGITS"} <= typed


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'datasets', 'accelerate', 'numpy', 'matplotlib'}"
    code = f"import sys, ddpm_ext, ddpm_ext.training; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_the_pipeline_imports_no_data_sets_and_no_plots() -> None:
    code = (
        "import sys\nfrom ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, build_unet\n"
        "assert not {'datasets', 'matplotlib', 'gradio', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize("name", [name for name in ddpm_ext.__all__ if name not in ("__version__", "PRESETS")])
def test_the_example_of_a_public_name_runs(name: str) -> None:
    value: Any = getattr(ddpm_ext, name)
    if not callable(value):
        return
    assert inspect.getdoc(value)
    module = importlib.import_module(value.__module__)
    tests = doctest.DocTestFinder(recurse=False).find(value, name, globs=vars(module).copy())
    assert name not in WITH_EXAMPLE or any(test.examples for test in tests)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in tests:
        runner.run(test)
    assert runner.failures == 0


def test_a_wrong_example_would_be_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> None:
        """Say what is not.

        >>> 1 + 1
        3
        """

    (test,) = doctest.DocTestFinder().find(wrong, "wrong", globs={})
    assert doctest.DocTestRunner().run(test).failed == 1
    assert "Expected" in capsys.readouterr().out


def test_the_word_that_was_meant_is_named() -> None:
    """One rule for commands, options and words of Python: the nearest by letters, and nothing where none is near."""
    for call, meant in (
        (lambda: ddpm_ext.build_unet("cifr10"), "Did you mean cifar10?"),
        (lambda: ddpm_ext.DDPMExtScheduler(variance_type="fixed_smal"), "Did you mean fixed_small?"),  # pyright: ignore
        (lambda: ddpm_ext.TrainConfig(max_train_steps=1, loss="hybird"), "Did you mean hybrid?"),  # pyright: ignore
        (lambda: ddpm_ext.build_unet("xyz"), "got 'xyz'."),
    ):
        with pytest.raises(ddpm_ext.UserError) as refused:
            call()
        assert str(refused.value).endswith(meant)


def test_every_name_of_ours_in_a_text_is_there() -> None:
    """What messages, docstrings and help call `ddpm_ext.…` can be imported: no name that has moved is told."""
    texts = [
        node.value
        for path in (ROOT / "ddpm_ext").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    texts += [path.read_text(encoding="utf-8") for path in (*(ROOT / "docs").glob("*.md"), ROOT / "README.md")]
    names = {name for text in texts for name in re.findall(r"\bddpm_ext(?:\.\w+)+", text)}
    assert {"ddpm_ext.load_images", "ddpm_ext.data.spec.DataSpec"} <= names
    assert [name for name in sorted(names) if not _is_there(name)] == []
    assert not _is_there("ddpm_ext.to_x_0")


def _is_there(name: str) -> bool:
    try:
        return pkgutil.resolve_name(name) is not None
    except (ImportError, AttributeError):
        return False


def test_options_that_code_has_built_are_checked_as_those_of_a_command() -> None:
    """The words of a `Literal` and the range at the field, of every command; none passes where it means off."""
    from ddpm_ext.conversion.config import ConvertOptions
    from ddpm_ext.pipelines.config import SampleConfig

    files = {"source": "ddim", "checkpoint": "a", "output_dir": "b"}
    for kind, options, sentence in (
        (SampleConfig, {"model": "x", "dtype": "int8"}, "dtype must be one of 'float32', 'float16', 'bfloat16'"),
        (SampleConfig, {"model": "x", "num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0."),
        (ddpm_ext.EvalConfig, {"cdf": "erf"}, "cdf must be one of 'tanh', 'exact', got 'erf'."),
        (ddpm_ext.EvalConfig, {"guidance_scale": float("nan")}, "guidance_scale must be a finite number, got nan."),
        (ddpm_ext.CalibrateConfig, {"solver_reference": "cliped"}, "Did you mean clipped?"),
        (ConvertOptions, {**files, "beta_start": 1.0}, "beta_start must be in (0, 1), got 1.0."),
    ):
        with pytest.raises(ddpm_ext.UserError) as refused:
            kind(**options)
        assert sentence in str(refused.value)
    assert SampleConfig(model="x", num_inference_steps=None).num_inference_steps is None


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"use_ema": "no"}, "use_ema must be True or False, got 'no'."),
        ({"max_train_steps": 2.5}, "max_train_steps must be a whole number or None, got 2.5."),
        ({"max_train_steps": "2"}, "max_train_steps must be a whole number or None, got '2'."),
        ({"learning_rate": True}, "learning_rate must be a number, got True."),
        ({"beta_start": "x"}, "beta_start must be a number, got 'x'."),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5."),
        ({"seed": 2**64}, "seed must be in [0, 4611686018427387904), got 18446744073709551616."),
        ({"ema_sigma_rel": 0.1}, "ema_sigma_rel must be a list, got 0.1."),
        ({"forecast": "h100"}, "forecast has an effect only with dry_run true"),
    ],
)
def test_values_of_another_type_are_refused_where_code_gives_them(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(ddpm_ext.UserError) as refused:
        ddpm_ext.TrainConfig(**{"unet": "digits", "max_train_steps": 2, **given})
    assert sentence in str(refused.value)


def test_paths_and_numpys_numbers_are_taken_as_a_command_line_gives_them() -> None:
    given = {"output_dir": Path("runs/x"), "seed": np.int64(3), "resolution": 32, "ema_sigma_rel": (0.1, 0.05)}
    config = ddpm_ext.TrainConfig(unet="digits", max_train_steps=2, **given)
    found = {name: getattr(config, name) for name in given}
    assert found == {"output_dir": "runs/x", "seed": 3, "resolution": "32", "ema_sigma_rel": [0.1, 0.05]}
    assert {type(value) for value in found.values()} == {str, int, list}
