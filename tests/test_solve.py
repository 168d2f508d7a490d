"""`solve`: where it ends, what it records, and how it stops."""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optree
import pytest
import scipy.optimize
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from bilevel import BilevelProblem, Record, Solution, inner, solve
from bilevel.certificate import Hypergradient
from bilevel.errors import (
    BilevelError,
    InvalidTypeError,
    InvalidValueError,
    NonFiniteError,
    UntrustedHypergradientError,
    UntrustedHypergradientWarning,
)
from bilevel.solvers.base import Response, State
from bilevel.testing import KnownProblem, known_problems, relative_error
from bilevel.vector import Vector

PROBLEMS = {known.name: known for known in known_problems()}
RIDGE = PROBLEMS["per-feature ridge"]


def sgd(tensors: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(tensors, lr=0.5)


def shrinkage(
    inner_factor: Callable[[Tensor], Tensor] | None = None,
    outer_factor: Callable[[Tensor], Tensor] | None = None,
    inner_solver: Any = None,
    strength: float = 1.0,
) -> BilevelProblem:
    """Return w*(h) = 1 / (1 + h) with F = (w* - 1)^2 / 2, which wants h to shrink to zero; factors can spoil it."""

    def inner_loss(w: Tensor, h: Tensor) -> Tensor:
        loss = ((w - 1.0) ** 2).sum() / 2 + h * (w**2).sum() / 2
        return loss if inner_factor is None else loss * inner_factor(h)

    def outer_loss(w: Tensor, h: Tensor) -> Tensor:
        loss = ((w - 1.0) ** 2).sum() / 2
        return loss if outer_factor is None else loss * outer_factor(h)

    start = torch.zeros(1, dtype=torch.float64)
    return BilevelProblem(inner_loss, outer_loss, start, bilevel.positive(strength), inner_solver)


def nan_below(limit: float) -> Callable[[Tensor], Tensor]:
    return lambda h: torch.where(h < limit, torch.nan, 1.0).to(h.dtype)


# Where it ends


def scipy_optimum(known: KnownProblem) -> tuple[float, Tensor, Tensor]:
    """Minimize the exact F over u = log λ by SciPy; return F, λ, and where λ is on no bound and F is curved."""
    typed, spec = optree.tree_flatten(known.hparams)
    values: list[Tensor] = [leaf.value for leaf in typed]
    start = torch.cat([t.reshape(-1) for t in values])

    def exact(u: Any) -> tuple[float, Any]:
        flat = torch.exp(torch.from_numpy(np.asarray(u)))
        parts = [
            p.reshape(t.shape) for p, t in zip(torch.split(flat, [t.numel() for t in values]), values, strict=True)
        ]
        truth = known.truth_at(optree.tree_unflatten(spec, parts))
        return truth.outer_loss, (flat * flat_of(truth.gradient)).numpy()

    u = torch.log(start).numpy()
    reach = np.log(1e8)
    bounds = scipy.optimize.Bounds(u - reach, u + reach)
    options = {"ftol": 0.0, "gtol": 1e-11, "maxiter": 2000, "maxfun": 20000}
    found = scipy.optimize.minimize(exact, u, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    inside = torch.from_numpy(np.abs(found.x - u) < reach - 1.0)
    return float(found.fun), torch.exp(torch.from_numpy(found.x)), inside


def flat_of(structure: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in optree.tree_leaves(structure)])


TUNED = ["per-feature ridge", "data-weighted least squares", "logistic regression", "linear module"]


@pytest.mark.parametrize("name", TUNED)
@pytest.mark.parametrize(
    "method", [bilevel.Implicit(), bilevel.Implicit(bilevel.CG(rtol=1e-10))], ids=["default", "cg"]
)
def test_the_optimum_is_the_one_that_scipy_finds(name: str, method: bilevel.Implicit) -> None:
    known = PROBLEMS[name]
    best, _, _ = scipy_optimum(known)
    solution = solve(known.problem(), method, steps=300)
    assert solution.outer_loss == pytest.approx(best, rel=1e-6)
    assert solution.outer_loss >= best * (1.0 - 1e-9), "lower than the exact minimum: F is not what is reported"
    assert solution.certificate.verdict == "exact"
    assert solution.outer_loss < 0.99 * solution.start.outer_loss


@pytest.mark.parametrize("name", TUNED)
def test_a_tight_inner_solve_lets_the_outer_one_converge(name: str) -> None:
    known = PROBLEMS[name]
    solution = solve(known.problem(inner.LBFGS(rtol=1e-12)), steps=300)
    assert solution.converged
    assert solution.history[-1].hypergradient_norm <= 1e-6 * solution.start.hypergradient_norm
    _, hparams, inside = scipy_optimum(known)
    found = flat_of(solution.hparams)
    # The error of log(strength) is the gradient that is left, 1e-6 of the first, over a curvature of F of about 1e-2.
    assert bool(((found[inside] / hparams[inside]).log().abs() <= 1e-4).all())


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda tensors: torch.optim.Adam(tensors, lr=0.2),
        lambda tensors: torch.optim.SGD(tensors, lr=30.0, momentum=0.5),
    ],
    ids=["Adam", "SGD"],
)
def test_torch_optimizers_reach_the_same_optimum(optimizer: Any) -> None:
    known = PROBLEMS["linear module"]
    best, _, _ = scipy_optimum(known)
    solution = solve(known.problem(), steps=300, outer_optimizer=optimizer, tol=1e-4)
    assert solution.converged
    assert solution.outer_loss == pytest.approx(best, rel=1e-6)


def test_a_torch_class_works_without_a_factory() -> None:
    solution = solve(shrinkage(), steps=2, outer_optimizer=torch.optim.Adam)
    # The first step of Adam is lr = 1e-3 in log(h), whatever the gradient.
    assert solution.history[0].hparams["hparams"][0] == pytest.approx(np.exp(-1e-3), rel=1e-6)


def test_the_default_optimizer_follows_the_data() -> None:
    loader = DataLoader(TensorDataset(torch.ones(4, 1, dtype=torch.float64)), batch_size=2)
    stochastic = BilevelProblem(
        lambda w, h, batch: ((w - batch[0]) ** 2).mean() + h * (w**2).sum(),
        lambda w, h: ((w - 1.0) ** 2).sum(),
        torch.zeros(1, dtype=torch.float64),
        bilevel.positive(1.0),
        inner.SGD(lr=0.1, steps=100),
        inner_data=loader,
    )
    solution = solve(stochastic, steps=1)
    assert solution.history[0].hparams["hparams"][0] == pytest.approx(np.exp(-0.05), rel=1e-6)  # Adam(lr=0.05)


def test_unrolling_tunes_a_learning_rate() -> None:
    """One step of gradient descent on w^2 / 2 from 1 is 1 - lr: it is at the target 0.2 for lr = 0.8."""
    problem = BilevelProblem(
        lambda w, h: (w**2).sum() / 2,
        lambda w, h: ((w - 0.2) ** 2).sum() / 2,
        torch.ones(1, dtype=torch.float64),
        {"lr": bilevel.positive(0.1)},
        inner.SGD(lr=lambda h: h["lr"], steps=1),
    )
    solution = solve(problem, "unroll", steps=100)
    assert float(solution.hparams["lr"]) == pytest.approx(0.8, rel=1e-6)


def test_hyperparameters_stay_in_their_ranges() -> None:
    target = torch.tensor([3.0, 0.2, -1.0], dtype=torch.float64)
    hparams = {
        "low": bilevel.positive(1.0, low=0.5, high=2.0),
        "inside": bilevel.interval(0.5, 0.0, 1.0),
        "weights": bilevel.simplex(3),
    }

    def inner_loss(w: Tensor, h: dict[str, Tensor]) -> Tensor:
        return ((w - h["low"] * h["weights"] - h["inside"]) ** 2).sum()

    start = torch.zeros(3, dtype=torch.float64)
    for optimizer in ("lbfgs", lambda tensors: torch.optim.Adam(tensors, lr=0.5)):
        problem = BilevelProblem(inner_loss, lambda w, h: ((w - target) ** 2).sum(), start, hparams)
        solution = solve(problem, steps=60, outer_optimizer=optimizer)
        for record in [solution.start, *solution.history]:
            assert 0.5 * (1 - 1e-12) <= record.hparams["low"][0] <= 2.0 * (1 + 1e-12)
            assert 0.0 < record.hparams["inside"][0] < 1.0
            assert sum(record.hparams["weights"]) == pytest.approx(1.0, rel=1e-12)
        # w wants 3.2 between its first and second entry, and 1.2 between the second and the third: low goes to its end.
        assert float(solution.hparams["low"]) == pytest.approx(2.0, rel=1e-9)
        assert float(solution.hparams["weights"][0]) > 0.9


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


@dataclasses.dataclass(frozen=True)
class Doubtful:
    """An estimator that loses its trust at its third call."""

    def __call__(
        self, response: Response, lower: Vector, upper: Vector, state: State = None
    ) -> tuple[Hypergradient, State]:
        calls = 1 if state is None else state + 1
        found, _ = bilevel.Implicit()(response, lower, upper)
        if calls >= 3:
            certificate = dataclasses.replace(found.certificate, verdict="untrusted", reasons=("a bad feeling",))
            found = dataclasses.replace(found, certificate=certificate)
        return found, calls


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


# What it records


def test_the_cost_of_a_step_is_counted_exactly() -> None:
    problem = RIDGE.problem(inner.SGD(lr=0.3, steps=10))
    solution = solve(problem, "direct", steps=3, outer_optimizer=sgd, on_untrusted="ignore")
    for record in [solution.start, *solution.history]:
        # 10 steps, the outer gradient, the residual, and the inner gradient at the start for its scale; the first two
        # again where the error is estimated.
        assert record.gradients == 10 + 3 + 2
        # 6 columns of the Hessian, H w for the scale and a pull of the adjoint onto λ; one of each for the error.
        assert record.products == 6 + 2 + 2
        assert (record.inner_steps, record.inner_solves) == (10, 1)
    unrolled = solve(problem, "unroll", steps=3, outer_optimizer=sgd)
    for record in [unrolled.start, *unrolled.history]:
        assert (record.gradients, record.products) == (10 + 3, 10)  # a product for each step swept back
        assert record.adjoint_residual is None


def test_a_run_that_stands_still_pays_for_no_solve() -> None:
    problem = PROBLEMS["tanh network"].problem()
    solution = solve(problem, "cg", steps=3, outer_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.0))
    assert solution.start.inner_steps > 10
    for record in solution.history:
        # Both solves start at their solutions. Left are the two residuals of the adjoint (at its start and its end),
        # H w for the scale and two pulls onto λ; and the gradients of the inner loss here and at the start of `params`.
        # The estimate takes both gradients, a product and a pull as far away as the inner solution may be.
        assert record.inner_steps == 0
        assert record.products == 5 + 2
        assert record.gradients == 4 + 2


def test_history_tells_the_run() -> None:
    seen: list[Record] = []
    also: list[float] = []
    solution = solve(
        RIDGE.problem(), steps=4, outer_optimizer=sgd, callbacks=[seen.append, lambda r: also.append(r["outer_loss"])]
    )
    assert all(a is b for a, b in zip(seen, solution.history, strict=True)), "one call a step, with its record"
    assert also == [record.outer_loss for record in solution.history]
    assert solution.start.step == 0
    records = [solution.start, *solution.history]
    truths = [RIDGE.truth_at(torch.tensor(r.hparams["hparams"], dtype=torch.float64)) for r in records]
    for before, record, truth in zip([None, *records], records, truths, strict=False):
        natural = torch.tensor(record.hparams["hparams"], dtype=torch.float64)
        assert record.outer_loss == pytest.approx(truth.outer_loss, rel=1e-8)
        assert record.inner_loss == pytest.approx(float(RIDGE.inner_loss(truth.params, natural)), rel=1e-8)
        free = natural * truth.gradient
        assert record.hypergradient_norm == pytest.approx(float(free.norm()), rel=1e-6)
        assert record.inner_residual is not None and record.inner_residual <= 1e-8
        assert record.adjoint_residual is not None and record.adjoint_residual <= 1e-12
        assert record.seconds > 0.0
        assert record.sizes == {"hparams": 6}
        if before is not None:  # gradient descent in log λ, step by step
            last = torch.tensor(before.hparams["hparams"], dtype=torch.float64)
            step = torch.log(natural) - torch.log(last)
            there = RIDGE.truth_at(last)
            assert relative_error(step, -0.5 * last * there.gradient) <= 1e-6
    assert solution.history[-1].hparams["hparams"] == [float(x) for x in solution.hparams]
    assert solution.outer_loss == solution.history[-1].outer_loss


def test_many_hyperparameters_are_recorded_by_quantiles() -> None:
    known = PROBLEMS["data-weighted least squares"]
    solution = solve(known.problem(), steps=2)
    weights = solution.hparams["weights"].sort().values
    quantiles = [float(weights[round(q * 19)]) for q in (0.0, 0.1, 0.5, 0.9, 1.0)]
    assert solution.history[-1].hparams == {"weights": quantiles}
    assert solution.history[-1].sizes == {"weights": 20}
    assert "(quantiles 0, 0.1, 0.5, 0.9, 1 of 20)" in solution.summary()


# Randomness


def noisy_problem() -> BilevelProblem:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(24, 3, generator=generator, dtype=torch.float64)
    y = X.sum(1) + torch.randn(24, generator=generator, dtype=torch.float64)
    loader = DataLoader(TensorDataset(X[:16], y[:16]), batch_size=4, shuffle=True)
    return BilevelProblem(
        lambda w, h, batch: ((batch[0] @ w - batch[1]) ** 2).mean() + h * (w**2).sum(),
        lambda w, h: ((X[16:] @ w - y[16:]) ** 2).mean() + 0.01 * torch.rand(()).double() * (w**2).sum(),
        torch.zeros(3, dtype=torch.float64),
        bilevel.positive(0.3),
        inner.SGD(lr=0.05, steps=20),
        inner_data=loader,
    )


def test_the_seed_decides_and_the_global_state_stays() -> None:
    before = torch.get_rng_state()
    runs = [solve(noisy_problem(), "unroll", steps=4, seed=seed) for seed in (7, 7, 8)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(runs[0].hparams, runs[1].hparams)
    assert [r.outer_loss for r in runs[0].history] == [r.outer_loss for r in runs[1].history]
    assert not torch.equal(runs[0].hparams, runs[2].hparams)


def test_without_a_seed_the_global_state_decides_and_stays() -> None:
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(solve(noisy_problem(), "unroll", steps=2).hparams)
        bilevel.hypergradient(noisy_problem(), "unroll")
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_the_global_state_stays_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(NonFiniteError):
        solve(shrinkage(outer_factor=lambda h: nan_below(0.9)(h) * (1.0 + 0.0 * torch.rand(()))), seed=3)
    assert torch.equal(torch.get_rng_state(), before)


# The user's objects


class Small(nn.Module):
    """A module with a buffer that training moves and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2, dtype=torch.float64)
        self.out = nn.Linear(2, 1, dtype=torch.float64)
        self.frozen = nn.Parameter(torch.ones(1, dtype=torch.float64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.norm(x)) * self.frozen
        return result


def module_problem(module: Small, hparams: Any) -> BilevelProblem:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(20, 2, generator=generator, dtype=torch.float64) + 2.0
    y = X.sum(1, keepdim=True)
    return BilevelProblem(
        lambda m, h: ((m(X[:10]) - y[:10]) ** 2).mean() + h["strength"] * sum((p**2).sum() for p in m.parameters()),
        lambda m, h: ((m(X[10:]) - y[10:]) ** 2).mean() + 1e-3 * (h["shift"] ** 2).sum(),
        module,
        hparams,
        inner.SGD(lr=0.1, momentum=0.5, steps=150),
    )


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in module.state_dict().items()}


def test_the_users_objects_change_only_by_apply() -> None:
    torch.manual_seed(0)
    module = Small()
    hparams: dict[str, Any] = {"strength": bilevel.positive(0.1), "shift": torch.ones(2, dtype=torch.float64)}
    before = snapshot(module)
    solution = solve(module_problem(module, hparams), steps=3, outer_optimizer=sgd, on_untrusted="ignore")
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(hparams["shift"], torch.ones(2, dtype=torch.float64))
    assert repr(hparams["strength"]) == "positive(0.1)"

    same = dict(module.named_parameters())
    solution.apply_()
    tuned = solution.params.state_dict()
    assert all(torch.equal(t, tuned[name]) for name, t in module.state_dict().items())
    assert all(p is same[name] for name, p in module.named_parameters()), "in place"
    assert not torch.equal(module.out.weight, before["out.weight"])
    assert torch.equal(module.frozen, before["frozen"])
    assert torch.equal(hparams["shift"], solution.hparams["shift"])
    assert float(hparams["strength"].value) == float(solution.hparams["strength"])
    assert module.training


def test_apply_to_plain_tensors_writes_in_place() -> None:
    w: dict[str, Any] = {"a": torch.zeros(2, dtype=torch.float64), "b": [torch.zeros((), dtype=torch.float64)]}
    h = torch.full((2,), 0.5, dtype=torch.float64)
    problem = BilevelProblem(
        lambda p, h: ((p["a"] - 1.0) ** 2).sum() + (h * p["a"] ** 2).sum() + (p["b"][0] - p["a"].sum()) ** 2,
        lambda p, h: ((p["a"] - 0.8) ** 2).sum() + 0.1 * p["b"][0] ** 2 * 0.0,
        w,
        h,
    )
    solution = solve(problem)
    assert float(h.sum()) == 1.0
    solution.apply_()
    assert torch.equal(h, solution.hparams)
    assert torch.equal(w["a"], solution.params["a"])
    assert float(w["b"][0]) == pytest.approx(1.6, rel=1e-6)
    assert h.data_ptr() != solution.hparams.data_ptr(), "the solution keeps its own copy"


def test_a_second_run_starts_where_the_first_was_applied() -> None:
    strength = bilevel.positive(1.0)
    start = torch.zeros(1, dtype=torch.float64)

    def problem() -> BilevelProblem:
        return BilevelProblem(
            lambda w, h: ((w - 1.0) ** 2).sum() / 2 + h * (w**2).sum() / 2,
            lambda w, h: ((w - 0.4) ** 2).sum() / 2,
            start,
            strength,
        )

    first = solve(problem(), steps=2, outer_optimizer=sgd)
    first.apply_()
    second = solve(problem(), steps=2, outer_optimizer=sgd)
    assert second.start.outer_loss == pytest.approx(first.outer_loss, rel=1e-12)


# Files


def test_a_solution_survives_a_file(tmp_path: Path) -> None:
    solution = solve(RIDGE.problem(), steps=5)
    path = tmp_path / "run.pt"
    solution.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"], "no temporary file is left"
    loaded = Solution.load(path)
    assert torch.equal(loaded.hparams, solution.hparams)
    assert torch.equal(loaded.params, solution.params)
    for field in ("outer_loss", "history", "status", "certificate", "start"):
        assert getattr(loaded, field) == getattr(solution, field), field
    assert loaded.summary() == solution.summary() == str(solution)
    assert "Record" not in repr(solution)  # a long run's history would fill the screen
    with pytest.raises(InvalidValueError, match="loaded from a file"):
        loaded.apply_()
    loaded.save(str(path))  # over itself
    assert Solution.load(str(path)).history == solution.history


def test_modules_and_structures_survive_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    hparams = {"strength": bilevel.positive(0.1), "shift": torch.ones(2, dtype=torch.float64)}
    solution = solve(module_problem(Small(), hparams), steps=1, outer_optimizer=sgd, on_untrusted="ignore")
    solution.save(tmp_path / "run.pt")
    loaded = Solution.load(tmp_path / "run.pt")
    fresh = Small()
    fresh.load_state_dict(loaded.params)
    assert all(torch.equal(t, solution.params.state_dict()[name]) for name, t in fresh.state_dict().items())
    assert set(loaded.hparams) == {"strength", "shift"}


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, part: float) -> None:
    path = tmp_path / "run.pt"
    solve(RIDGE.problem(), steps=1).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(InvalidValueError, match=r"run\.pt"):
        Solution.load(path)


@pytest.mark.parametrize(
    "content",
    [
        b"not a file of ours at all\n" * 20,
        pickle.dumps({"format": 1}, protocol=2),
        {"kind": "solution", "format": 1},
        {
            "kind": "solution",
            "format": 1,
            "hparams": 0,
            "params": 0,
            "outer_loss": 0.0,
            "history": 3,
            "status": "",
            "certificate": [],
            "start": {},
        },
        {"format": 99},
        [1, 2, 3],
        {"weight": torch.ones(2)},
    ],
    ids=["text", "pickle", "our format, empty", "our format, nonsense", "another format", "list", "state dict"],
)
def test_a_foreign_file_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "run.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InvalidValueError, match=r"run\.pt"):
        Solution.load(path)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.touch, (self.target,))


def test_a_malicious_file_runs_nothing(tmp_path: Path) -> None:
    path, proof = tmp_path / "run.pt", tmp_path / "proof"
    bomb = Bomb(proof)
    pickle.loads(pickle.dumps(bomb))
    assert proof.exists(), "the bomb works"
    proof.unlink()
    torch.save({"format": 1, "hparams": bomb}, path)
    with pytest.raises(InvalidValueError, match=r"run\.pt"):
        Solution.load(path)
    path.write_bytes(pickle.dumps({"format": 1, "hparams": bomb}, protocol=2))
    with pytest.raises(InvalidValueError, match=r"run\.pt"):
        Solution.load(path)
    assert not proof.exists()


def test_a_failed_save_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    solution = solve(RIDGE.problem(), steps=1)
    solution.save(path)
    whole = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        dataclasses.replace(solution, hparams=lambda: None).save(path)
    assert path.read_bytes() == whole


# What people read


def test_no_progress_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    solve(RIDGE.problem(), steps=3, progress=False)
    solve(RIDGE.problem(), steps=3)  # stderr is no terminal here
    assert tuple(capfd.readouterr()) == ("", "")


def test_progress_shows_loss_norm_and_verdict_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    solution = solve(RIDGE.problem(), steps=3, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    last = solution.history[-1]
    assert f"outer loss {last.outer_loss:.5g}, hypergradient {last.hypergradient_norm:.1e}, exact" in err
    assert "3/3" in err


def test_the_summary_is_a_table() -> None:
    solution = solve(RIDGE.problem(), steps=3, outer_optimizer=sgd)
    records = [solution.start, *solution.history]
    lines = solution.summary().splitlines()
    width = len("estimated relative error") + 2
    rows = {line[:width].strip(): line[width:] for line in lines}
    assert rows["status"] == solution.status
    assert rows["outer loss"] == f"{solution.start.outer_loss:.6g} -> {solution.outer_loss:.6g}"
    assert rows["verdict"] == "exact"
    assert rows["outer steps"] == "3"
    assert rows["inner solves"] == "4"
    assert rows["gradients"] == str(sum(r.gradients for r in records))
    assert rows["Hessian-vector products"] == str(sum(r.products for r in records))
    assert rows["hparams"] == "  ".join(f"{float(x):.4g}" for x in solution.hparams)
    assert "untrusted hypergradients" not in rows


def test_the_plot_shows_losses_residuals_and_hyperparameters(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    solution = solve(RIDGE.problem(), steps=4, outer_optimizer=sgd)
    figure = solution.plot()
    losses, residuals, values = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["losses", "hypergradient and residuals", "hyperparameters"]
    records = [solution.start, *solution.history]
    outer, lower = losses.get_lines()
    assert list(np.asarray(outer.get_xdata())) == [0, 1, 2, 3, 4]
    assert list(np.asarray(outer.get_ydata())) == [r.outer_loss for r in records]
    assert list(np.asarray(lower.get_ydata())) == [r.inner_loss for r in records]
    assert residuals.get_yscale() == "log"
    assert residuals.get_lines()[0].get_label() == "hypergradient norm"
    assert [list(np.asarray(line.get_ydata())) for line in values.get_lines()] == [
        [r.hparams["hparams"][i] for r in records] for i in range(6)
    ]
    assert values.get_yscale() == "log"
    assert all(axes.get_xlabel() == "outer step" for axes in figure.axes)
    figure.savefig(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000


def test_the_plot_marks_untrusted_steps_and_draws_quantiles() -> None:
    pytest.importorskip("matplotlib")
    known = PROBLEMS["data-weighted least squares"]
    solution = solve(known.problem(), Doubtful(), steps=4, outer_optimizer=sgd, on_untrusted="ignore")
    _, residuals, values = solution.plot().axes
    assert len(residuals.patches) == 3
    assert len(values.collections) == 2, "two bands of quantiles"
    assert values.get_lines()[0].get_label() == "weights: median, 80 % and range of 20"


# Bad input


@pytest.mark.parametrize(
    ("arguments", "kind", "told"),
    [
        ({"steps": 0}, ValueError, "`steps` is 0"),
        ({"steps": 2.5}, ValueError, "`steps` is 2.5"),
        ({"steps": True}, ValueError, "`steps` is True"),
        ({"tol": 1.0}, ValueError, "`tol` is 1.0"),
        ({"tol": -1e-3}, ValueError, "`tol` is -0.001"),
        ({"method": "gradient descent"}, ValueError, "`method` is 'gradient descent', expected one of implicit"),
        ({"method": bilevel.Unroll}, TypeError, "`method` is"),
        ({"outer_optimizer": "adam"}, ValueError, "`outer_optimizer` is 'adam'"),
        ({"outer_optimizer": 0.1}, TypeError, "`outer_optimizer` is a float"),
        ({"outer_optimizer": torch.optim.SGD([torch.zeros(1)], lr=0.1)}, TypeError, "is a SGD object"),
        ({"outer_optimizer": lambda tensors: None}, TypeError, "`outer_optimizer` returned a NoneType"),
        ({"outer_optimizer": torch.optim.LBFGS}, TypeError, 'write outer_optimizer="lbfgs"'),
        ({"callbacks": print}, TypeError, "write callbacks="),
        ({"callbacks": [None]}, TypeError, "`callbacks` is expected to be"),
        ({"seed": "now"}, TypeError, "`seed` is 'now'"),
        ({"on_untrusted": "shrug"}, ValueError, "`on_untrusted` is 'shrug'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], kind: type[Exception], told: str) -> None:
    with pytest.raises(BilevelError, match=told) as caught:
        solve(RIDGE.problem(), **arguments)
    assert isinstance(caught.value, kind)


def test_something_else_than_a_problem_is_named() -> None:
    with pytest.raises(InvalidTypeError, match="`problem` is a function, expected a BilevelProblem"):
        solve(sgd)  # type: ignore[arg-type]
