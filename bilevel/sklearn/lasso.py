"""Lasso and elastic net of all folds: scikit-learn's coordinate descent, ended exactly on the support that it finds.

    min over w   1/2 |y - X w|^2 + sum_j l1_j |w_j| + 1/2 l2_j w_j^2

    on the support S with signs s:   (X_S^T X_S + diag(l2_S)) w_S = X_S^T y - l1_S s_S

X and y are each fold's training rows, times the roots of their weights, centered where there is an intercept. Columns
are divided by their own l1, so that scikit-learn's one alpha does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import enet_path
from torch import Tensor

from bilevel.inner.base import InnerSolution, Task
from bilevel.operators import LinearOperator
from bilevel.prox.base import Penalty
from bilevel.sklearn.folds import Design
from bilevel.sklearn.newton import refined
from bilevel.solvers.linear.base import LinearSolution
from bilevel.vector import Vector, dot

Floats = NDArray[np.float64]
TOL, MAX_ITER = 1e-9, 20_000  # of the duality gap, where the support is settled


@dataclass
class BlockLasso:
    """Train the lasso of each fold; an inner solver, and the inverse of the Hessian on its supports.

    Args:
        design: dense rows with a column of ones for the intercept.
        y: `(n,)`.
        weights: of the training rows, `(folds, n)`.
        l1: hyperparameters to the strengths `(folds, 1, p)`, zero for the intercept.
        l2: the same; they go with the square of l1.
        intercept: whether the last column is one.
        penalties: what it minimizes besides the inner loss.
    """

    design: Design
    y: Tensor
    weights: Tensor
    l1: Callable[[Vector], Tensor]
    l2: Callable[[Vector], Tensor]
    intercept: bool
    penalties: tuple[Penalty, ...]
    needs_fixed_loss: ClassVar[bool] = True
    factors: list[tuple[NDArray[np.bool_], tuple[Floats, bool]]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.parts = [self._centered(i) for i in range(len(self.weights))]

    def _centered(self, fold: int) -> tuple[Floats, Floats, Floats, float]:
        """Return rows and targets times the roots of their weights, centered, and their means."""
        weights, rows = self.weights[fold].numpy(), self.design.stacked[min(fold, len(self.design.rows) - 1)].numpy()
        kept = weights > 0.0
        weights, x, y = weights[kept], rows[kept], self.y.numpy()[kept]
        if not self.intercept:
            return x * np.sqrt(weights)[:, None], y * np.sqrt(weights), np.zeros(x.shape[1]), 0.0
        x = x[:, :-1]
        means, mean = np.average(x, axis=0, weights=weights), float(np.average(y, weights=weights))
        return (x - means) * np.sqrt(weights)[:, None], (y - mean) * np.sqrt(weights), means, mean

    def solve(self, task: Task, lower: Vector, upper: Vector) -> InnerSolution:
        """See `bilevel.inner.InnerSolver.solve`."""
        l1, l2 = self.l1(upper), self.l2(upper).expand(self.l1(upper).shape)
        self.factors = []
        w = [self._fold(i, lower["w"][i, 0].numpy(), l1[i, 0].numpy(), l2[i, 0].numpy()) for i in range(len(l1))]
        return InnerSolution({"w": torch.from_numpy(np.stack(w))[:, None]}, 1, "converged")

    def _fold(self, fold: int, start: Floats, l1: Floats, l2: Floats) -> Floats:
        x, y, means, mean = self.parts[fold]
        l1, l2, start = l1[: x.shape[1]], l2[: x.shape[1]], start[: x.shape[1]]
        scale = l1 / l1.mean()
        strength, ridge = float(l1.mean()), float((l2 / scale**2)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the support is what is wanted of it
            _, path, _ = enet_path(
                np.asfortranarray(x / scale),
                y,
                l1_ratio=strength / (strength + ridge),
                alphas=[(strength + ridge) / len(y)],
                coef_init=start * scale,
                tol=TOL,
                max_iter=MAX_ITER,
            )
        w = self._on_support(x, y, path[:, 0] / scale, l1, l2)
        self.factors.append(self._factor(fold, w, l2))
        return np.append(w, mean - means @ w) if self.intercept else w

    def _on_support(self, x: Floats, y: Floats, w: Floats, l1: Floats, l2: Floats) -> Floats:
        """Return the exact solution on the support of w, where the signs stay and all others stay held."""
        held = np.flatnonzero(w)
        if len(held) == 0:
            return w
        part, signs = x[:, held], np.sign(w[held])
        exact = np.zeros_like(w)
        hessian = part.T @ part + np.diag(l2[held])
        exact[held] = np.linalg.lstsq(hessian, part.T @ y - l1[held] * signs)[0]
        slack = np.abs(x.T @ (y - x @ exact)) - l1 * (1.0 + 1e-12)
        slack[held] = 0.0
        return exact if (np.sign(exact[held]) == signs).all() and (slack <= 0.0).all() else w

    def _factor(self, fold: int, w: Floats, l2: Floats) -> tuple[NDArray[np.bool_], tuple[Floats, bool]]:
        """Return where weights are free and the factor of the Hessian there."""
        free = np.append(w != 0.0, True) if self.intercept else w != 0.0
        rows = self.design.stacked[min(fold, len(self.design.rows) - 1)].numpy()[:, free]
        hessian = (rows * self.weights[fold].numpy()[:, None]).T @ rows
        hessian += np.diag((np.append(l2, 0.0) if self.intercept else l2)[free])
        hessian += 1e-13 * np.trace(hessian) / max(1, len(hessian)) * np.eye(len(hessian))
        return free, cho_factor(hessian) if len(hessian) else (hessian, False)

    def inverse(self, v: Vector) -> Vector:
        """Return H^-1 v along the free weights at the last solution, and zero for those that are held."""
        found = np.zeros(v["w"].shape)
        for fold, (free, factor) in enumerate(self.factors):
            if free.any():
                found[fold, 0, free] = cho_solve(factor, v["w"][fold, 0].numpy()[free])
        return {"w": torch.from_numpy(found)}

    def held(self) -> Vector:
        """Return one for each weight that is held at zero."""
        return {"w": torch.from_numpy(np.stack([~free for free, _ in self.factors]).astype(np.float64))[:, None]}


@dataclass(frozen=True)
class OnSupport:
    """Solve with the Hessian on the smooth piece of the solution by the factors that training left, refined once.

    Args:
        lasso: what trained.
        total: what the inner loss is divided by.
    """

    lasso: BlockLasso
    total: float
    truncates: ClassVar[bool] = False

    def solve(self, operator: LinearOperator, rhs: Vector, start: Vector | None = None) -> LinearSolution:
        """See `bilevel.solvers.linear.base.LinearSolver`."""
        held = self.lasso.held()
        count = dot(held, held)
        curvature = dot(held, operator(held)) / count if float(count) > 0.0 else count + 1.0  # of what is held

        def inverse(v: Vector) -> Vector:
            return {"w": self.total * self.lasso.inverse(v)["w"] + held["w"] * v["w"] / curvature}

        return refined(operator, rhs, inverse)
