"""Data and a network for the tests of unrolling within a budget."""

from __future__ import annotations

import torch
from torch import Tensor, nn

GENERATOR = torch.Generator().manual_seed(0)
X, XV = (torch.randn(40, 8, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
Y, YV = (torch.randn(40, generator=GENERATOR, dtype=torch.float64) for _ in range(2))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6).double(), nn.Linear(6, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))[:, 0]  # type: ignore[no-any-return]
