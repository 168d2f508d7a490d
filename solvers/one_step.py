"""One step of differentiation at the inner solution: the inverse of the Hessian is left out.

    w* = Φ(w*, λ)      dF/dλ ≈ ∂f/∂λ + (∂Φ/∂λ)^T ∂f/∂w

Bolte, Pauwels and Vaiter, One-step differentiation of iterative algorithms, NeurIPS 2023, algorithm 3 and corollary 1:
the error is O(ρ) for a step that contracts by ρ, and none for a Newton step. With a gradient step it is Jacobian-free
backpropagation: Fung, Heaton, Li, McKenzie, Osher and Yin, JFB: Jacobian-free backpropagation for implicit networks,
AAAI 2022. Φ is the step of the inner solver where it has one (see `bilevel.solvers.inner_map`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bilevel.certificate import Certificate, Hypergradient, judge
from bilevel.solvers.about import About, Terms
from bilevel.solvers.base import Linearization, Response, State, add_terms, inner_scale, outer_gradient, ratio
from bilevel.solvers.correction import INNER_TOLERANCE, Correction
from bilevel.solvers.inner_map import UNSEEN, correction_of, step_map, without_step_sizes
from bilevel.vector import Vector, norm


@dataclass(frozen=True)
class OneStep:
    """Differentiate one inner step at the inner solution, for a step that contracts fast.

    Exact where the inner solver is `bilevel.inner.Newton`; else off by about the contraction of a step, which for a
    gradient step on an ill-conditioned problem is all of it. `FixedPoint` goes on where this stops. The hypergradient
    takes one product; the error estimate that its certificate rests on takes up to some dozens.
    """

    about: ClassVar[About] = About(
        begins="solution",
        sees="step",
        derivatives=2,
        exact=False,
        terms=Terms("1 product", "one step", "about ρ; none for a Newton step", "Bolte et al. 2023"),
    )

    def __call__(
        self, response: Response, lower: Vector, upper: Vector, state: State = None
    ) -> tuple[Hypergradient, State]:
        """Return the hypergradient at the inner solution `lower`; nothing is kept between calls."""
        outer = outer_gradient(response, lower, upper)
        system = Linearization(response, lower, upper)
        step = step_map(response, system, lower, upper)
        u = step.embed(outer.lower)
        gradient = add_terms(response, outer.upper, without_step_sizes(step, system, u, upper), upper, UNSEEN)
        correction = correction_of(response, outer, step, lower, upper, u, gradient, spent=1)
        inner = ratio(float(norm(system.residual)), inner_scale(response, system, lower, upper))
        return Hypergradient(gradient, outer.loss, lower, _certificate(inner, correction), response.cost), None


def _certificate(inner: float, correction: Correction | None) -> Certificate:
    """Judge by the estimated error; a step whose fixed point the correction does not find has none."""
    as_designed = correction is not None and correction.moved < INNER_TOLERANCE
    hint = (
        f"one step is all that this method takes, and the inner residual is {inner:.1e}; choose "
        'method="fixed-point" or "implicit", give an inner solver whose step contracts faster (bilevel.inner.Newton), '
        "or train the inner problem further"
    )
    error = None if correction is None else correction.error
    verdict, reasons = judge(error, [], by_design=as_designed, hint=hint)
    return Certificate(verdict, inner, error=error, reasons=tuple(reasons))
