"""The problems that speed is measured on, as arrays and plain losses that every contender shares.

Losses take a list of inner tensors and one tensor of hyperparameters in natural values. They are written twice, in
torch here and in JAX in `benchmarks.jax_losses`, and are the same functions of the same arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional as F

from bilevel.sparse import Design

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
CLEANING_STRENGTH = 1e-3  # of the L2 penalty in hyper-cleaning

Losses = tuple[Callable[[list[Any], Any], Any], Callable[[list[Any], Any], Any]]


@dataclass(frozen=True)
class Workload:
    """One bilevel problem.

    Attributes:
        kind: which losses: "l2", "cleaning" or "mlp".
        train: design (NumPy, or SciPy CSR) and labels; so is valid.
        params: where the inner variables start.
        hparams: where the hyperparameters start, natural values.
        positive: they are positive, and outer optimizers work on their logarithms.
        rates: learning rates of Adam to try on the outer level, the likeliest first.
        source: where the data came from.
    """

    name: str
    kind: str
    train: tuple[Any, np.ndarray]
    valid: tuple[Any, np.ndarray]
    params: list[np.ndarray]
    hparams: np.ndarray
    positive: bool
    rates: tuple[float, ...]
    source: str

    @property
    def words(self) -> str:
        """A line for the table."""
        rows, inner = self.train[0].shape[0], sum(p.size for p in self.params)
        return (
            f"{self.name} ({self.source}): {rows:,} x {self.train[0].shape[1]:,}, {inner:,} inner variables, "
            f"{self.hparams.size:,} hyperparameters, {self.hparams.dtype}"
        )

    def double(self) -> Workload:
        """Return the same problem in float64."""
        (X, y), (Xv, yv) = self.train, self.valid
        return replace(
            self,
            train=(X.astype("f8"), y),
            valid=(Xv.astype("f8"), yv),
            params=[p.astype("f8") for p in self.params],
            hparams=self.hparams.astype("f8"),
        )

    def torch_params(self) -> list[Tensor]:
        """Return the start of the inner variables, new tensors."""
        return [torch.tensor(p) for p in self.params]

    def torch_losses(self) -> Losses:
        """Return the inner and the outer loss."""
        X, Xv = (self._torch_design(x) for x in (self.train[0], self.valid[0]))
        y, yv = (torch.from_numpy(y) for y in (self.train[1], self.valid[1]))
        return LOSSES[self.kind](X, y, Xv, yv)

    def _torch_design(self, X: Any) -> Any:
        if sparse.issparse(X):
            return Design(X)
        return torch.from_numpy(X if self.kind == "mlp" else np.ascontiguousarray(X.T))


# Losses: (design, labels, validation design, validation labels) -> inner and outer loss. Linear models hold a dense
# design with a row for each feature, and logits with a row for each class: a product on a9a takes a third of the time
# that X @ w takes, in torch and in JAX, and one on the images three quarters.


def _logits(w: Tensor, X: Any) -> Tensor:
    """Return the logits, `(classes, rows)`."""
    return w @ X if isinstance(X, Tensor) else F.linear(X, w).t()


def _each(z: Tensor, y: Tensor) -> Tensor:
    """Return the log loss of each row: of one logit where labels are 0.0 and 1.0, else of classes."""
    if y.is_floating_point():
        return F.binary_cross_entropy_with_logits(z[0], y, reduction="none")
    return z.logsumexp(0) - z.gather(0, y[None])[0]


def _l2(X: Any, y: Tensor, Xv: Any, yv: Tensor) -> Losses:
    """One strength for each feature, in units of one example."""

    def inner(w: list[Tensor], h: Tensor) -> Tensor:
        return _each(_logits(w[0], X), y).mean() + 0.5 / len(y) * (h * w[0] ** 2).sum()

    return inner, lambda w, h: _each(_logits(w[0], Xv), yv).mean()


def _cleaning(X: Tensor, y: Tensor, Xv: Tensor, yv: Tensor) -> Losses:
    """One weight sigmoid(h) for each example, half of which have a wrong label (Franceschi and others, ICML 2017)."""

    def inner(w: list[Tensor], h: Tensor) -> Tensor:
        return (h.sigmoid() * _each(_logits(w[0], X), y)).mean() + CLEANING_STRENGTH * (w[0] ** 2).sum()

    return inner, lambda w, h: _each(_logits(w[0], Xv), yv).mean()


def _mlp(X: Tensor, y: Tensor, Xv: Tensor, yv: Tensor) -> Losses:
    """One decay for each weight and bias of a network with a tanh layer."""

    def logits(w: list[Tensor], x: Tensor) -> Tensor:
        return F.linear(F.linear(x, w[0], w[1]).tanh(), w[2], w[3])

    def inner(w: list[Tensor], h: Tensor) -> Tensor:
        strengths = h.split([t.numel() for t in w])
        decay = sum((s.view_as(t) * t**2).sum() for s, t in zip(strengths, w, strict=True))
        return F.cross_entropy(logits(w, X), y) + 0.5 * decay

    return inner, lambda w, h: F.cross_entropy(logits(w, Xv), yv)


LOSSES = {"l2": _l2, "cleaning": _cleaning, "mlp": _mlp}


# Data


def a9a(data: Path | None, small: bool = False) -> Workload:
    """Logistic regression with one strength for each of 123 features, float64; a third validates."""
    dice = np.random.default_rng(0)
    if data is None:
        X = (dice.random((32_561, 123)) < 14 / 123).astype("f8")
        y = (X @ dice.standard_normal(123) + dice.standard_normal(len(X)) > 0.0).astype("f8")
    else:
        held = np.load(data / "a9a.npz")
        X, y = held["X_train"].astype("f8"), held["y_train"].astype("f8")
    order = dice.permutation(len(X))[: 1_500 if small else None]
    train, valid = np.split(order, [len(order) * 2 // 3])
    return Workload(
        "a9a", "l2", (X[train], y[train]), (X[valid], y[valid]), [np.zeros((1, X.shape[1]))], np.ones(X.shape[1]), True,
        (1.0, 0.3, 0.1), _source(data),
    )  # fmt: skip


def cleaning(data: Path | None, small: bool = False) -> Workload:
    """Softmax regression on 5,000 digits of which half have random labels, float32; 5,000 clean ones validate."""
    count = 300 if small else 5_000
    X, y = _digits(data, 2 * count)
    dice = np.random.default_rng(1)
    noisy = y[:count].copy()
    wrong = dice.permutation(count)[: count // 2]
    noisy[wrong] = dice.integers(0, 10, len(wrong))
    return Workload(
        "cleaning", "cleaning", (X[:count], noisy), (X[count:], y[count:]), [np.zeros((10, X.shape[1]), "f4")],
        np.zeros(count, "f4"), False, (0.3, 0.1, 1.0), _source(data),
    )  # fmt: skip


def mlp(data: Path | None, small: bool = False) -> Workload:
    """A 784-64-10 network on 2,000 digits with one decay for each weight, float32; 2,000 validate."""
    count, hidden = (200, 8) if small else (2_000, 64)
    X, y = _digits(data, 2 * count)
    dice = np.random.default_rng(2)
    shapes = [(hidden, X.shape[1]), (hidden,), (10, hidden), (10,)]
    params = [(dice.standard_normal(s) / np.sqrt(s[-1])).astype("f4") for s in shapes]
    strengths = np.full(sum(p.size for p in params), 1e-2, "f4")
    return Workload(
        "mlp", "mlp", (X[:count], y[:count]), (X[count:], y[count:]), params, strengths, True, (0.3, 0.1, 1.0),
        _source(data),
    )  # fmt: skip


def news20(data: Path | None, small: bool = False, binary: bool = False) -> Workload:
    """Softmax regression on 62,061 words with a strength for each, sparse tf-idf, float64; the data's own split."""
    if data is None:
        X, y, split = _words()
    else:
        held = np.load(data / "news20.npz")
        parts = held["data"].astype("f8"), held["indices"].astype("i4"), held["indptr"]
        X, y, split = sparse.csr_array(parts, shape=tuple(held["shape"])), held["y"].astype("i8"), held["split"]
    seen = np.bincount(X.indices, minlength=X.shape[1])
    X.data *= np.log((1 + X.shape[0]) / (1 + seen))[X.indices]
    X = sparse.csr_array(sparse.diags_array(1.0 / sparse.linalg.norm(X, axis=1)) @ X)
    labels = (y < 10).astype("f8") if binary else y
    train, valid = (np.flatnonzero(split == part)[: 500 if small else None] for part in (0, 1))
    return Workload(
        "news20-binary" if binary else "news20", "l2", (X[train], labels[train]), (X[valid], labels[valid]),
        [np.zeros((1 if binary else 20, X.shape[1]))], np.ones(X.shape[1]), True, (0.3, 0.1, 1.0), _source(data),
    )  # fmt: skip


def news20_binary(data: Path | None, small: bool = False) -> Workload:
    """`news20` with two classes of ten topics each."""
    return news20(data, small, binary=True)


WORKLOADS = {"a9a": a9a, "cleaning": cleaning, "mlp": mlp, "news20": news20, "news20-binary": news20_binary}


def load(name: str, data: str | Path | None = DATA, small: bool = False) -> Workload:
    """Return a problem; made-up data of the same shape where the folder does not exist."""
    folder = Path(data) if data is not None and Path(data).is_dir() else None
    return WORKLOADS[name](folder, small)


def _source(data: Path | None) -> str:
    return "made-up data" if data is None else "real data"


def _digits(data: Path | None, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images `(count, 784)` between 0 and 1, and labels."""
    if data is not None:
        held = np.load(data / "mnist.npz")
        return held["X_train"][:count].reshape(count, -1).astype("f4") / 255.0, held["y_train"][:count].astype("i8")
    dice = np.random.default_rng(3)
    y = dice.integers(0, 10, count)
    strokes = np.abs(dice.standard_normal((60, 784))) * (dice.random((60, 784)) < 0.1)
    mixed = np.maximum(dice.standard_normal((10, 60))[y] + dice.standard_normal((count, 60)), 0.0) @ strokes
    return np.clip(mixed / 10.0, 0.0, 1.0).astype("f4"), y


def _words() -> tuple[sparse.csr_array, np.ndarray, np.ndarray]:
    """Return counts of words by Zipf's law, topics that prefer some of them, and a split of 3 : 1 : 1."""
    dice = np.random.default_rng(4)
    rows, words, each = 15_935, 62_061, 80
    y = dice.integers(0, 20, rows)
    common = np.minimum(dice.zipf(1.3, (rows, each)), words) - 1
    own = (common * 20 + y[:, None]) % words
    column = np.where(dice.random((rows, each)) < 0.3, own, common)
    counts = sparse.coo_array((np.ones(rows * each), (np.repeat(np.arange(rows), each), column.ravel())), (rows, words))
    X = sparse.csr_array(counts)
    X.indices = X.indices.astype("i4")
    return X, y, dice.choice(3, rows, p=(0.6, 0.2, 0.2))
