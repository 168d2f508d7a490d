"""Problems that several test files ask for: those of `bilevel.testing` by name, and one with kinks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bilevel import BilevelProblem, Hypergradient, hypergradient, inner, positive, prox
from bilevel.solvers import Estimator, estimator
from bilevel.solvers.about import about
from bilevel.testing import KnownProblem, known_problems

PROBLEMS = {known.name: known for known in known_problems()}
RIDGE, LOGISTIC = PROBLEMS["per-feature ridge"], PROBLEMS["logistic regression"]

every_problem = pytest.mark.parametrize("known", PROBLEMS.values(), ids=PROBLEMS)


def at_truth(known: KnownProblem, method: str | Estimator, solver: Any = None) -> Hypergradient:
    """Take the hypergradient at the exact inner solution; a method that unrolls runs heavy-ball steps from there."""
    steps = known.stepwise() if about(estimator(method)).unrolls else None
    problem = known.problem(steps if solver is None else solver)
    return hypergradient(problem, method, params=known.truth.params, on_untrusted="ignore")


def kinked() -> BilevelProblem:
    """Return a lasso whose inner solver says that it has kinks, for the methods that refuse them."""
    return BilevelProblem(
        lambda w, h: ((w - 1.0) ** 2).sum(),
        lambda w, h: (w**2).sum(),
        torch.zeros(2, dtype=torch.float64),
        positive(0.1),
        inner_solver=inner.Proximal(prox.L1(lambda h: h)),
    )
