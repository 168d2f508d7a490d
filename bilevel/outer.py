"""`hypergradient` and `solve`: the outer problem."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from bilevel.certificate import Hypergradient
from bilevel.checkpoint import Checkpoint, Keeper
from bilevel.choosing import settled
from bilevel.context import context
from bilevel.descent import descend, descend_lbfgs
from bilevel.errors import (
    InvalidTypeError,
    InvalidValueError,
    NonFiniteError,
    UntrustedHypergradientError,
    UntrustedHypergradientWarning,
    meant,
)
from bilevel.evaluation import (
    Evaluator,
    check_on_untrusted,
    check_problem,
    own_randomness,
    report_untrusted,
)
from bilevel.listening import Listeners
from bilevel.problem import BilevelProblem
from bilevel.run import Run, Stop
from bilevel.solution import Record, Solution
from bilevel.solvers import Estimator, about
from bilevel.solvers.single_loop import Loop
from bilevel.third_split import check_patience
from bilevel.vector import detach

OuterOptimizer = str | Callable[..., torch.optim.Optimizer] | None


def hypergradient(
    problem: BilevelProblem,
    method: str | Estimator = "implicit",
    *,
    hparams: Any = None,
    params: Any = None,
    on_untrusted: str = "warn",
) -> Hypergradient:
    """Return dF/dλ at one point, with the certificate that says how far it can be trusted.

    Args:
        problem: the problem.
        method: a name (see `bilevel.METHODS`) or an estimator object.
        hparams: where, in natural units and the structure of the problem's `hparams`; None: its start values.
        params: inner variables in the structure of the problem's `params`. An implicit method takes them as the inner
            solution, and no inner solve runs; an unrolled one starts its inner loop there.
        on_untrusted: "warn", "raise" or "ignore" when the verdict is "untrusted".

    Returns:
        `.gradient` in natural units, structured like `hparams` (a module: a dict by parameter names), `.outer_loss`,
        `.params`, `.certificate`, `.cost`.

    >>> import torch, bilevel
    >>> problem = bilevel.BilevelProblem(
    ...     lambda w, h: ((w - 1) ** 2 + h * w**2).sum(), lambda w, h: (w**2).sum(),
    ...     params=torch.zeros(1, dtype=torch.float64), hparams=bilevel.positive(1.0))
    >>> bilevel.hypergradient(problem).gradient  # d/dh (1 + h)^-2 = -2 (1 + h)^-3
    tensor(-0.2500, dtype=torch.float64)
    """
    check_problem(problem)
    check_on_untrusted(on_untrusted)
    chosen, notes = settled(problem, method)
    evaluator = Evaluator(problem, chosen, notes=notes)
    layout = problem.hparams.layout
    upper = layout.start if hparams is None else problem.hparams.read(hparams, "`hparams`")
    given = None if params is None else detach(problem.params.read(params, "`params`"))
    with own_randomness(problem, seed=None):
        found = evaluator(upper, given).hypergradient
    report_untrusted(found, on_untrusted, stacklevel=2)
    return replace(found, gradient=layout.shaped(found.gradient), params=problem.params.export(found.params))


def solve(
    problem: BilevelProblem,
    method: str | Estimator = "implicit",
    *,
    steps: int | None = None,
    outer_optimizer: OuterOptimizer = None,
    tol: float | None = None,
    seed: int | None = None,
    progress: bool | None = None,
    callbacks: Sequence[Callable[[Record], Any]] = (),
    on_untrusted: str = "warn",
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    patience: int | None = None,
) -> Solution:
    """Minimize the outer loss over the hyperparameters by hypergradients.

    Args:
        problem: the problem; the user's own tensors and modules are not changed.
        method: a name (see `bilevel.METHODS`) or an estimator object.
        steps: most outer steps; None: 100.
        outer_optimizer: a `torch.optim` class or a factory `tensors -> optimizer`, over the unconstrained values; or
            "lbfgs", SciPy's L-BFGS-B. None: "lbfgs" where both levels and the method are deterministic, else
            Adam(lr=0.05); always Adam for a method that moves the inner variables itself ("soba").
        tol: stop when the norm of the projected hypergradient over the unconstrained values is at most `tol` times its
            norm at the start; None: 1e-6 in float64, 1e-4 in float32.
        seed: seed of torch's random numbers inside the run; the global random state is left as it was.
        progress: a progress bar on stderr; None: where that is a terminal.
        callbacks: each is called after every step with that step's `Record`; see `bilevel.callbacks`.
        on_untrusted: what to do about a hypergradient that cannot be trusted: "warn" (once a run), "raise" or "ignore".
            Unless it is "ignore", "lbfgs" steps back from such points, or ends the run; torch optimizers go on.
        checkpoint: a path (or a `bilevel.Checkpoint` with how often). The run writes its state there as it goes; a call
            that finds the file goes on from it and ends exactly as an uninterrupted run does.
        patience: stop when the loss of the problem's third split (`test_data`, `test_loss`) has not fallen below its
            lowest for so many outer steps, and return the point where it was lowest, however the run ends.

    Returns:
        The `Solution`, also after Ctrl-C.

    Raises:
        NonFiniteError: something became NaN or infinite; `.solution` is the run up to the last good step.
        UntrustedHypergradientError: with `on_untrusted="raise"`; `.solution` likewise.
    """
    given = {name: value for name, value in locals().items() if name not in ("problem", "progress")}
    _check_run(problem, steps, tol, callbacks, on_untrusted, patience)
    chosen, notes = begun(problem, method)
    optimizer = _outer_optimizer(outer_optimizer, problem, chosen)
    place = checkpoint if checkpoint is None or isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
    steps, tol = 100 if steps is None else steps, _tolerance(problem) if tol is None else tol
    shown = sys.stderr.isatty() if progress is None else progress
    problem.restart()
    with own_randomness(problem, seed), tqdm(total=steps, disable=not shown, unit="step") as bar:
        listeners = Listeners([*callbacks, lambda record: _show(bar, record)], context(problem, given))
        evaluator = Evaluator(problem, chosen, notes=notes)
        run = Run(evaluator, steps=steps, tol=tol, on_untrusted=on_untrusted, listeners=listeners, patience=patience)
        keeper = Keeper(place, _label(optimizer, patience))
        solution = listeners.until_end(lambda: run.solution(_walk(run, keeper, optimizer)))
    if about(chosen).begins != "last" or not solution.certificate.trusted:  # their first ones are a transient
        _report_run(solution, on_untrusted)
    return solution


def _tolerance(problem: BilevelProblem) -> float:
    dtype = next(iter(problem.hparams.layout.start.values())).dtype
    return 1e-6 if dtype == torch.float64 else 1e-4


def begun(problem: BilevelProblem, method: str | Estimator) -> tuple[Estimator, tuple[str, ...]]:
    """Return the method as it begins a run, and what to say of the choice."""
    chosen, notes = settled(problem, method)
    return (chosen.in_a_run() if isinstance(chosen, Loop) and not problem.deterministic else chosen), notes


def _walk(run: Run, keeper: Keeper, optimizer: Any) -> str:
    """Run to the end and return why it is the end; errors carry the run so far."""
    try:
        if optimizer == "lbfgs":
            descend_lbfgs(run, keeper)
        else:
            descend(run, keeper, optimizer)
    except Stop as stop:
        return stop.status
    except KeyboardInterrupt:
        if run.start is None:
            raise
        return f"interrupted: by the user after {len(run.history)} steps"
    except (NonFiniteError, UntrustedHypergradientError) as error:
        error.solution = None if run.start is None else run.solution(f"stopped: {error}")
        raise
    raise AssertionError("a descent ends by Stop")


def _label(optimizer: Any, patience: int | None) -> str:
    """Tell the kinds of walk apart in a checkpoint."""
    return ("lbfgs" if optimizer == "lbfgs" else "torch optimizer") + (", patience" if patience else "")


def _report_run(solution: Solution, on_untrusted: str) -> None:
    """Warn once about the untrusted hypergradients of a run."""
    records = [solution.start, *solution.history]
    untrusted = [record.step for record in records if record.verdict == "untrusted"]
    if not untrusted and solution.status.startswith("untrusted") and on_untrusted == "warn":
        warnings.warn(solution.status, UntrustedHypergradientWarning, stacklevel=3)
    if untrusted and on_untrusted == "warn":
        reasons = "; ".join(solution.certificate.reasons) or "the last one is trusted again; see `solution.history`"
        warnings.warn(
            f"{len(untrusted)} of {len(records)} hypergradients of this run are untrusted, the first at step "
            f"{untrusted[0]}: {reasons}",
            UntrustedHypergradientWarning,
            stacklevel=3,
        )


def _show(bar: Any, record: Record) -> None:
    bar.set_postfix_str(
        f"outer loss {record.outer_loss:.5g}, hypergradient {record.hypergradient_norm:.1e}, {record.verdict}"
    )
    bar.update()


def _check_run(
    problem: BilevelProblem,
    steps: int | None,
    tol: float | None,
    callbacks: Any,
    on_untrusted: str,
    patience: int | None,
) -> None:
    check_problem(problem)
    check_on_untrusted(on_untrusted)
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise InvalidValueError(f"`steps` is {steps!r}, expected a whole number of at least 1, or None")
    if tol is not None and (not isinstance(tol, (int, float)) or not 0.0 <= tol < 1.0):
        raise InvalidValueError(f"`tol` is {tol!r}, expected 0 <= tol < 1 (relative to the first hypergradient)")
    if not isinstance(callbacks, (list, tuple)) or not all(callable(callback) for callback in callbacks):
        raise InvalidTypeError(
            "`callbacks` is expected to be a list of functions of a Record; write callbacks=[function]"
        )
    for callback in callbacks:
        if isinstance(callback, type):
            raise InvalidTypeError(
                f"`callbacks` holds the class {callback.__name__}, expected an object; write {callback.__name__}(...)"
            )
    check_patience(problem, patience)


def _outer_optimizer(given: OuterOptimizer, problem: BilevelProblem, method: Estimator) -> Any:
    random, moves = about(method).random, about(method).begins == "last"
    if given is None:
        fixed = problem.deterministic and not random and not moves
        return "lbfgs" if fixed else lambda tensors: torch.optim.Adam(tensors, lr=0.05)
    if given == "lbfgs" and (random or moves):
        why = "draws other random numbers for each" if random else "moves the inner variables a little in each call"
        raise InvalidValueError(
            f'`outer_optimizer` is "lbfgs", whose line search compares hypergradients, and {method!r} {why}; write '
            "outer_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.05)"
        )
    check_outer_optimizer(given)
    return given


def check_outer_optimizer(given: Any) -> None:
    """Raise for what is neither "lbfgs" nor a factory."""
    if isinstance(given, str) and given != "lbfgs":
        raise InvalidValueError(
            f'`outer_optimizer` is {given!r}, expected "lbfgs", a torch.optim class, or a factory such as '
            "lambda tensors: torch.optim.Adam(tensors, lr=0.05)" + meant(given, ["lbfgs"])
        )
    if isinstance(given, torch.optim.Optimizer):
        raise InvalidTypeError(
            f"`outer_optimizer` is a {type(given).__name__} object, which holds other tensors than the unconstrained "
            f"hyperparameters; give a factory: lambda tensors: torch.optim.{type(given).__name__}(tensors, lr=...)"
        )
    if not isinstance(given, str) and (not callable(given) or hasattr(given, "solve")):
        raise InvalidTypeError(
            f"`outer_optimizer` is a {type(given).__name__}, expected a factory of an optimizer, "
            "such as lambda tensors: torch.optim.Adam(tensors, lr=0.05)"
        )
