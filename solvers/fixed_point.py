"""Fixed-point iteration on the adjoint of an inner step.

    w* = Φ(w*, λ)      u = (∂Φ/∂w)^T u + ∂f/∂w      dF/dλ = ∂f/∂λ + (∂Φ/∂λ)^T u

Grazzi, Franceschi, Pontil and Salzo, On the iteration complexity of hypergradient computation, ICML 2020, section
2.2. Φ is the step of the inner solver where it has one (see `bilevel.solvers.inner_map`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from bilevel.certificate import Certificate, Hypergradient, judge
from bilevel.solvers.about import About, Terms
from bilevel.solvers.base import Linearization, Response, State, add_terms, inner_scale, outer_gradient, ratio
from bilevel.solvers.inner_map import UNSEEN, StepMap, correction_of, step_map, without_step_sizes
from bilevel.solvers.linear.base import check_count, check_settings, default_rtol, dtype_of
from bilevel.vector import Vector, axpy, norm, subtract

GROWTH = 10.0  # an increment this many times the first one ends the iteration
MEMORY = 10  # steps over which the contraction is averaged; momentum makes single steps oscillate


@dataclass(frozen=True)
class FixedPoint:
    """Differentiate the inner optimum as the fixed point of an inner step.

    Each iteration costs one product and shrinks the error by the contraction of the step. With a momentum step it
    needs about the square root of the iterations that a plain gradient step needs.

    Args:
        max_steps: most iterations.
        rtol: stop when an iteration changes u by less than rtol |u|; None: 1e-8 in float64, 1e-5 in float32.
    """

    max_steps: int = 1000
    rtol: float | None = None
    about: ClassVar[About] = About(
        begins="solution",
        sees="step",
        derivatives=2,
        exact=True,
        terms=Terms("k products, k ~ log(1/rtol) / (1 - ρ)", "one step", "ρ^k", "Grazzi et al. 2020"),
    )

    def __post_init__(self) -> None:
        check_settings(self.rtol, self.max_steps)
        check_count(self.max_steps, "max_steps")

    def __call__(
        self, response: Response, lower: Vector, upper: Vector, state: State = None
    ) -> tuple[Hypergradient, State]:
        """Return the hypergradient at the inner solution `lower`; `state` is the last u."""
        outer = outer_gradient(response, lower, upper)
        system = Linearization(response, lower, upper)
        step = step_map(response, system, lower, upper)
        rhs = step.embed(outer.lower)
        rtol = default_rtol(self.rtol, dtype_of(lower))
        u, increments = _iterate(step, rhs, state, rtol, self.max_steps)
        through = without_step_sizes(step, system, u, upper)
        gradient = add_terms(response, outer.upper, through, upper, UNSEEN)
        shrink, spent = _contraction(increments), len(increments)
        correction = None
        if shrink < 1.0:
            correction = correction_of(response, outer, step, lower, upper, u, gradient, spent)
        error = None if correction is None else correction.error
        inner = ratio(float(norm(system.residual)), inner_scale(response, system, lower, upper))
        displacement = ratio(float(norm(step.residual)), float(norm(lower)))
        certificate = _certificate(inner, ratio(increments[-1], float(norm(u))), shrink, displacement, error)
        return Hypergradient(gradient, outer.loss, lower, certificate, response.cost), u


def _iterate(
    step: StepMap, rhs: Vector, start: Vector | None, rtol: float, max_steps: int
) -> tuple[Vector, list[float]]:
    """Return the u of the smallest increment, and the norms of all increments up to it; two where none was smaller."""
    u = rhs if start is None else start
    best, smallest, increments = u, 0, [math.inf]
    for _ in range(max_steps):
        after = axpy(1.0, step.pull(u), rhs)
        increment = float(norm(subtract(after, u)))
        if increment < increments[smallest]:
            best, smallest = after, len(increments)
        u = after
        increments.append(increment)
        if increment <= rtol * float(norm(u)) or not increment <= GROWTH * increments[1]:
            break
    return best, increments[1 : max(smallest, 2) + 1]


def _contraction(increments: list[float]) -> float:
    """Return the mean factor by which the last increments shrank; 0 for a single one."""
    recent = increments[-1 - MEMORY :]
    return ratio(recent[-1], recent[0]) ** (1.0 / (len(recent) - 1)) if len(recent) > 1 else 0.0


def _certificate(
    inner: float, increment: float, shrink: float, displacement: float, error: float | None
) -> Certificate:
    """Judge by the estimated error; an iteration that does not shrink has none."""
    if not shrink < 1.0:
        return Certificate("untrusted", inner, increment, reasons=(_GROWS,))
    hint = (
        f"the last iteration changed the adjoint by {increment:.1e} (raise `max_steps`) and one more inner step "
        f"changes the inner variables by {displacement:.1e} of their size (train the inner problem further)"
    )
    verdict, reasons = judge(error, [], by_design=False, hint=hint)
    return Certificate(verdict, inner, increment, error=error, reasons=tuple(reasons))


_GROWS = (
    "the iteration grows: the inner step is no contraction at this point (a learning rate that is too large, Adam's "
    'normalization at a standstill, or negative curvature); choose method="implicit", or SGD as the inner solver'
)
