"""Methods that move the inner variables themselves: SOBA, SABA, AmIGO, stocBiO, against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bilevel
from bilevel import SABA, SOBA, AmIGO, BilevelProblem, StocBiO
from bilevel.evaluation import Evaluator
from bilevel.response import ProblemResponse
from bilevel.solvers import Estimator, single_loop
from bilevel.solvers.single_loop import Moving
from bilevel.testing import KnownProblem, check_estimator, known_problems, relative_error
from problems_single_loop import (
    BATCH,
    METHODS,
    STRENGTHS,
    TRUTH,
    XV,
    YV,
    D,
    N,
    W,
    X,
    Y,
    found,
    logistic,
    normal,
    problem,
    squares,
)

# The closed-form table. On fixed data each move contracts: what is left is 1e-10, the move that counts as none, times
# the condition (up to 300); stocBiO's series is cut after `terms` terms and (1 - 1/30)^1000 = 2e-15.
LINEAR: dict[str, Estimator] = {
    "soba": SOBA(warmup=20_000),
    "saba": SABA(warmup=20_000),
    "amigo": AmIGO(warmup=20_000),
    "stocbio": StocBiO(terms=1000),
}

FIRST = {"soba": 4, "saba": 1, "amigo": 2, "stocbio": 2}


@pytest.mark.parametrize("name", LINEAR)
def test_fixed_data_reach_the_truth(name: str) -> None:
    # A series of 1,000 products a call is for the small conditions only; SABA has one block here, and is SOBA.
    check_estimator(LINEAR[name], tolerance=1e-6, problems=known_problems()[: FIRST[name]])


@pytest.mark.parametrize("name", ["soba", "amigo", "stocbio"])
@pytest.mark.parametrize("known", known_problems()[:4], ids=lambda known: known.name)
def test_the_first_call_alone_solves_and_knows_its_error(known: KnownProblem, name: str) -> None:
    alone = found(known.problem(), name)
    error = relative_error(alone.gradient, known.truth.gradient)
    estimate = alone.certificate.error
    assert estimate is not None and error / 3.0 <= estimate <= 10.0 * error  # measured: 0.99 to 3.4
    assert error <= (0.1 if name == "stocbio" else 1e-6)  # 30 terms at condition 30: 0.04
    if name != "stocbio":
        assert relative_error(alone.params, known.truth.params) <= 1e-6


def test_the_series_of_stocbio_is_short_by_its_last_term() -> None:
    """On a Hessian of one eigenvalue v is (1 - (1 - η μ)^(terms + 1)) of the truth."""
    of = BilevelProblem(
        lambda w, h: ((w - 1.0) ** 2).sum() / 2 + h * (w**2).sum() / 2,
        lambda w, h: (w**2).sum() / 2,
        torch.zeros(2, dtype=torch.float64),
        bilevel.positive(1.0),
    )
    whole = found(of, "direct").gradient
    cut = found(of, StocBiO(lr=0.1, terms=5, warmup=1000)).gradient
    assert float(cut / whole) == pytest.approx(1.0 - 0.8**6, rel=1e-8)


# One step, by hand


def test_a_call_of_soba_is_the_step_of_the_paper() -> None:
    """All directions at one point; w and v move, and the next call begins there."""
    of, lr = problem("whole"), 0.1
    evaluate = Evaluator(of, SOBA(lr=lr, steps=1, warmup=1))
    upper = of.hparams.layout.start
    w, v = torch.zeros(D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
    M = X.T @ X / N + torch.diag(STRENGTHS)
    for call in range(4):
        for _ in range(2 if call == 0 else 1):  # the first call: a step of warm-up, and its own
            inner, outer = M @ w - X.T @ Y / N, XV.T @ (XV @ w - YV) / N
            at, gradient = w, -w * v
            w, v = w - lr * inner, v - lr * (M @ v - outer)
        here = evaluate(upper).hypergradient
        torch.testing.assert_close(here.params["params"], at, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(here.gradient["hparams"], gradient, rtol=1e-12, atol=1e-14)


def test_momentum_is_the_moving_average_of_the_directions() -> None:
    plain, averaged = (Evaluator(problem("whole"), SOBA(warmup=3, steps=1, momentum=m)) for m in (0.0, 0.75))
    upper = plain.problem.hparams.layout.start
    mean = plain(upper).hypergradient.gradient["hparams"]
    torch.testing.assert_close(averaged(upper).hypergradient.gradient["hparams"], mean, rtol=0, atol=0)
    for _ in range(3):
        mean = 0.75 * mean + 0.25 * plain(upper).hypergradient.gradient["hparams"]
        torch.testing.assert_close(averaged(upper).hypergradient.gradient["hparams"], mean, rtol=1e-14, atol=0)


# Variance reduction


@pytest.mark.parametrize("size", [BATCH, 50])  # 50: blocks of 50, 50 and 20
def test_a_fresh_memory_gives_the_directions_of_all_data(size: int) -> None:
    of = problem("whole")
    response = ProblemResponse(of)
    w, upper = {"params": normal(D)}, of.hparams.layout.start
    moving = Moving(False, w, None)
    moving.v = {"params": normal(D)}
    memory: Any = SABA(batch_size=size)._source(response, moving, upper, None)
    M = X.T @ X / N + torch.diag(STRENGTHS)
    for _ in range(5):  # whichever block is drawn
        at = memory.directions(w, moving.v, upper, outward=True)
        torch.testing.assert_close(at.lower["params"], M @ w["params"] - X.T @ Y / N, rtol=1e-12, atol=1e-14)
        defect = M @ moving.v["params"] - XV.T @ (XV @ w["params"] - YV) / N
        torch.testing.assert_close(at.adjoint["params"], defect, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(at.upper["hparams"], -w["params"] * moving.v["params"], rtol=1e-12, atol=1e-14)
        assert at.loss == pytest.approx(float(squares(w["params"], (XV, YV))), rel=1e-12)


def test_saba_converges_linearly_where_soba_stalls() -> None:
    """With constant steps: SOBA stays where its noise holds it, SABA goes on to the optimum of all data."""
    noisy = [found(problem("shuffled"), SOBA(warmup=steps, decay=0.0)) for steps in (100, 400)]
    reduced = [found(problem("in order"), SABA(warmup=steps)) for steps in (100, 250, 500)]
    stays, falls = ([relative_error(at.params, W) for at in runs] for runs in (noisy, reduced))
    assert all(error >= 1e-2 for error in stays)
    assert falls[1] <= 0.2 * falls[0] and falls[2] <= 0.1 * falls[1] and falls[2] <= 1e-5
    assert relative_error(reduced[-1].gradient, TRUTH) <= 1e-5
    assert relative_error(noisy[-1].gradient, TRUTH) <= 0.2  # the mean over the second half
    assert reduced[-1].certificate.verdict == "approximate"
    # Blocks of tensors are those of a loader, drawn otherwise.
    cut = found(problem("whole"), SABA(batch_size=BATCH, warmup=500))
    assert relative_error(cut.gradient, TRUTH) <= 1e-5


# Whole runs


FEW: dict[str, Any] = {"amigo": {"adjoint_steps": 4}, "stocbio": {"terms": 15}}
ADAM = lambda tensors: torch.optim.Adam(tensors, lr=0.4)  # noqa: E731


@pytest.mark.parametrize(
    ("name", "loss"), [("soba", logistic), ("saba", logistic), ("amigo", squares), ("stocbio", squares)]
)
def test_minibatches_lead_to_the_optimum_of_all_data(name: str, loss: Any) -> None:
    kind, method = METHODS[name]
    whole = problem("whole", loss)
    best = bilevel.solve(whole, "direct").outer_loss
    start = bilevel.hypergradient(whole, "direct").outer_loss
    few = replace(method, warmup=50, steps=4, **FEW.get(name, {}))
    end = bilevel.solve(problem(kind, loss), few, steps=18, seed=0, outer_optimizer=ADAM, on_untrusted="ignore")
    reached = bilevel.hypergradient(whole, "direct", hparams=end.hparams).outer_loss
    # 18 steps of Adam by 0.4 move a strength by e^7 at most; the optimum has some at the end of their range.
    assert reached - best <= 0.1 * (start - best)


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_ends_bit_for_bit(name: str, tmp_path: Path) -> None:
    kind, method = METHODS[name]
    short: dict[str, Any] = {"steps": 4, "seed": 1, "on_untrusted": "ignore"}
    method = type(method)(warmup=20, steps=3, **FEW.get(name, {}))
    whole = bilevel.solve(problem(kind), method, **short)
    path = bilevel.Checkpoint(tmp_path / "run.pt", steps=1)

    def crash(record: bilevel.Record) -> None:
        if record.step == 2:
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        bilevel.solve(problem(kind), method, checkpoint=path, callbacks=[crash], **short)
    again = bilevel.solve(problem(kind), method, checkpoint=path, **short)
    assert torch.equal(again.hparams, whole.hparams) and torch.equal(again.params, whole.params)
    assert [r.outer_loss for r in again.history] == [r.outer_loss for r in whole.history]
    assert again.certificate == whole.certificate


@pytest.mark.parametrize("name", METHODS)
def test_the_random_state_is_left_alone(name: str) -> None:
    kind, method = METHODS[name]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    bilevel.hypergradient(problem(kind), type(method)(warmup=20), on_untrusted="ignore")
    assert torch.equal(before, torch.get_rng_state())


def test_the_curvature_is_not_measured_again_and_again_on_the_way_from_zero() -> None:
    """Strengths exp(h) of a real h that starts at 0, where every step of it is a long one relative to h."""
    of = problem("shuffled")
    of = BilevelProblem(
        lambda w, h, batch: squares(w, batch) + (h.exp() * w**2).sum() / 2,
        lambda w, h, batch: squares(w, batch),
        torch.zeros(D, dtype=torch.float64),
        bilevel.real(torch.zeros(D, dtype=torch.float64)),
        inner_data=of.inner_data,
        outer_data=of.outer_data,
    )
    solution = bilevel.solve(of, SOBA(steps=1, warmup=1), steps=40, seed=0, tol=0.0, on_untrusted="ignore")
    assert sum(record.products for record in solution.history) <= 200  # 156 were counted, of which 40 by the steps


@pytest.mark.parametrize("name", ["soba", "saba"])
def test_a_step_on_minibatches_takes_one_backward_pass_for_both_products(name: str) -> None:
    """At a λ that stands still, in calls that do not measure: each tenth has a product for the certificate."""
    kind, method = METHODS[name]
    evaluate = Evaluator(problem(kind), replace(method, steps=1, warmup=1))
    upper = evaluate.problem.hparams.layout.start
    evaluate(upper)
    costs = [evaluate(upper).hypergradient.cost for _ in range(10)]
    assert [cost.products for cost in costs[:4]] == [1] * 4
    assert sum(cost.products for cost in costs) == 11
    assert [cost.gradients for cost in costs] == [2] * 10


def test_a_run_on_minibatches_begins_sooner_than_one_hypergradient_alone() -> None:
    """A warm-up of 50 steps and 8 rounds of 10, two gradients each, in place of 500 and 8 of 62."""
    start, given = (
        bilevel.solve(problem("shuffled"), method, steps=1, seed=0, on_untrusted="ignore").start.gradients
        for method in (SOBA(), SOBA(warmup=200))
    )
    assert start <= 300 < given
    assert SOBA().first == 1000


def test_a_hypergradient_on_minibatches_is_a_mean_over_the_steps_of_its_call() -> None:
    """dF/dh is the outer loss of a batch here; of a pass of ten batches, in one call, nothing but its mean is left."""
    of, h = problem("shuffled"), torch.ones((), dtype=torch.float64)
    scaled = BilevelProblem(
        lambda w, h, batch: squares(w, batch) + (w**2).sum(),
        lambda w, h, batch: h * squares(w, batch),
        torch.zeros(D, dtype=torch.float64),
        h,
        inner_data=of.inner_data,
        outer_data=of.outer_data,
    )
    spreads = []
    for steps in (1, 10):
        torch.manual_seed(0)
        evaluate = Evaluator(scaled, SOBA(lr=1e-6, steps=steps, warmup=10))
        seen = [evaluate({"hparams": h}).hypergradient for _ in range(20)][1:]
        spreads.append(float(torch.stack([one.gradient["hparams"] for one in seen]).std()))
        assert seen[-1].cost.gradients == 2 * steps
    assert spreads[1] < 0.5 * spreads[0]


def test_curvature_that_stays_is_measured_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """At one λ: in the first call, and after 10, 20, 40 and 80 more."""
    calls, measured, smallest = 0, list[int](), single_loop._smallest
    monkeypatch.setattr(single_loop, "RECHECK", 10)
    monkeypatch.setattr(single_loop, "SAME", math.inf)  # small batches differ

    def watched(*given: Any) -> float:
        measured.append(calls)
        return smallest(*given)

    monkeypatch.setattr(single_loop, "_smallest", watched)
    evaluate = Evaluator(problem("shuffled"), SOBA(steps=1, warmup=100))
    for _ in range(160):
        evaluate({"hparams": STRENGTHS})
        calls += 1
    assert measured == [0, 10, 30, 70, 150]
