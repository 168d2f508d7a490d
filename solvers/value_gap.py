"""The frame of penalties of the value function whose inner variables move along with the hyperparameters.

    q(λ, y) = g(λ, y) - g(λ, z)                z ≈ argmin_y g(λ, y), held still where q is differentiated
    D_y = ∂f/∂y + γ ∂g/∂y                      at y, which settles at argmin_y f + γ g
    D_λ = ∂f/∂λ + γ [∂g/∂λ (λ, y) - ∂g/∂λ (λ, z)]

A method says how z moves and what γ is. y moves by D_y / (γ L + L_f), with L and L_f the largest curvatures of g and f
that were met. With exact z and y, D_λ is the forward form of `Penalty` at σ = 1/γ (see `bilevel.solvers.penalty`).
Everything takes first derivatives only. Differences from the papers: the step of λ is the outer optimizer's, and the
first call trains z at fixed λ and begins y there.

The certificate: γ (z - y) is the adjoint that a pair stands for, so the correction of implicit methods (see
`bilevel.solvers.correction`) measures the error, bias included, by differences of gradients.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from bilevel.certificate import Certificate, Hypergradient, judge
from bilevel.errors import InvalidValueError
from bilevel.solvers.base import OuterGradient, Response, State, add_terms, inner_scale, outer_gradient, ratio
from bilevel.solvers.correction import INNER_TOLERANCE, Correction, Equation, correct, loosely
from bilevel.solvers.differences import Differences
from bilevel.solvers.directions import UNSEEN
from bilevel.solvers.implicit import equation
from bilevel.solvers.linear.base import EXPLANATIONS, check_count
from bilevel.solvers.linear.lanczos import extreme_eigenvalues
from bilevel.solvers.pulled_pair import Kept, Pair, Seen
from bilevel.vector import Vector, axpy, norm, scale, subtract

EVERY = 20  # calls from one measurement of the error to the next
CHANGED = 3.0  # or where the residuals have grown by this factor
SPENT = 200  # products that a correction is measured by: its two solves may take half of them each
BENDS_DOWN = 1e-5  # curvature over the largest one that differences tell from zero


@dataclass(frozen=True)
class ValueGap:
    """The frame; a method adds `_approach` and `_multiplier`.

    Args:
        lr: step size of z; None: 1 / (largest curvature), measured and watched.
        warmup: most steps of z, and then rounds of the pair, in the first call, which has nothing to start from.
        moves: rounds of the pair in every other call, one step of y each; more follow λ more closely and cost more.
            Where they end with a multiplier of 0, more are taken.
    """

    lr: float | None = None
    warmup: int = 1000
    moves: int = 10

    def __post_init__(self) -> None:
        check_count(self.warmup, "warmup")
        check_count(self.moves, "moves")
        check_positive(self.lr, "lr")

    def __call__(
        self, response: Response, lower: Vector, upper: Vector, state: State = None
    ) -> tuple[Hypergradient, State]:
        """Return D_λ where y and z are now, and F(λ) at z; `state` holds y."""
        kept: Kept | None = state
        pair = Pair(response, lower, upper, kept, self.lr)
        if kept is None:
            pair.begin(self.warmup)
        seen: Seen | None = None
        for move in range(self.warmup if kept is None else max(self.warmup, self.moves)):
            self._approach(pair, seen)
            y, seen = pair.y, pair.look()
            gamma = self._multiplier(pair, seen)
            still = pair.pull(seen, gamma, self._least(pair))
            # Where γ is 0, D_λ says nothing of the inner problem, and a run would take it for stationary.
            if still or (kept is not None and move + 1 >= self.moves and gamma > 0.0):
                break
        assert seen is not None
        through = {
            name: None if a is None or (b := seen.plain.upper[name]) is None else gamma * (a - b)
            for name, a in seen.inner.upper.items()
        }
        gradient = add_terms(response, seen.outer.upper, through, upper, UNSEEN)
        here = outer_gradient(response, pair.z, upper)
        after = _kept(pair, kept)
        certificate = _certificate(pair, seen, here, y, gamma, gradient, after, kept is None)
        return Hypergradient(gradient, here.loss, pair.z, certificate, response.cost), after

    @abstractmethod
    def _approach(self, pair: Pair, seen: Seen | None) -> None:
        """Move z; `seen`: the last look of this call."""

    @abstractmethod
    def _multiplier(self, pair: Pair, seen: Seen) -> float:
        """Return γ."""

    @abstractmethod
    def _least(self, pair: Pair) -> float:
        """Return the γ below which a step of y grows no longer."""


def _kept(pair: Pair, kept: Kept | None) -> Kept:
    """Return what the next call starts from, the last measurement in it."""
    after = Kept(
        y=pair.y,
        steep=pair.steep,
        outer_steep=pair.outer_steep,
        unit=pair.unit,
        calls=1,
        error=None,
        near=False,
        residuals=0.0,
        gamma=0.0,
        low=0.0,
    )
    if kept is not None:
        after["calls"], after["error"], after["low"] = kept["calls"] + 1, kept["error"], kept["low"]
        after["near"] = kept["near"]
        after["residuals"], after["gamma"] = kept["residuals"], kept["gamma"]
    return after


def _certificate(
    pair: Pair, seen: Seen, here: OuterGradient, y: Vector, gamma: float, gradient: Vector, after: Kept, first: bool
) -> Certificate:
    """Judge D_λ: measured in the first call and every 20, in between scaled by what is left of both equations."""
    system = Differences(pair.response, pair.z, pair.upper)
    unit = inner_scale(pair.response, system, pair.z, pair.upper)
    inner = ratio(float(norm(seen.plain.lower)), unit)
    adjoint = ratio(float(norm(axpy(gamma, seen.inner.lower, seen.outer.lower))), float(norm(seen.outer.lower)))
    left = inner + adjoint
    if first or after["calls"] % EVERY == 0 or left > CHANGED * after["residuals"] or CHANGED * gamma < after["gamma"]:
        after["low"], after["steep"] = extreme_eigenvalues(system.operator)
        found = _measured(pair, system, here, unit, gradient, scale(gamma, subtract(pair.z, y)))
        after["error"] = None if found is None else found.error
        after["near"] = found is not None and found.moved <= INNER_TOLERANCE
        after["residuals"], after["gamma"] = left, gamma
    error, wrong = after["error"], [_NOISY] if pair.response.stochastic else []
    if error is not None:
        error *= max(1.0, ratio(left, after["residuals"]), ratio(after["gamma"], gamma))
    if after["low"] < -BENDS_DOWN * after["steep"]:
        wrong.append(EXPLANATIONS["nonpositive curvature"])
    hint = (
        f"the multiplier is {gamma:.1e}, the inner residual {inner:.1e}, and {adjoint:.1e} is left of y's equation. "
        "Near the outer optimum a bias of 1 / multiplier is all that is left of the hypergradient: a larger `gamma` of "
        'PBGD, or method="penalty". Else let the pair settle: a longer `warmup`, more `moves`, or a smaller outer '
        "learning rate"
    )
    verdict, reasons = judge(error, wrong, by_design=error is not None and after["near"], hint=hint)
    verdict = "approximate" if verdict == "exact" else verdict  # a penalty is not exact by design
    return Certificate(verdict, inner, adjoint, after["low"], error, tuple(reasons))


def _measured(
    pair: Pair, system: Differences, here: OuterGradient, unit: float, gradient: Vector, adjoint: Vector
) -> Correction | None:
    """Correct D_λ once, products taken by differences."""
    response, upper = pair.response, pair.upper

    def there(w: Vector) -> Equation:
        return equation(outer_gradient(response, w, upper), Differences(response, w, upper), unit)

    solve = loosely(system.operator, math.inf, SPENT)
    return correct(pair.z, upper, gradient, adjoint, equation(here, system, unit), there, response, solve)


_NOISY = (
    "on minibatches y and z never settle, and the noise of their difference is not measured: give the data as one "
    'batch, or choose method="soba"'
)


def check_positive(value: Any, name: str) -> None:
    """Raise unless it is a number above 0, or None."""
    if value is not None and not (isinstance(value, (int, float)) and 0.0 < value < float("inf")):
        raise InvalidValueError(f"`{name}` is {value!r}, expected a number above 0, or None to have it found")
