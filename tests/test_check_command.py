"""`bilevel check` on the command line."""

from __future__ import annotations

import dataclasses
import operator
import sys
from pathlib import Path

import pytest

import bilevel
from bilevel import check_command
from bilevel.cli import main
from bilevel.preflight import losses
from problems_preflight import problem_of

FILE = """
import torch, bilevel
if __name__ == "__main__":
    raise AssertionError("a script's own run is not the check's business")
w = torch.ones(3, dtype=torch.float64)
def of(solver=None, idle=False):
    hparams = {"l2": bilevel.positive(0.1)} | ({"idle": bilevel.positive(1.0)} if idle else {})
    return bilevel.BilevelProblem(
        lambda w, h: ((w - 1) ** 2).sum() + h["l2"] * (w**2).sum(), lambda w, h: (w**2).sum(), w, hparams, solver)
good, bad = of(), of(idle=True)
other = 3
"""


@pytest.mark.parametrize(
    ("text", "arguments", "code", "words"),
    [
        (FILE, ["f.py:good"], 0, "ok: nothing found"),
        (FILE, ["f.py:good", "--method", "unroll"], 1, "has no steps"),
        (FILE, ["f.py:bad"], 1, "hparams['idle']"),
        (FILE, ["f.py:good", "--gradient"], 0, "passed"),
        (FILE, ["f.py:bad", "--gradient"], 1, "not checked"),
        (FILE, ["f.py:nothing"], 2, "has good, bad"),
        (FILE, ["f.py:other"], 2, "is a int, expected a BilevelProblem"),
        (FILE, ["f.py"], 2, "FILE.py:name"),
        (FILE, ["g.py:good"], 2, "there is no file"),
        (FILE, ["f.py:good", "--method", "newton"], 2, "expected one of"),
        ("x = 1\ny = x / 0\n", ["f.py:good"], 2, "ZeroDivisionError: division by zero (line 2)"),
        ("x = (", ["f.py:good"], 2, "SyntaxError"),
    ],
)
def test_the_command_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "f.py").write_text(text)
    before = list(sys.path)
    assert main(["check", *arguments]) == code
    out, err = capsys.readouterr()
    assert words in (err if code == 2 else out)
    assert (out == "") == (code == 2) and (err == "") == (code != 2)
    assert sys.path == before


def test_a_wrong_gradient_ends_in_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "f.py").write_text(FILE)
    check_gradient = bilevel.check_gradient
    monkeypatch.setattr(
        check_command, "check_gradient", lambda *given: dataclasses.replace(check_gradient(*given), passed=False)
    )
    assert main(["check", f"{tmp_path / 'f.py'}:good", "--gradient"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_bugs_of_this_library_are_not_blamed_on_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "outer_gradient", operator.itemgetter(0))  # raises without a line of the user's
    with pytest.raises(TypeError, match="itemgetter"):
        bilevel.check(problem_of())
