"""One evaluated point of a run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from bilevel.certificate import Certificate, Cost, Hypergradient
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

    def state(self) -> dict[str, Any]:
        """Return all of it as plain values and tensors."""
        return {**vars(self), "evaluation": asdict(self.evaluation)}

    @staticmethod
    def restored(state: dict[str, Any]) -> Point:
        """Return the point that `state` was taken of."""
        found = dict(state["evaluation"]["hypergradient"])
        found["certificate"] = Certificate.from_dict(found["certificate"])
        found["cost"] = Cost(**found["cost"])
        evaluation = Evaluation(**{**state["evaluation"], "hypergradient": Hypergradient(**found)})
        return Point(**{**state, "evaluation": evaluation})
