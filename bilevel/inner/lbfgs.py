"""L-BFGS for deterministic inner problems, and Newton steps where a solution is near.

A line search compares values, so it cannot see below about the square root of the machine precision; Newton steps by
conjugate gradients need only gradients and go on to the end of the digits. Where the loss has no second derivatives,
their products are differences of gradients.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch

from bilevel.errors import NAN_ADVICE, NonFiniteError, NotTwiceDifferentiableError
from bilevel.inner.base import InnerSolution, Task, check_fixed_loss
from bilevel.minimize import Array, history, lbfgs
from bilevel.operators import LinearOperator, Pairs
from bilevel.solvers.base import Linearization, System
from bilevel.solvers.differences import Differences
from bilevel.solvers.implicit import default_solver
from bilevel.solvers.linear import CG, Cholesky, LinearSolver
from bilevel.solvers.linear.base import FATAL, check_settings, loosened
from bilevel.solvers.linear.diagonal import badly_scaled, estimate_diagonal
from bilevel.vector import Vector, detach, flatten, norm, size, subtract, unflatten

# The line search has done what it can when a step lowers the value by less than this part: ten units in the last place.
VALUE_RTOL = 2e-15
# Steps over which the norm of the gradient stays as it was at the start: those of a linear loss, which has no minimum.
PATIENCE, UNCHANGED = 30, 1e-12
LOOSEST = 1e-4  # of default tolerances, however much slack there is
BEYOND = 1e100  # variables or gradients this large go to infinity; their squares would overflow
NEWTON_STEPS = 8
NEWTON_RTOL = 1e-2  # each Newton step shrinks the gradient at least about this much
ENOUGH = 0.1  # part of the tolerance below which none aims
# From so many variables on the 40 vectors of an L-BFGS step cost more than a gradient does. Newton steps take up to
# twice as many products; they are tried below this part of the first gradient, or at the last solution.
MANY, NEAR = 100_000, 1e-2
NEWTON_PRODUCTS = 2000  # most products of one Newton step: restarted more often, conjugate gradients stall


@dataclass(frozen=True)
class LBFGS:
    """Minimize the inner loss by L-BFGS and Newton steps, from the previous inner solution where there is one.

    From 100,000 variables on, and in float32, Newton steps by conjugate gradients are tried first where a solution is
    near: a product costs what a gradient does, fewer vectors are handled, and no values are compared. For deterministic
    problems: `inner_data` is None or one batch.

    Args:
        rtol: stop when the norm of the inner gradient is below rtol times its norm at `params`; None: 1e-9 in
            float64, 1e-5 in float32. The hypergradient's error is this times the condition number.
        max_steps: most L-BFGS iterations; what is missing then is left to at most 8 Newton steps.
    """

    rtol: float | None = None
    max_steps: int = 2000
    needs_fixed_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self.rtol, self.max_steps)

    def solve(self, task: Task, lower: Vector, upper: Vector) -> InnerSolution:
        """See `InnerSolver.solve`."""
        instead = 'inner_solver=bilevel.inner.Adam(lr=..., steps=...), or method="soba", which needs no inner solver'
        check_fixed_loss(task, "L-BFGS", instead)
        with task.session():
            return self._solve(task, lower, upper)

    def _solve(self, task: Task, lower: Vector, upper: Vector) -> InnerSolution:
        first = task.start_gradient_norm(upper)
        threshold = tolerance(self.rtol, next(iter(lower.values())).dtype, task.slack) * first
        system, linearize = linearized(task, lower, upper)
        if float(norm(system.residual)) <= threshold:
            return _ended(lower, 0, "converged", system)
        w, steps, pairs = lower, 0, None
        many = size(lower) >= MANY
        # The solution of a problem nearby, or a Hessian that is all but known: so is the way. In float32 Newton steps
        # have to finish what a line search begins, which sees half of the digits of a value.
        short = next(iter(lower.values())).dtype == torch.float32
        # An inner gradient just below the default threshold is often too large to trust there, and float64 is dear.
        enough = threshold * (ENOUGH if short and self.rtol is None else 1.0)
        if task.factor is not None or ((many or short) and lower is not task.params.start):
            near = _newton(task, w, upper, (threshold, enough), linearize, system)
            if near.status == "converged":
                return near
            w, steps = near.value, near.steps
        units = _units(system.operator)
        for part in (NEAR, 0.0) if many else (0.0,):  # where Newton steps do not get there from nearby, all the way
            descent = _descend(task, w, upper, units, max(threshold, part * first), self.max_steps)
            w, steps, pairs = descent.value, steps + descent.steps, descent.pairs or pairs
            if descent.status == "converged" and part * first <= threshold:
                break
            near = _newton(task, w, upper, (threshold, enough), linearize)
            w, steps = near.value, steps + near.steps
            if near.status == "converged":
                return replace(near, steps=steps, pairs=pairs)
            if descent.status != "converged":
                break
        return InnerSolution(w, steps, descent.status, pairs=pairs)


def tolerance(rtol: float | None, dtype: torch.dtype, slack: float) -> float:
    """Return the user's tolerance, or the default for a number format with some slack."""
    return rtol if rtol is not None else loosened(1e-9 if dtype == torch.float64 else 1e-5, slack, LOOSEST)


_Linearize = Callable[[Task, Vector, Vector], System]


def linearized(task: Task, lower: Vector, upper: Vector) -> tuple[System, _Linearize]:
    """Return the inner problem to first order, and what products with the Hessian are made of."""
    try:
        return Linearization(task, lower, upper), Linearization
    except NotTwiceDifferentiableError:
        return Differences(task, lower, upper), Differences


def _descend(task: Task, lower: Vector, upper: Vector, unit: Array, threshold: float, max_steps: int) -> InnerSolution:
    """Run SciPy's L-BFGS until the gradient norm is below the threshold."""
    batch, device = task.draw(), next(iter(lower.values())).device
    trail = _Trail(unit)
    first, unchanged = task.start_gradient_norm(upper), 0

    def variables(x: Array) -> Vector:
        return unflatten(torch.from_numpy(x * unit).to(device), lower)

    def function(x: Array) -> tuple[float, Array]:
        loss, gradient = task.value_and_gradient(variables(x), upper, batch, pinned=True)
        value, flat = float(loss.detach()), flatten(gradient).double().cpu().numpy()
        if not math.isfinite(value):
            raise NonFiniteError(f"the inner loss became {value} during L-BFGS; {NAN_ADVICE}", "inner loss")
        if max(float(np.abs(x).max()), float(np.abs(flat).max())) > BEYOND:
            raise no_minimum(f"{value:.0e}")
        trail.evaluated(x, flat)
        return value, flat * unit

    def small_enough(x: Array) -> bool:
        nonlocal unchanged
        size = trail.accepted(x)
        unchanged = unchanged + 1 if size is not None and abs(size - first) <= UNCHANGED * first else 0
        if unchanged > PATIENCE:
            raise no_minimum(f"{float(np.abs(x).max()):.0e}")
        return size is not None and size <= threshold

    start = flatten(lower).double().cpu().numpy() / unit
    result = lbfgs(function, start, max_steps=max_steps, value_rtol=VALUE_RTOL, after_step=small_enough)
    unfinished = "max_steps" if int(result.nit) >= max_steps else "stalled"
    done = float(np.linalg.norm(result.jac / unit)) <= threshold
    pairs = trail.pairs(device)
    return InnerSolution(variables(result.x), int(result.nit), "converged" if done else unfinished, pairs=pairs)


def no_minimum(value: str, walker: str = "L-BFGS") -> NonFiniteError:
    """Return the error for a loss that falls without end."""
    return NonFiniteError(
        f"the inner loss has no minimum: {walker} went to {value} and on; add a regularization that grows "
        "with the variables",
        "inner loss",
    )


class _Trail:
    """The last steps of L-BFGS and what they did to the gradient, in the problem's own units.

    SciPy returns its pairs as they lie in a ring, without saying where the ring begins.
    """

    def __init__(self, unit: Array) -> None:
        self._unit = unit
        self._latest: tuple[Array, Array] | None = None
        self._at: tuple[Array, Array] | None = None
        self._pairs: deque[tuple[Array, Array]] = deque(maxlen=history(len(unit)))

    def evaluated(self, x: Array, gradient: Array) -> None:
        """Take note of the gradient at x; the first point is where the trail begins."""
        self._latest = x.copy(), gradient
        self._at = self._at or self._latest

    def accepted(self, x: Array) -> float | None:
        """Take the step to x; return the norm of the gradient there, None where it was not evaluated last."""
        if self._latest is None or self._at is None or not np.array_equal(self._latest[0], x):
            self._at = None  # the next point evaluated begins a new trail
            return None
        (x, gradient), (before, gradient_before) = self._latest, self._at
        s, y = (x - before) * self._unit, gradient - gradient_before
        if float(s @ y) > np.finfo(float).eps * float(np.linalg.norm(s) * np.linalg.norm(y)):
            self._pairs.append((s, y))
        self._at = self._latest
        return float(np.linalg.norm(gradient))

    def pairs(self, device: torch.device) -> Pairs | None:
        """Return what was seen, oldest first, and let go of it; None for nothing."""
        if not self._pairs:
            return None
        steps, changes = (np.empty((len(self._pairs), len(self._unit))) for _ in range(2))
        for i in range(len(steps)):  # one pair after another, so that no two copies of all stand side by side
            steps[i], changes[i] = self._pairs.popleft()
        return Pairs(*(torch.from_numpy(part).to(device) for part in (steps, changes, self._unit**2)))


def _units(operator: LinearOperator) -> Array:
    """Return the unit of each variable, `(n,)`: one over the root of its curvature, where curvatures differ much.

    Strengths that a run has driven apart by ten decades make a badly scaled Hessian, on which plain L-BFGS needs
    thousands of steps and a scaled one dozens.
    """
    diagonal = estimate_diagonal(operator).double()
    units = diagonal.rsqrt() if badly_scaled(diagonal) else torch.ones_like(diagonal)
    result: Array = units.cpu().numpy()
    return result


def _newton(
    task: Task,
    lower: Vector,
    upper: Vector,
    thresholds: tuple[float, float],
    linearize: _Linearize,
    here: System | None = None,
) -> InnerSolution:
    """Take Newton steps while the gradient shrinks; return the end, "converged" or "stalled".

    `thresholds`: below the first it is converged, below the second no more steps are taken. `here` is the problem to
    first order at `lower`, where it is known.
    """
    best, best_norm, candidate, spent = _ended(lower, 0, "stalled", here), math.inf, lower, 0
    threshold, enough = thresholds
    for taken in range(NEWTON_STEPS + 1):
        try:
            system = linearize(task, candidate, upper) if here is None or taken else here
        except NonFiniteError:
            if not taken:
                raise
            return best
        left = float(norm(system.residual))
        status = "converged" if left <= threshold else "stalled"
        if not left < 0.5 * best_norm:
            return _ended(candidate, taken, status, system) if left < best_norm else replace(best, steps=taken)
        fell = left / best_norm  # Eisenstat and Walker, Choosing the forcing terms in an inexact Newton method (1996)
        best, best_norm = _ended(candidate, taken, status, system), left
        if left <= enough or taken == NEWTON_STEPS:
            return best
        rtol = min(NEWTON_RTOL, max(fell**2, ENOUGH * enough / left)) if taken else NEWTON_RTOL
        solver: LinearSolver = CG(rtol=rtol, max_steps=NEWTON_PRODUCTS)
        if task.factor is not None:
            dense = default_solver(system.operator, spent)
            solver = dense if isinstance(dense, Cholesky) else solver
        step = solver.solve(system.operator, system.residual)
        spent += step.steps
        if step.factor is not None:
            task.factor, spent = step.factor, 0
        if step.status in FATAL or (step.status != "converged" and step.relative > 0.5):
            return best
        candidate = detach(subtract(candidate, step.value))
    raise AssertionError("the loop returns")


def _ended(w: Vector, steps: int, status: str, system: System | None) -> InnerSolution:
    return InnerSolution(w, steps, status, system=system if isinstance(system, Linearization) else None)
