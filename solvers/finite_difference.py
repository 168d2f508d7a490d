"""First-order implicit differentiation: differences of gradients in place of second derivatives.

    dF/dλ ≈ ∂f/∂λ - (∂R/∂λ)^T v,   v = α ∂f/∂w      the identity, scaled by a step length, for the inverse Hessian
    (∂R/∂λ)^T v ≈ (∇_λ g(w + h v) - ∇_λ g(w - h v)) / 2h

Luketina, Berglund, Greff and Raiko, Scalable gradient-based tuning of continuous regularization hyperparameters
(T1-T2), ICML 2016, equation 4; Liu, Simonyan and Yang, DARTS: Differentiable architecture search, ICLR 2019, equations
7 and 8.
Deliberate difference: the step h checks itself (see `bilevel.solvers.differences`), and the error of the identity is
estimated, by the correction of `bilevel.solvers.correction` with products from differences.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from bilevel.certificate import Hypergradient
from bilevel.errors import InvalidTypeError, InvalidValueError
from bilevel.solvers.about import About, Terms
from bilevel.solvers.base import Response, State
from bilevel.solvers.differences import Differences
from bilevel.solvers.implicit import differentiate
from bilevel.solvers.linear import LinearSolver, Neumann
from bilevel.solvers.linear.base import linear_solver_meant
from bilevel.vector import Vector

_IDENTITY = Terms("4 gradients, and about 50 for the certificate", "nothing", "‖I - αH‖", "Liu et al. 2019")


@dataclass(frozen=True)
class FiniteDifference:
    """Differentiate through the inner optimum with first derivatives only.

    For losses that autograd cannot differentiate twice. As it comes (T1-T2, DARTS) the inverse Hessian is the identity
    times a step length, which is cheap and far off where the curvatures of the inner loss differ; with a linear solver
    it is as exact as the differences, about 1e-8 in float64.

    Args:
        linear_solver: `bilevel.CG(rtol=1e-6)` (two gradients a product, √condition products),
            `bilevel.Neumann(max_steps=k)`; None: the identity.
        step_size: α of the identity; larger trusts the inner variables' response more. None: the learning rate of
            `inner.SGD` where that is one number, else 1 / (largest curvature), measured by 12 products.
        step: distance by which the inner variables are moved for a difference; None: found and checked.

    >>> import torch, bilevel
    >>> problem = bilevel.BilevelProblem(
    ...     lambda w, h: (w - h) ** 2, lambda w, h: w**2,
    ...     params=torch.zeros((), dtype=torch.float64), hparams=torch.tensor(3.0, dtype=torch.float64))
    >>> round(bilevel.hypergradient(problem, bilevel.FiniteDifference()).gradient.item(), 6)  # w*(h) = h: dF/dh = 2 h
    6.0
    """

    linear_solver: LinearSolver | None = None
    step_size: float | None = None
    step: float | None = None

    def __post_init__(self) -> None:
        given = self.linear_solver
        if given is not None and (isinstance(given, type) or not hasattr(given, "solve")):
            raise InvalidTypeError(
                f"`linear_solver` is {given!r}, expected an object with a solve method, such as "
                f"{linear_solver_meant(given)}"
            )
        check_step("step_size", self.step_size)
        check_step("step", self.step)
        if given is not None and self.step_size is not None:
            raise InvalidValueError(
                "`step_size` scales the identity, and `linear_solver` takes its place; leave one out"
            )

    @property
    def about(self) -> About:
        """The identity, or the linear solver with two gradients a product."""
        solver = self.linear_solver
        if solver is None:
            return About("solution", "losses", derivatives=1, exact=False, terms=_IDENTITY)
        cost = f"that of {type(solver).__name__}, a product is 2 gradients"
        exact = not getattr(solver, "truncates", False)
        error = f"that of {type(solver).__name__}, and 1e-8"
        return About("solution", "losses", 1, exact, Terms(cost, "nothing", error, "Liu et al. 2019"))

    def __call__(
        self, response: Response, lower: Vector, upper: Vector, state: State = None
    ) -> tuple[Hypergradient, State]:
        """Return the hypergradient at the inner solution `lower`; `state` is the last adjoint of a linear solver."""
        linearize = partial(Differences, step=self.step)
        if self.linear_solver is not None:
            found, adjoint, _ = differentiate(response, lower, upper, state, self.linear_solver, linearize)
            return found, adjoint
        # The first term of the series, from zero.
        identity = Neumann(max_steps=1, step_size=self.step_size or response.step_size)
        found, _, _ = differentiate(response, lower, upper, None, identity, linearize, _ADVICE)
        return found, None


_ADVICE = "the inverse Hessian is taken for the identity; write bilevel.FiniteDifference(bilevel.CG(rtol=1e-6)))"


def check_step(name: str, value: float | None) -> None:
    """Raise unless it is a number above 0, or None."""
    if value is not None and not (isinstance(value, (int, float)) and value > 0.0):
        raise InvalidValueError(f"`{name}` is {value!r}, expected a number above 0, or None")
