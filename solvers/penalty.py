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
from bilevel.solvers.differences import Differences, inner_gradient, slope
from bilevel.solvers.linear.base import dtype_of
from bilevel.vector import Vector, axpy, dot, norm, scale, subtract, zeros_like

Form = Literal["central", "forward"]

# The first σ pulls at the inner variables with this part of the inner gradient's scale: far above what an inner solver
# leaves of it (1e-9 in float64, 1e-5 in float32), far below what bends them off the line.
PULL = {torch.float64: 1e-3, torch.float32: 4e-3}
AGREEMENT = 1e-3  # of two σ; what extrapolation leaves is about the square of it
SETTLED = 1e-6  # part of its pull that an inner solve may leave before it is taken up again
RESUMED = 4  # times at most


@dataclass(frozen=True)
class Penalty:
    """Differentiate through the inner optimum with first derivatives only, by training on inner + σ * outer loss.

    Exact for σ to zero at exact inner solutions. Takes 4 inner solves or more, which begin at the inner solution.

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
        used: dict[str, Tensor | None] = {name: value[name] for name in upper if name in ends.used}
        gradient = add_terms(response, dict.fromkeys(upper), dict.fromkeys(upper) | used, upper, _UNSEEN)
        size = max(float(norm(gradient)), response.gradient_floor)
        certificate = ends.certificate(ratio(apart, size), sigma)
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
        self._left: dict[float, float] = {}
        self.used = {name for name, t in self.outer.upper.items() if t is not None}

    def first_sigma(self) -> float:
        """Return the σ whose pull is a small part of the scale of the inner gradient."""
        pull = PULL.get(dtype_of(self._lower), 1e-2) * self._scale
        return ratio(pull, float(norm(self.outer.lower))) if float(norm(self.outer.lower)) > 0.0 and pull > 0.0 else 1.0

    def quotient(self, sigma: float, form: Form) -> Vector:
        """Return the hypergradient by one σ; infinite where training failed."""
        try:
            plus = self._end(sigma)
            minus = self._end(-sigma) if form == "central" else None
        except NonFiniteError:
            return {name: torch.full_like(t, math.inf) for name, t in self._upper.items()}
        inner_plus, outer_plus = plus
        inner_minus, outer_minus = (self._here, None) if minus is None else minus
        result = zeros_like(self._upper)
        width = sigma if minus is None else 2.0 * sigma
        for name in result:
            one, other = inner_plus.upper[name], inner_minus.upper[name]
            if one is not None and other is not None and not torch.equal(one, other):
                self.used.add(name)
                result[name] = (one - other) / width
        direct = [present(outer_plus.upper)] + ([] if outer_minus is None else [present(outer_minus.upper)])
        for terms in direct:
            result |= {name: result[name] + t / len(direct) for name, t in terms.items()}
        return result

    def _end(self, weight: float) -> tuple[OuterGradient, OuterGradient]:
        """Return both losses' gradients where training on g + weight * f ends."""
        end, best, pull = self._lower, math.inf, abs(weight) * float(norm(self.outer.lower))
        low, previous = math.inf, (self._lower, scale(weight, self.outer.lower))
        for _ in range(RESUMED):
            end = self._response.solve(end, self._upper, weight)
            inner, outer = (
                inner_gradient(self._response, end, self._upper),
                outer_gradient(self._response, end, self._upper),
            )
            left = axpy(weight, outer.lower, inner.lower)
            move, change = subtract(end, previous[0]), subtract(left, previous[1])
            if float(norm(move)) > 0.0:
                low = min(low, abs(float(dot(move, change))) / float(norm(move)) ** 2)
            previous = end, left
            part = ratio(float(norm(left)), pull)
            if part <= SETTLED or not part < 0.5 * best or self._response.has_kinks:
                break
            best = part
        # H^-1 of what is left, beside the whole move; `low` is the smallest curvature met on the way.
        moved = float(norm(subtract(end, self._lower)))
        self._left[abs(weight)] = max(self._left.get(abs(weight), 0.0), ratio(ratio(float(norm(left)), low), moved))
        return inner, outer

    def certificate(self, apart: float, sigma: float) -> Certificate:
        """Judge by two σ and by what the inner solves left."""
        residual = ratio(float(norm(self._here.lower)), self._scale)
        if not math.isfinite(apart):
            return Certificate("untrusted", residual, reasons=(_FAILED,))
        if self._response.has_kinks:
            verdict, reasons = judge(max(apart, 1e-3), [], by_design=True, hint="another `sigma`")
            return Certificate(verdict, residual, error=apart, reasons=tuple(reasons))
        left = self._left[sigma]
        error = apart + left
        hint = (
            f"two sigmas differ by {apart:.1e} (another `sigma`, or float64), and the inner solver leaves {left:.1e} "
            "of its move (more `steps`, or a smaller `rtol` of the inner solver)"
        )
        verdict, reasons = judge(error, [], by_design=True, hint=hint)
        return Certificate(verdict, residual, error=error, reasons=tuple(reasons))


_FAILED = (
    "training on inner + sigma * outer loss ended in NaN or infinity at every sigma tried: give a smaller `sigma`, or "
    'form="forward", which needs no negative one'
)
