"""One inner step, recorded from detached leaves, with its derivative in both directions.

With (w', state') = Φ(w, state, λ) and J = ∂Φ/∂(w, state, λ), `pull` is a -> J^T a and `push` is z -> J z.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import optree
import torch
from torch import Tensor

from bilevel.certificate import APPROXIMATE_BELOW, Certificate, judge
from bilevel.errors import InvalidTypeError, NonFiniteError
from bilevel.solvers.base import Response, ratio
from bilevel.solvers.linear.base import dtype_of
from bilevel.vector import Vector, dense, detach, is_finite, largest, leaves, norm

ROUNDING = 10.0  # units in the last place that a loop which amplifies nothing may be off
COARSE = 1e-6  # a unit in the last place above this is that of float16 or bfloat16
FIRST = 4  # steps; before, tangents may grow by anything
POWER = 5.0  # growth over a doubling of the steps that is no more than a square's, with room


@dataclass
class RecordedStep:
    """The leaves that a step started from and the tensors that came out: variables first, then the optimizer's."""

    lower: Vector
    inputs: list[Tensor]
    outputs: list[Tensor]

    def pull(
        self, response: Response, adjoint: list[Tensor], h: Vector, keep: bool
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return the adjoint before the step, and what the step contributes to each hyperparameter."""
        n = len(self.inputs)
        pairs = [(y, a) for y, a in zip(self.outputs, adjoint, strict=True) if y.requires_grad]
        inputs = [*self.inputs, *h.values()]
        response.cost.products += 1
        with response.at(self.lower, h):
            grads = torch.autograd.grad(
                [y for y, _ in pairs], inputs, [a for _, a in pairs], allow_unused=True, retain_graph=keep
            )
        before = [torch.zeros_like(x) if g is None else dense(g) for x, g in zip(self.inputs, grads[:n], strict=True)]
        return before, [None if g is None else dense(g) for g in grads[n:]]

    def push(
        self, response: Response, tangents: list[Tensor], h: Vector, along: Vector, block: int
    ) -> tuple[list[Tensor], list[bool]]:
        """Return the tangents after the step, and which hyperparameters the step uses.

        J^T a is linear in a, so its own derivative, pulled back, is J z (Townsend, A new trick for calculating Jacobian
        vector products, 2017). Unlike torch's forward mode this needs no operation to have a formula of its own, and
        the step, whose batch and random numbers are drawn once, runs once for all directions.

        Args:
            response: the problem.
            tangents: of `inputs`, `(k, *shape)` for k directions.
            h: the hyperparameters that the step was recorded with.
            along: their directions, `(k, *shape)`.
            block: most directions taken together; more is faster and takes more memory.
        """
        attached = [y for y in self.outputs if y.requires_grad]
        cotangents = [torch.zeros_like(y, requires_grad=True) for y in attached]
        directions = [*tangents, *along.values()]
        count = len(directions[0])
        response.cost.products += count + 1
        with response.at(self.lower, h), torch.enable_grad():
            inputs = [*self.inputs, *h.values()]
            pulled = torch.autograd.grad(attached, inputs, cotangents, create_graph=True, allow_unused=True)
            pairs = [(dense(g), z) for g, z in zip(pulled, directions, strict=True) if g is not None]
            if not pairs:
                return [y.new_zeros(count, *y.shape) for y in self.outputs], [False] * len(h)
            ends = [g for g, _ in pairs]

            def product(*z: Tensor) -> tuple[Tensor, ...]:
                found = torch.autograd.grad(ends, cotangents, list(z), retain_graph=True, allow_unused=True)
                return tuple(torch.zeros_like(a) if g is None else g for g, a in zip(found, cotangents, strict=True))

            blocks = [in_batches(product, [z[i : i + block] for _, z in pairs]) for i in range(0, count, block)]
        after = iter([torch.cat(parts) for parts in zip(*blocks, strict=True)])
        pushed = [next(after) if y.requires_grad else y.new_zeros(count, *y.shape) for y in self.outputs]
        return pushed, [g is not None for g in pulled[len(self.inputs) :]]


def filled(added: list[Tensor | None], h: Vector) -> Vector:
    """Return what a step contributed as a vector, zero where it does not use a hyperparameter."""
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(h.items(), added, strict=True)}


def in_batches(product: Any, stacked: list[Tensor]) -> list[Tensor]:
    """Apply `product` to stacked tensors; one by one where an operation has no batched derivative."""
    try:
        return list(torch.func.vmap(product)(*stacked))
    except RuntimeError:
        rows = [product(*(z[i] for z in stacked)) for i in range(len(stacked[0]))]
        return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def record(response: Response, lower: Vector, state: Any, h: Vector, t: int) -> tuple[RecordedStep, Vector, Any]:
    """Take step `t` with its graph; return it, and its end without a graph."""
    w = leaves(lower)
    s = optree.tree_map(lambda x: x.detach().requires_grad_() if is_float(x) else x, state)
    w_next, s_next = response.step(w, s, h, t)
    inputs = [*w.values(), *floats(s)]
    outputs = [*w_next.values(), *floats(s_next)]
    if not any(x.requires_grad for x in outputs):
        raise InvalidTypeError(
            "the inner step returned tensors without a graph, so there is nothing to unroll: a `fit` function must "
            "return tensors that depend on `hparams` by differentiable operations (no .detach(), no .data, no in-place "
            'training of a module); otherwise choose method="implicit"'
        )
    return RecordedStep(w, inputs, outputs), *without_graph(w_next, s_next)


def accumulate(through: dict[str, Tensor | None], added: list[Tensor | None]) -> None:
    """Add what a step contributes to each hyperparameter; None stays where nothing does."""
    for name, g in zip(through, added, strict=True):
        if g is not None:
            held = through[name]
            through[name] = g if held is None else held + g


UNSEEN = (
    "neither the outer loss nor an inner step that was differentiated uses it. Take it out of `hparams`, or use it in "
    "a loss or in a setting of the inner solver (lr=lambda h: h[...])"
)


def without_graph(lower: Vector, state: Any) -> tuple[Vector, Any]:
    """Return the values of a step's end."""
    return detach(lower), optree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, state)


def floats(state: Any) -> list[Tensor]:
    """Return the tensors of an optimizer's state that have derivatives."""
    return [x for x in optree.tree_leaves(state) if is_float(x)]


def is_float(x: Any) -> bool:
    """Say whether it is a tensor of real numbers."""
    return isinstance(x, Tensor) and x.is_floating_point()


def fixed_bytes(adjoint: int, upper: int, graph: int) -> int:
    """Return what a sweep takes beside graphs and starts of steps.

    The adjoint before and after a step and the end of the loop, the gradient so far and its next term, and what the
    derivative of a graph takes on its way.
    """
    return 3 * adjoint + 2 * upper + graph


def check_end(lower: Vector) -> None:
    """Raise where the inner loop ended in NaN or infinity."""
    if not is_finite(lower):
        raise NonFiniteError(
            "the inner loop ended in NaN or infinity; lower the inner learning rate or the number of steps",
            "inner variables",
        )


def inner_residual(response: Response, lower: Vector, upper: Vector) -> float:
    """Return the norm of the inner gradient at the end of the loop, relative to that at its start."""
    residual = float(norm(detach(response.residual(leaves(lower), leaves(upper)))))
    return ratio(residual, response.start_gradient_norm(upper))


class Growth:
    """How much a loop amplifies rounding: the largest adjoint of w on the way back, over that at the end of the loop.

    It is what a change of w on the way does to the end.
    """

    def __init__(self, adjoint: Iterable[Tensor]) -> None:
        self._end = self._most = largest(adjoint)

    def see(self, adjoint: Iterable[Tensor]) -> None:
        """Take the adjoint before another step into account."""
        self._most = torch.maximum(self._most, largest(adjoint))

    def factor(self) -> float:
        """Return it."""
        return ratio(float(self._most), float(self._end))


def halvings(steps: int) -> tuple[int, ...]:
    """Return the numbers of steps after which `growth_of_tangents` looks: all, half of them, and so on."""
    return tuple(steps >> k for k in range(steps.bit_length()) if steps >> k >= FIRST)


def growth_of_tangents(sizes: list[Tensor]) -> float:
    """Return how much a loop amplifies rounding, from `largest` of the tangents of w after each of `halvings`.

    Every step adds to tangents, and where the loop converges they add up like a power of the steps. What grows by more
    than that while the steps double is the loop's own.
    """
    found = [float(size) for size in sizes]
    gains = [ratio(after, before) for before, after in pairwise(found)]
    return math.prod(gain for gain in gains if not gain <= POWER)


def exact_for_the_loop(response: Response, lower: Vector, upper: Vector, growth: float) -> Certificate:
    """Return the certificate of a gradient of the whole loop: it has no error but rounding, times its growth."""
    eps = torch.finfo(dtype_of(lower)).eps
    error = ROUNDING * eps * max(1.0, growth) if math.isfinite(growth) else math.inf
    # Below float32 rounding alone is an approximation.
    verdict, reasons = judge(error, [], by_design=eps > COARSE and error < APPROXIMATE_BELOW, hint=_AMPLIFIED)
    return Certificate(verdict, inner_residual(response, lower, upper), error=error, reasons=tuple(reasons))


_AMPLIFIED = (
    "the inner loop amplifies rounding from step to step, as one does that diverges or is chaotic, until it decides "
    "the digits of the gradient: lower the inner learning rate, or take fewer inner steps"
)
