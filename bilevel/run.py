"""One run of `solve`: evaluated points, accepted steps, the history, and all that a later call needs to go on."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, replace
from typing import Any

import torch

from bilevel.certificate import Cost
from bilevel.errors import NonFiniteError
from bilevel.evaluation import Evaluation, Evaluator, report_untrusted, trained_on
from bilevel.listening import Listeners
from bilevel.point import Point
from bilevel.randomness import get_random, set_random
from bilevel.slack import START, may_loosen, next_slack, tightened
from bilevel.solution import Record, Solution
from bilevel.solvers.about import about
from bilevel.third_split import Best, measured
from bilevel.vector import Vector, detach, is_finite

SPENT = ("inner_steps", "inner_solves", "gradients", "products", "seconds")  # of a record


class Stop(BaseException):
    """Ends a run from inside; `status` says why."""

    def __init__(self, status: str) -> None:
        super().__init__(status)
        self.status = status


class Run:
    """One run of `solve`: evaluates points, accepts steps, keeps the history.

    Attributes:
        start: the record of the starting point; None before it was evaluated.
        history: the records of the steps.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        *,
        steps: int,
        tol: float,
        on_untrusted: str,
        listeners: Listeners,
        patience: int | None = None,
    ) -> None:
        self.evaluator, self.steps, self.tol = evaluator, steps, tol
        self._listeners = listeners
        self.start: Record | None = None
        self.history: list[Record] = []
        self._on_untrusted, self._best = on_untrusted, Best(patience)
        self._accepted: Point | None = None
        self._adapts = self._loosens = self._trains_on = False
        self._spent, self._inner_steps, self._solves = Cost(), 0, 0
        self._clock = time.perf_counter()
        hparams = evaluator.problem.hparams
        self.free_start = hparams.free(hparams.layout.start)
        self.low, self.high = hparams.bounds()

    def allow_slack(self) -> None:
        """Let the tolerances follow the outer progress, where that does no harm, and training go on."""
        self._trains_on = about(self.evaluator.estimator).begins == "solution" and self._on_untrusted != "ignore"
        # With patience any point may be the one that is returned, at the full tolerances.
        may = self._best.patience is None and may_loosen(self.evaluator.estimator, self.evaluator.problem)
        self._adapts = self._loosens = may
        self.evaluator.slack = START if self._loosens else 1.0

    def evaluate(self, free: Vector) -> Point:
        """Return the hypergradient at unconstrained values, chained to them; raise if untrusted and asked to."""
        evaluator, hparams = self.evaluator, self.evaluator.problem.hparams
        natural = detach(hparams.natural(free))
        evaluation = self._evaluation(natural)
        while self._adapts and not evaluation.hypergradient.certificate.trusted:
            less = tightened(evaluator.slack, evaluation.hypergradient.certificate)
            if less is None:
                break
            evaluator.slack, self._loosens = less, False
            evaluation = self._evaluation(natural)
        if self._trains_on:
            evaluation = trained_on(evaluation, lambda: self._evaluation(natural))
        found, slack = evaluation.hypergradient, evaluator.slack
        evaluator.slack = next_slack(slack, found.certificate) if self._loosens else 1.0
        gradient = hparams.chain(free, found.gradient)
        if not is_finite(gradient):
            raise self._located(NonFiniteError("the hypergradient is not finite", "hypergradient"))
        if self._on_untrusted == "raise":
            report_untrusted(found, "raise", stacklevel=1)
        return Point(detach(free), natural, gradient, evaluation, self._buffers(), slack)

    def _evaluation(self, natural: Vector) -> Evaluation:
        """Evaluate once, and count what it costs."""
        try:
            evaluation = self.evaluator(natural)
        except NonFiniteError as error:
            raise self._located(error) from error
        self._spent += evaluation.hypergradient.cost
        self._inner_steps += evaluation.inner_steps
        self._solves += 1
        return evaluation

    def _without_slack(self, point: Point) -> Point:
        """Return the point as it is without slack, which no later one of this run has either."""
        self._loosens, self.evaluator.slack = False, 1.0
        return point if point.slack <= 1.0 else self.evaluate(point.free)

    def refuses(self, point: Point) -> bool:
        """Say whether no step may be taken to or from this point."""
        return self._on_untrusted != "ignore" and not point.evaluation.hypergradient.certificate.trusted

    def return_to_accepted(self) -> None:
        """Let the next inner solve start from the last accepted point."""
        assert self._accepted is not None
        self.evaluator.lower = self._accepted.evaluation.hypergradient.params
        self._set_buffers(self._accepted.buffers)

    def _located(self, error: NonFiniteError) -> NonFiniteError:
        step = 0 if self.start is None else len(self.history) + 1
        return NonFiniteError(f"outer step {step}: {error}", error.quantity, step)

    def accept(self, point: Point) -> None:
        """Record the point that a step led to (the starting point first); raise `Stop` when it is time.

        Where that is the end of the run, the point is taken again without slack.
        """
        last = self.start is not None and len(self.history) + 1 == self.steps
        size = self._projected_norm(point)
        if point.slack > 1.0 and (last or self._is_stationary(size)):
            point = self._without_slack(point)
            size = self._projected_norm(point)
        record = self._record(point, size)
        self._accepted = point
        self._best.see(point, record.step, record.test_loss)
        if self.start is None:
            self.start = record
            self._listeners.begin([record])
        else:
            self.history.append(record)
            self._listeners.step(self.start, self.history)
        self._set_floor(point, self.start.hypergradient_norm)
        self._stop_if_done(size)
        if (status := self._best.status(record.step)) is not None:
            raise Stop(status)

    def settle(self) -> Point | None:
        """Take the last accepted point again without slack, in its place; None where it had none."""
        point = self._accepted
        if point is None or point.slack <= 1.0:
            return None
        self._accepted = point = self._without_slack(point)
        assert self.start is not None
        size, loose = self._projected_norm(point), self.history[-1] if self.history else self.start
        record = self._record(point, size)
        record = replace(record, step=loose.step, **{name: loose[name] + record[name] for name in SPENT})
        if self.history:
            self.history[-1] = record
        else:
            self.start = record
        self._stop_if_done(size)
        return point

    def _is_stationary(self, size: float) -> bool:
        return size <= self.tol * (0.0 if self.start is None else self.start.hypergradient_norm)

    def _stop_if_done(self, size: float) -> None:
        if size == 0.0 and not self.history:
            raise Stop(
                "converged: the hypergradient is exactly zero at the start; if that is a surprise, look for a term "
                "of the inner loss that is detached from params (.detach(), .item(), float())"
            )
        if self._is_stationary(size):
            raise Stop(
                f"converged: the projected hypergradient norm {size:.1e} is at most tol={self.tol:g} times the first"
            )
        if len(self.history) == self.steps:
            raise Stop(f"steps: all {self.steps} outer steps were taken")

    def _set_floor(self, point: Point, first: float) -> None:
        """Hold errors against a part of the first norm, which is one of unconstrained values, in natural units here."""
        evaluator = self.evaluator
        noisy = about(evaluator.estimator).begins == "last" and not evaluator.problem.deterministic
        evaluator.gradient_floor = point.error_floor(first, self.tol, noisy) or evaluator.gradient_floor

    def _projected_norm(self, point: Point) -> float:
        return point.projected_norm(self.low, self.high)

    def _record(self, point: Point, hypergradient_norm: float) -> Record:
        try:
            tested = measured(self.evaluator.problem, point.evaluation.hypergradient.params, point.natural)
        except NonFiniteError as error:
            raise self._located(error) from error
        now = time.perf_counter()
        record = point.record(
            step=0 if self.start is None else len(self.history) + 1,
            hypergradient_norm=hypergradient_norm,
            inner_steps=self._inner_steps,
            inner_solves=self._solves,
            cost=self._spent,
            seconds=now - self._clock,
            test_loss=tested,
        )
        self._spent, self._inner_steps, self._solves, self._clock = Cost(), 0, 0, now
        return record

    def _buffers(self) -> list[Vector]:
        problem = self.evaluator.problem
        return [problem.params.buffers(), problem.hparams.layout.buffers()]

    def _set_buffers(self, buffers: list[Vector]) -> None:
        problem = self.evaluator.problem
        problem.params.set_buffers(buffers[0])
        problem.hparams.layout.set_buffers(buffers[1])

    def layout(self) -> str:
        """Describe the variables and the method: a checkpoint goes on only with the same."""
        sides = (self.evaluator.problem.params.start, self.free_start)
        shapes = [{name: [str(t.dtype), *t.shape] for name, t in side.items()} for side in sides]
        digest = hashlib.sha256()
        for side in sides:
            for tensor in side.values():
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        start = f"start values {digest.hexdigest()[:12]}"
        return f"{self.evaluator.estimator!r} on params {shapes[0]}, hparams {shapes[1]}, {start}"

    def state(self) -> dict[str, Any]:
        """Return, as plain values and tensors, all that the next step depends on."""
        assert self._accepted is not None and self.start is not None
        problem, evaluator, point = self.evaluator.problem, self.evaluator, self._accepted
        return {
            "lower": evaluator.lower,
            "estimator": evaluator.state,
            "gradient_floor": evaluator.gradient_floor,
            "slack": evaluator.slack,
            "loosens": self._loosens,
            "factor": evaluator.factor,
            "buffers": self._buffers(),
            "position": problem.position(),
            "random": get_random(next(iter(self.free_start.values())).device),
            "start": asdict(self.start),
            "history": [asdict(record) for record in self.history],
            "accepted": point.state(),
            "best": self._best.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to where `state` was taken."""
        problem, evaluator = self.evaluator.problem, self.evaluator
        evaluator.lower, evaluator.state = state["lower"], state["estimator"]
        evaluator.gradient_floor, evaluator.factor = state["gradient_floor"], state["factor"]
        evaluator.slack, self._loosens = state["slack"], state["loosens"]
        self._set_buffers(state["buffers"])
        problem.go_to(state["position"])
        set_random(state["random"])
        self.start = Record(**state["start"])
        self.history = [Record(**record) for record in state["history"]]
        self._accepted = Point.restored(state["accepted"])
        self._best.restore(state.get("best"))

    def solution(self, status: str) -> Solution:
        """Return the last accepted point as a solution; with patience, that of the lowest test loss."""
        point, problem, step = self._best.point or self._accepted, self.evaluator.problem, len(self.history)
        assert point is not None and self.start is not None
        if self._best.point is not None and self._best.step != step:
            step = self._best.step
            status = f"{status}; returned is step {step}, where the test loss was lowest"
        lower, natural = point.evaluation.hypergradient.params, point.natural
        self._set_buffers(point.buffers)

        def write_back() -> None:
            self._set_buffers(point.buffers)
            problem.params.write_back(lower)
            problem.hparams.write_back(natural)

        return Solution(
            hparams=problem.hparams.layout.export(natural),
            params=problem.params.export(lower),
            outer_loss=point.outer_loss,
            history=self.history,
            status=status,
            certificate=point.evaluation.hypergradient.certificate,
            start=self.start,
            step=step,
            test_loss=(self.start, *self.history)[step].test_loss,
            _write_back=write_back,
            _names=problem.params.own_names,
        )
