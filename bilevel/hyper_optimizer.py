"""`HyperOptimizer`: steps of the hyperparameters inside of a training loop that stays the user's."""

from __future__ import annotations

import time
from typing import Any

import optree
import torch
from torch import Tensor, nn

from bilevel.certificate import Certificate
from bilevel.descent import made_optimizer, move
from bilevel.errors import InvalidTypeError, InvalidValueError, NonFiniteError
from bilevel.evaluation import Evaluator, check_on_untrusted, report_untrusted
from bilevel.handed import Handed, first_tensor, takes_batch, trained
from bilevel.hyperparameters import Hyperparameters
from bilevel.outer import OuterOptimizer, begun, check_outer_optimizer
from bilevel.patterns import named_parameters
from bilevel.point import Point
from bilevel.problem import BilevelProblem
from bilevel.randomness import RandomState, fork_random, get_random, set_random
from bilevel.selection import Selection
from bilevel.solution import Record
from bilevel.solvers import Estimator, estimator
from bilevel.solvers.linear.base import check_count
from bilevel.vector import Vector, detach, is_finite, norm


class HyperOptimizer:
    """Tune hyperparameters inside of a training loop of your own: `hyper.step(model, batch)` every few steps.

    The model stays yours: your optimizer trains it, with `hyper.hparams` in its loss, and `step` reads it where it is.
    It takes one hypergradient there, as `bilevel.hypergradient(problem, method, params=model)` does, and moves the
    hyperparameters by one step of the outer optimizer. Implicit methods take the model for the inner solution, those of
    a single loop ("soba") move the adjoint along, and those that unroll look a few steps of `inner_solver` ahead.

    Args:
        hparams: the hyperparameters, as `BilevelProblem` takes them.
        inner_loss: the training loss, `(model, hparams) -> scalar` or `(model, hparams, batch) -> scalar`.
        outer_loss: the validation loss; the same.
        method: a name (see `bilevel.METHODS`) or an estimator object. A method that is exact at the inner solution
            calls most hypergradients on the way there untrusted; one that approximates by design knows how much.
        inner_solver: for methods that take inner steps: how, `bilevel.inner.SGD(lr=0.1, steps=5)`.
        inner_data, outer_data: where batches come from that are not handed to `step`, as `BilevelProblem` takes them.
        outer_optimizer: a `torch.optim` class or a factory, over the unconstrained values; None: Adam(lr=0.05).
        on_untrusted: what to do about a hypergradient that cannot be trusted: "warn" (once), "raise" (nothing is moved)
            or "ignore". The step is taken unless it is "raise".
        seed: of the random numbers that steps draw; the global random state is left as it was.
        like: a tensor or a module whose dtype and device `hparams` take before the first step; None: torch's default.

    Attributes:
        hparams: natural values now, in the structure that was given: the same tensors all the time, changed in place.
        optimizer: the outer optimizer, for a scheduler of its learning rate.
        gradient: the last hypergradient, natural units, structured like `hparams`; None before.
        certificate: of the last hypergradient; None before.
        steps: how many were taken.

    >>> import torch, bilevel
    >>> w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    >>> inner = lambda w, h: ((w - 1) ** 2 + h * w**2).sum()
    >>> hyper = bilevel.HyperOptimizer(bilevel.positive(0.5), inner, lambda w, h: ((w - 0.5) ** 2).sum(), like=w)
    >>> train = torch.optim.SGD([w], lr=0.2)
    >>> for step in range(200):
    ...     train.zero_grad(); inner(w, hyper.hparams).backward(); train.step()
    ...     if step > 20:  # hypergradients are for a trained model
    ...         record = hyper.step(w)
    >>> round(hyper.hparams.item(), 3)  # w*(h) = 1 / (1 + h), best where it is 0.5
    1.0
    """

    def __init__(
        self,
        hparams: Any,
        inner_loss: Any,
        outer_loss: Any,
        method: str | Estimator = "neumann",
        *,
        inner_solver: Any = None,
        inner_data: Any = None,
        outer_data: Any = None,
        outer_optimizer: OuterOptimizer = None,
        on_untrusted: str = "warn",
        seed: int | None = None,
        like: Tensor | nn.Module | None = None,
    ) -> None:
        estimator(method)
        check_on_untrusted(on_untrusted)
        for name, loss in (("inner_loss", inner_loss), ("outer_loss", outer_loss)):
            if not callable(loss):
                raise InvalidTypeError(
                    f"`{name}` is a {type(loss).__name__}, expected a function (model, hparams) or "
                    "(model, hparams, batch) -> scalar Tensor"
                )
        self._given, self._losses, self._method = hparams, (inner_loss, outer_loss), method
        self._inner_solver, self._data, self._on_untrusted = inner_solver, (inner_data, outer_data), on_untrusted
        self._seed = seed
        self._random: RandomState | None = None
        ranges = Hyperparameters(hparams, first_tensor(like))
        natural = ranges.layout.start
        self.hparams = ranges.layout.export(natural)
        self._free = {name: nn.Parameter(t.clone()) for name, t in ranges.free(natural).items()}
        self.optimizer = made_optimizer(_factory(outer_optimizer), list(self._free.values()))
        self.gradient: Any = None
        self.certificate: Certificate | None = None
        self.steps, self._first_norm, self._warned = 0, 0.0, False
        self._evaluator: Evaluator | None = None
        self._streams = Handed(), Handed()
        self._of: Any = None
        self._resumed: dict[str, Any] | None = None

    def step(self, params: Any, outer_batch: Any = None, inner_batch: Any = None) -> Record:
        """Take one hypergradient at the model as it is, and one step of the hyperparameters.

        Args:
            params: the model (or `bilevel.parameters(model, ...)`, or tensors); it is left as it is.
            outer_batch: for `outer_loss`, where it takes one and `outer_data` was not given.
            inner_batch: for `inner_loss`, likewise.

        Returns:
            The `Record` of the point where the hypergradient was taken, as in the history of `solve`.

        Raises:
            UntrustedHypergradientError: with `on_untrusted="raise"`; nothing was moved.
            NonFiniteError: something became NaN or infinite; nothing was moved.
        """
        clock = time.perf_counter()
        evaluator = self._ready(params, inner_batch, outer_batch)
        problem = evaluator.problem
        lower, device = detach(problem.params.read(params, "`params`")), next(iter(self._free.values())).device
        with fork_random(device):
            self._go_on_drawing(device)
            point = self._point(evaluator, lower)
            torch.rand(1, device=device)  # so that no step draws the same again
            self._random = get_random(device)
        record = point.record(
            step=self.steps + 1,
            hypergradient_norm=point.projected_norm(*problem.hparams.bounds()),
            inner_steps=point.evaluation.inner_steps,
            inner_solves=0,
            cost=point.evaluation.hypergradient.cost,
            seconds=time.perf_counter() - clock,
        )
        self._first_norm = self._first_norm or float(norm(point.gradient))
        evaluator.gradient_floor = point.error_floor(self._first_norm, 0.0, noisy=True)
        self.gradient = problem.hparams.layout.shaped(point.evaluation.hypergradient.gradient)
        self.certificate = point.evaluation.hypergradient.certificate
        move(self.optimizer, self._free, point.gradient, problem.hparams.bounds())
        self._show(problem.hparams)
        self.steps += 1
        return record

    def _point(self, evaluator: Evaluator, lower: Vector) -> Point:
        """Return the hypergradient at the user's variables, chained to the unconstrained values."""
        ranges, free = evaluator.problem.hparams, detach(dict(self._free))
        natural = detach(ranges.natural(free))
        evaluation = evaluator(natural, given=lower)
        gradient = ranges.chain(free, evaluation.hypergradient.gradient)
        if not is_finite(gradient):
            raise NonFiniteError("the hypergradient is not finite", "hypergradient", self.steps + 1)
        policy = "ignore" if self._on_untrusted == "warn" and self._warned else self._on_untrusted
        report_untrusted(evaluation.hypergradient, policy, stacklevel=3)
        self._warned = self._warned or not evaluation.hypergradient.certificate.trusted
        return Point(free, natural, gradient, evaluation, [], 1.0)

    def _go_on_drawing(self, device: torch.device) -> None:
        """Go on with the random numbers of the last step, or begin."""
        if self._random is not None:
            set_random(self._random)
        elif self._seed is not None:
            torch.manual_seed(self._seed)

    def _ready(self, params: Any, inner_batch: Any, outer_batch: Any) -> Evaluator:
        """Hand over the batches, and return the evaluator of this model; a new one where other parameters train."""
        named = (("inner", inner_batch, self._data[0]), ("outer", outer_batch, self._data[1]))
        for stream, (side, batch, data) in zip(self._streams, named, strict=True):
            if batch is not None and data is not None:
                raise InvalidValueError(
                    f"step() got `{side}_batch`, and HyperOptimizer got `{side}_data`; give one of them"
                )
            stream.batch = batch
        given = (inner_batch is not None, outer_batch is not None)
        of = (trained(params), given, *map(id, self._data))
        if self._evaluator is None or of != self._of:
            problem = self._problem(params, given)
            chosen, notes = begun(problem, self._method)
            self._evaluator, self._of = Evaluator(problem, chosen, notes=notes), of
            self.to(next(iter(problem.hparams.layout.start.values())))
            if self._resumed is not None:
                _resume(self._evaluator, self._resumed)
                self._resumed = None
        follow = getattr(self._evaluator.problem.params, "follow", None)
        if follow is not None:
            follow(params.module if isinstance(params, Selection) else params)
        return self._evaluator

    def _problem(self, params: Any, given: tuple[bool, bool]) -> BilevelProblem:
        data: list[Any] = [
            stream if handed else own for stream, handed, own in zip(self._streams, given, self._data, strict=True)
        ]
        for side, source, loss in zip(("inner", "outer"), data, self._losses, strict=True):
            if source is None and takes_batch(loss):
                raise InvalidTypeError(
                    f"`{side}_loss` takes (model, hparams, batch), and step() was called without `{side}_batch`; write "
                    f"hyper.step(model, outer_batch, inner_batch), or HyperOptimizer(..., {side}_data=loader)"
                )
        return BilevelProblem(
            *self._losses, params, self._given, self._inner_solver, inner_data=data[0], outer_data=data[1]
        )

    def _tensors(self) -> list[Tensor]:
        if isinstance(self.hparams, nn.Module):
            return list(named_parameters(self.hparams).values())
        return optree.tree_leaves(self.hparams)

    def _show(self, ranges: Hyperparameters) -> None:
        """Bring `hparams` up to date."""
        natural = ranges.natural(detach(dict(self._free)))
        with torch.no_grad():
            for t, value in zip(self._tensors(), natural.values(), strict=True):
                t.copy_(value)

    @property
    def wants_inner_batch(self) -> bool:
        """`inner_loss` takes a batch, and there is no `inner_data` to draw it from."""
        return self._data[0] is None and takes_batch(self._losses[0])

    @property
    def wants_outer_batch(self) -> bool:
        """`outer_loss` takes a batch, and there is no `outer_data` to draw it from."""
        return self._data[1] is None and takes_batch(self._losses[1])

    def draw_from(self, *, inner: Any = None, outer: Any = None) -> None:
        """Take `inner_data` and `outer_data` from here on; None: as before."""
        self._data = (self._data[0] if inner is None else inner, self._data[1] if outer is None else outer)

    def to(self, like: Tensor | nn.Module) -> None:
        """Take over the dtype and the device of a tensor or a module; the first `step` does so by itself."""
        first = first_tensor(like)
        moments = [t for state in self.optimizer.state.values() for name, t in state.items() if name != "step"]
        for t in (*self._free.values(), *self._tensors(), *(t for t in moments if isinstance(t, Tensor))):
            t.data = t.data.to(first)

    def state_dict(self) -> dict[str, Any]:
        """Return, as plain values and tensors, all that the next step depends on beside the model.

        As in torch.optim they are the live ones: to go back to them later, take a copy.deepcopy.
        """
        kept = self._resumed if self._evaluator is None else _kept(self._evaluator)
        return {
            "steps": self.steps,
            "free": detach(dict(self._free)),
            "optimizer": self.optimizer.state_dict(),
            "random": self._random,
            "first_norm": self._first_norm,
            "method": kept,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned; `hparams` is brought up to date at once.

        Raises:
            InvalidValueError: it is that of other hyperparameters.
        """
        shapes = {name: tuple(t.shape) for name, t in self._free.items()}
        found = {name: tuple(t.shape) for name, t in state.get("free", {}).items()}
        if shapes != found:
            raise InvalidValueError(
                f"`state` belongs to hyperparameters of the shapes {found}, and this HyperOptimizer has {shapes}"
            )
        with torch.no_grad():
            for name, t in self._free.items():
                t.copy_(state["free"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self._random, self._first_norm = state["steps"], state["random"], state["first_norm"]
        self._resumed, self._evaluator = state["method"], None
        self._show(Hyperparameters(self._given, next(iter(self._free.values()))))

    def __repr__(self) -> str:
        return f"HyperOptimizer({sum(t.numel() for t in self._free.values())} hyperparameters, {self.steps} steps)"


def _kept(evaluator: Evaluator) -> dict[str, Any]:
    return {
        "state": evaluator.state,
        "factor": evaluator.factor,
        "gradient_floor": evaluator.gradient_floor,
        "position": evaluator.problem.position(),
    }


def _resume(evaluator: Evaluator, kept: dict[str, Any]) -> None:
    evaluator.state, evaluator.factor = kept["state"], kept["factor"]
    evaluator.gradient_floor = kept["gradient_floor"]
    evaluator.problem.go_to(kept["position"])


def _factory(given: OuterOptimizer) -> Any:
    if given == "lbfgs":
        raise InvalidValueError(
            '`outer_optimizer` is "lbfgs", whose line search goes back and forth, and a training loop goes on; write '
            "outer_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.05)"
        )
    if given is None:
        return lambda tensors: torch.optim.Adam(tensors, lr=0.05)
    check_outer_optimizer(given)
    return given


def check_schedule(hyper: Any, every_n_steps: Any, after_n_steps: Any) -> None:
    """Raise for what a callback around a `HyperOptimizer` cannot work with."""
    if not isinstance(hyper, HyperOptimizer):
        raise InvalidTypeError(
            f"`hyper` is a {type(hyper).__name__}, expected a bilevel.HyperOptimizer(hparams, inner_loss, outer_loss)"
        )
    check_count(every_n_steps, "every_n_steps")
    if after_n_steps:
        check_count(after_n_steps, "after_n_steps")
