"""Newton's method for many small models of one kind at once, and the factors of their Hessians.

    w' = w - t H^-1 R,     H = A^T diag(weights loss'') A + diag(ridge),     t = 1, 1/2, 1/4, ... for each model

The models are the folds (and the classes, where each has a problem of its own); A `(n, p)` holds the features and, in
the last column, the intercept. A value along a step costs no product with A, since the scores are linear in w. On
scores, losses are twice differentiable or piecewise quadratic (squared hinge), where the step is the semismooth one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from bilevel.inner.base import InnerSolution, Task
from bilevel.operators import LinearOperator
from bilevel.sklearn.folds import Design
from bilevel.solvers.linear.base import LinearSolution, finished, wide
from bilevel.vector import Vector, axpy, dot, subtract

MAX_STEPS = 100
RTOL = 1e-11  # of the gradient at zero: what rounding leaves of it is some digits less
ROUNDED = 1e-7  # of it: from here on, a gradient that shrinks no more is as small as rounding lets it be
ARMIJO, HALVINGS = 1e-4, 30
ROUNDING = 1e-14  # part of a value by which it may rise

Losses = Callable[[Tensor], Tensor]  # scores (folds, models, n) -> the loss of each, the same shape


@dataclass
class BlockNewton:
    """Train the models of all folds; an inner solver, and the inverse of the Hessian at its last solution.

    Args:
        design: what makes scores of weights.
        losses: scores `(folds, models, n)` to losses; `(folds, 1, n)` where the models of a fold are coupled.
        weights: of the training rows, `(folds, 1, n)`, or `(folds, models, n)`.
        ridge: hyperparameters to the strengths, which broadcast to `(folds, models, p)`: 1/2 ridge w^2 is added.
        coupled: the models of a fold have one Hessian together (softmax).
        shift: half of this times the square of the sum of a fold's intercepts is added.
    """

    design: Design
    losses: Losses
    weights: Tensor
    ridge: Callable[[Vector], Tensor]
    coupled: bool = False
    shift: float = 0.0
    needs_fixed_loss: ClassVar[bool] = True
    factor: Tensor | None = field(default=None, init=False)
    first: float | None = field(default=None, init=False)

    def solve(self, task: Task, lower: Vector, upper: Vector) -> InnerSolution:
        """See `bilevel.inner.InnerSolver.solve`."""
        w, ridge = lower["w"], self.ridge(upper)
        if self.first is None:
            zero = torch.zeros_like(w)
            self.first = float(self._gradient(self._slopes(self.design.scores(zero))[0], ridge, zero).norm()) or 1.0
        scores, size = self.design.scores(w), math.inf
        for taken in range(MAX_STEPS):
            slopes, curvatures = self._slopes(scores)
            gradient = self._gradient(slopes, ridge, w)
            size, before = float(gradient.norm()), size
            if size <= RTOL * self.first or before / 2.0 < size <= ROUNDED * self.first:
                return InnerSolution({"w": w}, taken, "converged")
            self.factor = _factor(self._hessian(curvatures, ridge.expand_as(w)))
            found = self._search(w, self._solved(gradient), scores, ridge, gradient)
            if found is None:
                return InnerSolution({"w": w}, taken, "stalled")
            w, scores = found
        return InnerSolution({"w": w}, MAX_STEPS, "max_steps")

    def inverse(self, v: Vector) -> Vector:
        """Return H^-1 v at the last solution."""
        return v if self.factor is None else {"w": self._solved(v["w"])}

    def _solved(self, v: Tensor) -> Tensor:
        assert self.factor is not None
        blocks = v.reshape(len(v), self.factor.shape[1], -1, 1)
        solved: Tensor = torch.cholesky_solve(blocks, self.factor).reshape(v.shape)
        return solved

    def _slopes(self, scores: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return A^T loss' and loss'' on scores; of coupled models a row of the second derivatives for each."""
        with torch.enable_grad():
            s = scores.detach().requires_grad_()
            (first,) = torch.autograd.grad((self.weights * self.losses(s)).sum(), s, create_graph=True)
            tops = [first[:, i] for i in range(first.shape[1])] if self.coupled else [first]
            seconds = [torch.autograd.grad(top.sum(), s, retain_graph=True)[0] for top in tops]
        return self.design.back(first.detach()), seconds

    def _gradient(self, slopes: Tensor, ridge: Tensor, w: Tensor) -> Tensor:
        gradient = slopes + ridge * w
        if self.shift:
            gradient[..., -1] += self.shift * w[..., -1].sum(1, keepdim=True)
        return gradient

    def _hessian(self, curvatures: list[Tensor], ridge: Tensor) -> Tensor:
        """Return `(folds, models, p, p)`; of coupled models `(folds, 1, models p, models p)`."""
        if not self.coupled:
            return self.design.gram(curvatures[0]) + torch.diag_embed(ridge)
        folds, models, p = ridge.shape
        rows = torch.stack([self.design.gram(row) for row in curvatures], 1)  # (folds, models, models, p, p)
        hessian = rows.transpose(2, 3).reshape(folds, 1, models * p, models * p)
        hessian = hessian + torch.diag_embed(ridge.reshape(folds, 1, -1))
        hessian[..., p - 1 :: p, p - 1 :: p] += self.shift
        return hessian

    def _values(self, w: Tensor, scores: Tensor, ridge: Tensor) -> Tensor:
        """Return the value of each block, `(folds, blocks)`."""
        penalty = 0.5 * (ridge * w**2).sum(-1)
        if self.coupled:
            penalty = penalty.sum(1, keepdim=True) + 0.5 * self.shift * w[..., -1].sum(1, keepdim=True) ** 2
        return (self.weights * self.losses(scores)).sum(-1) + penalty

    def _search(
        self, w: Tensor, step: Tensor, scores: Tensor, ridge: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Return the weights and scores of a step that each block falls by; None where none does."""
        along, value = self.design.scores(step), self._values(w, scores, ridge)
        slope, t = (gradient * step).sum(-1), torch.ones_like(value)
        slope = slope.sum(1, keepdim=True) if self.coupled else slope
        for _ in range(HALVINGS):
            there, s = w - t[..., None] * step, scores - t[..., None] * along
            now = self._values(there, s, ridge)
            rises = ~(now <= value - ARMIJO * t * slope + ROUNDING * value.abs())
            if not bool(rises.any()):
                return there, s
            t = torch.where(rises, 0.5 * t, t)
        t = torch.where(rises, 0.0, t)
        return (w - t[..., None] * step, scores - t[..., None] * along) if bool(t.any()) else None


@dataclass(frozen=True)
class Factored:
    """Solve with the inner Hessian by the factors that training left, refined once.

    Args:
        newton: what trained.
        total: what the inner loss is divided by.
    """

    newton: BlockNewton
    total: float
    truncates: ClassVar[bool] = False

    def solve(self, operator: LinearOperator, rhs: Vector, start: Vector | None = None) -> LinearSolution:
        """See `bilevel.solvers.linear.base.LinearSolver`."""
        return refined(operator, rhs, lambda v: {"w": self.total * self.newton.inverse(v)["w"]})


def refined(operator: LinearOperator, rhs: Vector, inverse: Callable[[Vector], Vector]) -> LinearSolution:
    """Solve by an inverse that is exact but for rounding, refined once; inverse iteration finds the curvature."""
    x = inverse(rhs)
    x = axpy(1.0, inverse(subtract(rhs, operator(x))), x)
    direction = inverse(inverse(x))
    size = dot(direction, direction)
    curvature = float(dot(direction, operator(direction)) / size) if float(size) > 0.0 else None
    return replace(finished(operator, rhs, wide(x), "converged", 1, curvature), inverse=inverse)


def _factor(hessian: Tensor) -> Tensor:
    """Return Cholesky factors; what is singular by rounding gets a little more on its diagonal."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(hessian)
    more = 1e-12 * (1.0 + hessian.diagonal(dim1=-2, dim2=-1).amax(-1))
    while bool(failed.any()):
        added = (more * (failed > 0))[..., None].expand(hessian.shape[:-1])
        hessian = hessian + torch.diag_embed(added)
        factor, failed = torch.linalg.cholesky_ex(hessian)
        more = 100.0 * more
    return factor
