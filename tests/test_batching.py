"""Products of many vectors at once: the same numbers, one matrix-matrix product, blocks that fit the memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel import BilevelProblem, batching
from bilevel.response import ProblemResponse
from bilevel.solvers.base import Linearization


def f8(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = f8(30, 5)
LOSSES = {
    "X @ w": (lambda w, h: functional.softplus(X @ w).sum() + h * (w**2).sum(), f8(5, seed=1)),
    "linear(X, w)": (lambda w, h: functional.softplus(functional.linear(X, w)).sum() + h * (w**2).sum(), f8(3, 5)),
    "w @ X.T": (lambda w, h: functional.softplus(w @ X.T).sum() + h * (w**2).sum(), f8(3, 5)),
    "stack": (lambda w, h: functional.softplus(X.expand(2, 30, 5) @ w).sum() + h * (w**2).sum(), f8(2, 5, 1)),
    "two layers": (lambda w, h: functional.softplus((X @ w).tanh() @ w.T).sum() + h * (w**2).sum(), f8(5, 3)),
}


def linearized(name: str) -> Linearization:
    loss, w = LOSSES[name]
    problem = BilevelProblem(loss, lambda w, h: (w**2).sum(), w, torch.tensor(0.1, dtype=torch.float64))
    return Linearization(ProblemResponse(problem), problem.params.start, problem.hparams.layout.start)


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_is_the_same_as_one_by_one(name: str) -> None:
    operator = linearized(name).operator
    rows = f8(7, operator.size, seed=2)
    assert torch.allclose(operator.each(rows), torch.stack([operator.flat(row) for row in rows]), rtol=1e-12)


def test_a_matrix_that_all_share_is_read_once() -> None:
    """Torch's own rule repeats it for each row, in `bmm`."""
    operator = linearized("linear(X, w)").operator
    with _Seen() as seen:
        operator.each(f8(7, operator.size, seed=2))
    assert not seen.repeated and seen.products >= 2


class _Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts matrix products, and those with a repeated matrix."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.repeated, self.products = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default):
            self.products += 1
            self.repeated += any(len(t) > 1 and t.stride(0) == 0 for t in args if t.dim() == 3)
        return func(*args, **(kwargs or {}))


def test_blocks_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of 30 rows makes 30 numbers for each vector, and more vectors than fit go one block after another."""
    expected = linearized("X @ w").operator.dense()
    monkeypatch.setattr(batching, "NUMBERS", 65)
    system = linearized("X @ w")
    assert batching.rows_at_once(system._attached.values()) == 2
    assert torch.allclose(system.operator.dense(), expected, rtol=1e-12)
    assert system._cost.products == 5
