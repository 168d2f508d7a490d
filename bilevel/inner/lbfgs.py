"""L-BFGS for deterministic inner problems, finished by Newton steps where its line search runs out of digits.

A line search compares values, so it cannot see below about the square root of the machine precision; Newton steps by
conjugate gradients need only gradients and go on to the end of the digits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from bilevel.errors import InvalidValueError, NonFiniteError
from bilevel.inner.base import InnerSolution, Task
from bilevel.minimize import Array, lbfgs
from bilevel.solvers.base import Linearization
from bilevel.solvers.linear.base import check_settings
from bilevel.solvers.linear.cg import CG
from bilevel.vector import Vector, detach, flatten, norm, subtract, unflatten

NEWTON_STEPS = 8
NEWTON_RTOL = 1e-2  # each Newton step shrinks the gradient about this much


@dataclass(frozen=True)
class LBFGS:
    """Minimize the inner loss by L-BFGS, from the previous inner solution where there is one.

    For deterministic problems: `inner_data` is None or one batch.

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
        if not task.deterministic:
            raise InvalidValueError(
                "L-BFGS needs one fixed inner loss, and `inner_data` gives another batch at every call; give one batch "
                "(Tensors, or a Dataset, which is read whole), or inner_solver=bilevel.inner.Adam(lr=..., steps=...)"
            )
        batch = task.draw()
        first = next(iter(lower.values()))

        def function(x: Array) -> tuple[float, Array]:
            w = unflatten(torch.from_numpy(x).to(first.device), lower)
            loss, gradient = task.value_and_gradient(w, upper, batch, pinned=True)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NonFiniteError(f"the inner loss became {value} during L-BFGS", "inner loss")
            return value, flatten(gradient).double().cpu().numpy()

        start = flatten(lower).double().cpu().numpy()
        threshold = self._rtol(first.dtype) * task.start_gradient_norm(upper)
        largest = threshold / math.sqrt(len(start))  # SciPy looks at the largest entry
        result = lbfgs(function, start, max_steps=self.max_steps, gradient_below=largest)
        w = unflatten(torch.from_numpy(result.x).to(first.device), lower)
        if float(np.linalg.norm(result.jac)) <= threshold:
            return InnerSolution(w, int(result.nit), "converged")
        w, steps, done = _newton(task, w, upper, threshold)
        unfinished = "max_steps" if result.nit >= self.max_steps else "stalled"
        return InnerSolution(w, int(result.nit) + steps, "converged" if done else unfinished)

    def _rtol(self, dtype: torch.dtype) -> float:
        if self.rtol is not None:
            return self.rtol
        return 1e-9 if dtype == torch.float64 else 1e-5


def _newton(task: Task, lower: Vector, upper: Vector, threshold: float) -> tuple[Vector, int, bool]:
    """Take Newton steps while the gradient shrinks; return the end, the steps and whether it is there."""
    best, best_norm, candidate = lower, math.inf, lower
    for taken in range(NEWTON_STEPS + 1):
        system = Linearization(task, candidate, upper)
        size = float(norm(system.residual))
        if not size < 0.5 * best_norm:
            return (candidate, taken, False) if size < best_norm else (best, taken, False)
        best, best_norm = candidate, size
        if size <= threshold or taken == NEWTON_STEPS:
            return best, taken, size <= threshold
        step = CG(rtol=NEWTON_RTOL).solve(system.operator, system.residual)
        if step.status == "nonpositive curvature":
            return best, taken, False
        candidate = detach(subtract(candidate, step.value))
    raise AssertionError("the loop returns")
