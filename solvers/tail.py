"""What truncated backpropagation leaves out, estimated from what it saw.

The adjoint goes back by a_{i+1} = M a_i and step i contributes c_i = B^T a_i. With weights γ, sum γ = 1, that minimize
|sum γ_i a_i|, the extrapolated sum of all contributions is sum γ_i s_i, s_i the partial sums: the sum of n geometric
series with n weights. Scieur, d'Aspremont and Bach, Regularized nonlinear acceleration, NIPS 2016, algorithm 1.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from bilevel.minimize import Array
from bilevel.vector import Vector, axpy, dot, norm, scale, zeros_like

HELD = 10  # contributions held
ONWARD = 10  # steps that a truncated sweep goes on for, at its earliest step
DAMPING = 1e-12  # added to the Gram matrix, relative: rounding of its entries


@dataclass
class Tail:
    """The last adjoints and contributions of a sweep, the latest inner step first.

    Attributes:
        adjoints: a_i, one more than contributions.
        contributions: c_i.
        norms: |a_i| from the first on.
    """

    adjoints: deque[Vector] = field(default_factory=lambda: deque(maxlen=HELD + 1))
    contributions: deque[Vector] = field(default_factory=lambda: deque(maxlen=HELD))
    norms: list[float] = field(default_factory=list)

    def add(self, adjoint: list[Tensor], contribution: Vector | None = None) -> None:
        """Append a_{i+1} and c_i."""
        a = {str(i): t for i, t in enumerate(adjoint)}
        self.adjoints.append(a)
        self.norms.append(float(norm(a)))
        if contribution is not None:
            self.contributions.append(contribution)

    def grows(self) -> bool:
        """Say whether the adjoint is larger at the end than half-way."""
        return self.norms[-1] > self.norms[len(self.norms) // 2]

    def beyond(self, steps: int) -> tuple[Vector, float]:
        """Return the sum of the contributions of `steps` more steps, and its size at least."""
        last, norms = self.contributions[-1], self.norms[-len(self.contributions) - 1 :]
        total = zeros_like(last)
        if steps == 0 or norms[-1] == 0.0:
            return total, 0.0
        weights = _weights(list(self.adjoints))
        # sum over i of γ_i (s_i - s_last): contribution j is missing from every s_i with i <= j.
        for j, contribution in enumerate(self.contributions):
            total = axpy(-float(weights[: j + 1].sum()), contribution, total)
        # Adjoints that shrink contribute no more than before, at every step; with momentum they swing.
        size, largest = float(norm(total)), max(float(norm(c)) for c in self.contributions)
        if size > steps * largest:
            total, size = scale(steps * largest / size, total), steps * largest
        # Series may cancel in the sum and not in the truth: at least the one series of their mean contraction.
        mean = min(1.0, (norms[-1] / norms[0]) ** (1.0 / (len(norms) - 1)))
        series = steps if mean == 1.0 else mean * (1.0 - mean**steps) / (1.0 - mean)
        return total, max(size, series * float(norm(last)))


def _weights(adjoints: list[Vector]) -> Array:
    sizes = [float(norm(a)) for a in adjoints]
    gram = np.array([[float(dot(a, b)) for b in adjoints] for a in adjoints])
    scaled = gram / max(sizes) ** 2
    solved = np.linalg.solve(scaled + DAMPING * np.eye(len(sizes)), np.ones(len(sizes)))
    return np.asarray(solved / solved.sum(), dtype=np.float64)
