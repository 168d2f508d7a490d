"""Ridge and logistic regression with one strength per feature, on whole data or minibatches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from bilevel import SABA, SOBA, AmIGO, BilevelProblem, Hypergradient, StocBiO

N, D, BATCH = 120, 4, 12
_data = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_data, dtype=torch.float64)


TRUE = torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
X, XV = normal(N, D), normal(N, D)
Y, YV = X @ TRUE + normal(N), XV @ TRUE + normal(N)
STRENGTHS = torch.tensor([0.5, 0.4, 0.3, 0.2], dtype=torch.float64)


def squares(w: Tensor, batch: Any) -> Tensor:
    value: Tensor = ((batch[0] @ w - batch[1]) ** 2).mean() / 2
    return value


def logistic(w: Tensor, batch: Any) -> Tensor:
    return torch.nn.functional.softplus(-torch.sign(batch[1]) * (batch[0] @ w)).mean()


def problem(kind: str, loss: Any = squares, batch: int = BATCH) -> BilevelProblem:
    """Return a problem with one strength per feature; `kind`: how its data come."""

    def data(a: Tensor, b: Tensor) -> Any:
        if kind == "whole":
            return a, b
        return DataLoader(TensorDataset(a, b), batch_size=batch, shuffle=kind == "shuffled")

    return BilevelProblem(
        lambda w, h, batch: loss(w, batch) + (h * w**2).sum() / 2,
        lambda w, h, batch: loss(w, batch),
        torch.zeros(D, dtype=torch.float64),
        bilevel.positive(STRENGTHS),
        inner_data=data(X, Y),
        outer_data=data(XV, YV),
    )


def closed_form(h: Tensor = STRENGTHS) -> tuple[Tensor, Tensor]:
    """Return the inner solution of ridge and the hypergradient: w = M^-1 X^T y / n, dF/dh = -w * M^-1 ∂F/∂w."""
    M = X.T @ X / N + torch.diag(h)
    w = torch.linalg.solve(M, X.T @ Y / N)
    return w, -w * torch.linalg.solve(M, XV.T @ (XV @ w - YV) / N)


W, TRUTH = closed_form()


def found(of: BilevelProblem, method: Any, **more: Any) -> Hypergradient:
    torch.manual_seed(0)
    return bilevel.hypergradient(of, method, on_untrusted="ignore", **more)


METHODS: dict[str, tuple[str, Any]] = {
    "soba": ("shuffled", SOBA(momentum=0.9)),
    "saba": ("in order", SABA()),
    "amigo": ("shuffled", AmIGO(momentum=0.9)),
    "stocbio": ("shuffled", StocBiO(momentum=0.9)),
}
