"""L-BFGS whose first guess of the inverse Hessian is a diagonal that the gradients so far give, within bounds.

    H_0 = γ diag(1 / a),     a_i = root of the mean square of the i-th gradient entries so far (and a little)

Nocedal, Updating quasi-Newton matrices with limited storage, Math. Comp. 35 (1980), with the diagonal of Duchi, Hazan
and Singer, Adaptive subgradient methods, JMLR 12 (2011). A hyperparameter λ = exp(u) has d²F/du² = dF/du + λ² d²F/dλ²,
so that slopes over u say how large its curvatures are, and those of many strengths lie decades apart: a multiple of the
identity moves the few steep ones first, to the ends of their ranges, and a run stays behind there. Fewer unknowns than
there are pairs need no such guess.

Line search: backtracking to a sufficient decrease, or to the approximate one of Hager and Zhang, A new conjugate
gradient method with guaranteed descent, SIAM J. Optim. 16 (2005), equation 4.1, where values differ by rounding only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from bilevel.minimize import Array, history

FIRST, LEAP = 1.0, 1.5  # largest entry of the first step and of any: a factor of 2.7 and of 4.5 for a positive number
FLOOR = 1e-2  # part of the largest a_i that is added to all
DECREASE, FLAT = 1e-4, 1e-9  # of the slope; of the value, below which differences of values are taken for rounding
SHORTEN, LENGTHEN = (0.1, 0.5), 2.0
TRIES = 15

Function = Callable[[Array], tuple[float, Array]]
Free = NDArray[np.bool_]


def scaled_lbfgs(
    function: Function,
    start: Array,
    *,
    max_steps: int,
    bounds: tuple[Array, Array],
    after_step: Callable[[Array], bool],
) -> None:
    """Minimize `function`, which returns a value and its gradient, until `after_step` says so or it falls no more.

    Args:
        function: x `(n,)` -> value, gradient `(n,)`.
        start: `(n,)`, dimensionless, such as logarithms.
        max_steps: most iterations.
        bounds: lowest and highest entries, `(n,)` each.
        after_step: called with the point that each iteration led to; True stops the run.
    """
    x, (value, gradient) = start, function(start)
    model = _Model(len(start))
    for _ in range(max_steps):
        model.see_gradient(gradient)
        found = _search(function, x, value, gradient, model, bounds)
        while found is None and model.pairs:  # which may be of another place
            model.forget()
            found = _search(function, x, value, gradient, model, bounds)
        if found is None or after_step(found[0]):
            return
        model.see_step(found[0] - x, found[2] - gradient, gradient)
        x, value, gradient = found


class _Model:
    """What the steps so far say about the curvature."""

    def __init__(self, size: int) -> None:
        self.pairs: deque[tuple[Array, Array]] = deque(maxlen=history(size))
        self._squares, self._seen, self._stretch = np.zeros(size), 0, 1.0

    def see_gradient(self, gradient: Array) -> None:
        """Take note of the gradient at an accepted point."""
        self._squares, self._seen = self._squares + gradient**2, self._seen + 1

    def see_step(self, step: Array, change: Array, before: Array) -> None:
        """Take note of a step and how it changed the gradient; where it hardly did, the next may be longer."""
        slope = float(before @ step)
        self._stretch = self._stretch * LENGTHEN if slope + float(change @ step) < 0.9 * slope else 1.0
        if float(step @ change) > 1e-10 * float(np.linalg.norm(step) * np.linalg.norm(change)):
            self.pairs.append((step, change))

    def forget(self) -> None:
        """Keep the diagonal alone."""
        self.pairs.clear()
        self._stretch = 1.0

    def direction(self, gradient: Array, free: Free) -> Array:
        """Return -H g along the free entries, none of them longer than `LEAP`."""
        size = np.sqrt(self._squares / self._seen)
        diagonal = 1.0 / (size + FLOOR * size.max())
        q, alphas = gradient * free, []
        for step, change in reversed(self.pairs):
            alphas.append((step @ q) / (step @ change))
            q = q - alphas[-1] * change
        step, change = self.pairs[-1] if self.pairs else (q, q)
        gamma = (step @ change) / (change @ (diagonal * change))
        r = gamma * diagonal * q
        for (step, change), alpha in zip(self.pairs, reversed(alphas), strict=True):
            r = r + step * (alpha - (change @ r) / (step @ change))
        p: Array = -self._stretch * r * free
        longest = float(np.abs(p).max())
        return p * (LEAP / longest if longest > LEAP else 1.0) if self.pairs else p * (FIRST / longest)


def _search(
    function: Function, x: Array, value: float, gradient: Array, model: _Model, bounds: tuple[Array, Array]
) -> tuple[Array, float, Array] | None:
    """Return a lower point, its value and its gradient; None where there is none along the direction."""
    free = ~(((x <= bounds[0]) & (gradient > 0.0)) | ((x >= bounds[1]) & (gradient < 0.0)))
    if not (gradient * free).any():
        return None
    p, length = model.direction(gradient, free), 1.0
    for _ in range(TRIES):
        there = np.clip(x + length * p, *bounds)
        step = there - x
        slope = float(gradient @ step)
        if not slope < 0.0:
            return None
        found, slopes = function(there)
        flat = found <= value + FLAT * abs(value) and float(slopes @ step) <= (2.0 * DECREASE - 1.0) * slope
        if found <= value + DECREASE * slope or flat:
            return there, found, slopes
        length *= min(SHORTEN[1], max(SHORTEN[0], -slope / (2.0 * (found - value - slope))))
    return None
