"""Differences of the outer loss after whole inner loops: for loops that cannot be differentiated at all.

    dF/du_i ≈ (F(u + h e_i) - F(u - h e_i)) / 2h                               one coordinate after another
    dF/du   ≈ 1/n sum_k η_k (F(u + h η_k) - F(u - h η_k)) / 2h,  η_k ~ N(0, I)  random directions, antithetic

Salimans, Ho, Chen, Sidor and Sutskever, Evolution strategies as a scalable alternative to reinforcement learning, 2017
(arXiv 1703.03864), algorithm 1 with the mirrored samples of section 2.1: its mean is the gradient of F smoothed over h,
which is h^2 away, and its relative variance is (m + 1) / n for m hyperparameters. The steps are in u, the unconstrained
values, so every λ lies inside of its range, and a positive one is moved by a factor. All loops see the same batches and
random numbers: torch's, and the global ones of NumPy and Python. The step of coordinates checks itself, and turns
one-sided where a range ends (see `bilevel.solvers.line`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.certificate import Certificate, Hypergradient, judge
from bilevel.errors import InvalidValueError, NonFiniteError, UnseenHyperparameterError
from bilevel.randomness import get_host, replayed_host
from bilevel.solvers.about import About, Terms
from bilevel.solvers.base import Response, State, ratio
from bilevel.solvers.line import Fit, Line
from bilevel.solvers.linear.base import check_count, dtype_of
from bilevel.vector import Vector, axpy, cast, flatten, is_finite, norm, scale, size, subtract, unflatten, zeros_like

COORDINATES = 32  # hyperparameters up to which each has its own difference by default
DIRECTIONS = 16
# Relative changes of hyperparameters. Coordinates go twice as far too; what a loop's end is uncertain by, 1e-9 and
# 1e-5, is then 1e-7 and 1e-4 of a difference.
STEP = {torch.float64: 5e-3, torch.float32: 5e-2}
AGREEMENT = 8e-4  # error that ends the search: below 1e-3, where "exact" begins
FARTHEST = 1.5  # reach that the search ends at: a factor of 4.5, or a change by half of the size


@dataclass(frozen=True)
class ZeroOrder:
    """Differentiate any inner loop by running it at other hyperparameters.

    Sees everything that the loop uses, learning rates included. Coordinates are exact up to rounding for a loop that is
    a smooth function of the hyperparameters; random directions are unbiased up to step^2, and noisy.

    Args:
        directions: random directions, at least 2, two loops each; more is less noisy and slower. None: one coordinate
            after another up to 32 hyperparameters, four loops each; 16 random directions above.
        step: relative change of the hyperparameters, of their unconstrained values where they have a range; larger
            feels less noise of the loop and is less exact. None: 0.005 (float32: 0.05); coordinates look for a better
            one where the loop is noisy, steep or a staircase, which takes up to 60 loops each.
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
        end = loops.end(upper)
        if not is_finite(end):
            raise NonFiniteError("the inner loop ended in NaN or infinity", "inner variables")
        outer_loss = loops.loss(end, upper)
        calls: int = state or 0
        step = self.step or STEP.get(dtype_of(upper), 0.1)
        if self.directions is None and size(upper) <= COORDINATES:
            gradient, certificate = loops.by_coordinates(outer_loss, step, self.step is not None)
        else:
            gradient, certificate = loops.by_directions(step, self.directions or DIRECTIONS, (self.seed, calls))
        if not is_finite(gradient):
            raise NonFiniteError("the outer loss is not finite around these hyperparameters", "hypergradient")
        return Hypergradient(gradient, outer_loss, end, certificate, response.cost), calls + 1


class _Loops:
    """The outer loss at the end of the inner loop, as a function of steps in the hyperparameters."""

    def __init__(self, response: Response, lower: Vector, upper: Vector) -> None:
        self._response, self._lower, self._upper = response, lower, upper
        self._host = get_host()

    def loss(self, end: Vector, upper: Vector) -> float:
        with torch.no_grad():
            return float(self._response.loss(end, upper).detach())

    def end(self, upper: Vector) -> Vector:
        """Run the loop, with the same random numbers every time; an error of its own says where it came up."""
        try:
            with replayed_host(self._host):
                return self._response.solve(self._lower, upper)
        except Exception as error:
            values = ", ".join(f"{self._response.label(name)} = {_shown(t)}" for name, t in upper.items())
            error.add_note(f"bilevel: while zero-order ran the inner loop at {values}")
            raise

    def _at(self, step: Vector) -> float:
        """Return F a step away; infinite where the loop fails."""
        upper = self._response.ranges.moved(self._upper, step)
        try:
            return self.loss(self.end(upper), upper)
        except NonFiniteError:
            return math.inf

    def _along(self, i: int) -> Callable[[float], float]:
        """Return F as a function of steps in the hyperparameter i of all."""
        unit = torch.zeros(size(self._upper), dtype=torch.float64)
        unit[i] = 1.0
        return lambda x: self._at(unflatten(x * unit, self._upper))

    def by_coordinates(self, here: float, step: float, fixed: bool) -> tuple[Vector, Certificate]:
        """Return dF/dλ, and how far each slope is uncertain."""
        ranges, upper = self._response.ranges, self._upper
        ones = {name: torch.ones_like(t, dtype=torch.float64) for name, t in upper.items()}
        weights = flatten(ranges.unchained(cast(upper, torch.float64), ones)).abs()  # of dF/dλ beside dF/dstep
        down, up = (flatten(t) for t in ranges.room(upper))
        rounding = torch.finfo(dtype_of(self._lower)).eps
        grains = torch.finfo(dtype_of(upper)).eps * flatten(upper).double().abs() * weights
        lines = [
            Line(self._along(i), here, (float(down[i]), float(up[i])), rounding, float(grains[i]))
            for i in range(len(weights))
        ]
        first = step if fixed else 2.0 * step
        for line in lines:
            line.at(min(first, line.farthest))
        if fixed:
            fits = [line.central(min(first, line.farthest)) for line in lines]
        else:
            fits = _refined(lines, weights, first, self._response.gradient_floor)
        self._check_seen(lines)
        gradient = unflatten(torch.tensor([fit.slope for fit in fits], dtype=torch.float64) * weights, upper)
        whole = max(float(norm(gradient)), self._response.gradient_floor)
        error = ratio(float((torch.tensor([fit.error for fit in fits], dtype=torch.float64) * weights).norm()), whole)
        gradient = {name: gradient[name].to(t) for name, t in upper.items()}
        if not math.isfinite(error):
            return gradient, Certificate("untrusted", reasons=(_ROUGH,))
        verdict, reasons = judge(error, [], by_design=True, hint=_ROUGH)
        far = max(fit.reach for fit in fits if not fit.flat)
        notes = (_FAR.format(first=first, far=far),) if far > first else ()
        return gradient, Certificate(verdict, error=error, reasons=tuple(reasons), notes=notes)

    def _check_seen(self, lines: list[Line]) -> None:
        """Raise for a tensor that changes nothing, however far it is moved."""
        flat = unflatten(torch.tensor([line.flat for line in lines]), self._upper)
        for name, t in flat.items():
            if bool(t.all()):
                raise UnseenHyperparameterError(
                    f"{self._response.label(name)} has no path to the outer loss: {_UNSEEN}"
                )

    def by_directions(self, step: float, count: int, seed: tuple[int, int]) -> tuple[Vector, Certificate]:
        """Return the mean over random directions, and its standard error."""
        generator = torch.Generator().manual_seed(1_000_003 * seed[0] + seed[1])
        down, up = self._response.ranges.room(self._upper)
        samples = []
        for _ in range(count):
            flat = torch.randn(size(self._upper), generator=generator, dtype=torch.float64)
            η = unflatten(flat.to(flatten(self._upper)), self._upper)
            # Where a range ends, both points move inwards together, and nearer to each other if they must.
            wide = {n: torch.minimum(step * t.abs(), (down[n] + up[n]) / 2.0).to(t) for n, t in η.items()}
            middle = {n: torch.minimum((w - down[n]).clamp(min=0.0), up[n] - w).to(w) for n, w in wide.items()}
            ends = [self._at(axpy(way, {n: w * η[n].sign() for n, w in wide.items()}, middle)) for way in (1.0, -1.0)]
            samples.append(scale((ends[0] - ends[1]) / (2.0 * step), η))
        mean = zeros_like(self._upper)
        for sample in samples:
            mean = axpy(1.0 / count, sample, mean)
        if all(not bool(t.any()) for t in mean.values()):
            raise UnseenHyperparameterError(f"no hyperparameter has a path to the outer loss: {_UNSEEN}")
        gradient, *moved = (self._response.ranges.unchained(self._upper, t) for t in (mean, *samples))
        spread = math.sqrt(sum(float(norm(subtract(sample, gradient))) ** 2 for sample in moved))
        whole = max(float(norm(gradient)), self._response.gradient_floor)
        noise = ratio(spread / math.sqrt(count * (count - 1)), whole)
        if not math.isfinite(noise):
            return gradient, Certificate("untrusted", reasons=("the outer loss is not finite around here",))
        verdict, reasons = judge(noise, [], by_design=True, hint="raise `directions`")
        verdict = "approximate" if verdict == "exact" else verdict  # the bias of smoothing is not measured
        return gradient, Certificate(verdict, error=noise, reasons=tuple(reasons), standard_error=noise)


def _refined(lines: list[Line], weights: Tensor, first: float, floor: float) -> list[Fit]:
    """Search along the hyperparameters whose slopes are the most uncertain, until all together are certain enough."""
    todo = set(range(len(lines)))
    while True:
        fits = [line.best() for line in lines]
        slopes, errors = (torch.tensor(t, dtype=torch.float64) * weights for t in zip(*_figures(fits), strict=True))
        worst = max(todo, key=lambda i: math.inf if lines[i].flat else float(errors[i]), default=None)
        target = AGREEMENT * max(float(slopes.norm()), floor)
        if worst is None or (float(errors.norm()) <= target and not lines[worst].flat):
            return fits
        todo.remove(worst)
        lines[worst].refine(first, FARTHEST, target / math.sqrt(len(lines)) / float(weights[worst]))


def _figures(fits: list[Fit]) -> list[tuple[float, float]]:
    return [(fit.slope, fit.error) for fit in fits]


def _shown(t: Tensor) -> str:
    """Return values for a message, the first few of many."""
    flat = [f"{x:.6g}" for x in t.reshape(-1)[:6].tolist()]
    return flat[0] if t.dim() == 0 else f"[{', '.join(flat)}{', ...' if t.numel() > len(flat) else ''}]"


_ROUGH = (
    "the outer loss after training is no smooth function of the hyperparameters on any scale tried, or too noisy: "
    "train further, fix the random numbers of your loop, use float64, or give a larger `step`"
)
_FAR = (
    "on steps of {first:.2g} the outer loss is flat, noisy or rough; this is its slope over steps of up to {far:.2g} "
    "(1 is a factor of e, or the size of a hyperparameter without a range)"
)
_UNSEEN = (
    "the outer loss after training is the same at every step, to the last bit. Take it out of `hparams`, or use it in "
    "a loss or in the inner loop; a loop that rounds it (a number of trees) needs a larger `step`"
)
