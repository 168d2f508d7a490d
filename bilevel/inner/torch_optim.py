"""Any optimizer of torch.optim and its schedulers, or one with their interface, as an inner solver without a graph."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from bilevel.errors import InvalidTypeError, InvalidValueError, NonFiniteError
from bilevel.inner.base import Decay, InnerSolution, Task
from bilevel.inner.stepwise import called, check_length, wants_step
from bilevel.vector import Vector, is_finite

Settings = Mapping[str, Any]


@dataclass(frozen=True, init=False, repr=False)
class TorchOptim:
    """Take steps of a torch.optim optimizer on the batches of `inner_data`.

    Each inner solve makes a new optimizer, with empty moments, and a new scheduler; in a run it starts at the last
    inner solution. Steps keep no graph, so they cannot be unrolled (those of `inner.SGD`, `inner.Adam` and so on can);
    an implicit method holds where they end at a stationary point of `inner_loss`. An optimizer whose step needs a
    closure (L-BFGS) gets one, with one batch in a step and the same random numbers in all of them.

    Args:
        optimizer: a class, or a factory of an optimizer, called with the parameters and the settings.
        steps: number of steps; or
        epochs: number of passes over `inner_data`.
        scheduler: a factory of a scheduler, `lambda optimizer: CosineAnnealingLR(optimizer, T_max=100)`, which is moved
            after each step (`ReduceLROnPlateau` with its loss).
        scheduler_per_epoch: move it after each pass over `inner_data` instead (`ReduceLROnPlateau` with the mean loss).
        groups: settings for parameters by patterns of their names, `{"head.*": {"lr": 1e-2}}`; the first that fits
            counts, and other parameters take `settings`.
        settings: of the optimizer: anything that it takes, a function `lambda h: ...` of the hyperparameters, or
            `lambda h, step: ...`. Their values are taken, no derivative goes through them.

    >>> import torch, bilevel
    >>> problem = bilevel.BilevelProblem(
    ...     lambda w, h: ((w - 1) ** 2 + h * w**2).sum(), lambda w, h: (w**2).sum(),
    ...     params=torch.zeros(1, dtype=torch.float64), hparams=bilevel.positive(1.0),
    ...     inner_solver=bilevel.inner.TorchOptim(torch.optim.NAdam, lr=0.1, steps=500))
    >>> bilevel.hypergradient(problem).gradient  # d/dh (1 + h)^-2 = -2 (1 + h)^-3
    tensor(-0.2500, dtype=torch.float64)
    """

    optimizer: Callable[..., torch.optim.Optimizer]
    steps: int | None
    epochs: int | None
    scheduler: Callable[[torch.optim.Optimizer], Any] | None
    scheduler_per_epoch: bool
    groups: Mapping[str, Settings]
    settings: Settings = field(default_factory=dict)

    def __init__(
        self,
        optimizer: Callable[..., torch.optim.Optimizer],
        *,
        steps: int | None = None,
        epochs: int | None = None,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        scheduler_per_epoch: bool = False,
        groups: Mapping[str, Settings] | None = None,
        **settings: Any,
    ) -> None:
        given = (optimizer, steps, epochs, scheduler, scheduler_per_epoch, groups or {}, settings)
        for name, value in zip(self.__dataclass_fields__, given, strict=True):
            object.__setattr__(self, name, value)
        check_length(steps, epochs, "inner.TorchOptim", "inner.TorchOptim(torch.optim.AdamW, lr=1e-3, steps=100)")
        self._check()

    def _check(self) -> None:
        if not callable(self.optimizer):
            kind = type(self.optimizer).__name__
            instead = kind if isinstance(self.optimizer, torch.optim.Optimizer) else "AdamW"
            raise InvalidTypeError(
                f"inner.TorchOptim: `optimizer` is a {kind} object, expected a class or a factory, since each inner "
                f"solve makes its own; write inner.TorchOptim(torch.optim.{instead}, lr=..., steps=...)"
            )
        if not isinstance(self.groups, Mapping) or not all(isinstance(own, Mapping) for own in self.groups.values()):
            raise InvalidTypeError(
                f"inner.TorchOptim: `groups` is {self.groups!r}, expected settings by patterns of names; write "
                'groups={"head.*": {"lr": 1e-2}}'
            )
        if self.scheduler is not None and not callable(self.scheduler):
            raise InvalidTypeError(
                f"inner.TorchOptim: `scheduler` is a {type(self.scheduler).__name__} object, which belongs to another "
                "optimizer; give a factory: scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 30)"
            )
        by_step = [name for own in self._all() for name, value in own.items() if callable(value) and wants_step(value)]
        if by_step and self.scheduler is not None:
            raise InvalidValueError(
                f"inner.TorchOptim: both `{by_step[0]}`, a function of the step, and `scheduler` say what a step is "
                "taken with; give one of them"
            )
        # Tried on a matrix, which all optimizers take; functions of hyperparameters are left to their defaults.
        fixed = {name: value for name, value in self.settings.items() if not callable(value)}
        by_function = {"lr": 1e-3} if "lr" in self.settings.keys() - fixed.keys() else {}
        trial = self._made([nn.Parameter(torch.zeros(1, 1))], fixed | by_function)
        object.__setattr__(self, "_default", trial.defaults.get("weight_decay", 0.0))
        self._scheduled(trial)

    def __repr__(self) -> str:
        kept = {f: getattr(self, f) for f in ("steps", "epochs", "scheduler", "scheduler_per_epoch", "groups")}
        told = {**self.settings, **{name: value for name, value in kept.items() if value}}
        shown = "".join(f", {name}={value!r}" for name, value in told.items())
        return f"TorchOptim({getattr(self.optimizer, '__name__', repr(self.optimizer))}{shown})"

    def _all(self) -> list[Settings]:
        return [self.settings, *self.groups.values()]

    @property
    def hidden_settings(self) -> bool:
        """See `InnerSolver`."""
        return any(callable(value) for own in self._all() for value in own.values())

    @property
    def weight_decay(self) -> Any:
        """The first decay that is not 0, the optimizer's default included."""
        decays = [own["weight_decay"] for own in self._all() if "weight_decay" in own]
        if "weight_decay" not in self.settings:
            decays.append(getattr(self, "_default", 0.0))
        return next((decay for decay in decays if callable(decay) or decay), 0.0)

    @property
    def decays_outside_loss(self) -> Decay:
        """See `InnerSolver`; no method looks into the steps, so it counts as decoupled."""
        return "step" if self.weight_decay else None

    @property
    def step_size(self) -> float | None:
        """See `InnerSolver`."""
        lr = self.settings.get("lr")
        plain = self.optimizer is torch.optim.SGD and not self.groups
        return float(lr) if plain and isinstance(lr, (int, float)) and lr > 0.0 else None

    def solve(self, task: Task, lower: Vector, upper: Vector) -> InnerSolution:
        """See `InnerSolver.solve`."""
        params = {name: nn.Parameter(t.detach().clone()) for name, t in lower.items()}
        optimizer = self._made(self._grouped(params, task, upper), self._at(self.settings, task, upper, 0))
        scheduler = self._scheduled(optimizer)
        epoch = task.epoch() if self.epochs is not None or self.scheduler_per_epoch else 1
        steps = self.steps if self.steps is not None else (self.epochs or 0) * epoch
        losses: list[float] = []
        for t in range(steps):
            if t:
                self._follow(optimizer, task, upper, t)
            losses.append(_step(optimizer, params, task, upper))
            if scheduler is not None and (not self.scheduler_per_epoch or len(losses) == epoch):
                mean = sum(losses) / len(losses)
                scheduler.step(*[mean] if isinstance(scheduler, ReduceLROnPlateau) else [])
                losses = []
        value = {name: p.detach() for name, p in params.items()}
        if not is_finite(value):
            raise NonFiniteError(
                f"the inner variables became NaN or infinite within {steps} steps of {type(optimizer).__name__}; lower "
                "its learning rate",
                "inner variables",
            )
        return InnerSolution(value, steps, "steps", second_moment=_second_moment(optimizer, params))

    def _grouped(self, params: dict[str, nn.Parameter], task: Task, upper: Vector) -> list[Any]:
        """Return parameter groups: those of `groups`, then all other parameters."""
        if not self.groups:
            return list(params.values())
        rest, found = dict(params), []
        for pattern, own in self.groups.items():
            mine = [rest.pop(name) for name in list(rest) if fnmatchcase(name, pattern)]
            if not mine:
                taken = " that no earlier pattern fits" if any(fnmatchcase(name, pattern) for name in params) else ""
                raise InvalidValueError(
                    f"inner.TorchOptim: `groups` has the pattern {pattern!r}, which fits none of `params`{taken}; they "
                    f"are {', '.join(params)}"
                )
            found.append({"params": mine, **self._at(own, task, upper, 0)})
        return [*found, {"params": list(rest.values())}] if rest else found

    def _follow(self, optimizer: torch.optim.Optimizer, task: Task, upper: Vector, t: int) -> None:
        """Set what depends on the step."""
        for group, own in zip(optimizer.param_groups, [*self.groups.values(), {}], strict=False):
            now = {**self.settings, **own}
            group.update(self._at({n: v for n, v in now.items() if callable(v) and wants_step(v)}, task, upper, t))

    def _at(self, settings: Settings, task: Task, upper: Vector, t: int) -> dict[str, Any]:
        """Return the values of settings at step `t`."""
        found = dict(settings)
        if any(callable(value) for value in found.values()):
            with torch.no_grad(), task.hparams(upper) as hparams:
                for name, value in settings.items():
                    if callable(value):
                        label = f"inner.TorchOptim: `{name}`"
                        found[name] = _plain(called(value, hparams, t, label), label)
        return found

    def _made(self, params: list[Any], settings: dict[str, Any]) -> torch.optim.Optimizer:
        name = getattr(self.optimizer, "__name__", "optimizer")
        try:
            optimizer = self.optimizer(params, **settings)
        except (TypeError, ValueError) as error:
            raise InvalidValueError(
                f"inner.TorchOptim: {name} refuses its settings ({error}); it takes {_signature(self.optimizer)}"
            ) from error
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise InvalidTypeError(
                f"inner.TorchOptim: `optimizer` made a {type(optimizer).__name__}, expected a torch.optim optimizer; "
                "write inner.TorchOptim(torch.optim.AdamW, lr=1e-3, steps=100)"
            )
        return optimizer

    def _scheduled(self, optimizer: torch.optim.Optimizer) -> Any:
        if self.scheduler is None:
            return None
        try:
            scheduler = self.scheduler(optimizer)
        except (TypeError, ValueError) as error:
            raise InvalidValueError(
                f"inner.TorchOptim: `scheduler` could not be made of an optimizer alone ({error}); write "
                "scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=30)"
            ) from error
        if not isinstance(scheduler, LRScheduler):
            raise InvalidTypeError(
                f"inner.TorchOptim: `scheduler` made a {type(scheduler).__name__}, expected a scheduler of "
                "torch.optim.lr_scheduler"
            )
        return scheduler


def _step(optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter], task: Task, upper: Vector) -> float:
    """Take a step on the next batch and return the loss before it."""
    batch = task.draw()
    wanted = inspect.signature(type(optimizer).step).parameters.get("closure")
    needs_closure = wanted is not None and wanted.default is wanted.empty

    def closure() -> float:
        lower = {name: p.detach() for name, p in params.items()}
        value, gradient = task.value_and_gradient(lower, upper, batch, pinned=needs_closure)
        for name, p in params.items():
            p.grad = gradient[name]
        return float(value.detach())

    if needs_closure:
        return float(optimizer.step(closure))
    loss = closure()
    optimizer.step()
    return loss


def _plain(value: Any, label: str) -> Any:
    """Return a setting as Python numbers, which every optimizer takes."""
    if isinstance(value, (tuple, list)):
        return tuple(_plain(entry, label) for entry in value)
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise InvalidTypeError(
                f"{label} returned a Tensor of shape {tuple(value.shape)}, expected a number (for a schedule, index "
                "it: lambda h, step: h['lr'][step]; for settings by parameter, give `groups`)"
            )
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidValueError(f"{label} returned {value}, expected a finite number")
    if not isinstance(value, (int, float, str)):
        raise InvalidTypeError(f"{label} returned a {type(value).__name__}, expected a number")
    return value


def _second_moment(optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter]) -> Vector | None:
    """Return the mean squares that the optimizer keeps by torch.optim's names; None where it keeps none."""
    found = {}
    for name, p in params.items():
        state = optimizer.state.get(p, {})
        square = state.get("exp_avg_sq", state.get("square_avg"))
        if not isinstance(square, Tensor) or square.shape != p.shape:
            return None
        found[name] = square.detach().clone()
    return found


def _signature(factory: Callable[..., Any]) -> str:
    try:
        names = list(inspect.signature(factory).parameters)
    except (TypeError, ValueError):
        return "what its documentation says"
    return ", ".join(name for name in names if name not in ("self", "params"))
