"""The inverse estimate of the inner quasi-Newton method, shared with the backward pass and refined by a few steps.

    x = α H b,  then quasi-Newton steps on A x = b from there      H: see `bilevel.solvers.linear.secant`

Ramzi, Mannel, Bai, Starck, Ciuciu and Moreau, SHINE: SHaring the INverse Estimate from the forward pass for bi-level
optimization and implicit models, ICLR 2022, algorithm 1 and section 2.3 ("refine"). On a quadratic with exact line
searches BFGS steps from H are conjugate gradients preconditioned by H (Nazareth, A relationship between the BFGS and
conjugate gradient algorithms, SIAM J. Numer. Anal. 16, 1979), and so they are taken here. Deliberate differences: the
length α is the one that the line search gives, since the true residual takes that product anyway; and the paper's
fallback to the Jacobian-free answer, where its norm is a third smaller, is one to the same steps without H, where the
residual did not fall and those steps lower the error in the norm of A further. That error falls at every step while
the residual of a badly conditioned system may grow for long, so the last iterate is the answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from bilevel.errors import InvalidValueError
from bilevel.operators import LinearOperator
from bilevel.solvers.about import Terms
from bilevel.solvers.linear.base import (
    LinearSolution,
    check_count,
    check_settings,
    default_rtol,
    dtype_of,
    finished,
    inner,
    start_from,
    wide,
)
from bilevel.solvers.linear.cg import Run
from bilevel.solvers.linear.secant import gathered, precondition
from bilevel.vector import Vector


@dataclass(frozen=True)
class QuasiNewton:
    """Approximate A^-1 b by the inverse estimate that the inner L-BFGS ended with, and a few steps.

    An inner solver that has none (Adam, a loop of your own), or an inner solution that is given, leaves the steps
    alone; those of one hypergradient are then kept for the next of the run.

    Args:
        max_steps: products; 1 is the estimate as it is, each more is a step of refinement.
        rtol: stop earlier when |b - Ax| <= rtol |b|; None: 1e-8 in float64, 1e-5 in float32.

    >>> import torch
    >>> from bilevel.operators import LinearOperator, Pairs
    >>> eye, diagonal = torch.eye(2, dtype=torch.float64), torch.tensor([2.0, 4.0], dtype=torch.float64)
    >>> seen = Pairs(eye, diagonal * eye, torch.ones(2, dtype=torch.float64))  # all that there is to see
    >>> zero = {"w": torch.zeros(2, dtype=torch.float64)}
    >>> A = LinearOperator(lambda v: {"w": diagonal * v["w"]}, zero, symmetric=True, pairs=seen)
    >>> QuasiNewton(max_steps=1).solve(A, {"w": torch.ones(2, dtype=torch.float64)}).value["w"]
    tensor([0.5000, 0.2500], dtype=torch.float64)
    """

    max_steps: int = 20
    rtol: float | None = None
    truncates: ClassVar[bool] = True
    terms: ClassVar[Terms] = Terms(
        "k + 2 products, k = 20 steps", "40 pairs of n numbers", "what 20 steps leave; measured", "Ramzi et al. 2022"
    )

    def __post_init__(self) -> None:
        check_settings(self.rtol, self.max_steps)
        check_count(self.max_steps, "max_steps")

    def solve(self, operator: LinearOperator, rhs: Vector, start: Vector | None = None) -> LinearSolution:
        """Approximate the solution of A x = rhs. Raises for an operator that is not symmetric."""
        if not operator.symmetric:
            raise InvalidValueError('QuasiNewton needs a symmetric operator and this one is not; use method="gmres"')
        b = wide(rhs)
        threshold = default_rtol(self.rtol, dtype_of(rhs), operator.slack) * math.sqrt(inner(b, b))
        x, r = start_from(operator, b, None if start is None else wide(start))
        if math.sqrt(inner(r, r)) <= threshold:
            return replace(finished(operator, rhs, x, "converged", 0, None), kept=operator.kept)
        made = precondition(operator)
        run, notes, spent = Run(operator, b, x, r, made), (made.note,), 0
        status = run.iterate(threshold, self.max_steps)
        if status == "max_steps" and run.best_x is x and gathered(operator) is not None:
            alone = Run(operator, b, x, r, precondition(replace(operator, pairs=None, kept=None)))
            ended, spent = alone.iterate(threshold, self.max_steps), self.max_steps
            if not alone.fall < run.fall:
                run, status, notes = alone, ended, (_FALLBACK,)
        end = run.x if status == "max_steps" else run.best_x
        solution = finished(operator, rhs, end, status, run.steps + spent, run.smallest_ritz())
        return replace(solution, kept=run.kept(status), notes=notes)


_FALLBACK = "steps without the quasi-Newton pairs came further than steps with them (SHINE's fallback)"
