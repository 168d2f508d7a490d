"""Penalties that hold single entries at zero: the lasso's and the elastic net's.

Tibshirani, Regression shrinkage and selection via the lasso, JRSS B 58 (1996); Zou and Hastie, Regularization and
variable selection via the elastic net, JRSS B 67 (2005). Their hypergradients on the support: Bertrand and others, JMLR
23 (2022), table 1 and theorem 13.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.prox.base import Amount, Now, Penalty, strength


@dataclass(frozen=True)
class _Entrywise(Penalty):
    """ψ(w) = Σ l1 |w| + l2 w^2 / 2 with `now` = (l1, l2); the pattern is the sign."""

    def evaluate(self, w: Tensor, now: Now) -> Tensor:
        l1, l2 = now
        return (l1 * w.abs() + 0.5 * l2 * w**2).sum()

    def proximal(self, w: Tensor, step: float | Tensor, now: Now) -> Tensor:
        l1, l2 = now
        reach = step * l1
        return (w - torch.clamp(w, -reach, reach)) / (1.0 + step * l2)

    def pattern(self, w: Tensor, now: Now) -> Tensor:
        unheld = (w == 0) & (now[0] == 0)  # no kink without a strength
        return torch.where(unheld, 1.0, torch.sign(w)).to(torch.int8)

    def free(self, pattern: Tensor) -> Tensor:
        return pattern != 0

    def smooth(self, w: Tensor, pattern: Tensor, now: Now) -> Tensor:
        l1, l2 = now
        return (l1 * pattern * w + 0.5 * l2 * w**2).sum()

    def slack(self, gradient: Tensor, pattern: Tensor, now: Now) -> Tensor:
        return (now[0] - gradient.abs()).masked_fill(self.free(pattern), math.inf)

    def gap(self, w: Tensor, pattern: Tensor, now: Now) -> Tensor:
        return w.abs().masked_fill(~self.free(pattern) | (now[0] == 0), math.inf)


@dataclass(frozen=True)
class L1(_Entrywise):
    """ψ(w) = Σ strength |w|, the lasso's penalty.

    scikit-learn's `Lasso(alpha)` is |Xw - y|^2 / (2 n) + alpha |w|_1: an inner loss of `((X @ w - y)**2).mean() / 2`
    and `L1(alpha)`.

    Args:
        strength: one number, one for each entry, or a function of hparams; larger holds more entries at zero.
        on: see `Penalty`.

    >>> import torch
    >>> L1(0.5).prox(torch.tensor([2.0, -0.25]), step=1.0)
    tensor([1.5000, 0.0000])
    """

    strength: Amount

    def amounts(self, w: Tensor, hparams: Any) -> Now:
        return strength(self.strength, hparams, w, "prox.L1: `strength`"), w.new_zeros(())


@dataclass(frozen=True)
class ElasticNet(_Entrywise):
    """ψ(w) = Σ l1 |w| + l2 w^2 / 2.

    scikit-learn's `ElasticNet(alpha, l1_ratio)` has l1 = alpha * l1_ratio and l2 = alpha * (1 - l1_ratio), with an
    inner loss of `((X @ w - y)**2).mean() / 2`.

    Args:
        l1: strength of |w|; one number, one for each entry, or a function of hparams.
        l2: strength of w^2 / 2; the same.
        on: see `Penalty`.

    >>> import torch
    >>> ElasticNet(0.5, 1.0).prox(torch.tensor([2.0, -0.25]), step=1.0)
    tensor([0.7500, 0.0000])
    """

    l1: Amount
    l2: Amount

    def amounts(self, w: Tensor, hparams: Any) -> Now:
        return (
            strength(self.l1, hparams, w, "prox.ElasticNet: `l1`"),
            strength(self.l2, hparams, w, "prox.ElasticNet: `l2`"),
        )
