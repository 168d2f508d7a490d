"""Restarted GMRES for systems without symmetry.

Saad and Schultz, GMRES: a generalized minimal residual algorithm for solving nonsymmetric linear systems, SIAM J. Sci.
Stat. Comput. 7 (1986). Deliberate differences: classical Gram-Schmidt run twice (two matrix-vector products in place of
many dots, and orthogonal to rounding); a small least-squares solve instead of rotations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from bilevel.operators import LinearOperator
from bilevel.solvers.about import Terms
from bilevel.solvers.linear.base import (
    LinearSolution,
    Status,
    check_count,
    check_settings,
    default_rtol,
    dtype_of,
    finished,
    inner,
    start_from,
    wide,
)
from bilevel.vector import Vector


@dataclass(frozen=True)
class GMRES:
    """Solve a general square system by minimizing the residual over Krylov spaces, restarted.

    Memory: `restart` vectors. A restart that gains nothing ends the solve.

    Args:
        rtol: stop when |b - Ax| <= rtol |b|; None: 1e-8 in float64, 1e-5 in float32.
        max_steps: most iterations; None: ten times the number of unknowns, at most 10,000.
        restart: basis vectors kept; larger converges in fewer steps.

    >>> import torch
    >>> from bilevel.operators import LinearOperator
    >>> M = torch.tensor([[2.0, 1.0], [0.0, 4.0]])
    >>> A = LinearOperator(lambda v: {"w": M @ v["w"]}, {"w": torch.zeros(2)}, symmetric=False)
    >>> GMRES().solve(A, {"w": torch.tensor([3.0, 4.0])}).value["w"]
    tensor([1., 1.])
    """

    rtol: float | None = None
    max_steps: int | None = None
    restart: int = 50
    truncates: ClassVar[bool] = False
    terms: ClassVar[Terms] = Terms(
        "k + 2 products", "50 vectors of n", "at most κ rtol; needs no symmetry", "Saad and Schultz 1986"
    )

    def __post_init__(self) -> None:
        check_settings(self.rtol, self.max_steps)
        check_count(self.restart, "restart")

    def solve(self, operator: LinearOperator, rhs: Vector, start: Vector | None = None) -> LinearSolution:
        """Solve A x = rhs."""
        b = wide(rhs)
        threshold = default_rtol(self.rtol, dtype_of(rhs), operator.slack) * math.sqrt(inner(b, b))
        x, r = start_from(operator, b, None if start is None else wide(start))
        steps, limit = 0, self.max_steps or min(10 * operator.size, 10_000)
        curvature: float | None = None
        status: Status = "converged"
        while (size := math.sqrt(inner(r, r))) > threshold:
            if steps >= limit:
                status = "max_steps"
                break
            length = min(self.restart, limit - steps)
            correction, H = cycle(operator, r, length, lambda left, y, H: left <= threshold)
            candidate, steps = x + correction, steps + H.shape[1]
            if operator.symmetric:
                seen = float(np.linalg.eigvalsh((H[:-1] + H[:-1].T) / 2)[0])
                curvature = seen if curvature is None else min(curvature, seen)
            after = b - operator.flat(candidate)
            if not math.sqrt(inner(after, after)) < 0.99 * size:
                status = "stagnated"
                break
            x, r = candidate, after
        return finished(operator, rhs, x, status, steps, curvature)


def cycle(
    operator: LinearOperator, r: Tensor, length: int, enough: Callable[[float, float, Any], bool]
) -> tuple[Tensor, Any]:
    """Return the correction of one Arnoldi cycle, and H `(k + 1, k)`, the operator in its basis.

    Args:
        operator: square.
        r: what it should make of the correction, float64 `(n,)`, not zero.
        length: most steps.
        enough: what is left of r, the size of the correction, H -> whether to stop.
    """
    basis = torch.empty(length + 1, r.numel(), dtype=r.dtype, device=r.device)
    size = math.sqrt(inner(r, r))
    basis[0] = r / size
    H = np.zeros((length + 1, length))
    y: Any = np.zeros(0)
    for k in range(length):
        w = operator.flat(basis[k])
        for _ in range(2):
            overlap = basis[: k + 1] @ w
            w = w - basis[: k + 1].T @ overlap
            H[: k + 1, k] += overlap.double().cpu().numpy()
        H[k + 1, k] = math.sqrt(inner(w, w))
        e = np.zeros(k + 2)
        e[0] = size
        seen = H[: k + 2, : k + 1]
        y = np.linalg.lstsq(seen, e, rcond=None)[0]
        left = float(np.linalg.norm(e - seen @ y))
        if H[k + 1, k] <= 1e-14 * np.abs(H).max() or enough(left, float(np.linalg.norm(y)), seen):
            break
        basis[k + 1] = w / H[k + 1, k]
    used = len(y)
    return basis[:used].T @ torch.from_numpy(y).to(r.device, r.dtype), H[: used + 1, :used]
