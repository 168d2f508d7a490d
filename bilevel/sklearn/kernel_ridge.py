"""Kernel ridge regression: alpha, the kernel's gamma and a scale for each column, in closed form.

    a = (K_tt + alpha I)^-1 y_t      predictions on the validation rows: K_vt a

With weights of rows, scikit-learn solves (D K D + alpha I) b = D y and a = D b, D the roots of the weights.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bilevel.errors import InvalidValueError
from bilevel.sklearn import scoring as scorings
from bilevel.sklearn.closed import Point, descend, parts, solve_by_cholesky
from bilevel.sklearn.folds import Folds
from bilevel.sklearn.scoring import Scoring, mean_losses
from bilevel.sklearn.tuning import Floats, Options, Row, Tuned, prior

KERNELS = ("linear", "rbf", "laplacian", "poly", "polynomial")  # positive semidefinite, as sigmoid is not
WITH_GAMMA = KERNELS[1:]
ALPHAS, GAMMAS = (1e-3, 1e-1, 10.0), (0.1, 1.0, 10.0)  # times where it starts: what is tried before the run
REACH = math.log(1e8)
ROUNDING = 1e-11  # of the kernel's trace: below such an alpha, predictions have fewer than five digits


def check(estimator: Any) -> dict[str, Scoring]:
    """Return the scorings, or raise for a kernel without a derivative here."""
    if estimator.kernel not in KERNELS:
        raise InvalidValueError(
            f"`estimator` is {estimator}, whose kernel={estimator.kernel!r} has no derivative here; write kernel= one "
            f"of {', '.join(map(repr, KERNELS))}"
        )
    return scorings.REGRESSION


def kernel(estimator: Any, x: Tensor, gamma: Tensor) -> Tensor:
    """Return scikit-learn's pairwise kernel of all rows, `(n, n)`."""
    if estimator.kernel in ("rbf", "laplacian"):
        differences = x[:, None] - x[None]
        distances = (differences**2).sum(-1) if estimator.kernel == "rbf" else differences.abs().sum(-1)
        return torch.exp(-gamma * distances)
    products = x @ x.T
    if estimator.kernel == "linear":
        return products
    powers: Tensor = (gamma * products + estimator.coef0) ** estimator.degree
    return powers


def tune(
    estimator: Any,
    folds: Folds,
    y: Tensor,
    scoring: Scoring,
    index: NDArray[np.int64] | None,
    options: Options,
) -> Tuned:
    """Tune alpha, gamma where the kernel has one, and the scales of columns."""
    rows = [
        torch.from_numpy(x.toarray() if hasattr(x, "toarray") else np.asarray(x, dtype=np.float64)) for x in folds.rows
    ]
    with_gamma = estimator.kernel in WITH_GAMMA
    groups = 0 if index is None else int(index.max()) + 1
    columns = None if index is None else torch.from_numpy(index)

    def evaluate(unknowns: Floats) -> Point:
        u = torch.from_numpy(np.array(unknowns)).requires_grad_()
        alpha, gamma = u[0].exp(), u[1].exp() if with_gamma else torch.ones((), dtype=torch.float64)
        own = u[len(u) - groups :].exp()
        scaled = rows if columns is None else [x / own[columns] for x in rows]
        matrices = [kernel(estimator, x, gamma) for x in scaled]
        scores = torch.stack(
            [_predictions(matrices[min(i, len(matrices) - 1)], alpha, y[0], t) for i, t in enumerate(folds.training)]
        )[:, None]
        means, trained = (mean_losses(scoring, scores, y, w) for w in (folds.validation, folds.training))
        plain = scoring.outer(means)
        loss = plain
        if columns is not None and options.spread is not None:
            loss = plain + prior(own, options.spread, y.shape[1])
        loss = loss + _lost_digits(matrices, alpha)
        (gradient,) = torch.autograd.grad(loss, u)
        params = {"alpha": float(alpha.detach())} | ({"gamma": float(gamma.detach())} if with_gamma else {})
        scale = None if columns is None else own.detach()[columns].numpy()
        told = [scoring.told(m.detach()).numpy() for m in (means, trained)]
        ratios = None if columns is None else own.detach().numpy()
        strengths = ("scale", np.ones(1) if ratios is None else ratios)
        value, (tests, trains) = float(plain.detach()), told
        return Point(
            float(loss.detach()),
            gradient.numpy(),
            lambda seconds: Row(params, ratios, strengths, scale, tests, trains, value, seconds),
        )

    begin = np.zeros(1 + with_gamma + groups)
    alpha = float(np.mean(estimator.alpha))
    begin[0] = math.log(alpha if alpha > 0.0 else 1.0)
    begin[1 : 1 + with_gamma] = math.log(estimator.gamma or 1.0 / folds.features)
    starts = [begin]
    for a in ALPHAS:
        for g in GAMMAS if with_gamma else (1.0,):
            moved = np.zeros_like(begin)
            moved[0] = math.log(a)
            moved[1 : 1 + with_gamma] = math.log(g)
            starts.append(begin + moved)
    return descend(evaluate, starts, (begin - REACH, begin + REACH), options)


def _lost_digits(matrices: list[Tensor], alpha: Tensor) -> Tensor:
    """Return what keeps alpha from where the system is singular to rounding, whose noise would be minimized; else 0."""
    trace = torch.stack([matrix.diagonal().sum() for matrix in matrices]).max()
    return torch.log((ROUNDING * trace + scorings.TINY) / alpha).clamp(min=0.0) ** 2


def _predictions(matrix: Tensor, alpha: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    t = parts(weights)
    roots = weights[t].sqrt()
    system = roots[:, None] * matrix[t][:, t] * roots + alpha * torch.eye(len(t), dtype=matrix.dtype)
    _, b = solve_by_cholesky(system, roots * y[t])
    return matrix[:, t] @ (roots * b)
