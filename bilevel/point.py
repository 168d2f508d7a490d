"""One evaluated point of a run, and what is said of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from bilevel.certificate import Certificate, Cost, Hypergradient
from bilevel.evaluation import Evaluation
from bilevel.solution import Record, summarize
from bilevel.vector import Vector, norm

# Below this many times the norm at which a run stops, a hypergradient's error is held against this size. The verdict
# allows 1e-3 of it, a tenth of the norm at which the run stops; less would ask for digits that no step uses.
FLOOR = 100.0
# The same, of the first hypergradient, for methods that move the inner variables by minibatches: near the optimum their
# noise is all that is left, and no run gets further than that.
NOISE_FLOOR = 0.1


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

    def projected_norm(self, low: Vector, high: Vector) -> float:
        """Return the norm of the gradient without what presses against an end of its range."""
        projected = {}
        for name, g in self.gradient.items():
            x = self.free[name]
            held = ((x <= low[name]) & (g > 0)) | ((x >= high[name]) & (g < 0))
            projected[name] = torch.where(held, torch.zeros_like(g), g)
        return float(norm(projected))

    def error_floor(self, first: float, tol: float, noisy: bool) -> float:
        """Return the norm below which later hypergradients count as zero, natural units; 0 where this one is.

        Args:
            first: norm of the first hypergradient over unconstrained values.
            tol: part of it at which a run stops.
            noisy: hypergradients are those of minibatches.
        """
        size = float(norm(self.gradient))
        part = max(FLOOR * tol, NOISE_FLOOR if noisy else 0.0) * first
        return part * float(norm(self.evaluation.hypergradient.gradient)) / size if size > 0.0 else 0.0

    def record(
        self,
        *,
        step: int,
        hypergradient_norm: float,
        inner_steps: int,
        inner_solves: int,
        cost: Cost,
        seconds: float,
        test_loss: float | None = None,
    ) -> Record:
        """Return the figures of this point, beside what was spent on it."""
        certificate = self.evaluation.hypergradient.certificate
        return Record(
            step=step,
            outer_loss=self.outer_loss,
            inner_loss=self.evaluation.inner_loss,
            hypergradient_norm=hypergradient_norm,
            inner_residual=certificate.inner_residual,
            adjoint_residual=certificate.adjoint_residual,
            error=certificate.error,
            verdict=certificate.verdict,
            inner_steps=inner_steps,
            inner_solves=inner_solves,
            gradients=cost.gradients,
            products=cost.products,
            seconds=seconds,
            hparams={name: summarize(t) for name, t in self.natural.items()},
            sizes={name: t.numel() for name, t in self.natural.items()},
            test_loss=test_loss,
        )

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
