"""Typed hyperparameters: losses see natural values, the outer optimizer unconstrained ones (`bilevel.ranges`)."""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor, nn

from bilevel.errors import InvalidTypeError, InvalidValueError
from bilevel.layout import Variables
from bilevel.ranges import Hyperparameter, Interval, Positive, Real, Shape, Simplex
from bilevel.selection import Selection
from bilevel.variables import variables
from bilevel.vector import Vector, detach, leaves


def positive(
    value: float | Tensor, shape: Shape = (), *, low: float | None = None, high: float | None = None
) -> Hyperparameter:
    """Make a positive hyperparameter, optimized on a log scale.

    Args:
        value: where it starts, > 0: a number (repeated over `shape`) or a tensor of values.
        shape: its shape when `value` is a number; `()` is a 0-d tensor.
        low: smallest value `solve` goes to; None: 1e-8 of the start value. A strength that validation data
            want to be zero ends here.
        high: largest value `solve` goes to; None: 1e8 times the start value.

    >>> positive(1e-3, shape=(2,)).value
    tensor([0.0010, 0.0010], dtype=torch.float64)
    """
    return Positive(value, shape, low, high)


def interval(value: float | Tensor, low: float, high: float, shape: Shape = ()) -> Hyperparameter:
    """Make a hyperparameter strictly between `low` and `high`, optimized on a logit scale.

    Args:
        value: where it starts, between the ends and not on one.
        low: lower end.
        high: upper end.
        shape: its shape when `value` is a number.
    """
    return Interval(value, low, high, shape)


def simplex(weights: int | Tensor) -> Hyperparameter:
    """Make positive weights that sum to one along the last dimension, optimized as logits of a softmax.

    Args:
        weights: how many (they start equal), or a tensor of positive weights that sum to one.
    """
    if isinstance(weights, int) and not isinstance(weights, bool):
        if weights < 2:
            raise InvalidValueError(f"simplex() needs at least 2 weights, got {weights}")
        return Simplex(1.0 / weights, weights)
    if not isinstance(weights, Tensor):
        raise InvalidTypeError(
            f"simplex(): the weights are a {type(weights).__name__}, expected how many (a whole number) or a Tensor"
        )
    return Simplex(weights, ())


def real(value: float | Tensor, shape: Shape = ()) -> Hyperparameter:
    """Make an unconstrained hyperparameter; a number takes the dtype and device of `params`."""
    return Real(value, shape)


class Hyperparameters:
    """The user's `hparams`: their layout, their natural start values and their ranges.

    Attributes:
        layout: the door to the user's structure; its `start` holds natural values.
    """

    def __init__(self, structure: Any, like: Tensor) -> None:
        self._typed: list[Hyperparameter] = []
        self.kinds: dict[str, Hyperparameter] = {}
        if isinstance(structure, (nn.Module, Selection)):
            self.layout: Variables = variables(structure, "hparams")
            return
        self._original = structure
        typed = optree.tree_leaves(structure, none_is_leaf=True)
        plain = optree.tree_map(lambda leaf: _tensor_of(leaf, like), structure, none_is_leaf=True)
        self.layout = variables(plain, "hparams")
        for name, leaf in zip(self.layout.start, typed, strict=True):
            if isinstance(leaf, Hyperparameter):
                self.kinds[name] = leaf

    def natural(self, free: Vector) -> Vector:
        """Map unconstrained values to natural ones, differentiably."""
        return {name: self.kinds[name].natural(t) if name in self.kinds else t for name, t in free.items()}

    def free(self, natural: Vector) -> Vector:
        """Map natural values to unconstrained ones."""
        return {name: self.kinds[name].free(t) if name in self.kinds else t for name, t in natural.items()}

    def chain(self, free: Vector, natural_gradient: Vector) -> Vector:
        """Return the gradient over unconstrained values that belongs to one over natural values."""
        u = leaves({name: t for name, t in free.items() if name in self.kinds})
        if not u:
            return natural_gradient
        with torch.enable_grad():
            natural = self.natural(u)
        pulled = torch.autograd.grad(list(natural.values()), list(u.values()), [natural_gradient[name] for name in u])
        return {**natural_gradient, **dict(zip(u, pulled, strict=True))}

    def moved(self, natural: Vector, step: Vector) -> Vector:
        """Return natural values a step away, inside of their ranges.

        A step of 0.01 changes a positive number by 1 %, and one without a range by 1 % of its tensor's size.
        """
        found = {}
        for name, t in natural.items():
            kind = self.kinds.get(name, Real(t, ()))
            # In float64, so that a short step is not lost in the rounding of u.
            after = kind.natural(kind.free(t.double()) + self._unit(name, t) * step[name].double()).to(t.dtype)
            if not bool(step[name].any()):
                after = t  # to the last bit: the way to u and back rounds
            low, high = kind.ends(t)
            found[name] = torch.minimum(torch.maximum(after, low), high).detach()
        return found

    def room(self, natural: Vector) -> tuple[Vector, Vector]:
        """Return how long a step of `moved` may be, down and up, before it leaves the range of `solve`; float64."""
        down, up = {}, {}
        for name, t in natural.items():
            kind = self.kinds.get(name, Real(t, ()))
            u, unit = kind.free(t.double()), self._unit(name, t)
            low, high = (end.to(u) for end in kind.bounds())
            down[name], up[name] = (((u - low) / unit).clamp(min=0.0), ((high - u) / unit).clamp(min=0.0))
        return down, up

    def unchained(self, natural: Vector, by_step: Vector) -> Vector:
        """Return the gradient over natural values that belongs to one over steps of `moved`."""
        stretch = {n: self.kinds[n].stretch(t) if n in self.kinds else torch.ones_like(t) for n, t in natural.items()}
        return {name: t / (stretch[name] * self._unit(name, natural[name])) for name, t in by_step.items()}

    def _unit(self, name: str, natural: Tensor) -> float:
        """Return what a step of 1 adds to an unconstrained value."""
        if not isinstance(self.kinds.get(name, Real(natural, ())), Real):
            return 1.0
        return float(natural.double().square().mean().sqrt()) or 1.0

    def read(self, structure: Any, source: str) -> Vector:
        """Return the natural values of a structure like the user's, typed leaves or plain tensors."""
        like = next(iter(self.layout.start.values()))
        if not isinstance(structure, (nn.Module, Selection)):
            structure = optree.tree_map(lambda leaf: _tensor_of(leaf, like), structure, none_is_leaf=True)
        natural = detach(self.layout.read(structure, source))
        for name, kind in self.kinds.items():
            if not kind.contains(natural[name]):
                values = f"{natural[name].min().item():.4g} to {natural[name].max().item():.4g}"
                raise InvalidValueError(
                    f"{source}: {self.layout.label(name)} has values from {values}, outside of the range of {kind!r}; "
                    "give natural values"
                )
        return natural

    def bounds(self) -> tuple[Vector, Vector]:
        """Return the lowest and the highest unconstrained values; infinite for no limit."""
        start = self.free(self.layout.start)
        ends = {name: self.kinds.get(name, Real(t, ())).bounds() for name, t in self.layout.start.items()}
        # A start value outside of the default range widens it: a run begins where the user said.
        low = {name: torch.minimum(ends[name][0].to(u), u) for name, u in start.items()}
        high = {name: torch.maximum(ends[name][1].to(u), u) for name, u in start.items()}
        return low, high

    def write_back(self, natural: Vector) -> None:
        """Copy values into the user's tensors, and into the start values of typed hyperparameters."""
        self.layout.write_back(natural)
        for name, kind in self.kinds.items():
            kind.value.copy_(natural[name])


def _tensor_of(leaf: Any, like: Tensor) -> Any:
    return leaf.tensor(like) if isinstance(leaf, Hyperparameter) else leaf
