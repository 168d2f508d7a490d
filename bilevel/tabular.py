"""A pipeline for a table of mixed columns, tuned by `GradientSearchCV` and tested on rows that it has not seen."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from bilevel.errors import BilevelError, InvalidValueError, meant
from bilevel.table import LISTED, MOST_CATEGORIES, classes_of, read_frame

FEWEST = 40  # rows
FEW_VALUES = 10  # up to so many different whole numbers are classes, above that a quantity
TASKS = ("auto", "classification", "regression")
MODELS = {
    "classification": "logistic regression, by the log loss",
    "regression": "ridge regression, by the mean squared error",
}


@dataclass(frozen=True)
class Data:
    """A table that can be learned from.

    Attributes:
        inputs: a DataFrame of the columns to predict from.
        target: the column to predict.
        task: "classification" or "regression".
        why: how that was decided.
        numbers: names of numeric columns.
        texts: names of the others.
        left_out: names of columns that can tell nothing, with the reason.
    """

    inputs: Any
    target: Any
    task: str
    why: str
    numbers: list[str]
    texts: list[str]
    left_out: dict[str, str]


@dataclass(frozen=True)
class Tuned:
    """A tuned model of a table.

    Attributes:
        model: a fitted pipeline of scikit-learn's parts, trained on all rows.
        search: the `GradientSearchCV` that found its settings.
        rows: number of rows that it was tuned on.
        tested: number of rows that it was tested on.
        loss: on those, of the same model trained on the others (log loss, or mean squared error).
        baseline: the loss of always predicting the frequencies of the classes, or the mean.
        score: accuracy, or R^2, on those.
    """

    model: Any
    search: Any
    rows: int
    tested: int
    loss: float
    baseline: float
    score: float


def read_data(path: str | os.PathLike[str], target: str, task: str = "auto") -> Data:
    """Read a CSV file with a header line; missing values are filled in by the pipeline, not here.

    Raises:
        BilevelError: the file or a column cannot be used; the message says which and what to do.
    """
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    frame = read_frame(os.fspath(path))
    names = [str(name) for name in frame.columns]
    if target not in names:
        raise InvalidValueError(
            f"{path} has no column {target!r}{meant(target, names)}; its columns are "
            + ", ".join(map(repr, names[:LISTED]))
        )
    missing = int(frame[target].isna().sum())
    if missing:
        raise InvalidValueError(
            f"the target {target!r} is missing in {missing} of {len(frame)} rows; remove those rows"
        )
    if len(frame) < FEWEST:
        raise InvalidValueError(
            f"{path} has {len(frame)} rows, too few to tune and to test on; at least {FEWEST} are needed"
        )
    task, why = _task(frame[target], target, task)
    left_out, numbers, texts = {}, [], []
    for name in names:
        column = frame[name]
        if name == target:
            continue
        if column.nunique() < 2:
            left_out[name] = "no value" if column.nunique() == 0 else "one value only"
        elif is_numeric_dtype(column) and not is_bool_dtype(column):
            if not np.isfinite(column.dropna().to_numpy(dtype=np.float64)).all():
                raise InvalidValueError(f"column {name!r} holds infinite values; replace them, or remove those rows")
            numbers.append(name)
        elif column.nunique() > MOST_CATEGORIES:
            left_out[name] = f"text of {column.nunique()} different values: an identifier, a date, numbers with commas?"
        else:
            texts.append(name)
    if not numbers and not texts:
        why_not = "; ".join(f"{name!r}: {reason}" for name, reason in left_out.items())
        raise InvalidValueError(f"{path} has no column to predict {target!r} from ({why_not or 'there is no other'})")
    inputs = frame[[*numbers, *texts]].copy()
    for name in texts:
        inputs[name] = inputs[name].astype(object)  # text, or True and False; gaps are NaN
    y = frame[target] if is_numeric_dtype(frame[target]) else frame[target].astype(object)
    return Data(inputs, y.to_numpy(), task, why, numbers, texts, left_out)


def _task(column: Any, target: str, task: str) -> tuple[str, str]:
    """Return the task, and why it is that one."""
    from pandas.api.types import is_bool_dtype, is_float_dtype, is_numeric_dtype

    numeric = is_numeric_dtype(column) and not is_bool_dtype(column)
    if task == "regression" and not numeric:
        raise InvalidValueError(
            f"--task regression needs a target of numbers, and {target!r} holds text such as {str(column.iloc[0])!r}; "
            "leave --task out to classify"
        )
    if task == "auto":
        fractions = is_float_dtype(column) and bool((column != column.round()).any())
        values = int(column.nunique())
        classes = not numeric or (not fractions and values <= FEW_VALUES)
        kind = "text" if not numeric else "fractions" if fractions else f"{values} different whole numbers"
        task, why = ("classification" if classes else "regression"), f"the target holds {kind}"
    else:
        why = "as asked by --task"
    if task == "classification":
        classes_of(column, target)
    elif column.nunique() < 2:
        raise InvalidValueError(f"the target {target!r} is always {column.iloc[0]}: there is nothing to predict")
    return task, why


def pipeline(data: Data) -> Any:
    """Return the pipeline: missing values filled in, text one-hot, numbers standardized, a linear model."""
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    parts = []
    if data.numbers:
        steps = [("fill", SimpleImputer(strategy="median", keep_empty_features=True)), ("scale", StandardScaler())]
        parts.append(("numbers", Pipeline(steps), data.numbers))
    if data.texts:
        # A gap is a category of its own.
        parts.append(("texts", OneHotEncoder(handle_unknown="ignore", sparse_output=False), data.texts))
    model = LogisticRegression(max_iter=10_000) if data.task == "classification" else Ridge()
    return Pipeline([("columns", ColumnTransformer(parts)), ("model", model)])


def tune(data: Data, penalties: str = "per-feature", *, holdout: float = 0.2, seed: int = 0, steps: int = 50) -> Tuned:
    """Tune the pipeline on a part of the rows by cross-validation, test it on the others, and train it on all.

    Args:
        data: the table.
        penalties: see `GradientSearchCV`.
        holdout: part of the rows to test on.
        seed: of those rows.
        steps: most outer steps.
    """
    try:
        from sklearn.base import clone
        from sklearn.dummy import DummyClassifier, DummyRegressor
        from sklearn.model_selection import train_test_split

        from bilevel.sklearn import GradientSearchCV
    except ImportError as error:
        raise BilevelError('`bilevel tune` needs scikit-learn; write: pip install "bilevel[tune]"') from error
    classes = data.task == "classification"
    kept, held = train_test_split(
        np.arange(len(data.target)), test_size=holdout, random_state=seed, stratify=data.target if classes else None
    )
    search = GradientSearchCV(pipeline(data), penalties, max_steps=steps)
    search.fit(data.inputs.iloc[kept], data.target[kept])
    constant = DummyClassifier(strategy="prior") if classes else DummyRegressor()
    constant.fit(data.inputs.iloc[kept], data.target[kept])
    loss, baseline = (
        _loss(m, data.inputs.iloc[held], data.target[held], classes) for m in (search.best_estimator_, constant)
    )
    score = float(search.best_estimator_.score(data.inputs.iloc[held], data.target[held]))
    model = clone(search.best_estimator_).fit(data.inputs, data.target)
    return Tuned(model, search, len(kept), len(held), loss, baseline, score)


def _loss(model: Any, inputs: Any, target: Any, classes: bool) -> float:
    from sklearn.metrics import log_loss, mean_squared_error

    if classes:
        return float(log_loss(target, model.predict_proba(inputs), labels=model.classes_))
    return float(mean_squared_error(target, model.predict(inputs)))
