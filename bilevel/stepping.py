"""The steps of the inner solver as one hypergradient sees them, and how to take one again as it was."""

from __future__ import annotations

from typing import Any

from torch import device

from bilevel.errors import InvalidValueError
from bilevel.inner import InnerSolver
from bilevel.problem import BilevelProblem
from bilevel.prox import Penalty
from bilevel.randomness import get_random, set_random
from bilevel.vector import Vector


class Stepping:
    """The part of `bilevel.solvers.Response` that runs the inner solver step by step."""

    penalties: dict[str, Penalty]
    _problem: BilevelProblem
    _solver: InnerSolver
    _device: device

    @property
    def has_step(self) -> bool:
        """See `Response.has_step`."""
        return hasattr(self._solver, "step")

    def _stepper(self) -> Any:
        solver: Any = self._solver
        steps = "ProximalGradient(penalty, lr=..., steps=...)" if self.penalties else "SGD(lr=..., steps=...)"
        if not self.has_step:
            raise InvalidValueError(
                f"unrolling differentiates through the steps of the inner solver, and {type(solver).__name__} has none "
                f'that can be; write inner_solver=bilevel.inner.{steps}, or choose method="implicit"'
            )
        return solver

    def unroll_steps(self) -> int:
        """See `Response.unroll_steps`."""
        return int(self._stepper().unroll_steps(self))

    def initial_state(self, lower: Vector) -> Any:
        """See `Response.initial_state`."""
        return self._stepper().initial_state(lower)

    def step(self, lower: Vector, state: Any, upper: Vector, t: int) -> tuple[Vector, Any]:
        """See `Response.step`."""
        after: tuple[Vector, Any] = self._stepper().step(self, lower, state, upper, t)
        return after

    def mark(self) -> dict[str, Any]:
        """See `Response.mark`: the stream's position, torch's random numbers, BatchNorm's statistics."""
        return {
            "position": self._problem.inner_batches.position(),
            "random": get_random(self._device),
            "buffers": self._problem.params.buffers(),
        }

    def go_back(self, mark: dict[str, Any]) -> None:
        """See `Response.go_back`."""
        self._problem.inner_batches.check_repeats()
        self._problem.inner_batches.go_to(mark["position"])
        self._problem.params.set_buffers(mark["buffers"])
        set_random(mark["random"])
