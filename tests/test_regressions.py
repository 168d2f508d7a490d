"""Faults that reviews and users found, each with the input that showed it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from bilevel.operators import LinearOperator

torch.manual_seed(0)
X, Y = torch.randn(32, 3, dtype=torch.float64), torch.randn(32, dtype=torch.float64)


def quadratic(**changed: Any) -> bilevel.BilevelProblem:
    given: dict[str, Any] = {
        "inner_loss": lambda w, h: ((w - 1.0) ** 2).sum() + h * (w**2).sum(),
        "outer_loss": lambda w, h: ((w - 0.2) ** 2).sum(),
        "params": torch.zeros(2, dtype=torch.float64),
        "hparams": bilevel.positive(0.5),
    }
    return bilevel.BilevelProblem(**(given | changed))


@pytest.mark.parametrize("off", [0.98, 0.9998])
def test_the_smallest_curvature_is_seen_where_ones_are_orthogonal_to_it(off: float) -> None:
    matrix = torch.tensor([[1.0, off], [off, 1.0]], dtype=torch.float64)
    like = {"w": torch.zeros(2, dtype=torch.float64)}
    operator = LinearOperator(lambda v: {"w": matrix @ v["w"]}, like, symmetric=True)
    found = bilevel.Cholesky().solve(operator, {"w": torch.ones(2, dtype=torch.float64)}).curvature
    assert found is not None and abs(found - (1.0 - off)) < 1e-8


def test_a_large_offset_does_not_hide_an_inner_problem_that_is_not_trained() -> None:
    y = Y + 1e5
    start = {"w": torch.zeros(3, dtype=torch.float64), "b": torch.full((), 1e5, dtype=torch.float64)}

    def problem(solver: Any) -> bilevel.BilevelProblem:
        return bilevel.BilevelProblem(
            lambda p, h: ((X @ p["w"] + p["b"] - y) ** 2).mean() + h * (p["w"] ** 2).sum(),
            lambda p, h: ((X[:20] @ p["w"] + p["b"] - y[:20]) ** 2).mean(),
            start,
            bilevel.positive(0.5),
            inner_solver=solver,
        )

    truth = bilevel.hypergradient(problem(None), "direct").gradient
    rough = bilevel.hypergradient(problem(bilevel.inner.SGD(lr=0.1, steps=2)), on_untrusted="ignore")
    error = abs(float(rough.gradient / truth) - 1.0)
    assert error > 1e-3 and rough.certificate.verdict == "untrusted"
    assert rough.certificate.error is not None and 0.3 * error < rough.certificate.error < 3.0 * error


def test_a_fixed_point_iteration_that_only_grows_is_no_success() -> None:
    d = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    problem = quadratic(
        inner_loss=lambda w, h: 0.5 * (d * w * w).sum() - h * w.sum(), params=torch.zeros(3, dtype=torch.float64)
    )
    for method in (bilevel.FixedPoint(), bilevel.FixedPoint(max_steps=1)):
        found = bilevel.hypergradient(problem, method, params=0.5 / d, on_untrusted="ignore")
        assert found.certificate.verdict == "untrusted"


def test_a_learning_rate_has_no_path_to_a_fixed_point() -> None:
    problem = quadratic(
        inner_loss=lambda w, h: ((w - 1.0) ** 2).sum(), inner_solver=bilevel.inner.SGD(lr=lambda h: h, steps=60)
    )
    with pytest.raises(bilevel.UnseenHyperparameterError, match="learning rate"):
        bilevel.hypergradient(problem, "fixed-point")


def normalized(training_outside: bool) -> bilevel.BilevelProblem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)).double()
    return bilevel.BilevelProblem(
        lambda p, h: ((p.train()(X)[:, 0] - Y) ** 2).mean() + h * sum((t**2).sum() for t in p.parameters()),
        lambda p, h: ((p.train(training_outside)(X[:16])[:, 0] - Y[:16]) ** 2).mean(),
        model,
        bilevel.positive(0.01),
        inner_solver=bilevel.inner.SGD(lr=0.1, steps=5),
    )


@pytest.mark.parametrize("training_outside", [True, False])
def test_running_statistics_in_the_outer_loss_are_flagged(training_outside: bool) -> None:
    found = bilevel.hypergradient(normalized(training_outside), "unroll", on_untrusted="ignore")
    assert found.certificate.trusted == training_outside
    assert any("buffers" in reason for reason in found.certificate.reasons) == (not training_outside)


def test_a_solution_carries_the_buffers_of_its_own_point() -> None:
    problem = normalized(False)
    solution = bilevel.solve(problem, "unroll", steps=3, on_untrusted="ignore")
    loss = ((solution.params.eval()(X[:16])[:, 0] - Y[:16]) ** 2).mean()
    assert abs(float(loss.detach()) - solution.outer_loss) < 1e-12


def minibatches(**length: Any) -> bilevel.BilevelProblem:
    def loss(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        seen.append(float(batch[1][0]))
        value: Tensor = ((batch[0] @ w - batch[1]) ** 2).mean() + h * (w**2).sum()
        return value

    seen: list[float] = []
    problem = bilevel.BilevelProblem(
        loss,
        lambda w, h: (w**2).sum(),
        torch.zeros(3, dtype=torch.float64),
        bilevel.positive(0.1),
        inner_solver=bilevel.inner.SGD(lr=0.01, **length),
        inner_data=DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True),
    )
    problem.seen = seen  # type: ignore[attr-defined]
    return problem


def test_an_epoch_is_one_pass_over_all_rows() -> None:
    problem = minibatches(epochs=1)
    for _ in range(3):
        problem.seen.clear()  # type: ignore[attr-defined]
        bilevel.hypergradient(problem, "unroll")
        trained = problem.seen[:4]  # type: ignore[attr-defined]
        assert len(set(trained)) == 4  # four batches of eight: all 32 rows, none twice


def test_the_same_seed_gives_the_same_result_on_one_problem() -> None:
    problem = minibatches(steps=6)
    first, second = (bilevel.solve(problem, "unroll", steps=3, seed=4) for _ in range(2))
    assert torch.equal(first.hparams, second.hparams)


def test_a_run_begins_where_the_user_said() -> None:
    problem = quadratic(hparams=bilevel.interval(1e-8, 0.0, 1.0))
    solution = bilevel.solve(problem, steps=1)
    assert abs(solution.start.hparams["hparams"][0] / 1e-8 - 1.0) < 1e-6  # sigmoid and logit round
    with pytest.raises(bilevel.InvalidValueError, match="float64"):
        quadratic(params=torch.zeros(2), hparams=bilevel.positive(1e-50))


def test_a_callback_cannot_end_a_run_unnoticed() -> None:
    def stop(record: bilevel.Record) -> None:
        raise StopIteration

    with pytest.raises(RuntimeError, match="StopIteration"):
        bilevel.solve(quadratic(), callbacks=[stop])


def test_a_detached_loss_is_asked_about() -> None:
    problem = quadratic(inner_loss=lambda w, h: ((w.detach() - 1.0) ** 2).sum() + h * (w**2).sum())
    assert "detached" in bilevel.solve(problem, on_untrusted="ignore").status


def test_a_point_is_accepted_once() -> None:
    """Two inner minima: training again from another start would give the same point another outer loss."""
    problem = quadratic(
        inner_loss=lambda w, h: ((w**2 - 1.0) ** 2).sum() + 0.1 * h * w.sum(),
        outer_loss=lambda w, h: ((w - 0.9) ** 2).sum(),
        params=torch.full((2,), 0.1, dtype=torch.float64),
        hparams=torch.tensor(0.3, dtype=torch.float64),
    )
    history = bilevel.solve(problem, on_untrusted="ignore").history
    points = [record.hparams["hparams"][0] for record in history]
    assert len(set(points)) == len(points)
