"""What a penalty with kinks says about itself: its value, its proximal map, the smooth pieces between its kinks.

    prox_{t ψ}(w) = argmin_x  ψ(x) + |x - w|^2 / (2 t)

A penalty ψ is smooth along its pieces: some entries of w are held (at zero, at a bound), the others are free, and ψ is
a smooth function of those. Bertrand, Klopfenstein, Massias, Blondel, Vaiter, Gramfort and Salmon, Implicit
differentiation for fast hyperparameter selection in non-smooth convex learning, JMLR 23 (2022), sections 3 and 4.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import InvalidTypeError, InvalidValueError, meant, noting
from bilevel.layout import Variables

Amount = float | Tensor | Callable[[Any], Any]
"""A number, a tensor that can be broadcast to the variable, or a function of hparams that returns one."""

Now = tuple[Tensor, ...]
"""The amounts of a penalty for one variable, evaluated."""


@dataclass(frozen=True)
class Penalty(ABC):
    """A penalty ψ, or a constraint, on some tensors of `params`.

    `value` and `prox` take one tensor. The other methods are for solvers: they take amounts that were evaluated once
    (`now`), and an integer `pattern` of w's shape that names the piece on which each entry lies.

    Args:
        on: names of the tensors of `params` that it is on, or patterns of names; "weight" stands for every
            "....weight" too. None: all tensors.
    """

    _: KW_ONLY
    on: str | Sequence[str] | None = None

    def value(self, w: Tensor, hparams: Any = None) -> Tensor:
        """Return ψ(w), a scalar; 0 for a constraint that w obeys."""
        return self.evaluate(w, self.amounts(w, hparams))

    def prox(self, w: Tensor, step: float | Tensor, hparams: Any = None) -> Tensor:
        """Return prox_{step ψ}(w)."""
        return self.proximal(w, step, self.amounts(w, hparams))

    def covers(self, name: str) -> bool:
        """Say whether it is on the tensor of that name."""
        patterns = ("*",) if self.on is None else (self.on,) if isinstance(self.on, str) else self.on
        return any(fnmatchcase(name, form) for p in patterns for form in (p, f"*.{p}"))

    @abstractmethod
    def amounts(self, w: Tensor, hparams: Any) -> Now:
        """Return strengths or bounds for w."""

    @abstractmethod
    def evaluate(self, w: Tensor, now: Now) -> Tensor:
        """Return ψ(w); along a piece it must be differentiable twice by autograd, with a path to `now`."""

    @abstractmethod
    def proximal(self, w: Tensor, step: float | Tensor, now: Now) -> Tensor:
        """Return prox_{step ψ}(w), differentiable."""

    @abstractmethod
    def pattern(self, w: Tensor, now: Now) -> Tensor:
        """Return an int8 tensor of w's shape that tells the pieces apart."""

    @abstractmethod
    def free(self, pattern: Tensor) -> Tensor:
        """Return which entries are not held, a bool tensor."""

    def smooth(self, w: Tensor, pattern: Tensor, now: Now) -> Tensor:
        """Return ψ(w) continued smoothly from the piece `pattern`."""
        return self.evaluate(w, now)

    def held(self, w: Tensor, pattern: Tensor, now: Now) -> Tensor:
        """Return the values that entries are held at, differentiable in `now`."""
        return torch.zeros_like(w)

    @abstractmethod
    def slack(self, gradient: Tensor, pattern: Tensor, now: Now) -> Tensor:
        """Return how far the gradient of the smooth loss may grow before an entry is released; infinite where free.

        Negative: the entry would move, so this is no solution.
        """

    @abstractmethod
    def gap(self, w: Tensor, pattern: Tensor, now: Now) -> Tensor:
        """Return how far each free entry is from its next kink; infinite where held."""


def amount(value: Amount, hparams: Any, w: Tensor, label: str, shape: torch.Size | None = None) -> Tensor:
    """Return a strength or a bound as a tensor of w's dtype that can be broadcast to `shape` (None: that of w).

    Raises:
        BilevelError: for what is no number, and for a shape that does not fit; it names `label`.
    """
    with noting(label.replace("`", ""), "hparams", hparams):
        found = value(hparams) if callable(value) else value
    source = f"{label} returned" if callable(value) else f"{label} is"
    if isinstance(found, bool) or not isinstance(found, (int, float, Tensor)):
        raise InvalidTypeError(
            f"{source} a {type(found).__name__}, expected a number, a Tensor, or a function of hparams such as "
            'lambda h: h["l1"]'
        )
    tensor = torch.as_tensor(found, dtype=w.dtype, device=w.device)
    shape = w.shape if shape is None else shape
    if tensor.numel() == 1:
        tensor = tensor.reshape(())
    if len(tensor.shape) > len(shape) or any(
        n not in (1, m) for n, m in zip(tensor.shape[::-1], shape[::-1], strict=False)
    ):
        raise InvalidValueError(
            f"{source} a tensor of shape {tuple(tensor.shape)}, expected a number or a shape that broadcasts to "
            f"{tuple(shape)}"
        )
    return tensor


def strength(value: Amount, hparams: Any, w: Tensor, label: str, shape: torch.Size | None = None) -> Tensor:
    """Return what `amount` does; raise for a negative or infinite one."""
    tensor = amount(value, hparams, w, label, shape)
    lowest = float(tensor.detach().min()) if tensor.numel() else 0.0
    if not lowest >= 0.0 or not bool(torch.isfinite(tensor).all()):
        raise InvalidValueError(
            f"{label} is {lowest:.3g} at its lowest, expected finite numbers >= 0; make the hyperparameter "
            "bilevel.positive(...)"
        )
    return tensor


def as_penalties(given: Any, owner: str) -> tuple[Penalty, ...]:
    """Return one penalty or a sequence of them as a tuple; raise for anything else."""
    several = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    for one in several:
        if not isinstance(one, Penalty):
            shown = f"the class {one.__name__}" if isinstance(one, type) else f"{one!r}"
            raise InvalidTypeError(
                f"{owner}: `penalty` is {shown}, expected a penalty of bilevel.prox, such as bilevel.prox.L1(0.1) or "
                'bilevel.prox.L1(lambda h: h["l1"], on="weight"), or a list of them'
            )
    if not several:
        raise InvalidValueError(f"{owner}: `penalty` is an empty list; without a penalty use bilevel.inner.LBFGS()")
    return several


def assign(penalties: Sequence[Penalty], params: Variables) -> dict[str, Penalty]:
    """Return which penalty is on which tensor.

    Raises:
        InvalidValueError: for a penalty on no tensor, and for a tensor with two.
    """
    assigned: dict[str, Penalty] = {}
    for penalty in penalties:
        names = [name for name in params.start if penalty.covers(name)]
        if not names:
            raise InvalidValueError(
                f"{type(penalty).__name__}: `on` is {penalty.on!r}, and no tensor of `{params.role}` is called so; "
                f"they are {', '.join(params.start)}"
                f"{meant(penalty.on, params.start) if isinstance(penalty.on, str) else ''}"
            )
        for name in names:
            if name in assigned:
                raise InvalidValueError(
                    f"{params.label(name)} has two penalties, {type(assigned[name]).__name__} and "
                    f"{type(penalty).__name__}; give each tensor one (`on=` chooses the tensors; ElasticNet is L1 and "
                    "L2 together, and a smooth penalty belongs into `inner_loss`)"
                )
            assigned[name] = penalty
    return assigned
