"""Vectors of named tensors: every direction, gradient and right-hand side is a `Vector`.

A `Vector` is a `dict[str, Tensor]`. Two vectors belong together when they have the same names and
shapes. Nothing here copies to one flat buffer except `flatten`, which is for dense matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

Vector = dict[str, Tensor]

SMALLEST, LARGEST = 1e-120, 1e120  # between them no square of a norm leaves float64's range


def dot(a: Vector, b: Vector) -> Tensor:
    """Return the inner product as a 0-d float64 tensor (float32 products are summed in float64)."""
    total = torch.zeros((), dtype=torch.float64, device=_device(a))
    for name, x in a.items():
        y = b[name]
        if x.dtype == torch.float64 and y.dtype == torch.float64:
            total = total + torch.dot(x.reshape(-1), y.reshape(-1))
        else:
            total = total + torch.sum(x.double() * y.double())
    return total


def norm(a: Vector) -> Tensor:
    """Return the Euclidean norm as a 0-d float64 tensor, free of overflow and underflow."""
    parts = [torch.linalg.vector_norm(x, dtype=torch.float64) for x in a.values()]
    if parts:
        found: Tensor = parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts))
        if SMALLEST < float(found) < LARGEST:
            return found
    largest = max_abs(a)
    if not 0.0 < float(largest) < float("inf"):
        return largest
    return largest * torch.sqrt(sum_of_squares(a, largest))


def sum_of_squares(a: Vector, unit: Tensor) -> Tensor:
    """Return sum((a / unit)^2) as a 0-d float64 tensor."""
    return sum(
        (torch.sum((x.double() / unit) ** 2) for x in a.values()),
        torch.zeros((), dtype=torch.float64, device=_device(a)),
    )


def max_abs(a: Vector) -> Tensor:
    """Return the largest absolute value as a 0-d float64 tensor (0 for an empty vector)."""
    tensors = [x for x in a.values() if x.numel()]
    return largest(tensors) if tensors else torch.zeros((), dtype=torch.float64, device=_device(a))


def largest(tensors: Iterable[Tensor]) -> Tensor:
    """Return the largest absolute value as a 0-d float64 tensor on their device; NaN where there is one."""
    # One pass without a temporary: torch's maximum norm takes 20 times as long (torch 2.13, one thread).
    ends = [end.double() for x in tensors if x.numel() for end in torch.aminmax(x)]
    return torch.stack(ends).abs().max()


def axpy(alpha: Tensor | float, x: Vector, y: Vector) -> Vector:
    """Return alpha * x + y; a tensor `alpha` is a float64 scalar and does not change the dtype."""
    return {name: y[name] + _like(alpha, t) * t for name, t in x.items()}


def scale(alpha: Tensor | float, x: Vector) -> Vector:
    """Return alpha * x."""
    return {name: _like(alpha, t) * t for name, t in x.items()}


def subtract(x: Vector, y: Vector) -> Vector:
    """Return x - y."""
    return {name: t - y[name] for name, t in x.items()}


def zeros_like(a: Vector) -> Vector:
    """Return the zero vector of the same names, shapes, dtypes and devices."""
    return {name: torch.zeros_like(t) for name, t in a.items()}


def detach(a: Vector) -> Vector:
    """Return the same values cut from their graph (no copy)."""
    return {name: t.detach() for name, t in a.items()}


def cast(a: Vector, dtype: torch.dtype) -> Vector:
    """Return the vector in another precision, without a graph."""
    return {name: t.detach().to(dtype) for name, t in a.items()}


def leaves(a: Vector) -> Vector:
    """Return the same values as new leaves that require a gradient (no copy)."""
    return {name: t.detach().requires_grad_() for name, t in a.items()}


def dense(t: Tensor) -> Tensor:
    """Return a dense tensor; embeddings with sparse=True give sparse gradients."""
    return t.to_dense() if t.is_sparse else t


def is_finite(a: Vector) -> bool:
    """Say whether no entry is NaN or infinite."""
    return all(math.isfinite(end) for t in a.values() if t.numel() for end in torch.aminmax(t.detach()))


def size(a: Vector) -> int:
    """Return the number of scalars."""
    return sum(t.numel() for t in a.values())


def flatten(a: Vector) -> Tensor:
    """Return one 1-d tensor `(size,)`, tensors in the order of the dict; it may be a view of a single one."""
    if len(a) == 1:
        return next(iter(a.values())).reshape(-1)
    return torch.cat([t.reshape(-1) for t in a.values()])


def unflatten(flat: Tensor, like: Vector) -> Vector:
    """Return the vector whose `flatten` is `flat`, with the names, shapes and dtypes of `like`.

    Leading dimensions are kept: `(k, size)` gives tensors of shape `(k, *shape)`.
    """
    lead = flat.shape[:-1]
    if len(like) == 1:
        name, t = next(iter(like.items()))
        return {name: flat.reshape(lead + t.shape).to(t.dtype)}
    parts = torch.split(flat, [t.numel() for t in like.values()], dim=-1)
    return {name: part.reshape(lead + t.shape).to(t.dtype) for (name, t), part in zip(like.items(), parts, strict=True)}


def _like(alpha: Tensor | float, t: Tensor) -> Tensor | float:
    return alpha.to(t.dtype) if isinstance(alpha, Tensor) else alpha


def _device(a: Vector) -> torch.device:
    return next(iter(a.values())).device if a else torch.device("cpu")
