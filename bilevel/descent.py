"""The two ways to walk: a torch optimizer, or SciPy's L-BFGS-B, over the unconstrained values."""

from __future__ import annotations

import hashlib
import inspect
from collections import deque
from collections.abc import Callable

import numpy as np
import torch

from bilevel.checkpoint import Keeper
from bilevel.errors import InvalidTypeError, InvalidValueError
from bilevel.minimize import HISTORY, Array, far_lbfgs
from bilevel.point import Point
from bilevel.run import Run, Stop
from bilevel.scaled import scaled_lbfgs
from bilevel.vector import Vector, detach, flatten, unflatten

TRIES = 8  # untrusted points on the way to a step; the last is 1 / 4^7 of the way


def descend(run: Run, keeper: Keeper, factory: Callable[..., torch.optim.Optimizer]) -> None:
    """Walk with a torch optimizer over the unconstrained values until `Stop`."""
    free = {name: torch.nn.Parameter(t.clone()) for name, t in run.free_start.items()}
    optimizer = made_optimizer(factory, list(free.values()))
    saved = keeper.resume(run)
    if saved is not None:
        optimizer.load_state_dict(saved["optimizer"])
        with torch.no_grad():
            for name, t in free.items():
                t.copy_(saved["free"][name])
    while True:
        point = run.evaluate({name: t.detach().clone() for name, t in free.items()})
        run.accept(point)
        move(optimizer, free, point.gradient, (run.low, run.high))
        keeper.after_step(run, {"free": detach(dict(free)), "optimizer": optimizer.state_dict()})


def move(
    optimizer: torch.optim.Optimizer, free: dict[str, torch.nn.Parameter], gradient: Vector, ends: tuple[Vector, Vector]
) -> None:
    """Take one step of the optimizer over unconstrained values, inside of their ranges."""
    for name, t in free.items():
        t.grad = gradient[name]
    optimizer.step()
    with torch.no_grad():
        for name, t in free.items():
            t.clamp_(ends[0][name], ends[1][name])


def made_optimizer(
    factory: Callable[..., torch.optim.Optimizer], tensors: list[torch.nn.Parameter]
) -> torch.optim.Optimizer:
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
    run.allow_slack()
    search = _Search(run, keeper)
    start, low, high = (flatten(v).double().cpu().numpy() for v in (run.free_start, run.low, run.high))
    bounded = bool(np.isfinite(low).all() and np.isfinite(high).all())
    minimizer = scaled_lbfgs if bounded and len(start) > HISTORY else far_lbfgs
    begin: Array | None = start
    while begin is not None:
        minimizer(search.function, begin, max_steps=run.steps, bounds=(low, high), after_step=search.after_step)
        begin = search.again()
    raise Stop(
        "stalled: L-BFGS found no lower outer loss along its direction; either the hypergradient is at the precision "
        "of the losses, or F is not a smooth function of the hyperparameters: a lasso has kinks, and its best strength "
        "is often one; for others try outer_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.05)"
    )


_UNTRUSTED_START = (
    "untrusted: the hypergradient at the start is untrusted, and no step is taken along one: {}; "
    'on_untrusted="ignore" goes along it all the same'
)
_UNTRUSTED_WAY = (
    "untrusted: {} points on the way to the next step, the last one very near, have untrusted hypergradients, and no "
    'step is taken to such a point: {}; on_untrusted="ignore" takes it all the same'
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
        self._replay = deque(self._seen)
        self._skip = len(run.history)
        # Since the accepted point: by the name of x, what SciPy was told, and how it was evaluated.
        self._known: dict[bytes, tuple[float, torch.Tensor]] = {}
        self._evaluated: dict[bytes, Point] = {}
        self._accepted = b""
        self._at: Array | None = None  # the accepted point
        self._unit, self._refused = 0.0, 0  # untrusted points since the accepted one

    def function(self, x: Array) -> tuple[float, Array]:
        """Return F and its gradient at unconstrained values, in units of the first gradient's norm.

        SciPy's first step is the gradient itself, which should move the values by about 1.
        """
        key = _name(x)
        # A point is evaluated once: training again from another start may end in another minimum.
        if key not in self._known:
            self._known[key] = self._replay.popleft() if self._replay else self._evaluate(x)
        if self._at is None:
            self._accepted, self._at = key, x.copy()
        value, gradient = self._known[key]
        self._unit = self._unit or float(gradient.norm()) or 1.0
        return value / self._unit, (gradient / self._unit).numpy()

    def _evaluate(self, x: Array) -> tuple[float, torch.Tensor]:
        like = self._run.free_start
        device = next(iter(like.values())).device
        point = self._run.evaluate(unflatten(torch.from_numpy(x.copy()).to(device), like))
        first, refused = self._run.start is None, self._run.refuses(point)
        if first:
            self._run.accept(point)
        if refused:
            return self._too_far(x, point, first)
        self._evaluated[_name(x)] = point
        return self._told(point.outer_loss, flatten(point.gradient).double().cpu())

    def _too_far(self, x: Array, point: Point, first: bool) -> tuple[float, torch.Tensor]:
        """Tell SciPy what makes its line search step back to a quarter of the way to an untrusted point.

        With F and its slope s < 0 at the accepted point, F - s and the slope -3 s are those of a parabola whose minimum
        is there, and no step to them is accepted.
        """
        self._refused += 1
        reasons = "; ".join(point.evaluation.hypergradient.certificate.reasons)
        if first:
            raise Stop(_UNTRUSTED_START.format(reasons))
        if self._refused == TRIES:
            raise Stop(_UNTRUSTED_WAY.format(TRIES, reasons))
        assert self._at is not None
        self._run.return_to_accepted()
        value, gradient = self._known[self._accepted]
        slope = float(gradient @ torch.from_numpy(x - self._at))
        return self._told(value + abs(slope), -3.0 * gradient)

    def _told(self, value: float, gradient: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Return what SciPy hears of a point, and keep it for a replay."""
        if self._keeper.active:
            self._seen.append((value, gradient))
        return value, gradient

    def again(self) -> Array | None:
        """Return the accepted point where the search had slack until it stalled there: it goes on without."""
        if self._replay:
            self._known[self._accepted] = self._replay.popleft()
            return self._at
        point = self._run.settle()
        if point is None:
            return None
        self._known[self._accepted] = self._told(point.outer_loss, flatten(point.gradient).double().cpu())
        return self._at

    def after_step(self, x: Array) -> bool:
        """Accept the point that an iteration led to; True where it led back to the last one, which ends the search."""
        key = _name(x)
        if key == self._accepted:
            return True
        self._accepted, self._at, self._refused = key, x.copy(), 0
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
