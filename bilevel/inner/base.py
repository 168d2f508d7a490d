"""What inner solvers take and return."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from bilevel.errors import InvalidValueError
from bilevel.layout import Variables
from bilevel.operators import Pairs
from bilevel.prox.piece import Piece
from bilevel.solvers.base import Linearization, Response
from bilevel.vector import Vector


@dataclass(frozen=True)
class InnerSolution:
    """The end of an inner solve.

    Attributes:
        value: the inner variables, without a graph.
        steps: iterations taken; 1 for a user's own loop.
        status: "converged", "steps" (a fixed number was asked for and taken), "max_steps" or "stalled".
        second_moment: mean square of the gradients met, where the solver keeps one (Adam, RMSProp); else None.
        pairs: what L-BFGS saw of the Hessian; None for others, and where it took no step.
        sensitivity: see `bilevel.solvers.Response`; None for solvers without steps of an optimizer.
        system: the inner problem to first order at `value`, where the solver knows it.
    """

    value: Vector
    steps: int
    status: str
    second_moment: Vector | None = None
    pairs: Pairs | None = None
    sensitivity: Callable[[Vector, Vector], Vector] | None = None
    system: Linearization | None = None


class Task(Response, Protocol):
    """The inner problem of one hypergradient, as inner solvers see it."""

    params: Variables
    data: Any
    """`inner_data` as the user gave it; None without."""
    deterministic: bool
    """Every batch is the same."""

    def draw(self) -> Any:
        """Return the next inner batch."""
        ...

    def epoch(self) -> int:
        """Return the number of batches in one pass over the inner data."""
        ...

    def value_and_gradient(
        self, lower: Vector, upper: Vector, batch: Any, *, create_graph: bool = False, pinned: bool = False
    ) -> tuple[Tensor, Vector]:
        """Return the inner loss and its gradient; buffers move, as they do in training.

        Args:
            lower: the inner variables.
            upper: the hyperparameters.
            batch: what `draw` returned.
            create_graph: make the gradient differentiable.
            pinned: draw the same random numbers (dropout) at every call, so that the loss is one function.
        """
        ...

    def hparams(self, upper: Vector) -> AbstractContextManager[Any]:
        """Lend the user's `hparams` with the tensors of `upper`."""
        ...

    def session(self) -> AbstractContextManager[None]:
        """Set torch up for two derivatives once, for all that runs inside."""
        ...

    def on(self, piece: Piece) -> Response:
        """Return the same problem with its residual along one smooth piece."""
        ...


Decay = Literal["gradient", "step"] | None
"""How a solver shrinks weights besides minimizing `inner_loss`: in the gradient (L2), in the step (decoupled), not."""


class InnerSolver(Protocol):
    """A way to minimize the inner loss: a frozen dataclass of settings with a `solve`.

    One that has differentiable steps also has `unroll_steps(task)`, `initial_state(lower)` and
    `step(task, lower, state, upper, t)`, and can be unrolled.

    What else a solver may declare, for estimators and for the checks of misuse:

    Attributes:
        decays_outside_loss: a `Decay`; its end is then no stationary point of `inner_loss`. Without it: None.
        penalties: those of `bilevel.prox` that it minimizes besides `inner_loss`, a tuple; the residual is then taken
            along the smooth piece on which its end lies. Without it: none.
        needs_fixed_loss: it needs one batch and no random numbers. Without it: False.
        step_size: the learning rate of plain gradient steps, where it is one number. Without it: None.
        whole_loop: its one step is the user's whole training loop. Without it: False.
        hidden_settings: a setting is a function of hyperparameters, and no derivative goes through it. Without it:
            False.
    """

    def solve(self, task: Task, lower: Vector, upper: Vector) -> InnerSolution:
        """Return the inner variables that training from `lower` ends at."""
        ...


def check_fixed_loss(task: Task, name: str, instead: str) -> None:
    """Raise for batches that differ from call to call.

    Args:
        task: the inner problem.
        name: of the solver.
        instead: what takes steps on minibatches, as a sentence goes on after "or".
    """
    if not task.deterministic:
        raise InvalidValueError(
            f"{name} needs one fixed inner loss, and `inner_data` gives another batch at every call; give one batch "
            f"(Tensors, or a Dataset, which is read whole), or {instead}"
        )
