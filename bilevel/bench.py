"""Several methods under the same conditions: one inner solution, the same batches, the same random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bilevel.certificate import Hypergradient
from bilevel.choosing import settled
from bilevel.errors import BilevelError
from bilevel.evaluation import Evaluator, own_randomness
from bilevel.measure import milliseconds
from bilevel.problem import BilevelProblem
from bilevel.response import ProblemResponse
from bilevel.solvers import Estimator, about
from bilevel.vector import Vector


class Bench:
    """One problem, its shared inner solution, and every run at the same batches and random numbers.

    Attributes:
        lower: the shared inner solution; None before `train`, and where the inner solver refuses the problem.
        words: what training took, or why there was none.
    """

    def __init__(self, problem: BilevelProblem, upper: Vector, seed: int = 0) -> None:
        self.problem, self.upper, self.seed = problem, upper, seed
        self.lower: Vector | None = None
        self.words = ""
        self.device: torch.device = next(iter(problem.params.start.values())).device
        self._refusal: BilevelError | None = None
        self._position, self._buffers = problem.position(), problem.params.buffers()

    @contextmanager
    def same_conditions(self) -> Iterator[None]:
        """Begin where every run begins, and leave the user's data and buffers where they were."""
        self.problem.go_to(self._position)
        with own_randomness(self.problem, self.seed):
            try:
                yield
            finally:
                self.problem.params.set_buffers(self._buffers)
                self.problem.go_to(self._position)

    def train(self) -> None:
        """Run the inner solver once, for all methods that begin at its end."""
        problem = self.problem
        solver = type(problem.inner_solver).__name__
        if self.lower is not None or self._refusal is not None:
            return
        try:
            with self.same_conditions():
                problem.params.rewind()
                response = ProblemResponse(problem)
                found: list[Any] = []
                start = problem.params.start
                run = lambda: found.append(response.solve_inner(start, self.upper))  # noqa: E731
                spent = milliseconds(run, self.device, repeats=1)
        except BilevelError as error:
            self._refusal = error
            return
        self.lower = found[0].value
        self.words = (
            f"inner solve, shared by the methods that begin at its end and in none of their figures: {solver}, "
            f"{found[0].steps} steps, {response.cost.gradients} gradients, {spent / 1e3:.2g} s, {found[0].status}"
        )

    def run(self, method: Estimator, lower: Vector | None = None) -> Hypergradient:
        """Take one hypergradient; at the shared inner solution unless the method runs its own loop.

        Raises:
            BilevelError: the method refuses the problem, or its inner solver does.
        """
        chosen, notes = settled(self.problem, method)
        given = None
        if about(chosen).begins == "solution":
            self.train()
            if self._refusal is not None and lower is None:
                raise self._refusal
            given = self.lower if lower is None else lower
        with self.same_conditions():
            return Evaluator(self.problem, chosen, notes=notes)(self.upper, given).hypergradient
