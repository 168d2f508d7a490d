"""One healthy problem to spoil, and what `bilevel.check` finds in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import bilevel

GENERATOR = torch.Generator().manual_seed(0)
X, XV = (torch.randn(20, 4, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
Y, YV = (torch.randn(20, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
METHODS = sorted(bilevel.METHODS)


def train(w: Tensor, h: Tensor) -> Tensor:
    return ((X @ w - Y) ** 2).mean() + (h * w**2).sum()


def validate(w: Tensor, h: Tensor) -> Tensor:
    return ((XV @ w - YV) ** 2).mean()


def problem_of(
    inner_loss: Callable[..., Any] = train,
    outer_loss: Callable[..., Any] = validate,
    params: Any = None,
    hparams: Any = None,
    **more: Any,
) -> bilevel.BilevelProblem:
    """Ridge regression, but for what is given."""
    params = torch.full((4,), 0.1, dtype=torch.float64) if params is None else params
    return bilevel.BilevelProblem(inner_loss, outer_loss, params, hparams or bilevel.positive(0.1), **more)


def findings(problem: Any, method: Any = "implicit", *levels: str) -> list[bilevel.Finding]:
    """Return the findings of these levels; of all without."""
    return [f for f in bilevel.check(problem, method).findings if not levels or f.level in levels]


def only(problem: Any, method: Any = "implicit") -> bilevel.Finding:
    found = findings(problem, method)
    assert len(found) == 1, found
    return found[0]


def network(activation: nn.Module, dtype: torch.dtype = torch.float64) -> bilevel.BilevelProblem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), activation, nn.Linear(64, 1)).to(dtype)
    x, y, xv, yv = (t.to(dtype) for t in (X, Y, XV, YV))
    return problem_of(
        lambda m, h: ((m(x)[:, 0] - y) ** 2).mean() + h * sum((p**2).sum() for p in m.parameters()),
        lambda m, h: ((m(xv)[:, 0] - yv) ** 2).mean(),
        model,
    )
