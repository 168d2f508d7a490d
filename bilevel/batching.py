"""Many products at once: as matrix-matrix products, in blocks that fit the memory.

`torch.func.vmap` turns a product with a matrix that all rows share into `bmm` of that matrix repeated, which reads it
once for each row. Taken as one `mm`, 128 Hessian-vector products of a logistic regression on 21,707 x 123 numbers cost
as much as ten one by one (docs/performance.md, "Products").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel.twice import nodes
from bilevel.vector import Vector

NUMBERS = 2**24  # of the largest tensor that a block of rows may make


def batched(product: Callable[[Vector], Vector], rows: Vector, most: int) -> Vector:
    """Return the product of each row of stacked vectors, `(k, *shape)`, at most so many at once.

    One by one where an operation has no batched derivative.
    """
    count = len(next(iter(rows.values())))
    blocks = ({name: t[begin : begin + most] for name, t in rows.items()} for begin in range(0, count, most))
    try:
        with _Shared():  # type: ignore[no-untyped-call]
            parts = [torch.func.vmap(product)(block) for block in blocks]
    except RuntimeError:
        parts = [product({name: t[i] for name, t in rows.items()}) for i in range(count)]
        return {name: torch.stack([part[name] for part in parts]) for name in rows}
    return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in rows}


def rows_at_once(outputs: Iterable[Tensor]) -> int:
    """Return how many vectors may be pulled back together through the graph behind `outputs`."""
    largest = 1
    for output in outputs:
        for node in nodes(output):
            sizes = [math.prod(given.shape) for given in getattr(node, "_input_metadata", ())]
            largest = max(largest, *sizes, 1)
    return max(1, NUMBERS // largest)


class _Shared(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes `bmm` with a matrix that is repeated for each row as one `mm`."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.bmm.default and len(args[0]) > 1:
            a, b = args
            if b.stride(0) == 0:
                return torch.mm(a.reshape(-1, a.shape[2]), b[0]).view(*a.shape[:2], b.shape[2])
            if a.stride(0) == 0:  # (A B)^T = B^T A^T
                flipped = b.transpose(1, 2)
                return torch.mm(flipped.reshape(-1, b.shape[1]), a[0].T).view(*flipped.shape[:2], -1).transpose(1, 2)
        return func(*args, **(kwargs or {}))


# What a product costs, roughly, on a core of this decade: seconds a call of an operation, a number read or written, and
# a multiplication. Only ratios matter here.
CALL, NUMBER, MULTIPLICATION = 5e-6, 1e-9, 6e-11


def dense_share(product: Callable[[Vector], Vector], v: Vector) -> float:
    """Return what the dense matrix costs beside so many products one by one as it has rows, factor included: a guess.

    From the operations of one product: calls and matrices that all rows share cost once for all, the rest each time.
    """
    work = _Work()
    with work:
        product(v)
    n = sum(t.numel() for t in v.values())
    return (work.each + MULTIPLICATION * n**2 / 3.0) / (work.each + work.once)


class _Work(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the seconds of what runs inside, for many vectors at once and for each of them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.once, self.each = 0.0, 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.once += CALL
        if func not in _VIEWS and isinstance(result, Tensor):
            self.each += NUMBER * result.numel()
        if func in _PRODUCTS:
            a, b = args[:2]
            self.once += NUMBER * max(a.numel(), b.numel())
            self.each += MULTIPLICATION * a.numel() * (b.shape[-1] if b.dim() == a.dim() else 1)
        return result


_ATEN = torch.ops.aten
_PRODUCTS = (_ATEN.mm.default, _ATEN.mv.default, _ATEN.bmm.default)
_VIEWS = (_ATEN.t.default, _ATEN.view.default, _ATEN.transpose.int, _ATEN.expand.default, _ATEN.detach.default,
          _ATEN._unsafe_view.default, _ATEN.unsqueeze.default, _ATEN.squeeze.dim)  # fmt: skip
