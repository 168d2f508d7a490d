"""`bilevel.check`: what works is left alone; methods, losses and what they use."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from bilevel import inner
from bilevel.solvers import estimator
from bilevel.solvers.about import about
from bilevel.testing import known_problems
from problems_preflight import METHODS, XV, YV, X, Y, findings, only, problem_of, train

SEES_LOSSES_ALONE = [m for m in METHODS if about(estimator(m)).sees == "losses"]


# What works


@pytest.mark.parametrize("known", known_problems(), ids=lambda known: known.name)
@pytest.mark.parametrize("method", ["implicit", "cg", "fixed-point", "unroll", "truncated"])
def test_nothing_is_found_on_healthy_problems(known: Any, method: str) -> None:
    problem = known.problem(inner.SGD(lr=0.05, steps=30) if method in ("unroll", "truncated") else None)
    found = findings(problem, method)
    if known.name == "softmax regression, free bias" and method not in ("unroll", "truncated"):
        assert [f.message.split()[:4] for f in found] == [["has", "directions", "without", "curvature"]]
        return
    # Twenty weights and thirty examples inside of closures: nobody sees how many there are.
    assert not [f for f in found if f.level != "note"], found
    assert bilevel.check(problem, method).ok


def test_a_report_is_a_table_and_data() -> None:
    solver = inner.SGD(lr=lambda h: h["lr"], steps=10)
    hparams = {"l2": bilevel.positive(0.1), "lr": bilevel.positive(0.01)}
    problem = problem_of(lambda w, h: train(w, h["l2"]), hparams=hparams, inner_solver=solver)
    report = bilevel.check(problem)
    text = str(report)
    assert not report.ok and text.startswith("NOT OK: 1 error")
    assert "hparams['lr']" in text and '-> method="unroll"' in text and "inner gradient" in text
    assert max(map(len, text.splitlines()[3:])) <= 120
    data = json.loads(json.dumps(report.to_dict()))
    assert data["ok"] is False and data["findings"][0]["subject"] == "hparams['lr']"
    assert data["costs"]["product_ms"] > 0.0
    assert bilevel.check(problem).findings == report.findings


def sweep(window: int, before: int) -> int:
    """Products of a truncated sweep: its window, up to 8 steps before it five times each, and 10 more for the tail."""
    return window + 5 * min(8, before) + 10


def test_costs_are_counted() -> None:
    solver = inner.SGD(lr=0.1, steps=10)
    costs = bilevel.check(problem_of(inner_solver=solver), "unroll").costs
    assert (costs.gradients, costs.products) == (10, 10)
    assert bilevel.check(problem_of(inner_solver=solver), bilevel.Truncated(steps=4)).costs.products == sweep(4, 6)
    # A step holds a handful of vectors of 20 (residuals) and of 4 (variables).
    assert costs.megabytes is not None and 10 * 24 * 8 / 1e6 < costs.megabytes < 10 * 24 * 8 * 10 / 1e6
    costs = bilevel.check(problem_of(), "direct").costs
    assert (costs.gradients, costs.products) == (None, 4)
    for time in (costs.inner_gradient_ms, costs.product_ms, costs.outer_gradient_ms):
        assert time is not None and 0.0 < time < 1e3


@pytest.mark.parametrize("method", ["implicit", "unroll"])
def test_the_users_things_are_as_before(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1)).double()
    own = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True, generator=own)
    problem = problem_of(
        lambda m, h, batch: ((m(batch[0])[:, 0] - batch[1]) ** 2).mean() + h * m[0].weight.square().sum(),
        lambda m, h, batch: ((m(batch[0])[:, 0] - batch[1]) ** 2).mean(),
        model,
        inner_solver=inner.SGD(lr=0.01, steps=5),
        inner_data=loader,
        outer_data=(XV, YV),
    )
    problem.inner_batches.draw()
    problem.inner_batches.draw()
    position = problem.position()
    third = problem.inner_batches.draw()[0]
    problem.go_to(position)
    inside = problem.params.buffers()
    random, state = torch.get_rng_state(), {name: t.clone() for name, t in model.state_dict().items()}
    bilevel.check(problem, method)
    assert torch.equal(random, torch.get_rng_state())
    assert model.training and all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(t, inside[name]) for name, t in problem.params.buffers().items())
    assert torch.equal(problem.inner_batches.draw()[0], third)
    problem.go_to(position)


def test_nothing_is_trained() -> None:
    calls = 0

    def fit(w: Tensor, h: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return w

    for method in ("implicit", "unroll", "fixed-point"):
        bilevel.check(problem_of(inner_solver=fit), method)
    assert calls == 0


# Methods, losses, and what they use


def test_a_wrong_problem_is_raised_and_a_wrong_method_found() -> None:
    with pytest.raises(TypeError, match="BilevelProblem"):
        bilevel.check(train)  # type: ignore[arg-type]
    for method in ("newton", bilevel.Implicit, 3):
        found = only(problem_of(), method)
        assert (found.level, found.subject) == ("error", "method") and "implicit" in found.remedy.lower()


def no_return(w: Tensor, h: Tensor) -> None:
    pass


def with_a_bug(w: Tensor, h: dict[str, Tensor]) -> Tensor:
    return (w * h["l3"]).sum()


@pytest.mark.parametrize(
    ("loss", "message", "remedy"),
    [
        (no_return, "returned a NoneType", "return statement"),
        (lambda w, h: (w * h) ** 2, r"shape \(4,\)", "mean"),
        (lambda w, h: (w * h).sum() / 0.0, "is .*nan|is inf|is -inf", ""),
        (lambda w, h: h * torch.tensor([1.0]).double()[5], r"IndexError: .*\(in <lambda>, test_preflight.py", ""),
        (lambda w, h: torch.ones(3) @ w, "RuntimeError: .*", "mend"),
        (lambda w, h: w.detach().sum() * h, "params", "do not detach them"),
    ],
)
@pytest.mark.parametrize("role", ["inner_loss", "outer_loss"])
def test_a_loss_that_fails_is_an_error(role: str, loss: Any, message: str, remedy: str) -> None:
    problem = problem_of(**{role: loss})
    for method in ("implicit", "cg"):
        errors = [f for f in findings(problem, method, "error") if f.subject == role]
        assert len(errors) == 1, errors
        assert re.search(message, errors[0].message), errors[0]
        assert remedy in errors[0].remedy


def test_a_gradient_that_is_not_finite_is_named() -> None:
    params = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.ones(2, dtype=torch.float64)}
    problem = problem_of(
        lambda p, h: p["a"].norm() * 0.0 + p["a"].abs().sqrt().sum() + h * (p["b"] ** 2).sum(),
        lambda p, h: p["b"].sum() + p["a"].sum(),
        params,
    )
    found = only(problem)
    assert found.level == "error" and "params['a']" in found.message and "params['b']" not in found.message


def test_a_second_derivative_that_is_not_finite_is_found() -> None:
    params = torch.zeros(2, dtype=torch.float64)
    problem = problem_of(lambda w, h: (w.abs() ** 1.5).sum() + h * w.sum(), lambda w, h: w.sum(), params)
    assert [f.message for f in findings(problem, "implicit", "error") if "second derivative" in f.message]


def test_unused_params_are_named() -> None:
    params = {name: torch.ones(2, dtype=torch.float64) for name in ("used", "idle", "wanted")}
    problem = problem_of(
        lambda p, h: h * (p["used"] ** 2).sum(),
        lambda p, h: (p["used"] * p["wanted"]).sum(),
        params,
        inner_solver=inner.SGD(lr=0.1, steps=3),
    )
    found = {f.subject: f.level for f in findings(problem, "implicit") if "does not use it" in f.message}
    assert found == {"params['idle']": "warning", "params['wanted']": "error"}
    found = {f.subject: f.level for f in findings(problem, "unroll")}
    assert found == {"params['idle']": "warning", "params['wanted']": "warning"}


def test_an_outer_loss_without_params_is_an_error() -> None:
    found = only(problem_of(outer_loss=lambda w, h: h**2))
    assert (found.level, found.subject) == ("error", "outer_loss") and "does not depend on params" in found.message
    # Stationary is not independent.
    assert bilevel.check(problem_of(outer_loss=lambda w, h: (w - w.detach()).square().sum())).ok


def test_hyperparameters_that_nobody_uses_are_errors() -> None:
    hparams = {"l2": bilevel.positive(0.1), "idle": bilevel.positive(1.0), "constant": bilevel.positive(1.0)}
    problem = problem_of(
        lambda w, h: train(w, h["l2"]) + h["constant"] ** 2, hparams=hparams, inner_solver=inner.SGD(lr=0.1, steps=3)
    )
    for method in METHODS:
        found = {f.subject: f for f in findings(problem, method, "error")}
        assert sorted(found) == ["hparams['constant']", "hparams['idle']"], method
        assert "no path" in found["hparams['idle']"].message
        with pytest.raises(bilevel.UnseenHyperparameterError):
            bilevel.hypergradient(problem, method)


SETTINGS: dict[str, Any] = {
    "lr": inner.SGD(lr=lambda h: h["s"], steps=12),
    "late": inner.SGD(lr=lambda h, step: h["s"] if step == 11 else 0.1, steps=12),
    "momentum": inner.SGD(lr=0.1, momentum=lambda h: h["s"], steps=12),
    "adam": inner.Adam(lr=lambda h: h["s"], steps=12),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_of_the_inner_solver_needs_unrolling(name: str) -> None:
    hparams = {"l2": bilevel.positive(0.1), "s": bilevel.positive(0.05)}
    problem = problem_of(lambda w, h: train(w, h["l2"]), hparams=hparams, inner_solver=SETTINGS[name])
    for method in SEES_LOSSES_ALONE:
        (found,) = findings(problem, method, "error")
        assert (found.level, found.subject) == ("error", "hparams['s']") and "unroll" in found.remedy
    found = only(problem, "fixed-point")
    assert found.level == "note" and "unroll" in found.remedy
    assert not findings(problem, "unroll")


def test_what_ones_own_loop_uses_is_not_known() -> None:
    hparams = {"l2": bilevel.positive(0.1), "s": bilevel.positive(0.05)}
    problem = problem_of(lambda w, h: train(w, h["l2"]), hparams=hparams, inner_solver=lambda w, h: w - h["s"] * w)
    assert only(problem, "implicit").level == "error" and "graph" in only(problem, "implicit").remedy
    assert only(problem, "unroll").level == "note"
