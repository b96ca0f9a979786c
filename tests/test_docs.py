"""The documents run: their Python blocks in order, their commands' options exist, the files they name are there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDPMPipeline
from documents import ROOT, blocks, check_command, commands, links, subcommand

from ddpm_ext import DDPMExtPipeline, DDPMExtScheduler, build_unet
from ddpm_ext.errors import UsageError

DOCS = sorted((ROOT / "docs").glob("*.md"))


def run_blocks(name: str) -> dict[str, Any]:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    found = blocks(text, "python")
    assert len(found) == text.count("```python") >= 5
    namespace: dict[str, Any] = {}
    for i, block in enumerate(found):
        exec(compile(block, f"docs/{name}, block {i + 1}", "exec"), namespace)
    return namespace


def test_blocks_of_ddpm_md_run_and_their_assertions_hold() -> None:
    text = (ROOT / "docs" / "ddpm.md").read_text(encoding="utf-8")
    assert sum("assert" in block for block in blocks(text, "python")) >= 5
    run_blocks("ddpm.md")


def test_the_chinese_walk_has_the_same_blocks_and_formulas() -> None:
    english, chinese = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("ddpm.md", "ddpm.zh.md"))
    assert blocks(chinese, "python") == blocks(english, "python")
    formulas = [re.findall(r"\$\$(.*?)\$\$", text, re.DOTALL) for text in (english, chinese)]
    assert formulas[0] == formulas[1]
    headings = [re.findall(r"^## (\d+)\.", text, re.MULTILINE) for text in (english, chinese)]
    assert headings[0] == headings[1]


def test_blocks_of_pipeline_md_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline = DDPMExtPipeline(build_unet("digits"), DDPMExtScheduler(variance_type="fixed_large"))
    pipeline.save_pretrained("runs/digits/pipeline")
    made = run_blocks("pipeline.md")
    assert [image.size for image in made["images"]] == [(8, 8)] * 2
    assert made["mean"].shape == made["x_t"].shape
    assert type(made["stock"]) is DDPMPipeline


def test_a_wrong_block_would_be_noticed() -> None:
    (block,) = blocks("text\n```python\nassert 1 == 2\n```\n", "python")
    with pytest.raises(AssertionError):
        exec(block, {})


@pytest.mark.parametrize("path", [*DOCS, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda path: path.stem)
def test_files_that_documents_link_to_exist(path: Path) -> None:
    assert links(path) == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_every_option_of_every_command_exists(path: Path) -> None:
    ours = [
        command for command in commands(path.read_text(encoding="utf-8")) if (run := subcommand(command)) and run[1]
    ]
    read = [check_command(command) for command in ours]  # refuses an option that there is not
    assert [command for command, options in zip(ours, read, strict=True) if options is None] == []


def test_an_option_that_does_not_exist_would_be_noticed() -> None:
    with pytest.raises(UsageError, match="no option --modle"):
        check_command("ddpm-ext sample --modle x")
    with pytest.raises(UsageError, match="no option --lr"):
        check_command("accelerate launch --config_file a.yaml scripts/train.py --lr 1")


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in DOCS if f"({path.name})" not in index and path.name != "README.md"] == []


def test_the_api_page_is_what_the_docstrings_say() -> None:
    page = runpy.run_path(str(ROOT / "scripts" / "make_api.py"))["api_page"]()
    assert page == (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), (
        "stale: python scripts/make_api.py --output docs/api.md"
    )
