"""The implicit function theorem with a linear solver.

    dF/dλ = ∂f/∂λ - (∂R/∂λ)^T v      with  H v = ∂f/∂w,  H = ∂R/∂w at the inner solution

Pedregosa, Hyperparameter optimization with approximate gradient, ICML 2016, equation 2 and algorithm 1;
Lorraine, Vicol and Duvenaud, AISTATS 2020, equation 3. Only stationarity of the inner solution matters, not
the optimizer that found it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bilevel.certificate import Certificate, Hypergradient, judge
from bilevel.errors import InvalidTypeError
from bilevel.solvers.base import (
    Linearization,
    Response,
    State,
    add_terms,
    inner_scale,
    negative,
    outer_gradient,
    present,
    ratio,
)
from bilevel.solvers.linear.base import EXPLANATIONS, LinearSolution, LinearSolver
from bilevel.solvers.linear.cg import CG
from bilevel.solvers.linear.cholesky import Cholesky
from bilevel.vector import Vector, norm, size

# Up to about here a dense Hessian costs no more than conjugate gradients to 1e-8 did on softmax regression of condition
# 1e2 to 1e4, and it is indifferent to the condition and to negative curvature (docs/design.md, "Direct or CG").
DENSE_UP_TO = 128


@dataclass(frozen=True)
class Implicit:
    """Differentiate through the inner optimum by the implicit function theorem.

    Exact at an exact inner solution; the error is about (inner residual + adjoint residual) times the condition
    number of the inner Hessian. Costs no memory per inner step. Does not see learning rates.

    Args:
        linear_solver: `bilevel.CG()`, `bilevel.Cholesky()`, `bilevel.Neumann()` or any
            `LinearSolver`; None: Cholesky up to 128 inner variables, CG above.
    """

    linear_solver: LinearSolver | None = None
    unrolls: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.linear_solver is not None and not hasattr(self.linear_solver, "solve"):
            raise InvalidTypeError(
                f"`linear_solver` is {self.linear_solver!r}, expected an object with a solve method, "
                "for example bilevel.CG(rtol=1e-6)"
            )

    def __call__(
        self, response: Response, lower: Vector, upper: Vector, state: State = None
    ) -> tuple[Hypergradient, State]:
        """Return the hypergradient at the inner solution `lower`; `state` is the last adjoint."""
        outer = outer_gradient(response, lower, upper)
        system = Linearization(response, lower, upper)
        solver = self.linear_solver or (Cholesky() if size(lower) <= DENSE_UP_TO else CG())
        solution = solver.solve(system.operator, outer.lower, start=state)
        through = negative(system.pull_back(solution.value))
        gradient = add_terms(response, outer.upper, through, upper, _UNSEEN)
        certificate = _certificate(response, system, solution, lower, upper, gradient, solver.truncates)
        return Hypergradient(gradient, outer.loss, lower, certificate, response.cost), solution.value


_UNSEEN = (
    "neither loss uses it at the inner solution, and an implicit method sees nothing else. If the inner solver uses it "
    '(a learning rate, a schedule), choose method="unroll"; otherwise take it out of `hparams`'
)


def _certificate(
    response: Response,
    system: Linearization,
    solution: LinearSolution,
    lower: Vector,
    upper: Vector,
    gradient: Vector,
    by_design: bool,
) -> Certificate:
    """Estimate the error from the two residuals and the smallest curvature, and judge.

    adjoint part: |B^T r_adjoint| / μ over |dF/dλ|, B = dR/dλ, μ = smallest curvature
    inner part:   |R| / μ over |w|, the distance to the inner solution
    """
    inner_norm = float(norm(system.residual))
    inner = ratio(inner_norm, inner_scale(response, system, lower, upper))
    curvature = solution.curvature
    error: float | None = None
    if curvature is not None and curvature > 0.0:
        size_of_gradient = max(float(norm(gradient)), response.gradient_floor)
        left_over = float(norm(present(system.pull_back(solution.residual)))) if solution.relative > 0.0 else 0.0
        error = ratio(left_over / curvature, size_of_gradient) + ratio(inner_norm / curvature, float(norm(lower)))
    elif not any(bool(t.any()) for t in solution.value.values()):
        error = 0.0 if inner_norm == 0.0 else None  # the outer loss does not ask for the inner variables here
    expected = ("converged", "max_steps") if by_design else ("converged",)
    serious = solution.status in ("nonpositive curvature", "singular", "diverged")
    small = error is not None and error < 1e-3
    wrong = [] if solution.status in expected or (small and not serious) else [EXPLANATIONS[solution.status]]
    hint = (
        f"the inner residual is {inner:.1e} (train the inner problem further: more `steps` or a smaller `rtol` of the "
        f"inner solver) and the adjoint residual is {solution.relative:.1e} (a smaller `rtol` of the linear solver)"
    )
    inner_is_loose = (
        by_design and error is not None and ratio(inner_norm / (curvature or 1.0), float(norm(lower))) > 0.1
    )
    verdict, reasons = judge(error, wrong, by_design=by_design and not inner_is_loose, hint=hint)
    return Certificate(verdict, inner, solution.relative, curvature, error, tuple(reasons))
