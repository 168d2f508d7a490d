"""Tolerances of a run that follow its progress: what they save, and that the end is as exact as without."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import bilevel
from benchmarks import overhead
from bilevel import BilevelProblem, Certificate, Solution, inner, minimize
from bilevel.slack import AIM, LEAST, MOST, next_slack, tightened
from bilevel.solvers.linear.base import loosened

D = torch.float64
X, V = (torch.randn(60, 8, generator=torch.Generator().manual_seed(seed), dtype=D) for seed in (0, 1))
Y, Z = (data @ torch.arange(-3.0, 5.0, dtype=D) + 3.0 * data[:, 0].sin() for data in (X, V))


def ridge(solver: inner.LBFGS | None = None) -> BilevelProblem:
    """Ridge regression with a strength for each of 8 features."""

    def inner_loss(w: Tensor, h: Tensor) -> Tensor:
        return ((X @ w - Y) ** 2).mean() + (h * w**2).sum()

    return BilevelProblem(
        inner_loss, lambda w, h: ((V @ w - Z) ** 2).mean(), torch.zeros(8, dtype=D), bilevel.positive(1.0, shape=(8,)),
        inner_solver=solver,
    )  # fmt: skip


def truth(h: Tensor) -> tuple[float, Tensor]:
    """Return F and the inner solution in closed form."""
    w = torch.linalg.solve(X.T @ X / len(X) + torch.diag(h), X.T @ Y / len(X))
    return float(((V @ w - Z) ** 2).mean()), w


@pytest.fixture(scope="module", params=["cg", "direct"])
def run(request: pytest.FixtureRequest) -> Solution:
    return bilevel.solve(ridge(), request.param, steps=6)


def test_steps_on_the_way_use_the_slack_and_report_exact_outer_losses(run: Solution) -> None:
    records = [run.start, *run.history]
    assert max(r.inner_residual or 0.0 for r in records) > 1e-8
    for record in records:
        assert record.verdict == "exact"
        expected, _ = truth(torch.tensor(record.hparams["hparams"], dtype=D))
        # To first order; w is off by up to 1e-4 or so, and F bends.
        assert record.outer_loss == pytest.approx(expected, rel=1e-6)


def test_the_end_is_as_exact_as_without(run: Solution) -> None:
    assert run.certificate.inner_residual is not None and run.certificate.inner_residual <= 1e-9
    assert run.certificate.adjoint_residual is not None and run.certificate.adjoint_residual <= 1e-8
    expected, w = truth(run.hparams)
    assert run.outer_loss == run.history[-1].outer_loss == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(run.params, w, rtol=1e-7, atol=1e-9)


def test_converged_is_said_of_a_hypergradient_without_slack() -> None:
    run = bilevel.solve(ridge(), "cg", tol=1e-3)
    assert run.converged and len(run.history) < 50
    again = bilevel.hypergradient(ridge(inner.LBFGS(rtol=1e-12)), "direct", hparams=run.hparams)
    inside = (run.hparams > 1.01e-8) & (run.hparams < 0.99e8)  # where the gradient holds nothing at a bound
    size = float((run.hparams * again.gradient)[inside].norm())
    assert size <= 1e-3 * run.start.hypergradient_norm * (1.0 + 1e-3)
    assert run.history[-1].hypergradient_norm == pytest.approx(size, rel=1e-4)


def test_tolerances_that_were_asked_for_are_left_alone() -> None:
    run = bilevel.solve(ridge(inner.LBFGS(rtol=1e-9)), bilevel.Implicit(bilevel.CG(rtol=1e-8)), steps=4)
    for record in [run.start, *run.history]:
        assert record.inner_residual is not None and record.inner_residual <= 1e-9
        assert record.adjoint_residual is not None and record.adjoint_residual <= 1e-8


def test_a_torch_optimizer_gets_exact_steps() -> None:
    run = bilevel.solve(ridge(), "cg", steps=3, outer_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.1))
    assert all((r.inner_residual or 0.0) <= 1e-9 for r in [run.start, *run.history])


def test_a_run_takes_fewer_gradients() -> None:
    losses = overhead.losses()
    start, strengths = torch.zeros(64, dtype=D), bilevel.positive(0.01, shape=(64,))
    exact = bilevel.Implicit(bilevel.CG(rtol=1e-8)), inner.LBFGS(rtol=1e-9)
    tight, free = (
        bilevel.solve(BilevelProblem(*losses, start, strengths, inner_solver=solver), method, steps=6)
        for method, solver in (exact, ("cg", None))
    )
    before, after = (sum(r.gradients for r in [run.start, *run.history]) for run in (tight, free))
    assert after <= 0.8 * before


def test_a_search_that_stalls_with_slack_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """SciPy gives up at once; the run takes the point again, exactly, and searches from there."""
    starts: list[object] = []

    def gives_up(function: object, start: object, **options: object) -> object:
        starts.append(start)
        after = options["after_step"]
        count = iter(range(2)) if len(starts) == 1 else iter(range(1000))
        options["after_step"] = lambda x: after(x) or next(count, None) is None  # type: ignore[operator]
        return minimize.lbfgs(function, start, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("bilevel.descent.far_lbfgs", gives_up)
    run = bilevel.solve(ridge(), "cg", steps=8)
    assert len(starts) == 2 and len(run.history) > 3
    assert [r.step for r in run.history] == list(range(1, len(run.history) + 1))
    assert all((r.inner_residual or 0.0) <= 1e-9 for r in run.history[2:]), "no slack from the second search on"


def test_slack_follows_the_error() -> None:
    exact = Certificate("exact", error=AIM)
    assert next_slack(50.0, exact) == 50.0
    assert next_slack(50.0, replace(exact, error=1e-9)) == 500.0
    assert next_slack(MOST, replace(exact, error=0.0)) == MOST
    assert next_slack(50.0, replace(exact, error=9e-4)) < 25.0
    assert next_slack(50.0, replace(exact, error=None)) == next_slack(50.0, Certificate("untrusted", error=0.1)) == 1.0


def test_an_untrusted_hypergradient_is_taken_again_with_less_slack() -> None:
    doubted = Certificate("untrusted", error=3e-3)
    assert tightened(1e4, doubted) == pytest.approx(1e4 * 0.1 / 3.0)
    assert tightened(2.0, doubted) == 1.0
    assert tightened(1.0, doubted) == pytest.approx(0.1 / 3.0)  # below the default tolerances, while that may help
    assert tightened(LEAST, doubted) is None
    assert tightened(1.0, replace(doubted, error=0.5)) is None
    assert tightened(1.0, replace(doubted, error=None)) is None


def test_a_tolerance_is_loosened_within_bounds() -> None:
    assert loosened(1e-9, 1e3, 1e-4) == pytest.approx(1e-6)
    assert loosened(1e-9, 1e7, 1e-4) == 1e-4
    assert loosened(1e-9, 1e-2, 1e-4) == pytest.approx(1e-11)
    assert loosened(1e-3, 10.0, 1e-4) == 1e-3
