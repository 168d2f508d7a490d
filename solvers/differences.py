"""Products with second derivatives from first ones: central differences whose step checks itself.

    H v          ≈ |v| (∇_w g(w + h u) - ∇_w g(w - h u)) / 2h
    (∂R/∂λ)^T v  ≈ |v| (∇_λ g(w + h u) - ∇_λ g(w - h u)) / 2h       with  u = v / |v|

Liu, Simonyan and Yang, DARTS: Differentiable architecture search, ICLR 2019, equation 8. Deliberate difference: the
paper takes h = 0.01 / |v|. Here two steps a factor of 4 apart are compared, others are tried where they disagree, and
the pair that agrees best is extrapolated (Ridders, Accurate computation of F'(x) and F'(x) F''(x), Advances in
Engineering Software 4, 1982): too long a step sees higher derivatives, too short a one the rounding of g, and the
difference of the pair tells which errors are left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.errors import InvalidTypeError, InvalidValueError, NonFiniteError
from bilevel.operators import LinearOperator
from bilevel.solvers.base import OuterGradient, Response, present, ratio
from bilevel.solvers.linear.base import dtype_of
from bilevel.vector import Vector, axpy, dense, detach, is_finite, leaves, norm, scale, subtract, zeros_like

RATIO = 4.0
FARTHEST = 8  # steps tried in either direction: 4^8 is five decades


@dataclass(frozen=True)
class Slope:
    """The limit of a central difference.

    Attributes:
        value: extrapolated from two steps.
        error: estimated, absolute, in the norm.
        step: the shorter of the two.
    """

    value: Vector
    error: float
    step: float


def slope(quotient: Callable[[float], Vector], first: float, agreement: float, order: int = 2) -> Slope:
    """Return the limit of a difference quotient for steps to zero.

    Args:
        quotient: step -> (a(+step) - a(-step)) / 2 step.
        first: the step to begin with.
        agreement: relative difference of two neighbours that ends the search.
        order: the power of the step that the error falls with; 2 for central differences.
    """
    shrinks = RATIO**order - 1.0
    taken: dict[int, Vector] = {}

    def at(k: int) -> Vector:
        if k not in taken:
            taken[k] = quotient(first * RATIO**k)
        return taken[k]

    def apart(k: int) -> float:
        found = float(norm(subtract(at(k + 1), at(k))))
        return found if math.isfinite(found) else math.inf

    best, smallest = 0, apart(0)
    for way in (1, -1):
        for k in range(way, way * FARTHEST, way):
            lost = math.isinf(smallest)  # where nothing is finite, shorter steps may be
            if (way > 0) if lost else smallest <= agreement * float(norm(at(best))):
                break
            if not (now := apart(k)) < smallest and not lost:
                break
            best, smallest = k, now
    short, long = at(best), at(best + 1)
    value = axpy(1.0 / shrinks, subtract(short, long), short)
    # Not divided by `shrinks`: where noise keeps the two apart, extrapolation takes nothing off.
    return Slope(value, smallest, first * RATIO**best)


def partial(response: Response, lower: Vector, upper: Vector, onto: Vector) -> dict[str, Tensor | None]:
    """Return the gradient of the inner loss onto some of its arguments; None where it does not use one."""
    _, grads = _differentiate(response, lower, upper, list(onto.values()))
    return dict(zip(onto, grads, strict=True))


def _differentiate(
    response: Response, lower: Vector, upper: Vector, onto: list[Tensor]
) -> tuple[float, list[Tensor | None]]:
    value = response.inner(lower, upper)
    response.cost.gradients += 1
    if not bool(torch.isfinite(value)):
        raise NonFiniteError(f"the inner loss is {float(value.detach())}", "inner loss")
    if not value.requires_grad:
        return float(value), [None] * len(onto)
    with response.at(lower, upper):
        grads = torch.autograd.grad(value, onto, allow_unused=True)
    return float(value.detach()), [None if g is None else dense(g) for g in grads]


def inner_gradient(response: Response, lower: Vector, upper: Vector) -> OuterGradient:
    """Differentiate g, as `outer_gradient` does f."""
    w, h = leaves(lower), leaves(upper)
    both = {("w", n): t for n, t in w.items()} | {("h", n): t for n, t in h.items()}
    value, grads = _differentiate(response, w, h, list(both.values()))
    found = dict(zip(both, grads, strict=True))
    of_lower = {n: torch.zeros_like(t) if (g := found["w", n]) is None else g for n, t in w.items()}
    return OuterGradient(value, of_lower, {n: found["h", n] for n in h})


class Differences:
    """The inner problem to first order around one point, by first derivatives alone (see `System`).

    Args:
        response: the problem.
        lower: the point.
        upper: the hyperparameters.
        step: distance by which the inner variables are moved; None: it is found.
    """

    def __init__(self, response: Response, lower: Vector, upper: Vector, step: float | None = None) -> None:
        if response.has_kinks:
            raise InvalidValueError(
                "differences of gradients jump at the kinks of a penalty of bilevel.prox; choose an implicit method, "
                'which keeps to the smooth piece (method="implicit")'
            )
        self._response, self._lower, self._upper, self._step = response, detach(lower), detach(upper), step
        eps = torch.finfo(dtype_of(lower)).eps
        # Rounding eps / h and truncation h^2 balance at the cube root; they are then eps^(2/3) both.
        self._first, self._agreement = eps ** (1 / 3) * (float(norm(lower)) or 1.0), 100.0 * eps ** (2 / 3)
        self._product_step = step
        self._elsewhere: dict[str, Tensor | None] | None = None  # the gradient onto λ where every entry of w has moved
        self.noise = 0.0
        gradient = self._by_lower(self._lower)
        if all(g is None for g in gradient.values()):
            raise InvalidTypeError(
                "`inner_loss` does not depend on params; use the `params` that the loss is called with, and do not "
                "detach them"
            )
        self.residual = zeros_like(lower) | present(gradient)
        if not is_finite(self.residual):
            raise NonFiniteError("the gradient of the inner loss is not finite", "inner gradient")
        self.operator = LinearOperator(
            self._product,
            self._lower,
            symmetric=True,
            second_moment=response.second_moment,
            pairs=response.pairs,
        )

    def _by_lower(self, lower: Vector) -> dict[str, Tensor | None]:
        w = leaves(lower)
        return partial(self._response, w, self._upper, w)

    def _product(self, v: Vector) -> Vector:
        """Return H v; the step is found for the first v and kept."""
        size = float(norm(v))
        if size == 0.0:
            return zeros_like(v)

        def quotient(h: float) -> Vector:
            ends = (self._by_lower(axpy(sign * h / size, v, self._lower)) for sign in (1.0, -1.0))
            plus, minus = (zeros_like(v) | present(end) for end in ends)
            return scale(0.5 / h, subtract(plus, minus))

        if self._product_step is None:
            found = slope(quotient, self._first, self._agreement)
            self._product_step = found.step
            self.noise = max(self.noise, ratio(found.error, float(norm(found.value))))
            return scale(size, found.value)
        return scale(size, quotient(self._product_step))

    def pull_back(self, v: Vector) -> dict[str, Tensor | None]:
        """Return (∂R/∂λ)^T v; None for a hyperparameter whose part of the gradient no move of w changes.

        A move along v that changes nothing says no more than that the product is zero.
        """
        size = float(norm(v))
        still = self._by_upper(self._lower)
        if size == 0.0:
            return {name: None if t is None else torch.zeros_like(t) for name, t in still.items()}
        idle = set(still)

        def quotient(h: float) -> Vector:
            ends = [self._by_upper(axpy(sign * h / size, v, self._lower)) for sign in (1.0, -1.0)]
            idle.difference_update(n for end in ends for n, t in present(end).items() if not _same(t, still[n]))
            plus, minus = (zeros_like(self._upper) | present(end) for end in ends)
            return scale(0.5 / h, subtract(plus, minus))

        found = self._limit(quotient) if self._step is None else quotient(self._step)
        if idle and self._elsewhere is None:
            self._elsewhere = self._by_upper(self._move_all())
        idle.difference_update(n for n, t in present(self._elsewhere or {}).items() if not _same(t, still[n]))
        return {name: None if name in idle else size * t for name, t in found.items()}

    def _move_all(self) -> Vector:
        """Return inner variables nearby that differ in every entry."""
        generator, h = torch.Generator().manual_seed(0), self._step or self._first
        return {
            n: t + h * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)
            for n, t in self._lower.items()
        }

    def _by_upper(self, lower: Vector) -> dict[str, Tensor | None]:
        h = leaves(self._upper)
        return partial(self._response, lower, h, h)

    def _limit(self, quotient: Callable[[float], Vector]) -> Vector:
        found = slope(quotient, self._first, self._agreement)
        self.noise = max(self.noise, ratio(found.error, float(norm(found.value))))
        return found.value


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and torch.equal(a, b)
