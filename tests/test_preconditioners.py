"""Preconditioners change the number of products, never the answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel.operators import LinearOperator
from bilevel.solvers.linear.diagonal import badly_scaled, estimate_diagonal
from bilevel.vector import Vector

torch.manual_seed(0)
N = 60
MIXED = torch.randn(N, N, dtype=torch.float64)
WELL = MIXED @ MIXED.T / N + torch.eye(N, dtype=torch.float64)
STRENGTHS = torch.logspace(-1, 6, N, dtype=torch.float64)
BAD = WELL + torch.diag(STRENGTHS)  # what a run does to strengths: seven decades on the diagonal
RHS = {"w": torch.randn(N, dtype=torch.float64)}


def operator(matrix: Tensor, second_moment: Vector | None = None) -> LinearOperator:
    like = {"w": torch.zeros(N, dtype=torch.float64)}
    return LinearOperator(lambda v: {"w": matrix @ v["w"]}, like, symmetric=True, second_moment=second_moment)


@pytest.mark.parametrize(
    "chosen", ["auto", "diagonal", lambda v: {"w": v["w"] / BAD.diagonal()}], ids=["auto", "diagonal", "exact"]
)
def test_a_badly_scaled_system_takes_fewer_steps_and_has_the_same_answer(chosen: Any) -> None:
    plain = bilevel.CG(preconditioner=None, max_steps=2000).solve(operator(BAD), RHS)
    scaled = bilevel.CG(preconditioner=chosen).solve(operator(BAD), RHS)
    truth = torch.linalg.solve(BAD, RHS["w"])
    assert scaled.status == "converged" and scaled.steps < 0.6 * plain.steps
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


def test_a_preconditioner_that_is_none_of_these_is_refused() -> None:
    with pytest.raises(bilevel.InvalidValueError, match="preconditioner"):
        bilevel.CG(preconditioner="jacobi")  # type: ignore[arg-type]
