"""A small problem to get wrong, and how its refusal must read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel

Make = Callable[[], object]


def w0() -> Tensor:
    return torch.zeros(2, dtype=torch.float64)


def h0() -> Tensor:
    return torch.ones((), dtype=torch.float64)


def inner(w: Any, h: Any) -> Tensor:
    return ((w - 1.0) ** 2).sum() + h * (w**2).sum()  # type: ignore[no-any-return]


def outer(w: Any, h: Any) -> Tensor:
    return (w**2).sum()  # type: ignore[no-any-return]


def problem(**changed: Any) -> bilevel.BilevelProblem:
    given: dict[str, Any] = {"inner_loss": inner, "outer_loss": outer, "params": w0(), "hparams": h0()}
    return bilevel.BilevelProblem(**(given | changed))


def refused(make: Make, message: str) -> None:
    with pytest.raises(bilevel.BilevelError, match=message) as caught:
        make()
    assert len(str(caught.value)) < 600  # a message is for reading
