"""The third split: its loss after every outer step, and the point where that was lowest."""

from __future__ import annotations

import math
from typing import Any

import optree
import torch
from torch import Tensor

from bilevel.errors import InvalidValueError, NonFiniteError
from bilevel.losses import scalar
from bilevel.point import Point
from bilevel.problem import BilevelProblem
from bilevel.randomness import fork_random
from bilevel.vector import Vector, detach


def measured(problem: BilevelProblem, lower: Vector, upper: Vector) -> float | None:
    """Return the test loss; over a stream the mean of its batches, by their rows. None without a third split.

    Nothing that a run depends on moves: random states, positions of streams, modules' buffers. Random numbers are the
    same at every call.

    Raises:
        NonFiniteError: it is NaN or infinite.
    """
    loss, batches = problem.test_loss, problem.test_batches
    if loss is None:
        return None
    total, rows = 0.0, 0
    with (
        torch.enable_grad(),  # a loss may take gradients of its own
        fork_random(next(iter(lower.values())).device),
        problem.params.bound(detach(lower), keep_buffers=False) as params,
        problem.hparams.layout.bound(detach(upper)) as hparams,
    ):
        torch.manual_seed(0)
        for batch in batches.once():
            given = (params, hparams, batch) if batches.given else (params, hparams)
            count = _rows(batch)
            total += count * float(scalar(loss, given, "test_loss").detach())
            rows += count
    if not rows:
        raise InvalidValueError("`test_data` has no batch; give an iterable that is not empty")
    if not math.isfinite(total):
        raise NonFiniteError(f"the test loss is {total}; look at `test_data` and `test_loss`", "test loss")
    return total / rows


def _rows(batch: Any) -> int:
    tensors = [leaf for leaf in optree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()]
    return int(tensors[0].shape[0]) if tensors else 1


class Best:
    """The accepted point with the lowest test loss; keeps none without `patience`.

    Attributes:
        patience: steps without a lower test loss after which a run ends.
        point: the point; None before the first.
        step: its outer step.
        loss: its test loss.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.point: Point | None = None
        self.step, self.loss = 0, math.inf

    def see(self, point: Point, step: int, loss: float | None) -> None:
        """Keep the point of a step where its test loss is lower than any before."""
        if self.patience is not None and loss is not None and loss < self.loss:
            self.point, self.step, self.loss = point, step, loss

    def status(self, step: int) -> str | None:
        """Return why the run ends after `step`; None where it goes on."""
        if self.patience is None or step - self.step < self.patience:
            return None
        return f"patience: the test loss {self.loss:.6g} of step {self.step} has not improved for {self.patience} steps"

    def state(self) -> dict[str, Any] | None:
        """Return all of it as plain values and tensors; None where nothing is kept."""
        return None if self.point is None else {"point": self.point.state(), "step": self.step, "loss": self.loss}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go back to where `state` was taken."""
        if state is not None:
            self.point, self.step, self.loss = Point.restored(state["point"]), state["step"], state["loss"]


def check_patience(problem: BilevelProblem, patience: Any) -> None:
    """Raise unless it is None, or a number of steps and there is a test loss to watch."""
    if patience is None:
        return
    if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
        raise InvalidValueError(f"`patience` is {patience!r}, expected a whole number of steps of at least 1, or None")
    if problem.test_loss is None:
        raise InvalidValueError(
            f"`patience` is {patience}, and the problem has no third split whose loss could be watched; write "
            "BilevelProblem(..., test_data=...), or test_loss=... where losses close over their data"
        )
