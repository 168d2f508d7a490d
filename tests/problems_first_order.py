"""Training and validation data for estimators that need first derivatives only."""

from __future__ import annotations

import torch

_data = torch.Generator().manual_seed(0)
X, XV = (torch.randn(n, 4, generator=_data, dtype=torch.float64) for n in (12, 10))
Y, YV = (torch.randn(n, 4, generator=_data, dtype=torch.float64) for n in (12, 10))
