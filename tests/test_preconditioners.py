"""Preconditioners change the number of products, never the answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import QuasiNewton
from bilevel.evaluation import Evaluator
from bilevel.operators import LinearOperator, Pairs
from bilevel.response import ProblemResponse
from bilevel.solvers.linear import LinearSolution
from bilevel.solvers.linear.cg import PROBATION
from bilevel.solvers.linear.diagonal import badly_scaled, estimate_diagonal
from bilevel.solvers.linear.secant import InverseEstimate

torch.manual_seed(0)
N = 60
MIXED = torch.randn(N, N, dtype=torch.float64)
WELL = MIXED @ MIXED.T / N + torch.eye(N, dtype=torch.float64)
STRENGTHS = torch.logspace(-1, 6, N, dtype=torch.float64)
BAD = WELL + torch.diag(STRENGTHS)  # what a run does to strengths: seven decades on the diagonal
Q = torch.linalg.qr(MIXED).Q
DECAYING = Q @ torch.diag(torch.logspace(0, -4, N, dtype=torch.float64)) @ Q.T
RHS = {"w": torch.randn(N, dtype=torch.float64)}


def operator(matrix: Tensor, **known: Any) -> LinearOperator:
    like = {"w": torch.zeros(N, dtype=torch.float64)}
    return LinearOperator(lambda v: {"w": matrix @ v["w"]}, like, symmetric=True, **known)


@pytest.mark.parametrize(
    "chosen", ["auto", "diagonal", lambda v: {"w": v["w"] / BAD.diagonal()}], ids=["auto", "diagonal", "exact"]
)
def test_a_badly_scaled_system_takes_fewer_steps_and_has_the_same_answer(chosen: Any) -> None:
    plain = bilevel.CG(preconditioner=None, max_steps=2000).solve(operator(BAD), RHS)
    scaled = bilevel.CG(preconditioner=chosen).solve(operator(BAD), RHS)
    truth = torch.linalg.solve(BAD, RHS["w"])
    before = PROBATION if chosen == "auto" else 0  # steps without the diagonal
    assert scaled.status == "converged" and scaled.steps - before < 0.2 * plain.steps
    # The condition number of the scaled system is about 10, so rtol 1e-8 is an error of about 1e-7 of the truth.
    assert float((scaled.value["w"] - truth).norm() / truth.norm()) < 1e-6
    assert scaled.curvature is not None and scaled.curvature > 0.0


def test_auto_leaves_a_well_scaled_system_alone() -> None:
    plain, auto = (bilevel.CG(preconditioner=p).solve(operator(WELL), RHS) for p in (None, "auto"))
    assert auto.steps == plain.steps
    assert torch.equal(auto.value["w"], plain.value["w"])


def test_the_curvature_of_a_preconditioned_solve_is_no_overestimate() -> None:
    """M^-1 A and the smallest entry of M bound the smallest eigenvalue from below, up to Ritz values' lateness."""
    smallest = float(torch.linalg.eigvalsh(BAD)[0])
    found = bilevel.CG(preconditioner="diagonal").solve(operator(BAD), RHS).curvature
    assert found is not None and found < 1.01 * smallest


def test_the_estimated_diagonal_finds_what_dominates() -> None:
    found = estimate_diagonal(operator(BAD))
    strong = STRENGTHS > 1e3
    torch.testing.assert_close(found[strong], BAD.diagonal()[strong], rtol=1e-2, atol=0.0)  # rows of size 1 beside 1e3
    assert badly_scaled(found) and not badly_scaled(estimate_diagonal(operator(WELL)))
    assert bool((found > 0.0).all())


def problem(solver: Any) -> bilevel.BilevelProblem:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 150, generator=generator, dtype=torch.float64) * torch.logspace(
        0, -2, 150, dtype=torch.float64
    )
    y = torch.randn(200, generator=generator, dtype=torch.float64)
    return bilevel.BilevelProblem(
        lambda w, h: ((x @ w - y) ** 2).mean() + h * (w**2).sum(),
        lambda w, h: ((x @ w - 0.5) ** 2).mean(),
        torch.zeros(150, dtype=torch.float64),
        bilevel.positive(1e-2),
        inner_solver=solver,
    )


def test_adams_second_moment() -> None:
    adam = bilevel.inner.Adam(lr=0.02, steps=300)
    by_moment = bilevel.Implicit(bilevel.CG(preconditioner="second-moment"))
    found = bilevel.hypergradient(problem(adam), by_moment, on_untrusted="ignore")
    plain = bilevel.hypergradient(problem(adam), bilevel.Implicit(bilevel.CG()), on_untrusted="ignore")
    torch.testing.assert_close(found.gradient, plain.gradient, rtol=1e-6, atol=0.0)  # both to an adjoint of 1e-8
    with pytest.raises(bilevel.InvalidValueError, match=r"inner\.Adam"):
        bilevel.hypergradient(problem(None), by_moment)


# Quasi-Newton pairs


def seen(matrix: Tensor, count: int, noise: float = 0.0) -> Pairs:
    generator = torch.Generator().manual_seed(2)
    steps = torch.randn(count, N, generator=generator, dtype=torch.float64)
    changes = steps @ matrix + noise * torch.randn(count, N, generator=generator, dtype=torch.float64)
    return Pairs(steps, changes, torch.linspace(1.0, 2.0, N, dtype=torch.float64))


def bfgs(pairs: Pairs) -> Tensor:
    """The inverse estimate by the update formula, densely (Nocedal and Wright, equations 7.19 and 7.20)."""
    s, y = pairs.steps[-1], pairs.changes[-1]
    H = s @ y / (y @ (pairs.scale * y)) * torch.diag(pairs.scale)
    for s, y in zip(pairs.steps, pairs.changes, strict=True):
        left = torch.eye(N, dtype=torch.float64) - torch.outer(s, y) / (s @ y)
        H = left @ H @ left.T + torch.outer(s, s) / (s @ y)
    return H


@pytest.mark.parametrize("count", [1, 5, 40])
def test_the_inverse_estimate_is_the_update_formula(count: int) -> None:
    pairs = seen(WELL, count, noise=0.1)
    found = InverseEstimate(pairs)(RHS["w"])
    assert float((found - bfgs(pairs) @ RHS["w"]).norm() / found.norm()) <= 1e-10
    # The secant equation holds for the newest pair.
    torch.testing.assert_close(InverseEstimate(pairs)(pairs.changes[-1]), pairs.steps[-1], rtol=1e-9, atol=1e-9)


def test_one_step_of_shine_is_the_estimate_with_a_line_search() -> None:
    pairs = seen(WELL, 10)
    found = QuasiNewton(max_steps=1).solve(operator(WELL, pairs=pairs), RHS).value["w"]
    direction = bfgs(pairs) @ RHS["w"]
    length = direction @ RHS["w"] / (direction @ WELL @ direction)
    torch.testing.assert_close(found, length * direction, rtol=1e-9, atol=1e-12)


def test_refinement_steps_are_bfgs_with_exact_line_searches() -> None:
    """Nazareth 1979, so that the pairs that steps gather need no place of their own."""
    pairs, x, r = seen(WELL, 3), torch.zeros(N, dtype=torch.float64), RHS["w"]
    H = bfgs(pairs)
    for steps in range(1, 6):
        p = H @ r
        s = p @ r / (p @ WELL @ p) * p
        y = WELL @ s
        left = torch.eye(N, dtype=torch.float64) - torch.outer(s, y) / (s @ y)
        H, x, r = left @ H @ left.T + torch.outer(s, s) / (s @ y), x + s, r - y
        found = QuasiNewton(max_steps=steps).solve(operator(WELL, pairs=pairs), RHS)
        torch.testing.assert_close(found.value["w"], x, rtol=1e-8, atol=1e-10)
        assert found.relative == pytest.approx(float(r.norm() / RHS["w"].norm()), rel=1e-7)


def test_pairs_of_another_hessian_are_left_out() -> None:
    """SHINE's fallback: the answer is the one without pairs, and a note says so."""
    matrix = WELL + torch.diag(torch.logspace(-1, 2.5, N, dtype=torch.float64))
    truth = torch.linalg.solve(matrix, RHS["w"])

    def error(found: LinearSolution) -> float:
        off = found.value["w"] - truth
        return float(off @ matrix @ off)

    for steps in (1, 2):
        solver = QuasiNewton(max_steps=steps)
        alone = solver.solve(operator(matrix), RHS)
        wrong = solver.solve(operator(matrix, pairs=seen(torch.linalg.inv(matrix), 30)), RHS)
        right = solver.solve(operator(matrix, pairs=seen(matrix, 30)), RHS)
        assert torch.equal(wrong.value["w"], alone.value["w"]) and wrong.steps == 2 * steps
        assert error(right) < error(alone)
        assert "fallback" in wrong.notes[0] and not any("fallback" in note for note in (*alone.notes, *right.notes))
        assert "without a preconditioner" in alone.notes[0] and "30 quasi-Newton pairs" in right.notes[0]


def test_directions_of_one_solve_serve_the_next() -> None:
    first = bilevel.CG(preconditioner="lbfgs").solve(operator(DECAYING), RHS)
    kept = first.kept
    assert first.steps > 20 and kept["steps"].shape == kept["changes"].shape == (len(kept["steps"]), N)
    assert 10 <= len(kept["steps"]) <= 20
    torch.testing.assert_close(kept["changes"], kept["steps"] @ DECAYING, rtol=1e-9, atol=1e-12)
    near = DECAYING + 1e-5 * torch.eye(N, dtype=torch.float64)
    plain = bilevel.CG(preconditioner=None).solve(operator(near), RHS)
    again = bilevel.CG(preconditioner="lbfgs").solve(operator(near, kept=kept), RHS)
    assert again.status == "converged" and again.steps < 0.8 * plain.steps  # 13 pairs take a quarter of the steps
    truth = torch.linalg.solve(near, RHS["w"])
    assert float((again.value["w"] - truth).norm() / truth.norm()) <= 1e-4  # rtol 1e-8 times a condition of 1e4


def test_the_inner_lbfgs_hands_on_what_it_saw() -> None:
    """On a quadratic every pair is exact, whatever units the descent runs in; and SciPy's own agree."""
    matrix = torch.diag(torch.logspace(0, 5, N, dtype=torch.float64)) + WELL
    quadratic = bilevel.BilevelProblem(
        lambda w, h: w @ (matrix @ w) / 2 - (RHS["w"] * w).sum() + h * w.sum(),
        lambda w, h: (w**2).sum(),
        torch.zeros(N, dtype=torch.float64),
        bilevel.positive(0.1),
    )
    response = ProblemResponse(quadratic)
    upper = quadratic.hparams.layout.start
    response.solve_inner(quadratic.params.start, upper)
    pairs = response.pairs
    assert pairs is not None and 5 <= len(pairs.steps) <= 20
    assert float(pairs.scale.max() / pairs.scale.min()) > 10.0  # units differ here
    # A difference of two gradients of size 1 has a rounding of about 1e-15 of them.
    assert float((pairs.changes - pairs.steps @ matrix).abs().max()) <= 1e-12
    found = bilevel.hypergradient(quadratic, bilevel.Implicit(bilevel.CG(preconditioner="lbfgs")))
    assert found.certificate.verdict == "exact"
    assert any(f"{len(pairs.steps)} quasi-Newton pairs" in note for note in found.certificate.notes)


def test_without_pairs_the_certificate_says_that_there_were_none() -> None:
    method = bilevel.Implicit(bilevel.CG(preconditioner="lbfgs"))
    adam = bilevel.inner.Adam(lr=0.02, steps=300)
    evaluate = Evaluator(problem(adam), method)
    upper = evaluate.problem.hparams.layout.start
    first, second = (evaluate(upper).hypergradient.certificate for _ in range(2))
    assert "no quasi-Newton pairs yet" in first.notes[0] and "quasi-Newton pairs" in second.notes[0]
    assert "no quasi-Newton" not in second.notes[0]


def test_a_preconditioner_that_is_none_of_these_is_refused() -> None:
    with pytest.raises(bilevel.InvalidValueError, match="preconditioner"):
        bilevel.CG(preconditioner="jacobi")  # type: ignore[arg-type]
