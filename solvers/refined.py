"""A hypergradient taken again in float64, where float32 is what keeps it from being trusted.

    w <- w - H^-1 R(w)   in float64, until R is small enough        (Newton's method)

and then the ordinary hypergradient at w. Products in float32 leave residuals of about 1e-6, which a condition of 1e3
turns into an error of 1e-3; refinement with residuals alone in float64 (Higham, Accuracy and stability of numerical
algorithms, chapter 12) would not do, since the curvature of an ill-conditioned Hessian drowns in float32 as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from bilevel.certificate import Certificate, Hypergradient
from bilevel.errors import BilevelError
from bilevel.operators import LinearOperator
from bilevel.solvers.base import Linearization, OuterGradient, Response, outer_gradient
from bilevel.solvers.linear import CG, LinearSolver
from bilevel.solvers.linear.base import FATAL, dtype_of
from bilevel.vector import Vector, axpy, cast, detach, norm, subtract

# Training in float32 that ends above this has more to mend than rounding.
TRAINED = 1e-3
NEWTON_STEPS = 20
SHORTEST = 1 / 64  # part of a Newton step; they are long where the curvature is small
# Products that Newton steps may take, over those of the attempt in float32. They took 0.1 to 0.8 times as many on ridge
# and logistic regression of condition 1e3 to 1e8, since a solve that waits for digits that float32 has not is dear.
BUDGET = 4
# The error wanted: the residual is made smaller in proportion, down to at most 1e-6 of what float32
# left, about 1e-12 of the inner gradient's scale.
WANTED, ENOUGH = 1e-5, 1e-6
TIGHTEST = 1e-8  # relative residual of one Newton step's conjugate gradients; damped steps need exact ones
SAME = 1e-3  # relative difference that float32 may make to a loss or a gradient, on the scale of each


Answer = tuple[Hypergradient, Any]  # with the estimator's state


class _OtherFunctionError(BilevelError, ArithmeticError):
    """The losses have other values in float64."""


@dataclass(frozen=True)
class Seen:
    """What float32 saw at the inner point: float64 must see the same, to three digits.

    Attributes:
        outer: the gradients of the outer loss.
        residual: the inner gradient.
        to_the_last_digit: the linear solver went as far as the precision lets it.
    """

    outer: OuterGradient
    residual: Vector
    to_the_last_digit: bool


def short_of_digits(certificate: Certificate, lower: Vector) -> bool:
    """Say whether float32 may be what keeps a hypergradient from being trusted."""
    inner = certificate.inner_residual
    return not certificate.trusted and dtype_of(lower) == torch.float32 and inner is not None and inner <= TRAINED


def in_float64(
    estimate: Callable[[Response, Vector, Vector, Any], Answer],
    pick: Callable[[LinearOperator], LinearSolver],
    response: Response,
    lower: Vector,
    upper: Vector,
    first: Answer,
    seen: Seen,
) -> Answer:
    """Take a hypergradient again in float64, after Newton steps there; return `first` where that is not to be trusted.

    Args:
        estimate: the estimator.
        pick: gives the linear solver of the Newton steps.
        response: the problem in float32.
        lower: w.
        upper: λ.
        first: the answer in float32; it comes back with one more reason where float64 cannot run.
        seen: what went into it.
    """
    try:
        wide, h = response.in_float64(), cast(upper, torch.float64)
        error = first[0].certificate.error
        enough = ENOUGH if not error else max(ENOUGH, min(0.1, WANTED / error))
        w = _polished(wide, cast(lower, torch.float64), h, pick, seen, enough)
        if w is None:
            return first
        # The adjoint is near; what float32 took for curvature may be rounding.
        warm = {**first[1], "value": cast(first[1]["value"], torch.float64), "steps": 0}
        again, state = estimate(wide, w, h, warm)
        response.factor = wide.factor
    except Exception as error:  # noqa: BLE001  the user's functions, written for float32, may fail in any way
        reason = _FAILED.format(type(error).__name__, str(error).partition("\n")[0])
        reasons = (*first[0].certificate.reasons, reason)
        return replace(first[0], certificate=replace(first[0].certificate, reasons=reasons)), first[1]
    if not again.certificate.trusted:
        return first
    certificate = replace(again.certificate, notes=(*again.certificate.notes, _DONE))
    gradient, params = (cast(v, torch.float32) for v in (again.gradient, again.params))
    return replace(again, gradient=gradient, params=params, certificate=certificate), state


_DONE = (
    "float32 was not enough for this condition, so the inner solution was polished and the hypergradient taken again "
    "in float64"
)
_FAILED = (
    "taking it again in float64 did not work ({}: {}); where float32 is the trouble, give params, hparams and data in "
    "float64"
)


def _polished(
    response: Response,
    lower: Vector,
    upper: Vector,
    pick: Callable[[LinearOperator], LinearSolver],
    seen: Seen,
    enough: float,
) -> Vector | None:
    """Return w with `enough` of its residual; None where H is not positive definite or it is too dear."""
    system = Linearization(response, lower, upper)
    _check_same(seen, outer_gradient(response, lower, upper), system.residual, response.start_gradient_norm(upper))
    first, limit = float(norm(system.residual)), (1 + BUDGET) * response.cost.products
    for _ in range(NEWTON_STEPS):
        if float(norm(system.residual)) <= enough * first:
            break
        solver = pick(system.operator)
        if isinstance(solver, CG):
            solver = replace(solver, rtol=enough / 3 if enough > ENOUGH else TIGHTEST)
        step = solver.solve(system.operator, system.residual)
        if step.status in FATAL or response.cost.products > limit:
            return None
        moved = _damped(response, lower, upper, step.value, float(norm(system.residual)))
        if moved is None:
            break
        lower, system = moved
    return lower


def _damped(
    response: Response, lower: Vector, upper: Vector, step: Vector, size: float
) -> tuple[Vector, Linearization] | None:
    """Go down a Newton step, or half of it and so on, until the residual falls; None where it does not."""
    length = 1.0
    while length >= SHORTEST:
        there = detach(axpy(-length, step, lower))
        system = Linearization(response, there, upper)
        if float(norm(system.residual)) <= (1.0 - length / 4) * size:  # the full step would end at zero, were R linear
            return there, system
        length /= 2
    return None


def _check_same(seen: Seen, outer: OuterGradient, residual: Vector, scale: float) -> None:
    """Raise unless the losses are the same functions as in float32: other random numbers would make others of them."""
    pairs = {
        "the gradient of the outer loss": (_distance(outer.lower, seen.outer.lower), float(norm(outer.lower))),
        "the gradient of the inner loss": (_distance(residual, seen.residual), scale),
    }
    for what, (difference, size) in pairs.items():
        if not difference <= SAME * size:
            raise _OtherFunctionError(f"{what} differs by {difference:.1e} of {size:.1e} from the one in float32")


def _distance(a: Vector, b: Vector) -> float:
    return float(norm(subtract(a, cast(b, torch.float64))))
