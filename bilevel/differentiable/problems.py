"""The user's function with its arguments, as inner solvers and the implicit function theorem see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack, _pop_mode_temporarily

from bilevel.differentiable.arguments import Arguments
from bilevel.errors import InvalidTypeError, noting
from bilevel.hyperparameters import real
from bilevel.inner import LBFGS, Custom, InnerSolver
from bilevel.problem import BilevelProblem, refuse_linear
from bilevel.response import ProblemResponse
from bilevel.solvers.linear.base import dtype_of
from bilevel.vector import Vector, subtract
from bilevel.widening import InFloat64

# Derivatives of derivatives amplify what the solver leaves, so by default it goes to the end of the digits.
RTOL = {torch.float64: 1e-12, torch.float32: 1e-6}


class LossResponse(ProblemResponse):
    """`loss(params, *args)` as the inner problem of a bilevel one, whose `hparams` are the arguments."""

    kind = BilevelProblem

    def __init__(
        self, loss: Callable[..., Tensor], params: Any, arguments: Arguments, solver: Any = None, name: str = "loss"
    ) -> None:
        def inner_loss(w: Any, args: Any) -> Tensor:
            with noting(name, "params, *args"):
                return loss(w, *args)

        refuse_linear(solver, "solver")
        function = solver

        def fit(w: Any, args: Any) -> Any:
            with noting("solver", "params, *args"):
                return function(w, *args)

        if solver is not None and not hasattr(solver, "solve"):
            if not callable(solver):
                raise InvalidTypeError(
                    f"`solver` is a {type(solver).__name__}, expected None, a solver of bilevel.inner "
                    "(inner.SGD(lr=0.1, steps=100)), or a function (params, *args) -> params"
                )
            solver = Custom(fit, name="solver")
        # real(0.0) stands in for the arguments, which are of all kinds: `_hparams` lends those in its place.
        problem = self.kind(inner_loss, inner_loss, params, real(0.0), solver)
        problem.inner_name = name
        exact = LBFGS(RTOL.get(dtype_of(problem.params.start))) if solver is None else None
        super().__init__(problem, inner_solver=exact)
        self.name = name
        self._hparams = arguments

    @contextmanager
    def session(self, derivatives: int = 2) -> Iterator[None]:
        """Solve and differentiate in here.

        Inside of another level that is run in float64, solvers leave torch for NumPy, which that mode refuses; and a
        backward pass runs outside of it. So it is lifted here, and put around every call of the user's function.
        """
        modes: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        lifted: AbstractContextManager[Any] = nullcontext()
        if modes and isinstance(modes[-1], InFloat64):
            self._precision, lifted = InFloat64, _pop_mode_temporarily()
        with super().session(derivatives), lifted:
            yield

    @property
    def solver(self) -> InnerSolver:
        """The inner solver in use."""
        return self._solver


class Started(BilevelProblem):
    """A problem whose variables are called `start`, as in `root` and `fixed_point`."""

    params_name = "start"


class ResidualResponse(LossResponse):
    """R(x, *args) for a user's function: a residual, or a map whose fixed point is wanted (then R = x - map)."""

    kind = Started

    def __init__(self, function: Callable[..., Any], start: Any, arguments: Arguments, name: str) -> None:
        super().__init__(function, start, arguments, name=name)
        self._function = function

    def residual(self, lower: Vector, upper: Vector) -> Vector:
        """See `RootCondition.residual`."""
        with (
            torch.enable_grad(),
            self._lent(lower, upper, keep_buffers=False) as (x, args),
            self._randomness(pinned=True),
        ):
            with noting(self.name, "x, *args"):
                found = self._function(x, *args)
            returned = self.params.read(found, f"what `{self.name}` returned")
            self.cost.gradients += 1
            if self.name == "map":
                return subtract(lower, returned)
        attached = any(t.requires_grad for t in lower.values())
        if attached and not any(t.requires_grad for t in returned.values()):
            raise InvalidTypeError(
                f"`{self.name}` returned tensors that do not depend on its first argument; do not detach it, and use "
                "the one that the function is called with"
            )
        return returned
