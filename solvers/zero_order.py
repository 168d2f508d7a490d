"""Differences of the outer loss after whole inner loops: for loops that cannot be differentiated at all.

    dF/du_i ≈ (F(u + h e_i) - F(u - h e_i)) / 2h                               one coordinate after another
    dF/du   ≈ 1/n sum_k η_k (F(u + h η_k) - F(u - h η_k)) / 2h,  η_k ~ N(0, I)  random directions, antithetic

Salimans, Ho, Chen, Sidor and Sutskever, Evolution strategies as a scalable alternative to reinforcement learning, 2017
(arXiv 1703.03864), algorithm 1 with the mirrored samples of section 2.1: its mean is the gradient of F smoothed over h,
which is h^2 away, and its relative variance is (m + 1) / n for m hyperparameters. The steps are in u, the unconstrained
values, so every λ lies inside of its range, and a positive one is moved by a factor. All loops see the same batches and
random numbers. The step of coordinates checks itself (see `bilevel.solvers.differences`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from bilevel.certificate import Certificate, Hypergradient, judge
from bilevel.errors import InvalidValueError, NonFiniteError, UnseenHyperparameterError
from bilevel.solvers.about import About, Terms
from bilevel.solvers.base import Response, State, ratio
from bilevel.solvers.differences import slope
from bilevel.solvers.linear.base import check_count
from bilevel.vector import Vector, axpy, flatten, is_finite, norm, scale, size, subtract, unflatten, zeros_like

COORDINATES = 32  # hyperparameters up to which each has its own difference by default
DIRECTIONS = 16
# Relative changes of hyperparameters. The first step of coordinates goes four times as far too; what a loop's end is
# uncertain by, 1e-9 and 1e-5, is then 1e-7 and 1e-4 of a difference.
STEP = {torch.float64: 5e-3, torch.float32: 5e-2}
AGREEMENT = 1e-3


@dataclass(frozen=True)
class ZeroOrder:
    """Differentiate any inner loop by running it at other hyperparameters.

    Sees everything that the loop uses, learning rates included. Coordinates are exact up to rounding for a loop that is
    a smooth function of the hyperparameters; random directions are unbiased up to step^2, and noisy.

    Args:
        directions: random directions, at least 2, two loops each; more is less noisy and slower. None: one coordinate
            after another up to 32 hyperparameters, four loops each; 16 random directions above.
        step: relative change of the hyperparameters, of their unconstrained values where they have a range; larger
            feels less noise of the loop and is less exact. None: 0.005 (float32: 0.05), checked for coordinates.
        seed: of the random directions; each call draws new ones.

    >>> import torch, bilevel
    >>> problem = bilevel.BilevelProblem(
    ...     lambda w, h: (w - h) ** 2, lambda w, h: w**2,
    ...     params=torch.zeros((), dtype=torch.float64), hparams=torch.tensor(3.0, dtype=torch.float64))
    >>> round(bilevel.hypergradient(problem, bilevel.ZeroOrder()).gradient.item(), 5)  # w*(h) = h: dF/dh = 2 h
    6.0
    """

    directions: int | None = None
    step: float | None = None
    seed: int = 0
    about: ClassVar[About] = About(
        begins="start",
        sees="loop",
        derivatives=0,
        exact=True,
        terms=Terms("4 m loops; 2 a direction", "nothing", "h^4; √(m / directions)", "Salimans et al. 2017"),
    )

    def __post_init__(self) -> None:
        if self.directions is not None:
            check_count(self.directions, "directions")
            if self.directions < 2:
                raise InvalidValueError("`directions` is 1, and a standard error needs at least 2")
        if self.step is not None and not (isinstance(self.step, (int, float)) and 0.0 < self.step < math.inf):
            raise InvalidValueError(f"`step` is {self.step!r}, expected a number above 0, or None")

    def __call__(
        self, response: Response, lower: Vector, upper: Vector, state: State = None
    ) -> tuple[Hypergradient, State]:
        """Run the inner loop from `lower` at hyperparameters around `upper`; `state` counts the calls."""
        loops = _Loops(response, lower, upper)
        end = response.solve(lower, upper)
        if not is_finite(end):
            raise NonFiniteError("the inner loop ended in NaN or infinity", "inner variables")
        outer_loss = loops.loss(end, upper)
        calls: int = state or 0
        step = self.step or STEP.get(next(iter(upper.values())).dtype, 0.1)
        if self.directions is None and size(upper) <= COORDINATES:
            by_step, certificate = loops.by_coordinates(step, self.step is not None)
        else:
            by_step, certificate = loops.by_directions(step, self.directions or DIRECTIONS, (self.seed, calls))
        gradient = response.ranges.unchained(upper, by_step)
        if not is_finite(gradient):
            raise NonFiniteError("the outer loss is not finite around these hyperparameters", "hypergradient")
        return Hypergradient(gradient, outer_loss, end, certificate, response.cost), calls + 1


class _Loops:
    """The outer loss at the end of the inner loop, as a function of steps in the hyperparameters."""

    def __init__(self, response: Response, lower: Vector, upper: Vector) -> None:
        self._response, self._lower, self._upper = response, lower, upper

    def loss(self, end: Vector, upper: Vector) -> float:
        with torch.no_grad():
            return float(self._response.loss(end, upper).detach())

    def _at(self, step: Vector) -> float:
        """Return F a step away; infinite where the loop fails."""
        upper = self._response.ranges.moved(self._upper, step)
        try:
            end = self._response.solve(self._lower, upper)
        except NonFiniteError:
            return math.inf
        return self.loss(end, upper)

    def _across(self, direction: Vector, h: float) -> float:
        return (self._at(scale(h, direction)) - self._at(scale(-h, direction))) / (2.0 * h)

    def by_coordinates(self, step: float, fixed: bool) -> tuple[Vector, Certificate]:
        """Return dF/du, and how far two steps agree."""
        units = torch.eye(size(self._upper), dtype=torch.float64)

        def quotient(h: float) -> Vector:
            slopes = [self._across(unflatten(unit.to(flatten(self._upper)), self._upper), h) for unit in units]
            return unflatten(torch.tensor(slopes, dtype=torch.float64).to(flatten(self._upper)), self._upper)

        if fixed:
            value = quotient(step)
            apart = float(norm(subtract(value, quotient(step / 2.0)))) / 0.75
        else:
            found = slope(quotient, step, AGREEMENT)
            value, apart = found.value, found.error
        for name, t in value.items():
            if not bool(t.any()):
                raise UnseenHyperparameterError(
                    f"{self._response.label(name)} has no path to the outer loss: {_UNSEEN}"
                )
        error = ratio(apart, max(float(norm(value)), self._floor(value)))
        hint = (
            "two steps disagree: the loop is no smooth function of the hyperparameters (train it further), or its end "
        )
        hint += "is noisy (give a larger `step`)"
        if not math.isfinite(error):
            return value, Certificate("untrusted", reasons=(hint,))
        verdict, reasons = judge(error, [], by_design=True, hint=hint)
        return value, Certificate(verdict, error=error, reasons=tuple(reasons))

    def by_directions(self, step: float, count: int, seed: tuple[int, int]) -> tuple[Vector, Certificate]:
        """Return the mean over random directions, and its standard error."""
        generator = torch.Generator().manual_seed(1_000_003 * seed[0] + seed[1])
        samples = []
        for _ in range(count):
            flat = torch.randn(size(self._upper), generator=generator, dtype=torch.float64)
            η = unflatten(flat.to(flatten(self._upper)), self._upper)
            samples.append(scale(self._across(η, step), η))
        mean = zeros_like(self._upper)
        for sample in samples:
            mean = axpy(1.0 / count, sample, mean)
        if all(not bool(t.any()) for t in mean.values()):
            raise UnseenHyperparameterError(f"no hyperparameter has a path to the outer loss: {_UNSEEN}")
        spread = math.sqrt(sum(float(norm(subtract(sample, mean))) ** 2 for sample in samples))
        noise = ratio(spread / math.sqrt(count * (count - 1)), max(float(norm(mean)), self._floor(mean)))
        if not math.isfinite(noise):
            return mean, Certificate("untrusted", reasons=("the outer loss is not finite around here",))
        verdict, reasons = judge(noise, [], by_design=True, hint="raise `directions`")
        verdict = "approximate" if verdict == "exact" else verdict  # the bias of smoothing is not measured
        return mean, Certificate(verdict, error=noise, reasons=tuple(reasons), standard_error=noise)

    def _floor(self, by_step: Vector) -> float:
        """Return the norm below which a gradient over steps counts as zero, from the one over natural values."""
        natural = float(norm(self._response.ranges.unchained(self._upper, by_step)))
        return self._response.gradient_floor * ratio(float(norm(by_step)), natural) if natural > 0.0 else 0.0


_UNSEEN = (
    "the outer loss after training is the same at every step, to the last bit. Take it out of `hparams`, or use it in "
    "a loss or in the inner loop; a loop that rounds it (a number of trees) needs a larger `step`"
)
