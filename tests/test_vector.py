"""What is not finite is found, wherever it is, and the largest entry in one pass."""

from __future__ import annotations

import math

import pytest
import torch

from bilevel.vector import is_finite, largest, max_abs

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_one_entry_that_is_not_finite_is_found(dtype: torch.dtype, wrong: float) -> None:
    for place in (0, 77, 999):
        entries = torch.linspace(-3.0, 2.0, 1000, dtype=dtype)
        assert is_finite({"a": entries, "none": entries[:0], "0-d": entries[5]})
        entries[place] = wrong
        assert not is_finite({"a": torch.ones(2), "b": entries.reshape(10, 100)})
        assert not math.isfinite(float(largest([entries])))


def test_the_largest_entry_is_that_of_either_sign() -> None:
    a, b = torch.tensor([[1.0, -7.0], [2.0, 3.0]]), torch.tensor(5.0, dtype=torch.float64)
    assert float(largest([b, a, a[:0]])) == float(max_abs({"a": a, "b": b})) == 7.0
    assert float(max_abs({"a": a.abs()})) == 7.0 and largest([a]).dtype == torch.float64
    assert float(max_abs({"a": a[:0]})) == 0.0
