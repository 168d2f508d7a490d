"""A few steps of the inner solver, each with its graph: what they hold, use and do to an adjoint."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from bilevel.measure import Saved, saved_memory
from bilevel.response import ProblemResponse
from bilevel.vector import Vector, detach, is_finite, leaves, norm, scale

POWER_STEPS = 4


@dataclass(frozen=True)
class Walk:
    """A few steps of the inner solver, each with its graph.

    Attributes:
        total: steps of the whole inner loop.
        bytes_per_step: what the graph of one step holds, without what all steps share.
        seen: the hyperparameters that a step uses.
        growth: the factor by which one step back lengthens an adjoint.
        broke_at: the step after which a variable was not finite; None if all were.
        end: the inner variables after them.
    """

    total: int
    bytes_per_step: int
    seen: frozenset[str]
    growth: float
    broke_at: int | None
    end: Vector


def walk(response: ProblemResponse, lower: Vector, upper: Vector, adjoint: Vector) -> Walk:
    """Take the first two steps, one as in the middle and one as at the end of the inner loop."""
    total = response.unroll_steps()
    h = leaves(upper)
    w, state = detach(lower), response.initial_state(lower)
    seen: set[str] = set()
    memory: list[Saved] = []
    graphs: list[Any] = []  # kept: freed memory would be given out again, and counted as shared
    growth, broke_at = 0.0, None
    for t in sorted({0, 1, total // 2, total - 1} & set(range(total))):
        w = leaves(w)
        state = optree.tree_map(lambda x: x.detach().requires_grad_() if _is_float(x) else x, state)
        with saved_memory() as saved:
            after, state = response.step(w, state, h, t)
        tensors = [x for x in (*after.values(), *optree.tree_leaves(state)) if _is_float(x)]
        for tensor in tensors:
            saved.add(tensor)
        attached = [x for x in tensors if x.requires_grad]
        with response.at(w, h):
            pulled = torch.autograd.grad(
                attached, list(h.values()), [torch.ones_like(x) for x in attached], retain_graph=True, allow_unused=True
            )
            if t == min(1, total - 1):
                growth = _growth(w, after, adjoint)
        seen |= {name for name, g in zip(h, pulled, strict=True) if g is not None}
        memory.append(saved)
        graphs.append((after, state))
        if broke_at is None and not is_finite(after):
            broke_at = t
        w = detach(after)
        state = optree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, state)
    per_step = memory[1].beyond(memory[0]) if total > 1 else memory[0].beyond(Saved())
    return Walk(total, per_step, frozenset(seen), growth, broke_at, w)


def _growth(before: Vector, after: Vector, adjoint: Vector) -> float:
    """Return |J^T a| / |a| of the last of a few power steps, J the derivative of a step over the variables."""
    a, growth = adjoint, 0.0
    pairs = [(name, t) for name, t in after.items() if t.requires_grad]
    for _ in range(POWER_STEPS):
        size = float(norm(a))
        if not 0.0 < size < math.inf or not pairs:
            break
        a = scale(1.0 / size, a)
        outputs, cotangents = [t for _, t in pairs], [a[name] for name, _ in pairs]
        grads = torch.autograd.grad(outputs, list(before.values()), cotangents, retain_graph=True, allow_unused=True)
        a = {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(before.items(), grads, strict=True)}
        growth = float(norm(a))
    return growth


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
