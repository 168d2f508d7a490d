"""What a PyTorch user writes by hand: the rival that has no library in its way, and what the other rivals train with.

The inner solver is SciPy's L-BFGS (a third to a fifth of the evaluations of torch.optim.LBFGS), the hypergradient is
conjugate gradients on a graph that is built once. No certificate, no checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits
from torch import Tensor

Loss = Callable[[list[Tensor], Tensor], Tensor]


def fit(inner: Loss, w: list[Tensor], h: Tensor, gtol: float, max_steps: int = 2000) -> list[Tensor]:
    """Minimize the inner loss by L-BFGS from `w` until the largest entry of its gradient is below `gtol`."""
    shapes, sizes, dtype = [t.shape for t in w], [t.numel() for t in w], w[0].dtype

    def tensors(x: np.ndarray) -> list[Tensor]:
        flat = torch.from_numpy(x).to(dtype)
        return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]

    def function(x: np.ndarray) -> tuple[float, np.ndarray]:
        leaves = [t.requires_grad_() for t in tensors(x.copy())]
        loss = inner(leaves, h)
        return float(loss.detach()), flatten(torch.autograd.grad(loss, leaves)).double().numpy()

    with threadpool_limits(1, user_api="blas"):  # of SciPy's vectors; torch has threads of its own
        start = flatten(w).double().numpy()
        options = {"maxiter": max_steps, "maxfun": 2 * max_steps, "maxcor": 20, "gtol": gtol, "ftol": 0.0}
        found = minimize(function, start, jac=True, method="L-BFGS-B", options=options)
    return tensors(found.x)


def hypergradient(
    inner: Loss, outer: Loss, w: list[Tensor], h: Tensor, rtol: float, start: Tensor | None = None
) -> tuple[Tensor, Tensor, float, int]:
    """Return dF/dh at the inner solution `w`, the adjoint, the outer loss and the number of products."""
    w, h = [t.detach().requires_grad_() for t in w], h.detach().requires_grad_()
    loss = outer(w, h)
    *by_w, by_h = torch.autograd.grad(loss, [*w, h], allow_unused=True)
    residual = torch.autograd.grad(inner(w, h), w, create_graph=True)

    def product(v: Tensor) -> Tensor:
        return flatten(torch.autograd.grad(residual, w, unflatten(v, w), retain_graph=True))

    b = flatten(by_w)
    x, r = (torch.zeros_like(b), b.clone()) if start is None else (start.clone(), b - product(start))
    p, rr, steps = r.clone(), r.dot(r), int(start is not None)
    stop = rtol**2 * float(b.dot(b))
    while float(rr) > stop and steps < 10 * len(b):
        Ap = product(p)
        alpha = rr / p.dot(Ap)
        x += alpha * p
        r -= alpha * Ap
        before, rr = rr, r.dot(r)
        p = r + (rr / before) * p
        steps += 1
    through = torch.autograd.grad(residual, h, unflatten(x, w))[0]
    return (0.0 if by_h is None else by_h) - through, x, float(loss.detach()), steps


def flatten(tensors: Any) -> Tensor:
    """Return all entries as one vector."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def unflatten(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Return views of the vector in the shapes of `like`."""
    parts = flat.split([t.numel() for t in like])
    return [part.view_as(t) for part, t in zip(parts, like, strict=True)]
