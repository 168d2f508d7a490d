"""stocBiO: stochastic steps of the inner variables, then a stochastic Neumann series for the adjoint.

    w <- w - α D_w, `steps` times
    r_0 = ∂f/∂w,  r_q = r_{q-1} - η H(B_q) r_{q-1},  v = η (r_0 + ... + r_Q),  Q = `terms`, a batch B_q for each
    D_λ = ∂f/∂λ - (∂R/∂λ)^T v

Ji, Yang and Liang, Bilevel optimization: convergence analysis and enhanced design, ICML 2021, algorithms 2 and 3 and
equation 6. w is warm; v begins anew in every call and is short by (1 - η μ)^(Q + 1), μ the smallest curvature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bilevel.solvers.about import About, Terms
from bilevel.solvers.directions import Directions, Source
from bilevel.solvers.linear.base import check_count
from bilevel.solvers.single_loop import Loop, Moving
from bilevel.solvers.tracking import Tracking
from bilevel.vector import Vector, axpy, scale


@dataclass(frozen=True)
class StocBiO(Loop):
    """Alternate between stochastic steps of w and a stochastic Neumann series.

    Args:
        lr, decay, momentum, warmup: see `Loop`; the first call takes `warmup` steps of w.
        steps: steps of w in each call.
        terms: of the series; more are more accurate, one product each.
    """

    steps: int = 10
    terms: int = 30
    forgets: ClassVar[bool] = True
    about: ClassVar[About] = About(
        begins="last",
        sees="losses",
        derivatives=2,
        exact=False,
        terms=Terms(
            "steps + terms gradients, terms products",
            "a few vectors",
            "(1 - 1/κ)^terms, lag of w, and noise",
            "Ji et al. 2021",
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.steps, "steps")
        check_count(self.terms, "terms")

    def _warm(self, moving: Moving, source: Source, upper: Vector, tracking: Tracking, steps: int) -> None:
        self._descend(moving, source, upper, tracking, steps)

    def _round(
        self, moving: Moving, source: Source, upper: Vector, tracking: Tracking, several: bool
    ) -> tuple[Vector, Directions]:
        self._descend(moving, source, upper, tracking, self.steps)
        source.look(moving.w, upper)
        left = total = source.outer.lower
        size = self._series_size(moving)
        for _ in range(self.terms):
            left = axpy(-size, source.linearize(moving.w, upper).operator(left), left)
            total = axpy(1.0, left, total)
        moving.v = scale(size, total)
        last = source.directions(moving.w, moving.v, upper, outward=True)
        tracking.see_adjoint(moving.v, last)
        assert last.upper is not None
        return last.upper, last

    def _series_size(self, moving: Moving) -> float:
        """Return η, which does not fall: the series must come to an end in as many terms."""
        if self.lr is not None:
            return self.lr
        return 1.0 / moving.largest if moving.largest > 0.0 else 1.0
