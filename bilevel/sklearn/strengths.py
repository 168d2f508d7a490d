"""How many strengths there are, which columns share one, and how scikit-learn's own estimators get them.

A strength of its own for a column is the column's scale: with z_j = x_j / s_j, an L2 strength of alpha on the weights
of z is one of alpha s_j^2 on those of x, an L1 strength one of alpha s_j, and a length scale l one of l s_j. So the
final model is a pipeline of scikit-learn's parts: the user's transformers, a FunctionTransformer that divides, and the
estimator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.base import clone
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.extmath import safe_sparse_dot

from bilevel.errors import InvalidTypeError, InvalidValueError, meant

Floats = NDArray[np.float64]
PENALTIES = ("shared", "per-group", "per-feature")
REST = "the rest"
LISTED = 12


@dataclass(frozen=True)
class Grouping:
    """Which strength each column has.

    Attributes:
        names: of the strengths.
        index: the strength of each column, `(d,)`.
    """

    names: list[str]
    index: NDArray[np.int64]


def grouping(
    penalties: Any, groups: Any, columns: list[str] | None, count: int, sources: list[str] | None
) -> Grouping | None:
    """Return which columns share a strength; None: all of them.

    Args:
        penalties: "shared", "per-group" or "per-feature".
        groups: names to columns; None with "per-group": the columns of the input, with all that is made of each.
        columns: names of the columns of the last step's input, where they have any.
        count: how many those are.
        sources: names of the columns of the input.
    """
    if isinstance(penalties, (dict, list)):
        raise InvalidTypeError(
            f"`penalties` is a {type(penalties).__name__}, expected {', '.join(map(repr, PENALTIES))}; there is no "
            "grid to give: GradientSearchCV(estimator) finds the strength from the gradient"
        )
    if penalties not in PENALTIES:
        raise InvalidValueError(
            f"`penalties` is {penalties!r}, expected {', '.join(map(repr, PENALTIES))}" + meant(penalties, PENALTIES)
        )
    if groups is not None and penalties != "per-group":
        raise InvalidValueError(
            f"`feature_groups` is given and `penalties` is {penalties!r}, which has no use for it; write "
            'penalties="per-group"'
        )
    if penalties == "shared":
        return None
    named = columns or [f"x{i}" for i in range(count)]
    if penalties == "per-feature":
        return Grouping(named, np.arange(count))
    if groups is None:
        groups = _by_source(columns, sources)
    if not isinstance(groups, Mapping) or not groups:
        raise InvalidTypeError(
            f"`feature_groups` is {groups!r}, expected a dict of names to columns: "
            '{"size": ["mean radius", "mean area"], "shape": [3, 4]}'
        )
    return _grouped(groups, columns, named, sources)


def _grouped(groups: Any, columns: list[str] | None, named: list[str], sources: list[str] | None) -> Grouping:
    index = np.full(len(named), -1)
    for number, (name, members) in enumerate(groups.items()):
        listed = [members] if isinstance(members, (str, int, np.integer)) else list(members)
        for member in listed:
            for column in _columns_of(member, columns, named, sources, str(name)):
                if index[column] not in (-1, number):
                    other = list(groups)[index[column]]
                    raise InvalidValueError(
                        f"`feature_groups` has the column {named[column]!r} in both {other!r} and {name!r}; a column "
                        "has one strength: take it out of one"
                    )
                index[column] = number
    names = [str(name) for name in groups]
    if (index == -1).any():
        index[index == -1] = len(names)
        names.append(REST)
    return Grouping(names, index)


def _columns_of(
    member: Any, columns: list[str] | None, named: list[str], sources: list[str] | None, group: str
) -> list[int]:
    """Return the columns that a name or an index of a group means."""
    if isinstance(member, (int, np.integer)) and not isinstance(member, bool):
        if -len(named) <= member < len(named):
            return [int(member) % len(named)]
        raise InvalidValueError(
            f"`feature_groups` has the column {member} in {group!r}, and there are {len(named)}: 0 to {len(named) - 1}"
        )
    if columns is None and not isinstance(member, str):
        raise InvalidTypeError(f"`feature_groups` has {member!r} in {group!r}, expected names or indices of columns")
    if member in named:
        return [named.index(member)]
    made = [i for i, name in enumerate(named) if _source(name, sources) == member] if columns else []
    if made:
        return made
    hint = "" if columns else "; X has no column names: give a DataFrame, or indices"
    raise InvalidValueError(
        f"`feature_groups` has the column {member!r} in {group!r}, which is none of "
        + _listed([*(sources or []), *named])
        + (hint or meant(member, [*(sources or []), *named]))
    )


def _source(column: str, sources: list[str] | None) -> str | None:
    """Return the input column that a transformer made this one of: "onehot__city_Rome" of "city"."""
    plain = column.split("__", 1)[-1]
    made = [name for name in sources or [] if plain == name or plain.startswith(f"{name}_")]
    return max(made, key=len, default=None)


def _by_source(columns: list[str] | None, sources: list[str] | None) -> dict[str, list[str]]:
    if columns is None or sources is None:
        raise InvalidValueError(
            '`penalties` is "per-group" without `feature_groups`, which takes one group for each input column and '
            'needs their names: give X as a DataFrame, or feature_groups={"name": [columns]}, or write '
            'penalties="per-feature"'
        )
    groups: dict[str, list[str]] = {}
    for column in columns:
        groups.setdefault(_source(column, sources) or column, []).append(column)
    return groups


def _listed(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    more = f", ... ({len(unique)})" if len(unique) > LISTED else ""
    return ", ".join(map(repr, unique[:LISTED])) + more


def final_estimator(estimator: Any, params: Mapping[str, Any], scale: Floats | None) -> Any:
    """Return the user's estimator with the tuned settings, unfitted; a pipeline that divides by `scale` where given."""
    tuned = clone(estimator)
    if isinstance(tuned, Pipeline):
        tuned.steps[-1][1].set_params(**params)
    else:
        tuned.set_params(**params)
    if scale is None:
        return tuned
    divide = FunctionTransformer(
        safe_sparse_dot,
        kw_args={"b": sparse.diags_array(1.0 / scale).tocsr()},
        validate=True,
        accept_sparse=True,
        feature_names_out="one-to-one",
    )
    if not isinstance(tuned, Pipeline):
        return Pipeline([("scale", divide), (type(tuned).__name__.lower(), tuned)])
    taken = dict(tuned.steps)
    name = next(n for n in ("scale", "strengths", "bilevel_scale", "bilevel_strengths") if n not in taken)
    tuned.steps.insert(len(tuned.steps) - 1, (name, divide))
    return tuned
