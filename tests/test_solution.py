"""`Solution`: applied to the user's objects, in files, and as people read it."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bilevel
from bilevel import BilevelProblem, Solution, inner, solve
from bilevel.errors import InvalidValueError
from problems import PROBLEMS, RIDGE
from problems_solve import Doubtful, sgd

# The user's objects


class Small(nn.Module):
    """A module with a buffer that training moves and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2, dtype=torch.float64)
        self.out = nn.Linear(2, 1, dtype=torch.float64)
        self.frozen = nn.Parameter(torch.ones(1, dtype=torch.float64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.norm(x)) * self.frozen
        return result


def module_problem(module: Small, hparams: Any) -> BilevelProblem:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(20, 2, generator=generator, dtype=torch.float64) + 2.0
    y = X.sum(1, keepdim=True)
    return BilevelProblem(
        lambda m, h: ((m(X[:10]) - y[:10]) ** 2).mean() + h["strength"] * sum((p**2).sum() for p in m.parameters()),
        lambda m, h: ((m(X[10:]) - y[10:]) ** 2).mean() + 1e-3 * (h["shift"] ** 2).sum(),
        module,
        hparams,
        inner.SGD(lr=0.1, momentum=0.5, steps=150),
    )


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in module.state_dict().items()}


def test_the_users_objects_change_only_by_apply() -> None:
    torch.manual_seed(0)
    module = Small()
    hparams: dict[str, Any] = {"strength": bilevel.positive(0.1), "shift": torch.ones(2, dtype=torch.float64)}
    before = snapshot(module)
    solution = solve(module_problem(module, hparams), steps=3, outer_optimizer=sgd, on_untrusted="ignore")
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(hparams["shift"], torch.ones(2, dtype=torch.float64))
    assert repr(hparams["strength"]) == "positive(0.1)"

    same = dict(module.named_parameters())
    solution.apply_()
    tuned = solution.params.state_dict()
    assert all(torch.equal(t, tuned[name]) for name, t in module.state_dict().items())
    assert all(p is same[name] for name, p in module.named_parameters()), "in place"
    assert not torch.equal(module.out.weight, before["out.weight"])
    assert torch.equal(module.frozen, before["frozen"])
    assert torch.equal(hparams["shift"], solution.hparams["shift"])
    assert float(hparams["strength"].value) == float(solution.hparams["strength"])
    assert module.training


def test_apply_to_plain_tensors_writes_in_place() -> None:
    w: dict[str, Any] = {"a": torch.zeros(2, dtype=torch.float64), "b": [torch.zeros((), dtype=torch.float64)]}
    h = torch.full((2,), 0.5, dtype=torch.float64)
    problem = BilevelProblem(
        lambda p, h: ((p["a"] - 1.0) ** 2).sum() + (h * p["a"] ** 2).sum() + (p["b"][0] - p["a"].sum()) ** 2,
        lambda p, h: ((p["a"] - 0.8) ** 2).sum() + 0.1 * p["b"][0] ** 2 * 0.0,
        w,
        h,
    )
    solution = solve(problem)
    assert float(h.sum()) == 1.0
    solution.apply_()
    assert torch.equal(h, solution.hparams)
    assert torch.equal(w["a"], solution.params["a"])
    assert float(w["b"][0]) == pytest.approx(1.6, rel=1e-6)
    assert h.data_ptr() != solution.hparams.data_ptr(), "the solution keeps its own copy"


def test_a_second_run_starts_where_the_first_was_applied() -> None:
    strength = bilevel.positive(1.0)
    start = torch.zeros(1, dtype=torch.float64)

    def problem() -> BilevelProblem:
        return BilevelProblem(
            lambda w, h: ((w - 1.0) ** 2).sum() / 2 + h * (w**2).sum() / 2,
            lambda w, h: ((w - 0.4) ** 2).sum() / 2,
            start,
            strength,
        )

    first = solve(problem(), steps=2, outer_optimizer=sgd)
    first.apply_()
    second = solve(problem(), steps=2, outer_optimizer=sgd)
    assert second.start.outer_loss == pytest.approx(first.outer_loss, rel=1e-12)


# Files


def test_a_solution_survives_a_file(tmp_path: Path) -> None:
    solution = solve(RIDGE.problem(), steps=5)
    path = tmp_path / "run.pt"
    solution.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"], "no temporary file is left"
    loaded = Solution.load(path)
    assert torch.equal(loaded.hparams, solution.hparams)
    assert torch.equal(loaded.params, solution.params)
    for field in ("outer_loss", "history", "status", "certificate", "start"):
        assert getattr(loaded, field) == getattr(solution, field), field
    assert loaded.summary() == solution.summary() == str(solution)
    assert "Record" not in repr(solution)  # a long run's history would fill the screen
    with pytest.raises(InvalidValueError, match="loaded from a file"):
        loaded.apply_()
    loaded.save(str(path))  # over itself
    assert Solution.load(str(path)).history == solution.history


def test_modules_and_structures_survive_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    hparams = {"strength": bilevel.positive(0.1), "shift": torch.ones(2, dtype=torch.float64)}
    solution = solve(module_problem(Small(), hparams), steps=1, outer_optimizer=sgd, on_untrusted="ignore")
    solution.save(tmp_path / "run.pt")
    loaded = Solution.load(tmp_path / "run.pt")
    fresh = Small()
    fresh.load_state_dict(loaded.params)
    assert all(torch.equal(t, solution.params.state_dict()[name]) for name, t in fresh.state_dict().items())
    assert set(loaded.hparams) == {"strength", "shift"}


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, part: float) -> None:
    path = tmp_path / "run.pt"
    solve(RIDGE.problem(), steps=1).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(InvalidValueError, match=r"run\.pt"):
        Solution.load(path)


@pytest.mark.parametrize(
    "content",
    [
        b"not a file of ours at all\n" * 20,
        pickle.dumps({"format": 1}, protocol=2),
        {"kind": "solution", "format": 1},
        {
            "kind": "solution",
            "format": 1,
            "hparams": 0,
            "params": 0,
            "outer_loss": 0.0,
            "history": 3,
            "status": "",
            "certificate": [],
            "start": {},
        },
        {"format": 99},
        [1, 2, 3],
        {"weight": torch.ones(2)},
    ],
    ids=["text", "pickle", "our format, empty", "our format, nonsense", "another format", "list", "state dict"],
)
def test_a_foreign_file_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "run.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InvalidValueError, match=r"run\.pt"):
        Solution.load(path)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


def test_a_malicious_file_runs_nothing(tmp_path: Path) -> None:
    path, proof = tmp_path / "run.pt", tmp_path / "proof"
    bomb = Bomb(proof)
    pickle.loads(pickle.dumps(bomb))
    assert proof.exists(), "the bomb works"
    proof.unlink()
    torch.save({"format": 1, "hparams": bomb}, path)
    with pytest.raises(InvalidValueError, match=r"run\.pt"):
        Solution.load(path)
    path.write_bytes(pickle.dumps({"format": 1, "hparams": bomb}, protocol=2))
    with pytest.raises(InvalidValueError, match=r"run\.pt"):
        Solution.load(path)
    assert not proof.exists()


def test_a_failed_save_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    solution = solve(RIDGE.problem(), steps=1)
    solution.save(path)
    whole = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        dataclasses.replace(solution, hparams=lambda: None).save(path)
    assert path.read_bytes() == whole


# What people read


def test_no_progress_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    solve(RIDGE.problem(), steps=3, progress=False)
    solve(RIDGE.problem(), steps=3)  # stderr is no terminal here
    assert tuple(capfd.readouterr()) == ("", "")


def test_progress_shows_loss_norm_and_verdict_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    solution = solve(RIDGE.problem(), steps=3, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    last = solution.history[-1]
    assert f"outer loss {last.outer_loss:.5g}, hypergradient {last.hypergradient_norm:.1e}, exact" in err
    assert "3/3" in err


def test_the_summary_is_a_table() -> None:
    solution = solve(RIDGE.problem(), steps=3, outer_optimizer=sgd)
    records = [solution.start, *solution.history]
    lines = solution.summary().splitlines()
    width = len("estimated relative error") + 2
    rows = {line[:width].strip(): line[width:] for line in lines}
    assert rows["status"] == solution.status
    assert rows["outer loss"] == f"{solution.start.outer_loss:.6g} -> {solution.outer_loss:.6g}"
    assert rows["verdict"] == "exact"
    assert rows["outer steps"] == "3"
    assert rows["inner solves"] == "4"
    assert rows["gradients"] == str(sum(r.gradients for r in records))
    assert rows["Hessian-vector products"] == str(sum(r.products for r in records))
    assert rows["hparams"] == "  ".join(f"{float(x):.4g}" for x in solution.hparams)
    assert "untrusted hypergradients" not in rows


def test_the_plot_shows_losses_residuals_and_hyperparameters(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    solution = solve(RIDGE.problem(), steps=4, outer_optimizer=sgd)
    figure = solution.plot()
    losses, residuals, values = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["losses", "hypergradient and residuals", "hyperparameters"]
    records = [solution.start, *solution.history]
    outer, lower = losses.get_lines()
    assert list(np.asarray(outer.get_xdata())) == [0, 1, 2, 3, 4]
    assert list(np.asarray(outer.get_ydata())) == [r.outer_loss for r in records]
    assert list(np.asarray(lower.get_ydata())) == [r.inner_loss for r in records]
    assert residuals.get_yscale() == "log"
    assert residuals.get_lines()[0].get_label() == "hypergradient norm"
    assert [list(np.asarray(line.get_ydata())) for line in values.get_lines()] == [
        [r.hparams["hparams"][i] for r in records] for i in range(6)
    ]
    assert values.get_yscale() == "log"
    assert all(axes.get_xlabel() == "outer step" for axes in figure.axes)
    figure.savefig(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000


def test_the_plot_marks_untrusted_steps_and_draws_quantiles() -> None:
    pytest.importorskip("matplotlib")
    known = PROBLEMS["data-weighted least squares"]
    solution = solve(known.problem(), Doubtful(), steps=4, outer_optimizer=sgd, on_untrusted="ignore")
    _, residuals, values = solution.plot().axes
    assert len(residuals.patches) == 3
    assert len(values.collections) == 2, "two bands of quantiles"
    assert values.get_lines()[0].get_label() == "weights: median, 80 % and range of 20"
