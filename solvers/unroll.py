"""Backpropagation through the whole inner loop, within a budget of memory.

    a_T = ∂f/∂w_T,   a_{t-1} = A_t^T a_t,   dF/dλ = ∂f/∂λ + sum_t B_t^T a_t
    A_t = ∂Φ_t/∂(w, state),  B_t = ∂Φ_t/∂λ  of the inner step  (w_t, state_t) = Φ_t(w_{t-1}, state_{t-1}, λ)

Franceschi, Donini, Frasconi and Pontil, Forward and reverse gradient-based hyperparameter optimization, ICML 2017,
algorithm 1. The sweep goes step by step with an explicit adjoint, and frees each graph as it is used. Where not all
graphs fit, some starts of steps are held and the steps taken again from there (`bilevel.solvers.schedule`), with the
same batches, random numbers and buffers. The first two steps are recorded to see what a graph takes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.certificate import Certificate, Hypergradient
from bilevel.errors import InvalidValueError
from bilevel.measure import free_memory, saved_memory
from bilevel.memory import parsed, shown, taken
from bilevel.solvers.about import About, Sizes, Sweep, Terms
from bilevel.solvers.base import OuterGradient, Response, State, add_terms, outer_gradient, ratio
from bilevel.solvers.recorded import (
    UNSEEN,
    Growth,
    RecordedStep,
    accumulate,
    check_end,
    exact_for_the_loop,
    fixed_bytes,
    record,
    without_graph,
)
from bilevel.solvers.schedule import Schedule, fitting
from bilevel.vector import Vector, detach, leaves, max_abs, subtract

STRAY = 1e-2  # of what steps move, beyond rounding; another batch or another mask changes a step by far more
MEASURED = 2  # steps; what the second one's graph holds beyond the first one's is what each further one holds


@dataclass(frozen=True)
class Unroll:
    """Backpropagate through the whole inner loop: the exact hypergradient of what the loop computes.

    Sees learning rates and every other setting of the inner loop. Within a budget the gradient is the same, and some
    steps are taken again: all but one block once more where about √T graphs and √T iterates fit, which takes up to half
    as long again, and more often below. The certificate says which. The error is that of rounding times the growth of
    the adjoint: a loop that amplifies rounding until it decides, one that diverges or is chaotic, is untrusted.

    Args:
        memory: "500MB", or bytes: what the sweep may take beside the losses' own data. Less is slower. None: half of
            the memory that is free. A loop of two steps or less is held whole.
    """

    memory: str | int | None = None
    about: ClassVar[About] = About(
        begins="start",
        sees="loop",
        derivatives=2,
        exact=True,
        terms=Terms(
            "T products", "T steps, or `memory`", "rounding; it is the loop's own gradient", "Franceschi et al. 2017"
        ),
    )

    def __post_init__(self) -> None:
        if self.memory is not None:
            parsed(self.memory, "memory")

    def sweep(self, steps: int, hyperparameters: int, sizes: Sizes | None = None) -> Sweep:
        """Return what a loop of so many steps takes; every graph at once where their sizes are not known."""
        if sizes is None or steps <= MEASURED:
            return Sweep(products=steps, graphs=steps)
        plan = self._plan(steps, sizes)
        again = plan.again + MEASURED if plan.blocks > 1 else 0
        return Sweep(products=steps, graphs=plan.block, states=plan.slots, again=again)

    def __call__(
        self, response: Response, lower: Vector, upper: Vector, state: State = None
    ) -> tuple[Hypergradient, State]:
        """Run the inner loop from `lower` and differentiate its end; nothing is kept between calls."""
        loop = _Loop(response, lower, upper)
        plan, notes = Schedule(loop.total, loop.total), list[str]()
        if loop.total > MEASURED:
            sizes = loop.measure()
            plan = self._plan(loop.total, sizes)
            if plan.blocks > 1:  # whatever the outer loss takes is taken beside all that is held
                sizes = replace(sizes, fixed=max(sizes.fixed, loop.measure_outer()))
                plan = self._plan(loop.total, sizes)
            if plan.blocks > 1 or self.memory is not None:
                notes.append(_note(plan, sizes, self._allowed(sizes)))
        outer, through = loop.sweep(plan)
        gradient = add_terms(response, outer.upper, through, upper, UNSEEN)
        certificate = replace(loop.certificate(), notes=tuple(notes))
        if loop.astray > STRAY:
            reason = _ASTRAY.format(loop.astray)
            certificate = replace(certificate, verdict="untrusted", error=None, reasons=(reason,))
        return Hypergradient(gradient, outer.loss, loop.lower, certificate, response.cost), None

    def _allowed(self, sizes: Sizes) -> int | None:
        return sizes.free if self.memory is None else parsed(self.memory, "memory")

    def _plan(self, steps: int, sizes: Sizes) -> Schedule:
        """Return the fastest schedule within the budget; raise where there is none."""
        allowed = self._allowed(sizes)
        if allowed is None:
            return Schedule(steps, steps)
        plan = fitting(steps, allowed - sizes.fixed, sizes.graph, sizes.state)
        if plan is not None:
            return plan
        least = sizes.fixed + sizes.graph + sizes.state
        given = "half of the free memory" if self.memory is None else f"`memory` is {self.memory!r}:"
        raise InvalidValueError(
            f"{given} {shown(allowed)} for a loop of {steps} steps, expected {shown(least)} at least: "
            f"{shown(sizes.graph)} for the graph of one step, {shown(sizes.state)} for a state to take it from, and "
            f"{shown(sizes.fixed)} for derivatives; write Unroll(memory={least}) or more (less is slower), make "
            "batches smaller, or choose bilevel.Truncated(steps=...)"
        )


_ASTRAY = (
    "inner steps that were taken again came out otherwise, by {:.1e} of what they move: a loss or its data draw random "
    "numbers that are not torch's (NumPy, Python) or count their calls; use torch's, or give Unroll(memory=...) room "
    "for every graph"
)


def _note(plan: Schedule, sizes: Sizes, allowed: int | None) -> str:
    predicted = sizes.fixed + plan.block * sizes.graph + plan.slots * sizes.state
    if plan.blocks == 1:
        how = f"the graphs of all {plan.total} steps were held"
    else:
        how = (
            f"the graphs of {plan.block} of {plan.total} steps and {plan.slots} iterates were held at once, and "
            f"{plan.again} steps taken again"
        )
    return f"{how}: {shown(predicted)} predicted of {shown(allowed or 0)} allowed"


@dataclass(frozen=True)
class _Point:
    """The start of a step: all that it takes to take it again."""

    t: int
    lower: Vector
    state: Any
    mark: Any


class _Loop:
    """The inner loop and where it is.

    Attributes:
        total: its steps.
        t, lower, state: the next step, and what it starts from.
        astray: how far steps came out elsewhere when they were taken again, relative to how far they go.
    """

    def __init__(self, response: Response, lower: Vector, upper: Vector) -> None:
        self.total = response.unroll_steps()
        self.t, self.lower, self.state = 0, detach(lower), response.initial_state(lower)
        self.astray = 0.0
        self._response, self._upper, self._h = response, detach(upper), leaves(upper)
        self._graphs: list[RecordedStep] = []
        self._start = self._point()
        self._adjoint: list[Tensor] = []
        self._through: dict[str, Tensor | None] = dict.fromkeys(upper)

    def measure(self) -> Sizes:
        """Record the first steps, and return what they take."""
        seen = []
        for _ in range(MEASURED):
            with saved_memory() as saved:
                self._record()
            for tensor in self._graphs[-1].outputs:
                saved.add(tensor)
            seen.append(saved)
        graph = seen[1].beyond(seen[0])
        adjoint = taken(self._graphs[-1].outputs)
        point = self._point()
        device = next(iter(self.lower.values())).device
        free = free_memory(device)
        return Sizes(
            graph=graph,
            state=taken((point.lower, point.state, point.mark)),
            fixed=fixed_bytes(adjoint, taken(self._upper), graph),
            free=None if free is None else free // 2,
        )

    def measure_outer(self) -> int:
        """Return what the outer loss takes beside its data, with its derivative and the adjoint."""
        seen, held = [], []
        for _ in range(2):  # its data, and the whole of which they may be a part, are in both graphs
            with saved_memory() as saved:
                held.append(self._response.loss(leaves(self.lower), leaves(self._upper)))
            seen.append(saved)
        return 2 * seen[1].beyond(seen[0]) + taken(self._graphs[-1].outputs) + taken(held)

    def sweep(self, plan: Schedule) -> tuple[OuterGradient, dict[str, Tensor | None]]:
        """Go to the end and back; return the outer gradient there, and that through the inner variables."""
        if plan.blocks == 1:
            return self._straight()
        self._graphs.clear()
        self._return(self._start)
        held: list[_Point] = []
        expected = self.lower
        outer: OuterGradient | None = None
        end: _Point | None = None
        for action, t in plan.actions():
            if action == "hold":
                held.append(self._point())
            elif action == "advance":
                self._advance(t)
            elif action == "return":
                self._return(held[-1])
            else:
                if held[-1].t == self.t:
                    held.pop()
                start = self.lower
                while self.t < t:
                    self._record()
                if outer is None:
                    outer, end = self._turn(), self._point()
                else:
                    self.astray = max(self.astray, _apart(self.lower, expected, start))
                self._pull()
                expected = start
        assert outer is not None and end is not None
        self._return(end)
        return outer, self._through

    def _straight(self) -> tuple[OuterGradient, dict[str, Tensor | None]]:
        while self.t < self.total:
            self._record()
        outer = self._turn()
        self._pull()
        return outer, self._through

    def _record(self) -> None:
        step, self.lower, self.state = record(self._response, self.lower, self.state, self._h, self.t)
        self._graphs.append(step)
        self.t += 1

    def _advance(self, to: int) -> None:
        while self.t < to:
            after = self._response.step(self.lower, self.state, self._upper, self.t)
            self.lower, self.state = without_graph(*after)
            self.t += 1

    def _point(self) -> _Point:
        return _Point(self.t, self.lower, self.state, self._response.mark())

    def _return(self, point: _Point) -> None:
        self.t, self.lower, self.state = point.t, point.lower, point.state
        self._response.go_back(point.mark)

    def _turn(self) -> OuterGradient:
        """Differentiate the outer loss at the end of the loop."""
        check_end(self.lower)
        outer = outer_gradient(self._response, self.lower, self._upper)
        of_state = self._graphs[-1].outputs[len(outer.lower) :]
        self._adjoint = [*outer.lower.values(), *(torch.zeros_like(x) for x in of_state)]
        self._growth = Growth(outer.lower.values())
        return outer

    def _pull(self) -> None:
        """Pull the adjoint back through the graphs that are held, freeing each."""
        while self._graphs:
            step = self._graphs.pop()
            self._adjoint, added = step.pull(self._response, self._adjoint, self._h, keep=False)
            self._growth.see(self._adjoint[: len(self.lower)])
            accumulate(self._through, added)

    def certificate(self) -> Certificate:
        """Judge the sweep by how its adjoint grew."""
        return exact_for_the_loop(self._response, self.lower, self._upper, self._growth.factor())


def _apart(found: Vector, expected: Vector, start: Vector) -> float:
    """Return how far two ends are apart beyond rounding, relative to the way there."""
    rounding = 1e3 * torch.finfo(next(iter(found.values())).dtype).eps * float(max_abs(found))
    return ratio(max(0.0, float(max_abs(subtract(found, expected))) - rounding), float(max_abs(subtract(found, start))))
