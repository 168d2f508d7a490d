"""What a family of models gives back, and the run over a bilevel problem whose inner solutions are watched."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bilevel.inner.base import InnerSolution, InnerSolver, Task
from bilevel.outer import solve
from bilevel.problem import BilevelProblem
from bilevel.prox.base import Penalty
from bilevel.response import ProblemResponse
from bilevel.solution import Record, Solution
from bilevel.vector import Vector, detach

RISES = 3  # strengths in a row that are worse than the best: the end of what is tried before the run
FLAT = 1e-2  # times `tol`: a step that lowers the outer loss, nats a row, by less is the last

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Options:
    """Settings of a run.

    Attributes:
        spread: see `prior`; None: no prior.
        max_steps: most outer steps.
        tol: see `bilevel.solve`.
        verbose: 0: silent.
    """

    spread: float | None
    max_steps: int
    tol: float
    verbose: int


@dataclass(frozen=True)
class Row:
    """One point that was evaluated.

    Attributes:
        params: settings of the estimator, in scikit-learn's units.
        own: strengths as parts of the common one, one for each name of the grouping; None: there is one strength.
        strengths: the name of the setting that is the common strength, and the strengths in its units.
        scale: what columns are divided by, `(d,)`; None: nothing.
        scores: of the folds, larger is better.
        train_scores: the same on the training rows.
        loss: the outer loss without the prior.
        seconds: of training.
    """

    params: dict[str, Any]
    own: Floats | None
    strengths: tuple[str, Floats]
    scale: Floats | None
    scores: Floats
    train_scores: Floats
    loss: float
    seconds: float


@dataclass(frozen=True)
class Tuned:
    """The end of a search.

    Attributes:
        rows: all points that were evaluated.
        best: which of them the run ended at.
        solution: the outer run; None for models in closed form.
        status: why the run ended.
    """

    rows: list[Row]
    best: int
    solution: Solution | None
    status: str


@dataclass
class Watched:
    """An inner solver whose solutions are shown to `see` with the seconds that they took."""

    solver: InnerSolver
    see: Callable[[Vector, Vector, float], Any]
    needs_fixed_loss: ClassVar[bool] = True
    penalties: tuple[Penalty, ...] = field(default=())

    def solve(self, task: Task, lower: Vector, upper: Vector) -> InnerSolution:
        """See `bilevel.inner.InnerSolver.solve`."""
        begun = time.perf_counter()
        solution = self.solver.solve(task, lower, upper)
        self.see(detach(solution.value), detach(upper), time.perf_counter() - begun)
        return solution


def run(problem: BilevelProblem, method: Any, options: Options) -> Solution:
    """Tune, until the gradient is small or a step gains next to nothing: at a kink of a lasso no gradient is small."""
    last, flat = [math.inf], False

    def stop(record: Record) -> None:
        nonlocal flat
        last.append(record.outer_loss)
        flat = last[-2] - last[-1] < FLAT * options.tol
        if flat:
            raise KeyboardInterrupt

    solution = solve(
        problem,
        method,
        steps=options.max_steps,
        tol=options.tol,
        progress=options.verbose > 0,
        callbacks=[stop],
    )
    if not solution.status.startswith("interrupted"):
        return solution
    if not flat:
        raise KeyboardInterrupt
    return replace(solution, status=f"converged: the last step lowered the outer loss by {last[-2] - last[-1]:.1e}")


def try_each(problem: BilevelProblem, name: str, values: Sequence[float], losses: Callable[[], list[float]]) -> None:
    """Train at several values of one hyperparameter, each from the last solution, until the losses only rise.

    Args:
        problem: its inner solver is watched.
        name: of the hyperparameter.
        values: in order.
        losses: returns the outer losses so far.
    """
    lower, upper = problem.params.start, dict(problem.hparams.layout.start)
    for value in values:
        upper[name] = upper[name] * 0.0 + value
        lower = ProblemResponse(problem).solve_inner(lower, upper).value
        seen = losses()
        if len(seen) - int(np.argmin(seen)) > RISES:
            return


def prior(own: Tensor, spread: float, rows: int) -> Tensor:
    """Return the deviance a row of strengths that are log-normal around the common one.

    Args:
        own: strengths as parts of the common one.
        spread: standard deviation of their logarithms.
        rows: the loss that it is added to is a mean over so many.
    """
    return 0.5 * ((own.log() / spread) ** 2).sum() / rows
