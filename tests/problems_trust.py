"""Quadratics of given eigenvalues, and hypergradients without warnings, for the tests of trust."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import bilevel
from benchmarks.problems import Dice
from bilevel import BilevelProblem, hypergradient
from bilevel.certificate import Hypergradient
from bilevel.solvers import Estimator

D = torch.float64


def at(problem: BilevelProblem, method: str | Estimator, params: Any = None) -> Hypergradient:
    return hypergradient(problem, method, params=params, on_untrusted="ignore")


def quadratic(values: list[float], inner_by: float = 1.0, outer_by: float = 1.0) -> tuple[BilevelProblem, Tensor]:
    """Return inner_by (w·Aw / 2 - h b·w) and its stationary point; A has these eigenvalues."""
    n = len(values)
    dice = Dice(n)
    Q, eigenvalues, b, target = dice.rotation(n), torch.tensor(values, dtype=D), dice.normal(n), dice.normal(n)
    A = (Q * eigenvalues) @ Q.T
    problem = BilevelProblem(
        lambda w, h: inner_by * (w @ (A @ w) / 2 - h * (b @ w)),
        lambda w, h: outer_by * ((w - target) ** 2).sum() / 2,
        torch.zeros(n, dtype=D),
        bilevel.positive(1.0),
    )
    return problem, Q @ ((Q.T @ b) / eigenvalues)
