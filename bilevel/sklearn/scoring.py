"""Scorings that can be differentiated: what each is of a model's scores, and the loss that is minimized for it.

The outer loss is a negative log-likelihood a row wherever there is one, so that a prior means the same for all of them.
For squared errors that is log(mean squared error) / 2, the normal one with the variance that fits best: same minimum,
no unit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.base import is_classifier
from sklearn.linear_model import PoissonRegressor
from sklearn.pipeline import Pipeline
from torch import Tensor
from torch.nn import functional

from bilevel.errors import InvalidTypeError, InvalidValueError, meant

TINY = 1e-300


@dataclass(frozen=True)
class Scoring:
    """A scoring of folds.

    Attributes:
        name: as scikit-learn calls it.
        loss: scores `(folds, models, n)`, targets `(models, n)` -> loss of each row, `(folds, n)`.
        told: the weighted mean losses of the folds `(folds,)` -> their scores, larger is better.
        outer: the same -> the outer loss, one number.
        relative: each fold's loss is divided by the variance of its targets (R^2).
    """

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    told: Callable[[Tensor], Tensor] = torch.neg
    outer: Callable[[Tensor], Tensor] = torch.mean
    relative: bool = False


def log_losses(scores: Tensor, y: Tensor) -> Tensor:
    """Return the log loss of each row; targets are 0 or 1 in one model, or one-hot in as many as there are classes."""
    if scores.shape[1] == 1:
        return (functional.softplus(scores) - y * scores)[:, 0]
    return torch.logsumexp(scores, 1) - (y * scores).sum(1)


def _brier(scores: Tensor, y: Tensor) -> Tensor:
    if scores.shape[1] == 1:
        return ((torch.sigmoid(scores) - y) ** 2)[:, 0]
    return ((torch.softmax(scores, 1) - y) ** 2).sum(1)  # as scikit-learn, which halves it for two classes only


def squared(scores: Tensor, y: Tensor) -> Tensor:
    """Return the squared error of each row."""
    return ((scores - y) ** 2).sum(1)


def _poisson(scores: Tensor, y: Tensor) -> Tensor:
    return 2.0 * (torch.exp(scores) - y - y * scores + torch.xlogy(y, y))[:, 0]


def _squared_after_exp(scores: Tensor, y: Tensor) -> Tensor:
    return ((torch.exp(scores) - y) ** 2)[:, 0]


def squared_hinge(scores: Tensor, y: Tensor) -> Tensor:
    """Return max(0, 1 - y s)^2 of each row, summed over the one-against-the-rest models; targets are 0 or 1."""
    return (torch.clamp(1.0 - (2.0 * y - 1.0) * scores, min=0.0) ** 2).sum(1)


def _half_log(losses: Tensor) -> Tensor:
    return 0.5 * torch.log(losses.mean() + TINY)


def _log_root(losses: Tensor) -> Tensor:
    return torch.log(torch.sqrt(losses + TINY).mean())


def _log(losses: Tensor) -> Tensor:
    return torch.log(losses.mean() + TINY)


def absolute(scores: Tensor, y: Tensor) -> Tensor:
    """Return the absolute error of each row."""
    return (scores - y).abs().sum(1)


def _roots(losses: Tensor) -> Tensor:
    return -torch.sqrt(losses)


def _half(losses: Tensor) -> Tensor:
    return 0.5 * losses.mean()


def _r2(losses: Tensor) -> Tensor:
    return 1.0 - losses


def _errors(loss: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Scoring]:
    rows = (
        Scoring("neg_mean_squared_error", loss, outer=_half_log),
        Scoring("neg_root_mean_squared_error", loss, told=_roots, outer=_log_root),
        Scoring("r2", loss, told=_r2, outer=_half_log, relative=True),
    )
    return {row.name: row for row in rows}


ABSOLUTE = {"neg_mean_absolute_error": Scoring("neg_mean_absolute_error", absolute, outer=_log)}
REGRESSION = {**_errors(squared), **ABSOLUTE}
ROBUST = {**ABSOLUTE, **REGRESSION}
COUNTS = {
    "neg_mean_poisson_deviance": Scoring("neg_mean_poisson_deviance", _poisson, outer=_half),
    **_errors(_squared_after_exp),
}
PROBABILITIES = {
    "neg_log_loss": Scoring("neg_log_loss", log_losses),
    "neg_brier_score": Scoring("neg_brier_score", _brier),
}
MARGINS = {"neg_squared_hinge": Scoring("neg_squared_hinge", squared_hinge)}


def scoring_of(given: Any, table: dict[str, Scoring], model: str) -> Scoring:
    """Return the scoring that is meant; None: the first of the table.

    Raises:
        BilevelError: it cannot be differentiated; the message names what stands for it.
    """
    default = next(iter(table))
    known = ", ".join(map(repr, table))
    if given is None:
        return table[default]
    if isinstance(given, (list, tuple, set, dict)):
        raise InvalidTypeError(
            f"`scoring` is a {type(given).__name__}; a gradient has one loss to follow: give one of {known}"
        )
    if not isinstance(given, str):
        name = getattr(given, "__name__", repr(given))
        raise InvalidTypeError(
            f"`scoring` is {name}, a function of predictions that has no derivative here; {model} takes {known}; score "
            f"the result with yours afterwards: {name}(search.best_estimator_, X_test, y_test)"
        )
    if given in table:
        return table[given]
    raise InvalidValueError(
        f"`scoring` is {given!r}, which {_why(given)}; {model} takes {known}: write scoring={default!r} for tuning, "
        f"and look at {given!r} of the result with sklearn.metrics.get_scorer({given!r})" + meant(given, table)
    )


def mean_losses(scoring: Scoring, scores: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean loss of each fold, `(folds,)`; for R^2 as a part of the variance of its targets.

    Args:
        scoring: what loss.
        scores: `(folds, models, n)`.
        y: `(models, n)`.
        weights: `(folds, n)`.
    """
    weights = weights / weights.sum(1, keepdim=True)
    means = (weights * scoring.loss(scores, y)).sum(1)
    if not scoring.relative:
        return means
    center = weights @ y[0]
    return means / ((y[0] - center[:, None]) ** 2 * weights).sum(1)


def decision_scores(estimator: Any, X: Any) -> Tensor:
    """Return the scores `(1, models, n)` of a fitted estimator of scikit-learn's."""
    if is_classifier(estimator):
        values = np.atleast_2d(estimator.decision_function(X).T)
    else:
        last = estimator.steps[-1][1] if isinstance(estimator, Pipeline) else estimator
        values = np.ravel(estimator.predict(X))[None]
        values = np.log(values) if isinstance(last, PoissonRegressor) else values
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))[None]


def score_of(scoring: Scoring, scores: Tensor, y: Tensor, weights: Any) -> float:
    """Return the score of rows with weights `(n,)`, larger is better."""
    means = mean_losses(scoring, scores, y, torch.from_numpy(np.asarray(weights))[None])
    return float(scoring.told(means)[0])


_STEPS = "accuracy f1 precision recall jaccard roc_auc average_precision top_k max_error median d2_absolute matthews"


def _why(given: str) -> str:
    """Say why a scoring is not taken."""
    if any(given.startswith(word) or word in given for word in _STEPS.split()):
        return "cannot be differentiated (it jumps, or does not move, as the predictions do)"
    return "is not among those that are differentiated for this estimator"
