"""L-BFGS as the inner solver: at its tolerance, or it says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import inner


def quadratic(scales: Tensor, solver: Any = None) -> bilevel.BilevelProblem:
    n = len(scales)
    generator = torch.Generator().manual_seed(2)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    hessian = ((q * scales.double()) @ q.T).to(scales.dtype)
    b = torch.randn(n, generator=generator, dtype=torch.float64).to(scales.dtype)
    return bilevel.BilevelProblem(
        lambda w, h: w @ hessian @ w / 2 - h * (b @ w),
        lambda w, h: w.sum(),
        torch.zeros(n, dtype=scales.dtype),
        torch.ones((), dtype=scales.dtype),
        inner_solver=solver,
    )


@pytest.mark.parametrize(
    ("scales", "rtol"),
    [
        (torch.linspace(1, 10, 20, dtype=torch.float64), 1e-9),
        (torch.logspace(0, 6, 20, dtype=torch.float64), 1e-9),
        (1e-12 * torch.logspace(0, 3, 20, dtype=torch.float64), 1e-9),
        (1e12 * torch.logspace(0, 3, 20, dtype=torch.float64), 1e-9),
        (torch.linspace(1, 10, 20), 1e-5),
        (torch.logspace(0, 3, 20), 1e-5),
    ],
    ids=["well", "ill", "tiny", "huge", "float32", "float32 ill"],
)
def test_lbfgs_reaches_its_tolerance(scales: Tensor, rtol: float) -> None:
    found = bilevel.hypergradient(quadratic(scales), "direct", on_untrusted="ignore")
    assert found.certificate.inner_residual is not None
    assert found.certificate.inner_residual <= rtol
    assert found.params.dtype == scales.dtype


def test_newton_steps_finish_where_the_condition_is_bad() -> None:
    """Conjugate gradients restarted every 500 products left 8e-4 of the gradient here."""
    curvature = torch.logspace(-6, 0, 3000, dtype=torch.float64)
    u, b = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = u / u.norm()

    def loss(w: Tensor, h: Tensor) -> Tensor:
        turned = w - 2.0 * u.dot(w) * u
        value: Tensor = 0.5 * (curvature * turned**2).sum() + h * 1e-7 * (w**2).sum() - b.dot(w)
        return value

    solver = inner.LBFGS(max_steps=300)
    problem = bilevel.BilevelProblem(
        loss, lambda w, h: (w**2).mean(), torch.zeros(3000, dtype=torch.float64), bilevel.positive(0.1), solver
    )
    found = bilevel.hypergradient(problem, "cg")
    assert found.certificate.inner_residual is not None
    assert found.certificate.inner_residual <= 1e-9


def test_lbfgs_takes_a_tighter_tolerance() -> None:
    found = bilevel.hypergradient(quadratic(torch.logspace(0, 2, 20).double(), inner.LBFGS(rtol=1e-13)))
    assert found.certificate.inner_residual is not None
    assert found.certificate.inner_residual <= 1e-13


def test_lbfgs_from_the_solution_stays() -> None:
    problem = bilevel.BilevelProblem(
        lambda w, h: ((w - h) ** 2).sum(),
        lambda w, h: (w**2).sum(),
        torch.full((3,), 2.0, dtype=torch.float64),
        torch.tensor(2.0, dtype=torch.float64),
    )
    found = bilevel.hypergradient(problem)
    assert torch.equal(found.params, torch.full((3,), 2.0, dtype=torch.float64))
    assert found.gradient.item() == pytest.approx(12.0, abs=1e-10)


def test_lbfgs_on_a_loss_without_a_minimum_says_so() -> None:
    problem = bilevel.BilevelProblem(
        lambda w, h: -(w**4).sum() + h * (w**2).sum(),
        lambda w, h: (w**2).sum(),
        torch.ones(2, dtype=torch.float64),
        bilevel.positive(0.1),
    )
    with pytest.raises(bilevel.NonFiniteError, match="the inner loss has no minimum"):
        bilevel.hypergradient(problem)


def test_many_variables_take_newton_steps_near_a_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    """An L-BFGS step handles 40 vectors; the few Newton steps of a warm start handle a few for each product."""
    X = torch.randn(60, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.ones(60, dtype=torch.float64)

    def run() -> bilevel.Solution:
        problem = bilevel.BilevelProblem(
            lambda w, h: (torch.cosh(X @ w - y) - 1).mean() + h * (w**2).sum(),
            lambda w, h: ((X @ w - 2 * y) ** 2).mean(),
            torch.zeros(20, dtype=torch.float64),
            bilevel.positive(0.1),
        )
        return bilevel.solve(problem, "cg", steps=3, outer_optimizer=lambda t: torch.optim.SGD(t, lr=0.1))

    few = run()
    monkeypatch.setattr("bilevel.inner.lbfgs.MANY", 20)
    many = run()
    assert many.outer_loss == pytest.approx(few.outer_loss, rel=1e-6)
    steps, before = (sum(record.inner_steps for record in found.history) for found in (many, few))
    assert 2 * steps <= before
    assert many.start.gradients < few.start.gradients
