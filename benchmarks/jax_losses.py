"""The losses of `benchmarks.workloads` in JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse as jax_sparse
from scipy import sparse

from benchmarks.workloads import CLEANING_STRENGTH, Losses, Workload


def jax_losses(workload: Workload) -> Losses:
    """Return the inner and the outer loss; call it after `jax_enable_x64` was set for a float64 problem."""
    X, Xv = (_design(x, workload.kind) for x in (workload.train[0], workload.valid[0]))

    def product(w: Any, X: Any) -> Any:
        return (X @ w.T).T if sparse.issparse(workload.train[0]) else w @ X

    y, yv = jnp.asarray(workload.train[1]), jnp.asarray(workload.valid[1])
    rows = len(workload.train[1])

    def l2(w: list[Any], h: Any) -> Any:
        return _each(product(w[0], X), y).mean() + 0.5 / rows * (h * w[0] ** 2).sum()

    def cleaning(w: list[Any], h: Any) -> Any:
        return (jax.nn.sigmoid(h) * _each(product(w[0], X), y)).mean() + CLEANING_STRENGTH * (w[0] ** 2).sum()

    def logits(w: list[Any], x: Any) -> Any:
        return jnp.tanh(x @ w[0].T + w[1]) @ w[2].T + w[3]

    def mlp(w: list[Any], h: Any) -> Any:
        strengths = jnp.split(h, np.cumsum([t.size for t in w])[:-1])
        decay = sum((s.reshape(t.shape) * t**2).sum() for s, t in zip(strengths, w, strict=True))
        return _each(logits(w, X).T, y).mean() + 0.5 * decay

    if workload.kind == "mlp":
        return mlp, lambda w, h: _each(logits(w, Xv).T, yv).mean()
    return {"l2": l2, "cleaning": cleaning}[workload.kind], lambda w, h: _each(product(w[0], Xv), yv).mean()


def _design(X: Any, kind: str) -> Any:
    """Return a design, with a row for each feature where it is dense and the model linear."""
    if sparse.issparse(X):
        return jax_sparse.BCOO.from_scipy_sparse(X)
    return jnp.asarray(X if kind == "mlp" else X.T)


def _each(z: Any, y: Any) -> Any:
    """Return the log loss of each example; z `(classes, rows)`."""
    if jnp.issubdtype(y.dtype, jnp.floating):
        return jnp.logaddexp(0.0, z[0]) - y * z[0]
    return jax.nn.logsumexp(z, axis=0) - jnp.take_along_axis(z, y[None], axis=0)[0]
