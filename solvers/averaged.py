"""The mean of several hypergradients, each on batches of its own, with its standard error.

    g = mean of g_1 ... g_n        standard error = sqrt( sum |g_i - g|^2 / (n (n - 1)) )

For losses on minibatches, where one draw is one noisy hypergradient. The error of a mean of n independent draws falls
like 1 / sqrt(n); the bias that all draws share (a mean of inverses is no inverse of a mean) does not average out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from bilevel.certificate import Certificate, Hypergradient, judge
from bilevel.errors import InvalidValueError
from bilevel.solvers.about import About, about
from bilevel.solvers.base import Estimator, Response, State, ratio
from bilevel.solvers.implicit import Implicit
from bilevel.solvers.linear.base import check_count
from bilevel.vector import Vector, axpy, norm, subtract, zeros_like


@dataclass(frozen=True)
class Averaged:
    """Average the hypergradients of several draws of batches at one inner solution.

    Args:
        batches: number of draws, at least 2; n draws cost n hypergradients, the inner solve not among them.
        estimator: what is averaged, or its name; a method that does not unroll.
    """

    batches: int = 8
    estimator: Estimator | str = field(default_factory=Implicit)

    def __post_init__(self) -> None:
        from bilevel.solvers import estimator  # whose table of names holds this class too

        check_count(self.batches, "batches")
        if self.batches < 2:
            raise InvalidValueError("`batches` is 1, and a standard error needs at least 2 draws")
        object.__setattr__(self, "estimator", estimator(self.estimator, "estimator"))
        if about(self._method).begins != "solution" or about(self.estimator).sees == "loop":
            raise InvalidValueError(
                f"`estimator` is {self.estimator!r}, which is no method at a given inner solution (it runs "
                "the inner loop itself, or may choose to); average an implicit one"
            )

    @property
    def _method(self) -> Estimator:
        assert not isinstance(self.estimator, str)
        return self.estimator

    @property
    def about(self) -> About:
        """What the averaged estimator declares, for so many draws."""
        declared = about(self._method)
        return replace(declared, terms=replace(declared.terms, cost=f"{self.batches} x ({declared.terms.cost})"))

    def __call__(
        self, response: Response, lower: Vector, upper: Vector, state: State = None
    ) -> tuple[Hypergradient, State]:
        """Return the mean hypergradient at `lower`; `state` is the averaged estimator's."""
        draws = []
        for i in range(self.batches):
            if i:
                response.redraw()
            found, state = self._method(response, lower, upper, state)
            draws.append(found)
        mean = zeros_like(upper)
        for found in draws:
            mean = axpy(1.0 / self.batches, found.gradient, mean)
        spread = math.sqrt(sum(float(norm(subtract(found.gradient, mean))) ** 2 for found in draws))
        noise = ratio(spread / math.sqrt(self.batches * (self.batches - 1)), float(norm(mean)))
        outer_loss = sum(found.outer_loss for found in draws) / self.batches
        correction = sum(found.correction for found in draws) / self.batches
        certificate = _certificate([found.certificate for found in draws], noise)
        return Hypergradient(mean, outer_loss, lower, certificate, response.cost, correction), state


def _certificate(certificates: list[Certificate], noise: float) -> Certificate:
    """Judge by the worst draw and by the standard error, whichever is larger."""
    worst = max(certificates, key=lambda c: (not c.trusted, math.inf if c.error is None else c.error))
    if not worst.trusted:
        return replace(worst, standard_error=noise)
    error = None if worst.error is None else math.hypot(worst.error, noise)
    verdict, reasons = judge(error, [], by_design=True, hint="raise `batches`, or give larger batches")
    return replace(worst, verdict=verdict, error=error, reasons=tuple(reasons), standard_error=noise)
