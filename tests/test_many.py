"""Many hyperparameters: what a hypergradient takes does not depend on their number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel.minimize import NUMBERS, history

X, Y = torch.randn(12, 100_000, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
SCALE = 100_000**0.5


def ridge(hyperparameters: int, **more: Any) -> bilevel.BilevelProblem:
    """Ridge regression of 100,000 weights, with one strength for all or one for each: the same at the start."""

    def inner_loss(w: Tensor, h: Tensor) -> Tensor:
        return ((X @ w / SCALE - Y) ** 2).sum() + (h * w**2).sum()

    def outer_loss(w: Tensor, h: Tensor) -> Tensor:
        return ((X[:6] @ w / SCALE - 1.0) ** 2).sum()

    start = torch.zeros(100_000, dtype=torch.float64)
    return bilevel.BilevelProblem(
        inner_loss, outer_loss, start, bilevel.positive(0.3, shape=(hyperparameters,)), **more
    )


@pytest.mark.parametrize("method", ["cg", "minres", "neumann", "shine", "unroll", "truncated", "one-step", "penalty"])
def test_what_one_takes_many_take(method: str) -> None:
    more = (
        {"inner_solver": bilevel.inner.SGD(lr=0.1, steps=10)} if method in ("unroll", "truncated", "one-step") else {}
    )
    settings = {"on_untrusted": "ignore"}
    one = bilevel.hypergradient(ridge(1, **more), method, **settings)
    many = bilevel.hypergradient(ridge(100_000, **more), method, **settings)
    assert (one.cost.gradients, one.cost.products) == (many.cost.gradients, many.cost.products)
    # The strength of all moves each: its gradient is the sum.
    torch.testing.assert_close(many.gradient.sum(), one.gradient.sum(), rtol=1e-6, atol=1e-9)


def test_a_run_starts_alike() -> None:
    one, many = (bilevel.solve(ridge(n), "cg", steps=1).start for n in (1, 100_000))
    assert (one.gradients, one.products, one.inner_steps) == (many.gradients, many.products, many.inner_steps)
    assert len(many.hparams[next(iter(many.hparams))]) == 5  # quantiles


@pytest.mark.parametrize(("unknowns", "pairs"), [(1, 20), (1_000_000, 20), (10_000_000, 6), (10**9, 5)])
def test_pairs_of_many_unknowns_are_few(unknowns: int, pairs: int) -> None:
    assert history(unknowns) == pairs
    assert pairs == 5 or 2 * pairs * unknowns <= NUMBERS


def test_a_limit_on_steps_holds_for_the_solver_that_steps_in() -> None:
    """Where conjugate gradients meet negative curvature, MINRES goes on, for as many steps at most."""
    curvature = torch.cat([torch.linspace(0.01, 1.0, 300), torch.tensor([-0.5])]).double()
    problem = bilevel.BilevelProblem(
        lambda w, h: 0.5 * (curvature * w**2).sum() + h * w.sum(),
        lambda w, h: 0.5 * ((w - 1.0) ** 2).sum(),
        torch.zeros(301, dtype=torch.float64),
        bilevel.real(torch.tensor(0.0, dtype=torch.float64)),
    )
    at = torch.zeros(301, dtype=torch.float64)
    method = bilevel.Implicit(bilevel.CG(max_steps=4))
    found = bilevel.hypergradient(problem, method, params=at, on_untrusted="ignore")
    assert found.certificate.verdict == "untrusted"
    assert found.cost.products <= 30
