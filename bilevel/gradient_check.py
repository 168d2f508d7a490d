"""`check_gradient`: a hypergradient against finite differences of re-solved inner problems."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bilevel.choosing import settled
from bilevel.errors import InvalidValueError
from bilevel.evaluation import Evaluator, check_problem, own_randomness
from bilevel.inner import LBFGS, Proximal
from bilevel.problem import BilevelProblem
from bilevel.response import ProblemResponse
from bilevel.solvers import Estimator
from bilevel.solvers.about import about
from bilevel.vector import Vector, axpy, detach, dot, norm, scale, size

# Steps tried along each direction, relative to the size of the unconstrained hyperparameters. A central difference errs
# by step^2 at the long end and by noise / step at the short one; the pair of steps that agree best decides.
STEPS = tuple(10.0**-k for k in (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5, 6))
AGREEMENT = 1e-2  # largest disagreement, relative to the hypergradient or to the noise of the differences, that passes
TIGHT = 1e-12  # rtol of the inner L-BFGS between differences


@dataclass(frozen=True)
class Direction:
    """One direction: the slope by the hypergradient and by finite differences, with its uncertainty."""

    by_hypergradient: float
    by_differences: float
    uncertainty: float


@dataclass(frozen=True)
class GradientCheck:
    """The outcome of `check_gradient`; `str()` of it is what a person reads.

    Attributes:
        directions: slopes along random directions of the unconstrained hyperparameters.
        cosine: between the vectors of slopes of both kinds.
        ratio: norm of the hypergradient's slopes over that of the differences'.
        verdict: the certificate's, of the hypergradient that was checked.
        passed: every direction agrees within 1 % of the largest slope, or within the noise of the differences.
        conclusive: the differences are precise enough (5 %) to tell.
    """

    directions: tuple[Direction, ...]
    cosine: float
    ratio: float
    verdict: str
    passed: bool
    conclusive: bool

    def __str__(self) -> str:
        lines = [f"{'hypergradient':>15}  {'differences':>15}  {'uncertainty':>12}"]
        lines += [
            f"{d.by_hypergradient:15.7e}  {d.by_differences:15.7e}  {d.uncertainty:12.1e}" for d in self.directions
        ]
        lines.append(f"cosine {self.cosine:.6f}, ratio {self.ratio:.6f}, certificate: {self.verdict}")
        outcome = "passed" if self.passed else "FAILED: the hypergradient is not the slope of the outer loss"
        if not self.conclusive:
            outcome = (
                "INCONCLUSIVE: the finite differences are too noisy to tell; use float64, train the inner problem to a "
                "smaller residual, or remove randomness from the losses"
            )
        return "\n".join([*lines, outcome])


def check_gradient(
    problem: BilevelProblem, method: str | Estimator = "implicit", *, directions: int = 3, seed: int = 0
) -> GradientCheck:
    """Compare the hypergradient with central differences of F along random directions.

    For an implicit method the inner problem is solved again at every point, by L-BFGS and Proximal to rtol 1e-12; for
    an unrolled one the loop is run again. Minibatches and random numbers are the same at every point.

    Args:
        problem: the problem, checked at the start values of its hyperparameters.
        method: a name or an estimator object.
        directions: number of random directions, at most that of the hyperparameters; each costs 22 inner solves.
        seed: of the directions and of the random numbers inside the losses.
    """
    check_problem(problem)
    directions = min(directions, size(problem.hparams.layout.start)) if directions >= 1 else directions
    if directions < 1:
        raise InvalidValueError(f"`directions` is {directions}, expected at least 1")
    method, _ = settled(problem, method)
    hparams = problem.hparams
    free = hparams.free(hparams.layout.start)
    position = problem.position()
    with own_randomness(problem, seed):
        found = Evaluator(problem, method)(hparams.layout.start).hypergradient
    problem.go_to(position)
    slope = hparams.chain(free, found.gradient)
    generator = torch.Generator().manual_seed(seed)

    def outer_loss(at: Vector) -> float:
        with own_randomness(problem, seed):
            value = _outer_loss(problem, method, detach(hparams.natural(at)), found.params)
        problem.go_to(position)
        return value

    rows = []
    for _ in range(directions):
        d = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for n, t in free.items()}
        d = scale(1.0 / float(norm(d)), d)
        difference, uncertainty = _slope(outer_loss, free, d)
        rows.append(Direction(float(dot(slope, d)), difference, uncertainty))
    return _judge(rows, found.certificate.verdict)


def _outer_loss(problem: BilevelProblem, method: Estimator, upper: Vector, near: Vector) -> float:
    """Return F(λ): train, from `near` for an implicit method, and evaluate."""
    solver = problem.inner_solver
    if isinstance(solver, LBFGS | Proximal):
        solver = replace(solver, rtol=TIGHT)
    response = ProblemResponse(problem, inner_solver=solver)
    problem.params.rewind()
    if about(method).unrolls:
        w, state = detach(problem.params.start), response.initial_state(problem.params.start)
        for t in range(response.unroll_steps()):
            w, state = response.step(w, state, upper, t)
    else:
        w = response.solve_inner(near, upper).value
    return float(response.loss(detach(w), upper).detach())


def _slope(outer_loss: Callable[[Vector], float], at: Vector, d: Vector) -> tuple[float, float]:
    """Return the central difference along d, and its uncertainty: its distance from that of the next step size."""
    unit = max(1.0, float(norm(at)) / math.sqrt(max(1, sum(t.numel() for t in at.values()))))
    slopes = []
    for step in STEPS:
        h = step * unit
        slopes.append((outer_loss(axpy(h, d, at)) - outer_loss(axpy(-h, d, at))) / (2.0 * h))
    pairs = [(abs(a - b), b) for a, b in itertools.pairwise(slopes) if math.isfinite(a - b)]
    uncertainty, best = min(pairs, default=(math.inf, math.nan))
    return best, uncertainty


def _judge(rows: list[Direction], verdict: str) -> GradientCheck:
    ours = torch.tensor([row.by_hypergradient for row in rows], dtype=torch.float64)
    theirs = torch.tensor([row.by_differences for row in rows], dtype=torch.float64)
    both = float(ours.norm() * theirs.norm())
    largest = float(theirs.abs().max())
    return GradientCheck(
        tuple(rows),
        cosine=float(ours @ theirs) / both if both > 0.0 else float(both == 0.0 and bool((ours == theirs).all())),
        ratio=float(ours.norm() / theirs.norm()) if float(theirs.norm()) > 0.0 else math.nan,
        verdict=verdict,
        passed=all(abs(r.by_hypergradient - r.by_differences) <= AGREEMENT * largest + 3 * r.uncertainty for r in rows),
        conclusive=all(row.uncertainty <= 5e-2 * largest for row in rows),
    )
