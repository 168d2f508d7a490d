"""What a search has because its best estimator has it: predictions, classes, tags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sklearn.utils import get_tags
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted


def _has(name: str) -> Callable[[Any], bool]:
    """Return a check whether the fitted best estimator, or before that the user's, has a method."""

    def check(search: Any) -> bool:
        if not search.refit:
            raise AttributeError(
                f"this {type(search).__name__} was made with refit=False, and {name} needs the refitted estimator; "
                "write refit=True, or fit an estimator with `best_params_` yourself"
            )
        getattr(getattr(search, "best_estimator_", search.estimator), name)
        return True

    return check


def _available_if(name: str) -> Callable[[Callable[..., Any]], Any]:
    return lambda method: available_if(_has(name))(method)


class Delegates:
    """Methods of `best_estimator_`, each there where the estimator has it."""

    estimator: Any
    refit: bool
    best_estimator_: Any

    def _best(self) -> Any:
        check_is_fitted(self)
        return self.best_estimator_

    @_available_if("predict")
    def predict(self, X: Any, **params: Any) -> Any:
        """Return what the best estimator predicts; `params` go to it (`return_std=True` of a Gaussian process)."""
        return self._best().predict(X, **params)

    @_available_if("predict_proba")
    def predict_proba(self, X: Any) -> Any:
        """Return the probabilities of the classes, `(n, classes)`."""
        return self._best().predict_proba(X)

    @_available_if("predict_log_proba")
    def predict_log_proba(self, X: Any) -> Any:
        """Return the logarithms of `predict_proba`."""
        return self._best().predict_log_proba(X)

    @_available_if("decision_function")
    def decision_function(self, X: Any) -> Any:
        """Return the decision values of the best estimator."""
        return self._best().decision_function(X)

    @_available_if("transform")
    def transform(self, X: Any) -> Any:
        """Transform with the best estimator."""
        return self._best().transform(X)

    @_available_if("inverse_transform")
    def inverse_transform(self, X: Any) -> Any:
        """Undo `transform`."""
        return self._best().inverse_transform(X)

    @_available_if("score_samples")
    def score_samples(self, X: Any) -> Any:
        """Return the best estimator's score of each row."""
        return self._best().score_samples(X)

    @property
    def classes_(self) -> Any:
        """The classes of a classifier."""
        _has("classes_")(self)
        return self.best_estimator_.classes_

    @property
    def n_features_in_(self) -> int:
        """Columns seen in `fit`."""
        if not hasattr(self, "best_estimator_"):
            raise AttributeError(f"{type(self).__name__} has no n_features_in_ before fit (with refit=True)")
        count: int = self.best_estimator_.n_features_in_
        return count

    @property
    def feature_names_in_(self) -> Any:
        """Names of the columns seen in `fit`, where X was a DataFrame."""
        if not hasattr(self, "best_estimator_"):
            raise AttributeError(f"{type(self).__name__} has no feature_names_in_ before fit (with refit=True)")
        return self.best_estimator_.feature_names_in_

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()  # type: ignore[misc]
        own = get_tags(self.estimator)
        tags.estimator_type = own.estimator_type
        tags.classifier_tags, tags.regressor_tags = own.classifier_tags, own.regressor_tags
        tags.input_tags = own.input_tags
        tags.target_tags = own.target_tags
        tags.target_tags.multi_output = False
        return tags
