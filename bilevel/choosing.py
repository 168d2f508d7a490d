"""Measure what `method="auto"` needs to know about a problem, and settle on a method."""

from __future__ import annotations

import torch

from bilevel.errors import NotTwiceDifferentiableError
from bilevel.measure import free_memory, saved_memory
from bilevel.problem import BilevelProblem
from bilevel.randomness import fork_random
from bilevel.response import ProblemResponse
from bilevel.solvers import Estimator, estimator
from bilevel.solvers.auto import Auto, Facts, choose
from bilevel.solvers.base import Linearization, outer_gradient
from bilevel.solvers.linear.lanczos import extreme_eigenvalues
from bilevel.vector import size
from bilevel.walk import walk

LANCZOS_STEPS = 12  # for the condition: twelve products


def settled(problem: BilevelProblem, method: str | Estimator) -> tuple[Estimator, tuple[str, ...]]:
    """Return the estimator of a name, or for `Auto` the one that it chooses, with a note of the choice."""
    named = estimator(method)
    if not isinstance(named, Auto):
        return named, ()
    choice = choose(measured(problem))
    return choice.estimator, (str(choice),)


def measured(problem: BilevelProblem) -> Facts:
    """Look at a problem where it starts; data streams, buffers and random states stay as they are."""
    position, buffers = problem.position(), problem.params.buffers()
    with fork_random(next(iter(problem.params.start.values())).device):
        torch.manual_seed(0)
        try:
            return _measured(problem)
        finally:
            problem.params.set_buffers(buffers)
            problem.go_to(position)


def _measured(problem: BilevelProblem) -> Facts:
    lower, upper = problem.params.start, problem.hparams.layout.start
    first, solver = next(iter(lower.values())), problem.inner_solver
    response = ProblemResponse(problem)
    outer = outer_gradient(response, lower, upper)
    seen = {name for name, g in outer.upper.items() if g is not None}
    twice, condition, graph = "", None, 0
    try:
        with saved_memory() as saved:
            system = Linearization(response, lower, upper)
        graph = sum(saved.storages.values())
        seen |= {name for name, g in system.pull_back(outer.lower).items() if g is not None}
        condition = _condition(system)
    except NotTwiceDifferentiableError as error:
        twice = f"the inner loss has no second derivative ({error})"
    refuses = getattr(solver, "needs_fixed_loss", False)
    own_loop = getattr(solver, "whole_loop", False) or getattr(solver, "hidden_settings", False)
    steps = step_bytes = None
    if response.has_step and not own_loop and not twice:
        taken = walk(response, lower, upper, outer.lower)
        steps, step_bytes = taken.total, taken.bytes_per_step
    return Facts(
        inner=size(lower),
        outer=size(upper),
        hidden=() if twice else tuple(response.label(name) for name in upper if name not in seen),
        twice=twice,
        fixed=problem.deterministic,
        steps=steps,
        own_loop=own_loop,
        trains=problem.inner_batches.deterministic or not refuses or bool(getattr(solver, "penalties", ())),
        decays=getattr(solver, "decays_outside_loss", None) is not None,
        step_bytes=step_bytes or 0,
        graph_bytes=graph,
        number_bytes=first.element_size(),
        free_bytes=free_memory(first.device),
        condition=condition,
    )


def _condition(system: Linearization) -> float | None:
    low, high = extreme_eigenvalues(system.operator, steps=min(LANCZOS_STEPS, size(system.residual)))
    return high / low if low > 0.0 else None
