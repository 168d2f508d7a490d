"""Neumann series for the inverse of a symmetric positive definite matrix.

    x = step_size * sum_k (I - step_size * A)^k b

Lorraine, Vicol and Duvenaud, Optimizing millions of hyperparameters by implicit differentiation, AISTATS
2020, equation 5. Deliberate difference: the step size is 1 / (largest eigenvalue), measured, where the
paper takes the inner learning rate; a step above 2 / (largest eigenvalue) makes the series diverge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from bilevel.errors import InvalidValueError
from bilevel.operators import LinearOperator
from bilevel.solvers.about import Terms
from bilevel.solvers.linear.base import (
    LinearSolution,
    Status,
    check_count,
    check_settings,
    default_rtol,
    dtype_of,
    finished,
    inner,
    start_from,
    wide,
)
from bilevel.solvers.linear.lanczos import extreme_eigenvalues
from bilevel.vector import Vector

GROWTH = 10.0  # a residual this many times the first one ends the series


@dataclass(frozen=True)
class Neumann:
    """Approximate A^-1 b by a truncated Neumann series.

    Args:
        max_steps: most terms, one product each; the error falls like (1 - 1/condition)^max_steps.
        rtol: stop earlier when |b - Ax| <= rtol |b|; None: 1e-8 in float64, 1e-5 in float32.
        step_size: the scaling; None: measured by 12 Lanczos products.

    >>> import torch
    >>> from bilevel.operators import LinearOperator
    >>> A = LinearOperator(lambda v: {"w": 4.0 * v["w"]}, {"w": torch.zeros(2)}, symmetric=True)
    >>> Neumann(max_steps=100).solve(A, {"w": torch.ones(2)}).value["w"]
    tensor([0.2500, 0.2500])
    """

    max_steps: int = 100
    rtol: float | None = None
    step_size: float | None = None
    truncates: ClassVar[bool] = True
    terms: ClassVar[Terms] = Terms(
        "k + 12 products, k = 100 terms", "one gradient graph", "(1 - 1/κ)^k", "Lorraine et al. 2020"
    )

    def __post_init__(self) -> None:
        check_settings(self.rtol, self.max_steps)
        check_count(self.max_steps, "max_steps")
        if self.step_size is not None and not self.step_size > 0.0:
            raise InvalidValueError(f"`step_size` is {self.step_size}, expected a positive number")

    def solve(self, operator: LinearOperator, rhs: Vector, start: Vector | None = None) -> LinearSolution:
        """Approximate the solution of A x = rhs. Raises for an operator that is not symmetric."""
        if not operator.symmetric:
            raise InvalidValueError(
                "Neumann needs a symmetric operator to measure its step size, and this one is not; "
                'use method="fixed-point" or method="direct"'
            )
        b = wide(rhs)
        x, r = start_from(operator, b, None if start is None else wide(start))
        threshold = default_rtol(self.rtol, dtype_of(rhs)) * math.sqrt(inner(b, b))
        best_x, best, first = x, math.sqrt(inner(r, r)), math.sqrt(inner(r, r))
        step_size = self._scaling(operator) if best > threshold else 0.0
        low: float | None = None  # over the residuals only: directions that b does not have do no harm
        steps = 0
        status: Status = "converged"
        while best > threshold and status == "converged":
            x = x + step_size * r
            Ar = operator.flat(r)
            curvature = inner(r, Ar) / inner(r, r)
            low = curvature if low is None else min(low, curvature)
            r = r - step_size * Ar
            steps, size = steps + 1, math.sqrt(inner(r, r))
            if size < best:
                best_x, best = x, size
            if not size <= GROWTH * first:
                # The last residual lies along the end of the spectrum that grew.
                status = "diverged" if curvature > 0.0 else "indefinite"
            elif steps == self.max_steps and best > threshold:
                status = "indefinite" if size > first and curvature < 0.0 else "max_steps"
        if start is None and steps and best == first:  # no sum is better than none: the first term, a step of training
            best_x = step_size * b
        return finished(operator, rhs, best_x, status, steps, low)

    def _scaling(self, operator: LinearOperator) -> float:
        """Return the step size, measured where none was given."""
        if self.step_size is not None:
            return self.step_size
        _, high = extreme_eigenvalues(operator)
        return 1.0 / high if high > 0.0 else 1.0
