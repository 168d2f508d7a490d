"""SOBA: plain stochastic steps of the inner variables, the adjoint and the hyperparameters, all at once.

    w <- w - ρ D_w      v <- v - ρ D_v      λ <- λ - γ D_λ      each on the same minibatch

Dagréou, Ablin, Vaiter and Moreau, A framework for bilevel optimization that enables stochastic and global variance
reduction algorithms, NeurIPS 2022, algorithm 1 and equations 5 to 7. With `momentum` it is MA-SOBA: Chen, Xiao and
Balasubramanian, Optimal algorithms for stochastic bilevel optimization under relaxed smoothness conditions, 2023
(arXiv 2306.12067), where D_λ is a moving average. Deliberate differences: the step of λ is the outer optimizer's, and
the first call warms w and v up at fixed λ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bilevel.solvers.about import About, Terms
from bilevel.solvers.directions import Directions, Source
from bilevel.solvers.linear.base import check_count
from bilevel.solvers.single_loop import ROUNDS, Loop, Moving
from bilevel.solvers.tracking import Tracking
from bilevel.vector import Vector, axpy, zeros_like


@dataclass(frozen=True)
class SOBA(Loop):
    """Move w and v by minibatches, a few steps for each hypergradient.

    No inner solver runs and no linear system is solved: a step is one gradient of each loss and one product. On fixed
    data it converges linearly; on minibatches it comes as close as their noise allows, and a hypergradient is the mean
    of D_λ over the steps of its call.

    Args:
        lr, decay, momentum, warmup: see `Loop`.
        steps: steps of w and v in each call but the first. 1 is the paper's single loop, for an outer step size well
            below the inner one; more follow λ more closely, are less noisy on minibatches, and cost more.
    """

    steps: int = 10
    about: ClassVar[About] = About(
        begins="last",
        sees="losses",
        derivatives=2,
        exact=False,
        terms=Terms(
            "2 gradients and 2 products", "v and its means", "lag of w and v, and noise", "Dagréou et al. 2022"
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.steps, "steps")

    def _joint(self, moving: Moving, source: Source, upper: Vector, tracking: Tracking, outward: bool) -> Directions:
        """Take the steps that are due, and find the next ones: all directions at one point, on one draw."""
        moving.go()
        found = source.directions(moving.w, moving.v, upper, outward or not self.averages)  # a memory must be fresh
        self._watch(moving, source, upper, found.lower)
        size = self._size(moving, source)
        tracking.see_lower(found.lower)
        tracking.see_adjoint(moving.v, found)
        moving.plan_lower(found.lower, size)
        moving.plan_adjoint(found, size)
        return found

    def _warm(self, moving: Moving, source: Source, upper: Vector, tracking: Tracking, steps: int) -> None:
        for step in range(steps):
            self._joint(moving, source, upper, tracking, outward=step == 0)  # a λ without a path is found at once
            if moving.grew or (source.exact and moving.stands()):
                break

    def _round(
        self, moving: Moving, source: Source, upper: Vector, tracking: Tracking, several: bool
    ) -> tuple[Vector, Directions]:
        every = self.averages and not source.exact  # a memory has the mean already
        steps = max(self.steps, self.first // (2 * ROUNDS)) if every and several else self.steps
        total = zeros_like(upper)
        for step in range(steps):
            outward = every or step == steps - 1
            last = self._joint(moving, source, upper, tracking, outward)
            if outward and last.upper is not None:
                total = axpy(1.0 / (steps if every else 1), last.upper, total)
        return total, last
