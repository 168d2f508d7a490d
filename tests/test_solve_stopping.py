"""`solve`: how it stops, at its tolerance, by a key, at numbers that are not finite and where trust ends."""

from __future__ import annotations

import os
import signal
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import BilevelProblem, Record, inner, solve
from bilevel.errors import BilevelError, NonFiniteError, UntrustedHypergradientError, UntrustedHypergradientWarning
from problems import PROBLEMS, RIDGE
from problems_solve import TUNED, Doubtful, flat_of, nan_below, sgd, shrinkage

# How it stops


def test_it_stops_after_the_steps() -> None:
    for optimizer in ("lbfgs", sgd):
        solution = solve(RIDGE.problem(), steps=3, outer_optimizer=optimizer)
        assert solution.status == "steps: all 3 outer steps were taken"
        assert not solution.converged
        assert [record.step for record in solution.history] == [1, 2, 3]


def test_it_stops_at_the_tolerance() -> None:
    for optimizer in ("lbfgs", sgd):
        solution = solve(RIDGE.problem(), steps=100, outer_optimizer=optimizer, tol=0.5)
        norms = [record.hypergradient_norm for record in [solution.start, *solution.history]]
        assert solution.status.startswith("converged: the projected hypergradient norm")
        assert "tol=0.5" in solution.status
        assert norms[-1] <= 0.5 * norms[0]
        assert all(norm > 0.5 * norms[0] for norm in norms[:-1]), "it stops at the first"


def test_a_start_at_the_optimum_takes_no_step() -> None:
    problem = BilevelProblem(
        lambda w, h: ((w - h) ** 2).sum(),
        lambda w, h: ((w - 1.0) ** 2).sum(),
        torch.zeros(2, dtype=torch.float64),
        torch.ones(2, dtype=torch.float64),
        inner.SGD(lr=0.5, steps=1),  # one step of length 1/2 is exact here
    )
    for optimizer in ("lbfgs", sgd):
        solution = solve(problem, outer_optimizer=optimizer)
        assert solution.converged
        assert solution.history == []
        assert solution.start.hypergradient_norm == 0.0
        assert solution.summary().splitlines()[0].split()[:2] == ["status", "converged:"]


def test_a_hyperparameter_held_at_its_bound_counts_as_converged() -> None:
    problem = BilevelProblem(
        lambda w, h: ((w - 1.0) ** 2).sum() / 2 + h * (w**2).sum() / 2,
        lambda w, h: ((w - 1.0) ** 2).sum() / 2,
        torch.zeros(1, dtype=torch.float64),
        bilevel.positive(1.0, low=0.1),
    )
    solution = solve(problem)
    assert solution.converged
    assert float(solution.hparams) == pytest.approx(0.1, rel=1e-12)
    assert solution.history[-1].hypergradient_norm == 0.0, "projected on the bound"


def test_a_kink_stalls_lbfgs() -> None:
    problem = BilevelProblem(
        lambda w, h: ((w - h) ** 2).sum(),
        lambda w, h: (w - 0.3).abs().sum(),
        torch.zeros(1, dtype=torch.float64),
        bilevel.real(1.0, shape=(1,)),
    )
    solution = solve(problem, steps=100)
    assert solution.status.startswith("stalled: L-BFGS found no lower outer loss") and "kinks" in solution.status
    assert "outer_optimizer" in solution.status
    assert len(solution.history) < 100
    assert solution.outer_loss <= solution.start.outer_loss


@pytest.mark.parametrize("optimizer", ["lbfgs", sgd])
def test_ctrl_c_returns_the_run_so_far(optimizer: Any) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts without

    def interrupt(record: Record) -> None:
        if record.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    solution = solve(RIDGE.problem(), steps=50, outer_optimizer=optimizer, callbacks=[interrupt])
    assert solution.status.startswith("interrupted: by the user after 2 steps")
    assert len(solution.history) == 2
    again = solve(RIDGE.problem(), steps=2, outer_optimizer=optimizer)
    assert torch.equal(solution.hparams, again.hparams)
    assert solution.outer_loss == again.outer_loss


def test_ctrl_c_inside_a_loss_returns_the_last_step() -> None:
    def interrupt(h: Tensor) -> Tensor:
        if float(h.detach()) < 0.9:
            raise KeyboardInterrupt
        return torch.ones_like(h)

    solution = solve(shrinkage(outer_factor=interrupt), outer_optimizer=sgd)
    assert solution.status.startswith(f"interrupted: by the user after {len(solution.history)} steps")
    assert float(solution.hparams) >= 0.9
    with pytest.raises(KeyboardInterrupt):  # nothing to return yet
        solve(shrinkage(outer_factor=interrupt, strength=0.5), outer_optimizer=sgd)


# Numbers that are not finite


@pytest.mark.parametrize("optimizer", ["lbfgs", sgd])
@pytest.mark.parametrize(
    ("broken", "quantity"),
    [
        (shrinkage(inner_factor=nan_below(0.9)), "inner loss"),
        (shrinkage(inner_factor=nan_below(0.9), inner_solver=inner.SGD(lr=0.3, steps=60)), "inner variables"),
        (shrinkage(outer_factor=nan_below(0.9)), "outer loss"),
        # At 0 the square root has a value and no gradient.
        (
            shrinkage(outer_factor=lambda h: 1.0 + (torch.sqrt(0.0 * h) if float(h.detach()) < 0.9 else 0.0 * h)),
            "hypergradient",
        ),
    ],
    ids=["inner loss", "inner variables", "outer loss", "gradient"],
)
def test_a_nan_stops_the_run_and_keeps_the_last_good_step(broken: Any, quantity: str, optimizer: Any) -> None:
    with pytest.raises(NonFiniteError) as caught:
        solve(broken, steps=100, outer_optimizer=optimizer)
    error = caught.value
    assert error.quantity == quantity
    assert isinstance(error, BilevelError)
    assert isinstance(error, ArithmeticError)
    solution = error.solution
    assert error.step == len(solution.history) + 1
    assert str(error).startswith(f"outer step {error.step}: ")
    assert solution.status.startswith("stopped: outer step")
    assert float(solution.hparams) >= 0.9
    assert all(np.isfinite(record.outer_loss) for record in solution.history)
    assert bool(torch.isfinite(solution.params).all())


def test_a_nan_at_the_start_has_no_solution_to_keep() -> None:
    with pytest.raises(NonFiniteError, match="outer step 0: the outer loss is nan") as caught:
        solve(shrinkage(outer_factor=nan_below(2.0)))
    assert (caught.value.step, caught.value.solution) == (0, None)


def test_an_infinite_outer_gradient_is_found_out() -> None:
    problem = BilevelProblem(
        lambda w, h: (w**2).sum() + 0.0 * h,
        lambda w, h: torch.sqrt((w**2).sum()),  # no gradient at w = 0, where the inner problem ends
        torch.zeros(2, dtype=torch.float64),
        bilevel.positive(1.0),
    )
    with pytest.raises(NonFiniteError) as caught:
        solve(problem)
    assert caught.value.quantity == "outer gradient"


# Trust


def test_untrusted_hypergradients_warn_once_a_run() -> None:
    with pytest.warns(UntrustedHypergradientWarning) as caught:
        solution = solve(RIDGE.problem(), Doubtful(), steps=5, outer_optimizer=sgd)
    assert [str(w.message) for w in caught] == [
        "4 of 6 hypergradients of this run are untrusted, the first at step 2: a bad feeling"
    ]
    assert caught[0].filename == __file__, "the warning points at the caller"
    assert [record.verdict for record in solution.history] == ["exact"] + ["untrusted"] * 4
    assert "untrusted hypergradients  4 of 6" in solution.summary()
    assert "a bad feeling" in solution.summary()


def test_untrusted_hypergradients_can_be_ignored() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solve(RIDGE.problem(), Doubtful(), steps=5, outer_optimizer=sgd, on_untrusted="ignore")
    assert not solution.certificate.trusted


@pytest.mark.parametrize("optimizer", ["lbfgs", sgd])
def test_untrusted_hypergradients_can_stop_the_run(optimizer: Any) -> None:
    with pytest.raises(UntrustedHypergradientError, match="the hypergradient is untrusted: a bad feeling") as caught:
        solve(RIDGE.problem(), Doubtful(), steps=5, outer_optimizer=optimizer, on_untrusted="raise")
    assert caught.value.certificate.reasons == ("a bad feeling",)
    solution = caught.value.solution
    assert solution.certificate.trusted
    assert len(solution.history) == 1
    assert solution.status.startswith("stopped: the hypergradient is untrusted")


@pytest.mark.parametrize("name", TUNED)
@pytest.mark.parametrize("method", ["cg", "minres", "gmres"])
def test_a_run_that_converges_does_not_warn_of_its_last_digits(name: str, method: str) -> None:
    # As the hypergradient vanishes, a fixed error of 1e-8 of the first one becomes large beside it.
    solution = solve(PROBLEMS[name].problem(), method, steps=300, on_untrusted="raise")
    assert solution.certificate.verdict == "exact"
    truth = PROBLEMS[name].truth_at(solution.hparams)
    first = PROBLEMS[name].truth
    found = bilevel.hypergradient(PROBLEMS[name].problem(), method, hparams=solution.hparams, on_untrusted="ignore")
    off = float((flat_of(found.gradient) - flat_of(truth.gradient)).norm() / flat_of(first.gradient).norm())
    assert off <= 1e-6, "the error is below the tolerance of the run"


def test_an_inner_problem_that_is_not_solved_is_untrusted() -> None:
    lazy = RIDGE.problem(inner.SGD(lr=1e-3, steps=2))
    with pytest.warns(UntrustedHypergradientWarning, match="train the inner problem further"):
        solve(lazy, steps=1)
    with pytest.raises(UntrustedHypergradientError) as caught:
        solve(lazy, steps=1, on_untrusted="raise")
    assert caught.value.solution is None
    with pytest.warns(UntrustedHypergradientWarning) as warned:
        bilevel.hypergradient(lazy)
    assert warned[0].filename == __file__
