"""First-order inner optimizers with torch.optim's names and update rules, every step differentiable.

Adam's and RMSProp's moments are TorchOpt's functional transforms. The learning rate, the weight decay and momentum are
applied here, because TorchOpt takes them as Python numbers only and keeps the first-step flag of momentum outside of
its state (docs/design.md, "Inner optimizers").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torchopt

from bilevel.errors import InvalidTypeError, InvalidValueError
from bilevel.inner.base import Decay
from bilevel.inner.stepwise import Setting, Stepwise, check_number, is_zero
from bilevel.vector import Vector, axpy, detach, zeros_like

# Inside Adam's square root: sqrt has no derivative at 0, where an entry of the gradient has been 0 so far. Far below
# the square of Adam's eps, so the values stay those of torch.optim to the last digits.
UNDER_ROOT = 1e-30


def _times(setting: Any, v: Vector) -> Vector:
    """Return setting * v, with one factor for all tensors or one for each."""
    if isinstance(setting, dict):
        if set(setting) != set(v):
            raise InvalidValueError(f"a setting per tensor names {sorted(setting)}, expected {sorted(v)}")
        return {name: setting[name] * t for name, t in v.items()}
    return {name: setting * t for name, t in v.items()}


def _add_decay(gradient: Vector, lower: Vector, weight_decay: Any) -> Vector:
    """Return the gradient of the loss plus weight_decay / 2 |w|^2."""
    return gradient if is_zero(weight_decay) else axpy(1.0, _times(weight_decay, lower), gradient)


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

    def check(self) -> None:
        """See `Stepwise.check`; the same conditions as torch.optim.SGD."""
        check_number(self.dampening, "inner.SGD: `dampening`")
        if self.nesterov and (is_zero(self.momentum) or self.dampening != 0.0):
            raise InvalidValueError(
                f"inner.SGD: `nesterov` needs a `momentum` above 0 and no `dampening`, got momentum={self.momentum!r} "
                f"and dampening={self.dampening!r}"
            )

    @property
    def step_size(self) -> float | None:
        """See `InnerSolver`."""
        return float(self.lr) if isinstance(self.lr, (int, float)) and self.lr > 0.0 else None

    def initial_state(self, lower: Vector) -> Vector:
        """Return zero momentum buffers; none without momentum."""
        return {} if is_zero(self.momentum) else zeros_like(lower)

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

    def check(self) -> None:
        """See `Stepwise.check`."""
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise InvalidTypeError(f"inner.{type(self).__name__}: `betas` is {self.betas!r}, expected two numbers")
        for beta in self.betas:
            check_number(beta, f"inner.{type(self).__name__}: `betas` is {self.betas!r}; one", below=1.0)
        check_number(self.eps, f"inner.{type(self).__name__}: `eps`")

    @classmethod
    def tunable(cls) -> tuple[str, ...]:
        """TorchOpt's moments take betas and eps as numbers."""
        return ("lr", "weight_decay")

    def _moments(self) -> Any:
        return torchopt.transform.scale_by_adam(*self.betas, eps=self.eps, eps_root=UNDER_ROOT)

    def _direction(self, gradient: Vector, state: Any, t: int) -> tuple[Vector, Any]:
        """Return Adam's direction and the moments after this gradient.

        TorchOpt's moments, our bias correction: its own is computed in float32, 1e-4 off in the first steps.
        """
        _, after = self._moments().update(gradient, state, inplace=False)
        first, second = (1.0 - beta ** (t + 1) for beta in self.betas)
        return {
            name: (after.mu[name] / first) / (torch.sqrt(after.nu[name] / second + UNDER_ROOT) + self.eps)
            for name in gradient
        }, after

    def initial_state(self, lower: Vector) -> Any:
        """Return zero moments."""
        return self._moments().init(lower)

    def second_moment(self, state: Any) -> Vector | None:
        """See `Stepwise.second_moment`."""
        return detach(dict(state.nu))

    def update(self, lower: Vector, gradient: Vector, state: Any, t: int, now: dict[str, Any]) -> tuple[Vector, Any]:
        """See `Stepwise.update`."""
        g = _add_decay(gradient, lower, now["weight_decay"])
        direction, state = self._direction(g, state, t)
        return _descend(lower, direction, now["lr"]), state


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay, `torch.optim.AdamW` (Loshchilov and Hutter, ICLR 2019).

    Its weight decay is not the gradient of a term of the inner loss, so with `weight_decay` > 0 its end is no
    stationary point of that loss and an implicit method does not apply: unroll it.

    Args: as for `Adam`; weight_decay shrinks the variables by lr * weight_decay a step.
    """

    weight_decay: Setting = 1e-2

    @property
    def decays_outside_loss(self) -> Decay:
        """See `InnerSolver`; decoupled."""
        return None if is_zero(self.weight_decay) else "step"

    def update(self, lower: Vector, gradient: Vector, state: Any, t: int, now: dict[str, Any]) -> tuple[Vector, Any]:
        """See `Stepwise.update`."""
        direction, state = self._direction(gradient, state, t)
        shrunk = lower
        if not is_zero(now["weight_decay"]):
            shrunk = _descend(lower, _times(now["weight_decay"], lower), now["lr"])
        return _descend(shrunk, direction, now["lr"]), state


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

    def check(self) -> None:
        """See `Stepwise.check`."""
        check_number(self.alpha, "inner.RMSProp: `alpha`", below=1.0)
        check_number(self.eps, "inner.RMSProp: `eps`")

    def _transform(self) -> Any:
        return torchopt.rmsprop(
            lr=1.0, alpha=self.alpha, eps=self.eps, centered=self.centered, initial_scale=UNDER_ROOT
        )

    def initial_state(self, lower: Vector) -> Any:
        """Return the mean squares and, with momentum, zero buffers."""
        return {
            "moments": self._transform().init(lower),
            "buffer": {} if is_zero(self.momentum) else zeros_like(lower),
        }

    def update(self, lower: Vector, gradient: Vector, state: Any, t: int, now: dict[str, Any]) -> tuple[Vector, Any]:
        """See `Stepwise.update`."""
        g = _add_decay(gradient, lower, now["weight_decay"])
        descent, moments = self._transform().update(g, state["moments"], params=lower, inplace=False)
        buffer = state["buffer"]
        if buffer:
            buffer = descent = axpy(1.0, _times(now["momentum"], buffer), descent)
        return axpy(1.0, _times(now["lr"], descent), lower), {"moments": moments, "buffer": buffer}
