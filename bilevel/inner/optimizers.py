"""First-order inner optimizers with torch.optim's names and update rules, every step differentiable.

RMSProp's moments are TorchOpt's functional transforms. Learning rates, weight decay, momentum and Adam are ours, in as
few passes over the memory as torch offers (docs/design.md, "Inner optimizers").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torchopt
from torch import Tensor

from bilevel.errors import InvalidTypeError, InvalidValueError
from bilevel.inner.base import Decay
from bilevel.inner.stepwise import Setting, Stepwise, check_number, is_zero
from bilevel.vector import Vector, detach, scale, zeros_like

# Inside Adam's square root: sqrt has no derivative at 0, where an entry of the gradient has been 0 so far. Far below
# the square of Adam's eps, so the values stay those of torch.optim to the last digits.
UNDER_ROOT = 1e-30


def _factors(setting: Any, v: Vector) -> dict[str, Any]:
    """Return a setting's factor for each tensor; it may be one for all."""
    if not isinstance(setting, dict):
        return dict.fromkeys(v, setting)
    if set(setting) != set(v):
        raise InvalidValueError(f"a setting per tensor names {sorted(setting)}, expected {sorted(v)}")
    return setting


def _plus(y: Vector, setting: Any, x: Vector, times: float = 1.0) -> Vector:
    """Return y + times * setting * x in one pass."""
    factors = _factors(setting, x)
    return {name: _fused(y[name], factors[name], t, times) for name, t in x.items()}


def _fused(y: Tensor, factor: Any, x: Tensor, times: float) -> Tensor:
    if not isinstance(factor, Tensor):
        return torch.add(y, x, alpha=times * factor)
    if factor.device != x.device:  # a number on the host, which only plain products take
        return y + times * factor * x
    return torch.addcmul(y, x, factor, value=times)


def _add_decay(gradient: Vector, lower: Vector, weight_decay: Any) -> Vector:
    """Return the gradient of the loss plus weight_decay / 2 |w|^2."""
    return gradient if is_zero(weight_decay) else _plus(gradient, weight_decay, lower)


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
            return _plus(lower, now["lr"], g, -1.0), state
        # torch.optim.SGD fills the buffer with the first gradient, undampened.
        taken = scale(1.0 - self.dampening, g) if self.dampening else g
        buffer = g if t == 0 else _plus(taken, now["momentum"], state)
        direction = _plus(g, now["momentum"], buffer) if self.nesterov else buffer
        return _plus(lower, now["lr"], direction, -1.0), buffer


@dataclass(frozen=True)
class Adam(Stepwise):
    """Adam, `torch.optim.Adam` (Kingma and Ba, ICLR 2015).

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
        """The moments take betas and eps as numbers."""
        return ("lr", "weight_decay")

    def _direction(self, gradient: Vector, state: dict[str, Vector], t: int) -> tuple[Vector, float, dict[str, Vector]]:
        """Return Adam's direction, a factor that is still to be applied, and the moments after this gradient.

        (mean / c_1) / (sqrt(square / c_2) + eps) with the bias corrections c = 1 - beta^(t+1) is
        mean / (sqrt(square) + eps sqrt(c_2)) times sqrt(c_2) / c_1.
        """
        mean = {n: torch.lerp(state["mean"][n], g, 1.0 - self.betas[0]) for n, g in gradient.items()}
        square = {n: torch.lerp(state["square"][n], g * g, 1.0 - self.betas[1]) for n, g in gradient.items()}
        first, second = (1.0 - beta ** (t + 1) for beta in self.betas)
        root = math.sqrt(second)
        direction = {n: mean[n] / (torch.sqrt(s + UNDER_ROOT * second) + self.eps * root) for n, s in square.items()}
        return direction, root / first, {"mean": mean, "square": square}

    def initial_state(self, lower: Vector) -> dict[str, Vector]:
        """Return zero moments."""
        return {"mean": zeros_like(lower), "square": zeros_like(lower)}

    def second_moment(self, state: Any) -> Vector | None:
        """See `Stepwise.second_moment`."""
        return detach(state["square"])

    def update(self, lower: Vector, gradient: Vector, state: Any, t: int, now: dict[str, Any]) -> tuple[Vector, Any]:
        """See `Stepwise.update`."""
        g = _add_decay(gradient, lower, now["weight_decay"])
        direction, size, state = self._direction(g, state, t)
        return _plus(lower, now["lr"], direction, -size), state


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
        direction, size, state = self._direction(gradient, state, t)
        shrunk = lower
        if not is_zero(now["weight_decay"]):
            factors = _factors(now["weight_decay"], lower)
            shrunk = _plus(lower, now["lr"], {name: factors[name] * w for name, w in lower.items()}, -1.0)
        return _plus(shrunk, now["lr"], direction, -size), state


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
            buffer = descent = _plus(descent, now["momentum"], buffer)
        return _plus(lower, now["lr"], descent), {"moments": moments, "buffer": buffer}
