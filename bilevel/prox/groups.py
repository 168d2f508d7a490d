"""The group lasso's penalty, which holds whole groups of entries at zero.

Yuan and Lin, Model selection and estimation in regression with grouped variables, JRSS B 68 (2006). On groups that are
not zero the norm is smooth, and its curvature is part of the inner Hessian.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bilevel.errors import InvalidTypeError, InvalidValueError
from bilevel.prox.base import Amount, Now, Penalty, strength

_EXPECTED = '"rows", "columns", "tensor", or whole numbers >= 0 that say the group of each entry'


@dataclass(frozen=True)
class GroupL1(Penalty):
    """ψ(w) = Σ over groups: strength |w_group|, the group lasso's penalty.

    Args:
        strength: one number, one for each group, or a function of hparams. Yuan and Lin take a number times the root of
            the group's size.
        groups: "rows" (a group for each index of the first dimension), "columns" (of the last dimension: the inputs of
            an `nn.Linear` weight), "tensor" (the whole tensor is one group), or an integer Tensor of w's shape that
            numbers the group of each entry from 0.
        on: see `Penalty`.

    >>> import torch
    >>> GroupL1(1.0).prox(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), step=1.0)
    tensor([[2.4000, 3.2000],
            [0.0000, 0.0000]])
    """

    strength: Amount
    groups: Literal["rows", "columns", "tensor"] | Tensor = "rows"

    def __post_init__(self) -> None:
        given = self.groups
        if isinstance(given, Tensor):
            if given.is_floating_point() or given.dtype == torch.bool or not given.numel() or int(given.min()) < 0:
                raise InvalidValueError(f"prox.GroupL1: `groups` is a {given.dtype} tensor, expected {_EXPECTED}")
        elif given not in ("rows", "columns", "tensor"):
            raise InvalidTypeError(f"prox.GroupL1: `groups` is {given!r}, expected {_EXPECTED}")

    def amounts(self, w: Tensor, hparams: Any) -> Now:
        labels = self._labels(w)
        count = torch.Size([int(labels.max()) + 1])
        return strength(self.strength, hparams, w, "prox.GroupL1: `strength`", count).expand(count), labels

    def _labels(self, w: Tensor) -> Tensor:
        """Return the group of each entry, flat."""
        given = self.groups
        if isinstance(given, Tensor):
            if given.shape != w.shape:
                raise InvalidValueError(
                    f"prox.GroupL1: `groups` has shape {tuple(given.shape)}, expected that of the variable, "
                    f"{tuple(w.shape)}"
                )
            return given.to(w.device, torch.long).reshape(-1)
        if given == "tensor" or w.dim() == 0:
            return torch.zeros(w.numel(), dtype=torch.long, device=w.device)
        dim = 0 if given == "rows" else w.dim() - 1
        shape = [1] * w.dim()
        shape[dim] = w.shape[dim]
        return torch.arange(w.shape[dim], device=w.device).reshape(shape).expand(w.shape).reshape(-1)

    def _norms(self, w: Tensor, now: Now) -> tuple[Tensor, Tensor]:
        """Return the norm of each group (1 for a zero one, which has no derivative), and which are not zero."""
        squares = torch.zeros_like(now[0]).index_add(0, now[1], (w * w).reshape(-1))
        some = squares.detach() > 0
        return torch.where(some, squares, torch.ones_like(squares)).sqrt(), some

    def evaluate(self, w: Tensor, now: Now) -> Tensor:
        norms, some = self._norms(w, now)
        return (now[0] * norms * some).sum()

    def proximal(self, w: Tensor, step: float | Tensor, now: Now) -> Tensor:
        norms, some = self._norms(w, now)
        return w * self._spread(torch.relu(1.0 - step * now[0] / norms) * some, w, now)

    def _spread(self, per_group: Tensor, w: Tensor, now: Now) -> Tensor:
        return per_group[now[1]].reshape(w.shape)

    def pattern(self, w: Tensor, now: Now) -> Tensor:
        _, some = self._norms(w, now)
        return self._spread(some | (now[0] == 0), w, now).to(torch.int8)

    def free(self, pattern: Tensor) -> Tensor:
        return pattern != 0

    def smooth(self, w: Tensor, pattern: Tensor, now: Now) -> Tensor:
        norms, some = self._norms(w, now)
        held = torch.ones_like(some).index_put((now[1],), self.free(pattern).reshape(-1))
        return (now[0] * norms * (some & held)).sum()

    def slack(self, gradient: Tensor, pattern: Tensor, now: Now) -> Tensor:
        norms, some = self._norms(gradient, now)
        return self._spread(now[0] - norms * some, gradient, now).masked_fill(self.free(pattern), math.inf)

    def gap(self, w: Tensor, pattern: Tensor, now: Now) -> Tensor:
        norms, some = self._norms(w, now)
        unkinked = ~self.free(pattern) | self._spread(now[0] == 0, w, now)
        return self._spread(norms * some, w, now).masked_fill(unkinked, math.inf)
