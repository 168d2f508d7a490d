"""One-step differentiation: what it computes, how far off that is, and when it is exact."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import FixedPoint, OneStep, hypergradient, inner
from bilevel.evaluation import Evaluator
from bilevel.response import ProblemResponse
from bilevel.testing import KnownProblem, known_problems, relative_error
from bilevel.vector import zeros_like

PROBLEMS = known_problems()
every_problem = pytest.mark.parametrize("known", PROBLEMS, ids=lambda known: known.name)
GENERATOR = torch.Generator().manual_seed(0)
X, XV = (torch.randn(12, 3, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
Y, YV = (torch.randn(12, generator=GENERATOR, dtype=torch.float64) for _ in range(2))


def newton(known: KnownProblem) -> inner.Newton:
    return inner.Newton(damping=1e-8 if known.name == "softmax regression, free bias" else 0.0)


@pytest.mark.parametrize("kind", ["a gradient step", "a momentum step", "Adam", "a Newton step"])
@every_problem
def test_it_is_one_iteration_of_the_fixed_point(known: KnownProblem, kind: str) -> None:
    solvers: dict[str, Any] = {
        "a gradient step": None,
        "a momentum step": known.stepwise(),
        "Adam": inner.Adam(lr=0.1, steps=3),
        "a Newton step": newton(known),
    }
    problem = known.problem(solvers[kind])
    lower, upper = problem.params.read(known.truth.params, "params"), problem.hparams.layout.start
    found, kept = OneStep()(ProblemResponse(problem), lower, upper)
    assert kept is None
    _, u = FixedPoint(max_steps=1)(ProblemResponse(problem), lower, upper)
    one, _ = FixedPoint(max_steps=1)(ProblemResponse(problem), lower, upper, zeros_like(u))
    assert relative_error(found.gradient, one.gradient) <= 1e-14


def test_it_is_the_gradient_times_the_step_by_hand() -> None:
    """dF = ∂f/∂λ - lr (∂R/∂λ)^T ∂f/∂w, on ridge: R = 2 X^T (X w - y) / n + 2 λ w."""
    matrix = X.T @ X / 12 + 0.2 * torch.eye(3, dtype=torch.float64)
    w = torch.linalg.solve(matrix, X.T @ Y / 12)
    slope = 2.0 * XV.T @ (XV @ w - YV) / 12
    problem = bilevel.BilevelProblem(
        lambda w, h: ((X @ w - Y) ** 2).mean() + h * (w**2).sum(),
        lambda w, h: ((XV @ w - YV) ** 2).mean() + h**3,
        torch.zeros(3, dtype=torch.float64),
        bilevel.positive(0.2),
        inner.SGD(lr=0.3, steps=1000),
    )
    found = hypergradient(problem, "one-step", on_untrusted="ignore")
    assert float(found.gradient) == pytest.approx(3 * 0.2**2 - 0.3 * float(2.0 * w @ slope), rel=1e-12)


@pytest.mark.parametrize("rho", [0.9, 0.4, 0.1, 1e-2, 1e-4])
def test_the_error_is_the_contraction(rho: float) -> None:
    """On |w - λ|² / 2 a step of length 1 - ρ contracts by ρ, and dF = (1 - ρ) times the truth."""
    target = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    problem = bilevel.BilevelProblem(
        lambda w, h: ((w - h) ** 2).sum() / 2,
        lambda w, h: ((w - target) ** 2).sum() / 2,
        torch.zeros(3, dtype=torch.float64),
        torch.ones(3, dtype=torch.float64),
        inner.SGD(lr=1.0 - rho, steps=math.ceil(math.log(1e-15) / math.log(rho))),
    )
    found = hypergradient(problem, "one-step", on_untrusted="ignore")
    truth = 1.0 - target
    assert relative_error(found.gradient, (1.0 - rho) * truth) <= 1e-12
    assert found.certificate.error == pytest.approx(rho, rel=1e-8)
    expected = "exact" if rho < 1e-3 else "approximate" if rho < 0.4 else "untrusted"
    assert found.certificate.verdict == expected


@every_problem
def test_with_a_newton_step_it_is_exact(known: KnownProblem) -> None:
    found = hypergradient(known.problem(newton(known)), "one-step", on_untrusted="ignore")
    # Damped by 1e-8, a step contracts by 1e-8 / (smallest curvature of 0.06).
    assert relative_error(found.gradient, known.truth.gradient) <= (1e-6 if newton(known).damping else 1e-8)
    if not newton(known).damping:  # along the free direction no step contracts, and the certificate says so
        assert found.certificate.verdict == "exact"


@pytest.mark.parametrize("off", [1e-1, 1e-3])
# The network's curvature turns negative so far from its minimum, and a Newton step is refused there.
@pytest.mark.parametrize("known", PROBLEMS[:-1], ids=lambda known: known.name)
def test_an_inner_solution_that_is_off_shows_in_the_estimate(known: KnownProblem, off: float) -> None:
    problem = known.problem(newton(known))
    generator = torch.Generator().manual_seed(1)
    exact = problem.params.read(known.truth.params, "params")
    lower = {n: t + off * torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in exact.items()}
    found = Evaluator(problem, OneStep())(problem.hparams.layout.start, lower).hypergradient
    error = relative_error(problem.hparams.layout.shaped(found.gradient), known.truth.gradient)
    if found.certificate.error is None:
        assert found.certificate.verdict == "untrusted" and found.certificate.reasons
    else:
        assert error <= 10.0 * found.certificate.error
    assert error < 1e-3 or found.certificate.verdict != "exact"


def two_curvatures(lr: Any, steps: int = 1) -> bilevel.BilevelProblem:
    """g = w·Aw / 2 - h (w_0 + w_1), A = diag(0.01, 1), f = 0.01 w_0 + w_1: w* = (100, 1) h and dF/dh = 2."""
    A, c = torch.tensor([[0.01, 1.0], [0.01, 1.0]], dtype=torch.float64)
    return bilevel.BilevelProblem(
        lambda w, h: (A * w**2).sum() / 2 - h * w.sum(),
        lambda w, h: (c * w).sum(),
        torch.zeros(2, dtype=torch.float64),
        torch.ones((), dtype=torch.float64),
        inner.SGD(lr=lr, steps=steps),
    )


@pytest.mark.parametrize("method", ["one-step", FixedPoint(max_steps=1), FixedPoint(max_steps=2)])
def test_a_small_part_of_the_right_hand_side_may_be_half_of_the_answer(method: Any) -> None:
    """The correction of u is solved until its own error is small, and not until its residual is."""
    w = torch.tensor([100.0, 1.0], dtype=torch.float64)
    found = hypergradient(two_curvatures(0.5), method, params=w, on_untrusted="ignore")
    error = abs(float(found.gradient) - 2.0) / 2.0
    assert error > 0.5
    assert found.certificate.error == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("method", ["one-step", "fixed-point", FixedPoint(max_steps=1), FixedPoint(rtol=0.1)])
def test_a_step_of_length_zero_tells_nothing(method: Any) -> None:
    """A cosine schedule ends with a learning rate of 0: every point is a fixed point then, and λ moves none."""
    problem = two_curvatures(lambda h, step: 0.5 * (1.0 + math.cos(math.pi * step / 29)), steps=30)
    found = hypergradient(problem, method, on_untrusted="ignore")
    assert float(found.gradient) == 0.0
    assert (found.certificate.verdict, found.certificate.error) == ("untrusted", None)


def test_it_sees_the_step_and_no_learning_rate() -> None:
    def problem(**settings: Any) -> bilevel.BilevelProblem:
        return bilevel.BilevelProblem(
            lambda w, h: ((w - 1.0) ** 2).sum() / 2,
            lambda w, h: (w**2).sum() / 2,
            torch.zeros(1, dtype=torch.float64),
            bilevel.positive(0.1),
            inner.SGD(steps=200, **settings),
        )

    # w = 1 / (1 + h), and a step of 0.9 takes 0.9 (1 + h) of d/dh w^2 / 2 = -(1 + h)^-3.
    found = hypergradient(problem(lr=0.9, weight_decay=lambda h: h), "one-step")
    assert float(found.gradient) == pytest.approx(-0.9 * 1.1**-2, rel=1e-12)
    with pytest.raises(bilevel.UnseenHyperparameterError, match='method="unroll"'):
        hypergradient(problem(lr=lambda h: h), "one-step")


def test_a_saddle_is_untrusted() -> None:
    def saddle(w: Tensor, h: Tensor) -> Tensor:
        return (w[0] - h) ** 2 - 0.3 * (w[1] - h) ** 2 + 0.1 * (w[1] - h) ** 4

    problem = bilevel.BilevelProblem(saddle, lambda w, h: (w**2).sum(), torch.ones(2).double(), bilevel.positive(0.5))
    found = hypergradient(problem, "one-step", params=torch.full((2,), 0.5).double(), on_untrusted="ignore")
    assert found.certificate.verdict == "untrusted" and "fixed-point" in found.certificate.reasons[0]


def test_the_hypergradient_takes_one_product_and_the_estimate_some() -> None:
    known = PROBLEMS[0]
    found = hypergradient(known.problem(newton(known)), "one-step", params=known.truth.params)
    assert found.cost.products <= 6 * 3 + 10  # three dense Hessians of a Newton step: here, from rest, and corrected
