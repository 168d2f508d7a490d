"""Inner problems with kinks and bounds against closed forms, dense solves and other tools.

A hypergradient on the support S of a lasso-like problem is  -∂R_S/∂λ · H_SS^-1 · ∂f/∂w_S,  dense here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear, nnls
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression
from torch import Tensor, nn

import bilevel
from bilevel import inner, prox
from bilevel.testing import relative_error

DOUBLE = torch.float64
EXACT = 1e-8
SOLVERS: list[Any] = [
    "implicit",
    "direct",
    bilevel.Implicit(bilevel.CG(rtol=1e-11)),
    bilevel.Implicit(bilevel.MINRES(rtol=1e-11)),
    bilevel.Implicit(bilevel.GMRES(rtol=1e-11)),
    bilevel.Implicit(bilevel.Neumann(max_steps=5000)),
    bilevel.FixedPoint(rtol=1e-12, max_steps=5000),
]


class Regression:
    """Least squares with correlated features, a few of which matter; half the mean of squares, as in scikit-learn."""

    def __init__(self, rows: int = 50, features: int = 20, seed: int = 0) -> None:
        data = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=data, dtype=DOUBLE)

        truth = torch.zeros(features, dtype=DOUBLE)
        truth[:5] = torch.tensor([3.0, -2.0, 1.5, 1.0, -1.0])[:features]
        self.X, self.Xv = (x + 0.5 * x.roll(1, 1) for x in (normal(rows, features), normal(rows, features)))
        self.y, self.yv = self.X @ truth + normal(rows), self.Xv @ truth + normal(rows)
        self.start = torch.zeros(features, dtype=DOUBLE)

    def inner(self, w: Tensor, h: Any) -> Tensor:
        return 0.5 * ((self.X @ w - self.y) ** 2).mean()

    def outer(self, w: Tensor, h: Any) -> Tensor:
        return ((self.Xv @ w - self.yv) ** 2).mean()

    def problem(self, penalty: Any, hparams: Any, **given: Any) -> bilevel.BilevelProblem:
        loss = given.pop("loss", self.inner)
        solver = given.pop("solver", None) or inner.Proximal(penalty)
        return bilevel.BilevelProblem(loss, self.outer, self.start, hparams, inner_solver=solver)

    def hessian(self) -> Tensor:
        return self.X.T @ self.X / len(self.y)

    def slope(self, w: Tensor) -> Tensor:
        """∂f/∂w."""
        return 2.0 * self.Xv.T @ (self.Xv @ w - self.yv) / len(self.yv)

    def adjoint(self, w: Tensor, free: Tensor, curvature: Tensor | float = 0.0) -> Tensor:
        """Return (H + curvature)_SS^-1 ∂f/∂w_S, zero where not free."""
        hessian = (self.hessian() + curvature)[free][:, free]
        v = torch.zeros_like(w)
        v[free] = torch.linalg.solve(hessian, self.slope(w)[free])
        return v


def orthonormal(method: Any, level: float) -> tuple[Tensor, bilevel.Hypergradient]:
    """Return the target of the lasso with an identity design, whose solution is the soft threshold, and the answer."""
    target = torch.tensor([3.0, -2.0, 0.4, -0.1, 0.0], dtype=DOUBLE)
    problem = bilevel.BilevelProblem(
        lambda w, h: 0.5 * ((w - target) ** 2).sum(),
        lambda w, h: 0.5 * ((w - 1.0) ** 2).sum(),
        torch.zeros(5, dtype=DOUBLE),
        bilevel.positive(level),
        inner_solver=inner.Proximal(prox.L1(lambda h: h)),
    )
    return target, bilevel.hypergradient(problem, method)


@pytest.mark.parametrize("method", SOLVERS, ids=str)
def test_an_orthonormal_lasso_is_the_soft_threshold(method: Any) -> None:
    target, found = orthonormal(method, 0.5)
    w = torch.sign(target) * (target.abs() - 0.5).relu()
    assert relative_error(found.params, w) < EXACT
    support = w != 0
    assert torch.equal(found.params != 0, support)
    assert relative_error(found.gradient, -(torch.sign(target) * (w - 1.0))[support].sum()) < EXACT
    assert found.certificate.verdict in ("exact", "approximate")


@pytest.mark.parametrize("method", SOLVERS, ids=str)
def test_with_everything_held_the_hypergradient_is_zero(method: Any) -> None:
    _, found = orthonormal(method, 10.0)
    assert not found.params.any()
    assert float(found.gradient) == 0.0


@pytest.mark.parametrize("features", [20, 200], ids=["p < n", "p > n"])
@pytest.mark.parametrize("method", SOLVERS[:-2], ids=str)
def test_lasso_is_that_of_scikit_learn_and_of_the_dense_formula(method: Any, features: int) -> None:
    data = Regression(features=features)
    found = bilevel.hypergradient(data.problem(prox.L1(lambda h: h), bilevel.positive(0.1)), method)
    theirs = Lasso(alpha=0.1, fit_intercept=False, tol=1e-14, max_iter=10**6).fit(data.X.numpy(), data.y.numpy())
    assert relative_error(found.params, torch.from_numpy(theirs.coef_)) < EXACT
    w = found.params
    v = data.adjoint(w, w != 0)
    assert relative_error(found.gradient, -torch.sign(w) @ v) < EXACT
    assert found.certificate.verdict == "exact"
    smallest = torch.linalg.eigvalsh(data.hessian()[w != 0][:, w != 0])[0]
    assert found.certificate.curvature is not None
    # That of the support, not of the singular whole: a few Lanczos steps see it to a factor.
    assert float(smallest) * 0.999 < found.certificate.curvature < 10.0 * float(smallest)


def test_elastic_net_is_that_of_scikit_learn_and_of_the_dense_formula() -> None:
    data = Regression(features=100)
    alpha, ratio = 0.2, 0.7
    hparams = {"alpha": bilevel.positive(alpha), "ratio": bilevel.interval(ratio, 0.0, 1.0)}
    penalty = prox.ElasticNet(lambda h: h["alpha"] * h["ratio"], lambda h: h["alpha"] * (1.0 - h["ratio"]))
    found = bilevel.hypergradient(data.problem(penalty, hparams))
    w = found.params
    theirs = ElasticNet(alpha=alpha, l1_ratio=ratio, fit_intercept=False, tol=1e-14, max_iter=10**6)
    assert relative_error(w, torch.from_numpy(theirs.fit(data.X.numpy(), data.y.numpy()).coef_)) < EXACT
    v = data.adjoint(w, w != 0, alpha * (1.0 - ratio) * torch.eye(100, dtype=DOUBLE))
    truth = {
        "alpha": -(ratio * torch.sign(w) + (1.0 - ratio) * w) @ v,
        "ratio": -alpha * (torch.sign(w) - w) @ v,
    }
    assert relative_error(found.gradient, truth) < EXACT


def test_a_strength_for_every_entry() -> None:
    data = Regression()
    strengths = 0.02 * torch.arange(1.0, 21.0, dtype=DOUBLE)
    found = bilevel.hypergradient(data.problem(prox.L1(lambda h: h), bilevel.positive(strengths)))
    w = found.params
    assert 0 < int((w == 0).sum()) < 20
    assert relative_error(found.gradient, -torch.sign(w) * data.adjoint(w, w != 0)) < EXACT
    # Optimality itself: the gradient is -strength * sign on the support, and below strength off it.
    g = data.X.T @ (data.X @ w - data.y) / len(data.y)
    assert torch.allclose(g[w != 0], -(strengths * torch.sign(w))[w != 0], rtol=0, atol=1e-9)
    assert bool((g.abs() <= strengths + 1e-9).all())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(3, 30),
    features=st.integers(1, 40),
    part=st.floats(0.02, 0.9),
    l2=st.sampled_from([0.0, 1e-3, 1.0]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 10**6),
)
def test_random_designs(rows: int, features: int, part: float, l2: float, scale: float, seed: int) -> None:
    data = Regression(rows, features, seed)
    largest = float((data.X.T @ data.y / rows).abs().max())
    l1, unit = part * largest, torch.tensor(scale, dtype=DOUBLE)
    hparams = {"l1": bilevel.positive(l1), "l2": torch.tensor(l2, dtype=DOUBLE)}
    problem = data.problem(
        prox.ElasticNet(lambda h: unit * h["l1"], lambda h: unit * h["l2"]),
        hparams,
        loss=lambda w, h: unit * data.inner(w, h),
    )
    found = bilevel.hypergradient(problem, "direct", on_untrusted="ignore")
    w = found.params
    g = data.X.T @ (data.X @ w - data.y) / rows + l2 * w
    free = w != 0
    assume(bool(free.any()))
    assert float((g + l1 * torch.sign(w))[free].abs().max()) <= 1e-9 * largest
    assert float(g.abs().max()) <= l1 + 1e-9 * largest
    hessian = (data.hessian() + l2 * torch.eye(features, dtype=DOUBLE))[free][:, free]
    condition = float(torch.linalg.cond(hessian))
    assume(condition < 1e8)
    v = data.adjoint(w, free, l2 * torch.eye(features, dtype=DOUBLE))
    truth = {"l1": -torch.sign(w) @ v, "l2": -w @ v}
    # The inner residual is 1e-10; its error in w grows with the condition.
    assert relative_error(found.gradient, truth) < 1e-9 * max(10.0, condition)


def test_group_lasso_is_that_of_the_dense_equations() -> None:
    data = Regression(features=30)
    labels = torch.arange(30) // 3
    strengths = 0.1 * torch.linspace(0.5, 2.0, 10, dtype=DOUBLE)
    problem = data.problem(prox.GroupL1(lambda h: h, groups=labels), bilevel.positive(strengths))
    found = bilevel.hypergradient(problem)
    w = found.params.clone()
    norms = torch.stack([w[labels == k].norm() for k in range(10)])
    assert 0 < int((norms > 0).sum()) < 10
    free = (norms > 0)[labels]

    def equations(w_free: Tensor, levels: Tensor) -> Tensor:
        whole = torch.eye(30, dtype=DOUBLE)[:, free] @ w_free
        g = data.X.T @ (data.X @ whole - data.y) / len(data.y)
        unit = torch.cat(
            [whole[labels == k] / whole[labels == k].norm() * levels[k] for k in range(10) if norms[k] > 0]
        )
        return g[free] + unit

    at = (w[free], strengths)
    assert float(equations(*at).norm()) < 1e-9
    g = data.X.T @ (data.X @ w - data.y) / len(data.y)
    held = [k for k in range(10) if norms[k] == 0]
    assert all(float(g[labels == k].norm()) <= float(strengths[k]) for k in held)
    by_w, by_level = torch.func.jacrev(equations, argnums=(0, 1))(*at)
    truth = -by_level.T @ torch.linalg.solve(by_w.T, data.slope(w)[free])
    assert relative_error(found.gradient, truth) < EXACT
    assert found.certificate.verdict == "exact"
    assert bilevel.check_gradient(problem).passed


@pytest.mark.parametrize("groups", ["rows", "columns", "tensor"])
def test_named_groups_are_those_of_explicit_numbers(groups: Any) -> None:
    w = torch.arange(6.0, dtype=DOUBLE).reshape(2, 3)
    labels = {"rows": [[0, 0, 0], [1, 1, 1]], "columns": [[0, 1, 2], [0, 1, 2]], "tensor": [[0, 0, 0], [0, 0, 0]]}
    named, numbered = prox.GroupL1(1.5, groups), prox.GroupL1(1.5, torch.tensor(labels[groups]))
    assert torch.equal(named.prox(w, 0.5), numbered.prox(w, 0.5))
    norms = {"rows": w.norm(dim=1), "columns": w.norm(dim=0), "tensor": w.norm()}
    assert float(named.value(w)) == pytest.approx(1.5 * float(norms[groups].sum()), rel=1e-14)


@pytest.mark.parametrize("penalty", [prox.L1(0.7), prox.ElasticNet(0.7, 0.3), prox.GroupL1(0.7), prox.Box(-0.5, 0.4)])
def test_a_prox_is_the_minimizer_that_it_should_be(penalty: prox.Penalty) -> None:
    data = torch.Generator().manual_seed(0)
    v = torch.randn(6, 2, generator=data, dtype=DOUBLE)
    found, step = penalty.prox(v, 0.8), 0.8

    def objective(x: Tensor) -> float:
        return float(penalty.value(x) + ((x - v) ** 2).sum() / (2 * step))

    for _ in range(100):  # no feasible point near or far is better; x -> prox(x, 0) puts it into a box
        length = 10.0 ** float(-4 * torch.rand(1, generator=data))
        trial = penalty.prox(found + length * torch.randn(6, 2, generator=data, dtype=DOUBLE), 0.0)
        assert objective(trial) >= objective(found) * (1 - 1e-14)


def test_nonnegative_least_squares_is_that_of_scipy_and_of_the_dense_formula() -> None:
    data = Regression()
    penalty = prox.NonNegative()
    problem = data.problem(penalty, bilevel.positive(1e-3), loss=lambda w, h: data.inner(w, h) + 0.5 * h * (w**2).sum())
    found = bilevel.hypergradient(problem)
    w, eye = found.params, torch.eye(20, dtype=DOUBLE)
    stacked = torch.cat([data.X / len(data.y) ** 0.5, 1e-3**0.5 * eye])
    theirs, _ = nnls(stacked.numpy(), torch.cat([data.y / len(data.y) ** 0.5, torch.zeros(20, dtype=DOUBLE)]).numpy())
    assert relative_error(w, torch.from_numpy(theirs)) < EXACT
    assert 0 < int((w == 0).sum()) < 20
    assert relative_error(found.gradient, -w @ data.adjoint(w, w > 0, 1e-3 * eye)) < EXACT


def test_bounds_that_are_hyperparameters_carry_their_weights_along() -> None:
    data = Regression()
    hparams = {"low": bilevel.real(torch.full((20,), -0.7, dtype=DOUBLE)), "high": bilevel.positive(0.9)}
    problem = data.problem(prox.Box(lambda h: h["low"], lambda h: h["high"]), hparams)
    for method in ("direct", "cg"):
        found = bilevel.hypergradient(problem, method)
        w = found.params
        theirs = lsq_linear(data.X.numpy(), data.y.numpy(), (-0.7, 0.9), tol=1e-14, method="bvls").x
        assert relative_error(w, torch.from_numpy(theirs)) < EXACT
        low, high = w == -0.7, w == 0.9
        assert int(low.sum()) > 0 and int(high.sum()) > 0 and int((low | high).sum()) < 20
        # A bound moves its own weight, and the free ones answer: dw_free = -H_ff^-1 H_fb db.
        moved = data.slope(w) - data.hessian() @ data.adjoint(w, ~(low | high))
        truth = {"low": torch.where(low, moved, 0.0), "high": moved[high].sum()}
        assert relative_error(found.gradient, truth) < EXACT
        assert found.certificate.verdict == "exact"


class Classifier:
    """Two classes by a linear module; the penalty is on its weight and not on its bias."""

    def __init__(self, dtype: torch.dtype = DOUBLE) -> None:
        data = Regression()
        self.X, self.Xv = data.X.to(dtype), data.Xv.to(dtype)
        self.labels, self.labels_v = (data.y > 0).to(dtype), (data.yv > 0).to(dtype)
        self.module = nn.Linear(20, 1, dtype=dtype)

    def problem(self, penalty: prox.Penalty, strength: float) -> bilevel.BilevelProblem:
        loss = nn.functional.binary_cross_entropy_with_logits
        return bilevel.BilevelProblem(
            lambda m, h: loss(m(self.X).squeeze(1), self.labels),
            lambda m, h: loss(m(self.Xv).squeeze(1), self.labels_v),
            self.module,
            {"l1": bilevel.positive(strength)},
            inner_solver=inner.Proximal(penalty),
        )


def test_sparse_logistic_regression_is_that_of_scikit_learn_and_of_finite_differences() -> None:
    case = Classifier()
    problem = case.problem(prox.L1(lambda h: h["l1"], on="weight"), 0.03)
    found = bilevel.hypergradient(problem)
    theirs = LogisticRegression(l1_ratio=1.0, C=1.0 / (0.03 * 50), solver="saga", tol=1e-10, max_iter=100_000)
    theirs.fit(case.X.numpy(), case.labels.numpy())
    assert relative_error(found.params.weight, torch.from_numpy(theirs.coef_)) < 1e-6  # saga stops at its tol
    assert relative_error(found.params.bias, torch.from_numpy(theirs.intercept_)) < 1e-6
    assert 0 < int((found.params.weight == 0).sum()) < 20
    assert found.certificate.verdict == "exact"
    check = bilevel.check_gradient(problem)
    assert check.passed and abs(check.ratio - 1.0) < 1e-6  # the differences' own accuracy


def test_float32_ends_at_its_own_precision() -> None:
    case, wide = Classifier(torch.float32), Classifier()
    penalty = prox.L1(lambda h: h["l1"], on="weight")
    found = bilevel.hypergradient(case.problem(penalty, 0.03))
    truth = bilevel.hypergradient(wide.problem(penalty, 0.03))
    assert found.certificate.verdict == "exact"
    assert relative_error(found.gradient["l1"].double(), truth.gradient["l1"]) < 1e-3  # what "exact" promises


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
