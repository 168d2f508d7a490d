"""The implicit function theorem with a linear solver.

    dF/dλ = ∂f/∂λ - (∂R/∂λ)^T v      with  H v = ∂f/∂w,  H = ∂R/∂w at the inner solution

Pedregosa, Hyperparameter optimization with approximate gradient, ICML 2016, equation 2 and algorithm 1;
Lorraine, Vicol and Duvenaud, AISTATS 2020, equation 3. Any optimizer may have found the inner solution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch

from bilevel.certificate import Certificate, Hypergradient, judge
from bilevel.errors import InvalidTypeError
from bilevel.operators import LinearOperator
from bilevel.solvers.about import UNDECLARED, About, Terms
from bilevel.solvers.base import (
    Linearization,
    OuterGradient,
    Response,
    State,
    System,
    add_terms,
    inner_scale,
    linearization,
    negative,
    outer_gradient,
    ratio,
)
from bilevel.solvers.clear import clearly_small
from bilevel.solvers.correction import INNER_TOLERANCE, Correction, Equation, correct, factored, loosely, preconditioned
from bilevel.solvers.linear import CG, GMRES, MINRES, Cholesky, LinearSolution, LinearSolver
from bilevel.solvers.linear.base import EXPLANATIONS, FATAL, dtype_of, linear_solver_meant
from bilevel.solvers.linear.lanczos import extreme_eigenvalues
from bilevel.solvers.refined import Seen, in_float64, short_of_digits
from bilevel.vector import Vector, cast, dot, norm, subtract

# Up to about here a dense Hessian costs no more than conjugate gradients to 1e-8 did on softmax regression of condition
# 1e2 to 1e4, and it is indifferent to the condition and to negative curvature (docs/design.md, "Direct or CG").
DENSE_UP_TO = 64
# A factor of so many unknowns takes 32 MB, and some tenths of a second. It costs as many products as it has rows, which
# taken together cost half of what they do one by one, or less (`bilevel.batching.dense_share`).
FACTOR_UP_TO, SHARE = 2048, 0.5
# Inner gradient relative to its scale: hypergradients that far apart may agree by chance. One of 2,000 scalar ones did.
UNTRAINED = 0.1
UNSOLVED = 0.5  # part of the right-hand side that an approximate inverse may leave: curvatures it misses lie there
NEAR_ROUNDING = 30.0  # units in the last place of the largest curvature, below which one may as well be zero

_PICKED = Terms(
    f"as `direct` up to {DENSE_UP_TO} inner variables, as `cg` above", "the same", "the same", "Pedregosa 2016"
)


@dataclass(frozen=True)
class Implicit:
    """Differentiate through the inner optimum by the implicit function theorem.

    Exact at an exact inner solution; the error is about (inner residual + adjoint residual) times the condition
    number of the inner Hessian. Costs no memory per inner step. Does not see learning rates. Where float32 has too few
    digits for the condition, all is done once more in float64.

    Args:
        linear_solver: `bilevel.CG()`, `bilevel.Cholesky()`, `bilevel.Neumann()` or any
            `LinearSolver`; None: Cholesky up to 64 inner variables, above CG, which up to 2,048 gives way to
            Cholesky once it has cost as much.
    """

    linear_solver: LinearSolver | None = None

    def __post_init__(self) -> None:
        given = self.linear_solver
        if isinstance(given, type):
            raise InvalidTypeError(f"`linear_solver` is the class {given.__name__}; write bilevel.{given.__name__}()")
        if given is not None and not hasattr(given, "solve"):
            raise InvalidTypeError(
                f"`linear_solver` is {given!r}, expected an object with a solve method, such as "
                f"{linear_solver_meant(given)}"
            )

    @property
    def about(self) -> About:
        """The linear solver's cost and error, and one product to pull the adjoint back."""
        solver = self.linear_solver
        terms = _PICKED if solver is None else getattr(solver, "terms", UNDECLARED.terms)
        exact = not getattr(solver, "truncates", False)
        return About("solution", "losses", derivatives=2, exact=exact, terms=terms, takes_slack=exact)

    def __call__(
        self, response: Response, lower: Vector, upper: Vector, state: State = None
    ) -> tuple[Hypergradient, State]:
        """Return the hypergradient at the inner solution `lower`; `state` is the last `Adjoint`."""
        found, adjoint, seen = differentiate(response, lower, upper, state, self.linear_solver)
        if response.slack > 1.0 or not seen.to_the_last_digit or not short_of_digits(found.certificate, lower):
            return found, adjoint
        again, wide = in_float64(self, default_solver, response, lower, upper, (found, adjoint), seen)
        return again, {**wide, "value": cast(wide["value"], torch.float32)}


_TURNED = "{} met nonpositive curvature; MINRES solved the same system"
_UNSEEN = (
    "neither loss uses it at the inner solution (or it was detached: .detach(), .item(), float()), and an "
    "implicit method sees nothing else. If the inner solver uses it "
    '(a learning rate, a schedule), choose method="unroll"; otherwise take it out of `hparams`'
)


class Adjoint(TypedDict):
    """What the next hypergradient starts from.

    Attributes:
        value: the adjoint.
        curvature: the smallest that was measured.
        steps: those of the solve that saw it.
        spent: all since the Hessian was last factored.
        share: what the dense Hessian costs beside so many products as it has rows; at most `SHARE`.
        kept: what the linear solver wants to have again.
    """

    value: Vector
    curvature: float
    steps: int
    spent: int
    share: float
    kept: Any


Linearize = Callable[[Response, Vector, Vector], System]


def differentiate(
    response: Response,
    lower: Vector,
    upper: Vector,
    state: Adjoint | None,
    linear_solver: LinearSolver | None,
    linearize: Linearize = linearization,
    advice: str = "",
) -> tuple[Hypergradient, Adjoint, Seen]:
    """Return the hypergradient in the precision of `lower`, the adjoint, and what both came from.

    Args:
        response: the problem.
        lower: the inner solution.
        upper: the hyperparameters.
        state: what the last call left, to start from; None: nothing.
        linear_solver: None: by size.
        linearize: what makes products with second derivatives.
        advice: what to do about a large error of the adjoint; "": as the linear solver's status says.
    """
    outer = outer_gradient(response, lower, upper)
    system = linearize(response, lower, upper)
    warm, kept, share, spent = None, None, SHARE, response.cost.gradients  # of training; a factor would have helped
    if state is not None:
        warm, kept, spent, share = state["value"], state["kept"], state["spent"], state["share"]
    operator = replace(system.operator, kept=kept, slack=response.slack, pairs=response.pairs)
    if linear_solver is None and state is None and isinstance(system, Linearization) and _may_be_dense(operator):
        share = min(SHARE, system.dense_share())
    solver = linear_solver or default_solver(operator, spent, share)
    limit = math.ceil(share * operator.size) - spent if linear_solver is None and _may_be_dense(operator) else None
    solution, turned = solve_safely(solver, operator, outer.lower, warm, limit)
    if limit is not None and solution.status == "max_steps":
        solver, solution = Cholesky(), Cholesky().solve(operator, outer.lower)
    if isinstance(solver, Cholesky):
        response.factor, spent = solution.factor, -solution.steps
    notes = solution.notes + (_TURNED.format(type(solver).__name__),) * turned
    through = negative(system.pull_back(solution.value))
    gradient = add_terms(response, outer.upper, through, upper, _UNSEEN)
    adjoint = _adjoint(system.operator, solution, state, spent + solution.steps, share)
    scale, curvature = inner_scale(response, system, lower, upper), adjoint["curvature"]
    correction = clearly_small(response, outer, system, solution, curvature, lower, upper, gradient) or _correct(
        response, outer, system, solution, curvature, scale, lower, upper, gradient, linearize
    )
    certificate = _certify(
        system, solution, curvature, scale, correction, solver.truncates, advice, response.stochastic
    )
    if certificate.verdict == "approximate" and _drowned(system.operator, outer.lower, curvature):
        certificate = replace(certificate, verdict="untrusted", reasons=(_DROWNED.format(curvature),))
    value = -float(dot(solution.value, system.residual))  # f(w*) = f(w) - v·R(w) to first order
    found = Hypergradient(gradient, outer.loss, lower, replace(certificate, notes=notes), response.cost, value)
    cut_short = solution.status == "max_steps" and getattr(solver, "max_steps", None) is not None
    return found, adjoint, Seen(outer, system.residual, not solver.truncates and not cut_short)


_ON_ONE_BATCH = '; on one minibatch it does not vanish however long: give larger batches, or method="unroll" or "soba"'
_DROWNED = (
    "the smallest curvature met, {:.1e}, is not far above what float32 rounds off the largest, and the estimated error "
    "rests on it; use float64, or more regularization in the inner loss"
)


def _drowned(operator: LinearOperator, rhs: Vector, curvature: float) -> bool:
    """Say whether the smallest curvature is near the rounding of float32 products; in float64 none is taken for it."""
    if dtype_of(rhs) == torch.float64:
        return False
    once = operator(rhs)
    largest = ratio(float(norm(operator(once))), float(norm(once)))  # from below, and mostly by little
    return curvature < NEAR_ROUNDING * torch.finfo(dtype_of(rhs)).eps * largest


def default_solver(operator: LinearOperator, spent: int = 0, share: float = SHARE) -> LinearSolver:
    """Return what `linear_solver=None` stands for, where iterative solves took `spent` steps since the last dense one.

    Those may cost as much as a factor does before it is made: at most twice what is best, whatever comes.
    """
    n = operator.size
    if n <= DENSE_UP_TO or (operator.symmetric and n <= FACTOR_UP_TO and spent >= share * n):
        return Cholesky()
    return CG() if operator.symmetric else GMRES()


def _may_be_dense(operator: LinearOperator) -> bool:
    """Say whether a solve may turn to the dense Hessian; that of a family would be mostly zeros."""
    return DENSE_UP_TO < operator.size <= FACTOR_UP_TO and operator.symmetric and operator.members is None


def solve_safely(
    solver: LinearSolver, operator: LinearOperator, rhs: Vector, start: Vector | None = None, limit: int | None = None
) -> tuple[LinearSolution, bool]:
    """Solve, CG in at most `limit` steps; and by MINRES, where curvature is nonpositive. Return whether that was so."""
    limited = solver if limit is None or not isinstance(solver, CG) else replace(solver, max_steps=limit)
    solution = limited.solve(operator, rhs, start=start)
    if solution.status != "nonpositive curvature" or isinstance(solver, (Cholesky, MINRES)):
        return solution, False
    minres = MINRES(getattr(solver, "rtol", None), getattr(solver, "max_steps", None))
    return replace(minres.solve(operator, rhs), status=solution.status), True


def _adjoint(
    operator: LinearOperator, solution: LinearSolution, warm: Adjoint | None, spent: int, share: float
) -> Adjoint:
    """Keep the smallest curvature from the solve that saw most of the operator.

    A warm start needs few steps and so sees little of the curvature, or none.
    """
    seen = solution.curvature
    if warm is not None and (seen is None or solution.steps < warm["steps"]):
        return Adjoint(
            value=solution.value,
            curvature=warm["curvature"] if seen is None else min(seen, warm["curvature"]),
            steps=warm["steps"],
            spent=spent,
            share=share,
            kept=solution.kept,
        )
    if seen is None:
        seen, _ = extreme_eigenvalues(operator)
    return Adjoint(
        value=solution.value, curvature=seen, steps=solution.steps, spent=spent, share=share, kept=solution.kept
    )


def equation(outer: OuterGradient, system: System, scale: float) -> Equation:
    """Return H v = ∂f/∂w."""
    return Equation(
        outer,
        system.residual,
        scale,
        lambda v: subtract(outer.lower, system.operator(v)),
        lambda v: negative(system.pull_back(v)),
    )


def _correct(
    response: Response,
    outer: OuterGradient,
    system: System,
    solution: LinearSolution,
    curvature: float,
    scale: float,
    lower: Vector,
    upper: Vector,
    gradient: Vector,
    linearize: Linearize,
) -> Correction | None:
    """Estimate the error by one correction (see `bilevel.solvers.correction`)."""
    if not curvature > 0.0:
        return None
    solve = loosely(system.operator, curvature, solution.steps)
    if solution.inverse is not None:
        solve = factored(solution.inverse, curvature)
    elif system.operator.factor is not None:
        solve = preconditioned(system.operator, system.operator.factor)
    here = replace(equation(outer, system, scale), defect=lambda v: solution.residual)

    def there(w: Vector) -> Equation:
        return equation(outer_gradient(response, w, upper), linearize(response, w, upper), scale)

    return correct(lower, upper, gradient, solution.value, here, there, response, solve)


_UNTRAINED = (
    "the inner gradient is {:.1e} of what it was at the start, too far from an inner solution for any estimate: train "
    'the inner problem further, or differentiate the loop itself (method="unroll")'
)


def _certify(
    system: System,
    solution: LinearSolution,
    curvature: float,
    scale: float,
    correction: Correction | None,
    by_design: bool,
    advice: str,
    stochastic: bool,
) -> Certificate:
    """Judge by the estimated error, and what the products themselves are uncertain by."""
    inner = ratio(float(norm(system.residual)), scale)
    wrong = []
    if solution.status in FATAL or not (curvature > 0.0 or solution.relative == 0.0):
        wrong.append(EXPLANATIONS.get(solution.status) or EXPLANATIONS["nonpositive curvature"])
    if inner > UNTRAINED:
        wrong.append(_UNTRAINED.format(inner) + _ON_ONE_BATCH * stochastic)
    advice = advice or (
        "a smaller `rtol` or more `max_steps` of the linear solver); "
        f"{EXPLANATIONS[solution.status] or 'the linear solver converged'}"
    )
    hint = (
        f"the inner residual is {inner:.1e} (train the inner problem further: more `steps` or a smaller `rtol` of the "
        f"inner solver{_ON_ONE_BATCH * stochastic}) and the adjoint residual is {solution.relative:.1e} ({advice}"
    )
    error = None if correction is None else correction.error + system.noise
    near = correction is not None and correction.moved < INNER_TOLERANCE and solution.relative <= UNSOLVED
    verdict, reasons = judge(error, wrong, by_design=by_design and near, hint=hint)
    return Certificate(verdict, inner, solution.relative, curvature, error, tuple(reasons))
