"""A factored Hessian serves the inner and the adjoint solves of the steps that follow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel.evaluation import Evaluator
from bilevel.operators import LinearOperator
from bilevel.solvers.linear import CG, Cholesky

D = torch.float64
N = 100


def logistic(dtype: torch.dtype = D) -> bilevel.BilevelProblem:
    """Per-feature L2 of logistic regression with 100 features of sizes two decades apart: more than `DENSE_UP_TO`."""
    generator = torch.Generator().manual_seed(0)
    X, V = (torch.randn(300, N, generator=generator, dtype=D) * torch.logspace(-1, 1, N, dtype=D) for _ in range(2))
    truth = torch.randn(N, generator=generator, dtype=D) / torch.logspace(-1, 1, N, dtype=D) / 3
    y, yv = ((Z @ truth + 0.5 * torch.randn(300, generator=generator, dtype=D) > 0).to(dtype) for Z in (X, V))
    X, V = X.to(dtype), V.to(dtype)
    loss = torch.nn.functional.binary_cross_entropy_with_logits

    def inner_loss(w: Tensor, h: Tensor) -> Tensor:
        return loss(X @ w, y) + (h * w**2).sum() / 2

    return bilevel.BilevelProblem(
        inner_loss,
        lambda w, h: loss(V @ w, yv),
        torch.zeros(N, dtype=dtype),
        bilevel.positive(torch.full((N,), 1e-2, dtype=dtype)),
    )


def test_a_run_takes_few_gradients_and_products() -> None:
    by_cg, by_factor = (bilevel.solve(logistic(), method, steps=8) for method in ("cg", "implicit"))
    exact = bilevel.hypergradient(logistic(), "direct", hparams=by_factor.hparams).outer_loss
    assert by_factor.outer_loss == pytest.approx(exact, rel=1e-8)
    spent, before = (sum(r.gradients + r.products for r in run.history) for run in (by_factor, by_cg))
    assert 2 * spent < before
    late = by_factor.history[4:]
    assert max(record.inner_steps for record in late) <= 8, "Newton steps, not those of L-BFGS"
    assert all(record.verdict == "exact" for record in by_factor.history)


def test_float32_is_served_too() -> None:
    by_cg, run = (bilevel.solve(logistic(torch.float32), method, steps=8) for method in ("cg", "implicit"))
    assert all(record.verdict == "exact" for record in run.history)
    spent, before = (sum(r.gradients + r.products for r in found.history) for found in (run, by_cg))
    assert 5 * spent < 4 * before  # the walk soon comes to where both need float64


def test_a_method_that_was_asked_for_is_left_alone() -> None:
    run = bilevel.solve(logistic(), bilevel.Implicit(CG(preconditioner=None)), steps=2)
    assert min(record.inner_steps for record in run.history) > 10


def test_newton_gives_way_to_lbfgs_where_it_overshoots() -> None:
    # log cosh has a gradient of size one and no curvature far from its minimum: a Newton step from there goes far off.
    def inner_loss(w: Tensor, h: Tensor) -> Tensor:
        return (w - h).cosh().log().sum() + 1e-3 * (w**2).sum()

    jump = lambda tensors: torch.optim.SGD(tensors, lr=8.0)  # noqa: E731
    problem = bilevel.BilevelProblem(
        inner_loss, lambda w, h: -w.sum(), torch.zeros(3, dtype=D), bilevel.real(torch.zeros(3, dtype=D))
    )
    run = bilevel.solve(problem, steps=2, outer_optimizer=jump)
    assert all(record.verdict == "exact" for record in run.history)
    torch.testing.assert_close(torch.tanh(run.params - run.hparams), -2e-3 * run.params)


def test_the_error_is_measured_with_the_factor() -> None:
    loose, tight = (replace_solver(logistic(), bilevel.inner.LBFGS(rtol=rtol)) for rtol in (1e-3, 1e-12))
    evaluator, h = Evaluator(loose, bilevel.Implicit()), torch.full((N,), 1e-2, dtype=D)
    for step in range(5):
        h = h * torch.randn(N, generator=torch.Generator().manual_seed(step), dtype=D).exp()
        found = evaluator({"hparams": h}).hypergradient
        truth = bilevel.hypergradient(tight, "direct", hparams=h).gradient
        assert found.certificate.error is not None
        true = float((found.gradient["hparams"] - truth).norm() / truth.norm())
        assert true <= 3 * found.certificate.error <= 300 * true
    assert evaluator.factor is not None


def replace_solver(problem: bilevel.BilevelProblem, solver: bilevel.inner.LBFGS) -> bilevel.BilevelProblem:
    start = problem.params.start["params"], bilevel.positive(torch.full((N,), 1e-2, dtype=D))
    return bilevel.BilevelProblem(problem.inner_loss, problem.outer_loss, *start, solver)


def matrix(scales: Tensor) -> tuple[LinearOperator, Tensor]:
    """Return S G S as an operator, and G: condition 10, whatever the scales."""
    Q = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=D)).Q
    G = (Q * torch.linspace(1.0, 10.0, 6, dtype=D)) @ Q.T
    A = scales[:, None] * G * scales
    return LinearOperator(lambda v: {"w": A @ v["w"]}, {"w": torch.zeros(6, dtype=D)}, symmetric=True), G


def test_rows_of_sizes_far_apart_are_no_singularity() -> None:
    scales = torch.logspace(-7, 4, 6, dtype=D)
    operator, G = matrix(scales)
    b = torch.ones(6, dtype=D)
    found = Cholesky().solve(operator, {"w": b})
    assert found.status == "converged"
    assert found.factor is not None
    torch.testing.assert_close(found.value["w"] * scales, torch.linalg.solve(G, b / scales), rtol=1e-10, atol=0.0)


def test_a_factor_of_a_matrix_nearby_leaves_few_steps() -> None:
    scales = torch.logspace(-2, 2, 6, dtype=D)
    operator, _ = matrix(scales)
    near, _ = matrix(1.01 * scales)
    b = {"w": torch.ones(6, dtype=D)}
    factor = Cholesky().solve(operator, b).factor
    found = CG().solve(replace(near, factor=factor), b)
    assert (found.status, found.steps) == ("converged", 1)
    assert found.curvature == pytest.approx(float(torch.linalg.eigvalsh(near.dense())[0]), rel=0.05)
