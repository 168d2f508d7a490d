"""Methods that move the inner variables themselves: SOBA, SABA, AmIGO, stocBiO, against closed forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from bilevel import SABA, SOBA, AmIGO, BilevelProblem, Hypergradient, InvalidValueError, StocBiO
from bilevel.evaluation import Evaluator
from bilevel.response import ProblemResponse
from bilevel.solvers import Estimator
from bilevel.solvers.single_loop import Kept, Moving
from bilevel.testing import KnownProblem, check_estimator, known_problems, relative_error

N, D, BATCH = 120, 4, 12
_data = torch.Generator().manual_seed(0)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_data, dtype=torch.float64)


TRUE = torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
X, XV = _normal(N, D), _normal(N, D)
Y, YV = X @ TRUE + _normal(N), XV @ TRUE + _normal(N)
STRENGTHS = torch.tensor([0.5, 0.4, 0.3, 0.2], dtype=torch.float64)


def squares(w: Tensor, batch: Any) -> Tensor:
    value: Tensor = ((batch[0] @ w - batch[1]) ** 2).mean() / 2
    return value


def logistic(w: Tensor, batch: Any) -> Tensor:
    return torch.nn.functional.softplus(-torch.sign(batch[1]) * (batch[0] @ w)).mean()


def problem(kind: str, loss: Any = squares, batch: int = BATCH) -> BilevelProblem:
    """Return a problem with one strength per feature; `kind`: how its data come."""

    def data(a: Tensor, b: Tensor) -> Any:
        if kind == "whole":
            return a, b
        return DataLoader(TensorDataset(a, b), batch_size=batch, shuffle=kind == "shuffled")

    return BilevelProblem(
        lambda w, h, batch: loss(w, batch) + (h * w**2).sum() / 2,
        lambda w, h, batch: loss(w, batch),
        torch.zeros(D, dtype=torch.float64),
        bilevel.positive(STRENGTHS),
        inner_data=data(X, Y),
        outer_data=data(XV, YV),
    )


def closed_form(h: Tensor = STRENGTHS) -> tuple[Tensor, Tensor]:
    """Return the inner solution of ridge and the hypergradient: w = M^-1 X^T y / n, dF/dh = -w * M^-1 ∂F/∂w."""
    M = X.T @ X / N + torch.diag(h)
    w = torch.linalg.solve(M, X.T @ Y / N)
    return w, -w * torch.linalg.solve(M, XV.T @ (XV @ w - YV) / N)


W, TRUTH = closed_form()


def found(of: BilevelProblem, method: Any, **more: Any) -> Hypergradient:
    torch.manual_seed(0)
    return bilevel.hypergradient(of, method, on_untrusted="ignore", **more)


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
    w, upper = {"params": _normal(D)}, of.hparams.layout.start
    moving = Moving(False, w, None)
    moving.v = {"params": _normal(D)}
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
METHODS: dict[str, tuple[str, Any]] = {
    "soba": ("shuffled", SOBA(momentum=0.9)),
    "saba": ("in order", SABA()),
    "amigo": ("shuffled", AmIGO(momentum=0.9)),
    "stocbio": ("shuffled", StocBiO(momentum=0.9)),
}


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
    of = BilevelProblem(
        lambda w, h: ((w - 1.0) ** 2).sum(),
        lambda w, h: (w**2).sum(),
        torch.zeros(2, dtype=torch.float64),
        bilevel.positive(0.1),
        inner_solver=bilevel.inner.Proximal(bilevel.prox.L1(lambda h: h)),
    )
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
