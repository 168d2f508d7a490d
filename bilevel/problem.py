"""The bilevel problem: two losses, their variables and their data.

min over λ  f(w*(λ), λ)   with   w*(λ) ∈ argmin_w g(w, λ)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from bilevel.data import Batches
from bilevel.errors import InvalidTypeError, InvalidValueError, NotTwiceDifferentiableError
from bilevel.hyperparameters import Hyperparameters
from bilevel.inner import LBFGS, Custom, InnerSolver
from bilevel.layout import Variables
from bilevel.prox import assign
from bilevel.twice import INSTEAD, reentrant, silently_wrong
from bilevel.variables import variables


class BilevelProblem:
    """An inner training problem, and an outer objective at its solution.

    Args:
        inner_loss: `(params, hparams) -> scalar`, the training loss; `(params, hparams, batch)` when `inner_data` is
            given. Gets `params` and `hparams` in the structure given here.
        outer_loss: the validation loss; the same, with `outer_data`.
        params: where the inner variables start: a Tensor, a nested dict/list/tuple of Tensors, or an `nn.Module` (its
            parameters that require a gradient; `bilevel.parameters(model, "head.*")`: some of those).
        hparams: the hyperparameters: a Tensor, a nested structure of Tensors and typed hyperparameters
            (`bilevel.positive`, `interval`, `simplex`, `real`), or an `nn.Module`. One dtype and device with `params`.
        inner_solver: None for L-BFGS; one of `bilevel.inner`; or the user's own loop `fit(params, hparams) -> params`
            (`fit(params, hparams, data)` when `inner_data` is given).
        inner_data: None, one batch (any structure of Tensors and SciPy sparse matrices, which losses get as a
            `bilevel.sparse.Design`), a Dataset (read whole), or a DataLoader or another iterable of batches
            (minibatches).
        outer_data: the same for the outer loss.
        test_data: a third split, which nothing is tuned on; the same again. After each outer step of `solve`, its loss
            at the inner solution is written into the history.
        test_loss: what is written there; the same as `outer_loss`. None: `outer_loss` on `test_data`. Where losses
            close over their data, give this one alone.

    Raises:
        BilevelError: for anything that can be seen without training; the message names the argument.

    >>> import torch, bilevel
    >>> problem = bilevel.BilevelProblem(
    ...     inner_loss=lambda w, h: ((w - 1) ** 2 + h * w**2).sum(),
    ...     outer_loss=lambda w, h: ((w - 0.5) ** 2).sum(),
    ...     params=torch.zeros(1, dtype=torch.float64),
    ...     hparams=bilevel.positive(0.5),
    ... )
    >>> round(bilevel.solve(problem).hparams.item(), 6)  # w*(h) = 1 / (1 + h), best where it is 0.5
    1.0
    """

    inner_name: str = "inner_loss"
    """What messages call the inner loss."""
    members: int | None = None
    """How many members a family has (`bilevel.over`), whose data have a leading dimension for them."""
    params_name: str = "params"
    """What messages call the inner variables."""

    def __init__(
        self,
        inner_loss: Callable[..., Tensor],
        outer_loss: Callable[..., Tensor],
        params: Any,
        hparams: Any,
        inner_solver: InnerSolver | Callable[..., Any] | None = None,
        inner_data: Any = None,
        outer_data: Any = None,
        test_data: Any = None,
        test_loss: Callable[..., Tensor] | None = None,
    ) -> None:
        self.params: Variables = variables(params, self.params_name)
        first = next(iter(self.params.start.values()))
        self.hparams = Hyperparameters(hparams, like=first)
        _check_together(self.hparams.layout, first)
        self.inner_data, self.outer_data, self.test_data = inner_data, outer_data, test_data
        self.inner_batches = Batches(inner_data, "inner_data", first)
        # The batch that certificates and implicit methods look at comes from a reader of its own, so that training sees
        # every batch of a pass.
        self.pinned_batches = self.inner_batches.twin()
        self.outer_batches = Batches(outer_data, "outer_data", first)
        _check_loss(inner_loss, "inner_loss", self.inner_batches.given)
        _check_loss(outer_loss, "outer_loss", self.outer_batches.given)
        self.inner_loss, self.outer_loss = inner_loss, outer_loss
        self.test_batches = Batches(test_data, "test_data", first)
        self.test_loss = self._third(test_loss)
        self.inner_solver = _as_solver(inner_solver, self.inner_batches.given)
        assign(getattr(self.inner_solver, "penalties", ()), self.params)
        self._examined: set[str] = set()

    def _third(self, test_loss: Callable[..., Tensor] | None) -> Callable[..., Tensor] | None:
        """Return the loss of the third split; None without one."""
        batches = self.test_batches
        batches.check_repeats()
        if test_loss is not None:
            _check_loss(test_loss, "test_loss", batches.given)
        elif batches.given and not self.outer_batches.given:
            raise InvalidValueError(
                "`test_data` is given, but `outer_loss` takes no batch because `outer_data` is not; write "
                "test_loss=, a function (params, hparams, batch) -> scalar Tensor, or one of (params, hparams) that "
                "closes over its data, without `test_data`"
            )
        return self.outer_loss if test_loss is None and batches.given else test_loss

    @property
    def deterministic(self) -> bool:
        """Both losses see the same batch at every call."""
        return self.inner_batches.deterministic and self.outer_batches.deterministic

    def examine(self, inner_loss: Tensor) -> None:
        """Refuse what has a wrong second derivative without an error; looked for once.

        Raises:
            NotTwiceDifferentiableError: it names the operation and what to write instead.
        """
        if "twice" in self._examined:
            return
        wrong = silently_wrong(inner_loss)
        if wrong:
            raise NotTwiceDifferentiableError(
                f"`{self.inner_name}` uses {'; and '.join(wrong)}. Its second derivative would be wrong without "
                f"an error. {INSTEAD}"
            )
        self._examined.add("twice")

    def refuse_reentrant(self, loss: Tensor, name: str) -> None:
        """Refuse a loss whose gradient torch would leave a part of out without an error; looked for once.

        Raises:
            NotTwiceDifferentiableError: with the flag to set.
        """
        if name in self._examined or not loss.requires_grad:
            return
        if reentrant(loss):
            raise NotTwiceDifferentiableError(
                f"`{name}` uses reentrant activation checkpointing, whose parameters torch.autograd.grad leaves out; "
                "write checkpoint(..., use_reentrant=False)"
            )
        self._examined.add(name)

    def position(self) -> dict[str, Any]:
        """Return where the streams of batches are."""
        return {name: batches.position() for name, batches in self._readers().items()}

    def go_to(self, position: dict[str, Any]) -> None:
        """Bring the streams of batches to a position that `position` returned."""
        for name, batches in self._readers().items():
            batches.go_to(position[name])

    def restart(self) -> None:
        """Begin new passes through the data."""
        for batches in self._readers().values():
            batches.restart()

    def _readers(self) -> dict[str, Batches]:
        return {"inner": self.inner_batches, "pinned": self.pinned_batches, "outer": self.outer_batches}

    def __repr__(self) -> str:
        return self.described(repr(self.inner_solver))

    def described(self, inner_solver: str) -> str:
        """Return a line about it, with what the inner solver is called."""
        inner = sum(t.numel() for t in self.params.start.values())
        outer = sum(t.numel() for t in self.hparams.layout.start.values())
        return (
            f"BilevelProblem({inner} inner variables in {len(self.params.start)} tensors, {outer} hyperparameters in "
            f"{len(self.hparams.layout.start)}, inner_solver={inner_solver})"
        )


def _check_loss(loss: Any, name: str, with_batch: bool) -> None:
    wanted = ["params", "hparams", "batch"] if with_batch else ["params", "hparams"]
    if not callable(loss) or isinstance(loss, type):
        kind = f"the class {loss.__name__}" if isinstance(loss, type) else f"a {type(loss).__name__}"
        raise InvalidTypeError(f"`{name}` is {kind}, expected a function ({', '.join(wanted)}) -> scalar Tensor")
    _check_arguments(loss, name, wanted, name.replace("loss", "data"))


def _check_arguments(function: Any, name: str, wanted: list[str], data: str) -> None:
    """Raise unless `function` can be called with as many arguments as are `wanted`."""
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # some builtins have none; they are found out at the first call
        return
    try:
        signature.bind(*wanted)
    except TypeError as error:
        given = "is given" if len(wanted) == 3 else "is not given"
        raise InvalidTypeError(
            f"`{name}` takes {signature}, but is called with ({', '.join(wanted)}) because `{data}` {given}: {error}"
        ) from error


def _check_together(hparams: Variables, first: Tensor) -> None:
    for name, tensor in hparams.start.items():
        if tensor.dtype != first.dtype:
            raise InvalidValueError(
                f"{hparams.label(name)} is {tensor.dtype} but `params` are {first.dtype}; give both one dtype, for "
                f"example .to({first.dtype})"
            )
        if tensor.device != first.device:
            raise InvalidValueError(
                f"{hparams.label(name)} is on {tensor.device} but `params` are on {first.device}; give both one "
                f"device, for example .to('{first.device}')"
            )


def refuse_linear(solver: Any, name: str) -> None:
    """Raise for a linear solver in the place of an inner one."""
    if hasattr(solver, "truncates"):
        raise InvalidTypeError(
            f"`{name}` is {solver!r}, which solves linear systems and trains nothing; write "
            f"method=bilevel.Implicit({solver!r})"
        )


def _as_solver(solver: Any, with_data: bool) -> InnerSolver:
    if solver is None:
        return LBFGS()
    if isinstance(solver, type):
        name = solver.__name__ if hasattr(solver, "solve") else "SGD"
        raise InvalidTypeError(
            f"`inner_solver` is the class {solver.__name__}, expected an object or a function; write "
            f"bilevel.inner.{name}(...)"
        )
    if hasattr(solver, "solve"):
        refuse_linear(solver, "inner_solver")
        if not isinstance(solver, Custom):
            return solver  # type: ignore[no-any-return]
    custom = solver if isinstance(solver, Custom) else Custom(solver)
    _check_arguments(custom.fit, "inner_solver", ["params", "hparams", "data"][: 3 if with_data else 2], "inner_data")
    return custom
