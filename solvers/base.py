"""What every hypergradient estimator takes, returns and shares.

F(λ) = f(w*(λ), λ)      with  R(w*(λ), λ) = 0,  R = the inner gradient,  w = `lower`,  λ = `upper`, natural values
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bilevel.batching import batched, dense_share, rows_at_once
from bilevel.certificate import Cost, Hypergradient
from bilevel.data import Blocks
from bilevel.errors import NAN_ADVICE, InvalidTypeError, NonFiniteError, UnseenHyperparameterError
from bilevel.hyperparameters import Hyperparameters
from bilevel.operators import LinearOperator, Pairs
from bilevel.vector import Vector, dense, detach, is_finite, leaves, norm, zeros_like

State = Any
"""What an estimator keeps from one hypergradient to the next: a warm start, a sketch, averages. Plain values (numbers,
strings, tensors, dicts and lists of them), because it is saved in checkpoints."""


class RootCondition(Protocol):
    """R(w, λ) = 0, which defines w*(λ): all that the implicit function theorem needs to know."""

    cost: Cost
    second_moment: Vector | None
    """Mean square of the gradients that an adaptive inner optimizer met on its way; a preconditioner may use it."""
    pairs: Pairs | None
    """What the inner L-BFGS saw of the Hessian on its way; None for other inner solvers, and where it took no step."""
    factor: Tensor | None
    """The Cholesky factor of a Hessian nearby, `(size, size)`, which solvers precondition with; None: not known."""
    members: int | None
    """How many members a family has, to each of which a block of dR/dw belongs; None: no family."""

    def at(self, lower: Vector, upper: Vector) -> AbstractContextManager[Any]:
        """Put these tensors into the user's modules while a graph is pulled back, for activation checkpointing."""
        ...

    def residual(self, lower: Vector, upper: Vector) -> Vector:
        """Return R, differentiable in both arguments; the inner gradient of a bilevel problem."""
        ...


class Response(RootCondition, Protocol):
    """How the inner variables answer the outer ones, for one hypergradient.

    Batches are drawn once, so every term of one hypergradient sees one function.
    """

    held: bool
    """The caller gave `lower` as the inner solution: a method that moves the inner variables leaves them there."""

    stochastic: bool
    """`redraw` gives other batches."""

    slack: float
    """How many times larger the default tolerances of inner and linear solves may be; 1 but in `solve`."""

    gradient_floor: float
    """Norm below which the caller takes a hypergradient for zero; relative errors are not held against it."""

    sensitivity: Callable[[Vector, Vector], Vector] | None
    """(w, gradient) -> how far the inner optimizer's next step moves with each entry of the gradient, in the state that
    training ended with; None without an inner optimizer, and where it did not run."""

    solved: Linearization | None
    """The inner problem to first order where training ended, if the inner solver left it."""

    ranges: Hyperparameters
    """What keeps hyperparameters that are moved inside of their ranges."""

    def loss(self, lower: Vector, upper: Vector) -> Tensor:
        """Return f, differentiable."""
        ...

    def inner(self, lower: Vector, upper: Vector) -> Tensor:
        """Return g, the inner loss whose gradient is R, differentiable."""
        ...

    def solve(self, lower: Vector, upper: Vector, weight: float = 0.0) -> Vector:
        """Return where the inner solver ends from `lower`, minimizing g + weight * f.

        All calls of one response train on the same batches with the same random numbers, and leave buffers alone.
        """
        ...

    def start_gradient_norm(self, upper: Vector) -> float:
        """Return the norm of R at the inner starting point: the scale of the inner gradient."""
        ...

    @property
    def step_size(self) -> float | None:
        """Return the learning rate of inner gradient steps, where it is one number; else None."""
        ...

    @property
    def has_kinks(self) -> bool:
        """Say whether the inner loss has a penalty with kinks, so that its gradient jumps."""
        ...

    @property
    def has_step(self) -> bool:
        """Say whether the inner solver can be differentiated: `initial_state`, `step`, `unroll_steps`."""
        ...

    def in_float64(self) -> Response:
        """Return the same problem, batches and random numbers in float64; raise where the losses cannot run so."""
        ...

    def redraw(self) -> None:
        """Draw the next batches and new random numbers: another sample of the same problem."""

    def blocks(self, size: int | None) -> tuple[Blocks, Blocks]:
        """Cut the inner and the outer data into blocks of `size` examples; None: as the loader has them, or all."""

    def see(self, inner: Any, outer: Any) -> None:
        """Take these batches from here on."""

    def unroll_steps(self) -> int:
        """Return the number of inner steps; raise if the inner solver cannot be differentiated."""
        ...

    def initial_state(self, lower: Vector) -> State:
        """Return the inner optimizer's state before its first step."""
        ...

    def step(self, lower: Vector, state: State, upper: Vector, t: int) -> tuple[Vector, State]:
        """Return the inner variables and the state after step `t`, differentiable."""
        ...

    def mark(self) -> Any:
        """Return what the next step will draw from: the stream, random numbers, buffers; a tree of plain values."""
        ...

    def go_back(self, mark: Any) -> None:
        """Let the next step see what it would have seen at `mark`; raise for a stream that cannot go back."""

    def label(self, name: str) -> str:
        """Return what the user calls the hyperparameter `name`."""
        ...


class Estimator(Protocol):
    """A way to get a hypergradient: a frozen dataclass of settings that can be called.

    It may declare `about: ClassVar[About]` (see `bilevel.solvers.about`); without it, it counts as an implicit method.
    """

    def __call__(
        self, response: Response, lower: Vector, upper: Vector, state: State = None
    ) -> tuple[Hypergradient, State]:
        """Return the hypergradient on named tensors, and what the next call may start from."""
        ...


@dataclass(frozen=True)
class OuterGradient:
    """The outer loss and its partial gradients; None where it does not use a hyperparameter."""

    loss: float
    lower: Vector
    upper: dict[str, Tensor | None]


def outer_gradient(response: Response, lower: Vector, upper: Vector) -> OuterGradient:
    """Differentiate f at fixed `lower` and `upper`."""
    w, h = leaves(lower), leaves(upper)
    loss = response.loss(w, h)
    response.cost.gradients += 1
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError(f"the outer loss is {float(loss.detach())}; {NAN_ADVICE}", "outer loss")
    if not loss.requires_grad:
        raise InvalidTypeError(
            "`outer_loss` returned a tensor that depends on neither params nor hparams; "
            "do not detach them or leave torch.no_grad() around it; accuracies, as every comparison, have no gradient"
        )
    with response.at(w, h):
        grads = torch.autograd.grad(loss, [*w.values(), *h.values()], allow_unused=True)
    if all(g is None for g in grads):
        raise InvalidTypeError(
            "`outer_loss` depends on neither params nor hparams, only on other tensors; use the `params` and `hparams` "
            "that the loss is called with"
        )
    by_lower = dict(zip(w, grads[: len(w)], strict=True))
    filled = {name: torch.zeros_like(w[name]) if g is None else dense(g) for name, g in by_lower.items()}
    if not is_finite(filled):
        raise NonFiniteError(f"the gradient of the outer loss is not finite; {NAN_ADVICE}", "outer gradient")
    direct: dict[str, Tensor | None] = dict(zip(h, grads[len(w) :], strict=True))
    direct = {n: None if g is None else dense(g) for n, g in direct.items()}
    return OuterGradient(float(loss.detach()), filled, direct)


class System(Protocol):
    """The inner problem to first order around one point, whatever its products are made of."""

    residual: Vector
    """R(w, λ), no graph."""
    operator: LinearOperator
    """v -> H v with H = dR/dw, the inner Hessian."""

    @property
    def noise(self) -> float:
        """Return an estimate of the relative error of the products taken so far."""
        ...

    def pull_back(self, v: Vector) -> dict[str, Tensor | None]:
        """Return (dR/dλ)^T v; None for a hyperparameter that R does not use."""
        ...


class Linearization:
    """R at one point with its graph: built once, many vectors are pulled back through it (see `System`).

    Attributes:
        point: w and λ, as they were given.
    """

    noise = 0.0  # autograd rounds, no more

    def __init__(self, response: RootCondition, lower: Vector, upper: Vector) -> None:
        self._response, self._cost, self.point = response, response.cost, (lower, upper)
        self._lower, self._upper = leaves(lower), leaves(upper)
        attached = response.residual(self._lower, self._upper)
        # A loss that is linear in some tensor gives a constant R there: nothing to pull back.
        self._attached = {name: t for name, t in attached.items() if t.requires_grad}
        self.residual, self._together = detach(attached), 0  # rows of one batched product; 0: not yet known
        if not is_finite(self.residual):
            raise NonFiniteError(f"the gradient of the inner loss is not finite; {NAN_ADVICE}", "inner gradient")
        self.operator = LinearOperator(
            self._product,
            self._lower,
            symmetric=True,
            matvecs=self._products,
            second_moment=response.second_moment,
            pairs=response.pairs,
            factor=response.factor,
            members=response.members,
        )

    def _product(self, v: Vector) -> Vector:
        self._cost.products += 1
        return self._transposed(v)

    def _products(self, v: Vector) -> Vector:
        """Return H v for stacked v."""
        self._together = self._together or rows_at_once(self._attached.values())
        self._cost.products += len(next(iter(v.values())))
        return batched(self._transposed, v, self._together)

    def dense_share(self) -> float:
        """See `bilevel.batching.dense_share`."""
        self._cost.products += 1
        return dense_share(self._transposed, detach(self._lower))

    def _transposed(self, v: Vector) -> Vector:
        """Return (dR/dw)^T v, zero where R does not use a tensor."""
        grads = self._pull(self._lower, v)
        return {name: torch.zeros_like(x) if (g := grads[name]) is None else g for name, x in self._lower.items()}

    def pull_back(self, v: Vector) -> dict[str, Tensor | None]:
        """Return (dR/dλ)^T v; None for a hyperparameter that R does not use."""
        self._cost.products += 1
        return self._pull(self._upper, v)

    def _pull(self, onto: Vector, v: Vector) -> dict[str, Tensor | None]:
        if not self._attached:
            return dict.fromkeys(onto)
        outputs, cotangents = list(self._attached.values()), [v[name] for name in self._attached]
        with self._response.at(self._lower, self._upper):
            grads = torch.autograd.grad(outputs, list(onto.values()), cotangents, retain_graph=True, allow_unused=True)
        return {name: None if g is None else dense(g) for name, g in zip(onto, grads, strict=True)}


def linearization(response: Response, lower: Vector, upper: Vector) -> Linearization:
    """Return R with its graph; where training ended at this very point, the graph that it left."""
    left = response.solved
    if left is None or left.point[0] is not lower or left.point[1] is not upper:
        return Linearization(response, lower, upper)
    return left


def add_terms(
    response: Response,
    direct: dict[str, Tensor | None],
    through: dict[str, Tensor | None],
    upper: Vector,
    hint: str,
) -> Vector:
    """Return direct + through; raise for a hyperparameter that has neither, with what to do about it as a `hint`."""
    total = zeros_like(upper)
    for name in upper:
        terms: Sequence[Tensor] = [t for t in (direct[name], through[name]) if t is not None]
        if not terms:
            raise UnseenHyperparameterError(f"{response.label(name)} has no path to the outer loss: {hint}")
        for term in terms:
            total[name] = total[name] + term.to(total[name].dtype)
    if not is_finite(total):
        raise NonFiniteError("the hypergradient is not finite", "hypergradient")
    return total


def inner_scale(response: Response, system: System, lower: Vector, upper: Vector) -> float:
    """Return the size against which the inner gradient at `lower` counts as small.

    The larger of |R| at the starting point and |H w|. Neither changes under a scaling of the loss or
    of the variables; the second serves a run that starts at its solution.
    """
    return max(response.start_gradient_norm(upper), float(norm(system.operator(detach(lower)))))


def ratio(part: float, whole: float) -> float:
    """Return part / whole, with 0 / 0 = 0."""
    return (part / whole if whole > 0.0 else float("inf")) if part else 0.0


def negative(v: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Return -v, None where there is nothing."""
    return {name: None if t is None else -t for name, t in v.items()}


def present(v: dict[str, Tensor | None]) -> Vector:
    """Return the tensors that are there."""
    return {name: t for name, t in v.items() if t is not None}
