"""Conjugate gradients for a family of systems that are solved together: one product serves all its members.

    A = diag(A_1, ..., A_n):  each member has its own step lengths, and stops at its own residual

So the products are as many as the hardest member takes by itself. One recurrence for the whole matrix would see the
eigenvalues of all members at once, and stop by a residual that large members decide.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from bilevel.operators import LinearOperator
from bilevel.solvers.linear.base import LinearSolution, Status, dtype_of, finished
from bilevel.solvers.linear.lanczos import smallest_ritz
from bilevel.vector import Vector, flatten

REFRESH = 50  # steps between two recomputations of the true residuals
PATIENCE = 100  # steps without a better residual of any member


def solve_members(
    operator: LinearOperator, rhs: Vector, start: Vector | None, members: int, rtol: float, limit: int
) -> LinearSolution:
    """Solve A x = rhs, where every tensor has a leading dimension of the members.

    Args:
        operator: A, symmetric; no member touches another.
        rhs: b.
        start: a first iterate, for the members that it is nearer for than zero.
        members: n.
        rtol: a member stops at |b_i - A_i x_i| <= rtol |b_i|.
        limit: most steps.
    """
    run = _Run(operator, _rows(rhs, members), None if start is None else _rows(start, members), rtol)
    status = run.iterate(limit)
    value = _vector(run.best, rhs)
    found = finished(operator, rhs, flatten(value).double(), status, run.steps, run.smallest_ritz())
    left, sizes = _rows(found.residual, members).norm(dim=1), run.b.norm(dim=1)
    relative = torch.where(sizes > 0.0, left / sizes, left)
    return replace(found, relative=float(relative.max()))


class _Run:
    """The state of one solve; x, r and p are the textbook's, `(n, size of a member)`, float64."""

    def __init__(self, operator: LinearOperator, b: Tensor, start: Tensor | None, rtol: float) -> None:
        self._operator, self.b, self._members = operator, b, len(b)
        self._threshold = rtol * b.norm(dim=1)
        self.x, self.r = torch.zeros_like(b), b.clone()
        if start is not None:
            rest = b - self._product(start)
            nearer = (rest.norm(dim=1) < b.norm(dim=1))[:, None]
            self.x, self.r = torch.where(nearer, start, self.x), torch.where(nearer, rest, self.r)
        self.best, self.best_norm = self.x, self.r.norm(dim=1)
        self.p, self.rr = self.r, (self.r**2).sum(1)
        self.steps, self._waited = 0, 0
        self._alphas: list[Tensor] = []
        self._betas: list[Tensor] = []
        self._lowest = math.inf

    def _product(self, rows: Tensor) -> Tensor:
        return _rows(self._operator(_vector(rows, self._operator.like)), self._members)

    def iterate(self, limit: int) -> Status:
        """Go on until every member is done."""
        rounding = 4 * torch.finfo(dtype_of(self._operator.like)).eps
        while bool((active := self.best_norm > self._threshold).any()):
            if self.steps >= limit:
                return "max_steps"
            p = torch.where(active[:, None], self.p, 0.0)
            Ap = self._product(p)
            pAp, pp, size = (p * Ap).sum(1), (p * p).sum(1), (Ap * Ap).sum(1)
            self.steps += 1
            self._lowest = min(self._lowest, float((pAp / pp)[active].min()))
            # Rounding in a product of size |p||Ap| cannot tell a smaller curvature from zero.
            if bool((pAp <= rounding * (pp * size).sqrt())[active].any()):
                return "nonpositive curvature"
            self._step(p, Ap, torch.where(active, self.rr / pAp, 0.0), active)
            if self._waited >= PATIENCE or not bool(torch.isfinite(self.rr).all()):
                return "stagnated"
        return "converged"

    def _step(self, p: Tensor, Ap: Tensor, alpha: Tensor, active: Tensor) -> None:
        self.x = self.x + alpha[:, None] * p
        refreshed = self.steps % REFRESH == 0
        self.r = self.b - self._product(self.x) if refreshed else self.r - alpha[:, None] * Ap
        size = self.r.norm(dim=1)
        better = active & (size < self.best_norm)
        self._waited = 0 if bool(better.any()) else self._waited + 1
        self.best = torch.where(better[:, None], self.x, self.best)
        self.best_norm = torch.where(better, size, self.best_norm)
        rr, before = size**2, self.rr
        beta = torch.where(active, rr / before, 0.0)
        self._alphas.append(alpha)
        self._betas.append(beta)
        self.rr, self.p = rr, self.r + beta[:, None] * p

    def smallest_ritz(self) -> float | None:
        """Return the smallest curvature over the Krylov spaces of all members; None for no step."""
        if not self._alphas:
            return self._lowest if self.steps else None
        alphas, betas = torch.stack(self._alphas), torch.stack(self._betas)
        taken = (alphas != 0.0).sum(0)  # steps of each member: it never goes on after it stopped
        ritz = [smallest_ritz(alphas[:k, i].tolist(), betas[:k, i].tolist()) for i, k in enumerate(taken) if k]
        return min([self._lowest, *ritz])


def _rows(v: Vector, members: int) -> Tensor:
    """Return one row a member, float64."""
    return torch.cat([t.reshape(members, -1).double() for t in v.values()], dim=1)


def _vector(rows: Tensor, like: Vector) -> Vector:
    """Return rows as a vector of the shapes of `like`."""
    parts = torch.split(rows, [t[0].numel() for t in like.values()], dim=1)
    return {name: part.reshape(t.shape).to(t.dtype) for (name, t), part in zip(like.items(), parts, strict=True)}
