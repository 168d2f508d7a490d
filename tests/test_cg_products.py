"""Conjugate gradients take no product beside those of their steps but the last one, which shows the true residual."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bilevel.operators import LinearOperator
from bilevel.solvers.linear import CG
from bilevel.vector import Vector


class Counted:
    """A diagonal matrix, float64 `(n,)`, whose products are counted and rounded to `dtype`."""

    def __init__(self, diagonal: Tensor, dtype: torch.dtype = torch.float64) -> None:
        self.diagonal, self.dtype, self.products = diagonal, dtype, 0
        like = {"w": torch.zeros(len(diagonal), dtype=dtype)}
        self.operator = LinearOperator(self._times, like, symmetric=True)

    def _times(self, v: Vector) -> Vector:
        self.products += 1
        return {"w": (self.diagonal * v["w"].double()).to(self.dtype)}


def spread(n: int, condition: float) -> Tensor:
    return torch.logspace(0.0, -torch.tensor(condition).log10().item(), n, dtype=torch.float64)


def test_one_product_a_step_and_one_in_the_end() -> None:
    matrix = Counted(spread(300, 3e2))
    found = CG().solve(matrix.operator, {"w": torch.ones(300, dtype=torch.float64)})
    assert found.status == "converged" and found.relative <= 1e-8
    assert 100 < found.steps < 200 and matrix.products == found.steps + 1


def test_a_recursion_that_is_wrong_goes_on_from_the_true_residual() -> None:
    """Products in float32 leave 6e-8 of a product of size κ |b|; the recursion alone ends at a residual above rtol."""
    matrix = Counted(spread(300, 1e4), torch.float32)
    found = CG(rtol=1e-6).solve(matrix.operator, {"w": torch.ones(300)})
    assert found.status == "converged" and found.relative <= 1e-6
    assert matrix.products > found.steps + 1


def test_a_residual_that_falls_no_further_ends_the_solve() -> None:
    matrix = Counted(spread(50, 1e5), torch.float32)
    found = CG(rtol=1e-13).solve(matrix.operator, {"w": torch.ones(50)})
    assert found.status == "stagnated" and found.relative > 1e-13
    assert matrix.products < 450


def test_a_diagonal_that_helped_is_kept_for_the_next_solve() -> None:
    """300 eigenvalues without a pattern over five decades, a hundredfold above the median at the top."""
    dice = torch.Generator().manual_seed(0)
    matrix = Counted(10.0 ** (5.0 * torch.rand(300, generator=dice, dtype=torch.float64)))
    b = {"w": torch.ones(300, dtype=torch.float64)}
    first = CG().solve(matrix.operator, b)
    second = CG().solve(replace(matrix.operator, kept=first.kept), b)
    assert first.status == second.status == "converged"
    assert first.steps > 200 and second.steps <= 60
