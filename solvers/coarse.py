"""The size of what truncation leaves out, from a few of the steps that it leaves out.

    |Σ_s p_s| + 3 Σ_s u_s |p_s|      p_s: contribution of a stretch of steps, u_s: how unlike the window its steps are

Each sampled step stands for a stretch: a few adjoints are pulled through it, and a geometric series with the rate at
which they shrank is the rest. A window cannot know that earlier steps are unlike it, as those of a network that starts
far from its minimum are: there adjoints shrink slower, or grow. What such steps contribute is known to a factor only,
hence the second term; where all steps are alike, as those of a quadratic are, it is zero.
"""

from __future__ import annotations

import math

from torch import Tensor

from bilevel.solvers.base import Response, ratio
from bilevel.solvers.recorded import RecordedStep, filled
from bilevel.vector import Vector, axpy, norm, zeros_like

SAMPLES = 8  # steps looked at, each with its graph
PULLS = 4  # adjoints pulled through each
CAUTION = 3.0  # the factor that the library's estimates are calibrated to


def sampled(left_out: int) -> frozenset[int]:
    """Return which of the first `left_out` steps are looked at: the middle of each stretch."""
    count = min(SAMPLES, left_out)
    return frozenset(int((i + 0.5) * left_out / count) for i in range(count))


def coarse_sweep(
    response: Response, samples: list[RecordedStep], last: RecordedStep, adjoint: list[Tensor], h: Vector, left_out: int
) -> tuple[Vector, float]:
    """Return what the steps before the window would add to the hypergradient, and its size with the doubt.

    Args:
        response: counts the products.
        samples: the steps that `sampled` named, in their order.
        last: the earliest step of the window.
        adjoint: before that step.
        h: the hyperparameters that the steps were recorded with.
        left_out: number of steps before the window.
    """
    length, factor = left_out / len(samples), 1.0
    total, doubt = zeros_like(h), 0.0
    for step in reversed(samples):
        before = adjoint
        expected, _ = last.pull(response, before, h, keep=True)
        adjoint, added = step.pull(response, before, h, keep=True)
        unlike = min(1.0, ratio(_distance(adjoint, expected), _distance(before, expected)))
        part = filled(added, h)
        pulls = min(PULLS, max(1, round(length)))
        for _ in range(pulls - 1):
            adjoint, added = step.pull(response, adjoint, h, keep=True)
            part = axpy(1.0, filled(added, h), part)
        shrink = ratio(_size(adjoint), _size(before)) ** (1.0 / pulls)
        if not 0.0 < shrink < math.inf:
            break
        part = axpy(_series(shrink, length - pulls), filled(added, h), part)
        total = axpy(factor, part, total)
        doubt += factor * unlike * float(norm(part))
        factor *= shrink ** max(0.0, length - pulls)
    return total, float(norm(total)) + CAUTION * doubt


def _series(shrink: float, terms: float) -> float:
    """Return shrink + shrink^2 + ... for so many terms."""
    if terms <= 0.0:
        return 0.0
    return terms if abs(shrink - 1.0) < 1e-9 else shrink * (1.0 - shrink**terms) / (1.0 - shrink)


def _size(adjoint: list[Tensor]) -> float:
    return float(norm({str(i): t for i, t in enumerate(adjoint)}))


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    return _size([x - y for x, y in zip(a, b, strict=True)])
