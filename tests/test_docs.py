"""The code in README and docs runs as it stands, each page from top to bottom in one namespace."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest

import bilevel
from bilevel import METHODS
from bilevel.method_table import method_table

ROOT = Path(__file__).resolve().parent.parent
ALL = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [path for path in ALL if "```python" in path.read_text()]


@pytest.mark.filterwarnings("ignore:We've integrated functorch:FutureWarning")  # TorchOpt's
@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_blocks_run(page: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python(?: \{needs=(\w+)\})?\n(.*?)^```", page.read_text(), re.S | re.M)
    here = Path.cwd()
    os.chdir(tmp_path)  # pages may write pictures
    try:
        namespace: dict[str, object] = {}
        for module, block in blocks:
            if not module or importlib.util.find_spec(module):  # a library that a page compares with may be absent
                exec(compile(block, str(page), "exec"), namespace)
    finally:
        os.chdir(here)


def test_the_table_of_methods_is_the_code_s_own() -> None:
    page = (ROOT / "docs" / "choosing.md").read_text()
    assert method_table() in page, "paste what `bilevel methods` prints into docs/choosing.md"


def test_every_method_has_its_line_in_the_real_problem() -> None:
    results = (ROOT / "docs" / "choosing.md").read_text().split("python -m benchmarks.annotators")[1]
    missing = [name for name in METHODS if f"| `{name}` |" not in results]
    assert not missing, f"run `python -m benchmarks.annotators --methods {' '.join(missing)}` and add the lines"


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_an_example_has_a_title_in_the_gallery(example: Path) -> None:
    title, line, gap = example.read_text().removeprefix('"""').lstrip().split("\n")[:3]
    assert set(line) == {"="} and len(line) >= len(title) and not gap, "a title, a line of = below it, an empty line"


def test_every_public_name_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "api.md").read_text() + " ".join(vars(bilevel.errors))  # errors come as a whole module
    missing = [name for name in bilevel.__all__ if name != "METHODS" and not re.search(rf"\b{name}\b", page)]
    assert not missing, "add them to docs/api.md"
