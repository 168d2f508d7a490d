"""Outer problems, optimizers and an untrusted estimator for the tests of `solve` and its `Solution`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

import bilevel
from bilevel import BilevelProblem
from bilevel.certificate import Hypergradient
from bilevel.solvers.base import Response, State
from bilevel.vector import Vector


def sgd(tensors: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(tensors, lr=0.5)


def shrinkage(
    inner_factor: Callable[[Tensor], Tensor] | None = None,
    outer_factor: Callable[[Tensor], Tensor] | None = None,
    inner_solver: Any = None,
    strength: float = 1.0,
) -> BilevelProblem:
    """Return w*(h) = 1 / (1 + h) with F = (w* - 1)^2 / 2, which wants h to shrink to zero; factors can spoil it."""

    def inner_loss(w: Tensor, h: Tensor) -> Tensor:
        loss = ((w - 1.0) ** 2).sum() / 2 + h * (w**2).sum() / 2
        return loss if inner_factor is None else loss * inner_factor(h)

    def outer_loss(w: Tensor, h: Tensor) -> Tensor:
        loss = ((w - 1.0) ** 2).sum() / 2
        return loss if outer_factor is None else loss * outer_factor(h)

    start = torch.zeros(1, dtype=torch.float64)
    return BilevelProblem(inner_loss, outer_loss, start, bilevel.positive(strength), inner_solver)


def nan_below(limit: float) -> Callable[[Tensor], Tensor]:
    return lambda h: torch.where(h < limit, torch.nan, 1.0).to(h.dtype)


def flat_of(structure: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in optree.tree_leaves(structure)])


TUNED = ["per-feature ridge", "data-weighted least squares", "logistic regression", "linear module"]


@dataclasses.dataclass(frozen=True)
class Doubtful:
    """An estimator that loses its trust at its third call."""

    def __call__(
        self, response: Response, lower: Vector, upper: Vector, state: State = None
    ) -> tuple[Hypergradient, State]:
        calls = 1 if state is None else state + 1
        found, _ = bilevel.Implicit()(response, lower, upper)
        if calls >= 3:
            certificate = dataclasses.replace(found.certificate, verdict="untrusted", reasons=("a bad feeling",))
            found = dataclasses.replace(found, certificate=certificate)
        return found, calls
