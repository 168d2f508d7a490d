"""How far w and v lag behind their equations, and how noisy D_λ is: the certificate of a single-loop method.

On fixed data the hypergradient is corrected once in a while, as implicit methods do in every call (see
`bilevel.solvers.correction`), and the estimate is scaled by the residuals in between: they are linear in one another.

On minibatches no draw knows the solution. What can be seen is averaged over about 100 steps: the mean of D_w and D_v
vanishes where w and v have settled, since steps that add up to nothing have directions that do. With μ the smallest
curvature, v is off by about mean(D_v) / μ and w by mean(D_w) / μ. The noise of D_λ is its spread over the last calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from bilevel.certificate import APPROXIMATE_BELOW, Certificate, judge
from bilevel.solvers.base import (
    Linearization,
    OuterGradient,
    Response,
    inner_scale,
    outer_gradient,
    present,
    ratio,
)
from bilevel.solvers.correction import INNER_TOLERANCE, SENSITIVITY, Equation, correct, loosely
from bilevel.solvers.directions import Directions
from bilevel.solvers.implicit import equation
from bilevel.solvers.linear.base import EXPLANATIONS, dtype_of
from bilevel.solvers.linear.lanczos import extreme_eigenvalues
from bilevel.vector import Vector, axpy, dot, norm, scale, subtract, zeros_like

EVERY = 20  # calls from one correction to the next
CHANGED = 3.0  # or where the residuals have grown by this factor
SPENT = 200  # products that a correction is measured by: its two solves may take half of them each
HORIZON = 100.0  # steps over which directions are averaged
REACHES = 10  # calls from one look at how far the mean of D_v reaches into D_λ to the next: it changes slowly
CALLS = 20.0  # calls over which the spread of D_λ is taken
DEVIATIONS = 2.0  # standard errors that count as the error: one is exceeded in a third of the cases
FEWEST = 5  # calls before that spread is known
STUCK = 1e-6  # an adjoint residual that must have a way to vanish
BENT = (
    0.5  # an inner gradient this far from its linear model, relative, has a kink on the way or is far from any minimum
)
ROUNDED = 100.0  # units in the last place, times the scale of the inner gradient: no sign of a kink
COARSE = 1e-6  # a unit in the last place above this is that of float16 or bfloat16
FLAT = 1e-8  # curvature over the largest one that counts as none


@dataclass(frozen=True)
class Here:
    """Where a call ended."""

    outer: OuterGradient
    system: Linearization
    lower: Vector
    adjoint: Vector
    upper: Vector
    last: Directions
    gradient: Vector
    grew: bool


@dataclass
class Mean:
    """A mean with fading memory, of vectors and of their squared lengths.

    Attributes:
        value: the mean; None before the first.
        square: the mean squared length.
        weight: what the entries weigh together, below 1.
    """

    value: Vector | None = None
    square: float = 0.0
    weight: float = 0.0

    def see(self, v: Vector, horizon: float) -> None:
        """Add one more; the first ones are all remembered alike."""
        self.weight += 1.0
        share = max(1.0 / self.weight, 1.0 / horizon)
        before = self.value
        self.value = v if before is None else {name: torch.lerp(before[name], t, share) for name, t in v.items()}
        self.square += share * (_squared(v) - self.square)

    def spread(self) -> float:
        """Return the standard deviation of single entries."""
        few = max(2.0, min(self.weight, CALLS))
        return math.sqrt(max(0.0, self.square - _squared(self.value or {})) * few / (few - 1.0))

    def size(self, independent: bool) -> float:
        """Return the length of the mean; less what chance makes of independent entries."""
        squared = _squared(self.value or {})
        if independent:
            squared -= max(0.0, self.square - squared) / max(1.0, min(self.weight, HORIZON) - 1.0)
        return math.sqrt(max(0.0, squared))


@dataclass
class Tracking:
    """What is known of w, v and D_λ on their way.

    Attributes:
        exact: every draw is the whole problem.
        held: w stands still, as given.
        forgets: v is found anew in every call.
        calls: so far.
        inner, adjoint: means of D_w and of D_v.
        outer: mean of D_λ over the calls.
        noise: of the last hypergradient; None: not known.
        bend: mean of v·Hv / v·v.
        reach: how far the mean of D_v reaches into D_λ, relative to its length; None: not yet measured.
        lowest, highest: curvatures measured; None: not yet.
        unit: scale of the inner gradient.
        error, moved, residuals: the last correction, and the residuals there.
        bent: how far the inner gradient at the corrected w is from what the Hessian foretells, relative to its change.
        flat: what was left of the adjoint equation there met no curvature.
    """

    exact: bool
    held: bool
    forgets: bool
    calls: int = 0
    inner: Mean = field(default_factory=Mean)
    adjoint: Mean = field(default_factory=Mean)
    outer: Mean = field(default_factory=Mean)
    noise: float | None = None
    bend: float | None = None
    reach: float | None = None
    lowest: float | None = None
    highest: float | None = None
    unit: float = 0.0
    error: float | None = None
    moved: float = 0.0
    residuals: float = 0.0
    bent: float = 0.0
    flat: bool = False

    @classmethod
    def resumed(cls, exact: bool, held: bool, forgets: bool, state: dict[str, Any] | None) -> Tracking:
        """Return what `state` left."""
        found = cls(exact, held, forgets)
        for name, value in (state or {}).items():
            setattr(found, name, Mean(**value) if isinstance(value, dict) else value)
        return found

    def state(self) -> dict[str, Any]:
        """Return plain values."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("exact", "held", "forgets")}
        return {name: dict(vars(value)) if isinstance(value, Mean) else value for name, value in values.items()}

    def see_lower(self, residual: Vector) -> None:
        """Take D_w into account."""
        if not self.exact:
            self.inner.see(residual, HORIZON)

    def see_adjoint(self, v: Vector, found: Directions) -> None:
        """Take D_v into account."""
        if self.exact:
            return
        self.adjoint.see(found.adjoint, HORIZON)
        bend = ratio(float(dot(v, found.product)), float(dot(v, v)))
        self.bend = bend if self.bend is None else self.bend + (bend - self.bend) / HORIZON

    def sampled(self, gradients: Sequence[Vector], before: Vector | None, momentum: float, averages: bool) -> Vector:
        """Return the hypergradient of this call from its draws of D_λ, and find out how noisy it is."""
        draws = Mean()
        for gradient in gradients if len(gradients) > 1 else ():
            draws.see(gradient, math.inf)
        found = draws.value if averages and draws.value is not None else gradients[-1]
        if before is not None:
            found = axpy(momentum, before, scale(1.0 - momentum, found)) if momentum else found
            self.outer.see(found, CALLS)
        spread, count = (draws.spread(), len(gradients)) if before is None else (self.outer.spread(), 1)
        known = len(gradients) > 1 or self.outer.weight >= FEWEST
        self.noise = spread / math.sqrt(count if averages else 1) if known else None
        return found

    def certificate(self, response: Response, here: Here, anew: bool) -> Certificate:
        """Judge; `anew`: λ has jumped since the last correction."""
        judged = self._on_fixed_data(response, here, anew) if self.exact else self._on_minibatches(response, here)
        self.calls += 1
        return judged

    def _on_fixed_data(self, response: Response, here: Here, anew: bool) -> Certificate:
        """Correct once in a while, and scale the estimate by the residuals in between."""
        first = self.error is None or self.calls % EVERY == 0 or anew
        self.unit = inner_scale(response, here.system, here.lower, here.upper) if first else self.unit
        inner = ratio(float(norm(here.system.residual)), self.unit)
        adjoint = ratio(float(norm(here.last.adjoint)), here.last.rhs)
        measured = first or inner + adjoint > CHANGED * self.residuals
        if measured:
            self.lowest, self.highest = extreme_eigenvalues(here.system.operator)
            self._correct(response, here)
            self.residuals = inner + adjoint
            self.flat = adjoint > STUCK and self._is_flat(here)
        growth = max(1.0, (inner + adjoint) / self.residuals) if self.residuals > 0.0 else 1.0
        assert here.last.upper is not None
        lag = ratio(float(norm(subtract(here.gradient, here.last.upper))), float(norm(here.gradient)))
        error = None if self.error is None else self.error * growth + lag + self._rounding(here.lower)
        wrong = self._wrong(here, float(dot(here.adjoint, here.last.product)))
        if self.bent > BENT:
            wrong.append(_BENT.format(self.bent))
        if self.flat:
            wrong.append(EXPLANATIONS["singular"])
        hint = (
            f"the inner residual is {inner:.1e} and the adjoint residual is {adjoint:.1e}: take more `steps` a call "
            "(or a longer `warmup` of the first), or a smaller outer learning rate, so that w and v keep up"
        )
        near = self.moved * growth < INNER_TOLERANCE
        verdict, reasons = judge(error, wrong, by_design=error is not None and near, hint=hint)
        if verdict == "exact" and not measured:
            verdict = "approximate"  # an estimate that was scaled is none to swear by
        return Certificate(verdict, inner, adjoint, self.lowest, error, tuple(reasons))

    def _is_flat(self, here: Here) -> bool:
        """Say whether what is left of the adjoint equation lies where there is no curvature, so that it stays."""
        left = here.last.adjoint
        return float(dot(left, here.system.operator(left))) <= FLAT * (self.highest or 0.0) * float(dot(left, left))

    def _correct(self, response: Response, here: Here) -> None:
        """Correct the hypergradient once, and see what that changes."""
        upper, unit = here.upper, self.unit
        rounding = ROUNDED * torch.finfo(dtype_of(here.lower)).eps * unit
        self.bent = 0.0

        def there(w: Vector) -> Equation:
            system = Linearization(response, w, upper)
            foretold = here.system.operator(subtract(w, here.lower))
            off = subtract(subtract(system.residual, here.system.residual), foretold)
            self.bent = ratio(max(0.0, float(norm(off)) - rounding), float(norm(foretold)))
            return equation(outer_gradient(response, w, upper), system, unit)

        solve = loosely(here.system.operator, math.inf, SPENT)
        found = correct(
            here.lower,
            upper,
            here.last.upper or here.gradient,
            here.adjoint,
            equation(here.outer, here.system, unit),
            there,
            response,
            solve,
        )
        self.error, self.moved = (None, math.inf) if found is None else (found.error, found.moved)

    def _on_minibatches(self, response: Response, here: Here) -> Certificate:
        """Bound the lag by the mean directions over the smallest curvature, and add the noise."""
        lag = self.adjoint.value or zeros_like(here.lower)
        off, unsolved = self.inner.size(self.held), self.adjoint.size(self.forgets)
        size = max(float(norm(self.outer.value or here.gradient)), response.gradient_floor)
        inner, adjoint = ratio(off, math.sqrt(self.inner.square)), ratio(unsolved, math.sqrt(self.adjoint.square))
        low, noise = self.lowest or 0.0, None if self.noise is None else ratio(self.noise, size)
        wrong, error, bias = self._wrong(here, self.bend or 0.0), None, 0.0
        if noise is None:
            wrong.append(
                f"the noise of minibatches is known after {FEWEST} calls, and this one is no. {self.calls + 1}"
            )
        elif low <= FLAT * (self.highest or 0.0) or low <= 0.0:
            wrong.append(_NO_CURVATURE)
        else:
            if self.reach is None or self.calls % REACHES == 0:
                self.reach = ratio(float(norm(present(here.system.pull_back(lag)))), float(norm(lag)))
            bias = ratio(self.reach * unsolved / low, size) + SENSITIVITY * ratio(off / low, float(norm(here.lower)))
            error = bias + DEVIATIONS * noise + self._rounding(here.lower)
        hint = _told(bias, DEVIATIONS * (noise or 0.0))
        verdict, reasons = judge(error, wrong, by_design=True, hint=hint)
        verdict = "approximate" if verdict == "exact" else verdict  # a bound by means of draws proves no digits
        return Certificate(verdict, inner, adjoint, self.lowest, error, tuple(reasons), standard_error=noise)

    def _rounding(self, lower: Vector) -> float:
        """Return what rounding does to the hypergradient; below float32 it does so to the estimates too."""
        eps = torch.finfo(dtype_of(lower)).eps
        return eps if eps < COARSE else eps * max(1.0, ratio(self.highest or 0.0, self.lowest or 0.0))

    def _wrong(self, here: Here, bend: float) -> list[str]:
        steep = max(self.highest or 0.0, abs(self.lowest or 0.0))
        negative = bend < 0.0 or (self.lowest is not None and self.lowest < -FLAT * steep)
        return [_GROWS] if here.grew else [EXPLANATIONS["nonpositive curvature"]] if negative else []


def _squared(v: Vector) -> float:
    """Return the squared length; infinite where it is too large for a number."""
    length = float(norm(v))
    return length * length


_BENT = (
    "towards the inner solution the inner gradient changes otherwise than the Hessian says, by {:.1g} of the change: "
    "the inner loss has kinks there (abs, relu, hinge), or w is far away: smooth the loss, take more `steps` or a "
    'longer `warmup`, or choose a method that sees kinks (bilevel.inner.Proximal with method="implicit")'
)


def _told(lag: float, noise: float) -> str:
    """Return which part of the error is the larger, and its knobs."""
    shares = f"{noise:.1e} of it is the noise of minibatches, {lag:.1e} the lag of w and v behind λ: "
    if lag > noise:
        return shares + "take more `steps` a call, a longer `warmup`, or a smaller outer learning rate"
    times = math.ceil((noise / max(APPROXIMATE_BELOW - lag, 0.1)) ** 2) if math.isfinite(noise) else "many"
    return shares + (
        f"give batches {times} times as large, or `momentum=0.9`, which is about four times less noisy than none, or "
        'take method="saba"; near the optimum of the outer loss noise is all that is left'
    )


_GROWS = (
    "the adjoint grows along negative curvature of the inner loss: train the inner problem further, regularize it, or "
    'use method="minres", which needs no positive curvature'
)
_NO_CURVATURE = (
    "the inner loss has directions without curvature on these batches, so nothing bounds how far w and v are off: add "
    "a little regularization, or give larger batches"
)
