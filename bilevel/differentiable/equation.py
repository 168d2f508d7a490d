"""The implicit function theorem as an autograd function that can be differentiated to any order.

    R(x, a) = 0      dx/da^T g = -(∂R/∂a)^T u      with  A^T u = g,  A = ∂R/∂x

Krantz and Parks, The Implicit Function Theorem, Birkhäuser 2002; Blondel et al., Efficient and modular implicit
differentiation, NeurIPS 2022. The backward pass computes u, which is itself the root of a residual,

    S(u; g, x, a) = A(x, a)^T u - g = 0,

and so is attached to g, x and a by the same theorem: each order of derivatives is one more level of this recursion.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bilevel.certificate import Cost
from bilevel.differentiable.trust import Trust
from bilevel.errors import InvalidValueError, NonFiniteError
from bilevel.operators import Pairs
from bilevel.solvers.base import Linearization, RootCondition, negative
from bilevel.solvers.implicit import default_solver, solve_safely
from bilevel.solvers.linear import LinearSolver
from bilevel.vector import Vector, detach, is_finite, leaves, norm, zeros_like

CAUTION = 100.0  # |A^-1| may be this many times what one solve shows of it


class AdjointCondition:
    """S(u; g, x, a) = A(x, a)^T u - g, whose derivative with respect to u is A^T.

    `lower` is u; `upper` holds g, x and a, their names marked.
    """

    def __init__(self, base: RootCondition) -> None:
        self._base = base
        self.cost: Cost = base.cost
        self.second_moment: Vector | None = None
        self.pairs: Pairs | None = None
        self.factor: Tensor | None = None
        self.members: int | None = None

    @staticmethod
    def upper(rhs: Vector, lower: Vector, upper: Vector) -> Vector:
        """Return g, x and a as one vector."""
        return _marked("g", rhs) | _marked("x", lower) | _marked("a", upper)

    def at(self, lower: Vector, upper: Vector) -> AbstractContextManager[Any]:
        """See `RootCondition.at`."""
        return self._base.at(_of("x", upper), _of("a", upper))

    def residual(self, lower: Vector, upper: Vector) -> Vector:
        """See `RootCondition.residual`."""
        x, a = _of("x", upper), _of("a", upper)
        pulled = _pulled(self._base, x, a, lower, onto=x)
        with torch.enable_grad():
            return {n: _or_zero(pulled[n], g) - g for n, g in _of("g", upper).items()}


class Matrix:
    """A^T (or A) at one point: solved with many right-hand sides, factored once where its solver factors."""

    def __init__(self, solver: LinearSolver | None, symmetric: bool, trust: Trust) -> None:
        self._solver, self._symmetric, self._trust = solver, symmetric, trust
        self._factored: Any = None
        self.curvature: float | None = None

    def solve(self, system: Linearization, rhs: Vector) -> Vector:
        """Return the solution; doubts go to `trust`."""
        operator = system.operator if self._symmetric else replace(system.operator, symmetric=False)
        size = float(norm(rhs))
        if size == 0.0:
            return zeros_like(rhs)
        if self._factored is not None:
            found: Vector = self._factored(rhs)
            return found
        solver = self._solver or default_solver(operator)
        solution, _ = solve_safely(solver, operator, rhs)
        if self._symmetric:
            self.curvature = self._trust.curvature(operator, solution)
        self._trust.linear(solution, self.curvature, solver.truncates, size)
        self._factored = solution.inverse if solution.status == "converged" else None
        return solution.value


class ImplicitEquation:
    """R(x, a) = 0 at one solution, and how to pull gradients back through it.

    Args:
        condition: R.
        symmetric: A is symmetric, since R is a gradient.
        solver: for the linear systems; None: by size.
        trust: where doubts go.
        size: the size of x, against which an error of x counts; None: no error of x is looked for.
    """

    def __init__(
        self, condition: RootCondition, symmetric: bool, solver: LinearSolver | None, trust: Trust, size: float | None
    ) -> None:
        self._condition, self._symmetric, self._trust, self._size = condition, symmetric, trust, size
        self._transposed = Matrix(solver, symmetric, trust)  # A^T
        self._straight = self._transposed if symmetric else Matrix(solver, symmetric, trust)

    def adjoint(self) -> ImplicitEquation:
        """Return the equation that u solves, at the same point, with the same factors."""
        result = ImplicitEquation(AdjointCondition(self._condition), self._symmetric, None, self._trust, None)
        result._transposed, result._straight = self._straight, self._transposed
        return result

    def pull_back(self, lower: Vector, upper: Vector, rhs: Vector) -> dict[str, Tensor | None]:
        """Return (dx/da)^T g, itself differentiable where autograd records."""
        refuse_transforms()
        if not is_finite(rhs):
            raise NonFiniteError("the gradient that came back to the solution is not finite", "gradient")
        with torch.no_grad():
            system = Linearization(self._condition, lower, upper)
            u = self._transposed.solve(system, detach(rhs))
            if float(norm(u)) > 0.0:
                self._check_solution(system, detach(lower), detach(upper), norm(u) / norm(rhs))
        if not torch.is_grad_enabled():
            return negative(system.pull_back(u))
        u = attach(self.adjoint(), u, AdjointCondition.upper(rhs, lower, upper))
        x, a = _aliases(lower), _aliases(upper)
        return negative(_pulled(self._condition, x, a, u, onto=a))

    def _check_solution(self, system: Linearization, lower: Vector, upper: Vector, stretch: Tensor) -> None:
        """Estimate once how far x is from the root, by a Newton step; a bound far below any doubt will do.

        Args:
            system: R linearized at x.
            lower: x.
            upper: a.
            stretch: |u| / |g|, a lower bound of |A^-1|.
        """
        size, self._size = self._size, None
        if size is None:
            return
        left, curvature = float(norm(system.residual)), self._transposed.curvature
        bound = left / curvature if curvature is not None and curvature > 0.0 else CAUTION * left * float(stretch)
        if bound <= self._trust.far * size:
            return
        if not self._symmetric:
            zero = zeros_like(lower)
            system_of_a = Linearization(
                AdjointCondition(self._condition), zero, AdjointCondition.upper(zero, lower, upper)
            )
        step = self._straight.solve(system if self._symmetric else system_of_a, system.residual)
        self._trust.solution(float(norm(step)), size, left)


def refuse_transforms() -> None:
    """Raise inside of torch.func, whose tensors hold no numbers that a solver could look at."""
    if torch._C._are_functorch_transforms_active():
        # A RuntimeError, as torch itself raises: who tries a batched product first falls back to single ones.
        raise RuntimeError(
            "solvers look at numbers, which tensors inside of torch.func (vmap, grad, jacrev) or of vectorize=True do "
            "not have; use torch.autograd.grad or torch.autograd.functional (jacobian, hessian) without vectorize=True"
        )


class _Attach(torch.autograd.Function):
    """Give a solution the graph that its equation defines."""

    @staticmethod
    def forward(ctx: Any, equation: ImplicitEquation, value: Vector, names: list[str], *given: Tensor) -> Any:
        found = tuple(t.detach().clone() for t in value.values())
        ctx.save_for_backward(*found, *given)
        ctx.equation, ctx.lower, ctx.upper = equation, list(value), names
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        saved = ctx.saved_tensors
        lower = dict(zip(ctx.lower, saved, strict=False))
        upper = dict(zip(ctx.upper, saved[len(lower) :], strict=True))
        pulled = ctx.equation.pull_back(lower, upper, dict(zip(lower, gradients, strict=True)))
        return None, None, None, *(pulled[name] for name in upper)


def attach(equation: ImplicitEquation, value: Vector, upper: Vector) -> Vector:
    """Return `value` with a graph to `upper`, through the equation that it solves."""
    return dict(zip(value, _Attach.apply(equation, value, list(upper), *upper.values()), strict=True))  # type: ignore[no-untyped-call]


def paths(condition: RootCondition, value: Vector, upper: Vector, source: str) -> list[str]:
    """Return the arguments that R depends on; raise for a tensor from outside that would lose its derivative."""
    w, h = leaves(value), leaves(upper)
    residual = condition.residual(w, h)
    if not is_finite(residual):
        raise NonFiniteError(f"{source} is not finite at the solution", "residual")
    own = {id(t): name for name, t in [*w.items(), *h.items()]}
    seen = []
    for leaf in _graph_leaves(residual):
        if id(leaf) not in own:
            raise InvalidValueError(
                f"{source} uses a tensor of shape {tuple(leaf.shape)} that requires a gradient and is none of its "
                "arguments, so that no derivative would reach it; hand it over as one more argument, or call .detach() "
                "on it (.requires_grad_(False) on a module) if it is a constant"
            )
        seen.append(own[id(leaf)])
    return [name for name in h if name in seen]


def _graph_leaves(tensors: Vector) -> list[Tensor]:
    waiting: list[Any] = [t.grad_fn for t in tensors.values()]
    seen, found = set(), []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting.extend(parent for parent, _ in node.next_functions)
    return found


def _pulled(condition: RootCondition, x: Vector, a: Vector, v: Vector, onto: Vector) -> dict[str, Tensor | None]:
    """Return (∂R/∂onto)^T v with its graph; None where R does not use a tensor."""
    with torch.enable_grad():
        attached = {n: t for n, t in condition.residual(x, a).items() if t.requires_grad}
        if not attached:
            return dict.fromkeys(onto)
        with condition.at(x, a):
            found = torch.autograd.grad(
                list(attached.values()),
                list(onto.values()),
                [v[n] for n in attached],
                create_graph=True,
                allow_unused=True,
            )
    return dict(zip(onto, found, strict=True))


def _aliases(v: Vector) -> Vector:
    """Return new nodes with the same values and graphs, so that derivatives with respect to them are partial ones."""
    with torch.enable_grad():
        return {n: t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for n, t in v.items()}


def _marked(mark: str, v: Vector) -> Vector:
    return {f"{mark}:{name}": t for name, t in v.items()}


def _of(mark: str, v: Vector) -> Vector:
    return {name.removeprefix(f"{mark}:"): t for name, t in v.items() if name.startswith(f"{mark}:")}


def _or_zero(t: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if t is None else t
