"""Newton's method with conjugate gradients: truncated Newton steps and a line search, for smooth convex losses.

    w' = w - t p,     |H p - R| <= min(1/2, sqrt(|R| / |R_0|)) |R|,     t = 1, 1/2, 1/4, ...

with R and H the gradient and the Hessian of the inner loss. Superlinearly convergent: Dembo, Eisenstat and Steihaug,
Inexact Newton methods, SIAM J. Numer. Anal. 19 (1982); Nocedal and Wright, Numerical optimization (2006), algorithm
7.1. The products are those of the implicit estimators, from one graph a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from bilevel.inner.base import InnerSolution, Task, check_fixed_loss
from bilevel.inner.lbfgs import BEYOND, ENOUGH, NEWTON_PRODUCTS, linearized, no_minimum, tolerance
from bilevel.solvers.base import System
from bilevel.solvers.linear import CG
from bilevel.solvers.linear.base import check_settings
from bilevel.vector import Vector, axpy, detach, dot, max_abs, norm

ARMIJO = 1e-4  # part of the slope that a step has to gain
HALVINGS = 40
ROUNDING = 10.0  # units in the last place: values closer than that are the same


@dataclass(frozen=True)
class NewtonCG:
    """Minimize a smooth convex inner loss by Newton steps from conjugate gradients, and a line search.

    From the previous inner solution where there is one. A step costs one gradient, some values and as many
    Hessian-vector products as its tolerance takes; no matrix is formed, and four vectors are kept where L-BFGS keeps
    forty. It pays where products are cheap and the condition is bad. For deterministic problems: `inner_data` is None
    or one batch. Where curvature is not positive, a step is what was found until there, or the gradient.

    Args:
        rtol: stop when the norm of the inner gradient is below rtol times its norm at `params`; None: 1e-9 in
            float64, 1e-5 in float32. The hypergradient's error is this times the condition number.
        max_steps: most Newton steps.
    """

    rtol: float | None = None
    max_steps: int = 100
    needs_fixed_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self.rtol, self.max_steps)

    def solve(self, task: Task, lower: Vector, upper: Vector) -> InnerSolution:
        """See `InnerSolver.solve`."""
        check_fixed_loss(task, "inner.NewtonCG", "inner_solver=bilevel.inner.Adam(lr=..., steps=...)")
        first, h, dtype = task.start_gradient_norm(upper), detach(upper), next(iter(lower.values())).dtype
        threshold, rounding = tolerance(self.rtol, dtype, task.slack) * first, ROUNDING * torch.finfo(dtype).eps
        system, linearize = linearized(task, lower, upper)
        w, value, left = lower, _value(task, lower, h), float(norm(system.residual))
        for taken in range(self.max_steps):
            if left <= threshold:
                return InnerSolution(w, taken, "converged")
            direction = _direction(system, max(min(0.5, math.sqrt(left / first)), ENOUGH * threshold / left))
            slope = float(dot(direction, system.residual))
            found = _along(task, w, h, direction, value, slope, rounding * abs(value))
            if found is None:
                return InnerSolution(w, taken, "stalled")
            w, lowered = found
            if not math.isfinite(lowered) or float(max_abs(w)) > BEYOND:
                raise no_minimum(f"{float(max_abs(w)):.0e}", "Newton-CG")
            system = linearize(task, w, upper)
            before, left = left, float(norm(system.residual))
            if left > threshold and left > before / 2.0 and lowered >= value - rounding * abs(value):
                return InnerSolution(w, taken + 1, "stalled")
            value = lowered
        return InnerSolution(w, self.max_steps, "converged" if left <= threshold else "max_steps")


def _value(task: Task, lower: Vector, upper: Vector) -> float:
    return float(task.inner(lower, upper).detach())


def _direction(system: System, rtol: float) -> Vector:
    """Return about H^-1 R; where that does not lead downhill, R."""
    step = CG(rtol=rtol, max_steps=NEWTON_PRODUCTS).solve(system.operator, system.residual).value
    return step if float(dot(step, system.residual)) > 0.0 else system.residual


def _along(
    task: Task, lower: Vector, upper: Vector, direction: Vector, value: float, slope: float, rounded: float
) -> tuple[Vector, float] | None:
    """Return the first point w - t p that is low enough and its value, None without one.

    Where values differ by rounding alone, the full step is taken.
    """
    t = 1.0
    for _ in range(HALVINGS):
        w = detach(axpy(-t, direction, lower))
        lowered = _value(task, w, upper)
        if lowered <= value - ARMIJO * t * slope + rounded:
            return w, lowered
        t /= 2.0
    return None
