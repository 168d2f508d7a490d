"""What the first-order inner optimizers share: their length, and settings that depend on hyperparameters."""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import InvalidTypeError, InvalidValueError, NonFiniteError, noting
from bilevel.inner.base import Decay, InnerSolution, Task
from bilevel.vector import Vector, detach, is_finite, leaves

Setting = float | Tensor | Callable[..., Any]
"""A number, a function of hparams, or a function of hparams and the step. The function returns a number, a 0-d tensor,
or a dict from the names of `params` to numbers or tensors."""


@dataclass(frozen=True, kw_only=True)
class Stepwise:
    """An optimizer of a fixed number of steps: give `steps`, or `epochs` over `inner_data`."""

    steps: int | None = None
    epochs: int | None = None

    def __post_init__(self) -> None:
        name = f"inner.{type(self).__name__}"
        check_length(self.steps, self.epochs, name, f"{name}(..., steps=100)")
        for field in fields(self):
            value = getattr(self, field.name)
            if callable(value) and field.name not in self.tunable():
                raise InvalidTypeError(
                    f"{name}: `{field.name}` is a function, but only {', '.join(self.tunable())} may depend on "
                    "hyperparameters; give a number"
                )
            by_default = value is None and field.default is None
            if field.name in self.tunable() and not (callable(value) or isinstance(value, Tensor) or by_default):
                check_number(value, f"{name}: `{field.name}`", "; or a function: lambda h: h[...]")
        self.check()

    def check(self) -> None:
        """Raise for settings that make no sense; for those that only one optimizer has."""

    @classmethod
    def tunable(cls) -> tuple[str, ...]:
        """Return the settings that may be functions of the hyperparameters."""
        return ("lr", "weight_decay", "momentum")

    @property
    def decays_outside_loss(self) -> Decay:
        """See `InnerSolver`; torch.optim's `weight_decay` is added to the gradient."""
        return None if is_zero(getattr(self, "weight_decay", 0.0)) else "gradient"

    def unroll_steps(self, task: Task) -> int:
        """Return the number of steps, with epochs counted in batches."""
        return self.steps if self.steps is not None else (self.epochs or 0) * task.epoch()

    def solve(self, task: Task, lower: Vector, upper: Vector) -> InnerSolution:
        """See `InnerSolver.solve`."""
        w, state, h = detach(lower), self.initial_state(lower), detach(upper)
        steps = self.unroll_steps(task)
        for t in range(steps):
            w, state = self.step(task, w, state, h, t)
        if not is_finite(w):
            raise NonFiniteError(
                f"the inner variables became NaN or infinite within {steps} steps of {type(self).__name__}; lower its "
                "learning rate",
                "inner variables",
            )
        answer = partial(self.sensitivity, task, h, state, steps - 1)
        return InnerSolution(detach(w), steps, "steps", self.second_moment(state), sensitivity=answer)

    def sensitivity(self, task: Task, upper: Vector, state: Any, t: int, lower: Vector, gradient: Vector) -> Vector:
        """Return minus the derivative of an update with respect to its gradient, which it takes entry by entry."""
        g = leaves(gradient)
        with torch.enable_grad(), task.hparams(upper) as hparams:
            after, _ = self.update(detach(lower), g, state, t, self.settings(hparams, t))
            total = torch.stack([x.sum() for x in after.values()]).sum()
        return {n: -x for n, x in zip(g, torch.autograd.grad(total, list(g.values())), strict=True)}

    def second_moment(self, state: Any) -> Vector | None:
        """Return the mean square of the gradients that the state holds; None for an optimizer that keeps none."""
        return None

    def step(self, task: Task, lower: Vector, state: Any, upper: Vector, t: int) -> tuple[Vector, Any]:
        """Take step `t`; the result has a graph where `lower` requires a gradient."""
        graph = any(x.requires_grad for x in lower.values())
        _, gradient = task.value_and_gradient(lower, upper, task.draw(), create_graph=graph)
        with torch.set_grad_enabled(graph), task.hparams(upper) as hparams:
            return self.update(lower, gradient, state, t, self.settings(hparams, t))

    def settings(self, hparams: Any, t: int) -> dict[str, Any]:
        """Return the settings that may be functions, for step `t`."""
        return {
            field.name: _evaluate(getattr(self, field.name), hparams, t, f"inner.{type(self).__name__}: `{field.name}`")
            for field in fields(self)
            if field.name in self.tunable()
        }

    @abstractmethod
    def initial_state(self, lower: Vector) -> Any:
        """Return the state before the first step: a tree of tensors."""

    @abstractmethod
    def update(self, lower: Vector, gradient: Vector, state: Any, t: int, now: dict[str, Any]) -> tuple[Vector, Any]:
        """Return the variables and the state after a step with the settings `now`."""


def check_length(steps: Any, epochs: Any, name: str, instead: str) -> None:
    """Raise unless one of the two says how long a solver goes on."""
    given = [n for n in (steps, epochs) if n is not None]
    if len(given) != 1 or not isinstance(given[0], int) or isinstance(given[0], bool) or given[0] < 1:
        raise InvalidValueError(
            f"{name} needs either `steps` or `epochs`, a whole number of at least 1; got steps={steps!r}, "
            f"epochs={epochs!r}; write {instead}"
        )


def check_number(value: Any, label: str, instead: str = "", below: float = math.inf) -> None:
    """Raise unless `value` is a number with 0 <= value < below."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidTypeError(f"{label} is {value!r}, expected a number >= 0{instead}")
    if not 0.0 <= value < below:
        end = "" if below == math.inf else f" and < {below:g}"
        raise InvalidValueError(f"{label} is {value}, expected a finite number >= 0{end}")


def is_zero(setting: Any) -> bool:
    """Say whether a setting is the number 0: not a function, and not a tensor that may have a gradient."""
    return isinstance(setting, (int, float)) and setting == 0.0


def wants_step(setting: Callable[..., Any]) -> bool:
    """Say whether a setting is a function of hyperparameters and the step."""
    wanted = [
        p
        for p in inspect.signature(setting).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(wanted) == 2


def called(setting: Callable[..., Any], hparams: Any, t: int, label: str) -> Any:
    """Return what a setting that is a function says for step `t`."""
    by_step = wants_step(setting)
    try:
        with noting(label.replace("`", ""), "hparams, step" if by_step else "hparams", hparams):
            return setting(hparams, t) if by_step else setting(hparams)
    except IndexError as error:
        raise InvalidValueError(
            f"{label} has no entry for step {t} (steps count from 0): {error}; a schedule needs one entry for each of "
            "the `steps`, or write lambda h, step: h['lr'][min(step, len(h['lr']) - 1)]"
        ) from error


def _evaluate(setting: Any, hparams: Any, t: int, label: str) -> Any:
    if not callable(setting):
        return setting
    value = called(setting, hparams, t, label)
    if isinstance(value, Tensor) and value.dim() > 0 and value.numel() == 1:
        value = value.reshape(())
    if not isinstance(value, (int, float, dict)) and not (isinstance(value, Tensor) and value.dim() == 0):
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise InvalidTypeError(
            f"{label} returned a {type(value).__name__}{shape}, expected a number, a 0-d tensor, or a dict from the "
            "names of `params` to those (for a schedule, index it: lambda h, step: h['lr'][step])"
        )
    return value
