"""What `argmin`, `root` and `fixed_point` say about a derivative that cannot be trusted."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from bilevel.certificate import APPROXIMATE_BELOW, EXACT_BELOW, Certificate
from bilevel.errors import UntrustedHypergradientError, UntrustedHypergradientWarning
from bilevel.operators import LinearOperator
from bilevel.solvers.base import ratio
from bilevel.solvers.correction import SENSITIVITY
from bilevel.solvers.linear import LinearSolution
from bilevel.solvers.linear.base import EXPLANATIONS, FATAL
from bilevel.solvers.linear.lanczos import extreme_eigenvalues
from bilevel.vector import norm


@dataclass(frozen=True)
class Trust:
    """Where doubts go, and when there are some.

    Args:
        caller: the public function in messages, "argmin".
        equation: what is zero at the solution, in words.
        on_untrusted: "warn", "raise" or "ignore".
    """

    caller: str
    equation: str
    on_untrusted: str

    far: float = EXACT_BELOW / SENSITIVITY
    """Relative distance to the solution above which a derivative may err by more than "exact" allows."""

    def curvature(self, operator: LinearOperator, solution: LinearSolution) -> float:
        """Return the smallest curvature that a solve with a Hessian met, looked for where the solver did not look."""
        return extreme_eigenvalues(operator)[0] if solution.curvature is None else solution.curvature

    def linear(self, solution: LinearSolution, curvature: float | None, by_design: bool, size: float) -> None:
        """Look at the solution of a linear system with a right-hand side of norm `size`."""
        singular = solution.status == "singular"
        if curvature is None and singular:
            self.doubt(f"the Jacobian of {self.equation} is singular at the solution; start elsewhere", solution)
            return
        if solution.status in FATAL or (curvature is not None and not curvature > 0.0):
            self.doubt(EXPLANATIONS.get(solution.status) or EXPLANATIONS["nonpositive curvature"], solution)
            return
        error = solution.relative
        if solution.status != "converged" and curvature is not None:
            error *= ratio(size, curvature * float(norm(solution.value)))
        if not error < (APPROXIMATE_BELOW if by_design else EXACT_BELOW):
            cure = EXPLANATIONS[solution.status] or "give the linear solver a smaller `rtol`"
            self.doubt(f"the linear system was solved to a relative error of {error:.1e} only: {cure}", solution)

    def solution(self, step: float, size: float, left: float) -> None:
        """Look at the length of a Newton step from a solution of this size, where R is `left`."""
        moved = ratio(step, size)
        if not moved <= self.far:
            self.doubt(
                f"the solution is {moved:.1e} of its size away from where {self.equation} is zero (its norm is "
                f"{left:.1e}): let `solver` go further (more `steps`, a smaller `rtol`) or start nearer"
            )

    def doubt(self, reason: str, solution: LinearSolution | None = None) -> None:
        """Warn or raise, as asked."""
        if self.on_untrusted == "ignore":
            return
        message = f"the derivative of bilevel.{self.caller} is untrusted: {reason}"
        if self.on_untrusted == "raise":
            relative = None if solution is None else solution.relative
            raise UntrustedHypergradientError(
                message, Certificate("untrusted", adjoint_residual=relative, reasons=(reason,))
            )
        warnings.warn(message, UntrustedHypergradientWarning, stacklevel=2)
