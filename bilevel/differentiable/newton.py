"""Newton's method for roots, with a line search on the norm of the residual.

    A(x) d = R(x)      x <- x - t d,   t = 1, 1/2, 1/4, ... until |R| falls

Nocedal and Wright, Numerical Optimization, 2nd ed., Springer 2006, algorithm 11.4, with the norm as merit function.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bilevel.differentiable.equation import AdjointCondition
from bilevel.errors import NonFiniteError
from bilevel.solvers.base import Linearization, RootCondition
from bilevel.solvers.implicit import default_solver
from bilevel.solvers.linear import LinearSolver
from bilevel.solvers.linear.base import check_count, check_settings, dtype_of
from bilevel.vector import Vector, axpy, detach, is_finite, norm, subtract, zeros_like

SHORTEST = 2.0**-30
ENOUGH = 1e-4  # the part of the fall which a straight line promises that a step must bring


@dataclass(frozen=True)
class Found:
    """The end of a search for a root.

    Attributes:
        value: the best point met.
        steps: iterations taken.
        failure: why it is no root; "" where it is one.
    """

    value: Vector
    steps: int
    failure: str = ""


@dataclass(frozen=True)
class Newton:
    """Find a root by Newton's method with a line search.

    Args:
        rtol: stop after a step shorter than rtol |x|; the error left is about the square of that. None: 1e-8 in
            float64, 1e-4 in float32.
        max_steps: most steps.
        linear_solver: for the Newton steps; None: dense up to 64 unknowns, GMRES above.
    """

    rtol: float | None = None
    max_steps: int = 50
    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        check_settings(self.rtol, self.max_steps)
        check_count(self.max_steps, "max_steps")

    def find(self, condition: RootCondition, lower: Vector, upper: Vector) -> Found:
        """Return a root near `lower`."""
        rtol = self.rtol if self.rtol is not None else (1e-8 if dtype_of(lower).itemsize == 8 else 1e-4)
        x, residual = lower, detach(condition.residual(lower, upper))
        scale = float(norm(x))
        for steps in range(self.max_steps):
            size = float(norm(residual))
            if size == 0.0:
                return Found(x, steps)
            step = self._step(condition, x, upper, residual)
            if step is None:
                return Found(x, steps, f"the Jacobian is singular where |residual| is {size:.1e}")
            t, last = 1.0, float(norm(step)) <= rtol * scale
            after, new = _try(condition, x, step, t, upper)
            if last:  # within rounding of the root |R| need not fall any more
                return Found(after if new is not None and float(norm(new)) <= size else x, steps + 1)
            while new is None or not float(norm(new)) <= (1.0 - ENOUGH * t) * size:
                t /= 2.0
                if t < SHORTEST:
                    return Found(x, steps, f"no step lowers |residual| below {size:.1e}")
                after, new = _try(condition, x, step, t, upper)
            x, residual = after, new
            scale = max(scale, float(norm(x)), float(norm(subtract(x, lower))))
        return Found(x, self.max_steps, f"|residual| is {float(norm(residual)):.1e} after all `max_steps`")

    def _step(self, condition: RootCondition, x: Vector, upper: Vector, residual: Vector) -> Vector | None:
        zero = zeros_like(x)
        # The derivative of A^T u with respect to u, transposed by reverse mode: A itself.
        system = Linearization(AdjointCondition(condition), zero, AdjointCondition.upper(zero, x, upper))
        operator = replace(system.operator, symmetric=False)
        solution = (self.linear_solver or default_solver(operator)).solve(operator, residual)
        singular = solution.status == "singular" or not is_finite(solution.value)
        return None if singular or float(norm(solution.value)) == 0.0 else solution.value


def _try(condition: RootCondition, x: Vector, step: Vector, t: float, upper: Vector) -> tuple[Vector, Vector | None]:
    """Return x - t step and its residual, None where that is not finite."""
    after = axpy(-t, step, x)
    try:
        residual = detach(condition.residual(after, upper))
    except NonFiniteError:
        return after, None
    return after, residual if is_finite(residual) else None
