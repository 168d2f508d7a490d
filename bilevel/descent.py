"""The two ways to walk: a torch optimizer, or SciPy's L-BFGS-B, over the unconstrained values."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch

from bilevel.checkpoint import Keeper
from bilevel.errors import InvalidTypeError, InvalidValueError
from bilevel.minimize import Array, lbfgs
from bilevel.run import Point, Run, Stop
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
    """Walk with L-BFGS-B over the unconstrained values; raise `Stop` in the end.

    SciPy keeps the state of its search to itself. A resumed run therefore replays the values and gradients of the steps
    that were taken, which costs no evaluation and leads SciPy to the same state, bit for bit.
    """
    like = run.free_start
    device = next(iter(like.values())).device
    evaluated: dict[bytes, Point] = {}
    saved = keeper.resume(run)
    seen: list[tuple[float, torch.Tensor]] = [] if saved is None else list(saved["seen"])
    replay = iter(list(seen))
    skip = len(run.history)

    def scaled(value: float, gradient: torch.Tensor) -> tuple[float, Array]:
        # In units of the first gradient: SciPy's first step is the gradient itself, which should move u by about 1.
        unit = float(seen[0][1].norm()) or 1.0
        return value / unit, (gradient / unit).numpy()

    def function(x: Array) -> tuple[float, Array]:
        for value, gradient in replay:
            return scaled(value, gradient)
        point = run.evaluate(unflatten(torch.from_numpy(x.copy()).to(device), like))
        if run.start is None:
            run.accept(point)
        evaluated[x.tobytes()] = point
        found = point.evaluation.hypergradient
        seen.append((found.outer_loss + found.correction, flatten(point.gradient).double().cpu()))
        return scaled(*seen[-1])

    def after_step(x: Array) -> bool:
        nonlocal skip
        if skip:
            skip -= 1
            return False
        point = evaluated[x.tobytes()]
        evaluated.clear()  # one line search at a time, from the accepted point
        evaluated[x.tobytes()] = point
        run.accept(point)
        keeper.after_step(run, {"seen": list(seen)})
        return False

    start, low, high = (flatten(v).double().cpu().numpy() for v in (like, run.low, run.high))
    lbfgs(function, start, max_steps=run.steps, bounds=(low, high), after_step=after_step)
    raise Stop(
        "stalled: L-BFGS found no lower outer loss along its direction; either the hypergradient is at the precision "
        "of the losses, or F is not a smooth function of the hyperparameters (try outer_optimizer=torch.optim.Adam)"
    )
