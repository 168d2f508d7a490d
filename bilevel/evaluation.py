"""One hypergradient after another of one problem, each starting from what the last one left."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bilevel.certificate import Hypergradient
from bilevel.culprit import module_at_fault
from bilevel.errors import (
    InvalidTypeError,
    InvalidValueError,
    NotTwiceDifferentiableError,
    UntrustedHypergradientError,
    UntrustedHypergradientWarning,
    meant,
)
from bilevel.inner import LBFGS, InnerSolver
from bilevel.inner.base import Decay
from bilevel.kinks import doubt_kinks
from bilevel.problem import BilevelProblem
from bilevel.randomness import fork_random
from bilevel.response import ProblemResponse
from bilevel.solvers.about import about
from bilevel.solvers.base import Estimator, State
from bilevel.vector import Vector

OnUntrusted = Literal["warn", "raise", "ignore"]


@dataclass(frozen=True)
class Evaluation:
    """A hypergradient on named tensors (natural units) and what it took to get it.

    Attributes:
        hypergradient: `gradient` and `params` are `Vector`s.
        inner_loss: the inner loss at the inner solution; None where the method did not look.
        inner_steps: steps of the inner solver.
        inner_status: why the inner solver stopped.
    """

    hypergradient: Hypergradient
    inner_loss: float | None
    inner_steps: int
    inner_status: str


@dataclass
class Evaluator:
    """Hypergradients of one problem by one estimator, with warm starts.

    Attributes:
        lower: the last inner solution, from which the next inner solve starts; None: from `params`.
        state: what the estimator kept.
        slack, factor: see `Response`.
        gradient_floor: norm below which a hypergradient counts as zero, natural units.
        inner_solver: in place of the problem's; None: the problem's.
        notes: what every certificate shall say, for example which method `auto` chose.
    """

    problem: BilevelProblem
    estimator: Estimator
    lower: Vector | None = None
    state: State = None
    gradient_floor: float = 0.0
    slack: float = 1.0
    factor: Tensor | None = None
    inner_solver: InnerSolver | None = None
    notes: tuple[str, ...] = ()

    def __call__(self, upper: Vector, given: Vector | None = None) -> Evaluation:
        """Return the hypergradient at natural hyperparameters `upper`.

        Args:
            upper: the hyperparameters, natural units.
            given: inner variables to take as they are (implicit: as the solution; unrolled: as the start).
        """
        response = ProblemResponse(self.problem, self.gradient_floor, self.inner_solver)
        response.slack, response.factor = self.slack, self.factor
        lower, steps, status = self._inner(response, upper, given)
        try:
            with response.session(about(self.estimator).derivatives):
                found, self.state = self.estimator(response, lower, upper, self.state)
                found = self._doubt_buffers(response, found, upper)
                if not about(self.estimator).unrolls:  # which differentiates its loop, solution or not
                    found = doubt_kinks(response, found, upper, status)
        except NotTwiceDifferentiableError as error:
            where = module_at_fault(lambda: response.at(lower, upper), lambda: response.inner(lower, upper))
            if where is None:
                raise
            raise NotTwiceDifferentiableError(f"{error}; it happens in {where}") from error
        self.lower, self.factor = found.params, response.factor
        idle = idle_solver(self.inner_solver or self.problem.inner_solver, self.estimator)
        notes = (*self.notes, *([f"inner_solver={idle}"] if idle and given is None else []))
        if notes:
            certificate = replace(found.certificate, notes=(*notes, *found.certificate.notes))
            found = replace(found, certificate=certificate)
        return Evaluation(found, response.inner_loss, steps, status)

    def _doubt_buffers(self, response: ProblemResponse, found: Hypergradient, upper: Vector) -> Hypergradient:
        """Mark a hypergradient whose outer loss reads buffers that training moved: no derivative follows them."""
        params = self.problem.params
        moved = params.buffers()
        if not any(not torch.equal(t, params.start_buffers[name]) for name, t in moved.items()):
            return found
        with torch.no_grad():
            after = float(response.loss(found.params, upper))
            params.rewind()
            before = float(response.loss(found.params, upper))
            params.set_buffers(moved)
        if abs(after - before) <= 1e-9 * abs(after):
            return found
        certificate = replace(found.certificate, verdict="untrusted", reasons=(*found.certificate.reasons, _BUFFERS))
        return replace(found, certificate=certificate)

    def _inner(self, response: ProblemResponse, upper: Vector, given: Vector | None) -> tuple[Vector, int, str]:
        """Return where the estimator begins, the inner steps (to be) taken, and why the inner solver stopped."""
        start, begins = self.problem.params.start, about(self.estimator).begins
        if given is None and (begins == "start" or self.lower is None):
            self.problem.params.rewind()  # a run from the start, BatchNorm's statistics included
        if begins == "start":
            # The loop itself is what is differentiated, so it begins where the user's begins.
            taken = response.unroll_steps() if response.has_step else 1
            return start if given is None else given, taken, "steps"
        if given is not None:
            response.held = True
            return given, 0, "given"
        solver = self.inner_solver or self.problem.inner_solver
        check_decay(solver, self.estimator)
        if begins == "last":
            check_smooth(solver, self.estimator)
            return start if self.lower is None else self.lower, 0, "moved by the method"
        solution = response.solve_inner(start if self.lower is None else self.lower, upper)
        return solution.value, solution.steps, solution.status


NEARER = 0.9  # factor of the inner residual of one more training; above it, more of them are no help
TRAININGS = 50  # most at one point


def trained_on(evaluation: Evaluation, again: Callable[[], Evaluation]) -> Evaluation:
    """Train on from an untrusted inner solution while that brings it nearer.

    A loop that takes a fixed number of steps may be too short for its first solution, not for those that begin there.
    """
    before = math.inf
    for _ in range(TRAININGS):
        certificate, done = evaluation.hypergradient.certificate, evaluation.inner_status == "converged"
        residual = certificate.inner_residual
        if certificate.trusted or done or not residual or not residual < NEARER * before:
            break
        before, evaluation = residual, again()
    return evaluation


_BUFFERS = (
    "the outer loss reads buffers that training moved (BatchNorm's running statistics in eval mode), and no derivative "
    "follows them: let the outer loss use batch statistics (train mode), or GroupNorm or LayerNorm"
)


def check_decay(solver: InnerSolver, estimator: Estimator) -> None:
    """Raise where the inner solver ends at a stationary point of something else than `inner_loss`.

    A method that differentiates the step itself sees an L2 term in the gradient, so that one may stay.
    """
    decay: Decay = getattr(solver, "decays_outside_loss", None)
    sees = about(estimator).sees
    if sees == "loop" or decay is None or (decay == "gradient" and sees == "step"):
        return
    unrolled = 'method="unroll"' + ("" if hasattr(solver, "step") else ", with an optimizer of bilevel.inner")
    raise InvalidValueError(
        f"`inner_solver` is {type(solver).__name__} with weight_decay={getattr(solver, 'weight_decay', None)!r}, which "
        "shrinks the weights outside of `inner_loss`: training ends where that loss has no stationary point, and an "
        "implicit method would be wrong there. Put the decay into `inner_loss` (+ decay / 2 * (w**2).sum()) with "
        f"weight_decay=0.0, or differentiate the loop itself: {unrolled}"
    )


def check_smooth(solver: InnerSolver, estimator: Estimator) -> None:
    """Raise where a method that takes its own inner steps would leave out the penalties of the inner solver."""
    penalties: tuple[Any, ...] = getattr(solver, "penalties", ())
    if about(estimator).begins == "last" and penalties:
        raise InvalidValueError(
            f"`inner_solver` is {type(solver).__name__} with penalties that have kinks, and {type(estimator).__name__} "
            'takes plain gradient steps of `inner_loss` alone; write method="implicit"'
        )


def idle_solver(solver: InnerSolver, estimator: Estimator) -> str | None:
    """Return what to say of an inner solver that a method which moves the inner variables itself does not run."""
    if about(estimator).begins != "last" or isinstance(solver, LBFGS):
        return None
    return f"{type(solver).__name__} plays no part: {type(estimator).__name__} takes its own inner steps"


def check_on_untrusted(on_untrusted: str) -> None:
    """Raise for a value that is none of "warn", "raise", "ignore"."""
    if on_untrusted not in get_args(OnUntrusted):
        raise InvalidValueError(
            f"`on_untrusted` is {on_untrusted!r}, expected one of {', '.join(get_args(OnUntrusted))}"
            f"{meant(on_untrusted, get_args(OnUntrusted))}"
        )


def report_untrusted(hypergradient: Hypergradient, on_untrusted: str, stacklevel: int) -> None:
    """Warn or raise, as asked, if the certificate says so."""
    certificate = hypergradient.certificate
    if certificate.trusted or on_untrusted == "ignore":
        return
    message = "the hypergradient is untrusted: " + "; ".join(certificate.reasons)
    if on_untrusted == "raise":
        raise UntrustedHypergradientError(message, certificate)
    warnings.warn(message, UntrustedHypergradientWarning, stacklevel=stacklevel + 1)


@contextmanager
def own_randomness(problem: BilevelProblem, seed: int | None) -> Iterator[None]:
    """Leave torch's global random state as it was, and start from `seed` inside."""
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise InvalidTypeError(f"`seed` is {seed!r}, expected a whole number or None")
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise InvalidValueError(f"`seed` is {seed}, expected a whole number of at most 64 bits")
    with fork_random(next(iter(problem.params.start.values())).device):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def check_problem(problem: Any) -> None:
    """Raise unless it is a `BilevelProblem`."""
    if not isinstance(problem, BilevelProblem):
        raise InvalidTypeError(
            f"`problem` is a {type(problem).__name__}, expected a BilevelProblem; write "
            "bilevel.BilevelProblem(inner_loss, outer_loss, params, hparams)"
        )
