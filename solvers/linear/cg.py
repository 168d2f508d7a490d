"""Conjugate gradients.

Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems, J. Res. NBS 49 (1952).
Deliberate differences from the textbook: the curvature p·Ap is tested at every step; the best iterate
is returned with its true residual; the residual is recomputed every `REFRESH` steps; dots are summed
in float64; the smallest Ritz value comes from the coefficients for free (Golub and Van Loan, Matrix
Computations, 4th ed., section 11.3.4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor

from bilevel.errors import InvalidValueError
from bilevel.operators import LinearOperator
from bilevel.solvers.linear.base import (
    LinearSolution,
    Status,
    check_settings,
    default_rtol,
    finished,
    inner,
    start_from,
)
from bilevel.vector import Vector, flatten

REFRESH = 50  # steps between two recomputations of the true residual
PATIENCE = 100  # steps without a better residual, after which the decrease of the energy decides
# The residual of an ill-conditioned system first grows for long while the energy x·Ax/2 - b·x falls. Stagnation is an
# energy that does not fall either: less than this part of its fall so far, over PATIENCE steps.
NEGLIGIBLE = 1e-10


@dataclass(frozen=True)
class CG:
    """Solve a symmetric positive definite system by conjugate gradients.

    Args:
        rtol: stop when |b - Ax| <= rtol |b|; None: 1e-8 in float64, 1e-5 in float32. Smaller is more
            accurate and slower; the error of x is at most the condition number times rtol.
        max_steps: most iterations; None: ten times the number of unknowns, at most 10,000.

    >>> import torch
    >>> from bilevel.operators import LinearOperator
    >>> A = LinearOperator(lambda v: {"w": 2.0 * v["w"]}, {"w": torch.zeros(3)}, symmetric=True)
    >>> CG().solve(A, {"w": torch.ones(3)}).value["w"]
    tensor([0.5000, 0.5000, 0.5000])
    """

    rtol: float | None = None
    max_steps: int | None = None
    truncates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_settings(self.rtol, self.max_steps)

    def solve(self, operator: LinearOperator, rhs: Vector, start: Vector | None = None) -> LinearSolution:
        """Solve A x = rhs. Raises for an operator that is not symmetric."""
        if not operator.symmetric:
            raise InvalidValueError('CG needs a symmetric operator and this one is not; use method="direct"')
        b = flatten(rhs)
        run = _Run(operator, b, None if start is None else flatten(start))
        threshold = default_rtol(self.rtol, b.dtype) * math.sqrt(inner(b, b))
        status = run.iterate(threshold, self.max_steps or min(10 * operator.size, 10_000))
        return finished(operator, rhs, run.best_x, status, run.steps, run.smallest_ritz())


class _Run:
    """The state of one solve; x, r and p are the textbook's."""

    def __init__(self, operator: LinearOperator, b: Tensor, start: Tensor | None) -> None:
        self.operator, self.b = operator, b
        self.x, self.r = start_from(operator, b, start)
        self.best_x, self.best_norm = self.x.clone(), math.sqrt(inner(self.r, self.r))
        self.steps = 0
        self.curvatures: list[float] = []
        self.alphas: list[float] = []
        self.betas: list[float] = []

    def iterate(self, threshold: float, max_steps: int) -> Status:
        p, rr, waited = self.r.clone(), inner(self.r, self.r), 0
        fall, lately = 0.0, 0.0
        while self.best_norm > threshold:
            if self.steps == max_steps:
                return "max_steps"
            Ap = self.operator.flat(p)
            pp, pAp = inner(p, p), inner(p, Ap)
            self.steps += 1
            self.curvatures.append(pAp / pp)
            # Rounding in a product of size |p||Ap| cannot tell a smaller curvature from zero.
            if not pAp > 4 * torch.finfo(p.dtype).eps * math.sqrt(pp * inner(Ap, Ap)):
                return "nonpositive curvature"
            alpha = rr / pAp
            self.x += alpha * p
            fall, lately = fall + alpha * rr, lately + alpha * rr
            refreshed = self.steps % REFRESH == 0
            self.r = self.b - self.operator.flat(self.x) if refreshed else self.r - alpha * Ap
            rr, before = inner(self.r, self.r), rr
            waited = waited + 1 if math.sqrt(rr) >= self.best_norm else 0
            if not waited:
                self.best_x, self.best_norm = self.x.clone(), math.sqrt(rr)
            if not math.isfinite(rr):
                return "stagnated"
            if waited % PATIENCE == 0:
                if waited and lately < NEGLIGIBLE * fall:
                    return "stagnated"
                lately = 0.0
            self.alphas.append(alpha)
            self.betas.append(rr / before)
            p = self.r + self.betas[-1] * p
        return "converged"

    def smallest_ritz(self) -> float | None:
        """Return the smallest curvature over the whole Krylov space met."""
        if not self.curvatures:
            return None
        smallest = min(self.curvatures)
        if self.alphas:
            alpha, beta = np.array(self.alphas), np.array(self.betas[:-1])
            diagonal = 1 / alpha + np.concatenate([[0.0], beta / alpha[:-1]])
            ritz = eigvalsh_tridiagonal(diagonal, np.sqrt(beta) / alpha[:-1], select="i", select_range=(0, 0))
            smallest = min(smallest, float(ritz[0]))
        return smallest
