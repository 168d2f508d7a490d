"""The rows of a cross-validation: which fold trains on which, and what its transformers make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.base import clone
from sklearn.pipeline import Pipeline
from sklearn.utils import _safe_indexing, check_array
from torch import Tensor

from bilevel.errors import InvalidValueError
from bilevel.sklearn.inputs import Inputs
from bilevel.sparse import Design as Sparse
from bilevel.sparse import is_sparse

Floats = NDArray[np.float64]
DENSE_UP_TO = 2**24  # numbers of sparse rows that are kept dense, 128 MB: products of small ones are faster so
LARGEST_GRAM = 2**25  # numbers of a product that is formed at once, 256 MB


class Design:
    """Rows `(n, p)` of each fold, with a last column for the intercept: dense and stacked, or sparse.

    Args:
        rows: the features as each fold's transformers make them, `(n, d)` arrays or SciPy matrices; one for all folds
            where there are no transformers.
        intercept: the number in the last column; None: there is none.
    """

    def __init__(self, rows: Sequence[Any], intercept: float | None = None) -> None:
        copies = len(rows) * rows[0].shape[0] * rows[0].shape[1]
        self.sparse = is_sparse(rows[0]) and copies > DENSE_UP_TO
        self.rows: list[Any] = [_with_intercept(x, intercept, self.sparse) for x in rows]
        self.shape: tuple[int, int] = tuple(self.rows[0].shape)
        if not self.sparse:
            self.stacked = torch.stack(self.rows)  # (1 or folds, n, p)

    def scores(self, w: Tensor) -> Tensor:
        """Return the scores `(folds, models, n)` of weights `(folds, models, p)`."""
        if len(self.rows) == 1:
            flat = w.reshape(-1, w.shape[-1])
            product: Tensor = flat @ self.rows[0].T
            return product.reshape(*w.shape[:-1], -1)
        if not self.sparse:
            return w @ self.stacked.mT
        return torch.stack([one @ x.T for one, x in zip(w, self.rows, strict=True)])

    def back(self, slopes: Tensor) -> Tensor:
        """Return A^T of slopes `(folds, models, n)`, `(folds, models, p)`."""
        if len(self.rows) == 1:
            flat = slopes.reshape(-1, slopes.shape[-1])
            product: Tensor = flat @ self.rows[0]
            return product.reshape(*slopes.shape[:-1], -1)
        if not self.sparse:
            return slopes @ self.stacked
        return torch.stack([one @ x for one, x in zip(slopes, self.rows, strict=True)])

    def gram(self, weights: Tensor) -> Tensor:
        """Return A^T diag(weights) A of dense rows for weights `(folds, models, n)`, `(folds, models, p, p)`."""
        if weights.shape[0] * weights.shape[1] * self.stacked[0].numel() <= LARGEST_GRAM:
            a = self.stacked[:, None]
            return (a * weights[..., None]).mT @ a
        one_by_one = [
            (a := self.stacked[min(i, len(self.rows) - 1)]).T @ (a * one[:, None])
            for i, fold in enumerate(weights)
            for one in fold
        ]
        return torch.stack(one_by_one).reshape(*weights.shape[:2], self.shape[1], self.shape[1])

    def squares(self, weights: Tensor) -> Tensor:
        """Return the diagonal of `gram`, `(folds, models, p)`."""
        if self.sparse:
            squared = [Sparse(x.matrix.multiply(x.matrix)) for x in self.rows]
            several = zip(weights, squared * (1 if len(squared) > 1 else len(weights)), strict=True)
            return torch.stack([one @ x for one, x in several])
        return weights @ self.stacked**2


def _with_intercept(x: Any, intercept: float | None, keep_sparse: bool) -> Any:
    column = [] if intercept is None else [np.full((x.shape[0], 1), intercept)]
    if keep_sparse:
        parts = [sparse.csr_array(part) for part in (x, *column)]
        return Sparse(sparse.csr_array(sparse.hstack(parts)).astype(np.float64))
    dense = x.toarray() if is_sparse(x) else np.asarray(x)
    return torch.from_numpy(np.ascontiguousarray(np.hstack([dense.astype(np.float64), *column])))


@dataclass(frozen=True)
class Folds:
    """What a cross-validation trains and validates on.

    Attributes:
        rows: features, see `Design`; `(n, d)` each.
        names: d of them; None where the transformers give none.
        training: weight of each row in the training of each fold, `(folds, n)`.
        unbalanced: the same without the weights of classes.
        validation: the same for validation; each fold's sum is one.
    """

    rows: list[Any]
    names: list[str] | None
    training: Tensor
    unbalanced: Tensor
    validation: Tensor

    @property
    def features(self) -> int:
        """Return d."""
        return int(self.rows[0].shape[1])


def fold(
    transformers: Pipeline | None,
    inputs: Inputs,
    splits: Sequence[tuple[Any, Any]],
    class_weights: Sequence[Floats] | None = None,
) -> Folds:
    """Fit clones of the transformers on the training rows of each fold, and transform all rows with them.

    Args:
        transformers: all steps of the user's pipeline but the last; None: none.
        inputs: all rows.
        splits: training and validation rows of each fold.
        class_weights: what the weights of the training rows of each fold are multiplied by, `(n,)` each; None: one.
    """
    n = len(inputs.y)
    given = np.ones(n) if inputs.weights is None else inputs.weights
    training, validation = np.zeros((len(splits), n)), np.zeros((len(splits), n))
    for i, (train, held) in enumerate(splits):
        np.add.at(training[i], train, given[train])
        np.add.at(validation[i], held, given[held])
        if not (training[i].sum() > 0.0 and validation[i].sum() > 0.0):
            raise InvalidValueError(
                f"fold {i} of `cv` has no rows (of positive sample_weight) to "
                f"{'train' if validation[i].sum() > 0.0 else 'validate'} on; give fewer folds or more rows"
            )
        validation[i] /= validation[i].sum()
    rows, names = _transformed(transformers, inputs, splits)
    weighted = training if class_weights is None else training * np.stack(class_weights)
    return Folds(rows, names, *map(torch.from_numpy, (weighted, training, validation)))


def _transformed(
    transformers: Pipeline | None, inputs: Inputs, splits: Sequence[tuple[Any, Any]]
) -> tuple[list[Any], list[str] | None]:
    if transformers is None:
        return [inputs.X], inputs.names
    X, y = inputs.X, inputs.y
    names = _names(clone(transformers).fit(X, y))
    parts = [clone(transformers).fit(_safe_indexing(X, train), _safe_indexing(y, train)) for train, _ in splits]
    rows = [_aligned(_checked(part.transform(X)), _names(part), names) for part in parts]
    widths = sorted({x.shape[1] for x in rows})
    if len(widths) > 1:
        raise InvalidValueError(
            f"the transformers of `estimator` make {widths} columns in different folds, and give no names to tell "
            "which is which; fix the columns (OneHotEncoder(categories=[...])), or give transformers with "
            "get_feature_names_out"
        )
    return rows, names


def _checked(x: Any) -> Any:
    return check_array(x, accept_sparse="csr", dtype=np.float64, input_name="what the transformers of `estimator` make")


def _names(transformers: Pipeline) -> list[str] | None:
    try:
        return [str(name) for name in transformers.get_feature_names_out()]
    except (AttributeError, ValueError):  # a transformer without names, or without those of its input
        return None


def _aligned(x: Any, names: list[str] | None, wanted: list[str] | None) -> Any:
    """Return the columns in the order of all rows' names; those that a fold has not seen are zero."""
    if names is None or wanted is None or names == wanted:
        return x
    where = {name: i for i, name in enumerate(wanted)}
    kept = [i for i, name in enumerate(names) if name in where]
    placed = sparse.csr_array(
        (np.ones(len(kept)), (kept, [where[names[i]] for i in kept])), shape=(len(names), len(wanted))
    )
    return x @ placed
