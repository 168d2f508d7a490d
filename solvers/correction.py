"""The error of an implicit hypergradient, estimated by correcting the hypergradient once.

    w' = w - H^-1 R(w)                            a Newton step towards the inner solution
    v' = v + H^-1 (∂f/∂w - H v)  at w'            a correction of the adjoint there
    error ≈ |G(w, v) - G(w', v')| / |G(w', v')|   with G = ∂f/∂λ - (∂R/∂λ)^T v

Stetter, The defect correction principle and discretization methods, Numerische Mathematik 29 (1978): the difference to
a corrected solution is an estimate of the error. The correction leaves an error of second order, so its two solves may
be loose; with a factored Hessian they cost next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.errors import NonFiniteError
from bilevel.operators import LinearOperator
from bilevel.solvers.base import OuterGradient, Response, add_terms, present, ratio
from bilevel.solvers.linear.base import dtype_of, inner, wide
from bilevel.solvers.linear.cholesky import solve_with
from bilevel.solvers.linear.lanczos import expected_smallest
from bilevel.vector import Vector, axpy, detach, norm, subtract, unflatten, zeros_like

LOOSE = 0.03  # what a solve may leave, relative to its answer
# Products of a solve: the smallest curvature takes a few to be seen; half of what the hypergradient took is allowed.
FEWEST, MOST = 8, 30
CLEAR = 1e-5  # a bound below this settles it: a hundredth of the error that "exact" allows
MEASURED = 1e-4  # so does a change below this, measured as far away as the inner solution may be
# Relative change of a hypergradient over that of w, where it is not measured: above 10 in one problem of a hundred, and
# without a limit where ∂f/∂w vanishes at the inner solution.
SENSITIVITY = 10.0
# A method that approximates by design does so in the adjoint; an inner solution further off than this, relative, is no
# design. The estimate leaves out what is of second order in that distance: of 787 Neumann series on problems that were
# not trained to the end, 10 were off by more than 1.5 times the estimate (up to 30 times), all of them above 0.05.
INNER_TOLERANCE = 0.03
ROUNDING = 10.0  # units in the last place that a right-hand side may be off


@dataclass(frozen=True)
class Solved:
    """H^-1 r to a digit.

    Attributes:
        value: the answer.
        left: what is left of r.
        curvature: the smallest met, so that |left| / curvature bounds what is missing.
    """

    value: Vector
    left: Vector
    curvature: float

    def missing(self, left: Vector) -> float:
        """Return |left| / curvature; infinite where something is left and no curvature is known to be there."""
        if not self.curvature > 0.0 and _any(self.left):
            return math.inf
        return ratio(float(norm(left)), max(self.curvature, 0.0))


Bound = Callable[[Vector], float]
Solve = Callable[[Vector, float, Callable[[Bound], bool]], Solved]
"""r, the size of the terms that r is a difference of, and a test whether a bound settles it -> H^-1 r."""


@dataclass(frozen=True)
class Equation:
    """The adjoint equation at one point, whatever its form.

    Attributes:
        outer: the outer loss and its partial gradients there.
        residual: the inner gradient.
        scale: the size against which that is small.
        defect: adjoint -> right-hand side - left-hand side.
        through: adjoint -> the gradient through the inner variables.
    """

    outer: OuterGradient
    residual: Vector
    scale: float
    defect: Callable[[Vector], Vector]
    through: Callable[[Vector], dict[str, torch.Tensor | None]]


@dataclass(frozen=True)
class Correction:
    """What one correction changes.

    Attributes:
        error: estimated relative error of the hypergradient.
        moved: estimated relative distance to the inner solution.
    """

    error: float
    moved: float


def loosely(operator: LinearOperator, curvature: float, spent: int) -> Solve:
    """Return conjugate gradients that stop when a bound for what is missing is small beside the answer.

    Args:
        operator: symmetric.
        curvature: the smallest curvature known; infinite for none.
        spent: products that the hypergradient took.
    """
    lowest = curvature  # over all solves: one may meet what another does not

    def solve(rhs: Vector, scale: float, settled: Callable[[Bound], bool]) -> Solved:
        nonlocal lowest
        if math.isfinite(lowest) and settled(lambda left: ratio(float(norm(left)), lowest)):
            return Solved(zeros_like(rhs), rhs, lowest)
        r, low, floor = wide(rhs), lowest, ROUNDING * torch.finfo(dtype_of(rhs)).eps * scale
        x, p, rr = torch.zeros_like(r), r, inner(r, r)
        alphas: list[float] = []
        betas: list[float] = []
        # Below the floor lie directions that the inner loss does not bend.
        while len(alphas) < max(MOST, spent // 2) and floor < math.sqrt(rr) < math.inf:
            if len(alphas) >= FEWEST and math.sqrt(rr) <= LOOSE * low * math.sqrt(inner(x, x)):
                low = min(low, expected_smallest(alphas, betas))  # dearer than p·Hp / p·p, and smaller
                if math.sqrt(rr) <= LOOSE * low * math.sqrt(inner(x, x)):
                    break
            Ap = operator.flat(p)
            low = min(low, inner(p, Ap) / inner(p, p))
            if not low > 0.0:
                break
            alphas.append(rr / inner(p, Ap))
            x, r = x + alphas[-1] * p, r - alphas[-1] * Ap
            rr, before = inner(r, r), rr
            betas.append(rr / before)
            p = r + betas[-1] * p
        if alphas and low > 0.0:
            low = min(low, expected_smallest(alphas, betas))
        lowest = low
        return Solved(unflatten(x, rhs), unflatten(r, rhs), low)

    return solve


def preconditioned(operator: LinearOperator, factor: Tensor) -> Solve:
    """Return conjugate gradients with the Cholesky factor L of a Hessian nearby; what is left is (L L^T)^-1 times r.

    So it is compared to the answer in its own units: with μ the smallest eigenvalue of (L L^T)^-1 H, which is about
    one, what is missing is at most |left| / μ in the norm of L L^T.
    """
    inverse = solve_with(factor)

    def solve(rhs: Vector, scale: float, settled: Callable[[Bound], bool]) -> Solved:
        r = wide(rhs)
        x, z = torch.zeros_like(r), inverse(r)
        p, rz, low = z, inner(r, z), 1.0
        alphas: list[float] = []
        betas: list[float] = []
        while len(alphas) < MOST and rz > 0.0 and float(z.norm()) > LOOSE * low * float(x.norm()):
            Ap = operator.flat(p)
            pAp = inner(p, Ap)
            if not pAp > 0.0:
                low = 0.0
                break
            alphas.append(rz / pAp)
            x, r = x + alphas[-1] * p, r - alphas[-1] * Ap
            z = inverse(r)
            rz, before = inner(r, z), rz
            betas.append(rz / before)
            p, low = z + betas[-1] * p, min(low, expected_smallest(alphas, betas))
        return Solved(unflatten(x, rhs), unflatten(z, rhs), low)

    return solve


def factored(inverse: Callable[[Vector], Vector], curvature: float) -> Solve:
    """Return the solver that a factored Hessian is."""
    return lambda r, scale, settled: Solved(inverse(r), zeros_like(r), curvature)


@dataclass(frozen=True)
class _Given:
    """What `correct` was given."""

    lower: Vector
    upper: Vector
    gradient: Vector
    adjoint: Vector
    here: Equation
    there: Callable[[Vector], Equation]
    response: Response

    def size(self, gradient: Vector) -> float:
        """Return what an error of the hypergradient is held against."""
        return max(float(norm(gradient)), self.response.gradient_floor)

    def gain(self) -> float:
        """Return |(∂R/∂λ)^T v| / |v|, a lower bound of the norm of ∂R/∂λ."""
        direct = self.here.outer.upper
        through = {n: t if (d := direct[n]) is None else t - d for n, t in self.gradient.items()}
        return ratio(float(norm(through)), float(norm(self.adjoint)))

    def step(self, solve: Solve) -> tuple[Solved, float]:
        """Return H^-1 R, and where it was not solved for, how much it changes the hypergradient at most."""
        residual, scale, far = self.here.residual, self.here.scale, float(norm(self.lower))
        found = solve(residual, scale, lambda bound: SENSITIVITY * ratio(bound(residual), far) <= CLEAR)
        if _any(found.value) or not _any(residual) or not 0.0 < found.curvature < math.inf:
            return found, 0.0
        change = self._change_within(1.0 / found.curvature)
        if ratio(change, self.size(self.gradient)) > MEASURED:
            found = solve(residual, 0.0, lambda bound: False)  # even below the floor: the curvature is known
        return found, 0.0 if _any(found.value) else change

    def _change_within(self, longest: float) -> float:
        """Return how much a correction with `longest` for the inverse changes the hypergradient.

        No eigenvalue of the inverse is larger, so nothing that a real correction moves is moved less far. A relative
        change of w does not tell where ∂f/∂w nearly vanishes: with data without noise it is all made of the error of w.
        """
        try:
            away = self.there(axpy(-longest, self.here.residual, self.lower))
            change = subtract(away.defect(self.adjoint), self.here.defect(self.adjoint))
            through = away.through(axpy(longest, change, self.adjoint))
            moved = add_terms(self.response, away.outer.upper, through, self.upper, "")
        except NonFiniteError:
            return math.inf
        return float(norm(subtract(self.gradient, moved))) + self.gain() * longest * float(norm(change))


def correct(
    lower: Vector,
    upper: Vector,
    gradient: Vector,
    adjoint: Vector,
    here: Equation,
    there: Callable[[Vector], Equation],
    response: Response,
    solve: Solve,
    solve_adjoint: Solve | None = None,
) -> Correction | None:
    """Estimate the error of `gradient`; None where the correction comes to no end.

    What the known curvature bounds far below any verdict is not solved for: the bound is the estimate.

    Args:
        lower: w.
        upper: λ.
        gradient: dF/dλ that the adjoint gave.
        adjoint: v.
        here: its equation at w, with the inner gradient.
        there: the same at other inner variables.
        response: the problem.
        solve: for H.
        solve_adjoint: for the adjoint equation, where its form is another.
    """
    given = _Given(lower, upper, gradient, adjoint, here, there, response)
    step, within = given.step(solve)
    corrected, moves = detach(subtract(lower, step.value)), _any(step.value)
    # Once moved, the defect may lie where λ does not reach but through the inverse.
    gain = given.gain() if moves else 0.0
    try:
        equation = there(corrected) if moves else here
        defect = equation.defect(adjoint)
        reach: Vector = {}  # what the defect comes to in the hypergradient, up to the curvature

        def settled(bound: Bound) -> bool:
            reach.update(present(equation.through(defect)))
            if reach and not _any(reach) and _any(defect):
                return False  # λ does not reach it but through the inverse
            return ratio(bound(reach) + gain * bound(defect), given.size(gradient)) <= CLEAR

        change = (solve_adjoint or solve)(defect, float(norm(equation.outer.lower)), settled)
        better = gradient
        if moves or _any(change.value):
            through = equation.through(axpy(1.0, adjoint, change.value))
            better = add_terms(response, equation.outer.upper, through, upper, "")
    except NonFiniteError:
        return None
    if change.left is not defect:
        reach = present(equation.through(change.left)) if _any(change.left) else {}
    size, far = given.size(better), float(norm(corrected))
    changed, moved = ratio(float(norm(subtract(gradient, better))), size), ratio(float(norm(step.value)), far)
    beyond = ratio(step.missing(step.left), far)
    sensitivity = max(SENSITIVITY, ratio(changed, moved)) if moves else SENSITIVITY
    error = changed + ratio(change.missing(reach), size) + max(ratio(within, size), sensitivity * beyond)
    return Correction(error, moved + SENSITIVITY * beyond) if math.isfinite(error) else None


def _any(v: Vector) -> bool:
    return float(norm(v)) > 0.0
