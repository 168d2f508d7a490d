"""The penalty of the value function: first derivatives at inner solutions of two slightly different problems.

    y(σ) = argmin_y g(y, λ) + σ f(y, λ)         h(σ) = min_y g + σ f         F(λ) = f(y(0), λ) = dh/dσ at 0
    dF/dλ ≈ [∇_λ (g + σ f)(y(σ)) - ∇_λ (g - σ f)(y(-σ))] / 2σ                "central", error O(σ²)
    dF/dλ ≈ [∇_λ (g + σ f)(y(σ)) - ∇_λ g(y(0))] / σ                          "forward", error O(σ)

Kwon, Kwon, Wright and Nowak, A fully first-order method for stochastic bilevel optimization (F2SA), ICML 2023, equation
3 with multiplier 1/σ: the forward form. Chen, Ma and Zhang, Near-optimal nonconvex-strongly-convex bilevel optimization
with fully first-order oracles, 2023, lemma 4.1: its error is O(σ); F2SA-p, 2025 (arXiv 2509.02937): it is a difference
of h over σ, and a central one has error O(σ²). Deliberate difference: σ is found, by comparing two of them, and the
pair is extrapolated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from bilevel.certificate import Certificate, Hypergradient, judge
from bilevel.errors import InvalidValueError, NonFiniteError, meant
from bilevel.solvers.about import About, Terms
from bilevel.solvers.base import (
    OuterGradient,
    Response,
    State,
    add_terms,
    inner_scale,
    outer_gradient,
    present,
    ratio,
)
from bilevel.solvers.correction import Correction, Equation, correct, loosely
from bilevel.solvers.differences import Differences, inner_gradient, slope
from bilevel.solvers.implicit import equation
from bilevel.solvers.linear.base import dtype_of
from bilevel.vector import Vector, axpy, norm, scale, subtract, zeros_like

Form = Literal["central", "forward"]

# The first σ pulls at the inner variables with this part of the inner gradient's scale: far above what an inner solver
# leaves of it (1e-9 in float64, 1e-5 in float32), far below what bends them off the line.
PULL = {torch.float64: 1e-3, torch.float32: 4e-3}
AGREEMENT = 1e-3  # of two σ; what extrapolation leaves is about the square of it
SETTLED = 1e-6  # part of its pull that an inner solve may leave before it is taken up again
RESUMED = 4  # times at most
SPENT = 60  # products that a correction is measured by: its two solves may take half of them each
MOVE = 1e-3  # relative, of w, that shows what the inner loss uses


@dataclass(frozen=True)
class Penalty:
    """Differentiate through the inner optimum with first derivatives only, by training on inner + σ * outer loss.

    Exact for σ to zero at exact inner solutions. Takes 4 inner solves or more, which begin at the inner solution;
    under a penalty of `bilevel.prox` twice as many, to see how far they still go. The error is measured by one
    correction (see `bilevel.solvers.correction`), by differences of gradients.

    Args:
        sigma: weight of the outer loss in what is trained on; larger is less exact, smaller needs an inner solver of
            more digits. None: found, and extrapolated from two; a number: taken as it is, and a second one estimates
            the error.
        form: "central", or "forward" (F2SA), which trains no problem with a negative weight.

    >>> import torch, bilevel
    >>> problem = bilevel.BilevelProblem(
    ...     lambda w, h: (w - h) ** 2, lambda w, h: w**2,
    ...     params=torch.zeros((), dtype=torch.float64), hparams=torch.tensor(3.0, dtype=torch.float64))
    >>> round(bilevel.hypergradient(problem, bilevel.Penalty()).gradient.item(), 5)  # w*(h) = h: dF/dh = 2 h
    6.0
    """

    sigma: float | None = None
    form: Form = "central"
    about: ClassVar[About] = About(
        begins="solution",
        sees="losses",
        derivatives=1,
        exact=True,
        terms=Terms("4 inner solves, warm", "nothing", "σ² (central), σ (forward)", "Kwon et al. 2023"),
    )

    def __post_init__(self) -> None:
        given = self.sigma
        if given is not None and not (isinstance(given, (int, float)) and 0.0 < given < math.inf):
            raise InvalidValueError(f"`sigma` is {given!r}, expected a number above 0, or None")
        if self.form not in get_args(Form):
            raise InvalidValueError(
                f"`form` is {self.form!r}, expected one of {', '.join(get_args(Form))}"
                f"{_MOVING.get(self.form) or meant(self.form, get_args(Form))}"
            )

    @property
    def order(self) -> int:
        """Power of σ that the error falls with."""
        return 2 if self.form == "central" else 1

    def __call__(
        self, response: Response, lower: Vector, upper: Vector, state: State = None
    ) -> tuple[Hypergradient, State]:
        """Return the hypergradient at the inner solution `lower`; nothing is kept between calls."""
        ends = _Ends(response, lower, upper)

        def quotient(sigma: float) -> Vector:
            return ends.quotient(sigma, self.form)

        if self.sigma is None:
            found = slope(quotient, ends.first_sigma(), AGREEMENT, self.order)
            value, apart, sigma = found.value, found.error, found.step
        else:
            value, sigma = quotient(self.sigma), self.sigma
            halved = subtract(value, quotient(sigma / 2.0))
            apart = float(norm(halved)) / (1.0 - 0.5**self.order)
        if not math.isfinite(apart):
            raise NonFiniteError(_FAILED, "hypergradient")
        if len(ends.used) < len(upper):
            ends.look_around()
        used: dict[str, Tensor | None] = {name: value[name] for name in upper if name in ends.used}
        gradient = add_terms(response, dict.fromkeys(upper), dict.fromkeys(upper) | used, upper, _UNSEEN)
        size = max(float(norm(gradient)), response.gradient_floor)
        certificate = ends.certificate(ratio(apart, size), sigma, gradient)
        return Hypergradient(gradient, ends.outer.loss, lower, certificate, response.cost), None


# Forms of a class of their own: they begin where the last call ended, and run no inner solver.
_MOVING = {
    name.lower(): f"; this one moves the inner variables itself: write bilevel.{name}()" for name in ("BOME", "PBGD")
}
_UNSEEN = (
    "neither loss uses it at the inner solution, and a penalty method sees nothing else. If the inner solver uses it "
    '(a learning rate), choose method="unroll" or "zero-order"; otherwise take it out of `hparams`'
)


class _Ends:
    """Inner solutions of g + σ f around one of g, and what they say of the hypergradient.

    Attributes:
        outer: the outer loss at the inner solution.
        used: hyperparameters that either loss uses.
    """

    def __init__(self, response: Response, lower: Vector, upper: Vector) -> None:
        self._response, self._lower, self._upper = response, lower, upper
        self.outer = outer_gradient(response, lower, upper)
        self._here = inner_gradient(response, lower, upper)
        self._scale = response.start_gradient_norm(upper)
        if not response.has_kinks:
            self._scale = inner_scale(response, Differences(response, lower, upper), lower, upper)
        self._missing: dict[float, float] = {}
        self._adjoints: dict[float, Vector] = {}
        self.used = {name for name, t in self.outer.upper.items() if t is not None}

    def first_sigma(self) -> float:
        """Return the σ whose pull is a small part of the scale of the inner gradient."""
        pull = PULL.get(dtype_of(self._lower), 1e-2) * self._scale
        return ratio(pull, float(norm(self.outer.lower))) if float(norm(self.outer.lower)) > 0.0 and pull > 0.0 else 1.0

    def quotient(self, sigma: float, form: Form) -> Vector:
        """Return the hypergradient by one σ; infinite where training failed."""
        try:
            plus, inner_plus, outer_plus = self._end(sigma)
            minus, inner_minus, outer_minus = (
                self._end(-sigma) if form == "central" else (self._lower, self._here, self.outer)
            )
        except NonFiniteError:
            return {name: torch.full_like(t, math.inf) for name, t in self._upper.items()}
        width = 2.0 * sigma if form == "central" else sigma
        self.used |= self._changed(inner_plus, inner_minus)
        self._adjoints[sigma] = scale(1.0 / width, subtract(minus, plus))
        result = zeros_like(self._upper)
        for name in result:
            one, other = inner_plus.upper[name], inner_minus.upper[name]
            if one is not None and other is not None:
                result[name] = (one - other) / width
        direct = [present(outer_plus.upper)] + ([present(outer_minus.upper)] if form == "central" else [])
        for terms in direct:
            result |= {name: result[name] + t / len(direct) for name, t in terms.items()}
        return result

    def _changed(self, a: OuterGradient, b: OuterGradient) -> set[str]:
        """Return the hyperparameters whose part of g's gradient is not the same at two ends."""
        pairs = {name: (one, b.upper[name]) for name, one in a.upper.items()}
        return {n for n, (one, two) in pairs.items() if one is not None and two is not None and not one.equal(two)}

    def look_around(self) -> None:
        """Find what the inner loss uses where the ends do not tell, because f does not pull: by a move of its own."""
        dice = torch.Generator().manual_seed(0)
        size = float(norm(self._lower)) or 1.0
        v = {n: torch.randn(t.shape, generator=dice, dtype=torch.float64).to(t) for n, t in self._lower.items()}
        there = axpy(MOVE * size / float(norm(v)), v, self._lower)
        self.used |= self._changed(inner_gradient(self._response, there, self._upper), self._here)

    def _end(self, weight: float) -> tuple[Vector, OuterGradient, OuterGradient]:
        """Return where training on g + weight * f ends, and both losses' gradients there."""
        end, best, pull = self._lower, math.inf, abs(weight) * float(norm(self.outer.lower))
        moves: list[float] = []
        for _ in range(RESUMED):
            before, end = end, self._response.solve(end, self._upper, weight)
            inner, outer = (
                inner_gradient(self._response, end, self._upper),
                outer_gradient(self._response, end, self._upper),
            )
            moves.append(float(norm(subtract(end, before))))
            if self._response.has_kinks:  # where a gradient does not say how much is left
                if len(moves) > 1 and moves[-1] <= SETTLED * moves[0]:
                    break
                continue
            part = ratio(float(norm(axpy(weight, outer.lower, inner.lower))), pull)
            if part <= SETTLED or not part < 0.5 * best:
                break
            best = part
        self._missing[weight] = _rest(moves)
        return end, inner, outer

    def certificate(self, apart: float, sigma: float, gradient: Vector) -> Certificate:
        """Judge by two σ and by what the inner solves left."""
        residual = ratio(float(norm(self._here.lower)), self._scale)
        adjoint = self._adjoints[sigma]
        if self._response.has_kinks:
            missing = sum(self._missing.get(weight, 0.0) for weight in (sigma, -sigma))
            left: float | None = ratio(missing, 2.0 * sigma * float(norm(adjoint)))
        else:
            found = self._measured(gradient, adjoint)
            left = None if found is None else found.error
        error = None if left is None else max(apart, left)
        hint = (
            f"two sigmas differ by {apart:.1e} (another `sigma`, or float64), and the inner solver leaves "
            f"{'an unknown part' if left is None else f'{left:.1e}'} (more `steps`, or a smaller `rtol` of the inner "
            "solver; directions in which the inner loss is flat or bends down need a regularizer)"
        )
        floor = 1e-3 if self._response.has_kinks else 0.0  # a kink that no end crosses is not seen
        judged = None if error is None else max(error, floor)
        verdict, reasons = judge(judged, [], by_design=judged is not None, hint=hint)
        return Certificate(verdict, residual, error=error, reasons=tuple(reasons))

    def _measured(self, gradient: Vector, adjoint: Vector) -> Correction | None:
        """Correct the hypergradient once, by differences of gradients: neither secants nor residuals see flat ways."""
        response, upper, unit = self._response, self._upper, self._scale
        system = Differences(response, self._lower, upper)

        def there(w: Vector) -> Equation:
            return equation(outer_gradient(response, w, upper), Differences(response, w, upper), unit)

        solve = loosely(system.operator, math.inf, SPENT)
        return correct(
            self._lower, upper, gradient, adjoint, equation(self.outer, system, unit), there, response, solve
        )


def _rest(moves: list[float]) -> float:
    """Return how far a solver still goes that moved so far each time it was called: a geometric series."""
    if len(moves) < 2 or moves[-1] == 0.0:
        return 0.0
    rate = ratio(moves[-1], moves[-2])
    return moves[-1] * rate / (1.0 - rate) if rate < 1.0 else math.inf


_FAILED = (
    "training on inner + sigma * outer loss ended in NaN or infinity at every sigma tried: give a smaller `sigma`, or "
    'form="forward", which needs no negative one'
)
