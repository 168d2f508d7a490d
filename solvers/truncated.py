"""Backpropagation through the last K inner steps.

    a_T = ∂f/∂w_T,   a_{t-1} = A_t^T a_t,   dF/dλ = ∂f/∂λ + sum_{t > T-K} B_t^T a_t
    A_t = ∂Φ_t/∂(w, state),  B_t = ∂Φ_t/∂λ  of the inner step  (w_t, state_t) = Φ_t(w_{t-1}, state_{t-1}, λ)

Franceschi, Donini, Frasconi and Pontil, Forward and reverse gradient-based hyperparameter optimization, ICML 2017,
algorithm 1; Shaban, Cheng, Hatch and Boots, Truncated back-propagation for bilevel optimization, AISTATS 2019,
equation 4. The sweep goes step by step with an explicit adjoint, so each step's graph is freed as soon as it is used
and the size of what truncation leaves out is known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.certificate import Certificate, Hypergradient, judge
from bilevel.solvers.about import About, Sizes, Sweep, Terms
from bilevel.solvers.base import Response, State, add_terms, outer_gradient, ratio
from bilevel.solvers.coarse import PULLS, coarse_sweep, sampled
from bilevel.solvers.linear.base import check_count
from bilevel.solvers.recorded import (
    UNSEEN,
    Growth,
    RecordedStep,
    accumulate,
    check_end,
    exact_for_the_loop,
    filled,
    inner_residual,
    record,
    without_graph,
)
from bilevel.solvers.tail import ONWARD, Tail
from bilevel.vector import Vector, axpy, detach, leaves, norm, zeros_like


@dataclass(frozen=True)
class Truncated:
    """Backpropagate through the last `steps` inner steps.

    The error of leaving out earlier steps shrinks like (contraction of one step)^steps. Memory grows with
    `steps`, not with the length of the inner loop. Sees learning rates and every other setting of the inner loop.

    Args:
        steps: how many of the last inner steps; all of them where the loop is shorter.
    """

    steps: int
    about: ClassVar[About] = About(
        begins="start",
        sees="loop",
        derivatives=2,
        exact=False,
        terms=Terms("K + 50 products", "K + 8 steps", "about ρ^K", "Shaban et al. 2019"),
    )

    def __post_init__(self) -> None:
        check_count(self.steps, "steps")

    def sweep(self, steps: int, hyperparameters: int, sizes: Sizes | None = None) -> Sweep:
        """Return what a loop of so many steps takes."""
        window = min(self.steps, steps)
        looked_at = len(sampled(steps - window))
        return Sweep(
            products=window + looked_at * (PULLS + 1) + (ONWARD if looked_at else 0), graphs=window + looked_at
        )

    def __call__(
        self, response: Response, lower: Vector, upper: Vector, state: State = None
    ) -> tuple[Hypergradient, State]:
        """Run the inner loop from `lower` and differentiate its end; nothing is kept between calls."""
        return _differentiate(response, lower, upper, self.steps), None


def _differentiate(response: Response, lower: Vector, upper: Vector, window: int) -> Hypergradient:
    total = response.unroll_steps()
    window = min(window, total)
    h = leaves(upper)
    w, state = detach(lower), response.initial_state(lower)
    recorded: list[RecordedStep] = []
    samples: list[RecordedStep] = []
    looked_at = sampled(total - window)
    for t in range(total):
        if t >= total - window or t in looked_at:
            step, w, state = record(response, w, state, h, t)
            (samples if t in looked_at else recorded).append(step)
        else:
            w, state = without_graph(*response.step(w, state, detach(upper), t))
    check_end(w)
    outer = outer_gradient(response, w, upper)
    growth = Growth(outer.lower.values())
    through, left_out = _sweep(response, recorded, samples, outer.lower, h, total - window, growth)
    gradient = add_terms(response, outer.upper, through, upper, UNSEEN)
    certificate = (
        exact_for_the_loop(response, w, upper, growth.factor())
        if left_out is None
        else _certificate(response, w, upper, gradient, left_out)
    )
    return Hypergradient(gradient, outer.loss, w, certificate, response.cost)


def _sweep(
    response: Response,
    recorded: list[RecordedStep],
    samples: list[RecordedStep],
    outer: Vector,
    h: Vector,
    left_out: int,
    growth: Growth,
) -> tuple[dict[str, Tensor | None], _LeftOut | None]:
    """Pull the adjoint back through the recorded steps, freeing each; `growth` sees it.

    Returns:
        The gradient through the inner variables; what the `left_out` steps before would add, None where there are none.
    """
    adjoint = [*outer.values(), *(torch.zeros_like(x) for x in recorded[-1].outputs[len(outer) :])]
    through: dict[str, Tensor | None] = dict.fromkeys(h)
    tail = Tail()
    while recorded:
        step = recorded.pop()
        adjoint, added = step.pull(response, adjoint, h, keep=left_out > 0 and not recorded)
        accumulate(through, added)
        growth.see(adjoint[: len(outer)])
        if left_out:
            tail.add(adjoint, filled(added, h))
    if not left_out:
        return through, None
    seen, coarse = coarse_sweep(response, samples, step, adjoint, h, left_out)
    found = _left_out(response, step, adjoint, h, tail, left_out)
    return through, replace(found, seen=detach(seen), size=max(found.size, coarse))


@dataclass
class _LeftOut:
    """What truncation leaves out.

    Attributes:
        value: the sum, as the window foretells it.
        seen: the sum, as a few of the steps left out tell it.
        size: of the larger.
        grows: adjoints grow towards earlier steps.
    """

    value: Vector
    seen: Vector
    size: float
    grows: bool


def _left_out(
    response: Response, step: RecordedStep, adjoint: list[Tensor], h: Vector, tail: Tail, left_out: int
) -> _LeftOut:
    """Go on from the earliest recorded step, whose graph is still there, as if those before were like it."""
    total = zeros_like(h)
    onward = min(left_out, ONWARD)
    for _ in range(onward):
        adjoint, added = step.pull(response, adjoint, h, keep=True)
        tail.add(adjoint, filled(added, h))
        total = axpy(1.0, tail.contributions[-1], total)
    beyond, size = tail.beyond(left_out - onward)
    return _LeftOut(detach(axpy(1.0, beyond, total)), zeros_like(h), float(norm(total)) + size, tail.grows())


def _certificate(response: Response, lower: Vector, upper: Vector, gradient: Vector, left_out: _LeftOut) -> Certificate:
    """Judge by the size of what truncation left out (see `bilevel.solvers.tail` and `bilevel.solvers.coarse`)."""
    inner = inner_residual(response, lower, upper)
    # Either may have the whole gradient too large.
    whole = min(float(norm(axpy(1.0, part, gradient))) for part in (left_out.value, left_out.seen))
    size = max(whole, response.gradient_floor)
    error = ratio(left_out.size, size)
    wrong = [_GROWS] if left_out.grows else []
    verdict, reasons = judge(error, wrong, by_design=True, hint='raise `steps`, or choose method="unroll"')
    if verdict == "exact":
        verdict = "approximate"  # what was left out is extrapolated, never measured
    return Certificate(verdict, inner, error=error, reasons=tuple(reasons))


_GROWS = (
    "the adjoint grows towards earlier steps, so the steps left out matter more than those kept: lower the inner "
    'learning rate, or choose method="unroll"'
)
