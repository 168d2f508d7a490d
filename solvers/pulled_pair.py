"""Inner variables trained on the inner loss, and others that the outer loss pulls at, on their way at one λ.

See `bilevel.solvers.value_gap` for the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from bilevel.errors import NonFiniteError
from bilevel.solvers.base import OuterGradient, Response, inner_scale, outer_gradient
from bilevel.solvers.differences import Differences, inner_gradient
from bilevel.solvers.linear.base import dtype_of
from bilevel.solvers.linear.lanczos import extreme_eigenvalues
from bilevel.vector import Vector, axpy, detach, is_finite, norm, subtract

STANDS = {8: 1e-10}  # relative move that counts as none, by the bytes of a number
STANDS_ELSE = 1e-6
FAR = 1e-4  # relative move whose difference of gradients shows curvature and no rounding


class Kept(TypedDict):
    """What a call leaves to the next one.

    Attributes:
        y: the pulled inner variables.
        steep, outer_steep: L and L_f.
        unit: |∂f/∂y| over the scale of the inner gradient, in the first call; what γ is measured by.
        calls: so far.
        error: as last measured; None: it came to no end.
        near: z was near the inner solution there.
        residuals, gamma: of that measurement.
        low: the smallest curvature there.
    """

    y: Vector
    steep: float
    outer_steep: float
    unit: float
    calls: int
    error: float | None
    near: bool
    residuals: float
    gamma: float
    low: float


@dataclass(frozen=True)
class Seen:
    """Gradients of one look at the pair: of f and g at y, and of g at z."""

    outer: OuterGradient
    inner: OuterGradient
    plain: OuterGradient


class Pair:
    """z, which is trained on g alone, and y, which f pulls at, at one λ.

    Attributes:
        y, z: see above.
        steep, outer_steep: L and L_f.
        unit: see `Kept`.
    """

    def __init__(self, response: Response, lower: Vector, upper: Vector, kept: Kept | None, lr: float | None) -> None:
        self.response, self.upper, self._lr = response, upper, lr
        self.z = detach(lower)
        self.y = self.z if kept is None else kept["y"]
        self.steep, self.outer_steep, self.unit = 0.0, 0.0, 1.0
        self._limit = STANDS.get(dtype_of(lower).itemsize, STANDS_ELSE)
        self._before: tuple[Vector, Seen] | None = None
        if kept is not None:
            self.steep, self.outer_steep, self.unit = kept["steep"], kept["outer_steep"], kept["unit"]

    @property
    def size(self) -> float:
        """Return the step size of z."""
        return self._lr if self._lr is not None else 1.0 / self.steep if self.steep > 0.0 else 1.0

    def begin(self, warmup: int) -> None:
        """Train z, begin y there, and find the scale of γ."""
        self.steep = extreme_eigenvalues(Differences(self.response, self.z, self.upper).operator)[1]
        self.z = self.y = self.train(self.z, warmup)
        system = Differences(self.response, self.z, self.upper)
        self.steep = max(self.steep, extreme_eigenvalues(system.operator)[1])
        pull = float(norm(outer_gradient(self.response, self.z, self.upper).lower))
        floor = inner_scale(self.response, system, self.z, self.upper)
        self.unit = pull / floor if pull > 0.0 and floor > 0.0 else 1.0

    def train(self, w: Vector, steps: int) -> Vector:
        """Return w after gradient steps of g; where it was given as the solution, it stays."""
        before: tuple[Vector, Vector] | None = None
        for _ in range(0 if self.response.held else steps):
            residual = inner_gradient(self.response, w, self.upper).lower
            if before is not None:
                self.steep = max(self.steep, _secant(w, before[0], residual, before[1]))
            before = w, residual
            w = _moved(w, residual, self.size)
            if self.size * float(norm(residual)) <= self._limit * float(norm(w)):
                break
        return w

    def look(self) -> Seen:
        """Return all gradients, and take note of the curvatures that they show."""
        outer = outer_gradient(self.response, self.y, self.upper)
        inner, plain = (inner_gradient(self.response, w, self.upper) for w in (self.y, self.z))
        self.steep = max(self.steep, _secant(self.y, self.z, inner.lower, plain.lower))
        seen = Seen(outer, inner, plain)
        if self._before is not None:
            y, old = self._before
            self.outer_steep = max(self.outer_steep, _secant(self.y, y, outer.lower, old.outer.lower))
            self.steep = max(self.steep, _secant(self.y, y, inner.lower, old.inner.lower))
        self._before = self.y, seen
        return seen

    def pull(self, seen: Seen, gamma: float, least: float) -> bool:
        """Move y by D_y, as if γ were at least `least`; say whether neither y nor z is moving any more."""
        direction = axpy(gamma, seen.inner.lower, seen.outer.lower)
        size = 1.0 / (max(gamma, least) / self.size + self.outer_steep)
        self.y = _moved(self.y, direction, size)
        limit = self._limit * float(norm(self.y))
        still = self.response.held or self.size * float(norm(seen.plain.lower)) <= limit
        # What y moves by is beside its distance to z, which is all that D_λ sees of it.
        return still and size * float(norm(direction)) <= self._limit * float(norm(subtract(self.y, self.z)))


def _secant(a: Vector, b: Vector, at_a: Vector, at_b: Vector) -> float:
    """Return the curvature between two points; 0 where they are too close to show any."""
    apart = float(norm(subtract(a, b)))
    return float(norm(subtract(at_a, at_b))) / apart if apart > FAR * float(norm(a)) else 0.0


def _moved(w: Vector, direction: Vector, size: float) -> Vector:
    after = axpy(-size, direction, w)
    if not is_finite(after):
        raise NonFiniteError(
            "the inner variables grew beyond all numbers: the inner loss is not bounded below, or `lr` is above "
            "2 / (largest curvature); leave `lr` to the method, which measures it",
            "inner variables",
        )
    return after
