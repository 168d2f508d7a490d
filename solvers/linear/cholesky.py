"""Dense direct solve, for systems of up to a few thousand unknowns.

Cholesky where the matrix is positive definite; an eigendecomposition where a symmetric one is
indefinite or singular (the least-norm solution then); LU where it is not symmetric. Factored in float64
whatever the dtype of the problem.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.operators import LinearOperator
from bilevel.solvers.about import Terms
from bilevel.solvers.linear.base import LinearSolution, Preconditioner, Status, inner
from bilevel.vector import Vector, flatten, unflatten

# A small negative curvature, relative to the largest, of a direction that makes up less than the second part of the
# answer: where the inner solutions form a ring, the point that the inner solver left has either sign along it.
SLIGHT, UNTOUCHED = 1e-3, 1e-8
EVEN = 1e4  # the largest entry of a diagonal over the smallest, up to which scaling it changes little
INVERSE_STEPS = 8  # inverse iterations for the smallest eigenvalue; each is two triangular solves


@dataclass(frozen=True)
class Cholesky:
    """Solve a system exactly through its dense matrix: n products and n^3 / 3 operations.

    >>> import torch
    >>> from bilevel.operators import LinearOperator
    >>> A = LinearOperator(lambda v: {"w": torch.tensor([2.0, 4.0]) * v["w"]}, {"w": torch.zeros(2)}, symmetric=True)
    >>> Cholesky().solve(A, {"w": torch.ones(2)}).value["w"]
    tensor([0.5000, 0.2500])
    """

    truncates: ClassVar[bool] = False
    terms: ClassVar[Terms] = Terms("n + 1 products in blocks, n³/3", "n² numbers", "about κ eps", "Pedregosa 2016")

    def solve(self, operator: LinearOperator, rhs: Vector, start: Vector | None = None) -> LinearSolution:
        """Solve A x = rhs; `start` is not needed, since the answer does not depend on it."""
        A, b = operator.dense().double(), flatten(rhs).double()
        if operator.symmetric:
            A = (A + A.T) / 2
            factored = _factor_symmetric(A, b, torch.finfo(flatten(rhs).dtype).eps)
        else:
            factored = _factor(A)
        inverse, curvature, status, factor = factored
        x = inverse(b)
        residual, size = b - A @ x, inner(b, b) ** 0.5
        relative = inner(residual, residual) ** 0.5 / size if size > 0.0 else 0.0
        return LinearSolution(
            unflatten(x, rhs),
            status,
            1,
            unflatten(residual, rhs),
            relative,
            curvature,
            lambda r: unflatten(inverse(flatten(r).double()), rhs),
            factor=factor,
        )


Inverse = Callable[[Tensor], Tensor]
Factored = tuple[Inverse, float | None, Status, Tensor | None]


def _factor(A: Tensor) -> Factored:
    """Return r -> A^-1 r, no curvature, the status and no Cholesky factor."""
    LU, pivots, info = torch.linalg.lu_factor_ex(A)
    status: Status = "singular" if int(info) else "converged"
    return lambda r: torch.linalg.lu_solve(LU, pivots, r[:, None])[:, 0], None, status, None


def _factor_symmetric(A: Tensor, b: Tensor, resolution: float) -> Factored:
    """Return r -> A^-1 r, the smallest eigenvalue that is not zero (from above), the status and the factor.

    Args:
        A: symmetric, float64.
        b: right-hand side, float64.
        resolution: machine precision of the products that A was formed from.
    """
    found = _factor_definite(A, 10 * len(b) * resolution)
    if found is not None:
        factor, curvature = found
        return solve_with(factor), curvature, "converged", factor
    rounding = 10 * len(b) * resolution * float(A.abs().max())
    values, vectors = torch.linalg.eigh(A)
    seen = vectors.T @ b
    null = values.abs() <= rounding

    def pseudo_inverse(r: Tensor) -> Tensor:
        parts = vectors.T @ r
        x: Tensor = vectors @ torch.where(null, torch.zeros_like(parts), parts / values)
        return x

    if bool(null.all()) or bool(seen[null].norm() > 1e-6 * b.norm()):
        return pseudo_inverse, float(values[0]), "singular", None
    # Directions that neither loss bends, such as a shift of all softmax biases, do no harm: b has nothing there.
    parts = torch.where(null, torch.zeros_like(seen), seen / values).abs()
    slight = (values < 0.0) & (values > -SLIGHT * values[-1]) & (parts <= UNTOUCHED * parts.norm())
    curvature = float(values[~null & ~slight][0])
    return pseudo_inverse, curvature, "converged" if curvature > 0.0 else "nonpositive curvature", None


def _factor_definite(A: Tensor, rounding: float) -> tuple[Tensor, float] | None:
    """Return the Cholesky factor and the smallest eigenvalue, None unless A is positive definite beyond rounding.

    Judged where the diagonal is one, if its entries differ much (van der Sluis, Condition numbers and equilibration of
    matrices, Numerische Mathematik 14 (1969)): strengths ten decades apart round each its own rows only.
    """
    diagonal = A.diagonal()
    low, high = (float(end) for end in torch.aminmax(diagonal))
    if not low > 0.0:
        return None
    even, root = high <= EVEN * low, diagonal.sqrt()
    factor, info = torch.linalg.cholesky_ex(A if even else A / root / root[:, None])
    if int(info):
        return None
    factor = factor if even else root[:, None] * factor
    smallest = smallest_value(factor)
    # No entry of a definite matrix is above its diagonal; scaled, its smallest eigenvalue is at least smallest / high.
    if smallest > rounding * high or (not even and smallest_value(factor / root[:, None]) > rounding):
        return factor, smallest
    return None


def solve_with(factor: Tensor) -> Inverse:
    """Return r -> A^-1 r for the matrix A that `factor` is of."""
    return lambda r: torch.cholesky_solve(r[:, None], factor)[:, 0]


def by_factor(factor: Tensor) -> Preconditioner:
    """Return the matrix that `factor` is of as a preconditioner for one that is near it."""
    return Preconditioner(solve_with(factor), smallest_value(factor))


def smallest_value(factor: Tensor) -> float:
    """Return the smallest eigenvalue of the matrix that `factor` is of, from above, by inverse iteration."""
    # A random start: a symmetric problem has eigenvectors that ones are orthogonal to.
    v = torch.randn(len(factor), 1, generator=torch.Generator().manual_seed(0), dtype=factor.dtype).to(factor.device)
    for _ in range(INVERSE_STEPS):
        v = torch.cholesky_solve(v / torch.linalg.vector_norm(v), factor)
    return float(torch.linalg.vector_norm(factor.T @ v) / torch.linalg.vector_norm(v)) ** 2
