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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from bilevel.errors import InvalidValueError, meant
from bilevel.operators import LinearOperator
from bilevel.solvers.about import Terms
from bilevel.solvers.linear.base import (
    LinearSolution,
    Preconditioner,
    Status,
    check_settings,
    default_rtol,
    dtype_of,
    finished,
    inner,
    start_from,
    wide,
)
from bilevel.solvers.linear.cholesky import by_factor
from bilevel.solvers.linear.diagonal import badly_scaled, by_diagonal, by_second_moment, diagonal_of
from bilevel.solvers.linear.family import solve_members
from bilevel.solvers.linear.lanczos import energy_bound, expected_smallest, smallest_ritz
from bilevel.solvers.linear.nystrom import Nystrom
from bilevel.solvers.linear.secant import precondition as by_pairs
from bilevel.vector import Vector, flatten, unflatten

# The recursion's residual is compared to the true one where it says that this is the end, and the true one takes over
# if that was wrong. Doing so every 50 steps cost 2 % and, as it disturbs the directions, 7 to 11 % more steps (a9a, a
# network in float32). A true one that is not down to this part since the last look will not fall any more.
REFRESHED = 0.5
PATIENCE = 100  # steps without a better residual, after which the decrease of the energy decides
# The residual of an ill-conditioned system first grows for long while the energy x·Ax/2 - b·x falls. Stagnation is an
# energy that does not fall either: less than this part of its fall so far, over PATIENCE steps.
NEGLIGIBLE = 1e-10
BACK = 3  # steps between the iterates from which the direction of the error is taken
CAUTION = 0.9  # a Ritz value is above the smallest eigenvalue
ROUNDING = 1e-17  # of the first residual: 0 for the counting of decades
PROBATION = 200  # steps without convergence after which "auto" looks at the diagonal: 4 % of what was spent

Name = Literal["auto", "diagonal", "second-moment", "nystrom", "lbfgs"]
BY_NAME: Mapping[str, Callable[[LinearOperator], Preconditioner]] = {
    "diagonal": by_diagonal,
    "second-moment": by_second_moment,
    "nystrom": Nystrom().precondition,
    "lbfgs": by_pairs,
}


class Preconditions(Protocol):
    """Settings that make a preconditioner of an operator."""

    def precondition(self, operator: LinearOperator) -> Preconditioner:
        """Return M ~ A."""
        ...


@dataclass(frozen=True)
class CG:
    """Solve a symmetric positive definite system by conjugate gradients.

    Args:
        rtol: stop when |b - Ax| <= rtol |b|; None: 1e-8 in float64, 1e-5 in float32. Smaller is more
            accurate and slower; the error of x is at most the condition number times rtol.
        max_steps: most iterations; None: ten times the number of unknowns, at most 10,000.
        preconditioner: "auto" estimates the diagonal by 8 products after 200 steps without convergence, and uses it
            where entries differ a hundredfold, from then on at once; "diagonal" does so from the start;
            "second-moment" takes the root of the second moment that inner.Adam ended with, at no product; "lbfgs" the
            pairs that inner.LBFGS ended with and those of the last solve, at none either; "nystrom" a low-rank sketch,
            `bilevel.Nystrom(rank=50)` one of another rank, kept while it serves; a function v -> M^-1 v is the user's
            own, symmetric positive definite; None: none.

    >>> import torch
    >>> from bilevel.operators import LinearOperator
    >>> A = LinearOperator(lambda v: {"w": 2.0 * v["w"]}, {"w": torch.zeros(3)}, symmetric=True)
    >>> CG().solve(A, {"w": torch.ones(3)}).value["w"]
    tensor([0.5000, 0.5000, 0.5000])
    """

    rtol: float | None = None
    max_steps: int | None = None
    preconditioner: Name | Preconditions | Callable[[Vector], Vector] | None = "auto"
    truncates: ClassVar[bool] = False
    terms: ClassVar[Terms] = Terms(
        "k + 2 products, k ~ sqrt(κ) log(1/rtol)",
        "one gradient graph",
        "at most κ rtol",
        "Pedregosa 2016; Lorraine et al. 2020",
    )

    def __post_init__(self) -> None:
        check_settings(self.rtol, self.max_steps)
        chosen = self.preconditioner
        known = chosen is None or (isinstance(chosen, str) and chosen in ("auto", *BY_NAME))
        if not (known or callable(chosen) or hasattr(chosen, "precondition")) or isinstance(chosen, type):
            raise InvalidValueError(
                f"`preconditioner` is {chosen!r}, expected None, {', '.join(map(repr, ('auto', *BY_NAME)))}, "
                "bilevel.Nystrom(rank=50) or a function v -> M^-1 v" + meant(chosen, BY_NAME)
            )

    def solve(self, operator: LinearOperator, rhs: Vector, start: Vector | None = None) -> LinearSolution:
        """Solve A x = rhs. Raises for an operator that is not symmetric."""
        if not operator.symmetric:
            raise InvalidValueError('CG needs a symmetric operator and this one is not; use method="gmres" or "direct"')
        if operator.members is not None and operator.factor is None and self.preconditioner in (None, "auto"):
            limit = self.max_steps or min(10 * operator.size // operator.members, 10_000)
            rtol = default_rtol(self.rtol, dtype_of(rhs), operator.slack)
            return solve_members(operator, rhs, start, operator.members, rtol, limit)
        b = wide(rhs)
        threshold = default_rtol(self.rtol, dtype_of(rhs), operator.slack) * math.sqrt(inner(b, b))
        limit = self.max_steps or min(10 * operator.size, 10_000)
        x, r = start_from(operator, b, None if start is None else wide(start))
        if math.sqrt(inner(r, r)) <= threshold:
            return replace(finished(operator, rhs, x, "converged", 0, None), kept=operator.kept)
        chosen = self._chosen(operator, rhs)
        run = Run(operator, b, x, r, chosen)
        first = min(PROBATION, limit) if self.preconditioner == "auto" and operator.factor is None else limit
        status = run.iterate(threshold, first)
        curvature = run.smallest_ritz()
        if status == "max_steps" and first < limit:
            diagonal = by_diagonal(operator)
            if badly_scaled(diagonal.inverse(torch.ones_like(b)).reciprocal()):
                run = Run(operator, b, *start_from(operator, b, run.best_x), diagonal, run.steps)
            status = run.iterate(threshold, limit)
            curvature = min(x for x in (curvature, run.smallest_ritz()) if x is not None)
        solution = finished(operator, rhs, run.best_x, status, run.steps, curvature, run.true)
        notes = (chosen.note,) if chosen.note else ()
        missing = (lambda lowest: unflatten(run.missing(lowest), rhs)) if run.fall > 0.0 else None
        return replace(solution, kept=run.kept(status), notes=notes, missing=missing)

    def _chosen(self, operator: LinearOperator, rhs: Vector) -> Preconditioner:
        """Return the preconditioner to begin with."""
        chosen = self.preconditioner
        if chosen == "auto" and operator.factor is not None:
            return by_factor(operator.factor)
        if chosen == "auto" and operator.pairs is not None:
            diagonal = operator.pairs.scale.reciprocal()
            if badly_scaled(diagonal):
                return diagonal_of(diagonal)
        if chosen == "auto" and operator.kept and "diagonal" in operator.kept:
            return diagonal_of(operator.kept["diagonal"])
        if chosen is None or chosen == "auto":
            return Preconditioner(lambda r: r, 1.0)
        if isinstance(chosen, str):
            return BY_NAME[chosen](operator)
        if callable(chosen):
            return Preconditioner(lambda r: flatten(chosen(unflatten(r, rhs))))
        return chosen.precondition(operator)


class Run:
    """The state of one solve; x, r, z and p are the textbook's. `iterate` may be called again to go on.

    Attributes:
        best_x: the iterate of the smallest residual; the error in the norm of A is smallest at the last, `x`.
        fall: how far that error's square has fallen.
        true: the true residual of `best_x`, once it is below the threshold.
        in_vain: the recursion goes on to the threshold, and the true residual does not.
    """

    def __init__(
        self, operator: LinearOperator, b: Tensor, x: Tensor, r: Tensor, preconditioner: Preconditioner, steps: int = 0
    ) -> None:
        self.operator, self.b, self.x, self.r = operator, b, x, r
        self.best_x, self.best_norm = x, math.sqrt(inner(r, r))
        self.preconditioner, self.steps = preconditioner, steps
        self._first_norm = self.best_norm
        z = preconditioner.inverse(r)
        self.p, self.rz = z, inner(r, z)
        self.waited, self.fall, self.lately = 0, 0.0, 0.0
        self.true: Tensor | None = None
        self.in_vain, self._checked = False, (x, math.inf)
        self._before = self._latest = x, 0  # the iterates of the last two multiples of `BACK` steps
        self.curvatures: list[float] = []
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self.falls: list[float] = []  # what each step added to `fall`

    def iterate(self, threshold: float, max_steps: int) -> Status:
        """Go on until the residual is below the threshold, or for so many steps in all."""
        while not self._arrived(threshold):
            if self.in_vain:
                return "stagnated"
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
            self.preconditioner.see(p, Ap)
            self._step(p, Ap, self.rz / pAp)
            if self._stagnates():
                return "stagnated"
        return "converged"

    def _arrived(self, threshold: float) -> bool:
        """Say whether the true residual is below the threshold; where only the recursion's is, go on from the true."""
        if self.best_norm > max(threshold, torch.finfo(torch.float64).eps * self._first_norm):
            return False
        if self.true is not None:
            return True
        true = self.b - self.operator.flat(self.best_x)
        size = math.sqrt(inner(true, true))
        if size <= threshold:
            self.true = true
            return True
        self.in_vain = size > REFRESHED * self._checked[1]
        if size > self._checked[1]:
            self.best_x, self.best_norm = self._checked
            return False
        self._checked = self.best_x, size
        z = self.preconditioner.inverse(true)
        self.p = self.p + (z - self.preconditioner.inverse(self.r))
        self.x, self.r, self.rz, self.best_norm = self.best_x, true, inner(true, z), size
        return False

    def _step(self, p: Tensor, Ap: Tensor, alpha: float) -> None:
        """Go alpha along p, and turn to the next direction."""
        self.x = torch.add(self.x, p, alpha=alpha)
        self.falls.append(alpha * self.rz)
        self.fall, self.lately = self.fall + self.falls[-1], self.lately + self.falls[-1]
        self.r = torch.sub(self.r, Ap, alpha=alpha)
        size = math.sqrt(inner(self.r, self.r))
        self.waited = self.waited + 1 if size >= self.best_norm else 0
        if not self.waited:
            self.best_x, self.best_norm = self.x, size
        z = self.preconditioner.inverse(self.r)
        rz, before = inner(self.r, z), self.rz
        self.alphas.append(alpha)
        self.betas.append(rz / before)
        self.rz, self.p = rz, torch.add(z, p, alpha=self.betas[-1])
        if self.steps % BACK == 0:
            self._before, self._latest = self._latest, (self.x, len(self.alphas))

    def _stagnates(self) -> bool:
        """Say whether neither the residual nor the energy has fallen for long, or a number overflowed."""
        if not math.isfinite(self.rz):
            return True
        if self.waited % PATIENCE:
            return False
        stuck = self.waited > 0 and self.lately < NEGLIGIBLE * self.fall
        self.lately = 0.0
        return stuck

    def kept(self, status: Status) -> Any:
        """Return what the preconditioner wants to have again."""
        if status not in ("converged", "max_steps"):
            return None
        decades = math.log10(self._first_norm / max(self.best_norm, ROUNDING * self._first_norm))
        return self.preconditioner.keep(self.steps, decades)

    def missing(self, curvature: float) -> Tensor:
        """Return about what x is short of: the way of the last steps, as long in A's norm as the error is."""
        lowest = expected_smallest(self.alphas, self.betas)
        if self.preconditioner.smallest > 0.0:
            lowest = min(lowest, curvature / self.preconditioner.smallest)
        x, steps = self._before
        bound = energy_bound(self.alphas, self.betas, CAUTION * lowest) * self.rz
        return (self.x - x) * math.sqrt(bound / sum(self.falls[steps:]))

    def smallest_ritz(self) -> float | None:
        """Return the smallest curvature over the whole Krylov space met.

        The Ritz values are those of the preconditioned matrix M^-1 A; times the smallest eigenvalue of M they are
        bounds of A's from below.
        """
        if not self.curvatures:
            return None
        smallest = min(self.curvatures)
        if self.alphas and self.preconditioner.smallest > 0.0:
            ritz = smallest_ritz(self.alphas, self.betas)
            smallest = min(smallest, ritz * self.preconditioner.smallest)
        return smallest
