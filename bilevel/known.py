"""The table of problems with known hypergradients; `bilevel.testing` is its door."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

from bilevel.hyperparameters import positive, real
from bilevel.oracle import KnownProblem


def known_problems() -> list[KnownProblem]:
    """Return the table of problems, new objects in every call."""
    return [
        _ridge(),
        _weighted_least_squares(),
        _logistic(),
        _softmax("softmax regression", bias_strength=True),
        _softmax("softmax regression, free bias", bias_strength=False),
        _quadratic(),
        _linear_module(),
        _tanh_module(),
    ]


class _Data:
    """Normal numbers of one seed, apart from torch's global random state."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _ridge() -> KnownProblem:
    """Linear regression with one strength per feature."""
    data = _Data(1)
    weights = torch.tensor([2.0, -1.0, 1.0, 0.5, 0.3, -0.3], dtype=torch.float64)
    X, X_val = data(24, 6), data(40, 6)
    y, y_val = X @ weights + 2.0 * data(24), X_val @ weights + 2.0 * data(40)
    return KnownProblem(
        "per-feature ridge",
        lambda w, h: ((X @ w - y) ** 2).mean() / 2 + (h * w**2).sum() / 2,
        lambda w, h: ((X_val @ w - y_val) ** 2).mean() / 2,
        _zeros(6),
        positive(0.2, shape=(6,)),
    )


def _weighted_least_squares() -> KnownProblem:
    """Least squares with one weight per example; the outer loss asks for weights near 1."""
    data = _Data(2)
    weights = data(4)
    X, X_val = data(20, 4), data(30, 4)
    y, y_val = X @ weights + data(20), X_val @ weights + 0.1 * data(30)
    return KnownProblem(
        "data-weighted least squares",
        lambda w, h: (h["weights"] * (X @ w - y) ** 2).mean() / 2 + 0.05 * (w**2).sum(),
        lambda w, h: ((X_val @ w - y_val) ** 2).mean() / 2 + 0.01 * (torch.log(h["weights"]) ** 2).mean(),
        _zeros(4),
        {"weights": positive(0.8, shape=(20,))},
    )


def _logistic() -> KnownProblem:
    """Binary logistic regression; features off center couple weight and bias."""
    data = _Data(3)
    weights = torch.tensor([1.5, -1.0, 0.5, 0.0], dtype=torch.float64)
    X, X_val = data(40, 4) + 0.7, data(60, 4) + 0.7
    sign, sign_val = torch.sign(X @ weights + data(40)), torch.sign(X_val @ weights + data(60))

    def loss(p: Any, X: Tensor, sign: Tensor) -> Tensor:
        return softplus(-sign * (X @ p["weight"] + p["bias"])).mean()

    return KnownProblem(
        "logistic regression",
        lambda p, h: loss(p, X, sign) + ((h["weight"] * p["weight"] ** 2).sum() + h["bias"] * p["bias"] ** 2) / 2,
        lambda p, h: loss(p, X_val, sign_val),
        {"weight": _zeros(4), "bias": _zeros()},
        {"weight": positive(0.05, shape=(4,)), "bias": positive(0.05)},
    )


def _softmax(name: str, bias_strength: bool) -> KnownProblem:
    """Three classes; without a strength on the bias, a shift of all biases changes neither loss."""
    data = _Data(4)
    weights = data(4, 3)
    X, X_val = data(45, 4) + 0.5, data(60, 4) + 0.5
    label, label_val = (X @ weights + data(45, 3)).argmax(1), (X_val @ weights + data(60, 3)).argmax(1)

    def loss(p: Any, X: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(X @ p["weight"] + p["bias"], label)

    def penalty(p: Any, h: Any) -> Tensor:
        bias = h["bias"] * (p["bias"] ** 2).sum() if bias_strength else 0.0
        total: Tensor = (h["weight"] * p["weight"] ** 2).sum() + bias
        return total / 2

    strengths: dict[str, Any] = {"weight": positive(0.05, shape=(4, 3))}
    return KnownProblem(
        name,
        lambda p, h: loss(p, X, label) + penalty(p, h),
        lambda p, h: loss(p, X_val, label_val),
        {"weight": _zeros(4, 3), "bias": _zeros(3)},
        strengths | {"bias": positive(0.1)} if bias_strength else strengths,
    )


def _quadratic() -> KnownProblem:
    """Tensors of every shape, coupled by one matrix; the outer loss does not use one of them."""
    data = _Data(5)
    root = data(13, 13)
    A, target = root @ root.T / 13 + 0.2 * torch.eye(13, dtype=torch.float64), data(2, 3)

    def inner_loss(p: Any, h: Any) -> Tensor:
        z = torch.cat([p["scalar"].reshape(1), p["nested"]["matrix"].reshape(6), p["nested"]["unused"], p["vector"]])
        pull: Tensor = (h["pull"] * p["nested"]["matrix"]).sum() + h["push"] * (p["scalar"] + p["vector"].sum())
        bend: Tensor = z @ (A @ z) + h["strength"] * (p["vector"] ** 2).sum()
        return bend / 2 - pull

    def outer_loss(p: Any, h: Any) -> Tensor:
        apart: Tensor = (
            ((p["nested"]["matrix"] - target) ** 2).sum() + (p["scalar"] - 1.0) ** 2 + (p["vector"] ** 2).sum()
        )
        own: Tensor = h["strength"] * h["push"] ** 2
        return apart / 2 + 0.05 * own

    return KnownProblem(
        "coupled quadratic",
        inner_loss,
        outer_loss,
        {"scalar": _zeros(), "nested": {"matrix": _zeros(2, 3), "unused": _zeros(2)}, "vector": _zeros(4)},
        {"strength": positive(0.5), "pull": data(2, 3), "push": real(0.7)},
    )


class _Branches(nn.Module):
    """The sum of two linear layers on two parts of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 2, dtype=torch.float64)
        self.right = nn.Linear(2, 2, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(n, 2)` for `(n, 5)`."""
        return self.left(x[:, :3]) + self.right(x[:, 3:])  # type: ignore[no-any-return]


def _filled(build: Callable[[], nn.Module], data: _Data, size: float) -> nn.Module:
    """Build a module with parameters from `data`; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        module = build()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(size * data(*p.shape))
    return module


def _regression(name: str, module: nn.Module, layers: dict[str, str], X: Tensor, Y: Tensor) -> KnownProblem:
    """Least squares with one strength per layer; `layers` maps parameter prefixes to names of strengths."""
    half = len(X) // 2

    def inner_loss(m: Any, h: Any) -> Tensor:
        penalty = sum((h[layers[n.split(".")[0]]] * (p**2).sum() for n, p in m.named_parameters()), _zeros())
        apart: Tensor = m(X[:half]) - Y[:half]
        return (apart**2).mean() / 2 + penalty / 2

    return KnownProblem(
        name,
        inner_loss,
        lambda m, h: ((m(X[half:]) - Y[half:]) ** 2).mean() / 2,
        module,
        {strength: positive(0.05) for strength in layers.values()},
    )


def _linear_module() -> KnownProblem:
    """A linear `nn.Module` of two branches."""
    data = _Data(6)
    X = data(60, 5)
    Y = X @ data(5, 2) + 0.5 + data(60, 2)
    return _regression("linear module", _filled(_Branches, data, 0.1), {"left": "left", "right": "right"}, X, Y)


def _tanh_module() -> KnownProblem:
    """A network with one hidden layer, started close to a strict minimum."""
    data = _Data(7)
    X = data(60, 3)
    Y = torch.sin(2.0 * X[:, :1]) + X[:, 1:2] * X[:, 2:] + 0.3 * data(60, 1)

    def build() -> nn.Module:
        options: dict[str, Any] = {"dtype": torch.float64}
        return nn.Sequential(nn.Linear(3, 4, **options), nn.Tanh(), nn.Linear(4, 1, **options))

    known = _regression("tanh network", _filled(build, data, 1.0), {"0": "first", "2": "second"}, X, Y)
    minimum = known.truth.params
    with torch.no_grad():
        for p in minimum.parameters():
            p.add_(1e-3 * data(*p.shape))
    return _regression(known.name, minimum, {"0": "first", "2": "second"}, X, Y)
