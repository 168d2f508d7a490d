"""Anderson acceleration of fixed-point iterations.

    f_k = G(x_k) - x_k      γ = argmin |f_k - ΔF γ|      x_{k+1} = G(x_k) - ΔG γ

with the last m differences of f and of G(x) as the columns of ΔF and ΔG. Anderson, Iterative procedures for nonlinear
integral equations, J. ACM 12 (1965); in the form of Walker and Ni, Anderson acceleration for fixed-point iterations,
SIAM J. Numer. Anal. 49 (2011), algorithm AA. Deliberate difference: where |f| grows tenfold over its best, the
iteration starts again from there with an empty memory.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bilevel.differentiable.newton import Found
from bilevel.errors import InvalidValueError, NonFiniteError
from bilevel.solvers.base import RootCondition
from bilevel.solvers.linear.base import check_count, check_settings, dtype_of, inner
from bilevel.vector import Vector, flatten, unflatten

GROWTH = 10.0
PATIENCE = 50  # iterations without a smaller |f|
DEPENDENT = 1e-10  # singular values of ΔF below this part of the largest carry no news


@dataclass(frozen=True)
class Anderson:
    """Find a fixed point by Anderson acceleration of x <- map(x).

    Args:
        memory: differences kept; 0 is the plain iteration.
        rtol: stop when |map(x) - x| <= rtol |x|; None: 1e-12 in float64, 1e-6 in float32.
        max_steps: most evaluations of the map.
    """

    memory: int = 5
    rtol: float | None = None
    max_steps: int = 1000

    def __post_init__(self) -> None:
        check_settings(self.rtol, self.max_steps)
        check_count(self.max_steps, "max_steps")
        if not isinstance(self.memory, int) or isinstance(self.memory, bool) or self.memory < 0:
            raise InvalidValueError(f"`memory` is {self.memory!r}, expected a whole number of at least 0")

    def find(self, condition: RootCondition, lower: Vector, upper: Vector) -> Found:
        """Return a root of R = x - map(x) near `lower`."""
        rtol = self.rtol if self.rtol is not None else (1e-12 if dtype_of(lower).itemsize == 8 else 1e-6)
        x = flatten(lower)
        best, best_size, best_step = x, math.inf, 0
        xs: list[Tensor] = []
        fs: list[Tensor] = []
        for step in range(self.max_steps):
            f = _defect(condition, x, lower, upper)
            size = math.inf if f is None else math.sqrt(inner(f, f))
            if size < best_size:
                best, best_size, best_step = x, size, step
            if f is not None and size <= rtol * math.sqrt(max(inner(x, x), inner(x + f, x + f))):
                return Found(unflatten(x + f, lower), step + 1)
            if step - best_step >= PATIENCE:
                break
            if f is None or not size <= GROWTH * best_size:
                if not xs:
                    break
                xs, fs, x = [], [], best
                continue
            xs, fs = [*xs, x][-self.memory - 1 :], [*fs, f][-self.memory - 1 :]
            x = x + f - _correction(xs, fs)
        failure = f"|map(x) - x| is {best_size:.1e} at best after {step + 1} evaluations of the map"
        return Found(unflatten(best, lower), step + 1, failure)


def _defect(condition: RootCondition, x: Tensor, lower: Vector, upper: Vector) -> Tensor | None:
    """Return map(x) - x; None where that is not finite and x is not where it began."""
    try:
        return -flatten(condition.residual(unflatten(x, lower), upper))
    except NonFiniteError:
        if torch.equal(x, flatten(lower)):
            raise
        return None


def _correction(xs: list[Tensor], fs: list[Tensor]) -> Tensor:
    """Return ΔG γ."""
    if len(xs) < 2:
        return torch.zeros_like(xs[-1])
    change = torch.stack([b - a for a, b in itertools.pairwise(fs)], dim=1)
    moved = torch.stack([b - a for a, b in itertools.pairwise(xs)], dim=1) + change
    Q, R = torch.linalg.qr(change)
    rhs = (Q.T @ fs[-1]).double().cpu().numpy()
    gamma = np.linalg.lstsq(R.double().cpu().numpy(), rhs, rcond=DEPENDENT)[0]
    return moved @ torch.from_numpy(gamma).to(moved)
