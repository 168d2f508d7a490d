"""GradientSearchCV over linear models, against scikit-learn's own solutions, grids and refits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import make_classification, make_regression
from sklearn.linear_model import LogisticRegression, PoissonRegressor, Ridge
from sklearn.metrics import get_scorer, log_loss
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC, LinearSVR

from bilevel.sklearn import GradientSearchCV

FOLDS = KFold(4)
X, Y = make_regression(80, 6, noise=20.0, n_informative=3, random_state=0)
XC, YC = make_classification(90, 5, n_informative=3, random_state=1)
X3, Y3 = make_classification(90, 5, n_informative=4, n_redundant=0, n_classes=3, random_state=2)
COUNTS = np.random.default_rng(0).poisson(np.exp(0.5 + XC[:, 0] - 0.3 * XC[:, 1])).astype(float)
WEIGHTS = np.random.default_rng(1).uniform(0.2, 2.0, 90)

EXACT = {"tol": 1e-10, "max_iter": 100_000}
CASES = {
    "ridge": (Ridge(), X, Y, "neg_mean_squared_error"),
    "ridge, R²": (Ridge(), X, Y, "r2"),
    "ridge, root": (Ridge(fit_intercept=False), X, Y, "neg_root_mean_squared_error"),
    "logistic": (LogisticRegression(**EXACT), XC, YC, "neg_log_loss"),
    "softmax": (LogisticRegression(**EXACT), X3, Y3, "neg_log_loss"),
    "balanced": (LogisticRegression(class_weight="balanced", **EXACT), XC, YC, "neg_brier_score"),
    "softmax, Brier": (LogisticRegression(**EXACT), X3, Y3, "neg_brier_score"),
    "liblinear": (LogisticRegression(solver="liblinear", **EXACT), XC, YC, "neg_log_loss"),
    "poisson": (PoissonRegressor(**EXACT), XC, COUNTS, "neg_mean_poisson_deviance"),
    "svr": (
        LinearSVR(loss="squared_epsilon_insensitive", epsilon=5.0, tol=1e-8, max_iter=100_000),
        X,
        Y,
        "neg_mean_squared_error",
    ),
}


def search_of(case: str, **settings: Any) -> GradientSearchCV:
    estimator, x, y, scoring = CASES[case]
    return GradientSearchCV(estimator, cv=FOLDS, scoring=scoring, **settings).fit(x, y)


@pytest.mark.parametrize("case", CASES)
def test_fold_scores_are_those_of_scikit_learn_s_refits(case: str) -> None:
    estimator, x, y, scoring = CASES[case]
    search = search_of(case)
    tuned = clone(estimator).set_params(**search.best_params_)
    there = cross_val_score(tuned, x, y, cv=FOLDS, scoring=scoring)
    best = search.best_index_
    here = [search.cv_results_[f"split{k}_test_score"][best] for k in range(4)]
    np.testing.assert_allclose(here, there, rtol=1e-5)  # their solvers stop some digits before ours
    assert search.best_score_ == pytest.approx(np.mean(here), rel=1e-12)


@pytest.mark.parametrize("case", ["ridge", "logistic", "softmax", "poisson"])
def test_one_strength_is_the_best_of_a_fine_grid(case: str) -> None:
    estimator, x, y, scoring = CASES[case]
    search = search_of(case)
    ((name, found),) = search.best_params_.items()
    grid = GridSearchCV(estimator, {name: found * np.geomspace(0.5, 2.0, 9)}, cv=FOLDS, scoring=scoring).fit(x, y)
    assert grid.best_params_[name] == pytest.approx(found)  # its middle, so no other step of 19 % is better
    assert search.best_score_ >= grid.best_score_ - 1e-6 * abs(grid.best_score_)


def refitted_loss(model: Any, x: Any, y: Any, scale: Any) -> float:
    return -float(np.mean(cross_val_score(model, x / scale, y, cv=FOLDS, scoring="neg_log_loss")))


def test_no_strength_of_its_own_can_be_moved_for_the_better() -> None:
    # Without the prior, the run ends where central differences of scikit-learn's refits vanish.
    search = search_of("logistic", penalties="per-feature", spread=None, tol=1e-6)
    found = search.best_params_["C_per_feature"]
    base = np.sqrt(1.0 / np.array(list(found.values())))
    model = LogisticRegression(tol=1e-12, max_iter=100_000)
    loss = refitted_loss(model, XC, YC, base)
    assert -search.best_score_ == pytest.approx(loss, rel=1e-7)
    for j in range(5):
        step = np.where(np.arange(5) == j, np.exp(0.05), 1.0)  # 1e-1 in the logarithm of a strength
        slope = (refitted_loss(model, XC, YC, base * step) - refitted_loss(model, XC, YC, base / step)) / 0.2
        assert abs(slope) < 2e-4  # curvatures are about 1e-2, and differences are off by their third derivative


def test_the_final_estimator_is_scikit_learn_s_with_strengths_of_its_own() -> None:
    search = search_of("ridge", penalties="per-feature", spread=None)
    strengths = np.array(list(search.best_params_["alpha_per_feature"].values()))
    assert strengths.max() > 2.0 * strengths.min()
    xc, yc = X - X.mean(0), Y - Y.mean()
    w = np.linalg.solve(xc.T @ xc + np.diag(strengths), xc.T @ yc)  # the generalized ridge, closed form
    np.testing.assert_allclose(search.predict(X), xc @ w + Y.mean(), rtol=1e-8)
    assert isinstance(search.best_estimator_, Pipeline) and isinstance(search.best_estimator_[-1], Ridge)
    again = clone(search.best_estimator_).fit(X, Y)
    np.testing.assert_allclose(again.predict(X), search.predict(X))


def test_strengths_find_columns_of_noise() -> None:
    rng = np.random.default_rng(0)
    x = np.hstack([rng.normal(size=(120, 3)), rng.normal(size=(120, 12))])
    y = x[:, :3] @ [3.0, -2.0, 1.0] + rng.normal(size=120)
    both = {"signal": [0, 1, 2], "noise": list(range(3, 15))}
    shared = GradientSearchCV(Ridge()).fit(x, y)
    groups = GradientSearchCV(Ridge(), "per-group", feature_groups=both, spread=3.0).fit(x, y)
    found = groups.best_params_["alpha_per_group"]
    assert found["noise"] > 10.0 * found["signal"]
    fresh = rng.normal(size=(2000, 15))
    truth = fresh[:, :3] @ [3.0, -2.0, 1.0]

    def error(search: GradientSearchCV) -> float:
        return float(np.mean((search.predict(fresh) - truth) ** 2))

    assert error(groups) < 0.7 * error(shared)


def test_a_linear_svc_is_tuned_for_its_squared_hinge() -> None:
    search = GradientSearchCV(LinearSVC(), cv=FOLDS).fit(XC, YC)
    losses = []
    for train, held in FOLDS.split(XC):
        model = LinearSVC(C=search.best_params_["C"], tol=1e-12, max_iter=1_000_000).fit(XC[train], YC[train])
        margins = (2 * YC[held] - 1) * model.decision_function(XC[held])
        losses.append(np.mean(np.maximum(0.0, 1.0 - margins) ** 2))
    assert -search.best_score_ == pytest.approx(np.mean(losses), rel=1e-5)
    assert search.scoring_ == "neg_squared_hinge"
    assert search.score(XC, YC) == get_scorer("accuracy")(search, XC, YC)


def hinge_of(model: Any, x: Any, y: Any, weights: Any) -> float:
    scores, signs = model.decision_function(x), 2.0 * (y[:, None] == model.classes_) - 1.0
    return -float(np.average((np.maximum(0.0, 1.0 - signs * scores) ** 2).sum(1), weights=weights))


def log_loss_of(model: Any, x: Any, y: Any, weights: Any) -> float:
    return -float(log_loss(y, model.predict_proba(x), sample_weight=weights))


@pytest.mark.parametrize("weights", [None, WEIGHTS * (np.arange(90) % 7 > 0)])
def test_balanced_classes_are_scikit_learn_s(weights: Any) -> None:
    # LinearSVC weighs a class in its own model only; the weights of rows count for what is balanced.
    uneven = np.where(Y3 == 2, 2, np.where(X3[:, 0] > 0.0, 1, 0))
    for model in (LinearSVC(class_weight="balanced", **EXACT), LogisticRegression(class_weight="balanced", **EXACT)):
        search = GradientSearchCV(model, cv=FOLDS).fit(X3, uneven, sample_weight=weights)
        for k, (train, held) in enumerate(FOLDS.split(X3)):
            own = {} if weights is None else {"sample_weight": weights[train]}
            fitted = clone(model).set_params(**search.best_params_).fit(X3[train], uneven[train], **own)
            there = None if weights is None else weights[held]
            scorer = hinge_of if isinstance(model, LinearSVC) else log_loss_of
            expected = scorer(fitted, X3[held], uneven[held], there)
            found = search.cv_results_[f"split{k}_test_score"][search.best_index_]
            assert found == pytest.approx(expected, rel=1e-5)


def test_transformers_see_the_training_rows_of_a_fold_only() -> None:
    estimator = make_pipeline(StandardScaler(), Ridge())
    x = X * np.logspace(-2, 2, 6)
    search = GradientSearchCV(estimator, cv=FOLDS).fit(x, Y)
    tuned = clone(estimator).set_params(**search.best_params_)
    there = cross_val_score(tuned, x, Y, cv=FOLDS, scoring="neg_mean_squared_error").mean()
    assert search.best_score_ == pytest.approx(there, rel=1e-9)


def test_weights_of_rows_are_rows_repeated() -> None:
    counts = np.arange(90) % 3 + 1
    repeated = np.repeat(np.arange(90), counts)
    which = np.arange(90) % 4
    one = [(np.flatnonzero(which != k), np.flatnonzero(which == k)) for k in range(4)]
    all_of_them = [(np.flatnonzero(which[repeated] != k), np.flatnonzero(which[repeated] == k)) for k in range(4)]
    weighted = GradientSearchCV(LogisticRegression(), cv=one).fit(XC, YC, sample_weight=counts)
    longer = GradientSearchCV(LogisticRegression(), cv=all_of_them).fit(XC[repeated], YC[repeated])
    assert weighted.best_params_["C"] == pytest.approx(longer.best_params_["C"], rel=1e-6)
    assert weighted.best_score_ == pytest.approx(longer.best_score_, rel=1e-9)
    np.testing.assert_allclose(weighted.best_estimator_.coef_, longer.best_estimator_.coef_, rtol=1e-3)
