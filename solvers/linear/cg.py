"""Conjugate gradients.

Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems, J. Res. NBS 49 (1952).
Deliberate differences from the textbook: the curvature p·Ap is tested at every step; the best iterate
is returned with its true residual; the residual is recomputed every `REFRESH` steps; dots are summed
in float64; the smallest Ritz value comes from the coefficients for free (Golub and Van Loan, Matrix
Computations, 4th ed., section 11.3.4); a badly scaled system is found out on the way and preconditioned by
its diagonal, which costs an easy one nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bilevel.errors import InvalidValueError
from bilevel.operators import LinearOperator
from bilevel.solvers.about import Terms
from bilevel.solvers.linear.base import (
    LinearSolution,
    Status,
    check_settings,
    default_rtol,
    dtype_of,
    finished,
    inner,
    start_from,
    wide,
)
from bilevel.solvers.linear.diagonal import badly_scaled, estimate_diagonal, kept_positive
from bilevel.solvers.linear.lanczos import smallest_ritz
from bilevel.vector import Vector, flatten, unflatten

REFRESH = 50  # steps between two recomputations of the true residual
PATIENCE = 100  # steps without a better residual, after which the decrease of the energy decides
# The residual of an ill-conditioned system first grows for long while the energy x·Ax/2 - b·x falls. Stagnation is an
# energy that does not fall either: less than this part of its fall so far, over PATIENCE steps.
NEGLIGIBLE = 1e-10
PROBATION = 50  # steps without convergence after which "auto" looks at the diagonal


@dataclass(frozen=True)
class CG:
    """Solve a symmetric positive definite system by conjugate gradients.

    Args:
        rtol: stop when |b - Ax| <= rtol |b|; None: 1e-8 in float64, 1e-5 in float32. Smaller is more
            accurate and slower; the error of x is at most the condition number times rtol.
        max_steps: most iterations; None: ten times the number of unknowns, at most 10,000.
        preconditioner: "auto" estimates the diagonal by 8 products after 50 steps without convergence, and uses it
            where entries differ a hundredfold; "diagonal" does so from the start; "second-moment" takes
            the root of the second moment that inner.Adam ended with, at no product; a function v -> M^-1 v is the
            user's own, symmetric positive definite; None: none.

    >>> import torch
    >>> from bilevel.operators import LinearOperator
    >>> A = LinearOperator(lambda v: {"w": 2.0 * v["w"]}, {"w": torch.zeros(3)}, symmetric=True)
    >>> CG().solve(A, {"w": torch.ones(3)}).value["w"]
    tensor([0.5000, 0.5000, 0.5000])
    """

    rtol: float | None = None
    max_steps: int | None = None
    preconditioner: Literal["auto", "diagonal", "second-moment"] | Callable[[Vector], Vector] | None = "auto"
    truncates: ClassVar[bool] = False
    terms: ClassVar[Terms] = Terms(
        "k + 2 products, k ~ sqrt(κ) log(1/rtol)",
        "one gradient graph",
        "at most κ rtol",
        "Pedregosa 2016; Lorraine et al. 2020",
    )

    def __post_init__(self) -> None:
        check_settings(self.rtol, self.max_steps)
        if not (self.preconditioner in ("auto", "diagonal", "second-moment", None) or callable(self.preconditioner)):
            raise InvalidValueError(
                f'`preconditioner` is {self.preconditioner!r}, expected "auto", "diagonal", "second-moment", '
                "None or a function"
            )

    def solve(self, operator: LinearOperator, rhs: Vector, start: Vector | None = None) -> LinearSolution:
        """Solve A x = rhs. Raises for an operator that is not symmetric."""
        if not operator.symmetric:
            raise InvalidValueError('CG needs a symmetric operator and this one is not; use method="gmres" or "direct"')
        b = wide(rhs)
        threshold = default_rtol(self.rtol, dtype_of(rhs)) * math.sqrt(inner(b, b))
        limit = self.max_steps or min(10 * operator.size, 10_000)
        run = _Run(operator, b, None if start is None else wide(start), *self._given(operator, rhs))
        first = min(PROBATION, limit) if self.preconditioner == "auto" else limit
        status = run.iterate(threshold, first)
        curvature = run.smallest_ritz()
        if status == "max_steps" and first < limit:
            diagonal = estimate_diagonal(operator)
            if badly_scaled(diagonal):
                run = _Run(operator, b, run.best_x, lambda r: r / diagonal, float(diagonal.min()), run.steps)
            status = run.iterate(threshold, limit)
            curvature = min(x for x in (curvature, run.smallest_ritz()) if x is not None)
        return finished(operator, rhs, run.best_x, status, run.steps, curvature)

    def _given(self, operator: LinearOperator, rhs: Vector) -> tuple[Callable[[Tensor], Tensor], float]:
        """Return the preconditioner to begin with, and its smallest eigenvalue (0 where unknown)."""
        chosen = self.preconditioner
        if callable(chosen):
            return lambda r: flatten(chosen(unflatten(r, rhs))), 0.0
        if chosen in ("diagonal", "second-moment"):
            diagonal = estimate_diagonal(operator) if chosen == "diagonal" else _root_of_second_moment(operator)
            return lambda r: r / diagonal, float(diagonal.min())
        return lambda r: r, 1.0


def _root_of_second_moment(operator: LinearOperator) -> Tensor:
    if operator.second_moment is None:
        raise InvalidValueError(
            'CG(preconditioner="second-moment") needs an inner solver that keeps one, and an inner solve before; use '
            'inner_solver=bilevel.inner.Adam(...), or preconditioner="diagonal"'
        )
    return kept_positive(wide(operator.second_moment).sqrt())


class _Run:
    """The state of one solve; x, r, z and p are the textbook's. `iterate` may be called again to go on."""

    def __init__(
        self,
        operator: LinearOperator,
        b: Tensor,
        start: Tensor | None,
        inverse: Callable[[Tensor], Tensor],
        smallest_of_preconditioner: float,
        steps: int = 0,
    ) -> None:
        self.operator, self.b = operator, b
        self.x, self.r = start_from(operator, b, start)
        self.best_x, self.best_norm = self.x.clone(), math.sqrt(inner(self.r, self.r))
        self.inverse, self.smallest_of_preconditioner = inverse, smallest_of_preconditioner
        self.steps = steps
        z = inverse(self.r)
        self.p, self.rz = z, inner(self.r, z)
        self.waited, self.fall, self.lately = 0, 0.0, 0.0
        self.curvatures: list[float] = []
        self.alphas: list[float] = []
        self.betas: list[float] = []

    def iterate(self, threshold: float, max_steps: int) -> Status:
        while self.best_norm > threshold:
            if self.steps >= max_steps:
                return "max_steps"
            p = self.p
            Ap = self.operator.flat(p)
            pp, pAp = inner(p, p), inner(p, Ap)
            self.steps += 1
            self.curvatures.append(pAp / pp)
            # Rounding in a product of size |p||Ap| cannot tell a smaller curvature from zero.
            if not pAp > 4 * torch.finfo(dtype_of(self.operator.like)).eps * math.sqrt(pp * inner(Ap, Ap)):
                return "nonpositive curvature"
            self._step(p, Ap, self.rz / pAp)
            if self._stagnates():
                return "stagnated"
        return "converged"

    def _step(self, p: Tensor, Ap: Tensor, alpha: float) -> None:
        """Go alpha along p, and turn to the next direction."""
        self.x = self.x + alpha * p
        self.fall, self.lately = self.fall + alpha * self.rz, self.lately + alpha * self.rz
        refreshed = self.steps % REFRESH == 0
        self.r = self.b - self.operator.flat(self.x) if refreshed else self.r - alpha * Ap
        size = math.sqrt(inner(self.r, self.r))
        self.waited = self.waited + 1 if size >= self.best_norm else 0
        if not self.waited:
            self.best_x, self.best_norm = self.x, size
        z = self.inverse(self.r)
        rz, before = inner(self.r, z), self.rz
        self.alphas.append(alpha)
        self.betas.append(rz / before)
        self.rz, self.p = rz, z + self.betas[-1] * p

    def _stagnates(self) -> bool:
        """Say whether neither the residual nor the energy has fallen for long, or a number overflowed."""
        if not math.isfinite(self.rz):
            return True
        if self.waited % PATIENCE:
            return False
        stuck = self.waited > 0 and self.lately < NEGLIGIBLE * self.fall
        self.lately = 0.0
        return stuck

    def smallest_ritz(self) -> float | None:
        """Return the smallest curvature over the whole Krylov space met.

        The Ritz values are those of the preconditioned matrix M^-1 A; times the smallest eigenvalue of M they are
        bounds of A's from below.
        """
        if not self.curvatures:
            return None
        smallest = min(self.curvatures)
        if self.alphas and self.smallest_of_preconditioner > 0.0:
            ritz = smallest_ritz(self.alphas, self.betas)
            smallest = min(smallest, ritz * self.smallest_of_preconditioner)
        return smallest
