"""First-order inner optimizers with torch.optim's names and update rules, every step differentiable.

Adam's and RMSProp's moments are TorchOpt's functional transforms. The learning rate, the weight decay and momentum are
applied here, because TorchOpt takes them as Python numbers only and keeps the first-step flag of momentum outside of
its state (docs/design.md, "Inner optimizers").
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torchopt
from torch import Tensor

from bilevel.errors import InvalidTypeError, InvalidValueError, NonFiniteError
from bilevel.inner.base import InnerSolution, Task
from bilevel.vector import Vector, axpy, detach, is_finite, zeros_like

Setting = float | Tensor | Callable[..., Any]
"""A number, a function of hparams, or a function of hparams and the step. The function returns a number, a 0-d tensor,
or a dict from the names of `params` to numbers or tensors."""

# Inside Adam's square root: sqrt has no derivative at 0, where an entry of the gradient has been 0 so far. Far below
# the square of Adam's eps, so the values stay those of torch.optim to the last digits.
UNDER_ROOT = 1e-30


@dataclass(frozen=True, kw_only=True)
class Stepwise:
    """An optimizer of a fixed number of steps: give `steps`, or `epochs` over `inner_data`."""

    steps: int | None = None
    epochs: int | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        given = [n for n in (self.steps, self.epochs) if n is not None]
        if len(given) != 1 or not isinstance(given[0], int) or given[0] < 1:
            raise InvalidValueError(
                f"inner.{name} needs either `steps` or `epochs`, a whole number of at least 1; got "
                f"steps={self.steps!r}, epochs={self.epochs!r}; write inner.{name}(..., steps=100)"
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and value < 0.0:
                raise InvalidValueError(f"inner.{name}: `{field.name}` is {value}, expected a number >= 0")
            if callable(value) and field.name not in self.tunable():
                raise InvalidTypeError(
                    f"inner.{name}: `{field.name}` is a function, but only {', '.join(self.tunable())} may depend on "
                    "hyperparameters; give a number"
                )

    @classmethod
    def tunable(cls) -> tuple[str, ...]:
        """Return the settings that may be functions of the hyperparameters."""
        return ("lr", "weight_decay", "momentum")

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
        return InnerSolution(detach(w), steps, "steps")

    def step(self, task: Task, lower: Vector, state: Any, upper: Vector, t: int) -> tuple[Vector, Any]:
        """Take step `t`; the result has a graph where `lower` requires a gradient."""
        graph = any(x.requires_grad for x in lower.values())
        _, gradient = task.value_and_gradient(lower, upper, task.draw(), create_graph=graph)
        with torch.set_grad_enabled(graph), task.hparams(upper) as hparams:
            now = {
                field.name: _evaluate(
                    getattr(self, field.name), hparams, t, f"inner.{type(self).__name__}: `{field.name}`"
                )
                for field in fields(self)
                if field.name in self.tunable()
            }
            return self.update(lower, gradient, state, t, now)

    @abstractmethod
    def initial_state(self, lower: Vector) -> Any:
        """Return the state before the first step: a tree of tensors."""

    @abstractmethod
    def update(self, lower: Vector, gradient: Vector, state: Any, t: int, now: dict[str, Any]) -> tuple[Vector, Any]:
        """Return the variables and the state after a step with the settings `now`."""


def _evaluate(setting: Any, hparams: Any, t: int, label: str) -> Any:
    if not callable(setting):
        return setting
    wanted = [
        p
        for p in inspect.signature(setting).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    value = setting(hparams, t) if len(wanted) == 2 else setting(hparams)
    if isinstance(value, Tensor) and value.dim() > 0 and value.numel() == 1:
        value = value.reshape(())
    if not isinstance(value, (int, float, dict)) and not (isinstance(value, Tensor) and value.dim() == 0):
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise InvalidTypeError(
            f"{label} returned a {type(value).__name__}{shape}, expected a number, a 0-d tensor, or a dict from the "
            "names of `params` to those (for a schedule, index it: lambda h, step: h['lr'][step])"
        )
    return value


def _times(setting: Any, v: Vector) -> Vector:
    """Return setting * v, with one factor for all tensors or one for each."""
    if isinstance(setting, dict):
        if set(setting) != set(v):
            raise InvalidValueError(f"a setting per tensor names {sorted(setting)}, expected {sorted(v)}")
        return {name: setting[name] * t for name, t in v.items()}
    return {name: setting * t for name, t in v.items()}


def _add_decay(gradient: Vector, lower: Vector, weight_decay: Any) -> Vector:
    """Return the gradient of the loss plus weight_decay / 2 |w|^2."""
    return gradient if _is_zero(weight_decay) else axpy(1.0, _times(weight_decay, lower), gradient)


def _is_zero(setting: Any) -> bool:
    return isinstance(setting, (int, float)) and setting == 0.0


def _descend(lower: Vector, direction: Vector, lr: Any) -> Vector:
    return axpy(-1.0, _times(lr, direction), lower)


@dataclass(frozen=True)
class SGD(Stepwise):
    """Stochastic gradient descent, `torch.optim.SGD`.

    Args:
        lr: learning rate; a number, `lambda h: ...` or `lambda h, step: ...`.
        momentum: heavy-ball factor; as `lr`.
        dampening: fraction of the gradient kept out of the momentum, a number.
        weight_decay: adds weight_decay * w to the gradient; as `lr`.
        nesterov: Nesterov's form of momentum.
        steps: number of steps; or
        epochs: number of passes over `inner_data`.
    """

    lr: Setting
    momentum: Setting = 0.0
    dampening: float = 0.0
    weight_decay: Setting = 0.0
    nesterov: bool = False

    def initial_state(self, lower: Vector) -> Vector:
        """Return zero momentum buffers; none without momentum."""
        return {} if _is_zero(self.momentum) else zeros_like(lower)

    def update(
        self, lower: Vector, gradient: Vector, state: Vector, t: int, now: dict[str, Any]
    ) -> tuple[Vector, Vector]:
        """See `Stepwise.update`."""
        g = _add_decay(gradient, lower, now["weight_decay"])
        if not state:
            return _descend(lower, g, now["lr"]), state
        # torch.optim.SGD fills the buffer with the first gradient, undampened.
        buffer = g if t == 0 else axpy(1.0 - self.dampening, g, _times(now["momentum"], state))
        direction = axpy(1.0, _times(now["momentum"], buffer), g) if self.nesterov else buffer
        return _descend(lower, direction, now["lr"]), buffer


@dataclass(frozen=True)
class Adam(Stepwise):
    """Adam, `torch.optim.Adam` (Kingma and Ba, ICLR 2015), on TorchOpt's transform.

    Args:
        lr: learning rate; a number, `lambda h: ...` or `lambda h, step: ...`.
        betas: decay rates of the two moments, numbers.
        eps: added to the root of the second moment.
        weight_decay: adds weight_decay * w to the gradient; as `lr`.
        steps: number of steps; or
        epochs: number of passes over `inner_data`.
    """

    lr: Setting = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: Setting = 0.0

    @classmethod
    def tunable(cls) -> tuple[str, ...]:
        """TorchOpt's moments take betas and eps as numbers."""
        return ("lr", "weight_decay")

    def _transform(self) -> Any:
        return torchopt.adam(lr=1.0, betas=self.betas, eps=self.eps, eps_root=UNDER_ROOT)

    def initial_state(self, lower: Vector) -> Any:
        """Return zero moments."""
        return self._transform().init(lower)

    def update(self, lower: Vector, gradient: Vector, state: Any, t: int, now: dict[str, Any]) -> tuple[Vector, Any]:
        """See `Stepwise.update`."""
        g = _add_decay(gradient, lower, now["weight_decay"])
        descent, state = self._transform().update(g, state, params=lower, inplace=False)
        return axpy(1.0, _times(now["lr"], descent), lower), state


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay, `torch.optim.AdamW` (Loshchilov and Hutter, ICLR 2019).

    Its weight decay is not the gradient of a term of the inner loss, so with `weight_decay` > 0 its end is no
    stationary point of that loss and an implicit method does not apply: unroll it.

    Args: as for `Adam`; weight_decay shrinks the variables by lr * weight_decay a step.
    """

    weight_decay: Setting = 1e-2

    def update(self, lower: Vector, gradient: Vector, state: Any, t: int, now: dict[str, Any]) -> tuple[Vector, Any]:
        """See `Stepwise.update`."""
        descent, state = self._transform().update(gradient, state, params=lower, inplace=False)
        shrunk = lower
        if not _is_zero(now["weight_decay"]):
            shrunk = _descend(lower, _times(now["weight_decay"], lower), now["lr"])
        return axpy(1.0, _times(now["lr"], descent), shrunk), state


@dataclass(frozen=True)
class RMSProp(Stepwise):
    """RMSProp, `torch.optim.RMSprop` (Tieleman and Hinton 2012), on TorchOpt's transform.

    Args:
        lr: learning rate; a number, `lambda h: ...` or `lambda h, step: ...`.
        alpha: decay rate of the mean square, a number.
        eps: added to the root of the mean square.
        weight_decay: adds weight_decay * w to the gradient; as `lr`.
        momentum: heavy-ball factor; as `lr`.
        centered: divide by the standard deviation instead of the root mean square.
        steps: number of steps; or
        epochs: number of passes over `inner_data`.
    """

    lr: Setting = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: Setting = 0.0
    momentum: Setting = 0.0
    centered: bool = False

    def _transform(self) -> Any:
        return torchopt.rmsprop(
            lr=1.0, alpha=self.alpha, eps=self.eps, centered=self.centered, initial_scale=UNDER_ROOT
        )

    def initial_state(self, lower: Vector) -> Any:
        """Return the mean squares and, with momentum, zero buffers."""
        return {
            "moments": self._transform().init(lower),
            "buffer": {} if _is_zero(self.momentum) else zeros_like(lower),
        }

    def update(self, lower: Vector, gradient: Vector, state: Any, t: int, now: dict[str, Any]) -> tuple[Vector, Any]:
        """See `Stepwise.update`."""
        g = _add_decay(gradient, lower, now["weight_decay"])
        descent, moments = self._transform().update(g, state["moments"], params=lower, inplace=False)
        buffer = state["buffer"]
        if buffer:
            buffer = descent = axpy(1.0, _times(now["momentum"], buffer), descent)
        return axpy(1.0, _times(now["lr"], descent), lower), {"moments": moments, "buffer": buffer}
