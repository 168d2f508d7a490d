"""The error of a hypergradient that is clearly small, from what its linear solve knows already.

    |G - G*|  ≲  |B^T e|  +  c |B| |v| max(|d| / |w|, |∂f/∂w(w + d) - ∂f/∂w(w)| / |∂f/∂w|)      |d| = |H^-1 R|

with B = ∂R/∂λ and e what conjugate gradients left of the adjoint v. The terms are what the adjoint solve left, and the
change of H, B and ∂f/∂w on the way to the inner solution; that of ∂f/∂w is measured, since it may all but vanish there.
Where they are far below what a verdict looks at, their sum is the estimate; else the hypergradient is corrected
(`bilevel.solvers.correction`), which is sharper and takes ten times the products.

Strakoš and Tichý, On error estimation in the conjugate gradient method and why it works in finite precision
computations, ETNA 13 (2002); Meurant and Tichý, Numerical Algorithms 62 (2013): the error in the norm of H is in the
coefficients of conjugate gradients. Its direction is taken from their last steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bilevel.errors import NonFiniteError
from bilevel.operators import LinearOperator
from bilevel.solvers.base import OuterGradient, Response, System, outer_gradient, present, ratio
from bilevel.solvers.correction import MOST, SENSITIVITY, Correction
from bilevel.solvers.linear import LinearSolution
from bilevel.solvers.linear.base import Preconditioner, inner, wide
from bilevel.solvers.linear.cg import CAUTION, Run
from bilevel.solvers.linear.lanczos import energy_bound, expected_smallest
from bilevel.vector import Vector, axpy, norm, subtract, unflatten

SMALL = 3e-4  # a third of the error that "exact" allows
# The part of it that may come from the inner solution where tolerances follow the estimate: its bound is often large.
NEAR = 1e-4
SHARE, FEWEST = 6, 3  # of the products that the adjoint took, one in so many may go into a bound of |H^-1 R|
TURNED = 3.0  # relative change of the hypergradient over that of ∂f/∂w
FEW = 10  # hyperparameters, whose B may be blind to v and to e by chance


def clearly_small(
    response: Response,
    outer: OuterGradient,
    system: System,
    solution: LinearSolution,
    curvature: float,
    lower: Vector,
    upper: Vector,
    gradient: Vector,
) -> Correction | None:
    """Estimate the error where it is at most `SMALL`; None where it may be larger, or is not known so cheaply.

    After few steps a correction is cheap too, and the bound of what they left is loose: often it is nothing.

    Args:
        response: the problem.
        outer: the outer loss at w and its partial gradients.
        system: the inner problem there.
        solution: of H v = ∂f/∂w.
        curvature: the smallest known.
        lower: w.
        upper: λ.
        gradient: dF/dλ.
    """
    if solution.missing is None or solution.status != "converged" or solution.steps < MOST or not curvature > 0.0:
        return None
    direct, v = float(norm(gradient)), float(norm(solution.value))
    size, far, left = max(direct, response.gradient_floor), float(norm(lower)), float(norm(system.residual))
    missing = solution.missing(curvature)
    reached = float(norm(present(system.pull_back(missing))))
    adjoint = ratio(reached, size)
    if not adjoint <= SMALL:
        return None
    # Not |B^T v| alone: near the outer optimum that vanishes, B does not.
    gain = max(ratio(float(norm(_between({**gradient}, outer.upper))), v), ratio(reached, float(norm(missing))))
    if left > 0.0 and sum(t.numel() for t in upper.values()) < FEW:
        gain = max(gain, float(norm(present(system.pull_back(_signs(lower))))))
    relative, near = max(gain * v, direct) / size, NEAR if response.slack > 1.0 else SMALL - adjoint
    away, way = left / curvature, system.residual
    for last in (False, True):
        if last:
            shorter, way = _newton_step(system.operator, system.residual, curvature, solution.steps // SHARE)
            away = min(away, shorter)
        moved = SENSITIVITY * relative * ratio(away, far)
        if not moved <= near:
            continue
        change = 0.0
        if left > 0.0:
            change = _change(response, outer, axpy(-away / float(norm(way)), way, lower), upper, size, relative)
        if change <= near:
            return Correction(adjoint + max(moved, change), ratio(away, far))
    return None


def _change(
    response: Response, outer: OuterGradient, lower: Vector, upper: Vector, size: float, relative: float
) -> float:
    """Return what the change of the outer gradient on the way to `lower` comes to in the hypergradient."""
    try:
        there = outer_gradient(response, lower, upper)
    except NonFiniteError:
        return math.inf
    steeper = ratio(float(norm(subtract(there.lower, outer.lower))), float(norm(outer.lower)))
    return ratio(float(norm(_between(there.upper, outer.upper))), size) + TURNED * relative * steeper


def _signs(like: Vector) -> Vector:
    """Return random signs, the same in every call: |B^T s| is about the Frobenius norm of B."""
    dice = torch.Generator().manual_seed(0)
    return {n: (torch.randint(0, 2, t.shape, generator=dice) * 2 - 1).to(t) for n, t in like.items()}


def _newton_step(operator: LinearOperator, residual: Vector, curvature: float, steps: int) -> tuple[float, Vector]:
    """Return a bound of |H^-1 R| from so many steps of conjugate gradients, infinite without one, and their answer."""
    r = wide(residual)
    run = Run(operator, r, torch.zeros_like(r), r, Preconditioner(lambda r: r, 1.0))
    if steps < FEWEST or run.iterate(0.0, steps) == "nonpositive curvature" or not run.alphas:
        return math.inf, residual
    low = min(curvature, expected_smallest(run.alphas, run.betas))
    rest = energy_bound(run.alphas, run.betas, CAUTION * low) * run.rz
    return math.sqrt(inner(run.x, run.x)) + math.sqrt(rest / low), unflatten(run.x, residual)


def _between(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> Vector:
    """Return a - b, nothing where both have nothing."""
    return {name: t if (u := b[name]) is None else t - u for name, t in a.items() if t is not None}
