"""What comes into `fit`, checked and in the shapes that the search needs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import LabelEncoder
from sklearn.utils import _safe_indexing, assert_all_finite, check_consistent_length, check_X_y, compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, column_or_1d
from torch import Tensor

from bilevel.errors import InvalidTypeError, InvalidValueError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Inputs:
    """Rows and targets.

    Attributes:
        X: as the transformers take it; without transformers a float64 array or CSR matrix.
        y: `(n,)`.
        weights: of the rows; None: one each.
        groups: of the rows, for splitters.
        names: of the input columns, where it has any.
    """

    X: Any
    y: Any
    weights: Floats | None
    groups: Any
    names: list[str] | None

    def of(self, rows: Any) -> Inputs:
        """Return some of the rows."""
        parts = (
            None if part is None else _safe_indexing(part, rows) for part in (self.X, self.y, self.weights, self.groups)
        )
        X, y, weights, groups = parts
        return Inputs(X, y, weights, groups, self.names)


def transformers_of(estimator: Any) -> Pipeline | None:
    """Return all steps of a pipeline but the last; None where there are none that do anything."""
    steps = estimator.steps[:-1] if isinstance(estimator, Pipeline) else []
    return Pipeline(steps) if any(step not in (None, "passthrough") for _, step in steps) else None


def read(search: Any, X: Any, y: Any, sample_weight: Any, groups: Any, classes: bool) -> Inputs:
    """Check what the user gave; what transformers take is theirs to check.

    Raises:
        ValueError: scikit-learn's own messages, where they fit.
    """
    names = [str(name) for name in X.columns] if hasattr(X, "columns") else None
    if y is None:
        raise InvalidValueError(f"{type(search).__name__} requires y to be passed, but the target y is None")
    if transformers_of(search.estimator) is None:
        try:
            X, y = check_X_y(X, y, accept_sparse="csr", dtype=np.float64, estimator=search, y_numeric=not classes)
        except ValueError as error:
            if "Input X contains NaN" not in str(error):
                raise
            name = type(search.estimator).__name__
            raise InvalidValueError(
                f"Input X contains NaN, which {name} does not take; put an imputer before it, fitted on the training "
                f"rows of each fold: GradientSearchCV(make_pipeline(SimpleImputer(), {name}()))"
            ) from error
    else:
        y = column_or_1d(y, warn=True)
        assert_all_finite(y, input_name="y")
        check_consistent_length(X, y)
    if classes:
        check_classification_targets(y)
        _check_are_classes(y)
    else:
        y = y.astype(np.float64)
    weights = None
    if sample_weight is not None:
        weights = _check_sample_weight(sample_weight, y, dtype=np.float64, ensure_non_negative=True)
    if groups is not None:
        check_consistent_length(y, groups)
    return Inputs(X, y, weights, groups, names)


def _check_are_classes(y: Any) -> None:
    """Raise where many classes have one row: whole numbers to predict, which scikit-learn takes for classes."""
    found, rows = np.unique(y, return_counts=True)
    if len(found) > 2 and (alone := int((rows == 1).sum())) > len(found) / 3:
        raise InvalidValueError(
            f"y has {len(found)} classes, {alone} of them with a single row; if it holds numbers to predict, take "
            "Ridge() or another regression for the estimator"
        )


def targets(y: Any, classes: bool, known: Any = None) -> tuple[Tensor, Any]:
    """Return targets `(models, n)` and the classes: those that are `known`, or those of y.

    Two classes are one model with targets 0 and 1, more are one model each; numbers are one model.
    """
    if not classes:
        return torch.from_numpy(np.asarray(y, dtype=np.float64))[None], None
    encoder = LabelEncoder().fit(y if known is None else known)
    found, codes = encoder.classes_, encoder.transform(y)
    if len(found) < 2:
        raise InvalidValueError(
            f"y holds one class only, {found[0]!r}; a classifier needs samples of at least 2 classes in the data"
        )
    if len(found) == 2:
        return torch.from_numpy(codes.astype(np.float64))[None], found
    return torch.from_numpy((codes == np.arange(len(found))[:, None]).astype(np.float64)), found


def class_weights(class_weight: Any, y: Any, splits: Any, sample_weight: Any = None) -> list[Floats] | None:
    """Return the weight of each row in the training of each fold, `(n,)` each; None where classes weigh the same.

    "balanced" counts rows by their `sample_weight` where the installed scikit-learn does.
    """
    if class_weight is None:
        return None
    found = np.unique(y)
    if isinstance(class_weight, dict) and (unknown := [c for c in class_weight if c not in found]):
        raise InvalidValueError(f"`class_weight` has {unknown!r}, and the classes of y are {list(found)!r}")
    if not isinstance(class_weight, dict) and class_weight != "balanced":
        raise InvalidTypeError(f'`class_weight` is {class_weight!r}, expected a dict, "balanced" or None')
    each = []
    for train, _ in splits:
        given: dict[str, Any] = {}
        if sample_weight is not None:
            train = train[sample_weight[train] > 0.0]
            if "sample_weight" in inspect.signature(compute_class_weight).parameters:
                given = {"sample_weight": sample_weight[train]}
        there = np.unique(y[train])
        weights = dict(zip(there, compute_class_weight(class_weight, classes=there, y=y[train], **given), strict=True))
        each.append(np.array([weights.get(c, 1.0) for c in y]))
    return each
