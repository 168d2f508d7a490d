"""What conjugate gradients know of their own error, what a certificate makes of it, and when they give way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import bilevel
from bilevel.operators import LinearOperator
from bilevel.solvers.linear import CG
from bilevel.solvers.linear.base import Preconditioner
from bilevel.solvers.linear.cg import Run
from bilevel.solvers.linear.lanczos import energy_bound
from bilevel.testing import relative_error

N = 200
CURVATURES = torch.logspace(-3.0, 0.0, N, dtype=torch.float64)
DICE = torch.Generator().manual_seed(0)
B = torch.randn(N, dtype=torch.float64, generator=DICE)


def test_the_energy_bound_holds_and_is_near() -> None:
    operator = LinearOperator(lambda v: {"w": CURVATURES * v["w"]}, {"w": B}, symmetric=True)
    run = Run(operator, B, torch.zeros_like(B), B, Preconditioner(lambda r: r, 1.0))
    for steps in (20, 60, 120):
        run.iterate(0.0, steps)
        energy = float((CURVATURES * (B / CURVATURES - run.x) ** 2).sum())
        bound = energy_bound(run.alphas, run.betas, float(CURVATURES[0])) * run.rz
        assert energy <= bound <= 30.0 * energy


def test_what_is_missing_is_as_long_as_the_error() -> None:
    operator = LinearOperator(lambda v: {"w": CURVATURES * v["w"]}, {"w": B}, symmetric=True)
    for rtol in (1e-3, 1e-6, 1e-9):
        found = CG(rtol=rtol).solve(operator, {"w": B})
        assert found.missing is not None
        error = float((B / CURVATURES - found.value["w"]).norm())
        assert error / 3.0 <= float(found.missing(1e-3)["w"].norm()) <= 30.0 * error


def quadratic(h: float) -> tuple[bilevel.BilevelProblem, Tensor]:
    """w* = a / (c + h); the outer optimum lies at h = 0.1. Returns the hypergradient too."""
    target = B / (CURVATURES + 0.1)
    problem = bilevel.BilevelProblem(
        lambda w, h: (0.5 * (CURVATURES + h) * w**2 - B * w).sum(),
        lambda w, h: 0.5 * ((w - target) ** 2).sum(),
        torch.zeros(N, dtype=torch.float64),
        torch.tensor(h, dtype=torch.float64),
    )
    best = B / (CURVATURES + h)
    return problem, -((best - target) * best / (CURVATURES + h)).sum()


def test_a_clear_error_takes_no_correction() -> None:
    problem, truth = quadratic(0.03)
    params = bilevel.hypergradient(problem, "cg").params
    found = bilevel.hypergradient(problem, "cg", params=params)
    error = found.certificate.error
    assert found.certificate.verdict == "exact" and error is not None
    assert relative_error(found.gradient, truth) <= 3.0 * error
    assert found.cost.gradients == 4  # f twice, R at w, and at the start for its scale


@pytest.mark.parametrize("rtol", [1e-8, 1e-13])
def test_a_hypergradient_that_all_but_vanishes_is_not_clear(rtol: float) -> None:
    """Where B^T v cancels, and B, v and ∂f/∂w do not vanish, the error must not be held against B^T v alone.

    An adjoint without an error says nothing of it: what is left comes from the inner solution.
    """
    target = B / (CURVATURES + 0.1) + 0.3 * torch.randn(N, dtype=torch.float64, generator=DICE)

    def slope(h: float) -> float:
        best = B / (CURVATURES + h)
        return -float(((best - target) * best / (CURVATURES + h)).sum())

    low, high = 0.03, 0.3
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if slope(low) * slope(middle) > 0.0 else (low, middle)
    for off in (1e-3, 1e-5, 1e-7):
        h = low * (1.0 + off)
        problem = bilevel.BilevelProblem(
            lambda w, h: (0.5 * (CURVATURES + h) * w**2 - B * w).sum(),
            lambda w, h: 0.5 * ((w - target) ** 2).sum(),
            torch.zeros(N, dtype=torch.float64),
            torch.tensor(h, dtype=torch.float64),
        )
        params = B / (CURVATURES + h) * (1.0 + 1e-8 * torch.randn(N, dtype=torch.float64, generator=DICE))
        method = bilevel.Implicit(bilevel.CG(rtol=rtol))
        found = bilevel.hypergradient(problem, method, params=params, on_untrusted="ignore")
        error, true = found.certificate.error, abs(float(found.gradient) / slope(h) - 1.0)
        assert error is None or min(true, 1.0) <= 3.0 * error, (off, true, error)


def test_the_dense_hessian_is_taken_where_a_batch_of_products_is_cheap() -> None:
    """One design that all rows share: the Hessian costs as much as a few products, and CG is left after as many."""
    X = torch.randn(2000, 100, dtype=torch.float64, generator=DICE) * torch.logspace(
        0.0, -2.0, 100, dtype=torch.float64
    )
    y = (X @ B[:100] > 0.0).double()

    def inner(w: Tensor, h: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(functional.linear(X, w[None])[:, 0], y) + h * (w**2).sum()

    problem = bilevel.BilevelProblem(
        inner, lambda w, h: (w**2).sum(), torch.zeros(100, dtype=torch.float64), torch.tensor(1e-5, dtype=torch.float64)
    )
    params = bilevel.hypergradient(problem, "direct").params
    found, by_cg = (bilevel.hypergradient(problem, method, params=params) for method in ("implicit", "cg"))
    assert by_cg.cost.products > 100
    assert 100 < found.cost.products < 140
    assert torch.allclose(found.gradient, by_cg.gradient, rtol=1e-6)


def test_a_bound_is_sharpened_before_a_correction() -> None:
    """Along the largest curvature, an inner residual is far less of an error than the smallest one says."""
    h = 0.03
    best = B / (CURVATURES + h)
    problem = bilevel.BilevelProblem(
        lambda w, h: (0.5 * (CURVATURES + h) * w**2 - B * w).sum(),
        lambda w, h: 0.5 * ((w - 0.997 * best) ** 2).sum(),  # ∂f/∂w is small, so what changes it counts
        torch.zeros(N, dtype=torch.float64),
        torch.tensor(h, dtype=torch.float64),
    )
    params = best.clone()
    params[-1] += 3e-8 * best.norm()
    found = bilevel.hypergradient(problem, "cg", params=params)
    truth = -(0.003 * best * best / (CURVATURES + h)).sum()
    error = found.certificate.error
    assert error is not None and relative_error(found.gradient, truth) <= 3.0 * error
    assert found.cost.products <= 60  # a correction takes 74
