"""Differences of gradients, against the products of autograd, and the estimator made of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import CG, Cholesky, FiniteDifference, Implicit, Neumann, hypergradient, inner
from bilevel.response import ProblemResponse
from bilevel.solvers.base import Linearization
from bilevel.solvers.differences import Differences
from bilevel.testing import KnownProblem, check_estimator, relative_error
from problems import PROBLEMS, at_truth, every_problem

# Differences of gradients, against the products of autograd


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e6])
@every_problem
def test_products_by_differences_are_those_of_autograd(known: KnownProblem, size: float) -> None:
    problem = known.problem()
    response = ProblemResponse(problem)
    lower = problem.params.read(known.truth.params, "params")
    upper = problem.hparams.layout.start
    exact, differences = Linearization(response, lower, upper), Differences(response, lower, upper)
    generator = torch.Generator().manual_seed(0)
    v = {name: size * torch.randn(t.shape, generator=generator, dtype=t.dtype) for name, t in lower.items()}
    # Rounding and truncation are eps^(2/3) = 4e-11 both, in units of the third derivative.
    assert relative_error(differences.operator(v), exact.operator(v)) <= 1e-8
    pulled, expected = differences.pull_back(v), exact.pull_back(v)
    assert relative_error(list(pulled.values()), list(expected.values())) <= 1e-8
    assert 0.0 < differences.noise <= 1e-8
    assert (
        relative_error(differences.residual, exact.residual) <= 1e-12
        or float(sum((t**2).sum() for t in exact.residual.values())) <= 1e-24
    )


@pytest.mark.parametrize("size", [1e-9, 1e-3, 1.0, 1e6])
def test_the_step_finds_the_scale_of_the_variables(size: float) -> None:
    """g = sum cos(w / size): its third derivatives matter at moves of `size`, wherever w is; h is 1e-5 of |w| = 100."""
    w = torch.tensor([100.0, 3.0, 1.0], dtype=torch.float64) * size
    problem = bilevel.BilevelProblem(
        lambda w, h: h * torch.cos(w / size).sum(), lambda w, h: w.sum(), params=w, hparams=bilevel.positive(2.0)
    )
    response = ProblemResponse(problem)
    found = Differences(response, problem.params.start, problem.hparams.layout.start)
    v = torch.ones(3, dtype=torch.float64)
    (product,) = found.operator({next(iter(problem.params.start)): v}).values()
    # sin and cos near 100 carry 100 units of rounding: about (100 eps)^(2/3) = 1e-9.
    assert relative_error(product, -2.0 * torch.cos(w / size) / size**2) <= 1e-7


def test_noise_in_the_loss_shows_and_is_kept_small() -> None:
    """A loss that rounds to 1e-9, as one in mixed precision does: the longest step that the loss allows is best."""

    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return torch.round(g * 1e9) / 1e9

    problem = bilevel.BilevelProblem(
        lambda w, h: h * (torch.cosh(Rounded.apply(w))).sum(),  # type: ignore[no-untyped-call]
        lambda w, h: w.sum(),
        params=torch.tensor([0.3, -0.5, 0.2], dtype=torch.float64),
        hparams=bilevel.positive(2.0),
    )
    response = ProblemResponse(problem)
    found = Differences(response, problem.params.start, problem.hparams.layout.start)
    (name, w), *_ = problem.params.start.items()
    error = relative_error(found.operator({name: torch.ones_like(w)})[name], 2.0 * torch.cosh(w))
    assert 1e-10 < error <= 1e-5  # at the step of smooth losses, 4e-6, it would be 1e-4
    assert error / 30.0 <= found.noise <= 30.0 * error


# finite-difference


@every_problem
def test_finite_difference_is_the_formula_of_the_identity(known: KnownProblem) -> None:
    """-α (∂R/∂λ)^T ∂f/∂w by autograd, with α = 1 / L measured and with α given."""
    for size in (None, 0.07):
        expected = at_truth(known, Implicit(Neumann(max_steps=1, step_size=size)))
        found = at_truth(known, FiniteDifference(step_size=size))
        assert relative_error(found.gradient, expected.gradient) <= 1e-8
        assert found.cost.products == 0


def test_the_formula_of_the_identity_by_hand() -> None:
    """g = h·w^2/2 - b·w, f = |w - t|^2/2 + h·c: ∂f/∂h - α w (w - t)."""
    b, t, c, h, α = (
        torch.tensor(x, dtype=torch.float64) for x in ([1.0, -2.0], [0.3, 0.4], [0.1, 0.2], [2.0, 0.5], 0.3)
    )
    problem = bilevel.BilevelProblem(
        lambda w, h: (h * w**2).sum() / 2 - (b * w).sum(),
        lambda w, h: ((w - t) ** 2).sum() / 2 + (h * c).sum(),
        params=torch.zeros(2, dtype=torch.float64),
        hparams=bilevel.positive(h),
        inner_solver=inner.SGD(lr=0.3, steps=400),
    )
    w = b / h
    found = hypergradient(problem, "finite-difference", on_untrusted="ignore")
    assert relative_error(found.gradient, c - α * w * (w - t)) <= 1e-8  # α is the learning rate
    given = hypergradient(problem, FiniteDifference(step_size=0.1, step=1e-4), on_untrusted="ignore")
    assert relative_error(given.gradient, c - 0.1 * w * (w - t)) <= 1e-8


@pytest.mark.parametrize(
    ("solver", "bar"),
    [(CG(rtol=1e-10), 1e-8), (Cholesky(), 1e-8), (Neumann(max_steps=10_000, rtol=1e-9), 1e-6)],
    ids=lambda x: type(x).__name__,
)
def test_with_a_linear_solver_it_is_exact(solver: Any, bar: float) -> None:
    names = ("per-feature ridge", "logistic regression", "coupled quadratic", "linear module")
    known = [PROBLEMS[name] for name in names]  # CG has all of them in test_estimators
    check_estimator(FiniteDifference(solver), tolerance=bar, problems=known)


@every_problem
def test_the_estimate_of_the_identitys_error_is_its_error(known: KnownProblem) -> None:
    found = at_truth(known, "finite-difference")
    error, estimate = relative_error(found.gradient, known.truth.gradient), found.certificate.error
    assert estimate is not None and error / 1.5 <= estimate <= 1.5 * error
    assert found.certificate.verdict == ("approximate" if estimate < 0.4 else "untrusted")
    if estimate >= 0.4:
        assert "bilevel.FiniteDifference(bilevel.CG(" in found.certificate.reasons[0]


def test_an_inner_hessian_that_is_a_multiple_of_the_identity_is_exact() -> None:
    problem = bilevel.BilevelProblem(
        lambda w, h: ((w - h) ** 2).sum(),
        lambda w, h: (w**2).sum(),
        params=torch.zeros(3, dtype=torch.float64),
        hparams=torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64),
    )
    found = hypergradient(problem, "finite-difference")
    assert relative_error(found.gradient, 2.0 * torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)) <= 1e-8
    assert found.certificate.verdict == "exact"


@pytest.mark.parametrize("method", ["finite-difference", "sama"])
@pytest.mark.parametrize("last", [0.3, 0.0])
def test_what_only_the_inverse_reaches_is_untrusted(method: str, last: float) -> None:
    """λ bends w0 and f sees w1: the identity's gradient is zero; so is sama's adjoint if the last learning rate is."""
    H = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)

    def problem(*names: str) -> bilevel.BilevelProblem:
        return bilevel.BilevelProblem(
            lambda w, h: w @ (H @ w) / 2 - w.sum() + h["bends"] * w[0] ** 2 / 2,
            lambda w, h: (w[1] - 0.3) ** 2,
            params=torch.zeros(2, dtype=torch.float64),
            hparams={name: bilevel.positive(1.0) for name in names},
            inner_solver=inner.SGD(lr=lambda h, t: 0.3 if t < 199 else last, steps=200),
        )

    found = hypergradient(problem("bends"), method, on_untrusted="ignore")
    assert float(found.gradient["bends"]) == 0.0
    assert found.certificate.error == pytest.approx(1.0) and not found.certificate.trusted
    with pytest.raises(bilevel.UnseenHyperparameterError, match="unused"):
        hypergradient(problem("bends", "unused"), method)


def test_a_penalty_with_kinks_is_refused() -> None:
    lasso = bilevel.BilevelProblem(
        lambda w, h: ((w - 1.0) ** 2).sum(),
        lambda w, h: (w**2).sum(),
        params=torch.zeros(3, dtype=torch.float64),
        hparams=bilevel.positive(0.1),
        inner_solver=inner.ProximalGradient(bilevel.prox.L1(lambda h: h), lr=0.1, steps=100),
    )
    with pytest.raises(bilevel.BilevelError, match="kinks"):
        hypergradient(lasso, "finite-difference")
