"""Newton's method with the dense Hessian, for small inner problems; every step is differentiable.

    w' = w - (H(w) + damping I)^-1 R(w),     R, H: gradient and Hessian of the inner loss

Quadratically convergent near a strict minimum (Nocedal and Wright, Numerical optimization, 2006, theorem 3.5). At the
minimum dw'/dw = 0, so one differentiated step is the whole implicit derivative: Bolte, Pauwels and Vaiter, One-step
differentiation of iterative algorithms, NeurIPS 2023, corollary 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.errors import InvalidValueError, NonFiniteError
from bilevel.inner.base import InnerSolution, Task, check_fixed_loss
from bilevel.inner.stepwise import check_number
from bilevel.operators import BLOCK
from bilevel.solvers.linear.base import check_count
from bilevel.solvers.recorded import in_batches
from bilevel.vector import Vector, dense, detach, flatten, is_finite, leaves, norm, size, subtract, unflatten

LARGEST = 4000  # a float64 Hessian of 128 MB, and some seconds a step
RTOL = {torch.float64: 1e-13, torch.float32: 1e-6}  # of the gradient at `params`: what rounding leaves
ROUNDED = 1e-9  # of it: from here on, a gradient that shrinks no more is as small as rounding lets it be
CLIMBS = 1e6  # a gradient this many times that at `params` has left every basin


@dataclass(frozen=True)
class Newton:
    """Minimize the inner loss by Newton steps, for up to some thousand variables and deterministic losses.

    Under an implicit method it stops as soon as the gradient is rounding, from the previous inner solution where there
    is one; unrolled, it takes all `steps` from `params`. Unrolling needs third derivatives of the inner loss.

    There is no line search, which no derivative would follow: it must start where the loss is convex.

    Args:
        steps: most steps.
        damping: added to the Hessian's diagonal (Levenberg): for a flat or slightly concave loss. The inner solution is
            the same; convergence is linear instead of quadratic, the slower the larger.
    """

    steps: int = 20
    damping: float = 0.0
    needs_fixed_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count(self.steps, "steps")
        check_number(self.damping, "inner.Newton: `damping`")

    def solve(self, task: Task, lower: Vector, upper: Vector) -> InnerSolution:
        """See `InnerSolver.solve`."""
        _check(task, lower)
        start, h = task.start_gradient_norm(upper), detach(upper)
        threshold = RTOL.get(next(iter(lower.values())).dtype, 1e-6) * start
        w, batch, before = detach(lower), task.draw(), math.inf
        for taken in range(self.steps + 1):
            gradient, hessian = _derivatives(task, w, h, batch, graph=False)
            now = float(norm(gradient))
            if now <= threshold or (now <= ROUNDED * start and now > before / 2.0):
                return InnerSolution(w, taken, "converged")
            if not math.isfinite(now) or now > CLIMBS * max(start, before):
                raise NonFiniteError(f"{_DIVERGES}: the gradient's norm is {now:.1e} after step {taken}", "inner loss")
            if taken == self.steps:
                break
            w, before = subtract(w, unflatten(self._step(hessian, gradient, taken), w)), min(now, before)
        return InnerSolution(w, self.steps, "max_steps")

    def unroll_steps(self, task: Task) -> int:
        """Return the number of steps."""
        return self.steps

    def initial_state(self, lower: Vector) -> dict[str, Any]:
        """No state."""
        return {}

    def step(self, task: Task, lower: Vector, state: Any, upper: Vector, t: int) -> tuple[Vector, Any]:
        """Take a step; the result has a graph where `lower` requires a gradient."""
        _check(task, lower)
        graph = any(x.requires_grad for x in lower.values())
        gradient, hessian = _derivatives(task, lower, upper, task.draw(), graph)
        with torch.set_grad_enabled(graph):
            return subtract(lower, unflatten(self._step(hessian, gradient, t), lower)), state

    def _step(self, hessian: Tensor, gradient: Vector, t: int) -> Tensor:
        """Return (H + damping I)^-1 R, `(n,)`."""
        if not (bool(torch.isfinite(hessian).all()) and is_finite(gradient)):
            raise NonFiniteError(f"{_DIVERGES}: derivatives of the inner loss are not finite at step {t}", "inner loss")
        damped = hessian + self.damping * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        _check_curvature(damped.detach(), self.damping, t)
        step: Tensor = torch.linalg.solve(damped, flatten(gradient))
        return step


_DIVERGES = (
    "inner.Newton diverges, which takes no line search: start closer to the minimum, give it `damping`, or write "
    "inner_solver=bilevel.inner.LBFGS()"
)


def _derivatives(task: Task, lower: Vector, upper: Vector, batch: Any, graph: bool) -> tuple[Vector, Tensor]:
    """Return the gradient and the dense Hessian `(n, n)`, differentiable where `graph` is set."""
    w = lower if graph else leaves(lower)
    _, gradient = task.value_and_gradient(w, upper, batch, create_graph=True, pinned=True)
    attached = {name: t for name, t in gradient.items() if t.requires_grad}
    n, first = size(w), next(iter(w.values()))

    def product(v: Tensor) -> list[Tensor]:
        u = unflatten(v, w)
        grads = torch.autograd.grad(
            list(attached.values()),
            list(w.values()),
            [u[name] for name in attached],
            create_graph=graph,
            retain_graph=True,
            allow_unused=True,
        )
        rows = [torch.zeros_like(x) if g is None else dense(g) for x, g in zip(w.values(), grads, strict=True)]
        return [torch.cat([row.reshape(-1) for row in rows])]

    units = torch.eye(n, dtype=first.dtype, device=first.device)
    if not attached:
        return detach(gradient), torch.zeros_like(units)
    with task.at(w, upper), torch.enable_grad():
        rows = [in_batches(product, [units[i : i + BLOCK]])[0] for i in range(0, n, BLOCK)]
    task.cost.products += n
    hessian = torch.cat(rows)
    return (gradient, hessian) if graph else (detach(gradient), hessian.detach())


def _check(task: Task, lower: Vector) -> None:
    n = size(lower)
    if n > LARGEST:
        raise InvalidValueError(
            f"`inner_solver` is inner.Newton, which forms the dense Hessian, and `params` hold {n:,} numbers: "
            f"{n * n * 8 / 1e9:.1f} GB and {n:,} products a step (at most {LARGEST:,} are taken); write "
            "inner_solver=bilevel.inner.LBFGS()"
        )
    check_fixed_loss(task, "inner.Newton", "inner_solver=bilevel.inner.Adam(lr=..., steps=...)")


def _check_curvature(hessian: Tensor, damping: float, t: int) -> None:
    """Raise unless the matrix is positive definite beyond rounding: other steps go to saddles, or anywhere."""
    factor, failed = torch.linalg.cholesky_ex(hessian)
    pivots = factor.diagonal() ** 2
    if not bool(failed) and float(pivots.min()) > len(hessian) * torch.finfo(hessian.dtype).eps * float(pivots.max()):
        return
    values = torch.linalg.eigvalsh(hessian) - damping
    low, high = float(values[0]), float(values[-1])
    kind = "negative" if low < -1e-10 * max(abs(low), abs(high)) else "no"
    raise InvalidValueError(
        f"inner.Newton met {kind} curvature at step {t}: the eigenvalues of the Hessian of `inner_loss` go from "
        f"{low:.1e} to {high:.1e}, damping {damping:g}; add a little regularization to `inner_loss`, write "
        f"inner.Newton(damping={max(2.0 * abs(low), 1e-6 * abs(high)):.1g}), start closer to the minimum, or write "
        "inner_solver=bilevel.inner.LBFGS()"
    )
