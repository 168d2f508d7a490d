"""Which of scikit-learn's estimators can be tuned, and what each minimizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn import linear_model, svm
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.kernel_ridge import KernelRidge
from torch import Tensor

from bilevel.errors import InvalidTypeError, InvalidValueError, meant
from bilevel.sklearn import scoring
from bilevel.sklearn.linear import Linear


def _half_squares(scores: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (scores - y) ** 2


def _log_losses(scores: Tensor, y: Tensor) -> Tensor:
    return scoring.log_losses(scores, y)[:, None]


def _squared_hinges(scores: Tensor, y: Tensor) -> Tensor:
    return (1.0 - (2.0 * y - 1.0) * scores).clamp(min=0.0) ** 2


def _deviances(scores: Tensor, y: Tensor) -> Tensor:
    return scores.exp() - y * scores


def _ridge(estimator: Any, classes: int) -> Linear:
    _refuse(estimator, positive=False)
    return Linear("alpha", _half_squares, scoring.REGRESSION, intercept=_intercept(estimator))


def _lasso(estimator: Any, classes: int) -> Linear:
    return _elastic_net(estimator, classes, 1.0)


def _elastic_net(estimator: Any, classes: int, l1_ratio: float | None = None) -> Linear:
    _refuse(estimator, positive=False)
    l1 = float(estimator.l1_ratio if l1_ratio is None else l1_ratio)
    return Linear(
        "alpha",
        _half_squares,
        scoring.REGRESSION,
        l2=1.0 - l1,
        l1=l1,
        mean=True,
        squares=True,
        intercept=_intercept(estimator),
    )


def _logistic(estimator: Any, classes: int) -> Linear:
    ratio, penalty = float(estimator.l1_ratio or 0.0), estimator.penalty
    if penalty is None or not np.isfinite(estimator.C):
        raise InvalidValueError(
            f"`estimator` is {estimator}, which has no penalty, so there is no strength to tune; write "
            "LogisticRegression(C=1.0)"
        )
    ratio = {"l1": 1.0, "l2": 0.0}.get(penalty, ratio)
    liblinear = estimator.solver == "liblinear"
    several = classes > 2 and not liblinear
    return Linear(
        "C",
        _log_losses,
        scoring.PROBABILITIES,
        l2=1.0 - ratio,
        l1=ratio,
        intercept=_intercept(estimator, liblinear),
        scaling=float(estimator.intercept_scaling) if liblinear else 1.0,
        classes=True,
        coupled=several,
        class_weight=estimator.class_weight,
    )


def _linear_svc(estimator: Any, classes: int) -> Linear:
    _refuse(estimator, loss="squared_hinge", penalty="l2", multi_class="ovr")
    return Linear(
        "C",
        _squared_hinges,
        scoring.MARGINS,
        intercept=_intercept(estimator, True),
        scaling=float(estimator.intercept_scaling),
        classes=True,
        class_weight=estimator.class_weight,
    )


def _linear_svr(estimator: Any, classes: int) -> Linear:
    _refuse(estimator, loss="squared_epsilon_insensitive")
    width = float(estimator.epsilon)

    def losses(scores: Tensor, y: Tensor) -> Tensor:
        return ((scores - y).abs() - width).clamp(min=0.0) ** 2

    return Linear(
        "C",
        losses,
        scoring.REGRESSION,
        intercept=_intercept(estimator, True),
        scaling=float(estimator.intercept_scaling),
    )


def _huber(estimator: Any, classes: int) -> Linear:
    width = float(estimator.epsilon)

    def losses(scores: Tensor, y: Tensor, size: Tensor) -> Tensor:
        z = ((y - scores) / size).abs()
        return size * (1.0 + torch.where(z <= width, z**2, 2.0 * width * z - width**2))

    return Linear("alpha", losses, scoring.ROBUST, l2=2.0, intercept=_intercept(estimator), scaled=True)


def _poisson(estimator: Any, classes: int) -> Linear:
    return Linear("alpha", _deviances, scoring.COUNTS, mean=True, intercept=_intercept(estimator))


def _intercept(estimator: Any, penalized: bool = False) -> Any:
    return "none" if not estimator.fit_intercept else "penalized" if penalized else "free"


def _refuse(estimator: Any, **wanted: Any) -> None:
    """Raise unless the settings are those that have a derivative here."""
    for name, value in wanted.items():
        if getattr(estimator, name) != value:
            raise InvalidValueError(
                f"`estimator` is {estimator}, whose {name}={getattr(estimator, name)!r} has no hypergradient here; "
                f"write {type(estimator).__name__}({name}={value!r})"
            )


LINEAR = {
    linear_model.Ridge: _ridge,
    linear_model.LogisticRegression: _logistic,
    linear_model.Lasso: _lasso,
    linear_model.ElasticNet: _elastic_net,
    linear_model.HuberRegressor: _huber,
    linear_model.PoissonRegressor: _poisson,
    svm.LinearSVC: _linear_svc,
    svm.LinearSVR: _linear_svr,
}

SUPPORTED = (*LINEAR, KernelRidge, GaussianProcessRegressor)

# What people may bring instead, and what is nearest to it.
NEAREST = {
    "LinearRegression": "Ridge()",
    "SGDClassifier": "LogisticRegression()",
    "SGDRegressor": "Ridge()",
    "RidgeClassifier": "LogisticRegression()",
    "SVC": "LinearSVC(), after sklearn.kernel_approximation.Nystroem() for a kernel",
    "SVR": "KernelRidge(kernel='rbf')",
    "GammaRegressor": "PoissonRegressor()",
    "TweedieRegressor": "PoissonRegressor()",
    "Lars": "Lasso()",
    "LassoLars": "Lasso()",
}


def unsupported(estimator: Any) -> InvalidTypeError:
    """Return the error for an estimator that is not among the supported ones: which those are, and the nearest."""
    name = type(estimator).__name__
    if isinstance(estimator, type):
        return InvalidTypeError(f"`estimator` is the class {estimator.__name__}; write {estimator.__name__}()")
    known = [cls.__name__ for cls in SUPPORTED]
    plain = name.removesuffix("CV")
    instead = NEAREST.get(name) or (f"{plain}()" if plain in known else "")
    hint = f"; the nearest to it is {instead}" if instead else meant(name, known) or _searched(estimator)
    return InvalidTypeError(
        f"`estimator` is a {name}, expected one of {', '.join(known)}, or a Pipeline that ends in one{hint}"
    )


def _searched(estimator: Any) -> str:
    return (
        "; its hyperparameters have no gradient here: search them with sklearn.model_selection.RandomizedSearchCV or "
        "Optuna"
    )
