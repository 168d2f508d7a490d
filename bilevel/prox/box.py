"""Bounds on the inner variables.

The solution moves with a bound that depends on a hyperparameter: entries that are held at it do, and the free ones
answer. Blondel and others, Efficient and modular implicit differentiation, NeurIPS 2022, section 2.2, differentiate the
projected gradient step to the same end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import InvalidValueError
from bilevel.prox.base import Amount, Now, Penalty, amount

TOUCHES = 8.0  # units in the last place within which an entry lies on its bound


@dataclass(frozen=True)
class Box(Penalty):
    """low <= w <= high.

    Args:
        low: one number, one for each entry, a function of hparams, or None for no bound.
        high: the same.
        on: see `Penalty`.

    >>> import torch
    >>> Box(0.0, 1.0).prox(torch.tensor([-2.0, 0.5, 3.0]), step=1.0)
    tensor([0.0000, 0.5000, 1.0000])
    """

    low: Amount | None = None
    high: Amount | None = None

    def amounts(self, w: Tensor, hparams: Any) -> Now:
        low = amount(-math.inf if self.low is None else self.low, hparams, w, f"prox.{type(self).__name__}: `low`")
        high = amount(math.inf if self.high is None else self.high, hparams, w, f"prox.{type(self).__name__}: `high`")
        if not bool((low <= high).all()):
            raise InvalidValueError(
                f"prox.{type(self).__name__}: `low` is above `high` (or NaN) for some entries; give low <= high"
            )
        return low, high

    def evaluate(self, w: Tensor, now: Now) -> Tensor:
        return w.new_zeros(())

    def proximal(self, w: Tensor, step: float | Tensor, now: Now) -> Tensor:
        low, high = now
        return torch.minimum(torch.maximum(w, low), high)

    def pattern(self, w: Tensor, now: Now) -> Tensor:
        low, high = (x.detach() for x in now)
        near = TOUCHES * torch.finfo(w.dtype).eps * w.abs()
        at_low, at_high = w - low <= near, high - w <= near
        return at_high.to(torch.int8) - (at_low & ~at_high).to(torch.int8)

    def free(self, pattern: Tensor) -> Tensor:
        return pattern == 0

    def held(self, w: Tensor, pattern: Tensor, now: Now) -> Tensor:
        low, high = now
        return torch.where(pattern < 0, low, torch.where(pattern > 0, high, w.detach()))

    def slack(self, gradient: Tensor, pattern: Tensor, now: Now) -> Tensor:
        shut = now[0] == now[1]  # nowhere to go
        return (-pattern * gradient).masked_fill(self.free(pattern) | shut, math.inf)

    def gap(self, w: Tensor, pattern: Tensor, now: Now) -> Tensor:
        low, high = now
        return torch.minimum(w - low, high - w).masked_fill(~self.free(pattern), math.inf)


@dataclass(frozen=True)
class NonNegative(Box):
    """w >= 0.

    Args:
        on: see `Penalty`.

    >>> import torch
    >>> NonNegative().prox(torch.tensor([-2.0, 0.5]), step=1.0)
    tensor([0.0000, 0.5000])
    """

    low: Amount | None = field(default=0.0, init=False, repr=False)
    high: Amount | None = field(default=None, init=False, repr=False)
