"""Tensors to differentiate and one-line comparisons, for the tests of `argmin`, `root` and `fixed_point`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bilevel import argmin

D: Any = {"dtype": torch.float64}


def spd(n: int) -> Tensor:
    M = torch.randn(n, n, **D)
    return M @ M.T / n + torch.eye(n, **D)


def leaf(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, **D)).requires_grad_()


def number(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True, **D)


def close(found: Any, truth: Any, rtol: float = 1e-8) -> None:
    torch.testing.assert_close(found, truth, rtol=rtol, atol=rtol * float(torch.as_tensor(truth).abs().max()))


def same(pair: Iterable[Tensor], rtol: float = 1e-8) -> None:
    found, truth = pair
    close(found.detach(), truth.detach(), rtol)


def log(a: Tensor, **settings: Any) -> Tensor:
    """Return log a, as the minimum of e^w - a w."""
    found: Tensor = argmin(lambda w, a: w.exp() - a * w, torch.zeros((), **D), a, **settings)
    return found


def quadratic(w: Tensor, a: Tensor) -> Tensor:
    return 0.5 * ((w - a) ** 2).sum()
