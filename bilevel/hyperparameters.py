"""Typed hyperparameters: losses see natural values, the outer optimizer unconstrained ones.

positive   λ = exp(u)                                   u = log λ
interval   λ = low + (high - low) * sigmoid(u)
simplex    λ = softmax(u)
real       λ = u
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import optree
import torch
from torch import Tensor, nn

from bilevel.errors import InvalidTypeError, InvalidValueError
from bilevel.layout import Variables
from bilevel.variables import variables
from bilevel.vector import Vector, detach, leaves

Shape = tuple[int, ...] | int

# How far from its start value a positive hyperparameter goes by default, either way. Beyond it a strength is zero or
# infinite in effect, while the inner problem grows too ill-conditioned to be solved.
POSITIVE_REACH = 1e8


class Hyperparameter(ABC):
    """A leaf of `hparams` with a range. Make one with `positive`, `interval`, `simplex` or `real`.

    Attributes:
        value: the natural value where the run starts (after `Solution.apply_()`: where it ended).
    """

    def __init__(self, value: float | Tensor, shape: Shape) -> None:
        size = self._size(shape)
        if isinstance(value, Tensor):
            if size not in ((), tuple(value.shape)):
                raise InvalidValueError(
                    f"{self.maker}: the value has shape {tuple(value.shape)}, but `shape` says {size}; leave it out"
                )
            if not value.is_floating_point():
                raise InvalidTypeError(f"{self.maker}: the value is {value.dtype}; write .float() or .double()")
            self.value = value.detach().clone()
            self.follows_params = False
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            self.value = torch.full(size, float(value), dtype=torch.float64)
            self.follows_params = True
        else:
            raise InvalidTypeError(
                f"{self.maker}: the value is a {type(value).__name__}, expected a number or a Tensor; for several "
                "values write torch.tensor([...])"
            )
        self._check()

    @property
    def maker(self) -> str:
        """The function that makes it, as messages call it."""
        return f"{type(self).__name__.lower()}()"

    def _size(self, shape: Shape) -> tuple[int, ...]:
        sizes = shape if isinstance(shape, (tuple, list)) else (shape,)
        if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes):
            raise InvalidValueError(
                f"{self.maker}: `shape` is {shape!r}, expected a whole number of at least 1 or a tuple of those"
            )
        return tuple(sizes)

    def tensor(self, like: Tensor) -> Tensor:
        """Return the natural start value; a plain number takes the dtype and device of `like`."""
        return self.value.to(like) if self.follows_params else self.value

    def __repr__(self) -> str:
        shape = tuple(self.value.shape)
        shown = f"{self.value.item():.4g}" if shape == () else f"shape={shape}"
        return f"{type(self).__name__.lower()}({shown})"

    @abstractmethod
    def _check(self) -> None:
        """Raise if the value lies outside of the range."""

    @abstractmethod
    def natural(self, free: Tensor) -> Tensor:
        """Return λ(u)."""

    @abstractmethod
    def free(self, natural: Tensor) -> Tensor:
        """Return u(λ)."""

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Return the range that u is kept in, in the shape of u (infinite ends: no limit)."""
        infinite = torch.full_like(self.value, math.inf)
        return -infinite, infinite


class Real(Hyperparameter):
    """Any real number."""

    def _check(self) -> None:
        if not bool(torch.isfinite(self.value).all()):
            raise InvalidValueError("real() needs finite values")

    def natural(self, free: Tensor) -> Tensor:
        """Return u itself."""
        return free

    def free(self, natural: Tensor) -> Tensor:
        """Return λ itself."""
        return natural


class Positive(Hyperparameter):
    """A positive number, optimized by its logarithm."""

    def __init__(self, value: float | Tensor, shape: Shape, low: float | None, high: float | None) -> None:
        self.low, self.high = low, high
        super().__init__(value, shape)

    def _check(self) -> None:
        if not bool(((self.value > 0) & torch.isfinite(self.value)).all()):
            raise InvalidValueError(f"positive() needs finite values above 0, got {self.value.min().item():.4g}")
        low, high = 0.0 if self.low is None else self.low, math.inf if self.high is None else self.high
        numbers = _is_number(low) and _is_number(high)
        if not (numbers and 0.0 <= low < high and bool(((self.value >= low) & (self.value <= high)).all())):
            raise InvalidValueError(
                f"positive() needs 0 <= low <= value <= high and low < high, got low={self.low!r}, high={self.high!r} "
                f"and values from {self.value.min().item():.4g} to {self.value.max().item():.4g}"
            )

    def natural(self, free: Tensor) -> Tensor:
        """Return exp(u)."""
        return torch.exp(free)

    def free(self, natural: Tensor) -> Tensor:
        """Return log(λ)."""
        return torch.log(natural)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Return log(low) and log(high)."""
        low = self.value / POSITIVE_REACH if self.low is None else torch.full_like(self.value, self.low)
        high = self.value * POSITIVE_REACH if self.high is None else torch.full_like(self.value, self.high)
        return torch.log(low), torch.log(high)


class Interval(Hyperparameter):
    """A number strictly between two ends, optimized by its logit."""

    def __init__(self, value: float | Tensor, low: float, high: float, shape: Shape) -> None:
        ends = _is_number(low) and _is_number(high) and math.isfinite(low) and math.isfinite(high)
        if not (ends and low < high):
            raise InvalidValueError(
                f"interval() needs finite numbers low < high, got low={low!r}, high={high!r}; for one end write "
                "bilevel.positive, for none bilevel.real"
            )
        self.low, self.high = float(low), float(high)
        super().__init__(value, shape)

    def _check(self) -> None:
        if not bool(((self.value > self.low) & (self.value < self.high)).all()):
            raise InvalidValueError(
                f"interval() needs values strictly between {self.low} and {self.high}, got "
                f"{self.value.min().item():.4g} to {self.value.max().item():.4g}"
            )

    def natural(self, free: Tensor) -> Tensor:
        """Return low + (high - low) * sigmoid(u)."""
        return self.low + (self.high - self.low) * torch.sigmoid(free)

    def free(self, natural: Tensor) -> Tensor:
        """Return logit((λ - low) / (high - low))."""
        return torch.logit((natural - self.low) / (self.high - self.low))

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Keep sigmoid(u) away from 0 and 1 by 1e-6."""
        reach = torch.full_like(self.value, -math.log(1e-6))
        return -reach, reach


class Simplex(Hyperparameter):
    """Positive weights along the last dimension that sum to one, optimized by their logits."""

    def _check(self) -> None:
        sums = self.value.sum(-1)
        if self.value.dim() == 0 or not bool((self.value > 0).all()):
            raise InvalidValueError("simplex() needs positive weights along a last dimension")
        if not torch.allclose(sums, torch.ones_like(sums), atol=1e-5):
            raise InvalidValueError(f"simplex() needs weights that sum to 1, got a sum of {sums.max().item():.4g}")

    def natural(self, free: Tensor) -> Tensor:
        """Return softmax(u)."""
        return torch.softmax(free, dim=-1)

    def free(self, natural: Tensor) -> Tensor:
        """Return log(λ), one of many u with the same softmax."""
        return torch.log(natural)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Keep every weight above about 1e-12 of the largest."""
        reach = torch.full_like(self.value, -math.log(1e-6))
        return -reach, reach


def positive(
    value: float | Tensor, shape: Shape = (), *, low: float | None = None, high: float | None = None
) -> Hyperparameter:
    """Make a positive hyperparameter, optimized on a log scale.

    Args:
        value: where it starts, > 0: a number (repeated over `shape`) or a tensor of values.
        shape: its shape when `value` is a number; `()` is a 0-d tensor.
        low: smallest value `solve` goes to; None: 1e-8 of the start value. A strength that validation data
            want to be zero ends here.
        high: largest value `solve` goes to; None: 1e8 times the start value.

    >>> positive(1e-3, shape=(2,)).value
    tensor([0.0010, 0.0010], dtype=torch.float64)
    """
    return Positive(value, shape, low, high)


def interval(value: float | Tensor, low: float, high: float, shape: Shape = ()) -> Hyperparameter:
    """Make a hyperparameter strictly between `low` and `high`, optimized on a logit scale.

    Args:
        value: where it starts, between the ends and not on one.
        low: lower end.
        high: upper end.
        shape: its shape when `value` is a number.
    """
    return Interval(value, low, high, shape)


def simplex(weights: int | Tensor) -> Hyperparameter:
    """Make positive weights that sum to one along the last dimension, optimized as logits of a softmax.

    Args:
        weights: how many (they start equal), or a tensor of positive weights that sum to one.
    """
    if isinstance(weights, int) and not isinstance(weights, bool):
        if weights < 2:
            raise InvalidValueError(f"simplex() needs at least 2 weights, got {weights}")
        return Simplex(1.0 / weights, weights)
    if not isinstance(weights, Tensor):
        raise InvalidTypeError(
            f"simplex(): the weights are a {type(weights).__name__}, expected how many (a whole number) or a Tensor"
        )
    return Simplex(weights, ())


def real(value: float | Tensor, shape: Shape = ()) -> Hyperparameter:
    """Make an unconstrained hyperparameter; a number takes the dtype and device of `params`."""
    return Real(value, shape)


class Hyperparameters:
    """The user's `hparams`: their layout, their natural start values and their ranges.

    Attributes:
        layout: the door to the user's structure; its `start` holds natural values.
    """

    def __init__(self, structure: Any, like: Tensor) -> None:
        self._typed: list[Hyperparameter] = []
        self.kinds: dict[str, Hyperparameter] = {}
        if isinstance(structure, nn.Module):
            self.layout: Variables = variables(structure, "hparams")
            return
        self._original = structure
        typed = optree.tree_leaves(structure, none_is_leaf=True)
        plain = optree.tree_map(lambda leaf: _tensor_of(leaf, like), structure, none_is_leaf=True)
        self.layout = variables(plain, "hparams")
        for name, leaf in zip(self.layout.start, typed, strict=True):
            if isinstance(leaf, Hyperparameter):
                self.kinds[name] = leaf

    def natural(self, free: Vector) -> Vector:
        """Map unconstrained values to natural ones, differentiably."""
        return {name: self.kinds[name].natural(t) if name in self.kinds else t for name, t in free.items()}

    def free(self, natural: Vector) -> Vector:
        """Map natural values to unconstrained ones."""
        return {name: self.kinds[name].free(t) if name in self.kinds else t for name, t in natural.items()}

    def chain(self, free: Vector, natural_gradient: Vector) -> Vector:
        """Return the gradient over unconstrained values that belongs to one over natural values."""
        u = leaves(free)
        natural = self.natural(u)
        pulled = torch.autograd.grad(list(natural.values()), list(u.values()), list(natural_gradient.values()))
        return dict(zip(u, pulled, strict=True))

    def read(self, structure: Any, source: str) -> Vector:
        """Return the natural values of a structure like the user's, typed leaves or plain tensors."""
        like = next(iter(self.layout.start.values()))
        if not isinstance(structure, nn.Module):
            structure = optree.tree_map(lambda leaf: _tensor_of(leaf, like), structure, none_is_leaf=True)
        return detach(self.layout.read(structure, source))

    def bounds(self) -> tuple[Vector, Vector]:
        """Return the lowest and the highest unconstrained values; infinite for no limit."""
        ends = {name: self.kinds.get(name, Real(t, ())).bounds() for name, t in self.layout.start.items()}
        like = self.layout.start
        return {n: e[0].to(like[n]) for n, e in ends.items()}, {n: e[1].to(like[n]) for n, e in ends.items()}

    def write_back(self, natural: Vector) -> None:
        """Copy values into the user's tensors, and into the start values of typed hyperparameters."""
        self.layout.write_back(natural)
        for name, kind in self.kinds.items():
            kind.value.copy_(natural[name])


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _tensor_of(leaf: Any, like: Tensor) -> Any:
    return leaf.tensor(like) if isinstance(leaf, Hyperparameter) else leaf
