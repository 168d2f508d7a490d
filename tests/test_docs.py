"""The code in README and docs runs as it stands, each page from top to bottom in one namespace."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALL = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [path for path in ALL if "```python" in path.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_blocks_run(page: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M)
    here = Path.cwd()
    os.chdir(tmp_path)  # pages may write pictures
    try:
        namespace: dict[str, object] = {}
        for block in blocks:
            exec(compile(block, str(page), "exec"), namespace)
    finally:
        os.chdir(here)


def test_every_method_is_in_the_guide() -> None:
    from bilevel import METHODS

    guide = (ROOT / "docs" / "guide.md").read_text()
    missing = [name for name in METHODS if f'| `"{name}"` |' not in guide]
    assert not missing, f"add a row for {missing} to the table of methods in docs/guide.md"
