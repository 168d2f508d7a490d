"""A problem whose hypergradient is known.

The truth comes from Newton's method to the last digit and a dense solve with `torch.func` in float64. It shares no code
with the library's own solvers.

    dF/dλ = ∂f/∂λ - (∂²g/∂w∂λ)^T (∂²g/∂w²)^+ ∂f/∂w      at w = argmin g(·, λ)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import optree
import torch
from torch import Tensor, nn

from bilevel import inner
from bilevel.problem import BilevelProblem
from bilevel.ranges import Hyperparameter
from bilevel.vector import Vector, flatten, unflatten

NULL = 1e-10  # an eigenvalue this small, relative to the largest, is a direction that the inner loss does not bend


@dataclass(frozen=True)
class Truth:
    """What is known of a problem at one point.

    Attributes:
        outer_loss: F(λ).
        gradient: dF/dλ in natural units, in the structure of `hparams`.
        params: the inner solution, in the structure of `params`.
        curvature: the smallest eigenvalue of the inner Hessian that is not zero, and the largest.
    """

    outer_loss: float
    gradient: Any
    params: Any
    curvature: tuple[float, float]


@dataclass(frozen=True)
class KnownProblem:
    """A small float64 problem with a known hypergradient.

    Attributes:
        name: for messages.
        inner_loss: `(params, hparams) -> scalar`; so is outer_loss.
        params: where the inner variables start.
        hparams: typed hyperparameters in a nested structure.

    >>> import bilevel.testing
    >>> ridge = bilevel.testing.known_problems()[0]
    >>> torch.allclose(bilevel.hypergradient(ridge.problem()).gradient, ridge.truth.gradient, rtol=1e-8)
    True
    """

    name: str
    inner_loss: Callable[[Any, Any], Tensor]
    outer_loss: Callable[[Any, Any], Tensor]
    params: Any
    hparams: Any

    def problem(self, inner_solver: Any = None) -> BilevelProblem:
        """Return the problem for the library, with copies of the start values."""
        params, hparams = copy.deepcopy((self.params, self.hparams))
        return BilevelProblem(self.inner_loss, self.outer_loss, params, hparams, inner_solver=inner_solver)

    @cached_property
    def truth(self) -> Truth:
        """The truth at the start values of `hparams`."""
        return self.truth_at(optree.tree_map(_natural, self.hparams))

    def truth_at(self, hparams: Any) -> Truth:
        """Return the truth at natural values `hparams`, from Newton's method and a dense solve."""
        h, as_hparams = _ravel(hparams)
        start, as_params = _ravel(self.params)

        def g(w: Tensor, h: Tensor) -> Tensor:
            return self.inner_loss(as_params(w), as_hparams(h))

        def f(w: Tensor, h: Tensor) -> Tensor:
            return self.outer_loss(as_params(w), as_hparams(h))

        w = _newton(lambda w: g(w, h), start)
        slope = torch.func.grad(g)
        values, vectors = torch.linalg.eigh(torch.func.jacrev(slope)(w, h))
        bent = values.abs() > NULL * values.abs().max()
        of_w, of_h = torch.func.grad(f, argnums=(0, 1))(w, h)
        adjoint = vectors[:, bent] @ ((vectors[:, bent].T @ of_w) / values[bent])
        gradient = of_h - torch.func.jacrev(slope, argnums=1)(w, h).T @ adjoint
        low, high = values[bent].aminmax()
        return Truth(float(f(w, h)), as_hparams(gradient), self._export(w), (float(low), float(high)))

    def stepwise(self, accuracy: float = 1e-14) -> inner.SGD:
        """Return the heavy-ball method for this problem, of as many steps as shrink an error to `accuracy`.

        Polyak, Some methods of speeding up the convergence of iteration methods, USSR Comput. Math. 4 (1964): the best
        step and momentum for the curvature at the inner solution. Start it there.
        """
        low, high = (math.sqrt(value) for value in self.truth.curvature)
        rate = (high - low) / (high + low)
        # Both roots of the recursion are `rate`, so the error falls like steps * rate^steps: half as many again.
        steps = math.ceil(1.5 * math.log(accuracy) / math.log(rate)) if rate > 0.0 else 1
        return inner.SGD(lr=4.0 / (low + high) ** 2, momentum=rate**2, steps=steps)

    def _export(self, w: Tensor) -> Any:
        _, as_params = _ravel(self.params)
        if not isinstance(self.params, nn.Module):
            return as_params(w)
        module = copy.deepcopy(self.params)
        module.load_state_dict(as_params(w).tensors, strict=False)
        return module


class _Bound:
    """A module with other tensors in place of its parameters, without state."""

    def __init__(self, module: nn.Module, tensors: Vector) -> None:
        self.module, self.tensors = module, tensors

    def __call__(self, *args: Any) -> Any:
        return torch.func.functional_call(self.module, self.tensors, args)

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        return self.tensors.items()


def _natural(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, Hyperparameter) else leaf


def _ravel(structure: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Return all numbers as one 1-d tensor, and the way back."""
    if isinstance(structure, nn.Module):
        module, named = structure, {name: p.detach() for name, p in structure.named_parameters()}
        return flatten(named), lambda flat: _Bound(module, unflatten(flat, named))
    tensors, spec = optree.tree_flatten(structure)
    named = {str(i): t for i, t in enumerate(tensors)}
    return flatten(named), lambda flat: optree.tree_unflatten(spec, list(unflatten(flat, named).values()))


def _newton(loss: Callable[[Tensor], Tensor], w: Tensor) -> Tensor:
    """Minimize by Newton steps with |eigenvalues| and backtracking; end where the gradient stops shrinking."""
    slope = torch.func.grad(loss)
    bend = torch.func.jacrev(slope)  # reverse twice: forward mode in torch 2.13 warns of torch.jit
    for _ in range(500):
        gradient = slope(w)
        values, vectors = torch.linalg.eigh(bend(w))
        bent = values.abs() > NULL * values.abs().max()
        step = vectors[:, bent] @ ((vectors[:, bent].T @ gradient) / values[bent].abs())
        size, value, decrease = 1.0, float(loss(w)), float(gradient @ step)
        if decrease <= 1e-12 * (1.0 + abs(value)):  # too small to be seen in values: only the gradient still tells
            if not float(slope(w - step).norm()) < 0.5 * float(gradient.norm()):
                return w
        else:
            while float(loss(w - size * step)) > value - 1e-4 * size * decrease:
                size /= 2.0
        w = w - size * step
    raise AssertionError("Newton's method did not come to an end")
