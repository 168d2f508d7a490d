"""Inner problems with kinks and bounds against closed forms, dense solves and other tools.

A hypergradient on the support S of a lasso-like problem is  -∂R_S/∂λ · H_SS^-1 · ∂f/∂w_S,  dense here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear, nnls
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression
from torch import Tensor, nn

import bilevel
from bilevel import inner, prox
from bilevel.testing import relative_error
from problems_proximal import DOUBLE, EXACT, Regression

SOLVERS: list[Any] = [
    "implicit",
    "direct",
    bilevel.Implicit(bilevel.CG(rtol=1e-11)),
    bilevel.Implicit(bilevel.MINRES(rtol=1e-11)),
    bilevel.Implicit(bilevel.GMRES(rtol=1e-11)),
    bilevel.Implicit(bilevel.Neumann(max_steps=5000)),
    bilevel.FixedPoint(rtol=1e-12, max_steps=5000),
]


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
