"""What a study of trust asks: a random problem, the methods that apply, and the hypergradient that is right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.calibration import through_loop
from benchmarks.problems import Dice, Drawn
from bilevel import METHODS, BilevelProblem, inner, positive
from bilevel.oracle import KnownProblem
from bilevel.solvers import Estimator, estimator
from bilevel.solvers.about import about

ABOUT = {name: about(estimator(name)) for name in METHODS}
IMPLICIT = tuple(name for name, a in ABOUT.items() if a.begins == "solution" and a.derivatives == 2 and name != "auto")
FIRST_ORDER = tuple(name for name, a in ABOUT.items() if a.begins == "solution" and a.derivatives < 2)
UNROLLED = tuple(name for name, a in ABOUT.items() if a.unrolls)
NO_TRUTH = None  # no hypergradient exists or the method cannot see it: any trusted answer is wrong


@dataclass(frozen=True)
class Run:
    """One hypergradient to ask for.

    Attributes:
        method: the name of `bilevel.METHODS` that it counts for.
        estimator: with its settings.
        problem: for the library.
        truth: what is right, or `NO_TRUTH`.
        params: inner variables to take as they are; None: the library trains.
    """

    method: str
    estimator: Estimator
    problem: BilevelProblem
    truth: Any
    params: Any = None


@dataclass(frozen=True)
class Case:
    """One random problem under every method that applies.

    Attributes:
        name: which draw of `CASES`.
        healthy: the default settings should do.
        runs: the hypergradients to ask for.
        seed: torch's global seed for each of them.
        drawn: what rival libraries are given; None where they cannot express it.
        params: the inner point that they are given; None: the exact solution.
    """

    name: str
    healthy: bool
    runs: Sequence[Run]
    seed: int = 0
    drawn: Drawn | None = None
    params: Any = None


def all_runs(known: KnownProblem, truth: Any, methods: Sequence[str] = (), params: Any = None) -> list[Run]:
    methods = methods or (IMPLICIT if truth is NO_TRUTH else IMPLICIT + FIRST_ORDER)
    return [Run(name, estimator(name), known.problem(), truth, params) for name in methods]


def loop_runs(drawn: Drawn, methods: Sequence[str] = UNROLLED, steps: int = 100) -> list[Run]:
    """Unroll momentum steps from the start; the default window of 20 forgets what came before up to condition 30."""
    solver = inner.SGD(lr=1.0 / drawn.known.truth.curvature[1], momentum=0.5, steps=steps)
    truth = through_loop(drawn, solver, drawn.known.params)
    fit = [name for name in methods if name != "truncated" or drawn.condition <= 30.0]
    return [Run(name, estimator(name), drawn.known.problem(solver), truth) for name in fit]


def float32_known(dice: Dice, condition: float) -> KnownProblem:
    """Ridge or logistic regression with the same losses in float32 and float64: the data are float32 numbers."""
    n = int(dice.log(4, 60))
    Q, roots = dice.rotation(n), dice.logs(1.0 / condition, 1.0, n).sqrt()
    X, X_val = (((dice.normal(3 * n, n) * roots) @ Q.T).float().double() for _ in range(2))
    truth = dice.normal(n)
    strength = positive(float(torch.tensor(0.5 / condition)))
    y, y_val = ((x @ truth + dice.normal(3 * n)).float().double() for x in (X, X_val))
    if dice.choice((True, False)):

        def inner_loss(w: Tensor, h: Tensor) -> Tensor:
            return ((X.to(w.dtype) @ w - y.to(w.dtype)) ** 2).mean() / 2 + h * (w**2).sum() / 2
    else:

        def inner_loss(w: Tensor, h: Tensor) -> Tensor:
            return softplus(-y.sign().to(w.dtype) * (X.to(w.dtype) @ w)).mean() + h * (w**2).sum() / 2

    return KnownProblem(
        "float32",
        inner_loss,
        lambda w, h: ((X_val.to(w.dtype) @ w - y_val.to(w.dtype)) ** 2).mean() / 2,
        torch.zeros(n, dtype=torch.float64),
        strength,
    )


def float32_runs(known: KnownProblem) -> list[Run]:
    value = known.hparams.value
    problem = BilevelProblem(known.inner_loss, known.outer_loss, known.params.float(), positive(value.float()))
    return [Run(name, estimator(name), problem, known.truth.gradient) for name in IMPLICIT]


def error_of(found: Any, truth: Any) -> float:
    """Return the relative error, against the size of `found` in float64; infinite where it is not finite."""
    left, right = (
        torch.cat([t.detach().double().reshape(-1) for t in optree.tree_leaves(side)]) for side in (found, truth)
    )
    size = float(right.norm())
    error = float((left - right).norm()) / (size if size > 0.0 else 1.0)
    return error if math.isfinite(error) else math.inf
