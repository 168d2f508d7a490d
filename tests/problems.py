"""The problems of `bilevel.testing` by name, for every test file that asks for them."""

from __future__ import annotations

from typing import Any

import pytest

from bilevel import Hypergradient, hypergradient
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
