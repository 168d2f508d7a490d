"""`bilevel report` and `bilevel completion`: files, exit codes, and what a shell makes of the script."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import bilevel
from bilevel.cli import main
from bilevel.solvers import METHODS
from problems_solve import shrinkage


def test_report_writes_a_page_beside_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("plotly")
    bilevel.solve(shrinkage(), steps=2).save(tmp_path / "run.pt")
    assert main(["report", str(tmp_path / "run.pt")]) == 0
    assert capsys.readouterr().out == f"report: {tmp_path / 'run.html'}\n"
    assert "In short" in (tmp_path / "run.html").read_text()
    assert main(["report", str(tmp_path / "run.pt"), "-o", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").exists()


def test_report_of_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": torch.zeros(2)}, tmp_path / "model.pt")
    for path, said in (("none.pt", "there is no file"), ("model.pt", "is no run; expected a file that solution.save")):
        assert main(["report", str(tmp_path / path)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("bilevel: ") and said in err
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def completed(script: str, *words: str) -> list[str]:
    """Return what bash offers for the last of the words."""
    line = (
        f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _bilevel; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", f"{script}\n{line}"], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_and_methods(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert {"demo", "check", "compare", "report", "methods", "completion"} <= set(completed(script, "bilevel", '""'))
    assert completed(script, "bilevel", "rep") == ["report"]
    assert completed(script, "bilevel", "check", "--m") == ["--method"]
    assert set(METHODS) <= set(completed(script, "bilevel", "check", "--method", '""'))
    assert completed(script, "bilevel", "compare", "trai") == ["train.py"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "report" in script and "write a run as one page of HTML" in script and "implicit" in script
    found = shutil.which(shell)
    if found is not None:  # syntax alone
        subprocess.run([found, "-n"], input=script, text=True, check=True)
    assert main(["completion", "powershell"]) == 2


@pytest.mark.parametrize("command", ["demo", "tune", "check", "compare", "report", "completion"])
def test_every_command_says_its_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert "exit codes: 0 done" in capsys.readouterr().out.replace("0 no error was found", "0 done")
    assert main([command, "--no-such-option"]) == 2
    assert "usage: bilevel" in capsys.readouterr().err
