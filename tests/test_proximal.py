"""Inner problems with kinks and bounds against closed forms, dense solves and other tools.

A hypergradient on the support S of a lasso-like problem is  -∂R_S/∂λ · H_SS^-1 · ∂f/∂w_S,  dense here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.linear_model import ElasticNet, Lasso
from torch import Tensor

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
