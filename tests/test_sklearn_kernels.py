"""GradientSearchCV over kernel ridge regression and Gaussian processes, against scikit-learn's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, WhiteKernel
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.model_selection import KFold, LeaveOneOut, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bilevel.sklearn import GradientSearchCV

RNG = np.random.default_rng(0)
X = RNG.uniform(-2.0, 2.0, (40, 2))
Y = np.sin(2.0 * X[:, 0]) + 0.1 * RNG.normal(size=40)
FOLDS = KFold(4)
PROCESS = GaussianProcessRegressor(RBF() + WhiteKernel(), normalize_y=True)


@pytest.mark.parametrize("kernel", ["linear", "rbf", "laplacian", "poly"])
@pytest.mark.parametrize("penalties", ["shared", "per-feature"])
def test_fold_scores_of_kernel_ridge_are_scikit_learn_s(kernel: str, penalties: str) -> None:
    search = GradientSearchCV(KernelRidge(kernel=kernel, degree=2), penalties, cv=FOLDS, max_steps=2).fit(X, Y)
    there = cross_val_score(search.best_estimator_, X, Y, cv=FOLDS, scoring="neg_mean_squared_error")
    assert search.best_score_ == pytest.approx(there.mean(), rel=1e-7)


def test_a_kernel_of_low_rank_is_not_tuned_for_its_rounding() -> None:
    # A cubic of two columns has rank 10: alpha against gamma^3 runs off to where the systems are singular.
    rng = np.random.default_rng(0)
    x = rng.uniform(-2.0, 2.0, (40, 2))
    y = 5.0 + 3.0 * np.sin(2.0 * x[:, 0]) + 0.3 * rng.normal(size=40) - 5.0
    search = GradientSearchCV(KernelRidge(kernel="polynomial"), "per-feature", cv=FOLDS).fit(x, y)
    alpha, gamma = (search.best_params_[name] for name in ("alpha", "gamma"))
    assert alpha > 1e-12 * np.trace(polynomial_kernel(x, gamma=gamma))
    there = cross_val_score(search.best_estimator_, x, y, cv=FOLDS, scoring="neg_mean_squared_error")
    assert search.best_score_ == pytest.approx(there.mean(), rel=1e-4)


def test_weights_of_kernel_ridge_are_scikit_learn_s() -> None:
    weights = RNG.uniform(0.5, 2.0, 40)
    search = GradientSearchCV(KernelRidge(kernel="rbf"), cv=FOLDS).fit(X, Y, sample_weight=weights)
    errors = []
    for train, held in FOLDS.split(X):
        model = KernelRidge(kernel="rbf", **search.best_params_).fit(X[train], Y[train], sample_weight=weights[train])
        errors.append(np.average((model.predict(X[held]) - Y[held]) ** 2, weights=weights[held]))
    assert -search.best_score_ == pytest.approx(np.mean(errors), rel=1e-7)


def test_no_step_of_alpha_or_gamma_is_better() -> None:
    search = GradientSearchCV(KernelRidge(kernel="rbf"), cv=FOLDS, tol=1e-6).fit(X, Y)

    def score(**moved: Any) -> float:
        model = KernelRidge(kernel="rbf", **(search.best_params_ | moved))
        return float(cross_val_score(model, X, Y, cv=FOLDS, scoring="neg_mean_squared_error").mean())

    for name, value in search.best_params_.items():
        assert max(score(**{name: 1.02 * value}), score(**{name: value / 1.02})) < search.best_score_


def test_the_marginal_likelihood_is_scikit_learn_s_optimum() -> None:
    search = GradientSearchCV(PROCESS, scoring="log_marginal_likelihood", tol=1e-9).fit(X, Y)
    theirs = GaussianProcessRegressor(RBF() + WhiteKernel(), normalize_y=True).fit(X, Y)
    assert search.best_score_ == pytest.approx(theirs.log_marginal_likelihood_value_ / 40, abs=1e-8)
    np.testing.assert_allclose(search.best_estimator_.kernel_.theta, theirs.kernel_.theta, atol=1e-3)


def test_leave_one_out_in_closed_form_is_leave_one_out() -> None:
    process = GaussianProcessRegressor(RBF() + WhiteKernel(0.1))
    closed = GradientSearchCV(process, scoring="leave_one_out", tol=1e-9).fit(X, Y)
    by_folds = GradientSearchCV(process, scoring="log_predictive_density", cv=LeaveOneOut(), tol=1e-9).fit(X, Y)
    assert closed.best_score_ == pytest.approx(by_folds.best_score_, abs=1e-8)


def test_densities_of_folds_are_those_of_scikit_learn_s_predictions() -> None:
    search = GradientSearchCV(PROCESS, "per-feature", cv=FOLDS).fit(X, Y)
    found = []
    for train, held in FOLDS.split(X):
        model = GaussianProcessRegressor(normalize_y=True, **search.best_params_).fit(X[train], Y[train])
        mean, std = model.predict(X[held], return_std=True)
        found.append(np.mean(-0.5 * ((Y[held] - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2.0 * np.pi)))
    assert search.best_score_ == pytest.approx(np.mean(found), rel=1e-6)
    lengths = search.best_params_["kernel"].k1.length_scale
    assert lengths[1] > lengths[0]  # the second column says nothing


def test_a_process_in_a_pipeline_with_rows_held_out() -> None:
    search = GradientSearchCV(make_pipeline(StandardScaler(), PROCESS), cv=FOLDS, holdout=0.25, random_state=0)
    search.fit(X, Y)
    mean, std = search.predict(X, return_std=True)
    assert mean.shape == std.shape == (40,)
    assert search.gap_ == search.best_score_ - search.holdout_score_
