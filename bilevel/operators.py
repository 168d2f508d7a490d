"""Linear operators on vectors of named tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.vector import Vector, axpy, flatten, size, unflatten

# Rows that go through one batched product together: so many, and no more numbers than this.
BLOCK, BLOCK_NUMBERS = 128, 2**24


@dataclass(frozen=True)
class Pairs:
    """What a quasi-Newton method saw of a Hessian H: steps s and the changes y ~ H s of the gradient, oldest first.

    Attributes:
        steps: `(m, size)`, float64.
        changes: the same.
        scale: the diagonal, up to a factor, of the inverse estimate that the method began with, `(size,)`.
    """

    steps: Tensor
    changes: Tensor
    scale: Tensor


@dataclass(frozen=True)
class LinearOperator:
    """A square linear map A: Vector -> Vector, known by its products.

    Attributes:
        matvec: v -> A v.
        like: any vector of the domain (names, shapes, dtypes, device).
        symmetric: A equals its transpose. Conjugate gradients refuse an operator that is not.
        matvecs: the same product for stacked vectors, `(k, *shape)` tensors in and out; without it
            a dense matrix is formed column by column.
        second_moment: for a Hessian: the mean square of gradients met in training, whose root stands for the diagonal
            in preconditioners.
        pairs: for a Hessian: what L-BFGS saw of it in training.
        kept: what a linear solver wants to have again, from its last solve with an operator like this one
            (`LinearSolution.kept`).
        members: A is block diagonal, with a block for each of so many members of a family, which every tensor has a
            leading dimension for; None: no family.
        factor: lower triangular, `(size, size)`: the Cholesky factor of an operator like this one.
        slack: how many times larger the default tolerance of a linear solver may be.

    >>> import torch
    >>> A = LinearOperator(lambda v: {"w": 3.0 * v["w"]}, {"w": torch.zeros(2)}, symmetric=True)
    >>> A.shifted(1.0).dense()
    tensor([[4., 0.],
            [0., 4.]])
    """

    matvec: Callable[[Vector], Vector]
    like: Vector
    symmetric: bool
    matvecs: Callable[[Vector], Vector] | None = None
    second_moment: Vector | None = None
    pairs: Pairs | None = None
    kept: Any = None
    members: int | None = None
    factor: Tensor | None = None
    slack: float = 1.0

    def __call__(self, v: Vector) -> Vector:
        """Return A v."""
        return self.matvec(v)

    def flat(self, v: Tensor) -> Tensor:
        """Return A v for a vector given as one 1-d tensor `(size,)`, in its dtype; the product is taken in A's."""
        return flatten(self.matvec(unflatten(v, self.like))).to(v.dtype)

    @property
    def size(self) -> int:
        """Number of scalars in the domain."""
        return size(self.like)

    def shifted(self, damping: float) -> LinearOperator:
        """Return A + damping * I."""
        many = self.matvecs
        return LinearOperator(
            lambda v: axpy(damping, v, self.matvec(v)),
            self.like,
            self.symmetric,
            None if many is None else lambda v: axpy(damping, v, many(v)),
        )

    def dense(self) -> Tensor:
        """Return the matrix `(size, size)`."""
        first, n = next(iter(self.like.values())), self.size
        columns = torch.eye(n, dtype=first.dtype, device=first.device)
        for begin in range(0, n, BLOCK):
            columns[begin : begin + BLOCK] = self.each(columns[begin : begin + BLOCK])
        return columns.T

    def each(self, rows: Tensor) -> Tensor:
        """Return A applied to each row of `rows`, `(k, size)`, in batches."""
        if self.matvecs is None:
            return torch.stack([self.flat(row) for row in rows])
        block = max(1, min(BLOCK, BLOCK_NUMBERS // self.size))
        products = [self.matvecs(unflatten(part, self.like)) for part in torch.split(rows, block)]
        return torch.cat([torch.cat([t.reshape(len(t), -1) for t in part.values()], dim=1) for part in products])
