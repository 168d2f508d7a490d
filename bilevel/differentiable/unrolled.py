"""The end of an inner loop, differentiable through its steps."""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor

from bilevel.differentiable.arguments import Arguments
from bilevel.differentiable.problems import LossResponse
from bilevel.errors import InvalidTypeError, InvalidValueError, NonFiniteError
from bilevel.solvers import Truncated, Unroll
from bilevel.vector import Vector, detach, is_finite, leaves


def unrolled(response: LossResponse, method: Unroll | Truncated, lower: Vector, arguments: Arguments) -> Vector:
    """Run the inner loop and return its end, with the graph of all or of the last steps where autograd records."""
    if not response.has_step:
        raise InvalidValueError(
            f"`solver` is {response.solver!r}, which has no steps that can be differentiated; write "
            'solver=bilevel.inner.SGD(lr=..., steps=...), or choose method="implicit"'
        )
    total = response.unroll_steps()
    window = total if isinstance(method, Unroll) else min(method.steps, total)
    if not (torch.is_grad_enabled() and arguments.given):
        window = 0
    w: Vector = detach(lower)
    state: Any = response.initial_state(w)
    for t in range(total):
        recorded = t >= total - window
        if t == total - window:
            w = leaves(w)
        w, state = response.step(w, state, arguments.given if recorded else arguments.values, t)
        if not recorded:
            w, state = detach(w), optree.tree_map(_detached, state)
    if not is_finite(w):
        raise NonFiniteError("the inner loop ended in NaN or infinity; lower the learning rate", "inner variables")
    if window and not any(t.requires_grad for t in w.values()):
        raise InvalidTypeError(
            "`solver` returned tensors without a graph, so there is nothing to unroll; keep it (no .detach(), no "
            'in-place training), or choose method="implicit"'
        )
    return w


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x
