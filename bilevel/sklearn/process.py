"""Gaussian process regression: the kernel's hyperparameters, by folds, by leave-one-out or by the marginal likelihood.

Rasmussen and Williams, Gaussian processes for machine learning, MIT Press 2006: equations 2.25 and 2.26 (predictions),
2.30 (marginal likelihood), 5.10 to 5.12 (leave-one-out in closed form). K and its derivatives over the logarithms of
the hyperparameters are those of scikit-learn's kernel, so that any of its kernels does; the loss's derivative over K is
autograd's.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from sklearn.gaussian_process.kernels import RBF, ConstantKernel
from sklearn.pipeline import Pipeline
from sklearn.utils import check_random_state
from torch import Tensor

from bilevel.errors import InvalidValueError
from bilevel.sklearn.closed import Point, descend, parts, solve_by_cholesky
from bilevel.sklearn.folds import Folds
from bilevel.sklearn.scoring import REGRESSION, Scoring, squared
from bilevel.sklearn.tuning import Floats, Options, Row, Tuned

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
DENSITIES = ("log_predictive_density", "leave_one_out", "log_marginal_likelihood")
SCORINGS = {name: Scoring(name, squared) for name in DENSITIES}
SCORINGS["neg_mean_squared_error"] = REGRESSION["neg_mean_squared_error"]


def check(estimator: Any, penalties: str, weights: Any) -> dict[str, Scoring]:
    """Return the scorings, or raise for what a process cannot be tuned with."""
    if penalties == "per-group":
        raise InvalidValueError(
            '`penalties` is "per-group", and a length scale of scikit-learn\'s kernels is one or one for each column; '
            'write "per-feature" or "shared"'
        )
    if weights is not None:
        raise InvalidValueError(
            "`sample_weight` is given, and GaussianProcessRegressor takes none; write "
            "GaussianProcessRegressor(alpha=variances), the variance of each row's noise"
        )
    if np.ndim(estimator.alpha) > 0:
        raise InvalidValueError(
            "`estimator` has an array for alpha, one variance for each row, which folds would have to cut; write one "
            "number, or add a WhiteKernel to the kernel"
        )
    return SCORINGS


def kernel_of(estimator: Any, features: int, each: bool) -> Any:
    """Return the kernel to begin with; with a length scale for each column where asked for."""
    # scikit-learn's own default is this one, fixed
    kernel = ConstantKernel(1.0) * RBF(1.0) if estimator.kernel is None else clone(estimator.kernel)
    if each:
        params = kernel.get_params()
        lengths = {k: v for k, v in params.items() if k.rsplit("__", 1)[-1] == "length_scale" and np.ndim(v) == 0}
        lengths = {k: v for k, v in lengths.items() if _takes_many(params.get(k.rpartition("__")[0], kernel))}
        if not lengths and not any(np.ndim(v) for v in params.values() if isinstance(v, np.ndarray)):
            raise InvalidValueError(
                f'`penalties` is "per-feature", and the kernel {kernel} has no length scale that could be one for each '
                'column; write RBF() or Matern(), or penalties="shared"'
            )
        kernel.set_params(**{k: np.full(features, float(v)) for k, v in lengths.items()})
    if kernel.n_dims == 0:
        raise InvalidValueError(f"`estimator` has the kernel {kernel}, which has no hyperparameter that is free")
    return kernel


def _takes_many(kernel: Any) -> bool:
    return hasattr(kernel, "anisotropic")


def tune(estimator: Any, folds: Folds, y: Tensor, scoring: Scoring, each: bool, options: Options, seed: Any) -> Tuned:
    """Tune the kernel from where it is, and from as many random places as `n_restarts_optimizer` says."""
    rows = [x.toarray() if hasattr(x, "toarray") else np.asarray(x, dtype=np.float64) for x in folds.rows]
    begin = kernel_of(estimator, folds.features, each)
    lengths = _length_groups(begin) if each and options.spread is not None else []
    whole = scoring.name in ("leave_one_out", "log_marginal_likelihood")
    if whole and len(rows) > 1:
        raise InvalidValueError(
            f"`scoring` is {scoring.name!r}, which has no folds that the transformers of a pipeline could be fitted "
            'on; write scoring="log_predictive_density", or transform X before'
        )

    def evaluate(theta: Floats) -> Point:
        kernel = begin.clone_with_theta(np.array(theta))
        found = [kernel(x, eval_gradient=True) for x in rows]
        matrices = [torch.from_numpy(np.array(k)).requires_grad_() for k, _ in found]
        if whole:
            losses = _whole(matrices[0], y[0], estimator, scoring.name)[None]
            trained = losses
        else:
            each_fold = [
                _fold_loss(matrices[min(i, len(matrices) - 1)], y[0], t, v, estimator, scoring.name)
                for i, (t, v) in enumerate(zip(folds.training, folds.validation, strict=True))
            ]
            losses, trained = (torch.stack(part) for part in zip(*each_fold, strict=True))
        loss = scoring.outer(losses)
        slopes = torch.autograd.grad(loss, matrices)
        gradient = sum(np.einsum("ij,ijp->p", s.numpy(), d) for s, (_, d) in zip(slopes, found, strict=True))
        value, slope = _length_prior(np.asarray(theta), lengths, options.spread, y.shape[1])
        told = [scoring.told(part.detach()).numpy() for part in (losses, trained)]
        params = {"kernel": kernel, "optimizer": None}
        none = ("kernel", np.ones(1))
        plain, (tests, trains) = float(loss.detach()), told
        return Point(
            plain + value,
            gradient + slope,
            lambda seconds: Row(params, None, none, None, tests, trains, plain, seconds),
        )

    bounds = begin.bounds
    random, starts = check_random_state(seed), [begin.theta]
    for _ in range(estimator.n_restarts_optimizer):
        starts.append(random.uniform(bounds[:, 0], bounds[:, 1]))
    return descend(evaluate, starts, (bounds[:, 0], bounds[:, 1]), options)


def density(fitted: Any, X: Any, y: Any) -> float:
    """Return the mean log density of rows under a fitted process."""
    last = fitted.steps[-1][1] if isinstance(fitted, Pipeline) else fitted
    mean, std = fitted.predict(X, return_std=True)
    variance = np.maximum(std**2, 1e-12 * last._y_train_std**2)
    return float(np.mean(-0.5 * (y - mean) ** 2 / variance - 0.5 * np.log(variance) - HALF_LOG_2PI))


def _normalized(y: Tensor, train: Tensor, estimator: Any) -> tuple[Tensor, float, float]:
    if not estimator.normalize_y:
        return y, 0.0, 1.0
    mean, size = float(y[train].mean()), float(y[train].std(correction=0)) or 1.0
    return (y - mean) / size, mean, size


def _whole(matrix: Tensor, y: Tensor, estimator: Any, name: str) -> Tensor:
    """Return the negative log-likelihood a row of all rows: marginal, or each given the others."""
    n = len(y)
    y, _, size = _normalized(y, torch.arange(n), estimator)
    factor, a = solve_by_cholesky(matrix + estimator.alpha * torch.eye(n, dtype=matrix.dtype), y)
    if name == "log_marginal_likelihood":  # of the normalized targets, as scikit-learn's
        return (0.5 * y @ a + factor.diagonal().log().sum()) / n + HALF_LOG_2PI
    inverse = torch.cholesky_inverse(factor).diagonal()
    return (0.5 * a**2 / inverse - 0.5 * inverse.log()).mean() + HALF_LOG_2PI + math.log(size)


def _fold_loss(
    matrix: Tensor, y: Tensor, training: Tensor, validation: Tensor, estimator: Any, name: str
) -> tuple[Tensor, Tensor]:
    """Return the mean loss of the validation rows given the training rows, and that of the training rows."""
    t = parts(training)
    z, _, size = _normalized(y, t, estimator)
    noisy = matrix[t][:, t] + estimator.alpha * torch.eye(len(t), dtype=matrix.dtype)
    factor, a = solve_by_cholesky(noisy, z[t])
    means = []
    for held, weights in ((parts(validation), validation), (t, training)):
        cross = matrix[held][:, t]
        errors = (z[held] - cross @ a) ** 2
        if name == "neg_mean_squared_error":
            losses = errors * size**2
        else:
            half = torch.linalg.solve_triangular(factor, cross.T, upper=False)
            variance = (matrix.diagonal()[held] - (half**2).sum(0)).clamp(min=1e-12)
            losses = 0.5 * errors / variance + 0.5 * variance.log() + HALF_LOG_2PI + math.log(size)
        means.append((weights[held] * losses).sum() / weights[held].sum())
    return means[0], means[1]


def _length_groups(kernel: Any) -> list[slice]:
    """Return where theta holds the length scales of columns."""
    groups, at = [], 0
    for one in kernel.hyperparameters:
        if one.fixed:
            continue
        if one.name.endswith("length_scale") and one.n_elements > 1:
            groups.append(slice(at, at + one.n_elements))
        at += one.n_elements
    return groups


def _length_prior(theta: Floats, groups: list[slice], spread: float | None, rows: int) -> tuple[float, Floats]:
    """Return the deviance a row of length scales around their common one, and its slope."""
    value, slope = 0.0, np.zeros_like(theta)
    for group in groups:
        apart = (theta[group] - theta[group].mean()) / (spread or 1.0)
        value += 0.5 * float(apart @ apart) / rows
        slope[group] += apart / (spread or 1.0) / rows
    return value, slope
