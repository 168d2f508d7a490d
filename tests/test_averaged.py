"""Means over draws of batches, with their standard errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import bilevel

torch.manual_seed(0)
X = torch.randn(64, 3, dtype=torch.float64)
Y = X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + torch.randn(64, dtype=torch.float64)


def loss(w: Tensor, h: Tensor, batch: Any) -> Tensor:
    value: Tensor = ((batch[0] @ w - batch[1]) ** 2).mean() + h * (w**2).sum()
    return value


def problem(batch_size: int) -> bilevel.BilevelProblem:
    def loader() -> Any:
        # With replacement, so that draws are independent, as the formula of the standard error has it.
        data = TensorDataset(X, Y)
        sampler = RandomSampler(data, replacement=True, num_samples=10_000) if batch_size < 64 else None
        return DataLoader(data, batch_size=batch_size, sampler=sampler)

    return bilevel.BilevelProblem(
        loss,
        lambda w, h, batch: ((batch[0] @ w - 0.9 * batch[1]) ** 2).mean(),
        torch.zeros(3, dtype=torch.float64),
        bilevel.positive(0.3),
        inner_solver=bilevel.inner.SGD(lr=0.1, steps=60),
        inner_data=loader(),
        outer_data=loader(),
    )


def at_optimum(of: bilevel.BilevelProblem, method: Any) -> bilevel.Hypergradient:
    w = torch.linalg.solve(X.T @ X / 64 + 0.3 * torch.eye(3, dtype=torch.float64), X.T @ Y / 64)
    return bilevel.hypergradient(of, method, params=w, on_untrusted="ignore")


def test_whole_batches_have_no_spread() -> None:
    torch.manual_seed(0)
    single, mean = at_optimum(problem(64), "direct"), at_optimum(problem(64), bilevel.Averaged(4))
    torch.testing.assert_close(mean.gradient, single.gradient, rtol=1e-10, atol=0.0)
    assert mean.certificate.standard_error is not None and mean.certificate.standard_error < 1e-10
    assert mean.certificate.verdict == "exact"
    assert mean.cost.gradients > 3 * 2


def test_the_standard_error_is_the_spread_of_repeated_means() -> None:
    """60 means of 5 draws: their standard deviation against the mean of the standard errors that they report."""
    torch.manual_seed(0)
    stream = problem(16)
    means, errors = [], []
    for _ in range(60):
        torch.rand(1)  # each call leaves the random state as it was, so move it
        found = at_optimum(stream, bilevel.Averaged(5))
        means.append(float(found.gradient))
        assert found.certificate.standard_error is not None
        errors.append(found.certificate.standard_error * abs(float(found.gradient)))
    spread = float(torch.tensor(means).std())
    # The spread of 60 means is known to 9 %, and 5 draws underestimate a standard error by 6 per cent.
    assert 0.7 * spread < sum(errors) / len(errors) < 1.3 * spread


def test_noisy_draws_are_flagged() -> None:
    torch.manual_seed(0)
    found = at_optimum(problem(4), bilevel.Averaged(2))
    assert found.certificate.verdict == "untrusted" and "standard error over batches" in str(found.certificate)
    assert any("give larger batches" in reason for reason in found.certificate.reasons)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bilevel.Averaged(1), "`batches` is 1"),
        (lambda: bilevel.Averaged(2, bilevel.Unroll()), "`estimator` is Unroll"),
        (lambda: bilevel.Averaged(2, "unroll"), "`estimator` is Unroll"),
        (lambda: bilevel.Averaged(2, "implcit"), "`estimator` is 'implcit', .*did you mean \"implicit\""),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(bilevel.InvalidValueError, match=message):
        make()


def test_a_name_stands_for_its_estimator() -> None:
    assert bilevel.Averaged(4, "cg") == bilevel.Averaged(4, bilevel.Implicit(bilevel.CG()))
