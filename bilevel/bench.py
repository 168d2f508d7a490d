"""Several methods under the same conditions, and the reference that they are held against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from bilevel.certificate import Hypergradient
from bilevel.choosing import settled
from bilevel.errors import BilevelError, UnseenHyperparameterError
from bilevel.evaluation import Evaluator, own_randomness
from bilevel.inner import LBFGS, InnerSolver
from bilevel.measure import milliseconds
from bilevel.problem import BilevelProblem
from bilevel.response import ProblemResponse
from bilevel.solvers import CG, Cholesky, Estimator, Implicit, Unroll, about
from bilevel.vector import Vector, size

DENSE_REFERENCE_UP_TO = 2000  # inner variables; above, conjugate gradients to the end of the digits
TIGHT = 1e-13  # relative residuals that the reference is solved to, where the digits allow it


class Bench:
    """One problem, its shared inner solution, and every run at the same batches and random numbers."""

    def __init__(self, problem: BilevelProblem, upper: Vector) -> None:
        self.problem, self.upper = problem, upper
        self.lower: Vector | None = None
        self.words = ""
        self.device: torch.device = next(iter(problem.params.start.values())).device
        self._position, self._buffers = problem.position(), problem.params.buffers()

    @contextmanager
    def same_conditions(self) -> Iterator[None]:
        """Begin where every run begins, and leave the user's data and buffers where they were."""
        self.problem.go_to(self._position)
        with own_randomness(self.problem, seed=0):
            try:
                yield
            finally:
                self.problem.params.set_buffers(self._buffers)
                self.problem.go_to(self._position)

    def train(self) -> None:
        """Run the inner solver once, for all methods that begin at its end."""
        problem = self.problem
        with self.same_conditions():
            problem.params.rewind()
            response = ProblemResponse(problem)
            found: list[Any] = []
            start = problem.params.start
            spent = milliseconds(lambda: found.append(response.solve_inner(start, self.upper)), self.device, repeats=1)
        self.lower, solver = found[0].value, type(problem.inner_solver).__name__
        self.words = (
            f"inner solve, shared by the methods that begin at its end and in none of their figures: {solver}, "
            f"{found[0].steps} steps, {response.cost.gradients} gradients, {spent / 1e3:.2g} s, {found[0].status}"
        )

    def run(self, method: Estimator, lower: Vector | None = None) -> Hypergradient:
        """Take one hypergradient; at the shared inner solution unless the method runs its own loop."""
        chosen, notes = settled(self.problem, method)
        given = None if about(chosen).begins == "start" else (self.lower if lower is None else lower)
        with self.same_conditions():
            return Evaluator(self.problem, chosen, notes=notes)(self.upper, given).hypergradient


def truth(bench: Bench) -> tuple[Vector, str]:
    """Return the hypergradient as exactly as it can be had, and how it was."""
    n = size(bench.problem.params.start)
    solver, words = (
        (Cholesky(), "dense Hessian") if n <= DENSE_REFERENCE_UP_TO else (CG(rtol=TIGHT), "CG to the last digit")
    )
    if bench.lower is None:
        bench.train()
    lower, trained = _trained_on(bench)
    try:
        found = bench.run(Implicit(solver), lower)
    except UnseenHyperparameterError:
        found = bench.run(Unroll())
        return found.gradient, "unroll, because only the inner loop uses a hyperparameter (a learning rate?)"
    residual = found.certificate.inner_residual
    return found.gradient, (
        f"implicit, {words}, at the inner solution {trained} (inner residual {residual:.0e}), verdict "
        f"{found.certificate.verdict}"
    )


def _trained_on(bench: Bench) -> tuple[Vector, str]:
    """Return the inner solution with the digits that are left in it, where its loss is one fixed smooth function."""
    problem, lower = bench.problem, bench.lower
    assert lower is not None
    if not problem.inner_batches.deterministic:
        return lower, "of the minibatch solver as it is"
    own: Any = problem.inner_solver
    fixed = getattr(own, "needs_fixed_loss", False) and hasattr(own, "rtol")
    solver: InnerSolver = replace(own, rtol=TIGHT) if fixed else LBFGS(rtol=TIGHT)
    try:
        with bench.same_conditions():
            end = ProblemResponse(problem, inner_solver=solver).solve_inner(lower, bench.upper)
    except BilevelError:
        return lower, "as it is"
    return end.value, f"trained on to the end of the digits ({end.steps} steps)"
