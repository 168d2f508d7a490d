"""The quasi-Newton walk takes no step to or from an untrusted hypergradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bilevel
from bilevel import BilevelProblem, Checkpoint, Hypergradient, Implicit

D = torch.float64


@dataclass(frozen=True)
class Doubtful:
    """An exact method that trusts itself between two hyperparameters only."""

    above: float = -1e9
    below: float = 1e9

    def __call__(self, response: Any, lower: Any, upper: Any, state: Any = None) -> tuple[Hypergradient, Any]:
        found, state = Implicit()(response, lower, upper, state)
        if not self.above < float(upper["hparams"]) < self.below:
            certificate = replace(found.certificate, verdict="untrusted", reasons=("doubts",))
            found = replace(found, certificate=certificate)
        return found, state


def problem(optimum: float, seen: list[float] | None = None, curvature: float = 1.0) -> BilevelProblem:
    """w*(h) = h and F(h) = curvature (h - optimum)^2; `seen` collects where F is evaluated."""

    def outer_loss(w: Any, h: Any) -> Any:
        if seen is not None and float(h.detach()) not in seen:
            seen.append(float(h.detach()))
        return curvature * (w - optimum) ** 2

    return BilevelProblem(
        lambda w, h: (w - h) ** 2, outer_loss, torch.zeros((), dtype=D), bilevel.real(torch.zeros((), dtype=D))
    )


def test_a_line_search_steps_back_to_a_quarter_of_the_way() -> None:
    seen: list[float] = []
    # The first step is of length 1, beyond what is trusted.
    solution = bilevel.solve(problem(0.3, seen), Doubtful(below=0.9))
    assert seen[:3] == pytest.approx([0.0, 1.0, 0.25])
    assert solution.converged and float(solution.hparams) == pytest.approx(0.3, abs=1e-6)
    assert all(record.verdict == "exact" for record in solution.history)
    assert solution.history[0].inner_solves == 2


def test_a_run_ends_before_what_is_untrusted() -> None:
    with pytest.warns(bilevel.UntrustedHypergradientWarning, match="untrusted: 8 points on the way.* doubts"):
        solution = bilevel.solve(problem(3.0), Doubtful(below=2.0))
    assert solution.status.startswith("untrusted: 8 points on the way to the next step")
    assert solution.certificate.verdict == "exact"
    assert solution.history and all(record.verdict == "exact" for record in solution.history)
    assert 0.9 < float(solution.hparams) < 2.0
    assert float(solution.params) == pytest.approx(float(solution.hparams), abs=1e-8)


def test_no_step_is_taken_from_an_untrusted_start() -> None:
    with pytest.warns(bilevel.UntrustedHypergradientWarning, match="1 of 1 hypergradients .* untrusted.* doubts"):
        solution = bilevel.solve(problem(3.0), Doubtful(above=0.5))
    assert solution.status.startswith("untrusted: the hypergradient at the start is untrusted") and not solution.history
    assert float(solution.hparams) == 0.0
    with pytest.raises(bilevel.UntrustedHypergradientError):
        bilevel.solve(problem(3.0), Doubtful(above=0.5), on_untrusted="raise")


def short_loop(goes_on: bool) -> BilevelProblem:
    """One strength; 10 gradient steps on curvatures down to 0.1, from the last iterate or from zero every time."""
    a = torch.tensor([1.0, 0.1], dtype=D)

    def train(w: Any, h: Any) -> Any:
        w = w.detach() if goes_on else torch.zeros_like(w)
        for _ in range(10):
            w = w - 0.9 * (a * (w - 1.0) + h.detach() * w)
        return w

    return BilevelProblem(
        lambda w, h: (a * (w - 1.0) ** 2).sum() / 2 + h / 2 * (w**2).sum(),
        lambda w, h: ((w - 0.8) ** 2).sum(),
        torch.zeros(2, dtype=D),
        bilevel.positive(torch.tensor(1e-3, dtype=D)),
        inner_solver=train,
    )


def test_a_short_loop_trains_on_until_its_hypergradients_are_trusted() -> None:
    solution = bilevel.solve(short_loop(goes_on=True), steps=20)
    assert solution.start.verdict != "untrusted" and solution.start.inner_solves > 3
    # The minimum of (1 / (1 + h) - 0.8)^2 + (0.1 / (0.1 + h) - 0.8)^2; without it, only 1/256 of the way is taken.
    assert solution.converged and float(solution.hparams) == pytest.approx(0.02938049, abs=1e-7)


def test_a_loop_that_begins_anew_is_not_trained_on_for_nothing() -> None:
    with pytest.warns(bilevel.UntrustedHypergradientWarning, match="train the inner problem further"):
        solution = bilevel.solve(short_loop(goes_on=False))
    assert solution.status.startswith("untrusted: the hypergradient at the start") and solution.start.inner_solves < 5


def test_ignored_doubts_hold_no_run_up() -> None:
    solution = bilevel.solve(problem(3.0), Doubtful(above=0.5, below=2.0), on_untrusted="ignore")
    assert solution.converged and float(solution.hparams) == pytest.approx(3.0, abs=1e-5)


def test_a_torch_optimizer_goes_on() -> None:
    with pytest.warns(bilevel.UntrustedHypergradientWarning, match="of this run are untrusted"):
        solution = bilevel.solve(
            problem(3.0), Doubtful(below=0.5), steps=5, outer_optimizer=lambda t: torch.optim.SGD(t, lr=0.1)
        )
    assert len(solution.history) == 5


def test_a_resumed_run_steps_back_the_same(tmp_path: Path) -> None:
    def run(steps: int, checkpoint: Any = None) -> bilevel.Solution:
        return bilevel.solve(problem(1.8, curvature=0.3), Doubtful(below=0.9), steps=steps, checkpoint=checkpoint)

    with pytest.warns(bilevel.UntrustedHypergradientWarning):
        whole = run(20)
    path = tmp_path / "run.pt"
    run(max(1, len(whole.history) - 1), Checkpoint(path, steps=1))
    with pytest.warns(bilevel.UntrustedHypergradientWarning):
        resumed = run(20, path)
    assert torch.equal(whole.hparams, resumed.hparams)
    assert [r.outer_loss for r in whole.history] == [r.outer_loss for r in resumed.history]


def test_a_short_loop_trains_on_the_same_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    whole = bilevel.solve(short_loop(goes_on=True))
    bilevel.solve(short_loop(goes_on=True), steps=1, checkpoint=Checkpoint(path, steps=1))
    resumed = bilevel.solve(short_loop(goes_on=True), checkpoint=path)
    assert torch.equal(whole.hparams, resumed.hparams)
    assert [r.outer_loss for r in whole.history] == [r.outer_loss for r in resumed.history]
