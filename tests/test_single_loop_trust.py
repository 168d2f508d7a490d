"""Methods that move the inner variables themselves: what they do not trust, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bilevel
from bilevel import SABA, SOBA, AmIGO, BilevelProblem, Hypergradient, InvalidValueError, StocBiO
from bilevel.evaluation import Evaluator
from bilevel.solvers.single_loop import Kept
from bilevel.testing import relative_error
from problems import kinked
from problems_single_loop import BATCH, METHODS, TRUTH, D, N, W, found, problem

# Trust


@pytest.mark.parametrize("name", METHODS)
def test_minibatches_are_never_exact_and_the_noise_is_told(name: str) -> None:
    kind, method = METHODS[name]
    at = found(problem(kind), type(method)(warmup=150))
    error, certificate = relative_error(at.gradient, TRUTH), at.certificate
    assert certificate.verdict != "exact" and certificate.standard_error is not None
    assert certificate.error is not None and error <= 3.0 * certificate.error


def test_small_batches_are_untrusted() -> None:
    few = found(problem("shuffled", batch=2), StocBiO(warmup=50))
    assert few.certificate.verdict == "untrusted" and "minibatches" in few.certificate.reasons[0]


ON_FIXED_DATA = ["soba", "amigo", "stocbio"]  # where SABA is SOBA


@pytest.mark.parametrize("name", ON_FIXED_DATA)
@pytest.mark.parametrize("given", [True, False])
def test_a_saddle_is_untrusted(name: str, given: bool) -> None:
    """The inner loss curves downwards along the last axis; w stands on the saddle."""
    bend = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    start = torch.zeros(3, dtype=torch.float64)
    of = BilevelProblem(
        lambda w, h: (bend * w**2).sum() / 2 + (w**4).sum() / 4 + (h * w[:2]).sum(),
        lambda w, h: ((w - 1.0) ** 2).sum(),
        start,
        bilevel.real(0.0, shape=(2,)),
    )
    at = found(of, name, params=start if given else None)
    assert at.certificate.verdict == "untrusted" and at.certificate.reasons


@pytest.mark.parametrize("name", ON_FIXED_DATA)
def test_a_singular_inner_problem_without_an_adjoint_is_untrusted(name: str) -> None:
    """The outer loss pulls along an axis that the inner loss leaves free: the adjoint equation has no solution."""
    bend = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    of = BilevelProblem(
        lambda w, h: (bend * (w - h) ** 2).sum() / 2,
        lambda w, h: ((w - 3.0) ** 2).sum(),
        torch.zeros(3, dtype=torch.float64),
        bilevel.real(1.0),
    )
    at = found(of, type(METHODS[name][1])(warmup=200))
    assert at.certificate.verdict == "untrusted"
    assert any("singular" in reason for reason in at.certificate.reasons)


def test_a_run_that_lags_behind_says_so_at_its_end() -> None:
    """One step of w per step of Adam by 0.5: the estimate follows the error within a factor of ten."""
    with pytest.warns(bilevel.UntrustedHypergradientWarning, match="smaller outer learning rate"):
        end = bilevel.solve(
            problem("whole"),
            SOBA(steps=1, lr=0.01, warmup=20),
            steps=5,
            outer_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.5),
        )
    assert end.certificate.verdict == "untrusted"


def test_given_params_are_not_moved() -> None:
    for kind, method in METHODS.values():
        at = found(problem(kind), type(method)(warmup=2, steps=2), params=W)
        assert torch.equal(at.params, W)


# What makes no sense


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SOBA(lr=0.0), "`lr`"),
        (lambda: SOBA(momentum=1.0), "`momentum`"),
        (lambda: SOBA(decay=2.0), "`decay`"),
        (lambda: SOBA(steps=0), "`steps`"),
        (lambda: SABA(batch_size=0), "`batch_size`"),
        (lambda: SABA(memory=0.0), "`memory`"),
        (lambda: AmIGO(adjoint_steps=0), "`adjoint_steps`"),
        (lambda: StocBiO(terms=0), "`terms`"),
        (lambda: found(problem("shuffled"), "saba"), "shuffle=False"),
        (lambda: found(problem("in order"), SABA(batch_size=3)), "leave out `batch_size`"),
        (lambda: found(problem("in order"), SABA(memory=1e-4)), "megabytes|MB"),
        (lambda: bilevel.solve(problem("whole"), "soba", outer_optimizer="lbfgs"), "lbfgs"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        make()


def test_losses_that_are_no_means_over_examples_are_refused() -> None:
    of = problem("whole")
    of.inner_loss = lambda w, h, b: ((b[0] @ w - b[1]) ** 2).sum() + (h * w**2).sum()
    with pytest.raises(InvalidValueError, match=r"`inner_loss` over all examples is not the mean"):
        found(of, SABA(batch_size=BATCH))


def test_kinks_of_the_inner_solver_are_refused_and_the_dry_run_says_so() -> None:
    of = kinked()
    with pytest.raises(InvalidValueError, match="kinks"):
        found(of, "soba")
    assert any("kinks" in finding.message for finding in bilevel.check(of, "soba").findings)
    plain = problem("shuffled")
    assert bilevel.check(plain, "soba").ok  # its L-BFGS would not do for minibatches, and does not run


def test_what_is_kept_are_plain_values() -> None:
    evaluate = Evaluator(problem("in order"), SABA(warmup=10))
    evaluate(evaluate.problem.hparams.layout.start)
    kept: Kept = evaluate.state
    assert set(kept["memory"]) == {"residual", "product", "through", "by_lower", "by_upper", "loss"}
    rows = kept["memory"]["residual"]["rows"]["params"]
    assert rows.shape == (N // BATCH, D)


# λ that jumps, inner losses with kinks


def one(penalty: Any, start: float, dtype: torch.dtype = torch.float64) -> BilevelProblem:
    """(w - 1)^2 / 2 and a penalty; the outer loss is (w - 2)^2 / 2."""
    return BilevelProblem(
        lambda w, h: ((w - 1.0) ** 2).sum() / 2 + penalty(w, h),
        lambda w, h: ((w - 2.0) ** 2).sum() / 2,
        torch.zeros(1, dtype=dtype),
        bilevel.positive(torch.tensor(start, dtype=dtype)),
    )


def follow(evaluate: Evaluator, h: float) -> Hypergradient:
    return evaluate({"hparams": torch.tensor(h, dtype=torch.float64)}).hypergradient


@pytest.mark.parametrize("name", METHODS)
def test_the_step_size_follows_a_hyperparameter_that_jumps(name: str) -> None:
    """w = 1 / (1 + h), dF/dh = (2 - w) w^2: ten decades up, where the old step is far too long, and back."""
    evaluate = Evaluator(one(lambda w, h: h * (w**2).sum() / 2, 1e-3), type(METHODS[name][1])())
    for h in (1e-3, 1e7, 1e-3):
        found = follow(evaluate, h)
        w = 1.0 / (1.0 + h)
        assert float(found.gradient["hparams"]) == pytest.approx((2.0 - w) * w**2, rel=1e-4)
        assert found.certificate.trusted


def test_a_mean_over_calls_counts_as_an_error() -> None:
    """w and v are settled at once in one dimension; what momentum keeps of the last λ is the error."""
    evaluate = Evaluator(one(lambda w, h: h * (w**2).sum() / 2, 0.1), AmIGO(momentum=0.5))
    follow(evaluate, 0.1)
    found = follow(evaluate, 10.0)
    w = 1.0 / 11.0
    true = float(found.gradient["hparams"]) / ((2.0 - w) * w**2) - 1.0
    assert true > 10.0 and found.certificate.verdict == "untrusted"


@pytest.mark.parametrize("method", [SOBA(warmup=20), SOBA(warmup=80), AmIGO(warmup=20), StocBiO(warmup=40)])
def test_kinks_are_untrusted(method: Any) -> None:
    """An l1 penalty: w jumps to and fro over 0, where it should stand (w = (1.75, 0), the hypergradient is 0.25)."""
    bend, pull = torch.tensor([1.0, 0.02], dtype=torch.float64), torch.tensor([2.0, -0.2], dtype=torch.float64)
    of = BilevelProblem(
        lambda w, h: (bend * w**2).sum() / 2 - pull @ w + h * w.abs().sum(),
        lambda w, h: ((w - 2.0) ** 2).sum() / 2,
        torch.tensor([0.0, 5.0], dtype=torch.float64),
        bilevel.positive(0.25),
    )
    certificate = found(of, method).certificate
    assert certificate.verdict == "untrusted" and certificate.reasons


def test_what_plays_no_part_is_told() -> None:
    of = problem("shuffled")
    of.inner_solver = bilevel.inner.SGD(lr=0.1, steps=3)
    notes = found(of, SOBA(warmup=20)).certificate.notes
    assert notes == ("inner_solver=SGD plays no part: SOBA takes its own inner steps",)
    assert not found(problem("shuffled"), SOBA(warmup=20)).certificate.notes


def test_the_loss_of_single_batches_is_told_as_a_mean_and_noise_with_its_knobs() -> None:
    with pytest.warns(
        bilevel.UntrustedHypergradientWarning, match=r"noise of minibatches.*batches \d+ times.*momentum"
    ):
        end = bilevel.solve(problem("shuffled", batch=3), SOBA(warmup=200, steps=2), steps=8, seed=0)
    mean = sum(record.outer_loss for record in end.history) / 8
    assert f"-> {mean:.6g} (mean over the batches of the last 8 steps)" in end.summary()
    whole = bilevel.solve(problem("whole"), SOBA(warmup=200, steps=2), steps=2, on_untrusted="ignore")
    assert "mean over" not in whole.summary()


@pytest.mark.parametrize("name", METHODS)
def test_rounding_of_bfloat16_is_an_error(name: str) -> None:
    of = one(lambda w, h: h * (w**2).sum() / 2, 0.5, torch.bfloat16)
    certificate = found(of, type(METHODS[name][1])(warmup=50)).certificate
    assert certificate.verdict != "exact"
    assert certificate.error is not None and certificate.error >= torch.finfo(torch.bfloat16).eps
