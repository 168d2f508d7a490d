"""Checks that run an estimator or a linear solver over problems whose answers are known.

For the tests of this library and of anyone who writes an estimator or a linear solver for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import optree
import torch
from torch import Tensor

from bilevel.certificate import EXACT_BELOW
from bilevel.errors import BilevelError
from bilevel.evaluation import Evaluation, Evaluator
from bilevel.known import known_problems
from bilevel.operators import LinearOperator
from bilevel.oracle import KnownProblem, Truth
from bilevel.problem import BilevelProblem
from bilevel.solvers import Estimator, LinearSolver
from bilevel.solvers import estimator as named_estimator
from bilevel.solvers.about import about
from bilevel.vector import Vector, flatten, is_finite, norm, subtract, unflatten

WELL_CONDITIONED = 1e3  # up to here a series that is cut by design must converge too
REPORTED = 1e-12  # how far a reported residual may lie from b - A x, relative to |b| + |A| |x|: rounding


class CheckFailedError(BilevelError, AssertionError):
    """An estimator or a linear solver failed a check; the message names the problem and the measured error."""


def relative_error(found: Any, truth: Any) -> float:
    """Return |found - truth| / |truth| over all tensors of two structures; |found| where the truth is zero."""
    left, right = ({str(i): t.detach() for i, t in enumerate(optree.tree_leaves(side))} for side in (found, truth))
    size = float(norm(right))
    return float(norm(subtract(left, right))) / (size if size > 0.0 else 1.0)


def check_estimator(
    estimator: str | Estimator, *, tolerance: float, problems: Sequence[KnownProblem] | None = None
) -> None:
    """Run an estimator over problems with known hypergradients.

    An implicit method is given the exact inner solution; one that unrolls starts there and runs enough heavy-ball steps
    to forget the start. It is called twice, the second time with the state of the first.

    Args:
        estimator: a name of `bilevel.METHODS`, or an object.
        tolerance: largest relative error of the hypergradient; 1e-8 for an exact method.
        problems: None for all of `known_problems()`.

    Raises:
        CheckFailedError: an error above `tolerance`, a gradient of other names or shapes than `hparams`, a verdict of
            "exact" over an error of 1e-3 or more, or no reasons under an "untrusted".

    >>> import bilevel
    >>> check_estimator(bilevel.Implicit(bilevel.Cholesky()), tolerance=1e-10)
    """
    method = named_estimator(estimator)
    for known in known_problems() if problems is None else problems:
        problem = known.problem(known.stepwise() if about(method).unrolls else None)
        evaluate = Evaluator(problem, method)
        solution = problem.params.read(known.truth.params, "the exact inner solution")
        for state in ("without a state", "with the state of the first call"):
            evaluation = evaluate(problem.hparams.layout.start, solution)
            _check_evaluation(evaluation, problem, known, f"{method!r} on {known.name!r}, {state}", tolerance)


def _check_evaluation(
    evaluation: Evaluation, problem: BilevelProblem, known: KnownProblem, where: str, tolerance: float
) -> None:
    found, layout = evaluation.hypergradient, problem.hparams.layout
    try:
        layout.check(found.gradient, "the gradient")
    except BilevelError as wrong:
        raise CheckFailedError(f"{where}: {wrong}") from wrong
    error = relative_error(layout.shaped(found.gradient), known.truth.gradient)
    if not error <= tolerance:
        raise CheckFailedError(f"{where}: the relative error of the hypergradient is {error:.1e}, above {tolerance:g}")
    certificate = found.certificate
    if certificate.verdict == "exact" and not error < EXACT_BELOW:
        raise CheckFailedError(f'{where}: the verdict is "exact" and the relative error {error:.1e}')
    if not certificate.trusted and not certificate.reasons:
        raise CheckFailedError(f'{where}: the verdict is "untrusted" without a reason')
    off = abs(found.outer_loss - known.truth.outer_loss) / abs(known.truth.outer_loss)
    if not off <= tolerance:
        raise CheckFailedError(f"{where}: the relative error of the outer loss is {off:.1e}, above {tolerance:g}")


Kind = Literal["definite", "singular", "inconsistent", "indefinite", "non-symmetric"]


@dataclass(frozen=True)
class KnownSystem:
    """A small dense system A x = b over a scalar tensor and a vector, coupled.

    Attributes:
        name: for messages.
        matrix: A, `(n, n)`.
        rhs: b, `(n,)`.
        kind: "singular" has a solution, "inconsistent" is singular and has none.
    """

    name: str
    matrix: Tensor
    rhs: Tensor
    kind: Kind = "definite"

    @property
    def operator(self) -> LinearOperator:
        """A for the library."""
        like = self.vector(self.rhs)
        return LinearOperator(
            lambda v: self.vector(self.matrix @ flatten(v)), like, symmetric=self.kind != "non-symmetric"
        )

    def vector(self, flat: Tensor) -> Vector:
        """Return `(n,)` numbers as the named tensors that the operator takes."""
        like = {"scalar": flat[0], "vector": flat[1:]} if len(flat) > 1 else {"scalar": flat[0]}
        return unflatten(flat, like)


def known_systems() -> list[KnownSystem]:
    """Return the table of systems."""
    data = torch.Generator().manual_seed(0)
    b = torch.randn(12, generator=data, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(12, 12, generator=data, dtype=torch.float64)).Q
    eye, ramp = torch.eye(12, dtype=torch.float64), torch.linspace(1.0, 20.0, 12, dtype=torch.float64)

    def of(eigenvalues: Tensor) -> Tensor:
        return torch.einsum("ij,j,kj->ik", Q, eigenvalues, Q)

    null, mixed = ramp.clone(), ramp.clone()
    null[:2], mixed[:3] = 0.0, -mixed[:3]
    return [
        KnownSystem("identity", eye, b),
        KnownSystem("c times the identity", 3.0 * eye, b),
        KnownSystem("one unknown", 3.0 * eye[:1, :1], b[:1]),
        KnownSystem("two eigenvalues", of(torch.where(ramp < 8.0, 2.0, 5.0).double()), b),
        KnownSystem("well-conditioned", of(ramp), b),
        KnownSystem("times 1e-12", 1e-12 * of(ramp), b),
        KnownSystem("times 1e+12", 1e12 * of(ramp), b),
        KnownSystem("zero right-hand side", of(ramp), 0.0 * b),
        KnownSystem("ill-conditioned", of(torch.logspace(-6, 0, 12, dtype=torch.float64)), b),
        KnownSystem("singular, consistent", of(null), of(null) @ b, "singular"),
        KnownSystem("singular, inconsistent", of(null), b, "inconsistent"),
        KnownSystem("indefinite", of(mixed), b, "indefinite"),
        KnownSystem("non-symmetric", of(ramp) + torch.triu(of(ramp), 1), b, "non-symmetric"),
    ]


def check_linear_solver(
    solver: LinearSolver, *, tolerance: float, systems: Sequence[KnownSystem] | None = None
) -> None:
    """Run a linear solver over small dense systems.

    Positive definite systems must be solved (a solver that `truncates` is let off ill-conditioned ones). Every other
    one must be solved, or refused with a `BilevelError`, or answered with a status that is not "converged".

    Args:
        solver: the solver.
        tolerance: largest relative residual |b - Ax| / |b| of what it calls converged.
        systems: None for all of `known_systems()`.

    Raises:
        CheckFailedError: a residual above `tolerance`, or a reported residual that is not b - A x.

    >>> import bilevel
    >>> check_linear_solver(bilevel.CG(rtol=1e-10), tolerance=1e-9)
    """
    for known in known_systems() if systems is None else systems:
        where = f"{solver!r} on {known.name!r}"
        try:
            solution = solver.solve(known.operator, known.vector(known.rhs))
        except BilevelError as error:
            if known.kind == "definite":
                raise CheckFailedError(f"{where}: refused a positive definite system: {error}") from error
            continue
        if not is_finite(solution.value):
            raise CheckFailedError(f"{where}: the answer is not finite")
        x, size = flatten(solution.value), float(known.rhs.norm())
        residual = known.rhs - known.matrix @ x
        relative = float(residual.norm()) / size if size > 0.0 else float(x.norm())
        rounding = REPORTED * (size + float(known.matrix.norm()) * float(x.norm()))
        off = float((flatten(solution.residual) - residual).norm())
        if not off <= rounding:
            raise CheckFailedError(f"{where}: the reported residual is {off:.1e} away from b - A x")
        let_off = solver.truncates and float(torch.linalg.cond(known.matrix)) > WELL_CONDITIONED
        must = known.kind == "definite" and not let_off
        if (must or solution.status == "converged") and not relative <= tolerance:
            raise CheckFailedError(
                f"{where}: the relative residual is {relative:.1e}, above {tolerance:g}; status {solution.status!r}"
            )


__all__ = [
    "CheckFailedError",
    "KnownProblem",
    "KnownSystem",
    "Truth",
    "check_estimator",
    "check_linear_solver",
    "known_problems",
    "known_systems",
    "relative_error",
]
