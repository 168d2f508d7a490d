"""The identity for the inverse Hessian, adapted to the inner optimizer.

    dF/dλ ≈ ∂f/∂λ - (∂R/∂λ)^T v,   v = D ∂f/∂w,   D = -∂w_{t+1} / ∂g_t, which is diagonal
    (∂R/∂λ)^T v by a central difference of ∇_λ g

Choe, Mehta, Ahn, Neiswanger, Xie, Strubell and Xing, Making scalable meta learning practical (SAMA), NeurIPS 2023,
equations 3 to 5. D is how far the optimizer's next step would move with the gradient: the learning rate for SGD, about
lr (1 - β1) / sqrt(second moment) for Adam. Deliberate differences: D is taken by autograd through the optimizer's own
update, with the state that training ended with; and the difference's step checks itself, where the paper takes 1 / |v|
times a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from bilevel.certificate import Hypergradient
from bilevel.operators import LinearOperator
from bilevel.solvers.about import About, Terms
from bilevel.solvers.base import Response, State
from bilevel.solvers.differences import Differences, inner_gradient
from bilevel.solvers.finite_difference import FiniteDifference, check_step
from bilevel.solvers.implicit import differentiate
from bilevel.solvers.linear.base import LinearSolution, finished, wide
from bilevel.vector import Vector


@dataclass(frozen=True)
class SAMA:
    """Differentiate through the inner optimum with first derivatives, scaled as the inner optimizer scales its steps.

    For long minibatch training with Adam: one difference of gradients and no linear solve. Without an inner optimizer's
    state (L-BFGS, a loop of your own, or `params` given to `hypergradient`) it is `FiniteDifference()`.

    Args:
        step: distance by which the inner variables are moved for the difference; None: found and checked.
    """

    step: float | None = None
    about: ClassVar[About] = About(
        begins="solution",
        sees="losses",
        derivatives=1,
        exact=False,
        terms=Terms("5 gradients, and about 50 for the certificate", "nothing", "‖I - D H‖", "Choe et al. 2023"),
    )

    def __post_init__(self) -> None:
        check_step("step", self.step)

    def __call__(
        self, response: Response, lower: Vector, upper: Vector, state: State = None
    ) -> tuple[Hypergradient, State]:
        """Return the hypergradient at the inner solution `lower`; nothing is kept between calls."""
        if response.sensitivity is None:
            return FiniteDifference(step=self.step)(response, lower, upper)
        scaling = response.sensitivity(lower, inner_gradient(response, lower, upper).lower)
        found, _, _ = differentiate(
            response, lower, upper, None, _Diagonal(scaling), partial(Differences, step=self.step), _ADVICE
        )
        return found, None


@dataclass(frozen=True)
class _Diagonal:
    """The solver that takes D for the inverse."""

    scaling: Vector
    truncates: ClassVar[bool] = True

    def solve(self, operator: LinearOperator, rhs: Vector, start: Vector | None = None) -> LinearSolution:
        """Return D b."""
        value = {name: self.scaling[name] * t for name, t in rhs.items()}
        return finished(operator, rhs, wide(value), "max_steps", 1, None)


_ADVICE = (
    "the inverse Hessian is taken for the optimizer's scaling; write bilevel.FiniteDifference(bilevel.CG(rtol=1e-6)))"
)
