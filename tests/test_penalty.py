"""`Penalty`: its error, the step that it finds, and how far training got."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from bilevel import CG, FiniteDifference, Penalty, hypergradient, inner, prox
from bilevel.testing import KnownProblem, relative_error
from problems import PROBLEMS, at_truth, every_problem
from problems_first_order import XV, YV, X, Y


def penalty_error(known: KnownProblem, method: Penalty) -> float:
    return relative_error(at_truth(known, method).gradient, known.truth.gradient)


@pytest.mark.parametrize(("form", "factor"), [("central", 4.0), ("forward", 2.0)])
@every_problem
def test_half_of_sigma_divides_the_error(known: KnownProblem, form: Any, factor: float) -> None:
    """O(σ²) and O(σ): the next term of the series is σ² and σ of the first, a few percent at 0.01."""
    errors = [penalty_error(known, Penalty(sigma, form)) for sigma in (1e-2, 5e-3)]
    assert errors[0] > 1e-5, "nothing to be compared"
    assert errors[0] / errors[1] == pytest.approx(factor, rel=0.05)


@every_problem
def test_the_estimate_of_a_given_sigma_is_its_error(known: KnownProblem) -> None:
    for method in (Penalty(1e-2), Penalty(1e-2, "forward")):
        found = at_truth(known, method)
        error, estimate = relative_error(found.gradient, known.truth.gradient), found.certificate.error
        assert estimate is not None and 0.9 * error <= estimate <= 1.5 * error  # it is measured by loose solves


@every_problem
def test_the_penalty_finds_its_sigma(known: KnownProblem) -> None:
    assert penalty_error(known, Penalty()) <= 1e-6
    assert penalty_error(known, Penalty(form="forward")) <= 1e-4  # 1e-3 of agreement, extrapolated
    found = hypergradient(known.problem(), "penalty")  # from the start, with an inner solve of its own
    assert relative_error(found.gradient, known.truth.gradient) <= 1e-6
    assert found.certificate.verdict == "exact"


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda known, steps: inner.SGD(lr=1.0 / known.truth.curvature[1], steps=steps),
    "adam": lambda known, steps: inner.Adam(lr=lambda h, t: 0.02 * (0.01 / steps) ** (t / steps), steps=steps),
}


@pytest.mark.parametrize(
    ("name", "optimizer", "steps"),
    [
        *itertools.product(["per-feature ridge", "coupled quadratic"], OPTIMIZERS, [3, 10]),
        ("per-feature ridge", "adam", 400),
        ("logistic regression", "sgd", 400),
    ],
)
def test_a_penalty_on_loops_that_stop_early_is_never_exact_by_mistake(name: str, optimizer: str, steps: int) -> None:
    known = PROBLEMS[name]
    found = at_truth(known, "penalty", OPTIMIZERS[optimizer](known, steps))
    error = relative_error(found.gradient, known.truth.gradient)
    if found.certificate.verdict == "exact":
        assert error < 1e-3
    if steps == 400:
        assert error <= 1e-3  # the loops end there, Adam's as far as its schedule goes


def test_a_penalty_on_minibatches_says_so() -> None:
    """Adam on batches of 5 does not end at a solution: what the pinned batch sees of it is noise."""
    torch.manual_seed(0)
    rows = TensorDataset(X, Y)
    problem = bilevel.BilevelProblem(
        lambda w, h, b: ((b[0] @ w - b[1]) ** 2).mean() + h * (w**2).sum(),
        lambda w, h: ((XV @ w - YV) ** 2).mean(),
        params=torch.zeros(4, 4, dtype=torch.float64),
        hparams=bilevel.positive(0.5),
        inner_solver=inner.Adam(lr=0.03, steps=60),
        inner_data=DataLoader(rows, batch_size=5, shuffle=True),
    )
    assert hypergradient(problem, "penalty", on_untrusted="ignore").certificate.verdict != "exact"


def test_a_penalty_goes_through_kinks_with_a_proximal_solver() -> None:
    def lasso() -> bilevel.BilevelProblem:
        return bilevel.BilevelProblem(
            lambda w, h: ((X @ w - Y[:, 0]) ** 2).mean(),
            lambda w, h: ((XV @ w - YV[:, 0]) ** 2).mean(),
            params=torch.zeros(4, dtype=torch.float64),
            hparams=bilevel.positive(0.2),
            inner_solver=inner.ProximalGradient(bilevel.prox.L1(lambda h: h), lr=0.2, steps=150),
        )

    found, expected = hypergradient(lasso(), "penalty"), hypergradient(lasso(), "implicit")
    assert relative_error(found.gradient, expected.gradient) <= 1e-6
    assert found.certificate.verdict == "approximate"  # how far training got is not measured across kinks


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("solver", ["to the end", "steps"])
def test_a_penalty_across_kinks_sees_that_training_stopped_early(solver: str, steps: int) -> None:
    lasso = prox.L1(lambda h: h)

    def found(stopped: Any, method: str) -> bilevel.Hypergradient:
        problem = bilevel.BilevelProblem(
            lambda w, h: ((X @ w - Y[:, 0]) ** 2).mean(),
            lambda w, h: ((XV @ w - YV[:, 0]) ** 2).mean(),
            params=torch.zeros(4, dtype=torch.float64),
            hparams=bilevel.positive(0.2),
            inner_solver=stopped,
        )
        return hypergradient(problem, method, on_untrusted="ignore")

    early = inner.ProximalGradient(lasso, lr=0.2, steps=steps)
    at = found(inner.Proximal(lasso, max_steps=steps) if solver == "to the end" else early, "penalty")
    error = relative_error(at.gradient, found(inner.Proximal(lasso), "implicit").gradient)
    assert at.certificate.error is not None and error <= 3.0 * at.certificate.error
    assert steps > 1 or not at.certificate.trusted


def test_a_penalty_measures_flat_directions() -> None:
    """50 steps of heavy ball leave the second direction where it began: no secant has seen its curvature."""
    bends, t = torch.tensor([1.0, 1e-5], dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64)

    def problem(solver: Any) -> bilevel.BilevelProblem:
        return bilevel.BilevelProblem(
            lambda w, h: (bends * (w - h) ** 2).sum() / 2,
            lambda w, h: ((w - t) ** 2).sum() / 2,
            params=torch.zeros(2, dtype=torch.float64),
            hparams=torch.tensor([0.3, -0.5], dtype=torch.float64),
            inner_solver=solver,
        )

    truth = torch.tensor([-0.7, -3.5], dtype=torch.float64)
    early = hypergradient(problem(inner.SGD(lr=0.9, steps=50)), "penalty", on_untrusted="ignore")
    error = relative_error(early.gradient, truth)
    assert error > 0.5 and early.certificate.error == pytest.approx(error, rel=0.1)
    # Trained to the end, with a σ below the smallest curvature: above it, inner - σ outer has no minimum.
    exact = hypergradient(problem(inner.LBFGS(rtol=1e-12)), "penalty", on_untrusted="ignore")
    assert relative_error(exact.gradient, truth) <= 1e-5


@pytest.mark.parametrize("sigma", [None, 1e-20])
def test_ends_that_are_the_same_are_no_missing_path(sigma: float | None) -> None:
    """At the outer optimum ∂f/∂w = 0 and both ends are the solution; so they are where σ is lost in rounding."""
    t = 1.0 if sigma is None else 5.0
    problem = bilevel.BilevelProblem(
        lambda w, h: ((w - h) ** 2).sum(),
        lambda w, h: ((w - t) ** 2).sum(),
        params=torch.ones(3, dtype=torch.float64),
        hparams=torch.ones(3, dtype=torch.float64),
    )
    found = hypergradient(problem, Penalty(sigma), on_untrusted="ignore")
    assert not found.gradient.any()
    assert found.certificate.verdict == ("exact" if sigma is None else "untrusted")
    assert found.certificate.error == pytest.approx(0.0 if sigma is None else 1.0)


def test_a_penalty_in_float32_has_half_of_the_digits() -> None:
    def problem(dtype: torch.dtype) -> bilevel.BilevelProblem:
        x, xv, y, yv = (t.to(dtype) for t in (X, XV, Y, YV))
        return bilevel.BilevelProblem(
            lambda w, h: ((x @ w - y) ** 2).mean() + (h * w**2).sum(),
            lambda w, h: ((xv @ w - yv) ** 2).mean(),
            params=torch.zeros(4, 4, dtype=dtype),
            hparams=bilevel.positive(torch.full((4, 1), 0.1, dtype=dtype)),
        )

    expected = hypergradient(problem(torch.float64), "direct").gradient
    for method in ("penalty", FiniteDifference(CG(rtol=1e-4))):
        found = hypergradient(problem(torch.float32), method)
        error = relative_error(found.gradient.double(), expected)
        assert error <= 1e-2
        assert found.certificate.verdict == "approximate" or error < 1e-3


def test_a_loop_of_ones_own_cannot_be_trained_on_another_loss() -> None:
    problem = bilevel.BilevelProblem(
        lambda w, h: ((w - h) ** 2).sum(),
        lambda w, h: (w**2).sum(),
        params=torch.zeros(3, dtype=torch.float64),
        hparams=bilevel.positive(0.5),
        inner_solver=lambda w, h: torch.full_like(w, float(h)),
    )
    with pytest.raises(bilevel.BilevelError, match="trains on inner_loss"):
        hypergradient(problem, "penalty")
