"""What every linear solver takes and returns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from bilevel.errors import InvalidValueError
from bilevel.operators import LinearOperator
from bilevel.vector import Vector, flatten, unflatten

Status = Literal[
    "converged", "max_steps", "stagnated", "nonpositive curvature", "singular", "diverged", "indefinite", "low rank"
]

# What each status means for the reader of a certificate, with the cure.
EXPLANATIONS: dict[Status, str] = {
    "converged": "",
    "max_steps": "the linear solver used all its steps; raise its `max_steps` or loosen its `rtol`",
    "stagnated": "the linear solver stopped improving at the precision of the numbers; use float64, a better "
    'conditioned inner loss (stronger regularization), or method="direct"',
    "nonpositive curvature": "the inner Hessian has a direction of zero or negative curvature, so the inner point is "
    "no strict minimum: train the inner problem further, regularize it, or use a method that needs no inverse "
    '(method="unroll")',
    "singular": "the inner Hessian is singular and the linear system has no solution; add a little regularization "
    "to the inner loss",
    "diverged": "the series grew instead of shrinking: its step size is above 2 / (largest eigenvalue); leave "
    "`step_size` to the solver, which measures it",
    "indefinite": "the series grew along a direction of negative curvature of the inner Hessian, as networks have "
    'early in training: train further before the first hypergradient, regularize, or use method="one-step", which '
    "takes no series",
    "low rank": "the inverse is of low rank by design; raise the `rank` of bilevel.Nystrom, or take it as a "
    "preconditioner: bilevel.CG(preconditioner=bilevel.Nystrom(...))",
}


# A solution that ends like this is wrong whatever its residual says.
FATAL: tuple[Status, ...] = ("nonpositive curvature", "singular", "diverged", "indefinite")

LOOSEST = 1e-3  # of default tolerances, however much slack there is


@dataclass(frozen=True)
class LinearSolution:
    """The answer of a linear solver to A x = b.

    Attributes:
        value: the best x met.
        status: why the solver stopped.
        steps: iterations taken.
        residual: the true residual b - A x of `value`.
        relative: its norm over that of b (0 for b = 0).
        curvature: the smallest Rayleigh quotient p·Ap / p·p over the directions met; None if the
            solver looked at none.
        inverse: r -> A^-1 r for other right-hand sides, where the solver has factored A.
        kept: what the next solve with an operator like this one is better for having (`LinearOperator.kept`): plain
            values, since it is saved in checkpoints.
        factor: the Cholesky factor of A, lower triangular, float64 `(size, size)`, where it was formed.
        notes: sentences for the certificate: what was done that is worth knowing.
        missing: the smallest curvature known -> a vector about as long as A^-1 b - x, and mostly a little longer, with
            a direction like it; None where the solver has none for nothing.
    """

    value: Vector
    status: Status
    steps: int
    residual: Vector
    relative: float
    curvature: float | None
    inverse: Callable[[Vector], Vector] | None = None
    kept: Any = None
    factor: Tensor | None = None
    notes: tuple[str, ...] = ()
    missing: Callable[[float], Vector] | None = None


@dataclass(frozen=True)
class Preconditioner:
    """M ~ A for conjugate gradients, symmetric positive definite.

    Attributes:
        inverse: r -> M^-1 r, float64 `(size,)`.
        smallest: the smallest eigenvalue of M; 0 where unknown.
        note: a sentence for the certificate.
        see: called with each direction p and A p.
        keep: steps taken, decades by which the residual fell -> `LinearSolution.kept`.
    """

    inverse: Callable[[Tensor], Tensor]
    smallest: float = 0.0
    note: str = ""
    see: Callable[[Tensor, Tensor], None] = lambda p, Ap: None
    keep: Callable[[int, float], Any] = lambda steps, decades: None


class LinearSolver(Protocol):
    """Settings of one algorithm for A x = b: a frozen dataclass with a `solve`.

    It may declare `terms: ClassVar[Terms]`, cost and error of a hypergradient by it, for the table of methods.
    """

    truncates: ClassVar[bool]
    """True for a method that approximates the inverse by design (a series cut after some terms)."""

    def solve(self, operator: LinearOperator, rhs: Vector, start: Vector | None = None) -> LinearSolution:
        """Solve A x = rhs, from `start` where that is nearer than zero."""
        ...


def default_rtol(rtol: float | None, dtype: torch.dtype, slack: float = 1.0) -> float:
    """Return `rtol`, or where it is None what the precision allows: 1e-8 in float64, 1e-5 in float32, times `slack`."""
    if rtol is not None:
        return rtol
    return loosened(1e-8 if dtype == torch.float64 else max(1e-5, 10 * torch.finfo(dtype).eps), slack, LOOSEST)


def loosened(rtol: float, slack: float, loosest: float) -> float:
    """Return a default tolerance times `slack`, which never makes it larger than `loosest`."""
    return min(max(rtol, loosest), rtol * slack)


def dtype_of(v: Vector) -> torch.dtype:
    """Return the dtype that products are taken in."""
    return next(iter(v.values())).dtype


def check_settings(rtol: float | None, max_steps: int | None) -> None:
    """Raise for a tolerance or a step count that makes no sense."""
    if rtol is not None and (not _is_number(rtol) or not 0.0 <= rtol < 1.0):
        raise InvalidValueError(f"`rtol` is {rtol!r}, expected a number with 0 <= rtol < 1, or None")
    if max_steps is not None:
        check_count(max_steps, "max_steps")


def check_count(count: Any, name: str) -> None:
    """Raise unless it is a whole number of at least 1."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise InvalidValueError(f"`{name}` is {count!r}, expected a whole number of at least 1")


# What people call linear solvers, and their classes.
CLASSES = {
    "cg": "CG",
    "minres": "MINRES",
    "gmres": "GMRES",
    "direct": "Cholesky",
    "cholesky": "Cholesky",
    "neumann": "Neumann",
    "nystrom": "Nystrom",
    "shine": "QuasiNewton",
}


def linear_solver_meant(given: object) -> str:
    """Return how the linear solver is written that is called so, or about so."""
    close = get_close_matches(str(given).lower(), CLASSES, n=1) if isinstance(given, str) else []
    return f"bilevel.{CLASSES[close[0]]}()" if close else "bilevel.CG(rtol=1e-6)"


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def wide(v: Vector) -> Tensor:
    """Return one 1-d float64 tensor `(size,)`.

    Krylov recurrences run in float64 whatever the dtype of the problem; only the products are taken in its own. Their
    short sums and differences then add no rounding of their own, and residuals are recomputed from products of the
    refined x.
    """
    return flatten(v).double()


def inner(a: Tensor, b: Tensor) -> float:
    """Return a·b, summed in float64."""
    return float(torch.dot(a.double(), b.double()))


def start_from(operator: LinearOperator, rhs: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a first iterate and its residual: `start`, or zero where that is nearer."""
    if start is not None:
        residual = rhs - operator.flat(start)
        if inner(residual, residual) < inner(rhs, rhs):
            return start.clone(), residual
    return torch.zeros_like(rhs), rhs.clone()


def finished(
    operator: LinearOperator,
    rhs: Vector,
    x: Tensor,
    status: Status,
    steps: int,
    curvature: float | None,
    residual: Tensor | None = None,
) -> LinearSolution:
    """Return the solution `x` with its true residual, which costs one product where it is not given."""
    b = wide(rhs)
    if residual is None:
        residual = b - operator.flat(x) if bool(x.any()) else b
    size = math.sqrt(inner(b, b))
    relative = math.sqrt(inner(residual, residual)) / size if size > 0.0 else 0.0
    return LinearSolution(unflatten(x, rhs), status, steps, unflatten(residual, rhs), relative, curvature)
