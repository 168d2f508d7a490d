"""GradientSearchCV over lasso, elastic net, L1 logistic regression and Huber's, against scikit-learn's own."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import make_classification, make_regression
from sklearn.linear_model import ElasticNet, HuberRegressor, Lasso, LassoCV, LogisticRegression
from sklearn.model_selection import KFold, cross_val_score

from bilevel.sklearn import GradientSearchCV

FOLDS = KFold(4)
X, Y = make_regression(60, 8, noise=30.0, n_informative=3, random_state=0)
XC, YC = make_classification(80, 6, n_informative=2, random_state=1)
EXACT = {"tol": 1e-12, "max_iter": 100_000}


@pytest.mark.parametrize("estimator", [Lasso(**EXACT), ElasticNet(l1_ratio=0.7, **EXACT)])
@pytest.mark.parametrize("penalties", ["shared", "per-feature"])
def test_fold_scores_and_supports_are_scikit_learn_s(estimator: Lasso, penalties: str) -> None:
    search = GradientSearchCV(estimator, penalties, cv=FOLDS, spread=1.0).fit(X, Y)
    there = cross_val_score(search.best_estimator_, X, Y, cv=FOLDS, scoring="neg_mean_squared_error")
    assert search.best_score_ == pytest.approx(there.mean(), rel=1e-8)
    assert search.solution_ is not None
    assert search.solution_.certificate.verdict == "exact"
    fold = clone(search.best_estimator_).fit(*(part[15:] for part in (X, Y)))  # the rows of the first fold
    last = fold[-1] if penalties == "per-feature" else fold
    ours = search.solution_.params["w"][0, 0, :-1].numpy()
    scale = 1.0 / fold[0].kw_args["b"].diagonal() if penalties == "per-feature" else 1.0
    np.testing.assert_array_equal(ours == 0.0, last.coef_ == 0.0)
    np.testing.assert_allclose(ours * scale, last.coef_, atol=1e-5)


def test_one_alpha_is_no_worse_than_the_grid_s() -> None:
    search = GradientSearchCV(Lasso(**EXACT), cv=FOLDS).fit(X, Y)
    grid = LassoCV(cv=FOLDS, alphas=200, **EXACT).fit(X, Y)
    assert -search.best_score_ <= grid.mse_path_.mean(1).min() * (1.0 + 1e-5)


def test_an_l1_penalty_on_a_classifier() -> None:
    model = LogisticRegression(l1_ratio=1.0, solver="saga", tol=1e-10, max_iter=100_000)
    search = GradientSearchCV(model, cv=FOLDS).fit(XC, YC)
    there = cross_val_score(search.best_estimator_, XC, YC, cv=FOLDS, scoring="neg_log_loss")
    assert search.best_score_ == pytest.approx(there.mean(), rel=1e-6)


def test_huber_s_regression_ignores_outliers_in_both_losses() -> None:
    y = Y.copy()
    y[::7] += 2000.0
    search = GradientSearchCV(HuberRegressor(tol=1e-8, max_iter=10_000), cv=FOLDS).fit(X, y)
    there = cross_val_score(search.best_estimator_, X, y, cv=FOLDS, scoring="neg_mean_absolute_error")
    assert search.scoring_ == "neg_mean_absolute_error"
    assert search.best_score_ == pytest.approx(there.mean(), rel=1e-4)  # theirs stops early
