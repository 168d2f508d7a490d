"""The frame of the methods that move the inner variables and the adjoint themselves, on minibatches.

One call is one or more steps of w and v at the λ it is called with, and then D_λ; the outer optimizer takes the step of
λ. See `bilevel.solvers.directions` for the formulas.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor

from bilevel.certificate import Hypergradient
from bilevel.errors import InvalidValueError, NonFiniteError
from bilevel.operators import LinearOperator
from bilevel.solvers.base import Linearization, Response, State, ratio
from bilevel.solvers.directions import Directions, Minibatches, Source
from bilevel.solvers.linear.base import check_count, dtype_of
from bilevel.solvers.linear.lanczos import extreme_eigenvalues
from bilevel.solvers.tracking import Here, Tracking
from bilevel.vector import Vector, axpy, detach, dot, is_finite, norm, scale, zeros_like

DRAWS = 4  # batches on which the curvature is measured
RECHECK = 200  # calls after which it is measured again: w moves; more where the last times hardly changed it
FAR = 0.5  # or where a hyperparameter has moved so far, relative: a step of 1 / L will do until L has doubled
FARTHER = 1.0  # the smallest one, which takes more products and moves no step
SAME = 0.2  # a relative change of it after which it may be twice as far until the next time
FARTHEST = (2.0, 8.0)  # but no farther: of the largest one, which the steps of v watch over too, and of the smallest
GREW_INNER = 2.0  # or where the inner gradient of fixed data has: right steps do not let it grow
ALONE, BEGINS = 1000, 100  # steps of the first call, of one hypergradient alone and of a run on minibatches
ROUNDS = 8  # hypergradients of the first call, whose spread is its standard error
HALVES = 500  # steps after which a decaying step size has begun to fall
GREW = 1e3  # a defect this many times the right-hand side, along negative curvature, is no transient
RITZ = 30  # products of each draw for the smallest one
STANDS = {8: 1e-10}  # relative move that counts as none, by the bytes of a number
STANDS_ELSE = 1e-6


class Kept(TypedDict):
    """What a call leaves to the next one.

    Attributes:
        adjoint: v.
        step: what to add to w first; None: nothing.
        largest: the largest curvature met.
        at: λ where it was measured.
        lowest_at: λ where the smallest one was.
        far: how far λ may go until each of them is measured again.
        checked: the call in which both were.
        count: steps so far.
        gradient: the hypergradient, for its moving average.
        tracking: see `Tracking`.
        memory: of the source.
    """

    adjoint: Vector
    step: Vector | None
    largest: float
    at: Vector
    lowest_at: Vector
    far: tuple[float, float]
    checked: int
    count: int
    gradient: Vector
    tracking: dict[str, Any]
    memory: Any


class Moving:
    """w and v on their way at one λ; a step that was found is due until `go`."""

    def __init__(self, held: bool, lower: Vector, kept: Kept | None) -> None:
        self.held = held
        self.w, self.step = detach(lower), None if kept is None else kept["step"]
        self.v = zeros_like(self.w) if kept is None else kept["adjoint"]
        self.next: Vector | None = None
        self.largest = 0.0 if kept is None else kept["largest"]
        self.at: Vector = {} if kept is None else kept["at"]
        self.lowest_at: Vector = {} if kept is None else kept["lowest_at"]
        self.far, self.farther = (FAR, FARTHER) if kept is None else kept["far"]
        self.count, self.checked = (0, 0) if kept is None else (kept["count"], kept["checked"])
        self.grew = False
        self._least, self._allowed = math.inf, GREW_INNER

    def go(self) -> None:
        """Take the steps that are due."""
        if self.step is not None and not self.held:
            self.w = axpy(1.0, self.step, self.w)
        if self.next is not None:
            self.v = self.next
        self.step = self.next = None

    def runs_away(self, residual: Vector) -> bool:
        """Say whether the inner gradient of fixed data grew; by twice as much each time that it is asked for."""
        length = float(norm(residual))
        grew = length > self._allowed * self._least
        self._least = length if grew else min(self._least, length)
        self._allowed *= 2.0 if grew else 1.0
        return grew

    def plan_lower(self, residual: Vector, size: float) -> None:
        """Leave a step of w due."""
        self.count += 1
        self.step = None if self.held else scale(-size, residual)

    def plan_adjoint(self, found: Directions, size: float) -> None:
        """Leave a step of v due, and look at the curvature that it met."""
        length = float(norm(self.v))
        if length > 0.0:
            self.largest = max(self.largest, ratio(float(norm(found.product)), length))
        self.grew = float(norm(found.adjoint)) > GREW * found.rhs and float(dot(self.v, found.product)) < 0.0
        self.next = axpy(-size, found.adjoint, self.v)
        if not is_finite(self.next):
            raise NonFiniteError(
                "the adjoint grew beyond all numbers: the inner Hessian has negative curvature, or `lr` is above "
                "2 / (largest curvature); regularize the inner loss, or leave `lr` to the method, which measures it",
                "adjoint",
            )

    def stands(self) -> bool:
        """Say whether the steps that are due are next to nothing."""
        limit = STANDS.get(dtype_of(self.w).itemsize, STANDS_ELSE)
        by_w = 0.0 if self.step is None else ratio(float(norm(self.step)), float(norm(self.w)))
        moved = 0.0 if self.next is None else float(norm(axpy(-1.0, self.v, self.next)))
        return by_w <= limit and ratio(moved, float(norm(self.v))) <= limit


@dataclass(frozen=True)
class Loop:
    """The frame; a method adds `_warm` and `_round`.

    Args:
        lr: step size of w and v; None: 1 / (largest curvature), measured on a few batches and watched. It is measured
            again where λ has moved by a quarter, and on fixed data where the inner gradient has doubled.
        decay: the step size falls like (1 + t / 500)^-decay over the steps t; None: 1/2 with minibatches (the exponent
            of the theorem for decreasing steps), 0 on fixed data, which needs no decay.
        momentum: share of the last hypergradient in the next one, in [0, 1): larger is less noisy and lags behind.
        warmup: steps of the first call, which has nothing to start from; on fixed data it ends earlier where w and v
            stand still. More is more accurate and slower. None: 1,000, and 100 where `solve` begins on streams of
            minibatches: the steps of λ that follow move w and v on, and the first certificates say that they lag.
    """

    lr: float | None = None
    decay: float | None = None
    momentum: float = 0.0
    warmup: int | None = None

    reach: ClassVar[float] = 1.0
    """Step size times the largest curvature on minibatches, where that is measured."""
    falls: ClassVar[float] = 0.5
    """What `decay` is on minibatches unless given."""
    averages: ClassVar[bool] = True
    """The first call returns a mean over its second half: single draws are noisy."""
    forgets: ClassVar[bool] = False
    """v is found anew in every call."""

    def __post_init__(self) -> None:
        if self.warmup is not None:
            check_count(self.warmup, "warmup")
        if self.lr is not None and not self.lr > 0.0:
            raise InvalidValueError(f"`lr` is {self.lr!r}, expected a positive number, or None to have it measured")
        if self.decay is not None and not 0.0 <= self.decay <= 1.0:
            raise InvalidValueError(f"`decay` is {self.decay!r}, expected 0 <= decay <= 1, or None")
        if not 0.0 <= self.momentum < 1.0:
            raise InvalidValueError(f"`momentum` is {self.momentum!r}, expected 0 <= momentum < 1")

    @property
    def first(self) -> int:
        """Steps of the first call."""
        return ALONE if self.warmup is None else self.warmup

    def in_a_run(self) -> Loop:
        """Return the method as it begins a run on minibatches."""
        return replace(self, warmup=BEGINS) if self.warmup is None else self

    def __call__(
        self, response: Response, lower: Vector, upper: Vector, state: State = None
    ) -> tuple[Hypergradient, State]:
        """Return the hypergradient where w and v are now; `state` holds them and the steps that are due."""
        kept: Kept | None = state
        moving = Moving(response.held, lower, kept)
        source = self._source(response, moving, upper, None if kept is None else kept["memory"])
        left = None if kept is None else kept["tracking"]
        tracking = Tracking.resumed(source.exact, response.held, self.forgets, left)
        several = kept is None and not source.exact
        far = _moved(moving.at, upper, FAR if source.exact else moving.far)
        if far:
            before, moving.largest, moving.at = (
                moving.largest,
                _largest(_systems(source, moving, upper)),
                detach(upper),
            )
            moving.far = _reach(moving.far, FAR, FARTHEST[0], before, moving.largest)
        if kept is None:
            self._warm(moving, source, upper, tracking, self.first // 2 if several else self.first)
        rounds = [self._round(moving, source, upper, tracking, several) for _ in range(ROUNDS if several else 1)]
        last, gradients = rounds[-1][1], [gradient for gradient, _ in rounds]
        gradient = tracking.sampled(gradients, None if kept is None else kept["gradient"], self.momentum, self.averages)
        loss = sum(found.loss for _, found in rounds) / len(rounds) if self.averages else last.loss
        if not source.exact and tracking.noise is not None:  # no verdict waits for it else
            self._measure(moving, source, upper, tracking)
        here = Here(source.outer, source.system, moving.w, moving.v, upper, last, gradient, moving.grew)
        certificate = tracking.certificate(response, here, far)
        if tracking.highest is not None and source.exact:
            moving.largest = tracking.highest
        after = Kept(
            adjoint=moving.v if moving.next is None else moving.next,
            step=moving.step,
            largest=moving.largest,
            at=moving.at,
            lowest_at=moving.lowest_at,
            far=(moving.far, moving.farther),
            checked=moving.checked,
            count=moving.count,
            gradient=gradient,
            tracking=tracking.state(),
            memory=source.memory(),
        )
        return Hypergradient(gradient, loss, moving.w, certificate, response.cost), after

    def _source(self, response: Response, moving: Moving, upper: Vector, memory: Any) -> Source:
        """Return where the directions come from; `memory` is what the last call's source kept."""
        return Minibatches(response)

    def _size(self, moving: Moving, source: Source) -> float:
        """Return the step size of the next step."""
        size = (1.0 if source.exact else self.reach) / moving.largest if moving.largest > 0.0 else 1.0
        decay = self.decay if self.decay is not None else 0.0 if source.exact else self.falls
        return (size if self.lr is None else self.lr) / float((1.0 + moving.count / HALVES) ** decay)

    def _measure(self, moving: Moving, source: Source, upper: Vector, tracking: Tracking) -> None:
        """Measure both ends of the curvature on a few draws where that is due."""
        due = tracking.calls - moving.checked >= RECHECK * moving.farther
        if not due and not _moved(moving.lowest_at, upper, moving.farther):
            return
        moving.checked = tracking.calls
        systems, before, first = _systems(source, moving, upper), tracking.lowest, not moving.lowest_at
        moving.largest, tracking.lowest = _largest(systems), _smallest(systems, moving.w)
        tracking.highest, moving.at, moving.lowest_at = moving.largest, detach(upper), detach(upper)
        if not first:
            moving.farther = _reach(moving.farther, FARTHER, FARTHEST[1], before or 0.0, tracking.lowest)

    def _watch(self, moving: Moving, source: Source, upper: Vector, residual: Vector) -> None:
        """Measure the curvature again where w runs away."""
        if self.lr is None and source.exact and not moving.held and moving.runs_away(residual):
            moving.largest = _largest(_systems(source, moving, upper))

    def _descend(self, moving: Moving, source: Source, upper: Vector, tracking: Tracking, steps: int) -> None:
        """Take steps of w alone, each on a draw of its own; where w is held, only look."""
        for _ in range(steps):
            residual = source.linearize(moving.w, upper).residual
            tracking.see_lower(residual)
            self._watch(moving, source, upper, residual)
            moving.plan_lower(residual, self._size(moving, source))
            stands = source.exact and moving.stands()
            moving.go()
            if stands:
                break

    @abstractmethod
    def _warm(self, moving: Moving, source: Source, upper: Vector, tracking: Tracking, steps: int) -> None:
        """Take the steps of the first call."""

    @abstractmethod
    def _round(
        self, moving: Moving, source: Source, upper: Vector, tracking: Tracking, several: bool
    ) -> tuple[Vector, Directions]:
        """Move, and return D_λ and the last directions; `several`: one of the rounds of the first call."""


def _moved(at: Vector, upper: Vector, far: float) -> bool:
    """Say whether a hyperparameter is far from where it was, relative to the smaller of both; so it is from nowhere."""
    return not at or any(_length(t - at[name]) > far * min(_length(t), _length(at[name])) for name, t in upper.items())


def _length(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t))


def _reach(far: float, least: float, most: float, before: float, now: float) -> float:
    """Return how far λ may go until a curvature is measured again: farther where the last move hardly changed it."""
    return min(2.0 * far, most) if abs(now - before) <= SAME * min(abs(now), abs(before)) else least


def _systems(source: Source, moving: Moving, upper: Vector) -> list[Linearization]:
    return [source.sample(k, moving.w, upper) for k in range(1 if source.exact else DRAWS)]


def _largest(systems: list[Linearization]) -> float:
    """Return the largest curvature of any draw: a step that suits the mean may be too long for one of them."""
    return max(extreme_eigenvalues(system.operator)[1] for system in systems)


def _smallest(systems: list[Linearization], w: Vector) -> float:
    """Return the smallest Ritz value of the mean of the draws."""

    def mean(v: Vector) -> Vector:
        total = zeros_like(v)
        for system in systems:
            total = axpy(1.0 / len(systems), system.operator(v), total)
        return total

    return extreme_eigenvalues(LinearOperator(mean, w, symmetric=True), RITZ)[0]
