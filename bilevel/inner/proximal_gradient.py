"""A fixed number of proximal gradient steps, differentiable: ISTA, and FISTA with momentum.

    w_{t+1} = prox_{lr ψ}(y_t - lr ∇g(y_t))      y_t = w_t + β_t (w_t - w_{t-1})

Beck and Teboulle, A fast iterative shrinkage-thresholding algorithm, SIAM J. Imaging Sciences 2 (2009). Reverse mode
through the steps: Bertrand and others, Implicit differentiation for fast hyperparameter selection in non-smooth convex
learning, JMLR 23 (2022), section 3.1; its limit is the derivative of the solution. The momentum is in y, not in a
buffer of gradients as in torch.optim.SGD: a prox after such a buffer would stand still at the solution of another
problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bilevel.errors import InvalidTypeError
from bilevel.inner.base import Task
from bilevel.inner.stepwise import Setting, Stepwise
from bilevel.prox.base import Penalty, as_penalties, assign
from bilevel.vector import Vector


@dataclass(frozen=True)
class ProximalGradient(Stepwise):
    """Proximal gradient steps on `inner_loss` plus a penalty with kinks.

    Args:
        penalty: one of `bilevel.prox`, or a list of them for different tensors (`on=`).
        lr: step length, below 1 / the largest curvature of `inner_loss`; a number, `lambda h: ...` or
            `lambda h, step: ...`.
        momentum: β; as `lr`. None: FISTA's t / (t + 3). 0.0 for minibatches.
        steps: number of steps; or
        epochs: number of passes over `inner_data`.
    """

    penalty: Penalty | Sequence[Penalty]
    lr: Setting
    momentum: Setting | None = None

    def __post_init__(self) -> None:
        as_penalties(self.penalty, "inner.ProximalGradient")
        super().__post_init__()

    @classmethod
    def tunable(cls) -> tuple[str, ...]:
        """The settings of a step."""
        return ("lr", "momentum")

    @property
    def penalties(self) -> tuple[Penalty, ...]:
        """See `InnerSolver`."""
        return as_penalties(self.penalty, "inner.ProximalGradient")

    def initial_state(self, lower: Vector) -> Vector:
        """Return the variables before the first step."""
        return dict(lower)

    def step(self, task: Task, lower: Vector, state: Vector, upper: Vector, t: int) -> tuple[Vector, Vector]:
        """See `Stepwise.step`; the gradient is taken ahead of where the variables are."""
        graph = any(x.requires_grad for x in lower.values())
        with torch.set_grad_enabled(graph):
            with task.hparams(upper) as hparams:
                now = self.settings(hparams, t)
            ahead = t / (t + 3.0) if now["momentum"] is None else now["momentum"]
            y = {n: w + _of(ahead, n) * (w - state[n]) for n, w in lower.items()}
        _, gradient = task.value_and_gradient(y, upper, task.draw(), create_graph=graph)
        with torch.set_grad_enabled(graph), task.hparams(upper) as hparams:
            after = {n: y[n] - _of(now["lr"], n) * g for n, g in gradient.items()}
            for name, penalty in assign(self.penalties, task.params).items():
                after[name] = penalty.prox(after[name], _of(now["lr"], name), hparams)
        return after, lower

    def update(self, lower: Vector, gradient: Vector, state: Any, t: int, now: dict[str, Any]) -> tuple[Vector, Any]:
        """Not called: a step takes its gradient elsewhere than at `lower`."""
        raise InvalidTypeError(
            "inner.ProximalGradient takes its gradient elsewhere than where it is, so its steps have no scaling to "
            'differentiate; choose method="implicit"'
        )


def _of(setting: Any, name: str) -> Any:
    return setting[name] if isinstance(setting, dict) else setting
