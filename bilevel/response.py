"""A problem as one hypergradient sees it: batches drawn once, random numbers pinned, costs counted."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from bilevel.certificate import Cost
from bilevel.data import Blocks
from bilevel.errors import NAN_ADVICE, InvalidValueError, NonFiniteError
from bilevel.inner import InnerSolution, InnerSolver
from bilevel.layout import Lent
from bilevel.losses import gradient, scalar
from bilevel.operators import Pairs
from bilevel.problem import BilevelProblem
from bilevel.prox import Piece, assign
from bilevel.randomness import get_random, replayed
from bilevel.solvers.base import Linearization
from bilevel.stepping import Stepping
from bilevel.twice import INSTEAD, explain, explained, twice_differentiable
from bilevel.variables import StructureVariables
from bilevel.vector import Vector, cast, detach, leaves, norm
from bilevel.widening import CannotWidenError, InFloat64, widened

_WHAT = {True: ("differentiating the losses twice", f"{INSTEAD}. "), False: ("differentiating the losses",)}


class _Plain:
    """Lends plain tensors, which need no more than their structures; a quarter of a small product's time went here."""

    def __init__(self, params: Any, hparams: Any, twice: bool) -> None:
        self._structures, self._what = (params, hparams), _WHAT[twice]

    def __enter__(self) -> tuple[Any, Any]:
        return self._structures

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, RuntimeError):
            explain(error, *self._what)


class ProblemResponse(Stepping):
    """One problem for one hypergradient: its losses with the batches drawn once, and its costs.

    Implements `bilevel.solvers.Response` for estimators and `bilevel.inner.Task` for inner solvers.

    Attributes:
        cost: gradients and products spent so far.
        inner_loss: the inner loss where it was last differentiated twice, or first looked at; None before.
        gradient_floor, held, stochastic, slack, second_moment, pairs, factor, members, solved: see `Response`.
        penalties: those of `bilevel.prox`, by the names of their tensors.
        piece: the smooth piece on which the inner solution lies, found where `residual` is first asked for; None before
            and without a penalty of `bilevel.prox`.
    """

    def __init__(
        self, problem: BilevelProblem, gradient_floor: float = 0.0, inner_solver: InnerSolver | None = None
    ) -> None:
        if torch.is_inference_mode_enabled():
            raise InvalidValueError(
                "hypergradients need gradients, and torch.inference_mode() switches them off for good; call this "
                "outside of it (torch.no_grad() does no harm)"
            )
        self._problem = problem
        self._solver = inner_solver or problem.inner_solver
        self.params = problem.params
        self.penalties = assign(getattr(self._solver, "penalties", ()), problem.params)
        self.piece: Piece | None = None
        self._hparams: Lent = problem.hparams.layout
        self.ranges = problem.hparams
        self.data, self.deterministic = problem.inner_data, problem.inner_batches.deterministic
        self.gradient_floor = gradient_floor
        self.held, self.stochastic, self.slack = False, not problem.deterministic, 1.0
        self.cost = Cost()
        self.inner_loss: float | None = None
        self._inner_batch, self._outer_batch = problem.pinned_batches.draw(), problem.outer_batches.draw()
        self._weight, self._position = 0.0, problem.inner_batches.position()  # weight of the outer loss in training
        self._start: Vector = problem.params.start
        self._start_norm: float | None = None
        self._precision: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.second_moment: Vector | None = None
        self.pairs: Pairs | None = None
        self.factor: Tensor | None = None
        self.sensitivity: Callable[[Vector, Vector], Vector] | None = None
        self.solved: Linearization | None = None
        self._set_up = self._first_order = False
        self.members, self._recurrent = problem.members, self.params.has_recurrent_layers_on_gpu()
        self._device = next(iter(problem.params.start.values())).device
        self._random = get_random(self._device)

    # For estimators

    def loss(self, lower: Vector, upper: Vector) -> Tensor:
        """See `Response.loss`."""
        with (
            torch.enable_grad(),
            self._lent(lower, upper, keep_buffers=False, twice=not self._first_order) as structures,
            self._randomness(pinned=True),
        ):
            return self._outer(structures)

    def residual(self, lower: Vector, upper: Vector) -> Vector:
        """See `Response.residual`."""
        if self.penalties and self.piece is None:
            self.piece = self._find_piece(lower, upper)
        if self.piece is None:
            value, gradient = self._smooth(lower, upper)
        else:
            value, gradient = self.piece.evaluate(lower, lambda: self.hparams(upper), lambda w: self._smooth(w, upper))
        first = self._start_norm is None and self.piece is None
        if first and all(torch.equal(t, lower[name]) for name, t in self._start.items()):
            self._start_norm = float(norm(detach(gradient)))
        self.inner_loss = float(value.detach())
        if not math.isfinite(self.inner_loss):
            raise NonFiniteError(
                f"{self._problem.inner_name.replace('inner_loss', 'the inner loss')} is {self.inner_loss} at the inner "
                f"solution; {NAN_ADVICE}",
                "inner loss",
            )
        return gradient

    def _smooth(self, lower: Vector, upper: Vector) -> tuple[Tensor, Vector]:
        return self._inner(lower, upper, self._inner_batch, create_graph=True, training=False, pinned=True)

    def _find_piece(self, lower: Vector, upper: Vector) -> Piece:
        h, size = detach(upper), self.start_gradient_norm(upper)
        self.cost.products += 1
        return Piece.examined(
            self.penalties, lower, lambda: self.hparams(h), lambda w: self._smooth(w, h), size, self.params.label
        )

    def on(self, piece: Piece) -> ProblemResponse:
        """See `Task.on`."""
        held = copy.copy(self)
        held.piece = piece
        return held

    def inner(self, lower: Vector, upper: Vector) -> Tensor:
        """See `Response.inner`."""
        with (
            torch.enable_grad(),
            self._lent(lower, upper, keep_buffers=False, twice=not self._first_order) as structures,
            self._randomness(pinned=True),
        ):
            value = self._objective(structures, self._inner_batch) + self._penalty(lower, structures[1])
        if self.inner_loss is None:
            self.inner_loss = float(value.detach())
        return value

    def _penalty(self, lower: Vector, hparams: Any) -> Tensor | float:
        return sum(penalty.value(lower[name], hparams) for name, penalty in self.penalties.items())

    @property
    def has_kinks(self) -> bool:
        """See `Response.has_kinks`."""
        return bool(self.penalties)

    @property
    def step_size(self) -> float | None:
        """See `Response.step_size`."""
        size: float | None = getattr(self._solver, "step_size", None)
        return size

    def solve(self, lower: Vector, upper: Vector, weight: float = 0.0) -> Vector:
        """See `Response.solve`."""
        if weight and getattr(self._solver, "whole_loop", False):
            raise InvalidValueError(
                "this method trains on inner_loss + weight * outer_loss, and `inner_solver` is a function of your own "
                "that knows its own loss only; use bilevel.inner.LBFGS() or bilevel.inner.Adam(...), or "
                'method="implicit"'
            )
        buffers = self.params.buffers()
        weighted = copy.copy(self)
        weighted._weight, weighted._start_norm, weighted._first_order = weight, None, False
        if getattr(self._solver, "needs_fixed_loss", False):
            weighted._start_norm = weighted.gradient_norm(lower, upper)  # what there is to do, which may be little
        self._problem.inner_batches.go_to(self._position)
        try:
            with replayed(self._random, self._device):
                return weighted.solve_inner(lower, upper).value
        finally:
            self.params.set_buffers(buffers)

    def gradient_norm(self, lower: Vector, upper: Vector) -> float:
        """Return the norm of the gradient of what is trained on."""
        batch, w = self._inner_batch, leaves(lower)
        return float(norm(self._inner(w, upper, batch, create_graph=False, training=False, pinned=True)[1]))

    def start_gradient_norm(self, upper: Vector) -> float:
        """See `Response.start_gradient_norm`; one gradient, the first time."""
        if self._start_norm is None:
            self._start_norm = self.gradient_norm(self._start, upper)
        return self._start_norm

    def in_float64(self) -> ProblemResponse:
        """See `Response.in_float64`."""
        if self.penalties:
            raise CannotWidenError("the kinks of a penalty are found in float32")
        wide = copy.copy(self)
        wide._precision = InFloat64
        wide._start, wide._start_norm = cast(self._start, torch.float64), None
        wide._inner_batch, wide._outer_batch = widened(self._inner_batch), widened(self._outer_batch)
        if self.second_moment is not None:
            wide.second_moment = cast(self.second_moment, torch.float64)
        return wide

    def blocks(self, size: int | None) -> tuple[Blocks, Blocks]:
        """See `Response.blocks`."""
        return self._problem.inner_batches.blocks(size), self._problem.outer_batches.blocks(size)

    def see(self, inner: Any, outer: Any) -> None:
        """See `Response.see`."""
        self._inner_batch, self._outer_batch, self._start_norm, self.solved = inner, outer, None, None

    def redraw(self) -> None:
        """See `Response.redraw`."""
        self.see(self._problem.pinned_batches.draw(), self._problem.outer_batches.draw())
        torch.rand(1, device=self._device)  # moves on the generator that dropout draws from
        self._random = get_random(self._device)

    def label(self, name: str) -> str:
        """See `Response.label`."""
        return self._hparams.label(name)

    # For inner solvers

    def solve_inner(self, lower: Vector, upper: Vector) -> InnerSolution:
        """Run the inner solver from `lower`."""
        self.piece = None
        solution = self._solver.solve(self, lower, upper)
        self.second_moment, self.pairs = solution.second_moment, solution.pairs
        self.sensitivity, self.solved = solution.sensitivity, solution.system
        return solution

    def draw(self) -> Any:
        """See `Task.draw`."""
        return self._problem.inner_batches.draw()

    def epoch(self) -> int:
        """See `Task.epoch`."""
        return self._problem.inner_batches.epoch()

    def value_and_gradient(
        self, lower: Vector, upper: Vector, batch: Any, *, create_graph: bool = False, pinned: bool = False
    ) -> tuple[Tensor, Vector]:
        """See `Task.value_and_gradient`."""
        w = lower if create_graph else leaves(lower)
        return self._inner(w, upper, batch, create_graph=create_graph, training=True, pinned=pinned)

    def hparams(self, upper: Vector) -> AbstractContextManager[Any]:
        """See `Task.hparams`."""
        return self._hparams.bound(upper)

    def at(self, lower: Vector, upper: Vector) -> AbstractContextManager[tuple[Any, Any]]:
        """See `Response.at`."""
        return self._lent(lower, upper, keep_buffers=False, twice=not self._first_order)

    def _lent(
        self, lower: Vector, upper: Vector, *, keep_buffers: bool, twice: bool = True
    ) -> AbstractContextManager[tuple[Any, Any]]:
        """Lend the user's structures with these tensors, where a loss is run or differentiated."""
        if self._precision is nullcontext and (self._set_up or not twice):
            sides = self._problem.params, self._hparams
            if isinstance(sides[0], StructureVariables) and isinstance(sides[1], StructureVariables):
                return _Plain(sides[0].shaped(lower), sides[1].shaped(upper), twice)
        return self._bound(lower, upper, keep_buffers, twice)

    @contextmanager
    def _bound(self, lower: Vector, upper: Vector, keep_buffers: bool, twice: bool) -> Iterator[tuple[Any, Any]]:
        with (
            self._problem.params.bound(lower, keep_buffers=keep_buffers) as params,
            self._hparams.bound(upper) as hparams,
            self._twice() if twice else nullcontext(),
            explained(*_WHAT[twice]),
            self._precision(),
        ):
            yield params, hparams

    @contextmanager
    def session(self, derivatives: int = 2) -> Iterator[None]:
        """Set torch up for as many derivatives once, for all that runs inside; else for two at every evaluation."""
        self._first_order = derivatives < 2
        with nullcontext() if self._first_order else self._twice():
            self._set_up = not self._first_order
            try:
                yield
            finally:
                self._set_up = self._first_order = False

    def _twice(self) -> AbstractContextManager[None]:
        return nullcontext() if self._set_up else twice_differentiable(self._recurrent)

    def _inner(
        self, lower: Vector, upper: Vector, batch: Any, *, create_graph: bool, training: bool, pinned: bool
    ) -> tuple[Tensor, Vector]:
        problem = self._problem
        h = upper if create_graph else detach(upper)
        with torch.enable_grad(), self._lent(lower, h, keep_buffers=training, twice=create_graph) as structures:
            with self._randomness(pinned):
                value = self._objective(structures, batch)
            if create_graph:
                problem.examine(value)
            found = gradient(value, lower, problem.inner_name, create_graph=create_graph)
        self.cost.gradients += 1
        return value, found

    def _objective(self, structures: tuple[Any, Any], batch: Any) -> Tensor:
        """Return the loss that is trained on: the inner one, and a part of the outer one where a method adds it."""
        problem = self._problem
        given = (*structures, batch) if problem.inner_batches.given else structures
        value = scalar(problem.inner_loss, given, problem.inner_name)
        problem.refuse_reentrant(value, problem.inner_name)
        return value + self._weight * self._outer(structures) if self._weight else value

    def _outer(self, structures: tuple[Any, Any]) -> Tensor:
        problem = self._problem
        given = (*structures, self._outer_batch) if problem.outer_batches.given else structures
        value = scalar(problem.outer_loss, given, "outer_loss")
        problem.refuse_reentrant(value, "outer_loss")
        return value

    def _randomness(self, pinned: bool) -> AbstractContextManager[None]:
        """Draw the same random numbers in every term of one hypergradient; go on with fresh ones in training."""
        return replayed(self._random, self._device) if pinned else nullcontext()
