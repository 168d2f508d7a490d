"""Float64 tensors from numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
