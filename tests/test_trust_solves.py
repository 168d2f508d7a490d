"""A hypergradient is right, or it says that it is not: traps of the linear system and of its solvers, by name."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import bilevel
from benchmarks.problems import Dice
from bilevel import CG, GMRES, MINRES, BilevelProblem, Cholesky, Implicit, Neumann
from bilevel.evaluation import Evaluator
from bilevel.solvers.linear import LinearSolution
from bilevel.testing import KnownProblem, relative_error
from problems import PROBLEMS, RIDGE
from problems_trust import D, at, quadratic


@pytest.mark.parametrize("method", ["cg", "minres", "gmres", "direct", "neumann", "fixed-point"])
@pytest.mark.parametrize("c", [1e-6, 1.0, 2.0])
def test_a_multiple_of_the_identity(method: str, c: float) -> None:
    """Conjugate gradients converge in one step; some return the iterate before it, zero."""
    problem, point = quadratic([c] * 5)
    found = at(problem, method, point)
    # F = |h w1 - t|^2 / 2 at w* = h w1: dF/dh = (w1 - t)·w1.
    (expected,) = torch.autograd.grad(problem.outer_loss(x := point.clone().requires_grad_(), None), x)
    assert float(found.gradient) == pytest.approx(float(expected @ point), rel=1e-8)
    assert found.certificate.verdict == "exact"


@pytest.mark.parametrize("method", ["cg", "minres", "gmres", "direct"])
def test_coupled_tensors_and_0_d_ones(method: str) -> None:
    """Diagonal blocks of the Hessian alone were 57 % off in another library, and 0-d variables gave 0."""
    known = PROBLEMS["coupled quadratic"]
    found = at(known.problem(), method)
    assert relative_error(found.gradient, known.truth.gradient) <= 1e-6
    assert found.certificate.verdict == "exact"
    scalar = BilevelProblem(
        lambda w, h: (w - 1.0) ** 2 + h * w**2, lambda w, h: w**2, torch.zeros((), dtype=D), bilevel.positive(1.0)
    )
    assert float(at(scalar, method).gradient) == pytest.approx(-0.25, rel=1e-8)  # d/dh (1 + h)^-2


@pytest.mark.parametrize("solver", [CG(), GMRES(), Neumann(), Cholesky(), MINRES()])
def test_a_saddle_is_untrusted(solver: Any) -> None:
    problem, point = quadratic([1.0, 0.6, 0.3, -0.2, -0.7])
    certificate = at(problem, Implicit(solver), point).certificate
    assert certificate.verdict == "untrusted"
    assert certificate.reasons
    if not isinstance(solver, Neumann):  # its series grows along that direction, which says it sooner
        assert "no strict minimum" in certificate.reasons[0]
        assert certificate.curvature is not None
        assert certificate.curvature < 0.0


def test_cg_turns_to_minres_on_negative_curvature_and_says_so() -> None:
    problem, point = quadratic([1.0, 0.6, 0.3, -0.2, -0.7])
    cg, direct = (at(problem, Implicit(solver), point) for solver in (CG(), Cholesky()))
    assert cg.certificate.notes == ("CG met nonpositive curvature; MINRES solved the same system",)
    # The formula needs an invertible Hessian only, so the numbers still are those of a dense solve.
    assert relative_error(cg.gradient, direct.gradient) <= 1e-6


@pytest.mark.parametrize("factor", [2.05, 5.0, 100.0])
@pytest.mark.parametrize("terms", [1, 10, 200])
def test_a_neumann_series_with_too_large_a_step_is_flagged(factor: float, terms: int) -> None:
    problem, point = quadratic([1.0, 0.5, 0.1, 0.05])
    found = at(problem, Implicit(Neumann(max_steps=terms, step_size=factor)), point)
    if found.certificate.trusted:  # at 2.05 the growth is slow, and what came before may be good enough
        assert factor < 2.1
        error = relative_error(found.gradient, at(problem, "direct", point).gradient)
        assert error < 0.5
        assert found.certificate.verdict == "approximate"
    else:
        assert found.certificate.reasons


def test_a_saddle_on_which_neither_loss_falls_is_flagged() -> None:
    problem = BilevelProblem(
        lambda v, h: (v[0] - h) ** 2 - 0.3 * v[1] ** 2 + v[1] ** 4,
        lambda v, h: v[0] ** 2,
        torch.zeros(2, dtype=D),
        bilevel.positive(0.7),
    )
    found = at(problem, "direct", torch.tensor([0.7, 0.0], dtype=D))
    assert found.certificate.verdict == "untrusted"


class Nothing:
    """A linear solver that leaves everything."""

    truncates: ClassVar[bool] = True

    def solve(self, operator: Any, rhs: Any, start: Any = None) -> LinearSolution:
        return LinearSolution({n: torch.zeros_like(t) for n, t in rhs.items()}, "max_steps", 1, rhs, 1.0, 1.0)


def test_what_reaches_lambda_through_the_inverse_alone_is_seen() -> None:
    """λ acts on a and f on b: (∂R/∂λ)^T of what is left of the adjoint equation is zero, and the error is 1."""
    problem = BilevelProblem(
        lambda p, h: (p["a"] - 1.0) ** 2 + (p["b"] - p["a"]) ** 2 + h * p["a"] ** 2,
        lambda p, h: p["b"] ** 2,
        {"a": torch.zeros((), dtype=D), "b": torch.zeros((), dtype=D)},
        bilevel.positive(0.3),
    )
    found = at(problem, Implicit(Nothing()))
    assert float(found.gradient) == 0.0
    assert found.certificate.error == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("solver", [CG, MINRES, GMRES])
def test_a_solver_stopped_early_is_flagged(solver: Any) -> None:
    problem, point = quadratic([10.0**-e for e in torch.linspace(0.0, 4.0, 30).tolist()])
    certificate = at(problem, Implicit(solver(max_steps=3)), point).certificate
    assert certificate.verdict == "untrusted"
    assert "max_steps" in certificate.reasons[0]
    assert certificate.adjoint_residual is not None and certificate.adjoint_residual > 1e-3


@pytest.mark.parametrize("solver", [CG(rtol=0.2), MINRES(rtol=0.2), GMRES(rtol=0.2)])
def test_a_small_residual_is_no_small_error(solver: Any) -> None:
    """A residual may lie where the Hessian is nearly flat: condition 1e5, and the error is 1e5 times larger there."""
    problem, point = quadratic([1.0, 0.9, 0.8, 0.7, 0.6, 1e-5])
    found = at(problem, Implicit(solver), point)
    exact = at(problem, "direct", point)
    assert exact.certificate.verdict == "exact"
    if relative_error(found.gradient, exact.gradient) > 1e-3:
        assert not found.certificate.trusted


@pytest.mark.parametrize("method", ["implicit", "cg", "minres", "gmres", "direct", "neumann", "fixed-point"])
@pytest.mark.parametrize("condition", [1e4, 1e6, 1e8])
def test_ill_conditioned_float32_is_right_or_flagged(method: str, condition: float) -> None:
    dice = Dice(int(math.log10(condition)))
    X = ((dice.normal(40, 10) * dice.logs(1.0 / condition, 1.0, 10).sqrt()) @ dice.rotation(10)).float()
    y, target = dice.normal(40).float(), dice.normal(10).float()

    def inner_loss(w: Tensor, h: Tensor) -> Tensor:
        return ((X.to(w.dtype) @ w - y.to(w.dtype)) ** 2).mean() / 2 + h * (w**2).sum() / 2

    def outer_loss(w: Tensor, h: Tensor) -> Tensor:
        return ((w - target.to(w.dtype)) ** 2).sum() / 2

    strength = float(torch.tensor(0.3 / condition))
    truth = KnownProblem("", inner_loss, outer_loss, torch.zeros(10, dtype=D), bilevel.positive(strength)).truth
    found = at(BilevelProblem(inner_loss, outer_loss, torch.zeros(10), bilevel.positive(strength)), method)
    if found.certificate.trusted:
        limit = 1e-2 if found.certificate.verdict == "exact" else 0.5
        assert relative_error(found.gradient.double(), truth.gradient) <= limit


def test_a_zero_hypergradient_is_zero() -> None:
    """The outer loss is at its minimum: nothing is invented out of rounding and then trusted."""
    best = RIDGE.truth.params
    problem = BilevelProblem(RIDGE.inner_loss, lambda w, h: ((w - best) ** 2).sum(), RIDGE.params, RIDGE.hparams)
    given = at(problem, "direct", best)
    assert float(given.gradient.norm()) == 0.0
    trained = at(problem, "direct")  # 1e-10 off the solution: that small, and of no certain direction
    assert float(trained.gradient.norm()) < 1e-6
    assert trained.certificate.verdict == "untrusted"
    # A run names the size that is zero to it, and is told that these are.
    evaluate = Evaluator(problem, Implicit(Cholesky()), gradient_floor=1e-3)
    assert evaluate(problem.hparams.layout.start).hypergradient.certificate.verdict == "exact"


def test_an_estimate_that_is_settled_by_a_bound_costs_no_solve() -> None:
    """At the solution, one product each for the residual, the pull onto λ, the scale and the bound."""
    known = PROBLEMS["tanh network"]
    found = at(known.problem(), "cg", known.truth.params)
    solved = Implicit(CG())
    assert found.certificate.verdict == "exact"
    again = at(known.problem(), solved, known.truth.params)
    assert again.cost.products == found.cost.products
    # 17 unknowns of condition 300 take about 25 products; the certificate adds a handful.
    assert found.cost.products <= 45
