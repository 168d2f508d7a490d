"""The diagonal of a symmetric operator, estimated from a few products.

Bekas, Kokiopoulou and Saad, An estimator for the diagonal of a matrix, Appl. Numer. Math. 57 (2007): the mean of
z * (A z) over random signs z. Its error in an entry is the size of the rest of that row, so it finds what dominates a
row: a strong penalty on one weight among weak ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.errors import InvalidValueError
from bilevel.operators import LinearOperator
from bilevel.solvers.linear.base import Preconditioner, wide

PROBES = 8
SPREAD = 100.0  # the largest entry over the median, above which a system is called badly scaled
FLOOR = 0.1  # of the median: small entries are the ones that the estimate cannot tell from noise


def estimate_diagonal(operator: LinearOperator, probes: int = PROBES) -> Tensor:
    """Return a positive estimate `(size,)` of the diagonal's absolute values, kept above a tenth of their median."""
    like = next(iter(operator.like.values()))
    generator = torch.Generator().manual_seed(0)  # a function of the operator alone
    total = torch.zeros(operator.size, dtype=like.dtype, device=like.device)
    for _ in range(probes):
        signs = torch.randint(0, 2, (operator.size,), generator=generator).to(like) * 2 - 1
        total += signs * operator.flat(signs)
    return kept_positive(total / probes)


def kept_positive(diagonal: Tensor) -> Tensor:
    """Return absolute values, kept above a tenth of their median."""
    size = diagonal.abs()
    median = size.median()
    return size.clamp(min=float(FLOOR * median)) if float(median) > 0.0 else torch.ones_like(size)


def badly_scaled(diagonal: Tensor) -> bool:
    """Say whether dividing by the diagonal is worth it."""
    return bool(diagonal.max() > SPREAD * diagonal.median())


def by_diagonal(operator: LinearOperator) -> Preconditioner:
    """Return the estimated diagonal as a preconditioner."""
    return diagonal_of(estimate_diagonal(operator))


def by_second_moment(operator: LinearOperator) -> Preconditioner:
    """Return the root of Adam's second moment, which grows and falls with the diagonal."""
    if operator.second_moment is None:
        raise InvalidValueError(
            'CG(preconditioner="second-moment") needs an inner solver that keeps one, and an inner solve before; use '
            'inner_solver=bilevel.inner.Adam(...), or preconditioner="diagonal"'
        )
    return diagonal_of(kept_positive(wide(operator.second_moment).sqrt()))


def diagonal_of(diagonal: Tensor) -> Preconditioner:
    """Return a diagonal as a preconditioner, which the next solve has again."""
    return Preconditioner(
        lambda r: r / diagonal, float(diagonal.min()), keep=lambda steps, decades: {"diagonal": diagonal}
    )
