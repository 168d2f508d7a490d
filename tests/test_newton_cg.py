"""Newton's method with conjugate gradients as the inner solver: at its tolerance, in few gradients, or it says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import inner
from bilevel.evaluation import Evaluator

D = torch.float64


def logistic(solver: Any, dtype: torch.dtype = D, scales: Tensor | None = None) -> bilevel.BilevelProblem:
    generator = torch.Generator().manual_seed(1)
    X, Xv = torch.randn(2, 80, 12, generator=generator, dtype=D)
    X = (X if scales is None else X * scales).to(dtype)
    y, yv = (torch.rand(2, 80, generator=generator, dtype=D) < 0.4).to(dtype)
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    return bilevel.BilevelProblem(
        lambda w, h: loss(X @ w, y) + (h * w**2).sum(),
        lambda w, h: loss(Xv.to(dtype) @ w, yv),
        torch.zeros(12, dtype=dtype),
        bilevel.positive(1e-2, shape=(12,)),
        inner_solver=solver,
    )


def cost(problem: bilevel.BilevelProblem) -> Any:
    evaluator = Evaluator(problem, bilevel.Implicit(bilevel.CG()))
    return evaluator(problem.hparams.layout.start).hypergradient.cost


@pytest.mark.parametrize(("dtype", "rtol"), [(D, 1e-9), (torch.float32, 1e-5)])
def test_it_ends_where_lbfgs_ends(dtype: torch.dtype, rtol: float) -> None:
    found = bilevel.hypergradient(logistic(inner.NewtonCG(), dtype))
    assert found.certificate.inner_residual is not None
    assert found.certificate.inner_residual <= rtol
    expected = bilevel.hypergradient(logistic(inner.LBFGS(rtol=1e-13)))
    torch.testing.assert_close(found.params.double(), expected.params, rtol=100 * rtol, atol=100 * rtol)
    torch.testing.assert_close(found.gradient.double(), expected.gradient, rtol=1e3 * rtol, atol=10 * rtol)


def test_bad_scales_take_few_gradients() -> None:
    """L-BFGS learns the scales step by step; conjugate gradients have them from products."""
    scales = torch.logspace(-2, 2, 12, dtype=D)
    newton, lbfgs = (cost(logistic(solver, scales=scales)) for solver in (inner.NewtonCG(), inner.LBFGS()))
    assert newton.gradients < lbfgs.gradients / 2
    found = bilevel.hypergradient(logistic(inner.NewtonCG(), scales=scales), on_untrusted="raise")
    assert found.certificate.inner_residual is not None
    assert found.certificate.inner_residual <= 1e-9


def test_from_a_maximum_it_goes_downhill() -> None:
    problem = bilevel.BilevelProblem(
        lambda w, h: (w**4 / 4 - h * w**2 / 2).sum(),
        lambda w, h: w.sum(),
        torch.tensor([0.01, 0.3], dtype=D),
        bilevel.positive(4.0),
        inner_solver=inner.NewtonCG(),
    )
    found = bilevel.hypergradient(problem, on_untrusted="raise")  # w = sqrt(h), dF/dh = 2 / (2 sqrt(h))
    torch.testing.assert_close(found.params, torch.full((2,), 2.0, dtype=D))
    assert found.gradient.item() == pytest.approx(0.5, rel=1e-6)


def test_the_line_search_halves_steps_that_are_too_long() -> None:
    """From w = 3 a full Newton step on log cosh goes to -98, where the next one overflows."""
    problem = bilevel.BilevelProblem(
        lambda w, h: torch.nn.functional.softplus(2 * (w - h)).sum() - (w - h).sum(),
        lambda w, h: w.sum(),
        torch.full((1,), 3.0, dtype=D),
        torch.tensor(0.5, dtype=D),
        inner_solver=inner.NewtonCG(),
    )
    found = bilevel.hypergradient(problem)
    assert found.params.item() == pytest.approx(0.5, abs=1e-7)
    assert found.gradient.item() == pytest.approx(1.0, abs=1e-6)


def test_solve_gets_where_it_gets_with_lbfgs() -> None:
    ends = [bilevel.solve(logistic(s), steps=50, seed=0).outer_loss for s in (inner.NewtonCG(), inner.LBFGS())]
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


def test_too_few_steps_are_not_trusted() -> None:
    found = bilevel.hypergradient(logistic(inner.NewtonCG(max_steps=1)), on_untrusted="ignore")
    assert found.certificate.inner_residual is not None
    assert found.certificate.inner_residual > 1e-4
    assert found.certificate.verdict == "untrusted"


def test_a_loss_without_a_minimum_says_so() -> None:
    problem = bilevel.BilevelProblem(
        lambda w, h: -(w**4).sum() + h * (w**2).sum(),
        lambda w, h: (w**2).sum(),
        torch.ones(2, dtype=D),
        bilevel.positive(0.1),
        inner_solver=inner.NewtonCG(),
    )
    with pytest.raises(bilevel.NonFiniteError, match="no minimum: Newton-CG"):
        bilevel.hypergradient(problem)


def test_minibatches_and_wrong_settings_are_refused() -> None:
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 2, dtype=D)), batch_size=2)
    problem = bilevel.BilevelProblem(
        lambda w, h, batch: ((batch[0] @ w - 1) ** 2).mean() + h * (w**2).sum(),
        lambda w, h: (w**2).sum(),
        torch.zeros(2, dtype=D),
        bilevel.positive(0.1),
        inner_solver=inner.NewtonCG(),
        inner_data=data,
    )
    with pytest.raises(bilevel.BilevelError, match=r"inner.NewtonCG|one fixed"):
        bilevel.hypergradient(problem)
    with pytest.raises(bilevel.BilevelError, match="max_steps"):
        inner.NewtonCG(max_steps=0)
    with pytest.raises(bilevel.BilevelError, match="rtol"):
        inner.NewtonCG(rtol=-1.0)
