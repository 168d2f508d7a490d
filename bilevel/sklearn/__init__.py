"""scikit-learn's own estimators, tuned by hypergradients: `GradientSearchCV` in the place of `GridSearchCV`."""

from __future__ import annotations

try:
    import sklearn as _scikit_learn  # noqa: F401
except ImportError as error:
    from bilevel.errors import BilevelError

    class MissingExtraError(BilevelError, ImportError):
        """An optional package is not installed."""

    raise MissingExtraError(
        'bilevel.sklearn needs scikit-learn; install it with: pip install "bilevel[sklearn]"'
    ) from error

from bilevel.sklearn.search import GradientSearchCV

__all__ = ["GradientSearchCV"]
