"""Sparse regression, for the tests of inner problems with kinks and bounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import bilevel
from bilevel import inner

DOUBLE = torch.float64
EXACT = 1e-8


class Regression:
    """Least squares with correlated features, a few of which matter; half the mean of squares, as in scikit-learn."""

    def __init__(self, rows: int = 50, features: int = 20, seed: int = 0) -> None:
        data = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=data, dtype=DOUBLE)

        truth = torch.zeros(features, dtype=DOUBLE)
        truth[:5] = torch.tensor([3.0, -2.0, 1.5, 1.0, -1.0])[:features]
        self.X, self.Xv = (x + 0.5 * x.roll(1, 1) for x in (normal(rows, features), normal(rows, features)))
        self.y, self.yv = self.X @ truth + normal(rows), self.Xv @ truth + normal(rows)
        self.start = torch.zeros(features, dtype=DOUBLE)

    def inner(self, w: Tensor, h: Any) -> Tensor:
        return 0.5 * ((self.X @ w - self.y) ** 2).mean()

    def outer(self, w: Tensor, h: Any) -> Tensor:
        return ((self.Xv @ w - self.yv) ** 2).mean()

    def problem(self, penalty: Any, hparams: Any, **given: Any) -> bilevel.BilevelProblem:
        loss = given.pop("loss", self.inner)
        solver = given.pop("solver", None) or inner.Proximal(penalty)
        return bilevel.BilevelProblem(loss, self.outer, self.start, hparams, inner_solver=solver)

    def hessian(self) -> Tensor:
        return self.X.T @ self.X / len(self.y)

    def slope(self, w: Tensor) -> Tensor:
        """∂f/∂w."""
        return 2.0 * self.Xv.T @ (self.Xv @ w - self.yv) / len(self.yv)

    def adjoint(self, w: Tensor, free: Tensor, curvature: Tensor | float = 0.0) -> Tensor:
        """Return (H + curvature)_SS^-1 ∂f/∂w_S, zero where not free."""
        hessian = (self.hessian() + curvature)[free][:, free]
        v = torch.zeros_like(w)
        v[free] = torch.linalg.solve(hessian, self.slope(w)[free])
        return v
