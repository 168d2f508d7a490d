"""Fixed-point iteration on the adjoint of an inner step.

    w* = Φ(w*, λ)      u = (∂Φ/∂w)^T u + ∂f/∂w      dF/dλ = ∂f/∂λ + (∂Φ/∂λ)^T u

Grazzi, Franceschi, Pontil and Salzo, On the iteration complexity of hypergradient computation, ICML 2020, section
2.2. Φ is the step of the inner solver, momentum included, where it has one that can be differentiated; else a gradient
step of length 1 / (largest eigenvalue of the inner Hessian), measured. At a stationary point both give one answer, so
the map need not be the one that trained the inner variables.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import optree
import torch
from torch import Tensor

from bilevel.certificate import Certificate, Hypergradient, judge
from bilevel.operators import LinearOperator
from bilevel.solvers.about import About, Terms
from bilevel.solvers.base import (
    Linearization,
    OuterGradient,
    Response,
    State,
    add_terms,
    inner_scale,
    negative,
    outer_gradient,
    ratio,
)
from bilevel.solvers.correction import MOST, Bound, Equation, Solved, correct, loosely
from bilevel.solvers.linear import GMRES
from bilevel.solvers.linear.base import check_count, check_settings, default_rtol, dtype_of
from bilevel.solvers.linear.lanczos import extreme_eigenvalues
from bilevel.vector import Vector, axpy, detach, leaves, norm, scale, subtract, zeros_like

GROWTH = 10.0  # an increment this many times the first one ends the iteration
GMRES_RTOL = 0.03  # of the correction to u
MEMORY = 10  # steps over which the contraction is averaged; momentum makes single steps oscillate


@dataclass(frozen=True)
class FixedPoint:
    """Differentiate the inner optimum as the fixed point of an inner step.

    Each iteration costs one product and shrinks the error by the contraction of the step. With a momentum step it
    needs about the square root of the iterations that a plain gradient step needs.

    Args:
        max_steps: most iterations.
        rtol: stop when an iteration changes u by less than rtol |u|; None: 1e-8 in float64, 1e-5 in float32.
    """

    max_steps: int = 1000
    rtol: float | None = None
    about: ClassVar[About] = About(
        begins="solution",
        sees="step",
        derivatives=2,
        exact=True,
        terms=Terms("k products, k ~ log(1/rtol) / (1 - ρ)", "one step", "ρ^k", "Grazzi et al. 2020"),
    )

    def __post_init__(self) -> None:
        check_settings(self.rtol, self.max_steps)
        check_count(self.max_steps, "max_steps")

    def __call__(
        self, response: Response, lower: Vector, upper: Vector, state: State = None
    ) -> tuple[Hypergradient, State]:
        """Return the hypergradient at the inner solution `lower`; `state` is the last u."""
        outer = outer_gradient(response, lower, upper)
        system = Linearization(response, lower, upper)
        step: _Map = _InnerStep(response, lower, upper) if response.has_step else _GradientStep(system)
        rhs = step.embed(outer.lower)
        rtol = default_rtol(self.rtol, dtype_of(lower))
        u, increments = _iterate(step, rhs, state, rtol, self.max_steps)
        through = _without_step_sizes(step, system, u, upper)
        gradient = add_terms(response, outer.upper, through, upper, _UNSEEN)
        shrink = _contraction(increments)
        error = _error(response, outer, step, lower, upper, u, gradient, shrink, len(increments))
        inner = ratio(float(norm(system.residual)), inner_scale(response, system, lower, upper))
        displacement = ratio(float(norm(step.residual)), float(norm(lower)))
        certificate = _certificate(inner, ratio(increments[-1], float(norm(u))), shrink, displacement, error)
        return Hypergradient(gradient, outer.loss, lower, certificate, response.cost), u


_UNSEEN = (
    "neither loss nor the inner step uses it. Take it out of `hparams`, or use it in a loss or in a setting of the "
    'inner solver; a learning rate of a converged inner problem needs method="unroll"'
)


def _without_step_sizes(step: _Map, system: Linearization, u: Vector, upper: Vector) -> dict[str, Tensor | None]:
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


class _Map(Protocol):
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

    def moved(self, response: Response, system: Linearization, lower: Vector, upper: Vector) -> _Map:
        """Return the same step at other inner variables."""
        ...

    @property
    def symmetric(self) -> bool:
        """Say whether dΦ/dw is known to be symmetric."""
        ...


class _GradientStep:
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

    def moved(self, response: Response, system: Linearization, lower: Vector, upper: Vector) -> _Map:
        return _GradientStep(system, self._size)


class _InnerStep:
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
        tensors = [t.detach().requires_grad_() if _is_float(t) else t for t in tensors]
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

    def moved(self, response: Response, system: Linearization, lower: Vector, upper: Vector) -> _Map:
        return _InnerStep(response, lower, upper)


def _named(state: list[Any]) -> Vector:
    return {f"state.{i}": t for i, t in enumerate(state) if _is_float(t)}


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _iterate(step: _Map, rhs: Vector, start: Vector | None, rtol: float, max_steps: int) -> tuple[Vector, list[float]]:
    """Return the u of the smallest increment, and the norms of all increments up to it."""
    u = rhs if start is None else start
    best, smallest, increments = u, 0, [math.inf]
    for _ in range(max_steps):
        after = axpy(1.0, step.pull(u), rhs)
        increment = float(norm(subtract(after, u)))
        if increment < increments[smallest]:
            best, smallest = after, len(increments)
        u = after
        increments.append(increment)
        if increment <= rtol * float(norm(u)) or not increment <= GROWTH * increments[1]:
            break
    return best, increments[1 : smallest + 1]


def _contraction(increments: list[float]) -> float:
    """Return the mean factor by which the last increments shrank."""
    recent = increments[-1 - MEMORY :]
    return ratio(recent[-1], recent[0]) ** (1.0 / (len(recent) - 1)) if len(recent) > 1 else 0.0


def _equation(outer: OuterGradient, step: _Map, lower: Vector) -> Equation:
    """Return u = (∂Φ/∂w)^T u + ∂f/∂w."""
    rhs, size = step.embed(outer.lower), float(norm(lower))
    return Equation(outer, step.residual, size, lambda u: axpy(1.0, step.pull(u), subtract(rhs, u)), step.onto_upper)


def _error(
    response: Response,
    outer: OuterGradient,
    step: _Map,
    lower: Vector,
    upper: Vector,
    u: Vector,
    gradient: Vector,
    shrink: float,
    spent: int,
) -> float | None:
    """Estimate the error by one correction (see `bilevel.solvers.correction`); None for a step that does not shrink."""
    if not shrink < 1.0:
        return None
    maps = [step]

    def there(w: Vector) -> Equation:
        system = Linearization(response, w, upper)
        maps.append(step.moved(response, system, w, upper))
        return _equation(outer_gradient(response, w, upper), maps[-1], w)

    def by_gmres(r: Vector, size: float, settled: Callable[[Bound], bool]) -> Solved:
        rest = LinearOperator(lambda v: subtract(v, maps[-1].pull(v)), u, symmetric=False)
        most = max(MOST, spent // 2)
        found = GMRES(rtol=GMRES_RTOL, max_steps=most, restart=most).solve(rest, r)
        return Solved(found.value, found.residual, 1.0 - shrink)

    here = _equation(outer, step, lower)
    # A gradient step contracts by 1 minus the smallest curvature; with momentum the two have no such tie.
    solve = loosely(step.operator, 1.0 - shrink if step.symmetric else math.inf, spent)
    found = correct(lower, upper, gradient, u, here, there, response, solve, None if step.symmetric else by_gmres)
    return None if found is None else found.error


def _certificate(
    inner: float, increment: float, shrink: float, displacement: float, error: float | None
) -> Certificate:
    """Judge by the estimated error; an iteration that does not shrink has none."""
    if not shrink < 1.0:
        return Certificate("untrusted", inner, increment, reasons=(_GROWS,))
    hint = (
        f"the last iteration changed the adjoint by {increment:.1e} (raise `max_steps`) and one more inner step "
        f"changes the inner variables by {displacement:.1e} of their size (train the inner problem further)"
    )
    verdict, reasons = judge(error, [], by_design=False, hint=hint)
    return Certificate(verdict, inner, increment, error=error, reasons=tuple(reasons))


_GROWS = (
    "the iteration grows: the inner step is no contraction at this point (a learning rate that is too large, Adam's "
    'normalization at a standstill, or negative curvature); choose method="implicit", or SGD as the inner solver'
)
