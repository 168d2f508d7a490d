"""GradientSearchCV as a scikit-learn object: frames, groups, pickles, sparse rows, splitters, what it reports."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold, KFold, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from bilevel.sklearn import GradientSearchCV
from bilevel.sklearn.inputs import read

RNG = np.random.default_rng(0)
FRAME = pd.DataFrame(
    {
        "size": RNG.normal(size=80),
        "age": RNG.uniform(20.0, 60.0, 80),
        "city": RNG.choice(["Rome", "Oslo", "Lima", "Bern"], 80, p=[0.4, 0.3, 0.28, 0.02]),
    }
)
Y = 2.0 * FRAME["size"].to_numpy() + (FRAME["city"] == "Rome") * 1.5 + 0.5 * RNG.normal(size=80)
COLUMNS = make_column_transformer((StandardScaler(), ["size", "age"]), (OneHotEncoder(), ["city"]))


def test_a_pipeline_with_one_hot_columns_shares_strengths_by_source_column() -> None:
    # "Bern" is rare: some folds train without it, and their columns are aligned by name.
    encoder = make_column_transformer(
        (StandardScaler(), ["size", "age"]), (OneHotEncoder(handle_unknown="ignore"), ["city"])
    )
    search = GradientSearchCV(make_pipeline(encoder, Ridge()), "per-group", spread=1.0).fit(FRAME, Y)
    strengths = search.best_params_["ridge__alpha_per_group"]
    assert list(strengths) == ["size", "age", "city"]
    assert strengths["age"] > strengths["size"]
    np.testing.assert_array_equal(search.feature_names_in_, FRAME.columns)
    assert search.n_features_in_ == 3
    assert list(search.best_estimator_.named_steps) == ["columntransformer", "scale", "ridge"]
    there = cross_val_score(search.best_estimator_, FRAME, Y, scoring="neg_mean_squared_error").mean()
    assert search.best_score_ == pytest.approx(there, rel=1e-7)


def test_groups_by_names_of_the_input_and_of_the_transformed_columns() -> None:
    groups = {"place": ["city"], "one": ["standardscaler__size"]}
    search = GradientSearchCV(make_pipeline(COLUMNS, Ridge()), "per-group", feature_groups=groups, cv=2)
    found = search.fit(FRAME, Y).best_params_["ridge__alpha_per_group"]
    assert list(found) == ["place", "one", "the rest"]


def test_the_final_estimator_is_loaded_without_this_library(tmp_path: Any) -> None:
    search = GradientSearchCV(Ridge(), "per-feature").fit(FRAME[["size", "age"]], Y)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(search.best_estimator_))
    program = (
        "import pickle, sys; model = pickle.load(open('model.pickle', 'rb')); "
        "assert 'torch' not in sys.modules and 'bilevel' not in sys.modules; print(model.predict([[1.0, 30.0]])[0])"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    expected = search.best_estimator_.predict(pd.DataFrame({"size": [1.0], "age": [30.0]}))[0]
    assert float(run.stdout.split()[-1].strip("np.float64()")) == pytest.approx(expected), run.stderr


def test_a_search_is_pickled_and_cloned() -> None:
    search = GradientSearchCV(make_pipeline(COLUMNS, Ridge()), "per-feature", cv=3).fit(FRAME, Y)
    again = pickle.loads(pickle.dumps(search))
    np.testing.assert_array_equal(again.predict(FRAME), search.predict(FRAME))
    assert again.summary() == search.summary()
    fresh = clone(search)
    assert not hasattr(fresh, "best_params_") and fresh.penalties == "per-feature"
    np.testing.assert_allclose(fresh.fit(FRAME, Y).predict(FRAME), search.predict(FRAME))


def test_sparse_rows_give_what_dense_ones_give(monkeypatch: pytest.MonkeyPatch) -> None:
    x = sparse.random_array((60, 8), density=0.3, rng=np.random.default_rng(1), format="csr")
    y = (x @ np.array([3.0, -3.0, 2.0, 0, 0, 0, 0, 0]) + 0.3 * RNG.normal(size=60) > 0.0).astype(int)
    quick: dict[str, Any] = {"cv": 2, "max_steps": 2}
    dense = GradientSearchCV(LogisticRegression(), "per-feature", **quick).fit(x.toarray(), y)
    monkeypatch.setattr("bilevel.sklearn.folds.DENSE_UP_TO", 0)
    kept = GradientSearchCV(LogisticRegression(), "per-feature", **quick).fit(x, y)
    assert kept.best_params_["C"] == pytest.approx(dense.best_params_["C"], rel=1e-3)
    assert kept.best_score_ == pytest.approx(dense.best_score_, rel=1e-4)
    np.testing.assert_array_equal(kept.predict(x), dense.predict(x.toarray()))


def test_splitters_get_their_groups() -> None:
    groups = np.repeat(np.arange(8), 10)
    x = FRAME[["size", "age"]].to_numpy()
    search = GradientSearchCV(Ridge(), cv=GroupKFold(4)).fit(x, Y, groups=groups)
    model = Ridge(alpha=search.best_params_["alpha"])
    there = cross_val_score(model, x, Y, cv=GroupKFold(4), groups=groups, scoring="neg_mean_squared_error").mean()
    assert search.n_splits_ == 4
    assert search.best_score_ == pytest.approx(there, rel=1e-9)


def test_results_have_grid_search_s_form() -> None:
    x = FRAME[["size", "age"]].to_numpy()
    search = GradientSearchCV(Ridge(), cv=KFold(3)).fit(x, Y)
    results, best = search.cv_results_, search.best_index_
    rows = len(results["params"])
    assert results["params"][best] == search.best_params_
    assert results["mean_test_score"][best] == search.best_score_
    assert all(len(column) == rows for column in results.values())
    assert list(pd.DataFrame(results)["param_alpha"]) == [params["alpha"] for params in results["params"]]
    assert results["rank_test_score"].min() == 1
    for params, score in zip(results["params"], results["mean_test_score"], strict=True):
        there = cross_val_score(Ridge(**params), x, Y, cv=KFold(3), scoring="neg_mean_squared_error").mean()
        assert score == pytest.approx(there, rel=1e-8)


def test_rows_held_out_tell_how_far_the_validation_rows_were_fitted() -> None:
    rng = np.random.default_rng(3)
    x, fresh = rng.normal(size=(60, 20)), rng.normal(size=(5000, 20))
    y, truth = x[:, 0] + rng.normal(size=60), fresh[:, 0] + rng.normal(size=5000)
    search = GradientSearchCV(Ridge(), "per-feature", spread=None, holdout=0.3, random_state=0).fit(x, y)
    assert search.gap_ == search.best_score_ - search.holdout_score_
    assert search.gap_ > 0.1  # twenty strengths and 42 rows
    assert "gap" in search.summary() and "held out" in search.summary()
    kept = GradientSearchCV(Ridge(), "per-feature", spread=0.1).fit(x, y)

    def optimism(found: GradientSearchCV) -> float:
        return found.best_score_ + float(np.mean((found.predict(fresh) - truth) ** 2))

    wild = GradientSearchCV(Ridge(), "per-feature", spread=None).fit(x, y)
    assert optimism(wild) > optimism(kept) + 0.1  # what the prior is for


def test_the_last_step_s_name_is_free() -> None:
    steps = [("scale", StandardScaler()), ("model", Ridge())]
    search = GradientSearchCV(Pipeline(steps), "per-feature", cv=2).fit(FRAME[["size", "age"]], Y)
    assert [name for name, _ in search.best_estimator_.steps] == ["scale", "strengths", "model"]
    assert "model__alpha" in search.best_params_


def test_importing_bilevel_imports_no_scikit_learn() -> None:
    program = "import sys, bilevel; assert 'sklearn' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_groups_are_held_out_whole_and_an_earlier_fit_leaves_nothing() -> None:
    # Four near copies of each of 20 rows, and targets of pure noise: copies on both sides would be predicted.
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 4)
    x, y = rng.normal(size=(20, 15))[groups] + 0.01 * rng.normal(size=(80, 15)), rng.normal(size=20)[groups]
    search = GradientSearchCV(Ridge(), cv=GroupKFold(4), holdout=0.25, random_state=0)
    inputs = read(search, x, y, None, groups, False)
    kept = search._split(inputs, False)
    assert len(kept) == 60 and not set(groups[kept]) & set(np.delete(groups, kept))
    assert "held out" in search.fit(x, y, groups=groups).summary()
    search.set_params(holdout=None, refit=False).fit(x, y, groups=groups)
    assert not any(hasattr(search, name) for name in ("holdout_score_", "gap_", "best_estimator_"))
    assert "held out" not in search.summary()
