"""What `compare` holds every method against: the hypergradient as exactly as it can be had, or nothing.

Of one function, whatever minibatches a method draws:

1. The implicit hypergradient of the losses over all data (the mean over the batches of a pass), at an inner solution
   that is trained on to the end of the digits.
2. Where that is untrusted, or sees not all hyperparameters: the derivative of what the inner loop computes, by
   `unroll`, or by `zero-order` for a function of the user's, on the batches and random numbers that every method gets.
3. Where neither can be trusted: none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import optree
from torch import Tensor

from bilevel.bench import Bench
from bilevel.certificate import Hypergradient
from bilevel.data import Batches
from bilevel.errors import BilevelError, UnseenHyperparameterError
from bilevel.inner import LBFGS, InnerSolver, Proximal
from bilevel.measure import free_memory, saved_memory
from bilevel.problem import BilevelProblem
from bilevel.response import ProblemResponse
from bilevel.solvers import CG, Cholesky, Estimator, Implicit, Unroll, ZeroOrder
from bilevel.solvers.base import Linearization
from bilevel.solvers.zero_order import COORDINATES
from bilevel.vector import Vector, size

DENSE_UP_TO = 2000  # inner variables; above, conjugate gradients to the end of the digits
TIGHT = 1e-13  # relative residuals that the reference is solved to, where the digits allow it
MOST_BATCHES = 100  # of a pass, that are read into one loss
SHARE = 0.25  # of the free memory that the graph of this loss may take


@dataclass(frozen=True)
class Reference:
    """A gradient to hold others against, and what it is; None where there is none, and why."""

    gradient: Vector | None
    words: str


def best_reference(bench: Bench) -> Reference:
    """Return the most exact hypergradient that can be had of a problem."""
    found, words = _implicit(bench)
    if found is not None and found.certificate.trusted:
        return Reference(found.gradient, f"{words}, verdict {found.certificate.verdict}")
    for name, method in _of_the_loop(bench):
        try:
            run = bench.run(method)
        except BilevelError as error:
            words += f"; {name}: {error}"
            continue
        if run.certificate.verdict == "exact":
            same = "" if bench.problem.deterministic else ", on the batches that every method gets"
            return Reference(run.gradient, f"{name}{same}, good to {run.certificate.error:.0e}, because {words}")
    return Reference(None, f"none, so there are no errors: {words}; give `reference=`, a method or a gradient")


def _of_the_loop(bench: Bench) -> list[tuple[str, Estimator]]:
    """Return the methods that differentiate what the inner loop computes, exactly and within reason."""
    methods: list[tuple[str, Estimator]] = []
    if ProblemResponse(bench.problem).has_step:
        methods.append(("unroll", Unroll()))
    if getattr(bench.problem.inner_solver, "whole_loop", False) and size(bench.upper) <= COORDINATES:
        methods.append(("zero-order", ZeroOrder()))
    return methods


def _implicit(bench: Bench) -> tuple[Hypergradient | None, str]:
    """Return the implicit hypergradient over all data and what it is, or why there is none that can be trusted."""
    n = size(bench.problem.params.start)
    solver, by = (Cholesky(), "dense Hessian") if n <= DENSE_UP_TO else (CG(rtol=TIGHT), "CG to the last digit")
    try:
        bench.train()
        whole, data = _over_all_data(bench)
        if whole is None:
            return None, data
        lower, steps = _trained_on(whole, bench.problem.params.start if bench.lower is None else bench.lower)
        found = whole.run(Implicit(solver), lower)
    except UnseenHyperparameterError:
        return None, "only the inner loop uses a hyperparameter (a learning rate?)"
    except BilevelError as error:
        return None, f"there is no implicit hypergradient ({error})"
    residual = found.certificate.inner_residual
    at = f"at the inner solution{data} trained on to the end of the digits ({steps} steps, "
    at += f"inner residual {residual:.0e})"
    if found.certificate.trusted:
        return found, f"implicit, {by}, {at}"
    return found, f"the implicit hypergradient {at} is untrusted ({'; '.join(found.certificate.reasons)})"


def _over_all_data(bench: Bench) -> tuple[Bench | None, str]:
    """Return the same problem with all batches of a pass in one loss, and what to call it; or None, and why not."""
    problem = bench.problem
    if problem.deterministic:
        return bench, ""
    with bench.same_conditions():
        inner, outer = (b.collected(MOST_BATCHES) for b in (problem.inner_batches, problem.outer_batches))
        held = _graph_bytes(problem, bench.upper)
    if inner is None or outer is None:
        return None, f"the minibatches cannot be read into one loss (more than {MOST_BATCHES} of them, or an iterator)"
    free = free_memory(bench.device)
    if free is not None and len(inner) * held > SHARE * free:
        return None, f"the graph of the loss over all {len(inner)} minibatches would not fit into the memory"
    whole = copy.copy(problem)
    for side, batches in (("inner", inner), ("outer", outer)):
        reader: Batches = getattr(problem, f"{side}_batches")
        if not reader.deterministic:
            setattr(whole, f"{side}_loss", _mean(getattr(problem, f"{side}_loss"), batches))
            setattr(whole, f"{side}_batches", reader.fixed(batches))
    whole.pinned_batches = whole.inner_batches
    return Bench(whole, bench.upper, bench.seed), f" of all {len(inner)} + {len(outer)} minibatches"


def _mean(loss: Callable[..., Tensor], batches: list[Any]) -> Callable[..., Tensor]:
    """Return the mean of a loss over batches, each with the weight of its rows."""
    rows = [next((len(t) for t in optree.tree_leaves(b) if getattr(t, "ndim", 0)), 1) for b in batches]
    weights = [n / sum(rows) for n in rows]

    def mean(params: Any, hparams: Any, batches: list[Any]) -> Any:
        return sum(share * loss(params, hparams, batch) for share, batch in zip(weights, batches, strict=True))

    return mean


def _graph_bytes(problem: BilevelProblem, upper: Vector) -> int:
    """Return what the graph of the inner gradient of one batch holds."""
    with saved_memory() as saved:
        Linearization(ProblemResponse(problem), problem.params.start, upper)
    return sum(saved.storages.values())


def _trained_on(bench: Bench, lower: Vector) -> tuple[Vector, int]:
    """Return the inner solution with the digits that are left in it, and the steps that took."""
    own: Any = bench.problem.inner_solver
    penalties = getattr(own, "penalties", ())
    solver: InnerSolver
    if getattr(own, "needs_fixed_loss", False) and hasattr(own, "rtol"):
        solver = replace(own, rtol=TIGHT)
    else:
        solver = Proximal(list(penalties), rtol=TIGHT) if penalties else LBFGS(rtol=TIGHT)
    with bench.same_conditions():
        end = ProblemResponse(bench.problem, inner_solver=solver).solve_inner(lower, bench.upper)
    return end.value, end.steps
