"""`solve`: where it ends, what it records, its random numbers, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import optree
import pytest
import scipy.optimize
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from bilevel import BilevelProblem, Record, inner, solve
from bilevel.errors import BilevelError, InvalidTypeError, NonFiniteError
from bilevel.testing import KnownProblem, relative_error
from problems import PROBLEMS, RIDGE
from problems_solve import TUNED, flat_of, nan_below, sgd, shrinkage

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
        # H w for the scale and two pulls onto λ; and the gradients of the outer loss, of the inner one here, which
        # training hands over, and of that at the start of `params`. The estimate takes both gradients, a product and a
        # pull as far away as the inner solution may be.
        assert record.inner_steps == 0
        assert record.products == 5 + 2
        assert record.gradients == 3 + 2


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
