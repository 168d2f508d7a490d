"""`GradientSearchCV`: what `GridSearchCV` does, with hypergradients of the cross-validation loss for the grid."""

from __future__ import annotations

import numbers
import time
from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, MetaEstimatorMixin, is_classifier
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics import get_scorer, get_scorer_names
from sklearn.model_selection import GroupShuffleSplit, check_cv, train_test_split
from sklearn.pipeline import Pipeline
from sklearn.utils import _safe_indexing
from sklearn.utils.validation import check_is_fitted

from bilevel.errors import InvalidValueError
from bilevel.sklearn import kernel_ridge, process
from bilevel.sklearn.delegation import Delegates
from bilevel.sklearn.folds import fold
from bilevel.sklearn.inputs import Inputs, class_weights, read, targets, transformers_of
from bilevel.sklearn.linear import LinearSearch
from bilevel.sklearn.models import LINEAR, SUPPORTED, unsupported
from bilevel.sklearn.results import cv_results, summary
from bilevel.sklearn.scoring import decision_scores, score_of, scoring_of
from bilevel.sklearn.strengths import final_estimator, grouping
from bilevel.sklearn.tuning import Options, Row, Tuned


class GradientSearchCV(Delegates, MetaEstimatorMixin, BaseEstimator):  # type: ignore[misc]
    """Tune the continuous hyperparameters of one of scikit-learn's estimators by the gradient of its K-fold loss.

    Args:
        estimator: one of the supported ones (docs/sklearn.md has the table), or a Pipeline that ends in one; its
            transformers are fitted on the training rows of each fold. What is not tuned stays as it is there.
        penalties: "shared", one strength; "per-feature", one for each column that the last step gets; "per-group".
        feature_groups: with "per-group": a dict of names to columns (names or indices, of the input or of what the
            transformers make); columns in no group share one more. None: one group for each input column, with all
            that the transformers make of it.
        spread: how far strengths may lie apart: the standard deviation of their logarithms around the common one,
            under a log-normal prior whose deviance a row is added to the outer loss. Larger fits the validation rows
            better, and their noise; None: no prior.
        cv: as in GridSearchCV.
        scoring: a differentiable one by its name; None: the negative log-likelihood that fits the estimator.
        refit: fit `best_estimator_` on all rows in the end.
        holdout: part of the rows that is set aside before anything is tuned, and scored in the end: `holdout_score_`,
            and `gap_`, by how much the validation score was too good; with `groups` of `fit`, whole groups of them.
            `best_estimator_` sees all rows. None: none.
        max_steps: most outer steps.
        tol: stop where the gradient is this part of that at the start.
        random_state: of the rows of `holdout`.
        verbose: 1 shows the run.

    Attributes:
        best_estimator_: a fitted estimator of scikit-learn's; with several strengths a Pipeline with a step more, which
            divides the columns (`bilevel.sklearn.strengths`).
        best_params_: its settings in scikit-learn's units, by the names that `set_params` of `estimator` takes. With
            several strengths there is one entry more, `alpha_per_feature` (`C_per_feature`; `..._per_group`): a dict of
            names to strengths, which `set_params` does not take; `best_estimator_` has them.
        best_score_: mean score of the validation rows of the folds, larger is better.
        best_index_: the row of `cv_results_` that the search ended at.
        cv_results_: as in GridSearchCV, one row for each point that was evaluated. The folds train together: the fit
            time of one is its share of all, scoring included, so their deviations and the score times are zero.
        n_splits_: folds.
        refit_time_: seconds.
        scoring_: the name of the scoring.
        status_: why the run ended.
        solution_: the outer run, a `bilevel.Solution`, with its certificate; None where training has a closed form,
            through which the gradient is exact (kernel ridge, Gaussian processes).
        holdout_score_: score of the rows set aside, by a model that was trained on the others.
        gap_: `best_score_ - holdout_score_`.
    """

    def __init__(
        self,
        estimator: Any,
        penalties: str = "shared",
        *,
        feature_groups: Any = None,
        spread: float | None = 0.25,
        cv: Any = None,
        scoring: Any = None,
        refit: bool = True,
        holdout: float | None = None,
        max_steps: int = 50,
        tol: float = 1e-3,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.estimator = estimator
        self.penalties = penalties
        self.feature_groups = feature_groups
        self.spread = spread
        self.cv = cv
        self.scoring = scoring
        self.refit = refit
        self.holdout = holdout
        self.max_steps = max_steps
        self.tol = tol
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> GradientSearchCV:
        """Tune, and fit the best estimator on all rows.

        Args:
            X: `(n, d)`, an array, a DataFrame or a SciPy sparse matrix; with a pipeline whatever its first step takes.
            y: `(n,)`.
            sample_weight: `(n,)`, of the rows in training, validation and the final fit; transformers get none.
            groups: `(n,)`, for splitters that keep groups of rows together (GroupKFold).
        """
        for name in ("best_estimator_", "refit_time_", "holdout_score_", "gap_"):  # of an earlier fit
            self.__dict__.pop(name, None)
        last, options = self._last(), self._options()
        classes = is_classifier(last)
        inputs = read(self, X, y, sample_weight, groups, classes)
        rows = np.arange(len(inputs.y)) if self.holdout is None else self._split(inputs, classes)
        tuned = self._tune(last, inputs.of(rows) if self.holdout is not None else inputs, options)
        self._keep(tuned)
        if self.holdout is not None:
            self._score_holdout(X, inputs, rows)
        if self.refit:
            begun = time.perf_counter()
            self.best_estimator_ = self._fitted(X, inputs, None)
            self.refit_time_ = time.perf_counter() - begun
        return self

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the score of the best estimator by `scoring`, or by its own `score` where that is None."""
        check_is_fitted(self)
        given = {} if sample_weight is None else {"sample_weight": sample_weight}
        if self.scoring is None or self.scoring not in get_scorer_names():
            return float(self.best_estimator_.score(X, y, **given))
        return float(get_scorer(self.scoring)(self.best_estimator_, X, y, **given))

    def summary(self) -> str:
        """Return what was found and how far the validation score can be believed, for people."""
        check_is_fitted(self, "best_params_")
        return summary(self)

    def _last(self) -> Any:
        """Return the estimator that has the hyperparameters, or raise."""
        pipeline = isinstance(self.estimator, Pipeline)
        last = self.estimator.steps[-1][1] if pipeline else self.estimator
        if type(last) not in SUPPORTED:
            raise unsupported(last)
        return last

    def _options(self) -> Options:
        if self.spread is not None and not (_is_number(self.spread) and self.spread > 0.0):
            raise InvalidValueError(f"`spread` is {self.spread!r}, expected a number above 0 (such as 0.25), or None")
        if self.holdout is not None and not (_is_number(self.holdout) and 0.0 < self.holdout < 1.0):
            raise InvalidValueError(
                f"`holdout` is {self.holdout!r}, expected a part of the rows (such as 0.2), or None"
            )
        if not isinstance(self.max_steps, numbers.Integral) or self.max_steps < 1:
            raise InvalidValueError(f"`max_steps` is {self.max_steps!r}, expected a whole number of at least 1")
        if not (_is_number(self.tol) and 0.0 <= self.tol < 1.0):
            raise InvalidValueError(f"`tol` is {self.tol!r}, expected 0 <= tol < 1 (relative to the first gradient)")
        return Options(self.spread, int(self.max_steps), float(self.tol), self.verbose)

    def _tune(self, last: Any, inputs: Inputs, options: Options) -> Tuned:
        """Search on the rows given."""
        classes = is_classifier(last)
        wanted, found = targets(inputs.y, classes)
        name = type(last).__name__
        model = LINEAR[type(last)](last, 0 if found is None else len(found)) if type(last) in LINEAR else None
        if name == "PoissonRegressor" and inputs.y.min() < 0.0:
            raise InvalidValueError(
                f"y goes down to {inputs.y.min():g}, and PoissonRegressor predicts counts or rates, y >= 0; for other "
                "numbers write Ridge()"
            )
        if model is not None:
            known = model.scorings
        elif isinstance(last, KernelRidge):
            known = kernel_ridge.check(last)
        else:
            known = process.check(last, self.penalties, inputs.weights)
        scoring = scoring_of(self.scoring, known, name)
        splits = list(check_cv(self.cv, inputs.y, classifier=classes).split(inputs.X, inputs.y, inputs.groups))
        rows = fold(
            transformers_of(self.estimator),
            inputs,
            splits,
            class_weights(getattr(model, "class_weight", None), inputs.y, splits, inputs.weights),
        )
        self.n_splits_, self.scoring_, self._scoring = len(splits), scoring.name, scoring
        self._grouping = grouping(self.penalties, self.feature_groups, rows.names, rows.features, inputs.names)
        index = None if self._grouping is None else self._grouping.index
        if isinstance(last, KernelRidge):
            return kernel_ridge.tune(last, rows, wanted, scoring, index, options)
        if model is None:
            self._grouping = None
            return process.tune(last, rows, wanted, scoring, index is not None, options, last.random_state)
        start = model.strength(last)
        return LinearSearch(model, rows, wanted, scoring, index, options, start).run()

    def _keep(self, tuned: Tuned) -> None:
        """Set the attributes that GridSearchCV has."""
        self._row = tuned.rows[tuned.best]
        self.cv_results_ = cv_results(tuned.rows, self._params)
        self.best_index_ = tuned.best
        self.best_params_ = self.cv_results_["params"][tuned.best]
        self.best_score_ = float(self.cv_results_["mean_test_score"][tuned.best])
        self.status_ = tuned.status
        self.multimetric_ = False
        # the link to the problem's own tensors serves nobody here, and no pickle can hold it
        self.solution_ = None if tuned.solution is None else replace(tuned.solution, _write_back=None)

    def _params(self, row: Row) -> dict[str, Any]:
        """Return the settings of a row by the names that `set_params` of `estimator` takes, and the strengths."""
        prefix = f"{self.estimator.steps[-1][0]}__" if isinstance(self.estimator, Pipeline) else ""
        params = {prefix + name: value for name, value in row.params.items()}
        if self._grouping is not None and row.own is not None:
            name, value = row.strengths
            kind = self.penalties.replace("-", "_")
            params[f"{prefix}{name}_{kind}"] = dict(zip(self._grouping.names, value.tolist(), strict=True))
        return params

    def _fitted(self, X: Any, inputs: Inputs, rows: Any) -> Any:
        """Return the tuned estimator, fitted on some rows; None: on all."""
        final = final_estimator(self.estimator, self._row.params, self._row.scale)
        weights = {}
        if inputs.weights is not None:
            step = f"{final.steps[-1][0]}__" if isinstance(final, Pipeline) else ""
            weights[f"{step}sample_weight"] = inputs.weights if rows is None else inputs.weights[rows]
        if rows is None:
            return final.fit(X, inputs.y, **weights)
        return final.fit(_safe_indexing(X, rows), inputs.y[rows], **weights)

    def _split(self, inputs: Inputs, classes: bool) -> Any:
        """Return the rows to tune on; with groups, whole groups."""
        if inputs.groups is not None:
            splitter = GroupShuffleSplit(1, test_size=self.holdout, random_state=self.random_state)
            kept, _ = next(splitter.split(inputs.y, inputs.y, inputs.groups))
            return np.sort(kept)
        rows, strata = np.arange(len(inputs.y)), inputs.y if classes else None
        kept, _ = train_test_split(rows, test_size=self.holdout, stratify=strata, random_state=self.random_state)
        return kept

    def _score_holdout(self, X: Any, inputs: Inputs, rows: Any) -> None:
        """Score rows that no fold has seen, by a model of the others."""
        held = np.setdiff1d(np.arange(len(inputs.y)), rows)
        fitted = self._fitted(X, inputs, rows)
        if self._scoring.name in process.DENSITIES:
            self.holdout_score_ = process.density(fitted, _safe_indexing(X, held), inputs.y[held])
            self.gap_ = self.best_score_ - self.holdout_score_
            return
        classes = fitted.classes_ if is_classifier(fitted) else None
        wanted, _ = targets(inputs.y[held], classes is not None, classes)
        weights = np.ones(len(held)) if inputs.weights is None else inputs.weights[held]
        scores = decision_scores(fitted, _safe_indexing(X, held))
        self.holdout_score_ = score_of(self._scoring, scores, wanted, weights)
        self.gap_ = self.best_score_ - self.holdout_score_


def _is_number(x: Any) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)
