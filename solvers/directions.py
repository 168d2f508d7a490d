"""The three directions of a single-loop method, on one draw of batches after another.

    D_w = ∂g/∂w (w, λ)      D_v = H(w, λ) v - ∂f/∂w (w, λ)      D_λ = ∂f/∂λ (w, λ) - (∂R/∂λ)^T v

Dagréou, Ablin, Vaiter and Moreau, A framework for bilevel optimization that enables stochastic and global variance
reduction algorithms, NeurIPS 2022, equations 5 to 7. All three vanish where w and v solve their equations and λ is
stationary, and all three are sums over examples, so a minibatch of each is unbiased.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bilevel.solvers.base import Linearization, OuterGradient, Response, add_terms, negative, outer_gradient
from bilevel.vector import Vector, norm, subtract

UNSEEN = (
    "neither loss uses it (or it was detached: .detach(), .item(), float()), and a single-loop method sees nothing "
    'else. If the inner solver uses it (a learning rate, a schedule), choose method="unroll"; otherwise take it out of '
    "`hparams`"
)


@dataclass(frozen=True)
class Directions:
    """The directions on one draw.

    Attributes:
        lower: D_w.
        adjoint: D_v.
        upper: D_λ; None where it was not asked for.
        loss: the outer loss.
        product: H v, of the batch alone.
        rhs: |∂f/∂w|, of the batch alone.
    """

    lower: Vector
    adjoint: Vector
    upper: Vector | None
    loss: float
    product: Vector
    rhs: float


class Joint(Linearization):
    """R at one point with its graph, where one backward pass reaches w and λ at once."""

    def pull_both(self, v: Vector) -> tuple[Vector, dict[str, Tensor | None]]:
        """Return H v and (dR/dλ)^T v; this costs little more than H v alone, and counts as one product."""
        self._cost.products += 1
        onto = {f"{kind} {name}": t for kind, at in (("w", self._lower), ("h", self._upper)) for name, t in at.items()}
        grads = self._pull(onto, v)
        product = {n: torch.zeros_like(t) if (g := grads[f"w {n}"]) is None else g for n, t in self._lower.items()}
        return product, {name: grads[f"h {name}"] for name in self._upper}


class Source(Protocol):
    """Where directions come from: one draw after another."""

    exact: bool
    """Every draw is the whole problem."""
    outer: OuterGradient
    system: Joint
    """What the last draw was differentiated from."""

    def linearize(self, w: Vector, upper: Vector) -> Linearization:
        """Return the inner gradient on the next draw; fills `system`."""
        ...

    def look(self, w: Vector, upper: Vector) -> None:
        """See the next draw: fills `outer` and `system`."""
        ...

    def sample(self, k: int, w: Vector, upper: Vector) -> Linearization:
        """Return the inner gradient on the k-th of a few draws."""
        ...

    def directions(self, w: Vector, v: Vector, upper: Vector, outward: bool) -> Directions:
        """Return the directions on the next draw, D_λ among them where `outward`."""
        ...

    def memory(self) -> Any:
        """Return what the next call's source starts from, as plain values."""
        ...


class Minibatches:
    """Directions on the batch at hand, one draw after another."""

    def __init__(self, response: Response) -> None:
        self._response, self.exact = response, not response.stochastic
        self._drawn = False
        self._linear_at: Vector | None = None
        self._outer_at: Vector | None = None

    def linearize(self, w: Vector, upper: Vector) -> Linearization:
        """See `Source.linearize`; on fixed data, once for each w."""
        if self._drawn and not self.exact:
            self._response.redraw()
        self._drawn = True
        if not self.exact or self._linear_at is not w:
            self.system, self._linear_at = Joint(self._response, w, upper), w
        return self.system

    def look(self, w: Vector, upper: Vector) -> None:
        """See `Source.look`."""
        self.linearize(w, upper)
        if not self.exact or self._outer_at is not w:
            self.outer, self._outer_at = outer_gradient(self._response, w, upper), w

    def sample(self, k: int, w: Vector, upper: Vector) -> Linearization:
        """See `Source.sample`."""
        if k:
            self._response.redraw()
        return Linearization(self._response, w, upper)

    def directions(self, w: Vector, v: Vector, upper: Vector, outward: bool) -> Directions:
        """See `Source.directions`."""
        self.look(w, upper)
        found = None
        if outward:
            product, through = self.system.pull_both(v)
            found = add_terms(self._response, self.outer.upper, negative(through), upper, UNSEEN)
        else:
            product = self.system.operator(v)
        defect = subtract(product, self.outer.lower)
        return Directions(self.system.residual, defect, found, self.outer.loss, product, float(norm(self.outer.lower)))

    def memory(self) -> Any:
        """See `Source.memory`."""
        return None
