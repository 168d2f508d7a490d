"""Optuna and hypergradients together: Optuna for what is discrete, gradients for what is continuous.

`objective` makes an objective for `study.optimize` whose trials each tune the continuous hyperparameters of a problem,
and are pruned as they go; `typed` makes hyperparameters of this library of the floats of an Optuna search space.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bilevel.errors import BilevelError, InvalidTypeError, InvalidValueError, NonFiniteError, meant
from bilevel.hyperparameters import interval, positive
from bilevel.outer import solve
from bilevel.problem import BilevelProblem
from bilevel.ranges import Hyperparameter
from bilevel.solution import Record
from bilevel.solvers import Estimator

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

VALUES = ("outer_loss", "test_loss")
INSIDE = 1e-3  # of its width, how far from an end a linear range begins at least


@dataclass(frozen=True)
class Pruning:
    """A callback for `solve` that reports each step to an Optuna trial, and ends the trial where its pruner says so.

    Args:
        trial: the trial.
        value: what is reported, "outer_loss" or "test_loss".
    """

    trial: Any
    value: str = "outer_loss"

    def __post_init__(self) -> None:
        _check_value(self.value)
        if not hasattr(self.trial, "should_prune"):
            raise InvalidTypeError(
                f"`trial` is a {type(self.trial).__name__}, expected the trial of an Optuna objective"
            )
        _check_directions(self.trial)

    def __call__(self, record: Record) -> None:
        """Report a step.

        Raises:
            optuna.TrialPruned: the study's pruner ends the trial.
        """
        self.trial.report(_of(record, self.value), record.step)
        if self.trial.should_prune():
            raise _optuna().TrialPruned(f"pruned after outer step {record.step}")


def objective(
    build: Callable[[Trial], BilevelProblem],
    method: str | Estimator = "implicit",
    *,
    value: str = "outer_loss",
    prune: bool = True,
    **arguments: Any,
) -> Callable[[Trial], float]:
    """Return an objective for `study.optimize`: each trial builds a problem and tunes it by hypergradients.

    A trial keeps, as user attributes, the tuned values (`hparams`), why the run ended (`status`), the last `verdict`,
    and what it cost (`outer_steps`, `gradients`, `products`). A run that becomes NaN is pruned.

    Args:
        build: makes the problem of a trial, with `trial.suggest_int` and so on for what is discrete.
        method: see `solve`.
        value: what the study minimizes: "outer_loss", or "test_loss" of a problem with a third split.
        prune: report each outer step, and end the trial where the pruner says so.
        arguments: of `solve`: `steps`, `callbacks`, ...
    """
    _optuna()
    _check_value(value)
    if not callable(build):
        raise InvalidTypeError(
            f"`build` is a {type(build).__name__}, expected a function of a trial that returns a BilevelProblem"
        )
    if arguments.get("checkpoint") is not None:
        raise InvalidValueError(
            "`checkpoint` would be one file for all trials; give Optuna's study a storage, which keeps what is done"
        )

    def run(trial: Trial) -> float:
        _check_directions(trial)
        problem = build(trial)
        if not isinstance(problem, BilevelProblem):
            raise InvalidTypeError(f"`build` returned a {type(problem).__name__}, expected a BilevelProblem")
        if value == "test_loss" and problem.test_loss is None:
            raise InvalidValueError(
                '`value` is "test_loss", and the problem has no third split; write BilevelProblem(..., test_data=...)'
            )
        callbacks = [*(arguments.get("callbacks") or ()), *([Pruning(trial, value)] if prune else [])]
        try:
            solution = solve(problem, method, **{**arguments, "callbacks": callbacks})
        except NonFiniteError as error:
            raise _optuna().TrialPruned(str(error)) from error
        records = [solution.start, *solution.history]
        told = {
            "hparams": records[solution.step].hparams,
            "status": solution.status,
            "verdict": solution.certificate.verdict,
            "outer_steps": len(solution.history),
            "gradients": sum(record.gradients for record in records),
            "products": sum(record.products for record in records),
        }
        for name, told_value in told.items():
            trial.set_user_attr(name, told_value)
        return solution.outer_loss if value == "outer_loss" else _of(records[solution.step], value)

    return run


@dataclass(frozen=True)
class Space:
    """The floats of an Optuna search space.

    Attributes:
        hparams: typed hyperparameters by name: what `BilevelProblem(hparams=)` takes.
        fixed: values of the distributions that hold one value only, by name.
    """

    hparams: dict[str, Hyperparameter]
    fixed: dict[str, Any]


def typed(space: Mapping[str, Any] | FrozenTrial, start: Mapping[str, float] | None = None) -> Space:
    """Make typed hyperparameters of an Optuna search space.

    A `FloatDistribution` with `log=True` becomes `positive(low=, high=)`, a linear one `interval`; both begin at
    `start`, or in the middle of the range (of its logarithm with `log`). What holds one value only is `fixed`.

    Args:
        space: distributions by name, or a trial (`study.best_trial`): its distributions, begun at its values.
        start: where to begin, by name; it counts before the values of a trial.

    Raises:
        InvalidValueError: for distributions without a gradient (integers, categories, steps); all are named.

    >>> import optuna, bilevel.optuna
    >>> space = bilevel.optuna.typed({"l2": optuna.distributions.FloatDistribution(1e-4, 1.0, log=True)})
    >>> space.hparams
    {'l2': positive(0.01)}
    """
    distributions, begun = getattr(space, "distributions", space), getattr(space, "params", {})
    if not isinstance(distributions, Mapping) or not distributions:
        raise InvalidTypeError(
            f"`space` is a {type(space).__name__}, expected a dict of names to Optuna distributions, or a trial, such "
            "as study.best_trial"
        )
    start = {**begun, **(start or {})}
    unknown = [name for name in start if name not in distributions]
    if unknown:
        raise InvalidValueError(
            f"`start` has {unknown[0]!r}, which is not in `space`{meant(unknown[0], distributions)}"
        )
    hparams: dict[str, Hyperparameter] = {}
    fixed: dict[str, Any] = {}
    refused = []
    for name, distribution in distributions.items():
        if (why := _refused(distribution)) is not None:
            refused.append(f"{name!r} ({why})")
        elif distribution.single():
            fixed[name] = distribution.low if hasattr(distribution, "low") else distribution.choices[0]
        else:
            hparams[name] = _float(name, distribution, start.get(name))
    if refused:
        raise InvalidValueError(
            f"no gradient leads through {', '.join(refused)}; leave what is discrete to Optuna: suggest it in `build` "
            "of bilevel.optuna.objective, and take it out of `space`"
        )
    return Space(hparams, fixed)


def _refused(distribution: Any) -> str | None:
    """Return why a distribution is no range of real numbers; None for one that is, or that holds one value."""
    distributions = _optuna().distributions
    if not isinstance(distribution, distributions.BaseDistribution):
        return f"a {type(distribution).__name__}, no Optuna distribution"
    if distribution.single():
        return None
    if not isinstance(distribution, distributions.FloatDistribution):
        return type(distribution).__name__
    return None if distribution.step is None else f"FloatDistribution in steps of {distribution.step:g}"


def _float(name: str, distribution: Any, start: float | None) -> Hyperparameter:
    low, high = float(distribution.low), float(distribution.high)
    if start is not None and not low <= start <= high:
        raise InvalidValueError(f"`start` of {name!r} is {start:g}, expected a value from {low:g} to {high:g}")
    if distribution.log:
        middle = math.exp((math.log(low) + math.log(high)) / 2)
        return positive(min(max(middle if start is None else start, low), high), low=low, high=high)
    edge = INSIDE * (high - low)
    return interval(min(max((low + high) / 2 if start is None else start, low + edge), high - edge), low, high)


def _of(record: Record, value: str) -> float:
    found = record[value]
    if found is None:
        raise InvalidValueError(
            '`value` is "test_loss", and the problem has no third split; write BilevelProblem(..., test_data=...)'
        )
    return float(found)


def _check_directions(trial: Any) -> None:
    directions = [direction.name for direction in getattr(getattr(trial, "study", None), "directions", [])]
    if directions and directions != ["MINIMIZE"]:
        raise InvalidValueError(
            f"the study has directions {directions}, and losses are minimized; write "
            'optuna.create_study(direction="minimize")'
        )


def _check_value(value: Any) -> None:
    if value not in VALUES:
        raise InvalidValueError(
            f"`value` is {value!r}, expected one of {', '.join(map(repr, VALUES))}{meant(value, VALUES)}"
        )


def _optuna() -> Any:
    try:
        return importlib.import_module("optuna")
    except ImportError as error:
        raise BilevelError('this needs Optuna, which is not installed; write: pip install "bilevel[optuna]"') from error
