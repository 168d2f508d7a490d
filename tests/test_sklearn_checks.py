"""scikit-learn's own checks of an estimator, on GradientSearchCV."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.utils.estimator_checks import estimator_checks_generator

from bilevel.sklearn import GradientSearchCV

QUICK: dict[str, Any] = {"cv": 3, "max_steps": 2}
SEARCHES = [GradientSearchCV(Ridge(), **QUICK), GradientSearchCV(LogisticRegression(max_iter=1000), **QUICK)]
CHECKS = [pair for search in SEARCHES for pair in estimator_checks_generator(search)]


def _name(value: Any) -> str:
    inner = getattr(value, "func", value)
    return getattr(inner, "__name__", type(getattr(value, "estimator", value)).__name__)


@pytest.mark.parametrize(("search", "check"), CHECKS, ids=_name)
def test_scikit_learn_s_checks_pass(search: Any, check: Callable[[Any], None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its data are separable, of one class, without noise
        check(search)
