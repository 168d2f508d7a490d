"""A run that was stopped anywhere goes on from its file and ends bit for bit like an uninterrupted one."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bilevel
from benchmarks.killed_run import child, outcome, run

ROOT = Path(__file__).resolve().parent.parent


class Crash(Exception):
    pass


@pytest.fixture(scope="module", params=[False, True], ids=["minibatches under Adam", "implicit under L-BFGS"])
def kind(request: pytest.FixtureRequest) -> tuple[bool, str]:
    return request.param, outcome(run(None, request.param))


def test_a_run_that_crashed_again_and_again_ends_the_same(
    kind: tuple[bool, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crashes in the middle of evaluations, wherever the count of inner gradients happens to be."""
    smooth, expected = kind
    from bilevel.response import ProblemResponse

    original, count = ProblemResponse.residual, 0
    crash_at = {5, 6, 17, 31, 64, 80, 99}

    def crashing(self: Any, lower: Any, upper: Any) -> Any:
        nonlocal count
        count += 1
        if count in crash_at:
            raise Crash
        return original(self, lower, upper)

    monkeypatch.setattr(ProblemResponse, "residual", crashing)
    path, crashes = str(tmp_path / "run.pt"), 0
    while True:
        try:
            end = outcome(run(path, smooth))
            break
        except Crash:
            crashes += 1
    assert crashes >= 4
    assert end == expected


def test_a_killed_process_goes_on(kind: tuple[bool, str], tmp_path: Path) -> None:
    smooth, expected = kind
    path = tmp_path / "run.pt"
    process = child(smooth, path)
    while not path.exists() and process.poll() is None:
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert path.exists()
    out, _ = child(smooth, path).communicate()
    assert out.strip() == expected
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".part"] == ["run.pt"]


def ridge(features: int = 3) -> bilevel.BilevelProblem:
    torch.manual_seed(0)
    x, y = torch.randn(9, features, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    return bilevel.BilevelProblem(
        lambda w, h: ((x @ w - y) ** 2).mean() + (h * w**2).sum(),
        lambda w, h: ((x[:4] @ w - 2.0 * y[:4]) ** 2).mean(),
        torch.zeros(features, dtype=torch.float64),
        bilevel.positive(1.0, shape=(features,)),
    )


def test_a_finished_run_is_found_and_can_be_made_longer(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    seen: list[int] = []
    short = bilevel.solve(ridge(), steps=3, tol=0.0, checkpoint=bilevel.Checkpoint(path, steps=1))
    again = bilevel.solve(ridge(), steps=3, tol=0.0, checkpoint=path)
    assert torch.equal(short.hparams, again.hparams) and len(again.history) == 3
    longer = bilevel.solve(
        ridge(), steps=6, tol=0.0, checkpoint=path, callbacks=[lambda record: seen.append(record.step)]
    )
    assert torch.equal(longer.hparams, bilevel.solve(ridge(), steps=6, tol=0.0).hparams)
    assert seen and seen[0] > 1 and seen[-1] == 6  # callbacks hear of new steps only


def test_files_of_others_are_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    bilevel.solve(ridge(), steps=3, tol=0.0, checkpoint=bilevel.Checkpoint(path, steps=1))
    whole = path.read_bytes()
    with pytest.raises(bilevel.InvalidValueError, match="belongs to another run"):
        bilevel.solve(ridge(4), steps=3, checkpoint=path)
    with pytest.raises(bilevel.InvalidValueError, match="belongs to another run"):
        bilevel.solve(ridge(), "cg", steps=3, checkpoint=path)
    assert path.read_bytes() == whole
    solution = tmp_path / "solution.pt"
    bilevel.solve(ridge(), steps=1).save(solution)
    with pytest.raises(bilevel.InvalidValueError, match="no checkpoint"):
        bilevel.solve(ridge(), steps=3, checkpoint=solution)
    for damaged in (whole[: len(whole) // 2], b"", b"text\n"):
        path.write_bytes(damaged)
        with pytest.raises(bilevel.InvalidValueError, match=r"run\.pt .*: delete it, or give another path$"):
            bilevel.solve(ridge(), steps=3, checkpoint=path)
        assert path.read_bytes() == damaged


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def test_a_malicious_file_is_never_executed(tmp_path: Path) -> None:
    target, path = tmp_path / "owned", tmp_path / "run.pt"
    torch.save({"kind": "checkpoint", "state": Malicious(target)}, path)
    with pytest.raises(bilevel.InvalidValueError, match="nothing in it was executed") as refused:
        bilevel.solve(ridge(), steps=3, checkpoint=path)
    assert "weights_only" not in str(refused.value)  # torch's text says how to execute it
    assert not target.exists()
    pickle.loads(pickle.dumps(Malicious(target)))  # what a plain pickle would have done
    assert target.exists()


def test_ctrl_c_returns_the_solution_so_far() -> None:
    def interrupt(record: bilevel.Record) -> None:
        if record.step == 2:
            raise KeyboardInterrupt

    solution = bilevel.solve(ridge(), callbacks=[interrupt])
    assert solution.status.startswith("interrupted") and len(solution.history) == 2
    assert solution.outer_loss == solution.history[-1].outer_loss


@pytest.mark.parametrize(
    "arguments", [{"steps": 0}, {"steps": 1, "seconds": 1.0}, {"seconds": -1.0}], ids=lambda a: str(a)
)
def test_bad_settings_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(bilevel.InvalidValueError, match="Checkpoint"):
        bilevel.Checkpoint("run.pt", **arguments)
    with pytest.raises(bilevel.InvalidTypeError, match="checkpoint"):
        bilevel.solve(ridge(), checkpoint=3)  # type: ignore[arg-type]


def test_the_subprocess_is_the_same_run() -> None:
    """The imports of the benchmark work from the repository root, as its docstring says."""
    command = [sys.executable, "-m", "benchmarks.killed_run", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "SIGKILL" in done.stdout


def test_a_missing_folder_is_named_before_the_first_step(tmp_path: Path) -> None:
    problem = bilevel.BilevelProblem(
        lambda w, h: ((w - 1) ** 2 + h * w**2).sum(),
        lambda w, h: ((w - 0.5) ** 2).sum(),
        torch.zeros(1, dtype=torch.float64),
        bilevel.positive(0.5),
    )
    for path, message in ((tmp_path / "runs" / "a.pt", r"there is no folder .*runs.*makedirs"), (tmp_path, "a folder")):
        with pytest.raises(bilevel.InvalidValueError, match=rf"`checkpoint` is .*{message}"):
            bilevel.solve(problem, steps=1, checkpoint=path)
    with pytest.raises(bilevel.InvalidValueError, match=r"`path` is .*there is no folder"):
        bilevel.solve(problem, steps=1, on_untrusted="ignore").save(tmp_path / "runs" / "a.pt")
