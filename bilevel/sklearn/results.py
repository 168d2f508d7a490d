"""The results of a search in GridSearchCV's form, and in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from bilevel.sklearn.tuning import Row

WIDE = 0.5  # part of the gain over the first row that shows on rows which no fold has seen


def cv_results(rows: Sequence[Row], params: Callable[[Row], dict[str, Any]]) -> dict[str, Any]:
    """Return `cv_results_`: a row for each point that was evaluated.

    Args:
        rows: the points.
        params: a row to the settings of the estimator by their full names.
    """
    each = [params(row) for row in rows]
    results: dict[str, Any] = {
        "mean_fit_time": np.array([row.seconds / len(row.scores) for row in rows]),
        "std_fit_time": np.zeros(len(rows)),
        "mean_score_time": np.zeros(len(rows)),
        "std_score_time": np.zeros(len(rows)),
    }
    for name in each[0]:
        column = np.ma.array(np.empty(len(rows), dtype=object), mask=False)
        for i, one in enumerate(each):
            column[i] = one[name]
        results[f"param_{name}"] = column
    results["params"] = each
    for part, table in (
        ("test", np.array([row.scores for row in rows])),
        ("train", np.array([row.train_scores for row in rows])),
    ):
        for k in range(table.shape[1]):
            results[f"split{k}_{part}_score"] = table[:, k]
        results[f"mean_{part}_score"], results[f"std_{part}_score"] = table.mean(1), table.std(1)
        if part == "test":
            ranks = rankdata(-results["mean_test_score"], method="min")
            results["rank_test_score"] = ranks.astype(np.int32)
    return results


def summary(search: Any) -> str:
    """Return a table for people."""
    results, best = search.cv_results_, search.best_index_
    strengths = {k: v for k, v in search.best_params_.items() if isinstance(v, dict)}
    rows = [
        ("estimator", str(search.estimator)),
        ("scoring", f"{search.scoring_} (larger is better), {search.n_splits_} folds"),
        *((name, _shown(v)) for name, v in search.best_params_.items() if not isinstance(v, dict)),
    ]
    for name, values in strengths.items():
        numbers = list(values.values())
        rows.append((name, f"{len(numbers)} from {min(numbers):.4g} to {max(numbers):.4g}"))
    rows += [
        ("training score", f"{results['mean_train_score'][best]:.5g}"),
        ("validation score", f"{search.best_score_:.5g} ± {results['std_test_score'][best]:.2g} over the folds"),
    ]
    if hasattr(search, "holdout_score_"):
        rows.append(("score of the rows held out", f"{search.holdout_score_:.5g}"))
        rows.append(("gap", f"{search.gap_:+.2g} (validation - held out)"))
    elif strengths:
        rows.append(
            ("gap", "not measured: so many strengths can fit the validation rows; holdout=0.2 sets rows aside for it")
        )
    rows.append(("run", f"{search.status_.partition(';')[0]}; {len(results['params'])} points evaluated"))
    certificate = getattr(search.solution_, "certificate", None)
    rows.append(("hypergradient", certificate.verdict if certificate else "exact (closed form)"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
