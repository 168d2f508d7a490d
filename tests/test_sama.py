"""The inner optimizer's scaling in place of the inverse Hessian."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import SAMA, FiniteDifference, hypergradient, inner
from bilevel.testing import known_problems, relative_error

B = torch.tensor([1.0, -0.5, 0.7], dtype=torch.float64)
TARGET = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
H = torch.tensor([1.2, 0.9, 0.5], dtype=torch.float64)
T, LR, B1, B2, EPS, DECAY = 25, 0.05, 0.8, 0.95, 1e-8, 0.9


def problem_of(solver: Any) -> bilevel.BilevelProblem:
    return bilevel.BilevelProblem(
        lambda w, h: (h * w**2).sum() / 2 - (B * w).sum(),
        lambda w, h: ((w - TARGET) ** 2).sum() / 2,
        params=torch.zeros(3, dtype=torch.float64),
        hparams=bilevel.positive(H),
        inner_solver=solver,
    )


def scaling_of_adam(g: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """d/dg of lr m' / (1 - β1^t) / (sqrt(s' / (1 - β2^t)) + eps), with m' = β1 m + (1 - β1) g, s' alike, by hand."""
    m, s = B1 * m + (1 - B1) * g, B2 * s + (1 - B2) * g**2
    b1, root = 1 - B1**T, torch.sqrt(s / (1 - B2**T))
    of_root = (1 - B2) * g / ((1 - B2**T) * root)
    return LR / b1 * ((1 - B1) / (root + EPS) - m * of_root / (root + EPS) ** 2)


def scaling_of_rmsprop(g: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """d/dg of lr g / (sqrt(s') + eps)."""
    s = DECAY * s + (1 - DECAY) * g**2
    root = torch.sqrt(s)
    return LR * (1.0 / (root + EPS) - g * (1 - DECAY) * g / (root * (root + EPS) ** 2))


def scaling_of_sgd(g: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """d/dg of lr (momentum v + g) is lr."""
    return LR * torch.ones_like(g)


SOLVERS: dict[str, tuple[Any, Any, float, float]] = {
    "sgd": (inner.SGD(lr=LR, steps=T), scaling_of_sgd, 0.0, 0.0),
    "momentum": (inner.SGD(lr=LR, momentum=0.7, steps=T), scaling_of_sgd, 0.0, 0.0),
    "adam": (inner.Adam(lr=LR, betas=(B1, B2), eps=EPS, steps=T), scaling_of_adam, B1, B2),
    "adamw": (inner.AdamW(lr=LR, betas=(B1, B2), eps=EPS, weight_decay=0.0, steps=T), scaling_of_adam, B1, B2),
    "rmsprop": (inner.RMSProp(lr=lambda h: LR, alpha=DECAY, eps=EPS, steps=T), scaling_of_rmsprop, 0.0, DECAY),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_it_is_the_formula_of_the_optimizer(name: str) -> None:
    """-w ∘ D ∘ (w - t) for g = h·w^2/2 - b·w: the state from a loop by hand, D differentiated on paper."""
    solver, scaling, b1, b2 = SOLVERS[name]
    found = hypergradient(problem_of(solver), "sama", on_untrusted="ignore")
    w, m, s = (
        torch.zeros(3, dtype=torch.float64),
        torch.zeros(3, dtype=torch.float64),
        torch.zeros(3, dtype=torch.float64),
    )
    v = torch.zeros(3, dtype=torch.float64)
    for t in range(1, T + 1):
        g = H * w - B
        m, s, v = b1 * m + (1 - b1) * g, b2 * s + (1 - b2) * g**2, 0.7 * v + g
        if "adam" in name:
            w = w - LR * (m / (1 - b1**t)) / (torch.sqrt(s / (1 - b2**t)) + EPS)
        elif name == "rmsprop":
            w = w - LR * g / (torch.sqrt(s) + EPS)
        else:
            w = w - LR * (v if name == "momentum" else g)
    assert relative_error(found.params, w) <= 1e-10
    assert relative_error(found.gradient, -w * scaling(H * w - B, m, s) * (w - TARGET)) <= 1e-8
    assert found.cost.products == 0


@pytest.mark.parametrize("known", known_problems(), ids=lambda known: known.name)
def test_without_an_optimizers_state_it_is_finite_difference(known: Any) -> None:
    given = {"params": known.truth.params, "on_untrusted": "ignore"}
    found, expected = (hypergradient(known.problem(), method, **given) for method in (SAMA(), FiniteDifference()))
    assert relative_error(found.gradient, expected.gradient) == 0.0
    adam = hypergradient(known.problem(inner.Adam(lr=0.1, steps=5)), SAMA(), **given)  # it did not run
    assert relative_error(adam.gradient, expected.gradient) == 0.0


@pytest.mark.parametrize("name", SOLVERS)
def test_the_estimate_sees_how_rough_it_is(name: str) -> None:
    """Trained to the end: what is off is D in place of the inverse alone."""
    solver = SOLVERS[name][0]
    problem = problem_of(type(solver)(**{**vars(solver), "steps": 2000}))
    found = hypergradient(problem, "sama", on_untrusted="ignore")
    truth = -(B / H) * (B / H - TARGET) / H
    error = relative_error(found.gradient, truth)
    assert found.certificate.verdict != "exact" or error < 1e-3
    assert found.certificate.trusted or found.certificate.reasons


def test_bad_settings_are_refused() -> None:
    with pytest.raises(bilevel.BilevelError, match="`step` is 0, expected a number above 0"):
        SAMA(step=0)
