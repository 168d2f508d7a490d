"""What an estimator declares of itself: checks, `method="auto"` and the table in docs/choosing.md read it.

Letters: n inner variables, m hyperparameters, T inner steps, k steps of a linear solver, κ condition of the inner
Hessian, ρ contraction of one inner step. A product is a Hessian-vector product, two to three gradients dear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Begins = Literal["solution", "start", "last"]
"""What `lower` is when the estimator is called: the inner solution; where the inner loop starts, because the estimator
runs it; or wherever the last call left it, because the estimator moves it itself."""

Sees = Literal["losses", "step", "loop"]
"""Which uses of a hyperparameter reach the hypergradient: in the losses; also in the inner step at its fixed point;
in the whole inner loop, learning rates and initial values included."""


@dataclass(frozen=True)
class Terms:
    """Cost and error in words.

    Attributes:
        cost: of one hypergradient, the inner solve not among it.
        memory: what is held beside a few vectors of n.
        error: of the hypergradient, relative, at an exact inner solution.
        source: paper, for the reader who wants more.
    """

    cost: str
    memory: str
    error: str
    source: str


@dataclass(frozen=True)
class About:
    """What an estimator is, needs and costs.

    Attributes:
        begins: see `Begins`.
        sees: see `Sees`.
        derivatives: how many times the inner loss must be differentiable: 2, 1, or 0 for a loop run as it is.
        exact: exact in the limit; False for a method that approximates by design.
        terms: cost and error in words.
        random: it draws random numbers of its own, so that two calls differ and no line search can compare them.
        takes_slack: its default tolerances follow `Response.slack`, its error says how much is too much, and
            `Hypergradient.correction` makes up for what an inexact inner solution does to the outer loss.
    """

    begins: Begins
    sees: Sees
    derivatives: Literal[0, 1, 2]
    exact: bool
    terms: Terms
    random: bool = False
    takes_slack: bool = False

    @property
    def unrolls(self) -> bool:
        """The inner loop is run and its steps are differentiated."""
        return self.begins == "start" and self.derivatives > 0


@dataclass(frozen=True)
class Sizes:
    """What the inner loop takes, in bytes, as measured on a few of its steps.

    Attributes:
        graph: the graph of one step, without what all steps share.
        state: what a step starts from: inner variables, the optimizer's state, random numbers, buffers.
        fixed: what a sweep takes whatever it holds: adjoints, gradients, what a derivative needs while it is taken.
        free: what may be taken where nothing else is asked for; None: as much as it takes.
    """

    graph: int
    state: int
    fixed: int = 0
    free: int | None = None


@dataclass(frozen=True)
class Sweep:
    """What differentiating an inner loop takes; an estimator that unrolls may return it from `sweep(steps, m, sizes)`.

    Attributes:
        products: Hessian-vector or Jacobian-vector products.
        graphs: steps whose graphs are held at once.
        tangents: vectors of the inner variables and the optimizer's state that are held beside them.
        states: starts of steps that are held beside them.
        again: inner steps that are taken more than once, as often as they are.
    """

    products: int
    graphs: int
    tangents: int = 0
    states: int = 0
    again: int = 0


UNDECLARED = About("solution", "losses", 2, True, Terms("not declared", "not declared", "not declared", "-"))


def about(estimator: Any) -> About:
    """Return what an estimator declares; one that declares nothing is taken for an implicit method."""
    declared: About = getattr(estimator, "about", UNDECLARED)
    return declared
