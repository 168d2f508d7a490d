"""The peak of memory, against sums by hand."""

from __future__ import annotations

import torch

from bilevel.measure import peak_memory

CPU = torch.device("cpu")
MATRIX = 8 * 100 * 100


def test_what_lives_at_once_is_counted_and_views_are_not() -> None:
    x = torch.ones(100, 100, dtype=torch.float64)
    with peak_memory(CPU) as peak:
        y = x * 2.0
        z = y.T + x.T  # two matrices live; the views hold nothing
        del y
        z = z + 1.0  # the third takes the place of y
        assert z.shape == x.shape
    assert peak.bytes == 2 * MATRIX


def test_the_graph_of_a_derivative_is_counted() -> None:
    x = torch.ones(100, 100, dtype=torch.float64)
    w = torch.ones(100, 100, dtype=torch.float64, requires_grad=True)
    steps = 5
    with peak_memory(CPU) as peak:
        y = x
        for _ in range(steps):
            y = y * w  # saves its input
        total = y.sum()
    # Five products; the sum is one number.
    assert peak.bytes == steps * MATRIX + 8
    assert total.requires_grad


def test_what_was_there_before_is_not_counted() -> None:
    x = torch.ones(100, 100, dtype=torch.float64)
    with peak_memory(CPU) as peak:
        x.add_(1.0)
        assert x.view(-1).shape == (10_000,)
    assert peak.bytes == 0
