"""`check`: a dry run of seconds, in which nothing is trained, and a report of what would not work or not be trusted."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from bilevel.choosing import settled
from bilevel.errors import BilevelError, InvalidValueError
from bilevel.evaluation import check_problem, own_randomness
from bilevel.kinks import without_kinks
from bilevel.preflight.dryrun import DryRun, check_settings
from bilevel.preflight.losses import check_inner_loss, check_outer_loss, check_second_derivatives
from bilevel.preflight.report import Costs, Finding, Report, by_level
from bilevel.preflight.training import (
    check_curvature,
    check_hyperparameters,
    check_steps,
    held_bytes,
    measure,
    unrolled,
)
from bilevel.problem import BilevelProblem
from bilevel.response import ProblemResponse
from bilevel.solvers import CG, MINRES, Cholesky, Estimator, Neumann, estimator
from bilevel.solvers.about import about
from bilevel.solvers.auto import Auto
from bilevel.solvers.implicit import DENSE_UP_TO, Implicit
from bilevel.third_split import measured
from bilevel.vector import size


def check(problem: BilevelProblem, method: str | Estimator = "implicit") -> Report:
    """Report before a long run what will not work or not be trusted, where, and what to do.

    Calls both losses and a few inner steps at the starting point and trains nothing; the user's random state, data
    streams and modules are as before afterwards. It sees the starting point alone: a hypergradient's certificate says
    what holds where training ends.

    Args:
        problem: the problem.
        method: the method of the run to come, a name or an estimator object.

    Returns:
        `.ok` (no error), `.findings`, `.costs`; `str()` of it is a table, `.to_dict()` plain data.

    >>> import torch, bilevel
    >>> problem = bilevel.BilevelProblem(
    ...     lambda w, h: ((w - 1) ** 2).sum(), lambda w, h: (w**2).sum(),
    ...     params=torch.zeros(1, dtype=torch.float64), hparams={"lr": bilevel.positive(0.1)},
    ...     inner_solver=bilevel.inner.SGD(lr=lambda h: h["lr"], steps=10))
    >>> [(f.level, f.subject, f.remedy[:15]) for f in check(problem, "implicit").findings]
    [('error', "hparams['lr']", 'method="unroll"')]
    >>> check(problem, "unroll").ok
    True
    """
    check_problem(problem)
    try:
        named = estimator(method)
    except BilevelError as error:
        message, _, remedy = str(error).partition("; ")
        if not remedy:
            message, _, names = message.partition(", expected ")
            remedy = f"expected {names}"
        return Report(_words(problem), _words(method), (Finding("error", "method", message, remedy),))
    dry = DryRun(problem, Implicit() if isinstance(named, Auto) else named)
    if isinstance(named, Auto):
        with dry.tried("method"):
            dry.method, notes = settled(problem, named)
            dry.add("note", "method", *notes)
    check_settings(dry)
    with own_randomness(problem, seed=0), _left_alone(problem):
        with dry.tried("problem"):
            dry.response = without_kinks(ProblemResponse(problem), dry.lower, dry.upper)
        if dry.response is not None:
            _inspect(dry, dry.response)
    return Report(_words(problem), _words(dry.method), by_level(dict.fromkeys(dry.findings)), dry.costs)


def _words(settings: object) -> str:
    """Return the repr without the addresses of functions, so that two reports can be compared."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(settings))


def _inspect(dry: DryRun, response: ProblemResponse) -> None:
    check_outer_loss(dry, response)
    check_inner_loss(dry, response)
    check_second_derivatives(dry, response)
    check_steps(dry, response)
    check_hyperparameters(dry)
    check_curvature(dry)
    with dry.tried("test_loss"):
        measured(dry.problem, dry.lower, dry.upper)
    costs = Costs()
    with dry.tried("method"):
        costs = _predicted(dry)
    with dry.tried("problem"):
        dry.costs = measure(dry, response, costs)


@contextmanager
def _left_alone(problem: BilevelProblem) -> Iterator[None]:
    """Put buffers and streams of batches back at the end."""
    buffers, position = problem.params.buffers(), problem.position()
    try:
        yield
    finally:
        problem.params.set_buffers(buffers)
        with suppress(InvalidValueError):  # an iterator that cannot go back; it has been reported
            problem.go_to(position)


def _predicted(dry: DryRun) -> Costs:
    """Return what one hypergradient takes by counts, as far as the method says."""
    if dry.system is None:
        return Costs()
    total = None if dry.walk is None else dry.walk.total
    if about(dry.method).unrolls:
        if dry.walk is None:
            return Costs()
        sweep = unrolled(dry)
        held = held_bytes(dry, dry.walk.bytes_per_step, sweep)
        return Costs(gradients=dry.walk.total + sweep.again, products=sweep.products, megabytes=held / 1e6)
    n, held = size(dry.lower), dry.graph_bytes
    if about(dry.method).begins == "last":
        return Costs(megabytes=held / 1e6)  # the first call is another than the rest, and no inner solver runs
    products, matrix = _linear_products(dry, n)
    return Costs(gradients=total, products=products, megabytes=(held + matrix * dry.first.element_size()) / 1e6)


def _linear_products(dry: DryRun, n: int) -> tuple[int | None, int]:
    """Return the products of the linear solve, and the numbers in its dense matrix.

    Conjugate gradients shrink the error by (√κ - 1)/(√κ + 1) a product, κ the condition number measured.
    """
    if not isinstance(dry.method, Implicit):
        return None, 0
    solver = dry.method.linear_solver or (Cholesky() if n <= DENSE_UP_TO else CG())
    if isinstance(solver, Cholesky):
        return n, n * n
    if isinstance(solver, Neumann):
        return solver.max_steps, 0
    if isinstance(solver, (CG, MINRES)) and dry.condition is not None:
        rtol = max(solver.rtol or (1e-8 if dry.double else 1e-5), 1e-16)
        return min(n, math.ceil(0.5 * math.sqrt(dry.condition) * math.log(2.0 / rtol)) + 1), 0
    return None, 0
