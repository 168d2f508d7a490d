"""The two ways to walk: a torch optimizer, or SciPy's L-BFGS-B, over the unconstrained values."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable

import numpy as np
import torch

from bilevel.checkpoint import Keeper
from bilevel.errors import InvalidTypeError, InvalidValueError
from bilevel.minimize import HISTORY, Array, lbfgs
from bilevel.run import Point, Run, Stop
from bilevel.scaled import scaled_lbfgs
from bilevel.vector import detach, flatten, unflatten


def descend(run: Run, keeper: Keeper, factory: Callable[..., torch.optim.Optimizer]) -> None:
    """Walk with a torch optimizer over the unconstrained values until `Stop`."""
    free = {name: torch.nn.Parameter(t.clone()) for name, t in run.free_start.items()}
    optimizer = _made(factory, list(free.values()))
    saved = keeper.resume(run)
    if saved is not None:
        optimizer.load_state_dict(saved["optimizer"])
        with torch.no_grad():
            for name, t in free.items():
                t.copy_(saved["free"][name])
    while True:
        point = run.evaluate({name: t.detach().clone() for name, t in free.items()})
        run.accept(point)
        for name, t in free.items():
            t.grad = point.gradient[name]
        optimizer.step()
        with torch.no_grad():
            for name, t in free.items():
                t.clamp_(run.low[name], run.high[name])
        keeper.after_step(run, {"free": detach(dict(free)), "optimizer": optimizer.state_dict()})


def _made(factory: Callable[..., torch.optim.Optimizer], tensors: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Return the user's optimizer, after checking that it can walk."""
    try:
        inspect.signature(factory).bind(tensors)
    except TypeError as error:
        raise InvalidTypeError(
            f"`outer_optimizer` takes {inspect.signature(factory)}, but is called with a list of tensors: "
            f"{error}; write lambda tensors: torch.optim.Adam(tensors, lr=0.05)"
        ) from error
    optimizer = factory(tensors)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidTypeError(
            f"`outer_optimizer` returned a {type(optimizer).__name__}, expected a torch.optim optimizer of the tensors "
            "it was given; write lambda tensors: torch.optim.Adam(tensors, lr=0.05)"
        )
    held = {id(t) for group in optimizer.param_groups for t in group["params"]}
    if held != {id(t) for t in tensors}:
        raise InvalidValueError(
            "`outer_optimizer` returned an optimizer of other tensors than the ones it was given; write "
            "lambda tensors: torch.optim.Adam(tensors, lr=0.05)"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InvalidTypeError(
            "`outer_optimizer` returned torch.optim.LBFGS, which evaluates the loss several times a step and cannot "
            'take a step from one hypergradient; write outer_optimizer="lbfgs"'
        )
    return optimizer


def descend_lbfgs(run: Run, keeper: Keeper) -> None:
    """Walk with L-BFGS-B over the unconstrained values; raise `Stop` in the end."""
    search = _Search(run, keeper)
    start, low, high = (flatten(v).double().cpu().numpy() for v in (run.free_start, run.low, run.high))
    bounded = bool(np.isfinite(low).all() and np.isfinite(high).all())
    minimizer = scaled_lbfgs if bounded and len(start) > HISTORY else lbfgs
    minimizer(search.function, start, max_steps=run.steps, bounds=(low, high), after_step=search.after_step)
    raise Stop(
        "stalled: L-BFGS found no lower outer loss along its direction; either the hypergradient is at the precision "
        "of the losses, or F is not a smooth function of the hyperparameters: a lasso has kinks, and its best strength "
        "is often one; for others try outer_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.05)"
    )


class _Search:
    """What SciPy's L-BFGS-B asks of a run.

    SciPy keeps the state of its search to itself. A resumed run therefore replays the values and gradients of the steps
    that were taken, which costs no evaluation and leads SciPy to the same state, bit for bit.
    """

    def __init__(self, run: Run, keeper: Keeper) -> None:
        self._run, self._keeper = run, keeper
        saved = keeper.resume(run)
        self._seen: list[tuple[float, torch.Tensor]] = [] if saved is None else list(saved["seen"])
        self._replay = iter(list(self._seen))
        self._skip = len(run.history)
        # Since the accepted point: by the name of x, what SciPy was told, and how it was evaluated.
        self._known: dict[bytes, tuple[float, torch.Tensor]] = {}
        self._evaluated: dict[bytes, Point] = {}
        self._accepted = b""
        self._unit = 0.0

    def function(self, x: Array) -> tuple[float, Array]:
        """Return F and its gradient at unconstrained values, in units of the first gradient's norm.

        SciPy's first step is the gradient itself, which should move the values by about 1.
        """
        key = _name(x)
        # A point is evaluated once: training again from another start may end in another minimum.
        if key not in self._known:
            self._known[key] = next(self._replay, None) or self._evaluate(x)
        value, gradient = self._known[key]
        self._unit = self._unit or float(gradient.norm()) or 1.0
        return value / self._unit, (gradient / self._unit).numpy()

    def _evaluate(self, x: Array) -> tuple[float, torch.Tensor]:
        like = self._run.free_start
        device = next(iter(like.values())).device
        point = self._run.evaluate(unflatten(torch.from_numpy(x.copy()).to(device), like))
        if self._run.start is None:
            self._run.accept(point)
        self._evaluated[_name(x)] = point
        found = point.evaluation.hypergradient
        result = found.outer_loss + found.correction, flatten(point.gradient).double().cpu()
        if self._keeper.active:
            self._seen.append(result)
        return result

    def after_step(self, x: Array) -> bool:
        """Accept the point that an iteration led to; True where it led back to the last one, which ends the search."""
        key = _name(x)
        if key == self._accepted:
            return True
        self._accepted = key
        self._known = {key: self._known[key]}
        if self._skip:
            self._skip -= 1
            return False
        self._evaluated = {key: self._evaluated[key]}
        self._run.accept(self._evaluated[key])
        self._keeper.after_step(self._run, {"seen": list(self._seen)})
        return False


def _name(x: Array) -> bytes:
    """Return a name for a point: equal for equal numbers alone, and short however many they are."""
    return hashlib.sha256(x.data).digest()
