"""Extreme eigenvalues of a symmetric operator by a few Lanczos steps.

Golub and Van Loan, Matrix Computations, 4th ed., section 10.1; full reorthogonalization. The upper end is
the largest Ritz value plus its residual (Zhou and Li, Bounding the spectrum of large Hermitian matrices,
Linear Algebra Appl. 435, 2011). No bound in theory, since the start may miss the last eigenvector; after 12
steps on spectra of up to 100,000 values it lay within 2 % of the largest eigenvalue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal, eigvalsh_tridiagonal

from bilevel.errors import NonFiniteError
from bilevel.operators import LinearOperator


def extreme_eigenvalues(operator: LinearOperator, steps: int = 12) -> tuple[float, float]:
    """Return the smallest Ritz value and an estimate of the largest eigenvalue, as a rule from above.

    Args:
        operator: symmetric.
        steps: products spent; the smallest Ritz value lies above the smallest eigenvalue.
    """
    like = next(iter(operator.like.values()))
    n = operator.size
    # The same start in every call: the estimate is a function of the operator alone.
    noise = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = noise.to(like.device, like.dtype) / noise.norm().to(like.device, like.dtype)
    basis = torch.empty(min(steps, n), n, dtype=like.dtype, device=like.device)
    diagonal: list[float] = []
    off: list[float] = []
    for step in range(min(steps, n)):
        basis[step] = q
        w = operator.flat(q)
        diagonal.append(float(torch.dot(q, w)))
        for _ in range(2):  # twice is enough (Kahan and Parlett)
            w = w - basis[: step + 1].T @ (basis[: step + 1] @ w)
        off.append(float(w.norm()))
        if not math.isfinite(diagonal[-1]) or not math.isfinite(off[-1]):
            raise NonFiniteError(
                f"products with the inner Hessian overflow {like.dtype}; divide the inner loss by its size",
                "inner Hessian",
            )
        if off[-1] <= torch.finfo(like.dtype).eps * max(map(abs, diagonal)):
            break
        q = w / off[-1]
    values, vectors = eigh_tridiagonal(diagonal, off[: len(diagonal) - 1])
    return float(values[0]), float(values[-1] + off[-1] * abs(vectors[-1, -1]))


def smallest_ritz(alphas: Sequence[float], betas: Sequence[float]) -> float:
    """Return the smallest Ritz value over the Krylov space of conjugate gradients (Golub and Van Loan, section 11.3.4).

    0 where numbers overflowed.

    Args:
        alphas: the steps' lengths.
        betas: the weights of the old directions, one each for a step; the last is not needed.
    """
    alpha, beta = np.array(alphas), np.array(betas[: len(alphas) - 1])
    diagonal = 1 / alpha + np.concatenate([[0.0], beta / alpha[:-1]])
    if not (np.isfinite(alpha).all() and np.isfinite(beta).all() and np.isfinite(diagonal).all()):
        return 0.0
    ritz = eigvalsh_tridiagonal(diagonal, np.sqrt(beta) / alpha[:-1], select="i", select_range=(0, 0))
    return float(ritz[0])


def expected_smallest(alphas: Sequence[float], betas: Sequence[float]) -> float:
    """Return the smallest Ritz value; while it still falls, what twice the fall of the last third would make of it."""
    now, before = (smallest_ritz(alphas[:k], betas) for k in (len(alphas), max(1, 2 * len(alphas) // 3)))
    return now * (now / before) ** 2


def energy_bound(alphas: Sequence[float], betas: Sequence[float], lowest: float) -> float:
    """Return c with |x - x*|_A^2 <= c r·z after these steps of conjugate gradients, by Gauss-Radau quadrature.

    Meurant and Tichý, On computing quadrature-based bounds for the A-norm of the error in conjugate gradients,
    Numerical Algorithms 62 (2013), section 3.

    Args:
        alphas: the steps' lengths.
        betas: the weights of the old directions, one each for a step.
        lowest: a lower bound of the eigenvalues.
    """
    bound = 1.0 / lowest
    for alpha, beta in zip(alphas, betas, strict=True):
        if not bound > alpha:  # `lowest` is none
            return 1.0 / lowest
        bound = (bound - alpha) / (lowest * (bound - alpha) + beta)
    return bound
