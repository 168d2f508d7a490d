"""Tables to classify: scikit-learn's bundled ones, and the user's own CSV files, checked before anything is trained."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bilevel.errors import BilevelError, InvalidValueError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Each class needs members in the test set and in each of the five folds.
SMALLEST_CLASS = 10
MOST_CLASSES = 50
MOST_CATEGORIES = 50
LISTED = 12  # names in a message


@dataclass(frozen=True)
class Table:
    """A classification problem.

    Attributes:
        name: what a person calls it.
        x: `(n, d)`, categorical columns one-hot, nothing standardized.
        y: `(n,)`, numbers of classes.
        features: d names.
        classes: names of the classes.
        image: height and width where the features are the pixels of an image.
    """

    name: str
    x: Floats
    y: Ints
    features: tuple[str, ...]
    classes: tuple[str, ...]
    image: tuple[int, int] | None = None


def bundled() -> list[Table]:
    """Return scikit-learn's breast-cancer and digits tables; nothing is downloaded."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise _missing_extra("scikit-learn") from error
    cancer, digits = datasets.load_breast_cancer(), datasets.load_digits()
    tables = []
    for name, data, image in (("breast cancer", cancer, None), ("digits", digits, (8, 8))):
        classes = tuple(str(c) for c in data.target_names)
        y = data.target.astype(np.int64)
        tables.append(Table(name, data.data.astype(np.float64), y, tuple(map(str, data.feature_names)), classes, image))
    return tables


def read_table(path: str | os.PathLike[str], target: str) -> Table:
    """Read a CSV file with a header line; `target` is the column to predict.

    Text columns become one-hot columns named "column=value".

    Raises:
        BilevelError: the file or a column cannot be used; the message says which and what to do.
    """
    frame = read_frame(os.fspath(path))
    if target not in frame.columns:
        raise InvalidValueError(f"{path} has no column {target!r}; its columns are {_listed(frame.columns)}")
    _check_complete(frame)
    y, classes = classes_of(frame[target], target)
    inputs = frame.drop(columns=[target])
    if inputs.shape[1] == 0:
        raise InvalidValueError(
            f"{path} has no columns besides the target {target!r}: there is nothing to predict from"
        )
    x, features = _encoded(inputs)
    return Table(os.path.basename(os.fspath(path)), x, y, features, classes)


def read_frame(path: str) -> Any:
    """Read a CSV file with a header line into a DataFrame, as it is, or raise in words."""
    try:
        import pandas as pd
    except ImportError as error:
        raise _missing_extra("pandas") from error
    try:
        header = pd.read_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False)
        _check_header(path, [str(name) for name in header.iloc[0]])
        # low_memory=False: one type a column, however long the file; index_col=False: no column turns into an index
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header would be cut
            frame = pd.read_csv(path, low_memory=False, index_col=False)
    except pd.errors.EmptyDataError as error:
        raise InvalidValueError(f"{path} is empty; expected a line of column names, then the rows") from error
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise InvalidValueError(f"{path} is no table with commas: {str(error).strip()}") from error
    except UnicodeDecodeError as error:
        raise InvalidValueError(
            f"{path} is not UTF-8 text (byte {error.start} cannot be read); save it as CSV in UTF-8"
        ) from error
    except OSError as error:
        raise InvalidValueError(f"cannot read {path}: {error.strerror or error}") from error
    if len(frame) == 0:
        raise InvalidValueError(f"{path} has column names and no rows")
    return frame


def _check_header(path: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1 and name})
    if twice:
        raise InvalidValueError(f"{path} has more than one column named {_listed(twice)}; rename all but one")
    if "" in names:
        raise InvalidValueError(
            f"column {names.index('') + 1} of {path} has no name; name it, or remove it if it only numbers the rows "
            "(pandas: to_csv(..., index=False))"
        )


def _check_complete(frame: Any) -> None:
    missing = {str(name): int(count) for name, count in frame.isna().sum().items() if count}
    if missing:
        shown = ", ".join(f"{name!r} ({count} of {len(frame)})" for name, count in list(missing.items())[:LISTED])
        more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        raise InvalidValueError(f"values are missing in {shown}{more}; fill them in, or remove those rows or columns")


def classes_of(column: Any, target: str) -> tuple[Ints, tuple[str, ...]]:
    """Return the number of each row's class and the names of the classes; raise for what cannot be classified."""
    from pandas.api.types import is_float_dtype, is_numeric_dtype

    values = column.to_numpy()
    if is_float_dtype(column) and bool((values != np.round(values)).any()):
        raise InvalidValueError(
            f"the target {target!r} holds fractions: it looks like a regression target, and this job classifies; "
            "choose another column, or cut it into classes"
        )
    names, y = np.unique(values if is_numeric_dtype(column) else values.astype(str), return_inverse=True)
    if len(names) > MOST_CLASSES:
        raise InvalidValueError(
            f"the target {target!r} has {len(names)} different values, at most {MOST_CLASSES} classes are possible: is "
            "it a regression target or an identifier? Choose another column, or cut it into classes"
        )
    if len(names) == 1:
        raise InvalidValueError(f"the target {target!r} is always {str(names[0])!r}: there is nothing to predict")
    counts = np.bincount(y)
    small = [f"{str(name)!r} ({count})" for name, count in zip(names, counts, strict=True) if count < SMALLEST_CLASS]
    if small:
        raise InvalidValueError(
            f"the target {target!r} has classes of fewer than {SMALLEST_CLASS} rows, too few for five folds and a test "
            f"set: {_joined(small)}; merge them with others, or remove their rows"
        )
    return y.astype(np.int64), tuple(str(name) for name in names)


def _encoded(inputs: Any) -> tuple[Floats, tuple[str, ...]]:
    from pandas.api.types import is_numeric_dtype

    constant = [str(name) for name in inputs.columns if inputs[name].nunique() == 1]
    if constant:
        raise InvalidValueError(
            f"columns with one value only, which can predict nothing: {_listed(constant)}; remove them"
        )
    blocks: list[Floats] = []
    features: list[str] = []
    for name in inputs.columns:
        column = inputs[name]
        if is_numeric_dtype(column):
            values = column.to_numpy(dtype=np.float64)
            if not np.isfinite(values).all():
                raise InvalidValueError(f"column {name!r} holds infinite values; replace them, or remove those rows")
            blocks.append(values[:, None])
            features.append(str(name))
            continue
        categories, codes = np.unique(column.to_numpy().astype(str), return_inverse=True)
        if len(categories) > MOST_CATEGORIES:
            raise InvalidValueError(
                f"the text column {name!r} has {len(categories)} different values, at most {MOST_CATEGORIES} are "
                "encoded: is it an identifier, a date, or numbers written with commas? Remove or rewrite it"
            )
        blocks.append(np.eye(len(categories))[codes])
        features += [f"{name}={category}" for category in categories]
    return np.hstack(blocks), tuple(features)


def _listed(names: Any) -> str:
    return _joined([repr(str(name)) for name in names])


def _joined(shown: list[str]) -> str:
    more = f" and {len(shown) - LISTED} more" if len(shown) > LISTED else ""
    return ", ".join(shown[:LISTED]) + more


def _missing_extra(package: str) -> BilevelError:
    return BilevelError(f'this job needs {package}, which is not installed; write: pip install "bilevel[sklearn,plot]"')
