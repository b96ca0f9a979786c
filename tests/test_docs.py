"""The documents run: every Python block of docs/ddpm.md, in order, as one notebook; every file they name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def python_blocks(text: str) -> list[str]:
    return BLOCK.findall(text)


def test_blocks_of_ddpm_md_run_and_their_assertions_hold():
    text = (ROOT / "docs" / "ddpm.md").read_text()
    blocks = python_blocks(text)
    assert len(blocks) == text.count("```python") >= 10
    namespace: dict[str, object] = {}
    for i, block in enumerate(blocks):
        exec(compile(block, f"docs/ddpm.md, block {i + 1}", "exec"), namespace)


def test_a_wrong_block_would_be_noticed():
    (block,) = python_blocks("text\n```python\nassert 1 == 2\n```\n")
    with pytest.raises(AssertionError):
        exec(block, {})


@pytest.mark.parametrize("document", ["README.md", "docs/ddpm.md"])
def test_files_that_documents_link_to_exist(document: str):
    path = ROOT / document
    links = re.findall(r"\]\(([^)#\s]+)\)", path.read_text())
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert missing == []
