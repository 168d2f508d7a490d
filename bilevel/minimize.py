"""SciPy's L-BFGS-B on vectors of numbers: one place that knows its options and its threads.

Byrd, Lu, Nocedal and Zhu, A limited memory algorithm for bound constrained optimization, SIAM J. Sci.
Comput. 16 (1995).
SciPy's line search needs a third to a fifth of the evaluations of `torch.optim.LBFGS` (docs/design.md, "L-BFGS").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, minimize
from threadpoolctl import ThreadpoolController

Array = NDArray[np.float64]

HISTORY = 20  # pairs kept; 20 needed the fewest evaluations on logistic and softmax regression
# Numbers that all pairs together may take, 1 GB in float64; with 10 million unknowns that leaves 6 pairs.
NUMBERS, FEWEST = 2**27, 5


def lbfgs(
    function: Callable[[Array], tuple[float, Array]],
    start: Array,
    *,
    max_steps: int,
    bounds: tuple[Array, Array] | None = None,
    value_rtol: float = 0.0,
    after_step: Callable[[Array], bool] | None = None,
) -> Any:
    """Minimize `function`, which returns a value and its gradient.

    Args:
        function: x `(n,)` -> value, gradient `(n,)`.
        start: `(n,)`.
        max_steps: most iterations.
        bounds: lowest and highest entries, `(n,)` each, infinite for no end.
        value_rtol: stop when an iteration lowers the value by less than this part of it.
        after_step: called with the point that each iteration led to; True stops the run.

    Returns:
        SciPy's OptimizeResult; it stops by itself only where the value cannot be decreased any more.
    """

    def callback(intermediate_result: Any) -> None:
        if after_step is not None and after_step(intermediate_result.x):
            raise StopIteration

    options = {
        "maxcor": history(len(start)),
        "maxiter": max_steps,
        "maxfun": 20 * max_steps + 20,
        "ftol": value_rtol,
        "gtol": 0.0,
    }
    ends = None if bounds is None or not np.isfinite(bounds).any() else Bounds(*bounds)
    with _one_blas_thread():
        return minimize(function, start, jac=True, method="L-BFGS-B", bounds=ends, callback=callback, options=options)


def far_lbfgs(
    function: Callable[[Array], tuple[float, Array]],
    start: Array,
    *,
    max_steps: int,
    bounds: tuple[Array, Array],
    after_step: Callable[[Array], bool],
) -> None:
    """Minimize as `lbfgs` does, with a first step that may be longer than SciPy's, whose norm is 1.

    It goes to where the value would be zero were it linear, but no entry moves by more than 1. A step of norm 1 moves
    each of n entries by 1 / √n, and SciPy then takes a trial for every factor of 5. The unit is a power of two, which
    changes no digit of a point.
    """
    value, gradient = function(start)
    size, largest = float(np.linalg.norm(gradient)), float(np.abs(gradient).max())
    unit = 1.0
    if largest > 0.0:
        unit = 2.0 ** math.floor(math.log2(max(1.0, min(size / largest, abs(value) / size))))

    def in_units(x: Array) -> tuple[float, Array]:
        value, gradient = function(x * unit)
        return value, gradient * unit

    ends = bounds[0] / unit, bounds[1] / unit
    lbfgs(in_units, start / unit, max_steps=max_steps, bounds=ends, after_step=lambda x: after_step(x * unit))


def history(unknowns: int) -> int:
    """Return how many pairs are kept of so many unknowns."""
    return max(FEWEST, min(HISTORY, NUMBERS // (2 * unknowns)))


@cache
def _blas_of_scipy() -> ThreadpoolController:
    controller = ThreadpoolController()
    paths = [str(library["filepath"]) for library in controller.info()]
    return controller.select(filepath=[p for p in paths if "scipy" in p or "numpy" in p])


def _one_blas_thread() -> Any:
    """Keep SciPy's small dot products on one thread.

    Its waiting threads slow torch's down: 15 times on 30 unknowns, measured on 2 cores.
    """
    return _blas_of_scipy().limit(limits=1, user_api="blas")
