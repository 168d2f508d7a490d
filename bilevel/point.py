"""One evaluated point of a run."""

from __future__ import annotations

from bilevel.evaluation import Evaluation
from bilevel.vector import Vector


class Point:
    """An evaluated point: unconstrained values, the gradient over them, how they were evaluated, modules' buffers."""

    def __init__(
        self,
        free: Vector,
        natural: Vector,
        gradient: Vector,
        evaluation: Evaluation,
        buffers: list[Vector],
        slack: float,
    ) -> None:
        self.free, self.natural, self.gradient, self.evaluation = free, natural, gradient, evaluation
        self.buffers, self.slack = buffers, slack

    @property
    def outer_loss(self) -> float:
        """Return F: the outer loss at the exact inner solution, to first order where a trusted method knows it."""
        found = self.evaluation.hypergradient
        return found.outer_loss + (found.correction if found.certificate.trusted else 0.0)
