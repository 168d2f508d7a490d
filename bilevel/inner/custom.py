"""The user's own training loop as an inner solver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from bilevel.errors import InvalidTypeError, noting
from bilevel.inner.base import InnerSolution, Task
from bilevel.modules import ModuleVariables
from bilevel.prox.base import Penalty, as_penalties
from bilevel.vector import Vector, detach


@dataclass(frozen=True)
class Custom:
    """Call `fit(params, hparams)`, or `fit(params, hparams, data)` where `inner_data` is given.

    It gets copies: tensors to start from, or a working copy of the module that it may train in place and return (or
    return nothing). Where it returns tensors with a graph to `hparams`, it can be unrolled, as one step.

    Args:
        fit: the user's function.
        penalty: what it minimizes besides `inner_loss`, of `bilevel.prox` (scikit-learn's Lasso: `prox.L1`); None:
            nothing.
        name: the argument that it came in by, for messages.
    """

    fit: Callable[..., Any]
    penalty: Penalty | Sequence[Penalty] | None = None
    name: str = "inner_solver"
    whole_loop: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not callable(self.fit):
            raise InvalidTypeError(
                f"`{self.name}` is a {type(self.fit).__name__}, expected None, a solver of bilevel.inner "
                "(inner.SGD(lr=0.1, steps=100)), or a function fit(params, hparams) -> params"
            )
        if self.penalty is not None:
            as_penalties(self.penalty, "inner.Custom")

    @property
    def penalties(self) -> tuple[Penalty, ...]:
        """See `InnerSolver`."""
        return () if self.penalty is None else as_penalties(self.penalty, "inner.Custom")

    def solve(self, task: Task, lower: Vector, upper: Vector) -> InnerSolution:
        """See `InnerSolver.solve`."""
        value = detach(self._call(task, lower, detach(upper)))
        return InnerSolution({name: t.clone() for name, t in value.items()}, 1, "steps")

    def unroll_steps(self, task: Task) -> int:
        """The whole loop is one step."""
        return 1

    def initial_state(self, lower: Vector) -> dict[str, Any]:
        """No state."""
        return {}

    def step(self, task: Task, lower: Vector, state: Any, upper: Vector, t: int) -> tuple[Vector, Any]:
        """Run the whole loop; the result has a graph where the user's function keeps one."""
        return self._call(task, lower, upper), state

    def _call(self, task: Task, lower: Vector, upper: Vector) -> Vector:
        params = task.params.export(lower)
        with torch.enable_grad(), task.hparams(upper) as hparams:
            given = (params, hparams) if task.data is None else (params, hparams, task.data)
            with noting(self.name, ", ".join(("params", "hparams", "data")[: len(given)]), hparams):
                returned = self.fit(*given)
        if returned is None and isinstance(task.params, ModuleVariables):
            returned = params
        if returned is None:
            raise InvalidTypeError(
                f"`{self.name}` returned None, expected the trained params in the structure that `params` has; add a "
                "return statement (nothing need be returned only where `params` is a module that is trained in place)"
            )
        return task.params.read(returned, f"what `{self.name}` returned")


def fit(loop: Callable[..., Any], penalty: Penalty | Sequence[Penalty] | None = None) -> Custom:
    """Make an inner solver of a training loop of your own; `inner_solver=loop` is the same without a penalty.

    Args:
        loop: `(params, hparams) -> params`, or `(params, hparams, data)` where `inner_data` is given; see `Custom`.
            Inside it Lightning's `Trainer.fit` or HuggingFace's `Trainer.train` may train the module.
        penalty: see `Custom`.

    >>> import torch, bilevel
    >>> problem = bilevel.BilevelProblem(
    ...     lambda w, h: ((w - 1) ** 2 + h * w**2).sum(), lambda w, h: (w**2).sum(),
    ...     params=torch.zeros(1, dtype=torch.float64), hparams=bilevel.positive(1.0),
    ...     inner_solver=bilevel.inner.fit(lambda w, h: 1 / (1 + h) + 0 * w))
    >>> bilevel.hypergradient(problem).gradient  # d/dh (1 + h)^-2 = -2 (1 + h)^-3
    tensor(-0.2500, dtype=torch.float64)
    """
    return Custom(loop, penalty)
