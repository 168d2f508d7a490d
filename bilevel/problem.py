"""The bilevel problem, and its view for one hypergradient.

min over λ  f(w*(λ), λ)   with   w*(λ) ∈ argmin_w g(w, λ)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from bilevel.certificate import Cost
from bilevel.data import Batches
from bilevel.errors import InvalidTypeError, InvalidValueError
from bilevel.hyperparameters import Hyperparameters
from bilevel.inner import LBFGS, Custom, InnerSolution, InnerSolver
from bilevel.variables import Variables, variables
from bilevel.vector import Vector, detach, leaves, norm


class BilevelProblem:
    """An inner training problem, and an outer objective at its solution.

    Args:
        inner_loss: `(params, hparams) -> scalar`, the training loss; `(params, hparams, batch)` when `inner_data` is
            given. Gets `params` and `hparams` in the structure given here.
        outer_loss: the validation loss; the same, with `outer_data`.
        params: where the inner variables start: a Tensor, a nested dict/list/tuple of Tensors, or an `nn.Module` (its
            parameters that require a gradient).
        hparams: the hyperparameters: a Tensor, a nested structure of Tensors and typed hyperparameters
            (`bilevel.positive`, `interval`, `simplex`, `real`), or an `nn.Module`. One dtype and device with `params`.
        inner_solver: None for L-BFGS; one of `bilevel.inner`; or the user's own loop `fit(params, hparams) -> params`
            (`fit(params, hparams, data)` when `inner_data` is given).
        inner_data: None, one batch (any structure of Tensors), a Dataset (read whole), or a DataLoader or another
            iterable of batches (minibatches).
        outer_data: the same for the outer loss.

    Raises:
        BilevelError: for anything that can be seen without training; the message names the argument.

    >>> import torch, bilevel
    >>> problem = bilevel.BilevelProblem(
    ...     inner_loss=lambda w, h: ((w - 1) ** 2 + h * w**2).sum(),
    ...     outer_loss=lambda w, h: ((w - 0.5) ** 2).sum(),
    ...     params=torch.zeros(1, dtype=torch.float64),
    ...     hparams=bilevel.positive(0.5),
    ... )
    >>> round(bilevel.solve(problem).hparams.item(), 6)  # w*(h) = 1 / (1 + h), best where it is 0.5
    1.0
    """

    def __init__(
        self,
        inner_loss: Callable[..., Tensor],
        outer_loss: Callable[..., Tensor],
        params: Any,
        hparams: Any,
        inner_solver: InnerSolver | Callable[..., Any] | None = None,
        inner_data: Any = None,
        outer_data: Any = None,
    ) -> None:
        self.params: Variables = variables(params, "params")
        first = next(iter(self.params.start.values()))
        self.hparams = Hyperparameters(hparams, like=first)
        _check_together(self.hparams.layout, first)
        self.inner_data, self.outer_data = inner_data, outer_data
        self.inner_batches = Batches(inner_data, "inner_data", first.device)
        self.outer_batches = Batches(outer_data, "outer_data", first.device)
        _check_loss(inner_loss, "inner_loss", self.inner_batches.given)
        _check_loss(outer_loss, "outer_loss", self.outer_batches.given)
        self.inner_loss, self.outer_loss = inner_loss, outer_loss
        self.inner_solver = _as_solver(inner_solver)

    @property
    def deterministic(self) -> bool:
        """Both losses see the same batch at every call."""
        return self.inner_batches.deterministic and self.outer_batches.deterministic

    def position(self) -> dict[str, Any]:
        """Return where the streams of batches are."""
        return {"inner": self.inner_batches.position(), "outer": self.outer_batches.position()}

    def go_to(self, position: dict[str, Any]) -> None:
        """Bring the streams of batches to a position that `position` returned."""
        self.inner_batches.go_to(position["inner"])
        self.outer_batches.go_to(position["outer"])

    def __repr__(self) -> str:
        inner = sum(t.numel() for t in self.params.start.values())
        outer = sum(t.numel() for t in self.hparams.layout.start.values())
        return (
            f"BilevelProblem({inner} inner variables in {len(self.params.start)} tensors, {outer} hyperparameters in "
            f"{len(self.hparams.layout.start)}, inner_solver={self.inner_solver!r})"
        )


class ProblemResponse:
    """One problem for one hypergradient: its losses with the batches drawn once, and its costs.

    Implements `bilevel.solvers.Response` for estimators and `bilevel.inner.Task` for inner solvers.

    Attributes:
        cost: gradients and products spent so far.
        inner_loss: the inner loss where it was last differentiated; None before.
        gradient_floor: see `Response`.
    """

    def __init__(
        self, problem: BilevelProblem, gradient_floor: float = 0.0, inner_solver: InnerSolver | None = None
    ) -> None:
        self._problem = problem
        self._solver = inner_solver or problem.inner_solver
        self.params = problem.params
        self.data = problem.inner_data
        self.deterministic = problem.inner_batches.deterministic
        self.gradient_floor = gradient_floor
        self.cost = Cost()
        self.inner_loss: float | None = None
        self._inner_batch, self._outer_batch = problem.inner_batches.draw(), problem.outer_batches.draw()
        self._start_norm: float | None = None

    # For estimators

    def loss(self, lower: Vector, upper: Vector) -> Tensor:
        """See `Response.loss`."""
        problem = self._problem
        return self._evaluate(problem.outer_loss, "outer_loss", lower, upper, problem.outer_batches, self._outer_batch)

    def residual(self, lower: Vector, upper: Vector) -> Vector:
        """See `Response.residual`."""
        value, gradient = self._inner(lower, upper, self._inner_batch, create_graph=True, keep_buffers=False)
        self.inner_loss = float(value.detach())
        return gradient

    def start_gradient_norm(self, upper: Vector) -> float:
        """See `Response.start_gradient_norm`; one gradient, the first time."""
        if self._start_norm is None:
            start = leaves(self.params.start)
            _, gradient = self._inner(start, upper, self._inner_batch, create_graph=False, keep_buffers=False)
            self._start_norm = float(norm(gradient))
        return self._start_norm

    def label(self, name: str) -> str:
        """See `Response.label`."""
        return self._problem.hparams.layout.label(name)

    @property
    def has_step(self) -> bool:
        """See `Response.has_step`."""
        return hasattr(self._solver, "step")

    def _stepper(self) -> Any:
        solver: Any = self._solver
        if not self.has_step:
            raise InvalidValueError(
                f"unrolling differentiates through the steps of the inner solver, and {type(solver).__name__} has none "
                'that can be; write inner_solver=bilevel.inner.SGD(lr=..., steps=...), or choose method="implicit"'
            )
        return solver

    def unroll_steps(self) -> int:
        """See `Response.unroll_steps`."""
        return int(self._stepper().unroll_steps(self))

    def initial_state(self, lower: Vector) -> Any:
        """See `Response.initial_state`."""
        return self._stepper().initial_state(lower)

    def step(self, lower: Vector, state: Any, upper: Vector, t: int) -> tuple[Vector, Any]:
        """See `Response.step`."""
        after: tuple[Vector, Any] = self._stepper().step(self, lower, state, upper, t)
        return after

    # For inner solvers

    def solve_inner(self, lower: Vector, upper: Vector) -> InnerSolution:
        """Run the inner solver from `lower`."""
        return self._solver.solve(self, lower, upper)

    def draw(self) -> Any:
        """See `Task.draw`."""
        return self._problem.inner_batches.draw()

    def epoch(self) -> int:
        """See `Task.epoch`."""
        return self._problem.inner_batches.epoch()

    def value_and_gradient(
        self, lower: Vector, upper: Vector, batch: Any, *, create_graph: bool = False
    ) -> tuple[Tensor, Vector]:
        """See `Task.value_and_gradient`."""
        w = lower if create_graph else leaves(lower)
        return self._inner(w, upper, batch, create_graph=create_graph, keep_buffers=True)

    def hparams(self, upper: Vector) -> AbstractContextManager[Any]:
        """See `Task.hparams`."""
        return self._problem.hparams.layout.bound(upper)

    def _inner(
        self, lower: Vector, upper: Vector, batch: Any, *, create_graph: bool, keep_buffers: bool
    ) -> tuple[Tensor, Vector]:
        problem = self._problem
        h = upper if create_graph else detach(upper)
        with torch.enable_grad():
            value = self._evaluate(
                problem.inner_loss, "inner_loss", lower, h, problem.inner_batches, batch, keep_buffers
            )
            if not value.requires_grad:
                raise InvalidTypeError(
                    "`inner_loss` returned a tensor that does not depend on params; do not detach them, and use the "
                    "`params` that the loss is called with"
                )
            grads = torch.autograd.grad(value, list(lower.values()), create_graph=create_graph, allow_unused=True)
        self.cost.gradients += 1
        if all(g is None for g in grads):
            raise InvalidTypeError(
                "`inner_loss` does not depend on params; use the `params` that the loss is called with, not the ones "
                "from outside"
            )
        pairs = zip(lower.items(), grads, strict=True)
        return value, {name: torch.zeros_like(t) if g is None else g for (name, t), g in pairs}

    def _evaluate(
        self,
        loss: Callable[..., Tensor],
        name: str,
        lower: Vector,
        upper: Vector,
        batches: Batches,
        batch: Any,
        keep_buffers: bool = False,
    ) -> Tensor:
        problem = self._problem
        with (
            problem.params.bound(lower, keep_buffers=keep_buffers) as params,
            problem.hparams.layout.bound(upper) as hparams,
        ):
            value = loss(params, hparams, batch) if batches.given else loss(params, hparams)
        return _checked_scalar(value, name)


def _checked_scalar(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        hint = "add a return statement" if value is None else "return the tensor itself, without .item()"
        raise InvalidTypeError(f"`{name}` returned a {type(value).__name__}, expected a scalar Tensor; {hint}")
    if value.dim() > 0:
        raise InvalidValueError(
            f"`{name}` returned a tensor of shape {tuple(value.shape)}, expected a scalar (0-d); add .mean() or .sum()"
        )
    if not value.is_floating_point():
        raise InvalidTypeError(f"`{name}` returned a {value.dtype} tensor, expected a floating-point one")
    return value


def _check_loss(loss: Any, name: str, with_batch: bool) -> None:
    wanted = ["params", "hparams", "batch"] if with_batch else ["params", "hparams"]
    if not callable(loss):
        raise InvalidTypeError(
            f"`{name}` is a {type(loss).__name__}, expected a function ({', '.join(wanted)}) -> scalar Tensor"
        )
    try:
        signature = inspect.signature(loss)
    except ValueError:  # some builtins have none; they are found out at the first call
        return
    try:
        signature.bind(*wanted)
    except TypeError as error:
        data = name.replace("loss", "data")
        given = "is given" if with_batch else "is not given"
        raise InvalidTypeError(
            f"`{name}` takes {signature}, but is called with ({', '.join(wanted)}) because `{data}` {given}: {error}"
        ) from error


def _check_together(hparams: Variables, first: Tensor) -> None:
    for name, tensor in hparams.start.items():
        if tensor.dtype != first.dtype:
            raise InvalidValueError(
                f"{hparams.label(name)} is {tensor.dtype} but `params` are {first.dtype}; give both one dtype, for "
                f"example .to({first.dtype})"
            )
        if tensor.device != first.device:
            raise InvalidValueError(
                f"{hparams.label(name)} is on {tensor.device} but `params` are on {first.device}; give both one "
                f"device, for example .to('{first.device}')"
            )


def _as_solver(solver: Any) -> InnerSolver:
    if solver is None:
        return LBFGS()
    if isinstance(solver, type) and hasattr(solver, "solve"):
        raise InvalidTypeError(
            f"`inner_solver` is the class {solver.__name__}, expected an object; write inner.{solver.__name__}(...)"
        )
    if hasattr(solver, "solve"):
        return solver  # type: ignore[no-any-return]
    return Custom(solver)
