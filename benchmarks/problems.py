"""Random problems with known hypergradients, and inner points at a known distance from the solution.

Every number comes from one `torch.Generator`, in float64, so a seed names a study.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import optree
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from bilevel import positive
from bilevel.minimize import lbfgs
from bilevel.oracle import KnownProblem

T = TypeVar("T")
FAMILIES = ("quadratic", "ridge", "logistic", "softmax", "tanh network")
POINTS = ("exact", "residual", "noise", "lbfgs", "gradient descent")


class Dice:
    """Random draws of one seed, apart from torch's global random state."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers."""
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def uniform(self, low: float, high: float) -> float:
        """Return one number."""
        return low + (high - low) * float(torch.rand((), generator=self._generator, dtype=torch.float64))

    def log(self, low: float, high: float) -> float:
        """Return one number whose logarithm is uniform."""
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def logs(self, low: float, high: float, size: int) -> Tensor:
        """Return numbers whose logarithms are uniform, both ends among them."""
        drawn = torch.rand(size, generator=self._generator, dtype=torch.float64)
        drawn[0], drawn[-1] = 0.0, 1.0
        return torch.exp(math.log(low) + math.log(high / low) * drawn)

    def choice(self, options: Sequence[T]) -> T:
        """Return one of the options."""
        return options[int(torch.randint(len(options), (), generator=self._generator))]

    def rotation(self, n: int) -> Tensor:
        """Return an orthogonal matrix."""
        return torch.linalg.qr(self.normal(n, n)).Q


@dataclass(frozen=True)
class Drawn:
    """A problem with what is known of it.

    Attributes:
        known: the losses, and the truth.
        family: one of `FAMILIES`.
        size: inner variables.
    """

    known: KnownProblem
    family: str
    size: int

    @property
    def condition(self) -> float:
        """Condition number of the inner Hessian at the solution."""
        low, high = self.known.truth.curvature
        return high / low if low > 0.0 else math.inf


def draw(
    dice: Dice,
    *,
    family: str | None = None,
    sizes: tuple[int, int] = (5, 300),
    condition: tuple[float, float] = (1, 1e6),
) -> Drawn:
    """Return a random problem with a strict inner minimum."""
    while True:
        kind = dice.choice(FAMILIES) if family is None else family
        n = int(dice.log(sizes[0], sizes[1] + 1))
        target = dice.log(*condition)
        drawn = Drawn(_BUILDERS[kind](dice, n, target, dice.log(1e-6, 1e6)), kind, n)
        if _usable(drawn):
            return drawn


def _usable(drawn: Drawn) -> bool:
    """Say whether there is a strict minimum, every hyperparameter matters, and no network collapsed to zero."""
    try:
        truth = drawn.known.truth
    except AssertionError:  # Newton's method did not end: a network without a strict minimum nearby
        return False
    parts = optree.tree_leaves(truth.gradient)
    strict = truth.curvature[0] > 0.0 and drawn.condition <= 1e7
    return strict and all(bool(t.isfinite().all() and t.any()) for t in parts) and _size(truth.params) > 1e-3


def _size(structure: Any) -> float:
    return math.sqrt(sum(float((t**2).sum()) for t in optree.tree_leaves(structure)))


def _spectrum(dice: Dice, n: int, condition: float) -> Tensor:
    """Eigenvalues from 1 / condition to 1: spread, in clusters, or a few small ones."""
    values = dice.logs(1.0 / condition, 1.0, n)
    kind = dice.choice(("spread", "clusters", "few small"))
    if kind == "clusters":
        centers = dice.logs(1.0 / condition, 1.0, 4)
        values = centers[torch.arange(n) % 4]
    elif kind == "few small":
        values[2:-1] = values[2:-1] ** 0.1
    return values


def _strengths(dice: Dice, level: float, n: int) -> Any:
    """One strength for all, or one per feature."""
    if dice.choice((True, False)):
        return positive(level)
    return positive(level * dice.logs(0.3, 3.0, n))


def _quadratic(dice: Dice, n: int, condition: float, size: float) -> KnownProblem:
    """Coupled tensors of several shapes; the outer loss leaves one out."""
    Q, values = dice.rotation(n), _spectrum(dice, n, condition)
    A = (Q * values) @ Q.T
    b, target, cut = A @ dice.normal(n), dice.normal(n), n // 2
    h = {"strength": _strengths(dice, 0.3 / condition, n), "pull": torch.tensor(dice.log(0.3, 3.0)).double()}

    def stack(p: Any) -> Tensor:
        return torch.cat([p["scalar"].reshape(1), p["head"], p["tail"]])

    def inner_loss(p: Any, h: Any) -> Tensor:
        w = stack(p)
        return size * (w @ (A @ w) / 2 - h["pull"] * (b @ w) + (h["strength"] * w**2).sum() / 2)

    def outer_loss(p: Any, h: Any) -> Tensor:
        own: Tensor = (h["strength"] ** 2).sum() * h["pull"]
        return ((p["scalar"] - target[0]) ** 2 + ((p["head"] - target[1:cut]) ** 2).sum() + own) / 2

    zeros = torch.zeros(n, dtype=torch.float64)
    params = {"scalar": zeros[0], "head": zeros[1:cut], "tail": zeros[cut:]}
    return KnownProblem("quadratic", inner_loss, outer_loss, params, h)


def _design(dice: Dice, n: int, condition: float) -> tuple[Tensor, Tensor]:
    """Training and validation features whose covariance has the condition asked for."""
    Q, roots = dice.rotation(n), _spectrum(dice, n, condition).sqrt()
    X, X_val = (dice.normal(2 * n + 10, n) for _ in range(2))
    return (X * roots) @ Q.T, (X_val * roots) @ Q.T


def _ridge(dice: Dice, n: int, condition: float, size: float) -> KnownProblem:
    X, X_val = _design(dice, n, condition)
    truth, noise = dice.normal(n), dice.log(0.1, 3.0)
    y, y_val = X @ truth + noise * dice.normal(len(X)), X_val @ truth + noise * dice.normal(len(X))
    return KnownProblem(
        "ridge",
        lambda w, h: size * (((X @ w - y) ** 2).mean() + (h * w**2).sum()) / 2,
        lambda w, h: ((X_val @ w - y_val) ** 2).mean() / 2,
        torch.zeros(n, dtype=torch.float64),
        _strengths(dice, dice.log(0.3, 3.0) / condition, n),
    )


def _logistic(dice: Dice, n: int, condition: float, size: float) -> KnownProblem:
    X, X_val = _design(dice, n, condition)
    truth = 3.0 * dice.normal(n)
    sign, sign_val = (torch.sign(x @ truth + 0.5 * dice.normal(len(x))) for x in (X, X_val))
    strengths = {"weight": _strengths(dice, dice.log(0.1, 3.0) / condition, n), "bias": positive(0.1)}

    def loss(p: Any, X: Tensor, sign: Tensor) -> Tensor:
        return softplus(-sign * (X @ p["weight"] + p["bias"])).mean()

    return KnownProblem(
        "logistic",
        lambda p, h: (
            size * (loss(p, X, sign) + ((h["weight"] * p["weight"] ** 2).sum() + h["bias"] * p["bias"] ** 2) / 2)
        ),
        lambda p, h: loss(p, X_val, sign_val),
        {"weight": torch.zeros(n, dtype=torch.float64), "bias": torch.zeros((), dtype=torch.float64)},
        strengths,
    )


def _softmax(dice: Dice, n: int, condition: float, size: float) -> KnownProblem:
    classes, features = 3, max(2, n // 3)
    X, X_val = _design(dice, features, condition)
    truth = 3.0 * dice.normal(features, classes)
    label, label_val = ((x @ truth + 0.5 * dice.normal(len(x), classes)).argmax(1) for x in (X, X_val))
    shared = dice.choice((True, False))
    level = dice.log(0.1, 3.0) / condition
    return KnownProblem(
        "softmax",
        lambda W, h: size * (cross_entropy(X @ W, label) + (h * W**2).sum() / 2),
        lambda W, h: cross_entropy(X_val @ W, label_val),
        torch.zeros(features, classes, dtype=torch.float64),
        positive(level) if shared else positive(level * dice.logs(0.3, 3.0, features)[:, None]),
    )


def _tanh(dice: Dice, n: int, condition: float, size: float) -> KnownProblem:
    """One hidden layer; the start is near a minimum, so the size is held to about 60."""
    features = 3
    hidden = max(1, min(n, 60) // (features + 2))
    X, X_val = dice.normal(80, features), dice.normal(80, features)

    def aim(x: Tensor) -> Tensor:
        return torch.sin(2.0 * x[:, 0]) + x[:, 1] * x[:, 2] + 0.3 * dice.normal(len(x))

    y, y_val = aim(X), aim(X_val)
    level = dice.log(3e-3, 3e-1)

    def out(p: Any, x: Tensor) -> Tensor:
        return torch.tanh(x @ p["in"] + p["bias"]) @ p["out"]

    def inner_loss(p: Any, h: Any) -> Tensor:
        penalty = h["in"] * (p["in"] ** 2).sum() + h["rest"] * ((p["bias"] ** 2).sum() + (p["out"] ** 2).sum())
        return size * (((out(p, X) - y) ** 2).mean() + penalty) / 2

    start = {"in": dice.normal(features, hidden), "bias": dice.normal(hidden), "out": dice.normal(hidden)}
    strengths = {"in": positive(level), "rest": positive(level * dice.log(0.3, 3.0))}
    first = KnownProblem(
        "tanh network", inner_loss, lambda p, h: ((out(p, X_val) - y_val) ** 2).mean() / 2, start, strengths
    )
    return KnownProblem(first.name, inner_loss, first.outer_loss, first.truth.params, strengths)


_BUILDERS: dict[str, Callable[[Dice, int, float, float], KnownProblem]] = {
    "quadratic": _quadratic,
    "ridge": _ridge,
    "logistic": _logistic,
    "softmax": _softmax,
    "tanh network": _tanh,
}


class Flat:
    """The inner problem on one flat vector, apart from the library's own view of it."""

    def __init__(self, known: KnownProblem) -> None:
        self._known = known
        self._h = optree.tree_map(lambda leaf: getattr(leaf, "value", leaf), known.hparams)
        self.best, self._spec = self._flat(known.truth.params)
        self.start, _ = self._flat(known.params)

    def _flat(self, structure: Any) -> tuple[Tensor, Any]:
        tensors, spec = optree.tree_flatten(structure)
        self._shapes = [t.shape for t in tensors]
        return torch.cat([t.reshape(-1) for t in tensors]).detach(), spec

    def params(self, w: Tensor) -> Any:
        """Return the structure that the losses take."""
        parts = torch.split(w, [s.numel() for s in self._shapes])
        return optree.tree_unflatten(self._spec, [p.reshape(s) for p, s in zip(parts, self._shapes, strict=True)])

    def loss(self, w: Tensor) -> Tensor:
        """Return the inner loss."""
        return self._known.inner_loss(self.params(w), self._h)

    def gradient(self, w: Tensor) -> Tensor:
        """Return the inner gradient."""
        w = w.detach().requires_grad_()
        (g,) = torch.autograd.grad(self.loss(w), w)
        return g

    def hessian(self, w: Tensor) -> Tensor:
        """Return the dense inner Hessian."""
        return torch.func.jacrev(torch.func.grad(self.loss))(w)


def inner_point(dice: Dice, known: KnownProblem, kind: str, amount: float | None = None) -> Any:
    """Return inner variables of one of `POINTS`, in the structure of `params`.

    Args:
        dice: random numbers.
        known: the problem.
        kind: "exact"; "residual" (the inner gradient is `amount` of its size at zero, in a random direction); "noise"
            (the variables are off by `amount` of their size); a run of L-BFGS or of gradient descent that was cut off.
        amount: None: drawn from 1e-10 to 1e-1.
    """
    flat = Flat(known)
    amount = dice.log(1e-10, 1e-1) if amount is None else amount
    w, noise = flat.best, dice.normal(len(flat.best))
    if kind == "residual":
        scale = float((flat.hessian(w) @ w).norm())
        w = w + torch.linalg.solve(flat.hessian(w), amount * scale / noise.norm() * noise)
    elif kind == "noise":
        w = w + amount * w.norm() / noise.norm() * noise
    elif kind == "lbfgs":
        w = _cut_lbfgs(flat, _apart(dice, flat, known), int(dice.log(2, 200)))
    elif kind == "gradient descent":
        size = 1.0 / known.truth.curvature[1]
        w, steps = _apart(dice, flat, known), int(dice.log(10, 1000))
        for _ in range(steps):
            w = w - size * flat.gradient(w)
    return flat.params(w)


def _apart(dice: Dice, flat: Flat, known: KnownProblem) -> Tensor:
    """Return where a run starts: the problem's start, or off the minimum where that is the start."""
    apart = float((flat.start - flat.best).norm()) > 0.0
    return flat.start if apart else flat.best + 0.05 * dice.normal(len(flat.best))


def _cut_lbfgs(flat: Flat, start: Tensor, steps: int) -> Tensor:
    scale = float(flat.gradient(start).norm())

    def function(x: Any) -> Any:
        w = torch.from_numpy(x.copy())
        return float(flat.loss(w)) / scale, (flat.gradient(w) / scale).numpy()

    return torch.from_numpy(lbfgs(function, start.numpy(), max_steps=steps).x.copy())
