"""Inner problems with kinks and bounds: other methods, whole runs, solutions that are off, and mistakes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Lasso
from torch import Tensor

import bilevel
from bilevel import inner, prox
from bilevel.testing import relative_error
from problems_proximal import DOUBLE, EXACT, Regression


@pytest.mark.parametrize("momentum", [None, 0.0, 0.9])
def test_unrolled_steps_come_to_the_implicit_hypergradient(momentum: float | None) -> None:
    data = Regression()
    penalty, lr = prox.L1(lambda h: h["l1"]), 1.0 / float(torch.linalg.eigvalsh(data.hessian())[-1])
    hparams = {"l1": bilevel.positive(0.1)}
    steps = inner.ProximalGradient(penalty, lr, momentum, steps=1500 if momentum == 0.0 else 600)
    unrolled = bilevel.hypergradient(data.problem(penalty, hparams, solver=steps), "unroll")
    truth = bilevel.hypergradient(data.problem(penalty, hparams))
    assert relative_error(unrolled.params, truth.params) < EXACT
    assert relative_error(unrolled.gradient, truth.gradient) < EXACT
    if momentum is None:
        return  # FISTA's momentum comes so close to 1 that the fixed-point iteration takes too many steps
    # The fixed point of such a step is the solution, so the method that differentiates it agrees.
    fixed = bilevel.hypergradient(data.problem(penalty, hparams, solver=steps), bilevel.FixedPoint(20_000, 1e-11))
    assert relative_error(fixed.gradient, truth.gradient) < EXACT


@pytest.mark.parametrize("method", sorted(bilevel.METHODS))
def test_every_method_is_right_about_a_lasso_or_says_that_it_is_not(method: str) -> None:
    data = Regression()
    hparams = {"l1": bilevel.positive(0.1)}
    penalty, lr = prox.L1(lambda h: h["l1"]), 1.0 / float(torch.linalg.eigvalsh(data.hessian())[-1])
    truth = bilevel.hypergradient(data.problem(penalty, hparams), "direct").gradient
    for solver in (inner.Proximal(penalty), inner.ProximalGradient(penalty, lr, momentum=0.8, steps=600)):
        problem = data.problem(None, hparams, solver=solver)
        try:
            found = bilevel.hypergradient(problem, method, on_untrusted="ignore")
        except bilevel.BilevelError as error:
            assert "ProximalGradient(" in str(error) or 'method="implicit"' in str(error)
            continue
        error_of = relative_error(found.gradient, truth)
        if found.certificate.verdict == "exact":
            assert error_of < 1e-3
        elif found.certificate.verdict == "approximate":
            assert error_of < 0.5


def test_a_short_unrolled_loop_has_the_gradient_of_its_differences_and_sees_its_learning_rate() -> None:
    data = Regression()
    hparams = {"l1": bilevel.positive(0.1), "lr": bilevel.positive(0.05)}
    steps = inner.ProximalGradient(prox.L1(lambda h: h["l1"]), lambda h: h["lr"], steps=12)
    problem = data.problem(None, hparams, solver=steps)
    check = bilevel.check_gradient(problem, "unroll")
    assert check.passed and abs(check.ratio - 1.0) < 1e-6


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scaling_the_problem_changes_nothing(scale: float) -> None:
    data = Regression(features=100)

    def at(unit: float) -> bilevel.Hypergradient:
        penalty = prox.L1(lambda h: unit * h)
        problem = data.problem(penalty, bilevel.positive(0.1), loss=lambda w, h: unit * data.inner(w, h))
        return bilevel.hypergradient(problem, "cg")

    plain, scaled = at(1.0), at(scale)
    assert relative_error(scaled.gradient, plain.gradient) < 1e-7  # CG stops at 1e-8
    assert scaled.certificate.verdict == "exact"
    assert plain.certificate.curvature is not None and scaled.certificate.curvature is not None
    assert scaled.certificate.curvature / scale == pytest.approx(plain.certificate.curvature, rel=1e-3)


@pytest.mark.parametrize("rtol", [1e-2, 1e-4, 1e-6])
def test_the_certificate_of_a_rough_solution_knows_its_error(rtol: float) -> None:
    data = Regression(features=100)
    solver = inner.Proximal(prox.L1(lambda h: h), rtol=rtol)
    truth = bilevel.hypergradient(data.problem(prox.L1(lambda h: h), bilevel.positive(0.1))).gradient
    problem = data.problem(None, bilevel.positive(0.1), solver=solver)
    found = bilevel.hypergradient(problem, on_untrusted="ignore")
    error = relative_error(found.gradient, truth)
    assert found.certificate.error is not None
    assert not found.certificate.trusted or error < 1e-3
    if found.certificate.trusted:
        assert error < 10.0 * found.certificate.error + 1e-9


def test_a_solution_from_elsewhere_is_taken_with_its_support() -> None:
    data = Regression(features=100)
    problem = data.problem(prox.L1(lambda h: h), bilevel.positive(0.1))
    ours = bilevel.hypergradient(problem)
    theirs = Lasso(alpha=0.1, fit_intercept=False, tol=1e-14, max_iter=10**6).fit(data.X.numpy(), data.y.numpy())
    found = bilevel.hypergradient(problem, params=torch.from_numpy(theirs.coef_))
    assert found.certificate.verdict == "exact"
    assert relative_error(found.gradient, ours.gradient) < EXACT


def test_held_weights_that_would_move_are_no_solution() -> None:
    data = Regression()
    problem = data.problem(prox.L1(lambda h: h), bilevel.positive(0.1))
    w = bilevel.hypergradient(problem).params.clone()
    w[w.abs().argmax()] = 0.0
    kept = w != 0  # solved without that weight: the gradient on the support is zero, and the weight is missed
    rest = (data.X.T @ data.y / len(data.y) - 0.1 * torch.sign(w))[kept]
    w[kept] = torch.linalg.solve(data.hessian()[kept][:, kept], rest)
    found = bilevel.hypergradient(problem, params=w, on_untrusted="ignore")
    assert found.certificate.verdict == "untrusted"
    assert "would leave it" in found.certificate.reasons[-1]
    assert "train the inner problem further" in found.certificate.reasons[-1]


@pytest.mark.parametrize(("margin", "told"), [(0.0, "reasons"), (1e-9, "notes"), (1e-3, "")])
def test_a_weight_between_held_and_free_is_told(margin: float, told: str) -> None:
    # Soft threshold of the target (3, 1) at 1 - margin or 1 + margin: the second weight is just released, or just held.
    for level in (1.0 - margin, 1.0 + margin):
        target = torch.tensor([3.0, 1.0], dtype=DOUBLE)
        problem = bilevel.BilevelProblem(
            lambda w, h, target=target: 0.5 * ((w - target) ** 2).sum(),
            lambda w, h: w.sum(),
            torch.zeros(2, dtype=DOUBLE),
            bilevel.positive(level),
            inner_solver=inner.Proximal(prox.L1(lambda h: h), rtol=1e-15),
        )
        found = bilevel.hypergradient(problem, on_untrusted="ignore")
        certificate = found.certificate
        assert certificate.trusted == (told != "reasons")
        spoken = {"reasons": certificate.reasons, "notes": certificate.notes}
        for kind, sentences in spoken.items():
            assert any("entry 1" in sentence for sentence in sentences) == (kind == told)
        # One side's slope: -1 with the second weight held, -2 with it free.
        assert min(abs(float(found.gradient) + 1.0), abs(float(found.gradient) + 2.0)) < EXACT


def test_solve_tunes_the_lasso_on_real_data() -> None:
    x, y = load_diabetes(return_X_y=True)
    x, y = torch.from_numpy((x - x.mean(0)) / x.std(0)), torch.from_numpy((y - y.mean()) / y.std())
    train, valid = slice(0, 300), slice(300, None)

    def problem(shape: tuple[int, ...]) -> bilevel.BilevelProblem:
        return bilevel.BilevelProblem(
            lambda w, h: 0.5 * ((x[train] @ w - y[train]) ** 2).mean(),
            lambda w, h: ((x[valid] @ w - y[valid]) ** 2).mean(),
            torch.zeros(10, dtype=DOUBLE),
            {"l1": bilevel.positive(0.02, shape=shape)},
            inner_solver=inner.Proximal(prox.L1(lambda h: h["l1"])),
        )

    def validation(level: float) -> float:
        theirs = Lasso(alpha=level, fit_intercept=False, tol=1e-12, max_iter=10**6)
        w = theirs.fit(x[train].numpy(), y[train].numpy()).coef_
        return float(((x[valid] @ torch.from_numpy(w) - y[valid]) ** 2).mean())

    single = bilevel.solve(problem(()))
    near = [validation(float(single.hparams["l1"]) * 2.0 ** (k / 20)) for k in range(-20, 21)]
    assert single.outer_loss <= min(near) * (1 + 1e-7)  # no better level within a factor of two
    assert single.certificate.trusted
    own = bilevel.solve(problem((10,)))
    assert own.outer_loss < single.outer_loss
    assert own.certificate.trusted


def test_another_tool_trains_and_we_differentiate() -> None:
    data = Regression()

    def fit(w: Tensor, h: Tensor) -> Tensor:
        model = Lasso(alpha=h.item(), fit_intercept=False, tol=1e-14, max_iter=10**6)
        return torch.from_numpy(model.fit(data.X.numpy(), data.y.numpy()).coef_)

    penalty = prox.L1(lambda h: h)
    found = bilevel.hypergradient(data.problem(None, bilevel.positive(0.1), solver=inner.Custom(fit, penalty=penalty)))
    truth = bilevel.hypergradient(data.problem(penalty, bilevel.positive(0.1)))
    assert relative_error(found.gradient, truth.gradient) < EXACT


@pytest.mark.parametrize("level", [0.03, 0.3, 3.0])
def test_an_undeclared_l1_is_untrusted_and_told_where_to_go(level: float) -> None:
    data = Regression()
    problem = bilevel.BilevelProblem(
        lambda w, h: data.inner(w, h) + h * w.abs().sum(), data.outer, data.start, bilevel.positive(level)
    )
    found = bilevel.hypergradient(problem, on_untrusted="ignore")
    assert found.certificate.verdict == "untrusted"
    assert "inner.Proximal" in found.certificate.reasons[-1]


def test_a_rough_smooth_solution_is_not_told_of_kinks() -> None:
    data = Regression()
    problem = bilevel.BilevelProblem(
        lambda w, h: data.inner(w, h) + h * (w**2).sum(),
        data.outer,
        data.start,
        bilevel.positive(0.1),
        inner_solver=inner.LBFGS(rtol=1e-30, max_steps=1),  # never converged
    )
    found = bilevel.hypergradient(problem, on_untrusted="ignore")
    assert not any("Proximal" in reason for reason in found.certificate.reasons)


@pytest.mark.parametrize("penalty", [prox.L1, prox.GroupL1])
def test_a_dry_run_finds_nothing_wrong(penalty: Callable[[Any], prox.Penalty]) -> None:
    data = Regression(features=10)
    report = bilevel.check(data.problem(penalty(lambda h: h), bilevel.positive(0.1)))
    assert report.findings == ()
    bounds = {"low": bilevel.real(-1.0), "high": bilevel.positive(1.0)}
    box = data.problem(prox.Box(lambda h: h["low"], lambda h: h["high"]), bounds)
    assert bilevel.check(box).findings == ()
    steps = inner.ProximalGradient(penalty(lambda h: h), lr=0.1, steps=10)
    assert bilevel.check(data.problem(None, bilevel.positive(0.1), solver=steps), "unroll").findings == ()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: inner.Proximal(wrong(prox.L1)), "the class L1"),
        (lambda: inner.Proximal([]), "empty list"),
        (lambda: inner.Proximal(wrong(0.1)), "expected a penalty of bilevel.prox"),
        (lambda: inner.ProximalGradient(prox.L1(0.1), lr=-1.0, steps=3), "`lr`"),
        (lambda: inner.ProximalGradient(prox.L1(0.1), lr=0.1), "`steps`"),
        (lambda: prox.GroupL1(1.0, wrong("row")), "`groups`"),
        (lambda: prox.GroupL1(1.0, torch.tensor([0.5])), "`groups`"),
        (lambda: solved(prox.L1(-1.0)), "strength` is -1"),
        (lambda: solved(prox.L1(math.nan)), "expected finite numbers"),
        (lambda: solved(prox.L1(wrong("much"))), "a str"),
        (lambda: solved(prox.L1(torch.ones(7))), "broadcasts to (20,)"),
        (lambda: solved(prox.L1(lambda h: None)), "returned a NoneType"),
        (lambda: solved(prox.Box(1.0, -1.0)), "`low` is above `high`"),
        (lambda: solved(prox.GroupL1(1.0, torch.zeros(3, dtype=torch.long))), "`groups` has shape (3,)"),
        (lambda: solved(prox.L1(1.0, on="weigth")), "no tensor of `params` is called so"),
        (lambda: solved([prox.L1(1.0), prox.NonNegative()]), "two penalties"),
    ],
)
def test_mistakes_are_named(make: Callable[[], Any], told: str) -> None:
    with pytest.raises(bilevel.BilevelError, match="(?s)" + re.escape(told)):
        make()


def wrong(value: Any) -> Any:
    """Return what a type checker would have caught."""
    return value


def solved(penalty: Any) -> bilevel.Hypergradient:
    data = Regression()
    return bilevel.hypergradient(data.problem(penalty, bilevel.positive(0.1)))


def test_minibatches_are_sent_to_steps() -> None:
    data = Regression()
    batches: Any = [(data.X[i : i + 10], data.y[i : i + 10]) for i in range(0, 50, 10)]
    problem = bilevel.BilevelProblem(
        lambda w, h, batch: ((batch[0] @ w - batch[1]) ** 2).mean(),
        data.outer,
        data.start,
        bilevel.positive(0.1),
        inner_solver=inner.Proximal(prox.L1(lambda h: h)),
        inner_data=torch.utils.data.DataLoader(batches, batch_size=None),
    )
    with pytest.raises(bilevel.InvalidValueError, match="ProximalGradient"):
        bilevel.hypergradient(problem)
