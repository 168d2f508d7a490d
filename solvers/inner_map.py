"""An inner step at the inner solution: its transposed derivative, and the error of an adjoint that comes from it.

    w* = Φ(w*, λ)      pull: u -> (∂Φ/∂w)^T u      onto_upper: u -> (∂Φ/∂λ)^T u

Φ is the step of the inner solver, momentum included, where it has one that can be differentiated; else a gradient step
of length 1 / (largest eigenvalue of the inner Hessian), measured. At a stationary point both give one hypergradient, so
the map need not be the one that trained the inner variables.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import optree
import torch
from torch import Tensor

from bilevel.operators import LinearOperator
from bilevel.solvers.base import Linearization, OuterGradient, Response, negative, outer_gradient, ratio
from bilevel.solvers.correction import FEWEST, MOST, Bound, Correction, Equation, Solved, correct, loosely
from bilevel.solvers.linear.base import wide
from bilevel.solvers.linear.gmres import cycle
from bilevel.solvers.linear.lanczos import extreme_eigenvalues
from bilevel.solvers.recorded import is_float
from bilevel.vector import Vector, axpy, detach, leaves, norm, scale, subtract, unflatten, zeros_like

UNSEEN = (
    "neither loss nor the inner step uses it. Take it out of `hparams`, or use it in a loss or in a setting of the "
    'inner solver; a learning rate of a converged inner problem needs method="unroll"'
)
LOOSE = 0.3  # of what a solve by GMRES may leave, relative to its answer: its bound is far from sharp


class StepMap(Protocol):
    """The transposed derivative of an inner step at the inner solution, products only."""

    def embed(self, outer: Vector) -> Vector:
        """Return the right-hand side for a gradient with respect to the inner variables."""
        ...

    def pull(self, u: Vector) -> Vector:
        """Return (dΦ/dw)^T u."""
        ...

    def onto_upper(self, u: Vector) -> dict[str, Tensor | None]:
        """Return (dΦ/dλ)^T u."""
        ...

    residual: Vector
    """w - Φ(w) from rest, zero at a fixed point: what the inner solution is stationary for."""

    @property
    def operator(self) -> LinearOperator:
        """Return the derivative of `residual`, symmetric but for Adam and its kin."""
        ...

    def moved(self, response: Response, system: Linearization, lower: Vector, upper: Vector) -> StepMap:
        """Return the same step at other inner variables."""
        ...

    @property
    def symmetric(self) -> bool:
        """Say whether dΦ/dw is known to be symmetric."""
        ...


class GradientStep:
    """Φ(w) = w - α R(w), α = 1 / (largest eigenvalue)."""

    symmetric = True

    def __init__(self, system: Linearization, size: float | None = None) -> None:
        self._system = system
        if size is None:
            _, high = extreme_eigenvalues(system.operator)
            size = 1.0 / high if high > 0.0 else 1.0
        self._size = size
        self.residual = scale(size, system.residual)

    def embed(self, outer: Vector) -> Vector:
        return outer

    def pull(self, u: Vector) -> Vector:
        return axpy(-self._size, self._system.operator(u), u)

    def onto_upper(self, u: Vector) -> dict[str, Tensor | None]:
        pulled = self._system.pull_back(u)
        return negative({name: None if t is None else self._size * t for name, t in pulled.items()})

    @property
    def operator(self) -> LinearOperator:
        return LinearOperator(lambda v: scale(self._size, self._system.operator(v)), self.residual, symmetric=True)

    def moved(self, response: Response, system: Linearization, lower: Vector, upper: Vector) -> StepMap:
        return GradientStep(system, self._size)


class InnerStep:
    """Φ of the inner solver on (w, optimizer state), at the state that a standstill has.

    The state is named "state.0", "state.1", ... in the vectors.
    """

    symmetric = False

    def __init__(self, response: Response, lower: Vector, upper: Vector) -> None:
        self._response, self._cost, self._lower = response, response.cost, lower
        last = response.unroll_steps() - 1
        after, still = response.step(detach(lower), response.initial_state(lower), detach(upper), last)
        self.residual = subtract(lower, detach(after))
        tensors, spec = optree.tree_flatten(still)
        w, self._upper = leaves(lower), leaves(upper)
        tensors = [t.detach().requires_grad_() if is_float(t) else t for t in tensors]
        w_next, state_next = response.step(w, optree.tree_unflatten(spec, tensors), self._upper, last)
        self._inputs = w | _named(tensors)
        self._outputs = w_next | _named(optree.tree_leaves(state_next))

    def embed(self, outer: Vector) -> Vector:
        return outer | zeros_like({name: t for name, t in self._inputs.items() if name not in outer})

    def _pull(self, onto: Vector, u: Vector) -> dict[str, Tensor | None]:
        self._cost.products += 1
        attached = [name for name, t in self._outputs.items() if t.requires_grad]
        outputs, cotangents = [self._outputs[name] for name in attached], [u[name] for name in attached]
        with self._response.at({name: self._inputs[name] for name in self._lower}, self._upper):
            grads = torch.autograd.grad(outputs, list(onto.values()), cotangents, retain_graph=True, allow_unused=True)
        return dict(zip(onto, grads, strict=True))

    def pull(self, u: Vector) -> Vector:
        pulled = self._pull(self._inputs, u)
        return {name: torch.zeros_like(u[name]) if t is None else t for name, t in pulled.items()}

    def onto_upper(self, u: Vector) -> dict[str, Tensor | None]:
        return self._pull(self._upper, u)

    @property
    def operator(self) -> LinearOperator:
        def product(v: Vector) -> Vector:
            pulled = self.pull(self.embed(v))
            return {name: t - pulled[name] for name, t in v.items()}

        return LinearOperator(product, self.residual, symmetric=True)

    def moved(self, response: Response, system: Linearization, lower: Vector, upper: Vector) -> StepMap:
        return InnerStep(response, lower, upper)


def _named(state: list[Any]) -> Vector:
    return {f"state.{i}": t for i, t in enumerate(state) if is_float(t)}


def step_map(response: Response, system: Linearization, lower: Vector, upper: Vector) -> StepMap:
    """Return the inner solver's own step, or a gradient step where it has none."""
    return InnerStep(response, lower, upper) if response.has_step else GradientStep(system)


def without_step_sizes(step: StepMap, system: Linearization, u: Vector, upper: Vector) -> dict[str, Tensor | None]:
    """Return (∂Φ/∂λ)^T u, None for a λ that sets how far the step goes but not where it stands still.

    For a learning rate, λ ∂Φ/∂λ is the step itself, which vanishes at the fixed point: what is left of it is no
    gradient. A weight decay in the step is another matter, since it moves the fixed point.
    """
    through = step.onto_upper(u)
    reach = 2.0 * float(norm(step.residual)) * float(norm(u))  # 2: momentum, whose ∂Φ/∂λ is another step
    for name, seen in system.pull_back({n: u[n] for n in system.residual}).items():
        found = through[name]
        if seen is None and found is not None and float(norm({"": found * upper[name]})) <= reach:
            through[name] = None
    return through


def _equation(outer: OuterGradient, step: StepMap, lower: Vector) -> Equation:
    """Return u = (∂Φ/∂w)^T u + ∂f/∂w."""
    rhs, size = step.embed(outer.lower), float(norm(lower))
    return Equation(outer, step.residual, size, lambda u: axpy(1.0, step.pull(u), subtract(rhs, u)), step.onto_upper)


def correction_of(
    response: Response,
    outer: OuterGradient,
    step: StepMap,
    lower: Vector,
    upper: Vector,
    u: Vector,
    gradient: Vector,
    spent: int,
) -> Correction | None:
    """Correct `gradient`, which the adjoint u gave, once (see `bilevel.solvers.correction`).

    Args:
        response: the problem.
        outer: the outer loss and its partial gradients.
        step: the inner step.
        lower: w.
        upper: λ.
        u: the adjoint.
        gradient: dF/dλ.
        spent: products that the hypergradient took.
    """
    maps = [step]

    def there(w: Vector) -> Equation:
        system = Linearization(response, w, upper)
        maps.append(step.moved(response, system, w, upper))
        return _equation(outer_gradient(response, w, upper), maps[-1], w)

    def by_gmres(r: Vector, size: float, settled: Callable[[Bound], bool]) -> Solved:
        rest = LinearOperator(lambda v: subtract(v, maps[-1].pull(v)), u, symmetric=False)
        return _loosely_by_gmres(rest, r, max(MOST, spent // 2))

    here = _equation(outer, step, lower)
    # The increments of an iteration that is not at its end tell a curvature that is too large: none is taken from them.
    solve = loosely(step.operator, math.inf, spent)
    return correct(lower, upper, gradient, u, here, there, response, solve, None if step.symmetric else by_gmres)


def _loosely_by_gmres(operator: LinearOperator, r: Vector, most: int) -> Solved:
    """Solve until what is missing is small beside the answer, as `loosely` does; singular values bound it here."""
    low = math.inf

    def enough(left: float, length: float, H: Any) -> bool:
        nonlocal low
        if H.shape[1] < FEWEST or left > LOOSE * low * length:
            return False
        low = min(low, _expected_singular_value(H))
        return left <= LOOSE * low * length

    b = wide(r)
    if not bool(b.any()):
        return Solved(r, r, math.inf)
    x, H = cycle(operator, b, min(most, b.numel()), enough)
    return Solved(unflatten(x, r), unflatten(b - operator.flat(x), r), min(low, _expected_singular_value(H)))


def _expected_singular_value(H: Any) -> float:
    """Return the smallest one; while it still falls, what twice the fall of the last third would make of it."""
    k = H.shape[1]
    now, before = (float(np.linalg.svd(H[: j + 1, :j], compute_uv=False)[-1]) for j in (k, max(1, 2 * k // 3)))
    return ratio(now, before) ** 2 * now
