"""The kinds of typed hyperparameters, their ranges and their maps to unconstrained values.

positive   λ = exp(u)                                   u = log λ
interval   λ = low + (high - low) * sigmoid(u)
simplex    λ = softmax(u)
real       λ = u
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import InvalidTypeError, InvalidValueError

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
        value = self.value.to(like) if self.follows_params else self.value
        if not bool(torch.isfinite(self.free(value)).all()):
            raise InvalidValueError(
                f"{self!r} is {value.min().item():.4g} to {value.max().item():.4g} in {value.dtype}, at an end of its "
                "range; start further inside, or use float64"
            )
        return value

    def __repr__(self) -> str:
        shape = tuple(self.value.shape)
        shown = f"{self.value.item():.4g}" if shape == () else f"shape={shape}"
        return f"{type(self).__name__.lower()}({shown})"

    @abstractmethod
    def contains(self, natural: Tensor) -> bool:
        """Say whether natural values lie in the range, ends included: rounding may put a value on one."""

    @abstractmethod
    def _check(self) -> None:
        """Raise if the value lies outside of the range."""

    @abstractmethod
    def natural(self, free: Tensor) -> Tensor:
        """Return λ(u)."""

    @abstractmethod
    def free(self, natural: Tensor) -> Tensor:
        """Return u(λ)."""

    def stretch(self, natural: Tensor) -> Tensor:
        """Return dλ/du entry by entry; on a simplex up to a constant, which gradients along it are free of."""
        return natural

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Return the range that u is kept in, in the shape of u (infinite ends: no limit)."""
        infinite = torch.full_like(self.value, math.inf)
        return -infinite, infinite

    def ends(self, natural: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lowest and the highest λ that the user allows, this one included: what rounding must not cross."""
        infinite = torch.full_like(natural, math.inf)
        return -infinite, infinite


class Real(Hyperparameter):
    """Any real number."""

    def contains(self, natural: Tensor) -> bool:
        """Everything that is finite."""
        return True

    def _check(self) -> None:
        if not bool(torch.isfinite(self.value).all()):
            raise InvalidValueError("real() needs finite values")

    def natural(self, free: Tensor) -> Tensor:
        """Return u itself."""
        return free

    def free(self, natural: Tensor) -> Tensor:
        """Return λ itself."""
        return natural

    def stretch(self, natural: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(natural)


class Positive(Hyperparameter):
    """A positive number, optimized by its logarithm."""

    def __init__(self, value: float | Tensor, shape: Shape, low: float | None, high: float | None) -> None:
        self.low, self.high = low, high
        super().__init__(value, shape)

    def contains(self, natural: Tensor) -> bool:
        """Above 0; `low` and `high` bind `solve` alone."""
        return bool((natural > 0).all())

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

    def ends(self, natural: Tensor) -> tuple[Tensor, Tensor]:
        """Return `low` and `high`."""
        low, high = 0.0 if self.low is None else self.low, math.inf if self.high is None else self.high
        return torch.clamp(natural, max=low), torch.clamp(natural, min=high)


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

    def contains(self, natural: Tensor) -> bool:
        """Between the ends."""
        return bool(((natural >= self.low) & (natural <= self.high)).all())

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

    def stretch(self, natural: Tensor) -> Tensor:
        """Return (λ - low) (high - λ) / (high - low)."""
        return (natural - self.low) * (self.high - natural) / (self.high - self.low)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Keep sigmoid(u) away from 0 and 1 by 1e-6."""
        reach = torch.full_like(self.value, -math.log(1e-6))
        return -reach, reach


class Simplex(Hyperparameter):
    """Positive weights along the last dimension that sum to one, optimized by their logits."""

    def contains(self, natural: Tensor) -> bool:
        """Weights that sum to one."""
        sums = natural.sum(-1)
        return bool((natural >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-5)

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


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)
