"""The slope at 0 of a function of one number that may be noisy, jump, or end: fits through points at many scales.

    φ(x) ≈ c0 + c1 x + c2 x² + c3 x³ + c4 x⁴        least squares over 0, ±X, ±X/r, ±X/r² ...; the slope is c1

Five points are fitted exactly: c1 is then a central difference after one extrapolation (Richardson), or its one-sided
relative where a range ends. The error is the largest of three. What two degrees change is truncation; what |x| would
take over beside x² is a kink. What a fit leaves over is noise, and so much of c1 is noise too: the idea of Moré and
Wild, Estimating computational noise, SIAM J. Sci. Comput. 33 (2011), who take high differences. Deliberate difference:
theirs is one noise at the smallest scale; here it is measured at every scale, since a staircase has none at the
smallest. Agreement alone proves nothing: of many noisy differences two always agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DEGREE = 4
TRUSTED = 10.0  # times one sample of noise; 1 + 9 / n for n of them is about the 99.5 % quantile of Student's t
ROUNDING = 3.0  # units in the last place of φ that count as noise whatever is measured
RATIO = 1.9  # r: no whole number, in step with which an oscillation or a staircase would look straight
WINDOW = RATIO**6  # points this much nearer to 0 than the farthest say no more
LEVELS = 16  # tried one after another
JUMP, JUMPS = RATIO**4, 4  # to smaller scales, where what looked like noise may turn out to be steep
CLEAR = 0.1  # relative error of a slope that is no accident
GOOD = 100.0  # times the error asked for: no more search


@dataclass(frozen=True)
class Fit:
    """A slope.

    Attributes:
        slope: c1.
        error: estimated, absolute.
        noise: the part of it that is noise.
        reach: X; 0 where nothing was found.
        flat: φ is the same at all points, so nothing is known.
        exact: the fit leaves rounding, no more.
    """

    slope: float
    error: float
    noise: float
    reach: float
    flat: bool = False
    exact: bool = False

    @property
    def clear(self) -> bool:
        """Say whether the slope is no accident."""
        return not self.flat and self.error <= CLEAR * abs(self.slope)


class Line:
    """A function of one number around 0, and what has been seen of it.

    Args:
        value: φ; infinite where it has no value.
        here: φ(0).
        room: how far x may go down and up, both at least 0.
        rounding: relative, of φ's values.
        grain: rounding of x.
    """

    def __init__(
        self, value: Callable[[float], float], here: float, room: tuple[float, float], rounding: float, grain: float
    ) -> None:
        self._value, self._here, self._rounding, self._grain = value, here, rounding, grain
        self._points = {0.0: here}
        self._room = {-1.0: room[0], 1.0: room[1]}
        self._tried: list[float] = []

    @property
    def farthest(self) -> float:
        """Return how far x may go."""
        return max(self._room.values())

    @property
    def flat(self) -> bool:
        """Say whether all values seen are the same."""
        return all(y == self._here for y in self._points.values())

    def at(self, reach: float) -> Fit:
        """Return the slope over points up to `reach`, at least five."""
        x = reach
        while self._take(x) and (len(self._seen(reach)) <= DEGREE or x == reach):
            x /= RATIO
        if len(self._seen(reach)) == DEGREE + 1 and self._fit(reach).exact:
            self._take(x)
        self._tried.append(reach)
        return self._fit(reach)

    def best(self) -> Fit:
        """Return the clear slope over the shortest reach, or a more certain one that agrees; else the most certain."""
        fits = sorted((self._fit(reach) for reach in self._tried), key=lambda fit: fit.reach)
        if self.flat:
            return fits[-1]
        found = None
        for fit in (fit for fit in fits if fit.clear):
            agrees = found is not None and abs(fit.slope - found.slope) <= fit.error + found.error
            if found is None or (agrees and fit.error < found.error):
                found = fit
        return found or min((fit for fit in fits if not fit.flat), key=lambda fit: fit.error)

    def central(self, step: float) -> Fit:
        """Return the central difference of one step, or where a range ends before it the fit; the error by `at`."""
        fit = self._fit(step)
        ends = [self._points.get(x) for x in (step, -step)]
        if ends[0] is None or ends[1] is None:
            return fit
        slope = (ends[0] - ends[1]) / (2.0 * step)
        return Fit(slope, max(abs(slope - fit.slope), fit.noise), fit.noise, step, fit.flat)

    def refine(self, first: float, farthest: float, target: float) -> None:
        """Look for a reach whose error is at most `target`; where there is noise, at much shorter ones too."""
        now, farthest = self._fit(first), min(farthest, self.farthest)
        noisy = now.flat or now.noise >= 0.5 * now.error
        if not noisy:
            self._explore(first, 1.0 / RATIO, farthest, target)
        if noisy or self.best().error > GOOD * target:
            self._explore(first, RATIO, farthest, target)
            self._jump(first, farthest, target)

    def _jump(self, reach: float, farthest: float, target: float) -> None:
        for _ in range(0 if self.flat else JUMPS):
            reach /= JUMP
            fit = self.at(reach)
            if fit.clear:
                self._explore(reach, RATIO if fit.noise >= 0.5 * fit.error else 1.0 / RATIO, farthest, target)
                return

    def _explore(self, reach: float, way: float, farthest: float, target: float) -> None:
        """Go on to longer or to shorter reaches, until the error is small or what limits it only grows there."""
        least = math.inf
        for _ in range(LEVELS):
            reach *= way
            if reach > farthest:
                return
            fit = self.at(reach)
            noisy = fit.noise >= 0.5 * fit.error
            if (fit.error <= target and not fit.flat) or (fit.error > 8.0 * least and noisy == (way < 1.0)):
                return
            least = min(least, math.inf if fit.flat else fit.error)

    def _take(self, x: float) -> bool:
        """Evaluate φ at ±x, where there is room; say whether going on towards 0 makes sense."""
        for sign in (1.0, -1.0):
            if x <= self._room[sign] and sign * x not in self._points:
                y = self._value(sign * x)
                if math.isfinite(y):
                    self._points[sign * x] = y
                else:
                    self._room[sign] = 0.75 * x
        return x > 1e-12

    def _seen(self, reach: float) -> list[float]:
        return [x for x in self._points if abs(x) <= reach and (x == 0.0 or abs(x) * WINDOW >= reach)]

    def _fit(self, reach: float) -> Fit:
        seen = self._seen(reach)
        if len(seen) <= DEGREE:
            return Fit(0.0, math.inf, math.inf, reach)
        x, y = np.array(seen) / reach, np.array([self._points[x] - self._here for x in seen])
        powers = np.vander(x, DEGREE + 1, increasing=True)
        slopes = np.linalg.pinv(powers)[1]
        slope, low = float(slopes @ y), float(np.linalg.pinv(powers[:, :3])[1] @ y)
        spare = len(seen) - DEGREE - 1
        left = _residual(powers if spare else powers[:, :DEGREE], y) / math.sqrt(spare or 1)
        rounded = self._rounding * max(abs(self._points[x]) for x in seen) + abs(slope) * self._grain / reach
        noise = (1.0 + (TRUSTED - 1.0) / (spare or 1)) * left + ROUNDING * rounded
        noise *= float(np.linalg.norm(slopes))
        error = max(abs(slope - low), noise, _kink(x, y))
        return Fit(slope / reach, error / reach, noise / reach, reach, not y.any(), left <= ROUNDING * rounded)


def _kink(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Return half of the jump of the slope at 0: the coefficient of |x| beside 1, x, x² and x³."""
    if not (x.min() < 0.0 < x.max()):
        return 0.0
    return abs(float(np.linalg.pinv(np.stack([x**0, x, x**2, x**3, np.abs(x)], axis=1))[4] @ y))


def _residual(powers: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(y - powers @ (np.linalg.pinv(powers) @ y)))
