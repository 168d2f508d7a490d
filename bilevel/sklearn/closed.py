"""Models whose training has a closed form: the outer loss is a function of the hyperparameters like any other.

Kernel ridge regression and Gaussian processes solve one linear system a fold, so autograd differentiates through its
Cholesky factor; no inner problem is left, and the gradient is exact.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.errors import NonFiniteError
from bilevel.minimize import lbfgs
from bilevel.sklearn.tuning import FLAT, Floats, Options, Row, Tuned


@dataclass(frozen=True)
class Point:
    """The outer loss at one point.

    Attributes:
        loss: with the prior.
        gradient: over the unknowns, `(m,)`.
        row: what is told of it; its seconds are set later.
    """

    loss: float
    gradient: Floats
    row: Callable[[float], Row]


def descend(
    evaluate: Callable[[Floats], Point], starts: Sequence[Floats], bounds: tuple[Floats, Floats], options: Options
) -> Tuned:
    """Minimize over unknowns `(m,)` (logarithms) from the best of some points.

    Args:
        evaluate: the loss at a point.
        starts: `(m,)` each; all are tried, and the best is gone on from.
        bounds: lowest and highest unknowns.
        options: see `Options`.
    """
    rows: list[Row] = []
    losses: list[float] = []
    accepted = [math.inf]

    def function(x: Floats) -> tuple[float, Floats]:
        begun = time.perf_counter()
        point = evaluate(x)
        if not (math.isfinite(point.loss) and np.isfinite(point.gradient).all()):
            raise NonFiniteError(f"the outer loss is not finite at {np.exp(x)}", "outer loss")
        rows.append(point.row(time.perf_counter() - begun))
        losses.append(point.loss)
        return point.loss, point.gradient

    def settled(x: Floats) -> bool:
        accepted.append(min(losses))
        return accepted[-2] - accepted[-1] < FLAT * options.tol

    tried = [function(np.clip(start, *bounds))[0] for start in starts]
    lbfgs(
        function,
        np.clip(starts[int(np.argmin(tried))], *bounds),
        max_steps=options.max_steps,
        bounds=bounds,
        after_step=settled,
    )
    steps = len(accepted) - 1
    ended = f"converged: the last of {steps} steps lowered the outer loss by less than {FLAT * options.tol:.0e}"
    if steps >= options.max_steps:
        ended = f"steps: took the {steps} steps that `max_steps` allows"
    return Tuned(rows, int(np.argmin(losses)), None, ended)


def solve_by_cholesky(matrix: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Cholesky factor, of a little more where rounding made the matrix singular, and a solution."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    more = 0.0
    scale = float(matrix.detach().diagonal().mean())
    while bool(failed):
        more = max(100.0 * more, 1e-14)
        factor, failed = torch.linalg.cholesky_ex(matrix + more * scale * torch.eye(len(matrix), dtype=matrix.dtype))
    return factor, torch.cholesky_solve(rhs[:, None], factor)[:, 0]


def parts(weights: Any) -> Any:
    """Return where weights are positive."""
    return torch.nonzero(weights > 0.0)[:, 0]
