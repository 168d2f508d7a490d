"""What GradientSearchCV says about what it cannot take, and what to write instead."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import WhiteKernel
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import (
    HuberRegressor,
    Lasso,
    LogisticRegression,
    PoissonRegressor,
    Ridge,
    RidgeClassifier,
    SGDClassifier,
)
from sklearn.metrics import make_scorer, median_absolute_error
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC

from bilevel.errors import BilevelError
from bilevel.sklearn import GradientSearchCV

X = np.random.default_rng(0).normal(size=(30, 3))
Y = X @ [1.0, 2.0, 0.0] + 0.5 * np.random.default_rng(1).normal(size=30)
C = (Y > 0.0).astype(int)
FRAME = pd.DataFrame(X, columns=["size", "weight", "age"])

WRONG: dict[str, tuple[Any, dict[str, Any], Any, str]] = {
    "forest": (RandomForestClassifier(), {}, C, "expected one of Ridge, .*RandomizedSearchCV"),
    "nearest": (RidgeClassifier(), {}, C, r"the nearest to it is LogisticRegression\(\)"),
    "sgd": (SGDClassifier(), {}, C, r"nearest to it is LogisticRegression\(\)"),
    "svc": (make_pipeline(StandardScaler(), SVC()), {}, C, r"LinearSVC\(\), after .*Nystroem"),
    "class": (Ridge, {}, Y, r"the class Ridge; write Ridge\(\)"),
    "hinge": (LinearSVC(loss="hinge"), {}, C, r"write LinearSVC\(loss='squared_hinge'\)"),
    "positive": (Lasso(positive=True), {}, Y, r"write Lasso\(positive=False\)"),
    "no penalty": (LogisticRegression(C=np.inf), {}, C, r"no strength to tune; write LogisticRegression\(C=1.0\)"),
    "accuracy": (LogisticRegression(), {"scoring": "accuracy"}, C, "cannot be differentiated.*scoring='neg_log_loss'"),
    "roc": (LogisticRegression(), {"scoring": "roc_auc"}, C, "scoring='neg_log_loss'"),
    "f1 of a svc": (LinearSVC(), {"scoring": "f1"}, C, "scoring='neg_squared_hinge'"),
    "typing error": (Ridge(), {"scoring": "neg_mean_square_error"}, Y, 'did you mean "neg_mean_squared_error"'),
    "scorer": (Ridge(), {"scoring": make_scorer(median_absolute_error)}, Y, "has no derivative here"),
    "several": (Ridge(), {"scoring": ["r2", "neg_mean_squared_error"]}, Y, "one loss to follow"),
    "penalties": (Ridge(), {"penalties": "per-features"}, Y, 'did you mean "per-feature"'),
    "grid": (Ridge(), {"penalties": {"alpha": [0.1, 1.0]}}, Y, "is a dict.*there is no grid to give"),
    "groups unused": (Ridge(), {"feature_groups": {"a": [0]}}, Y, 'write penalties="per-group"'),
    "column": (Ridge(), {"penalties": "per-group", "feature_groups": {"a": ["weigt"]}}, Y, 'did you mean "weight"'),
    "index": (Ridge(), {"penalties": "per-group", "feature_groups": {"a": [3]}}, Y, "there are 3: 0 to 2"),
    "twice": (
        Ridge(),
        {"penalties": "per-group", "feature_groups": {"a": ["age"], "b": [2]}},
        Y,
        "'age' in both 'a' and 'b'",
    ),
    "list of groups": (Ridge(), {"penalties": "per-group", "feature_groups": [["age"]]}, Y, "expected a dict"),
    "spread": (Ridge(), {"spread": 0.0}, Y, "`spread` is 0.0, expected a number above 0"),
    "holdout": (Ridge(), {"holdout": 1.5}, Y, "`holdout` is 1.5"),
    "steps": (Ridge(), {"max_steps": 0}, Y, "`max_steps` is 0"),
    "tol": (Ridge(), {"tol": -1.0}, Y, "`tol` is -1.0"),
    "several targets": (Ridge(), {}, np.stack([Y, Y], 1), "1d array"),
    "one class": (LogisticRegression(), {}, np.zeros(30), "one class only"),
    "NaN in y": (HuberRegressor(), {}, np.where(Y > 1.0, np.nan, Y), "NaN"),
    "negative counts": (PoissonRegressor(), {}, Y, r"y >= 0; for other numbers write Ridge\(\)"),
    "kernel": (KernelRidge(kernel="sigmoid"), {}, Y, "write kernel= one of 'linear', 'rbf'"),
    "fixed": (GaussianProcessRegressor(WhiteKernel(1.0, "fixed")), {}, Y, "no hyperparameter that is free"),
    "process in groups": (GaussianProcessRegressor(), {"penalties": "per-group"}, Y, 'write "per-feature"'),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_tuned_is_refused_with_what_can(case: str) -> None:
    estimator, settings, y, message = WRONG[case]
    with pytest.raises((BilevelError, ValueError), match=message):
        GradientSearchCV(estimator, **settings).fit(FRAME, y)


def test_groups_without_names_ask_for_a_dataframe() -> None:
    with pytest.raises(BilevelError, match="give X as a DataFrame, or feature_groups="):
        GradientSearchCV(Ridge(), "per-group").fit(X, Y)
    with pytest.raises(BilevelError, match="X has no column names"):
        GradientSearchCV(Ridge(), "per-group", feature_groups={"a": ["age"]}).fit(X, Y)


def test_missing_values_are_refused_and_an_imputer_takes_them() -> None:
    from sklearn.impute import SimpleImputer

    frame = FRAME.copy()
    frame.iloc[3, 1] = np.nan
    with pytest.raises(ValueError, match="SimpleImputer"):
        GradientSearchCV(Ridge()).fit(frame, Y)
    search = GradientSearchCV(make_pipeline(SimpleImputer(), Ridge())).fit(frame, Y)
    assert search.score(frame, Y) > 0.8


def test_without_refit_there_is_no_prediction() -> None:
    search = GradientSearchCV(Ridge(), refit=False).fit(X, Y)
    assert search.best_params_["alpha"] > 0.0
    with pytest.raises(AttributeError) as raised:
        search.predict(X)
    assert "write refit=True" in str(raised.value.__cause__)


def test_a_process_takes_no_weights_of_rows() -> None:
    with pytest.raises(BilevelError, match="GaussianProcessRegressor takes none"):
        GradientSearchCV(GaussianProcessRegressor()).fit(X, Y, sample_weight=np.ones(30))


def test_numbers_are_not_taken_for_classes() -> None:
    whole = np.concatenate([np.arange(30.0), np.repeat(np.arange(30.0, 40.0), 7)])
    with pytest.raises(BilevelError, match=r"y has 40 classes, 30 of them with a single row; .* take Ridge"):
        GradientSearchCV(LogisticRegression()).fit(np.ones((100, 2)), whole)
