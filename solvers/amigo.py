"""AmIGO: some stochastic steps of the inner variables, then some of the adjoint, both from where they were.

    w <- w - α D_w, `steps` times      v <- v - β D_v, `adjoint_steps` times      then D_λ, each on batches of its own

Arbel and Mairal, Amortized implicit differentiation for stochastic bilevel optimization, ICLR 2022, algorithm 1 with
algorithms 2 and 3. The warm starts amortize the two solves over the steps of λ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bilevel.solvers.about import About, Terms
from bilevel.solvers.directions import Directions, Source
from bilevel.solvers.linear.base import check_count
from bilevel.solvers.single_loop import Loop, Moving
from bilevel.solvers.tracking import Tracking
from bilevel.vector import Vector


@dataclass(frozen=True)
class AmIGO(Loop):
    """Alternate between stochastic steps of w and of v, both warm.

    Args:
        lr, decay, momentum, warmup: see `Loop`; the first call takes `warmup` steps of each.
        steps: steps of w in each call.
        adjoint_steps: steps of v in each call.
    """

    steps: int = 10
    adjoint_steps: int = 10
    about: ClassVar[About] = About(
        begins="last",
        sees="losses",
        derivatives=2,
        exact=False,
        terms=Terms(
            "steps + 2 adjoint_steps gradients, adjoint_steps products",
            "v and its means",
            "lag of w and v, and noise",
            "Arbel and Mairal 2022",
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.steps, "steps")
        check_count(self.adjoint_steps, "adjoint_steps")

    def _warm(self, moving: Moving, source: Source, upper: Vector, tracking: Tracking, steps: int) -> None:
        self._descend(moving, source, upper, tracking, steps)
        self._adjoint(moving, source, upper, tracking, steps)

    def _round(
        self, moving: Moving, source: Source, upper: Vector, tracking: Tracking, several: bool
    ) -> tuple[Vector, Directions]:
        self._descend(moving, source, upper, tracking, self.steps)
        self._adjoint(moving, source, upper, tracking, self.adjoint_steps)
        last = source.directions(moving.w, moving.v, upper, outward=True)
        assert last.upper is not None
        return last.upper, last

    def _adjoint(self, moving: Moving, source: Source, upper: Vector, tracking: Tracking, steps: int) -> None:
        """Take steps of v."""
        for _ in range(steps):
            found = source.directions(moving.w, moving.v, upper, outward=False)
            tracking.see_adjoint(moving.v, found)
            moving.plan_adjoint(found, self._size(moving, source))
            stands = moving.grew or (source.exact and moving.stands())
            moving.go()
            if stands:
                break
