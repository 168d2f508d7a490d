"""The command line: exit codes, tables of the user's own, and what is said about bad ones."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bilevel
from bilevel.cli import main
from bilevel.logistic import STEPS
from bilevel.table import read_table


def mixed_table(rows: int = 60, classes: int = 2) -> str:
    """Return a CSV text with numbers, text and a target that both tell."""
    rng = np.random.default_rng(0)
    kind = np.arange(rows) % classes
    size = kind + rng.normal(size=rows)
    color = np.where(rng.random(rows) < 0.7, kind, rng.integers(0, 3, rows))
    lines = ["size,color,on,kind"]
    for s, c, k in zip(size, color, kind, strict=True):
        lines.append(f"{s:.4f},{['red', 'green', 'blue'][c % 3]},{bool(c)},kind {k}")
    return "\n".join(lines) + "\n"


def write(folder: Path, text: str | bytes) -> str:
    path = folder / "table.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


@pytest.mark.parametrize("classes", [2, 3])
def test_own_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], classes: int) -> None:
    picture = tmp_path / "picture.png"
    data = write(tmp_path, mixed_table(classes=classes))
    code = main(["demo", "--data", data, "--target", "kind", "--steps", "2", "--output", str(picture)])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert f"60 rows, 5 features, {classes} classes" in out
    assert "GridSearchCV" in out and "bilevel, one strength per weight" in out
    assert str(picture) in out
    assert picture.stat().st_size > 20_000


def test_own_table_is_encoded(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, mixed_table()), "kind")
    assert table.features == ("size", "color=blue", "color=green", "color=red", "on")
    assert table.classes == ("kind 0", "kind 1")
    assert np.array_equal(table.x[:, 1:4].sum(1), np.ones(60))
    assert np.array_equal(table.y, np.arange(60) % 2)


def test_byte_order_mark_quotes_and_spaces(tmp_path: Path) -> None:
    text = '\ufeff"a, b",kind\n' + "".join(f'{i},"{"yes" if i % 2 else "no, never"}"\n' for i in range(40))
    table = read_table(write(tmp_path, text), "kind")
    assert (table.features, table.classes) == (("a, b",), ("no, never", "yes"))


def test_target_of_numbers(tmp_path: Path) -> None:
    text = "x,y\n" + "".join(f"{i}.5,{10 * (i % 3)}\n" for i in range(60))
    table = read_table(write(tmp_path, text), "y")
    assert table.classes == ("0", "10", "20")
    assert np.array_equal(table.y, np.arange(60) % 3)


LONG = "".join(f"{i}.25,{i % 2}\n" for i in range(40))
BAD: list[tuple[str, Any, str, str]] = [
    ("wrong target", "x,y\n" + LONG, "z", "no column 'z'; its columns are 'x', 'y'"),
    (
        "missing values",
        "x,u,y\n" + "".join(f"{i},{'' if i < 3 else i},{i % 2}\n" for i in range(40)),
        "y",
        "'u' (3 of 40)",
    ),
    ("missing target", "x,y\n" + LONG + "1,\n", "y", "'y' (1 of 41)"),
    ("empty file", "", "y", "is empty"),
    ("blank file", "\n\n", "y", "is empty"),
    ("header only", "x,y\n", "y", "no rows"),
    ("not UTF-8", b"x,y\n" + "über,1\n".encode("latin-1"), "y", "not UTF-8"),
    ("binary", bytes(range(128, 256)), "y", "not UTF-8"),
    ("duplicate columns", "x,x,y\n1,2,0\n", "y", "more than one column named 'x'"),
    ("nameless column", ",x,y\n0,1,0\n", "y", "column 1 of"),
    ("ragged", "x,y\n1,2\n1,2,3\n", "y", "is no table with commas"),
    ("all rows too long", "x,y\n" + "1,0,5\n2,1,5\n" * 20, "y", "is no table with commas"),
    ("fractions as target", "x,y\n" + "".join(f"{i},{i / 7}\n" for i in range(40)), "y", "regression target"),
    ("many classes", "x,y\n" + "".join(f"{i},{i}\n" for i in range(60)), "y", "60 different values"),
    ("one class", "x,y\n" + "".join(f"{i},a\n" for i in range(40)), "y", "always 'a'"),
    ("class of one", "x,y\n" + LONG + "1,2\n", "y", "'2' (1)"),
    ("constant column", "x,u,v,y\n" + "".join(f"{i},7,a,{i % 2}\n" for i in range(40)), "y", "'u', 'v'"),
    ("nothing to learn from", "y\n" + "0\n1\n" * 20, "y", "no columns besides"),
    ("identifier", "x,y\n" + "".join(f"id{i},{i % 2}\n" for i in range(60)), "y", "'x' has 60 different values"),
    ("infinite", "x,y\n" + LONG + "inf,1\n", "y", "infinite"),
]


@pytest.mark.parametrize(("text", "target", "said"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: Any, target: str, said: str) -> None:
    output = tmp_path / "picture.png"
    code = main(["demo", "--data", write(tmp_path, text), "--target", target, "--output", str(output)])
    out, err = capsys.readouterr()
    assert code == 2
    assert err.startswith("bilevel: ") and err.count("\n") == 1
    assert said in err
    assert out == "" and not output.exists()


def test_file_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        assert main(["demo", "--data", str(path), "--target", "y", "--output", str(tmp_path / "p.png")]) == 2
        assert f"cannot read {path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "table.csv"], "--data needs --target"),
        (["--target", "y"], "--target needs --data"),
        (["--output", os.path.join("no", "such", "folder", "p.png")], "no folder"),
        (["--output", "."], "that is a folder"),
        (["--steps", "0"], "--steps: '0' is no whole number of at least 1"),
        (["--seed", "-1"], "--seed"),
        (["--colour"], "--colour"),
    ],
)
def test_bad_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert main(["demo", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bilevel {bilevel.__version__}\n"
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out
    assert main(["demo", "--help"]) == 0
    text = capsys.readouterr().out
    for part in ("--data", "--target", "--output", "--seed", f"most outer steps (default: {STEPS})", "exit codes"):
        assert part in text


def test_python_m_bilevel() -> None:
    command = [sys.executable, "-m", "bilevel", "--version"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == f"bilevel {bilevel.__version__}\n"


def test_ctrl_c(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(record: bilevel.Record) -> None:
        raise KeyboardInterrupt

    # solve() turns Ctrl-C into the solution so far; the demo must stop nevertheless.
    monkeypatch.setattr("bilevel.logistic.solve", functools.partial(bilevel.solve, callbacks=[interrupt]))
    data, output = write(tmp_path, mixed_table()), tmp_path / "p.png"
    assert main(["demo", "--data", data, "--target", "kind", "--output", str(output)]) == 130
    assert "Ctrl-C" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("module", "said"),
    [("pandas", "needs pandas"), ("sklearn", "needs scikit-learn"), ("matplotlib.figure", "matplotlib")],
)
def test_missing_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, module: str, said: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    given = ["--data", write(tmp_path, mixed_table()), "--target", "kind"] if module == "pandas" else []
    assert main(["demo", *given, "--output", str(tmp_path / "p.png")]) == 2
    error = capsys.readouterr().err
    assert said in error and "pip install" in error
