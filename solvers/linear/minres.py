"""The minimum residual method for symmetric systems, definite or not.

Paige and Saunders, Solution of sparse indefinite systems of linear equations, SIAM J. Numer. Anal. 12 (1975); in the
form of Choi, Paige and Saunders, MINRES-QLP, SIAM J. Sci. Comput. 33 (2011), table 4.1. Deliberate differences: it
restarts from the true residual where the recursion claims convergence and the truth disagrees, and the smallest Ritz
value comes from the Lanczos coefficients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from scipy.linalg import eigvalsh_tridiagonal
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
from bilevel.vector import Vector

SINGULAR = 1e-12  # a pivot this small against the diagonal is zero up to the rounding of the recursion
RESTARTS = 3  # runs from the true residual before what is left counts as rounding


@dataclass(frozen=True)
class MINRES:
    """Solve a symmetric system, positive definite or not, by minimizing the residual over Krylov spaces.

    The residual never grows, so the last iterate is the best one. The hypergradient at a stationary point needs an
    invertible Hessian, not a positive one: this is where `implicit` turns when CG meets negative curvature.

    Args:
        rtol: stop when |b - Ax| <= rtol |b|; None: 1e-8 in float64, 1e-5 in float32.
        max_steps: most iterations; None: ten times the number of unknowns, at most 10,000.

    >>> import torch
    >>> from bilevel.operators import LinearOperator
    >>> d = torch.tensor([2.0, -4.0])
    >>> A = LinearOperator(lambda v: {"w": d * v["w"]}, {"w": torch.zeros(2)}, symmetric=True)
    >>> MINRES().solve(A, {"w": torch.ones(2)}).value["w"]
    tensor([ 0.5000, -0.2500])
    """

    rtol: float | None = None
    max_steps: int | None = None
    truncates: ClassVar[bool] = False
    terms: ClassVar[Terms] = Terms(
        "k + 2 products, k ~ sqrt(κ) log(1/rtol)",
        "one gradient graph",
        "at most κ rtol; negative curvature does no harm",
        "Paige and Saunders 1975",
    )

    def __post_init__(self) -> None:
        check_settings(self.rtol, self.max_steps)

    def solve(self, operator: LinearOperator, rhs: Vector, start: Vector | None = None) -> LinearSolution:
        """Solve A x = rhs. Raises for an operator that is not symmetric."""
        if not operator.symmetric:
            raise InvalidValueError("MINRES needs a symmetric operator and this one is not; use bilevel.GMRES()")
        b = wide(rhs)
        threshold = default_rtol(self.rtol, dtype_of(rhs), operator.slack) * math.sqrt(inner(b, b))
        x, r = start_from(operator, b, None if start is None else wide(start))
        steps, limit = 0, self.max_steps or min(10 * operator.size, 10_000)
        curvature: float | None = None
        status: Status = "converged"
        for _ in range(RESTARTS):
            size = math.sqrt(inner(r, r))
            if size <= threshold or steps >= limit:
                break
            run = _Lanczos(operator, r, size)
            correction = run.minimize(threshold, limit - steps)
            steps += run.steps
            curvature = run.smallest_ritz() if curvature is None else min(curvature, run.smallest_ritz())
            candidate = x + correction
            after = b - operator.flat(candidate)
            if not inner(after, after) < size**2:
                break
            x, r = candidate, after
        if math.sqrt(inner(r, r)) > threshold:
            status = "max_steps" if steps >= limit else "stagnated"
        return finished(operator, rhs, x, status, steps, curvature)


class _Lanczos:
    """One MINRES run on A d = r from d = 0; the letters are those of Choi et al."""

    def __init__(self, operator: LinearOperator, r: Tensor, size: float) -> None:
        self.operator, self.beta1 = operator, size
        self.v = r / size
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self.steps = 0

    def minimize(self, threshold: float, max_steps: int) -> Tensor:
        """Return d."""
        x = self.v.new_zeros(self.v.shape)
        v_old, v = x, self.v
        d_old, d = x, x
        beta, phi = 0.0, self.beta1
        c, s, delta, epsilon = -1.0, 0.0, 0.0, 0.0
        while phi > threshold and self.steps < max_steps:
            Av = self.operator.flat(v)
            alpha = inner(v, Av)
            p = Av - alpha * v - beta * v_old
            beta_next = math.sqrt(inner(p, p))
            self.steps += 1
            self.alphas.append(alpha)
            self.betas.append(beta_next)
            # The last rotation acts on the new column of the tridiagonal matrix, then a new one zeroes beta_next.
            delta_2, gamma = c * delta + s * alpha, s * delta - c * alpha
            epsilon_next, delta = s * beta_next, -c * beta_next
            gamma_2 = math.hypot(gamma, beta_next)
            if gamma_2 <= SINGULAR * max(map(abs, self.alphas)):
                break  # A has no more to say about r: it is singular there
            c, s = gamma / gamma_2, beta_next / gamma_2
            d_old, d = d, (v - delta_2 * d - epsilon * d_old) / gamma_2
            x = x + (c * phi) * d
            phi, epsilon = s * phi, epsilon_next
            if beta_next <= 1e-15 * max(map(abs, self.alphas)):
                break
            v_old, v, beta = v, p / beta_next, beta_next
        return x

    def smallest_ritz(self) -> float:
        """Return the smallest curvature over the Krylov space met."""
        values = eigvalsh_tridiagonal(self.alphas, self.betas[: len(self.alphas) - 1], select="i", select_range=(0, 0))
        return float(values[0])
