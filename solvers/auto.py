"""Choose a method by what a problem is: sizes, data, inner solver, what the hyperparameters touch, free memory.

The rules, the first that applies:

1. Only the inner loop uses some hyperparameter (a learning rate), or the inner solver decays weights outside of the
   inner loss: `unroll`, which takes steps again where its graphs do not fit into half of the free memory. For a user's
   own loop `zero-order`.
2. Autograd cannot differentiate the inner loss twice: `penalty`, or on minibatches `finite-difference`.
3. The inner data are minibatches and the inner solver needs one fixed loss, as the default L-BFGS does: `soba`, which
   moves the inner variables itself.
4. The inner loop has differentiable steps whose graphs fit into half of the free memory: `unroll`. It is the gradient
   of what the loop computes, converged or not.
5. Else the implicit function theorem: `direct` up to 64 inner variables, and up to 2,000 where conjugate gradients
   would take as many products as there are inner variables; else `implicit`, which begins with conjugate gradients and
   factors the Hessian once they have become dear, or `cg` where the matrix would not fit. On minibatches the mean of 4
   draws of one of `direct` and `cg`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from bilevel.certificate import Hypergradient
from bilevel.errors import InvalidValueError
from bilevel.solvers.about import About, Terms
from bilevel.solvers.averaged import Averaged
from bilevel.solvers.base import Estimator, Response, State
from bilevel.solvers.finite_difference import FiniteDifference
from bilevel.solvers.implicit import DENSE_UP_TO, FACTOR_UP_TO, Implicit
from bilevel.solvers.linear import CG, Cholesky
from bilevel.solvers.penalty import Penalty
from bilevel.solvers.soba import SOBA
from bilevel.solvers.unroll import Unroll
from bilevel.solvers.zero_order import COORDINATES, DIRECTIONS, ZeroOrder
from bilevel.vector import Vector

DRAWS = 4  # minibatches averaged
SHARE = 0.5  # of the free memory that graphs may take
RTOL = 1e-8  # of the linear solve, for the prediction
DENSE_AT_MOST = 2000  # inner variables; the factorization takes n³ / 3


@dataclass(frozen=True)
class Facts:
    """What a choice depends on, measured at the starting point.

    Attributes:
        inner: number of inner variables.
        outer: number of hyperparameters.
        hidden: what the user calls those that only the inner loop uses.
        twice: why the inner loss cannot be differentiated twice; empty where it can.
        fixed: both losses see the same batch at every call.
        steps: of the inner loop, where they can be differentiated; None where they cannot.
        own_loop: the inner solver is a function of the user's, or has settings that no derivative goes through.
        trains: the inner solver can train on these data; False for L-BFGS on minibatches.
        decays: the inner solver shrinks weights outside of the inner loss.
        step_bytes: what the graph of one inner step holds.
        graph_bytes: what the graph of the inner gradient holds.
        number_bytes: of one number.
        free_bytes: memory that is free; None where the system does not say.
        condition: of the inner Hessian; None where it is not positive definite there.
    """

    inner: int
    outer: int
    hidden: tuple[str, ...] = ()
    twice: str = ""
    fixed: bool = True
    steps: int | None = None
    own_loop: bool = False
    trains: bool = True
    decays: bool = False
    step_bytes: int = 0
    graph_bytes: int = 0
    number_bytes: int = 8
    free_bytes: int | None = None
    condition: float | None = None

    @property
    def unrolled_bytes(self) -> int:
        """What the graphs of the whole inner loop hold."""
        return (self.steps or 0) * self.step_bytes

    @property
    def budget(self) -> float:
        """Bytes that graphs may take."""
        return math.inf if self.free_bytes is None else SHARE * self.free_bytes


@dataclass(frozen=True)
class Choice:
    """A method, why it, and what one hypergradient by it is going to take.

    Attributes:
        estimator: the method with its settings.
        name: its name in the table of methods.
        why: a sentence.
        gradients: inner gradients beside the inner solve; None where it cannot be said.
        products: Hessian-vector or Jacobian-vector products; None likewise.
        megabytes: what graphs and matrices hold.
        also: what else it costs, or why the products cannot be said, in words.
    """

    estimator: Estimator
    name: str
    why: str
    gradients: int | None
    products: int | None
    megabytes: float
    also: str = ""

    def __str__(self) -> str:
        counts = ((self.gradients, "gradients"), (self.products, "Hessian-vector products"))
        predicted = [f"{count:,} {name}" for count, name in counts if count is not None]
        also = f"{self.also}{' ' if self.also.endswith(':') else ', '}" if self.also else ""
        return f"auto chose {self.name}: {self.why} (about {also}{', '.join([*predicted, f'{self.megabytes:.3g} MB'])})"


def choose(facts: Facts) -> Choice:
    """Apply the rules at the top of this file."""
    if facts.hidden or facts.decays:
        return _through_the_loop(facts)
    if facts.twice:
        return _first_order(facts)
    if not facts.trains:
        return _single_loop(facts)
    if facts.steps is not None and not facts.own_loop and facts.unrolled_bytes <= facts.budget:
        return _unrolled(
            facts, "the steps of the inner loop can be differentiated and their graphs fit into the memory"
        )
    return _implicit(facts)


def _through_the_loop(facts: Facts) -> Choice:
    if facts.hidden:
        because = f"only the inner loop uses {', '.join(facts.hidden)}"
    else:
        because = "the inner solver decays weights outside of the inner loss"
    if facts.own_loop:
        why, loops = f"{because}, and no derivative goes through it", f"{_loops(facts.outer):,} inner loops"
        return Choice(ZeroOrder(), "zero-order", why, None, 0, 0.0, loops)
    if facts.steps is None:  # nothing sees them: the implicit method says so, and what to do
        return _implicit(facts)
    return _unrolled(facts, because)


def _loops(outer: int) -> int:
    """One for the loss; four for each of a few hyperparameters, two for each direction of many."""
    return 1 + (4 * outer if outer <= COORDINATES else 2 * DIRECTIONS)


def _single_loop(facts: Facts) -> Choice:
    method = SOBA()
    why = (
        "the inner data are minibatches, on which the inner solver cannot train, so the method moves the inner "
        "variables itself; inner_solver=bilevel.inner.Adam(lr=..., steps=...) would train between outer steps"
    )
    held = (facts.graph_bytes + 4 * facts.inner * facts.number_bytes) / 1e6
    also = f"{method.first:,} steps of 2 gradients and a product in the first call; later:"
    return Choice(method, "soba", why, 2 * method.steps, method.steps + 1, held, also)


def _unrolled(facts: Facts, why: str) -> Choice:
    steps, held = facts.steps or 0, facts.unrolled_bytes
    if held <= facts.budget:
        return Choice(Unroll(), "unroll", why, steps, steps, held / 1e6)
    why += "; its graphs do not fit into the memory, so steps are taken again"
    return Choice(Unroll(), "unroll", why, 2 * steps, steps, facts.budget / 1e6)


def _first_order(facts: Facts) -> Choice:
    held = facts.graph_bytes / 1e6
    if facts.fixed and not facts.own_loop:
        why = f"{facts.twice}, and the inner problem can be solved with a part of the outer loss added"
        return Choice(Penalty(), "penalty", why, None, 0, held, "4 inner solves, warm")
    return Choice(FiniteDifference(), "finite-difference", facts.twice, 50, 0, held)


def _implicit(facts: Facts) -> Choice:
    n, steps = facts.inner, _steps(facts)
    few, matrix = n <= DENSE_UP_TO, n * n * facts.number_bytes
    dense = few or (n <= DENSE_AT_MOST and steps is not None and steps >= n and matrix <= facts.budget)
    may_factor = facts.fixed and n <= FACTOR_UP_TO and matrix <= facts.budget
    iterative = (Implicit(), "implicit") if may_factor else (Implicit(CG()), "cg")
    method, name = (Implicit(Cholesky()), "direct") if dense else iterative
    products = n if dense else steps
    why, also = f"{n:,} inner variables, too many for a dense Hessian" + " at once" * may_factor, ""
    if dense:
        why = f"{n:,} inner variables, " + (
            "few enough for a dense Hessian" if few else "for which conjugate gradients would take more products"
        )
    elif steps is None:
        also = (
            "as many products as conjugate gradients need: about 10 sqrt(condition), which cannot be told at the start"
        )
    held = (facts.graph_bytes + (matrix if dense else 0)) / 1e6
    if facts.fixed:
        return Choice(method, name, why, 2, products, held, also)
    why += f"; minibatches: the mean of {DRAWS} draws"
    many = None if products is None else DRAWS * products
    also = f"{DRAWS} times {also}" if also else ""
    return Choice(Averaged(DRAWS, method), f"the mean of {DRAWS} draws of {name}", why, 2 * DRAWS, many, held, also)


def _steps(facts: Facts) -> int | None:
    """Conjugate gradients shrink the error by (√κ - 1)/(√κ + 1) a product, κ the condition number; n at most."""
    if facts.condition is None:
        return None
    return min(facts.inner, math.ceil(0.5 * math.sqrt(facts.condition) * math.log(2.0 / RTOL)) + 1)


@dataclass(frozen=True)
class Auto:
    """Choose a method for the problem; the certificate's notes say which, why, and the predicted cost.

    `bilevel.check(problem, "auto")` says so before a run.
    """

    about: ClassVar[About] = About(
        "solution", "loop", derivatives=2, exact=True, terms=Terms("as chosen", "as chosen", "as chosen", "-")
    )

    def __call__(
        self, response: Response, lower: Vector, upper: Vector, state: State = None
    ) -> tuple[Hypergradient, State]:
        """Refuse: the choice is made where the whole problem is known."""
        raise InvalidValueError(
            '`auto` chooses for a problem and is no part of another method; give method="auto" to solve, '
            "hypergradient, check or compare"
        )
