"""A hypergradient is right, or it says that it is not: traps of the inner problem and of its loop, by name."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.datasets import load_diabetes

import bilevel
from benchmarks.problems import Dice
from bilevel import BilevelProblem, Truncated, hypergradient, inner
from bilevel.testing import KnownProblem, relative_error
from problems import LOGISTIC, RIDGE
from problems_trust import D, at


@pytest.mark.parametrize("method", ["implicit", "cg", "minres", "gmres", "direct", "neumann"])
def test_an_inner_problem_that_has_not_converged_is_flagged(method: str) -> None:
    """Logistic regression of condition 600: after 100 steps of gradient descent the hypergradient points elsewhere."""
    dice = Dice(8)
    X, X_val, truth = dice.normal(60, 8) * dice.logs(0.03, 1.0, 8), dice.normal(60, 8), dice.normal(8)
    y, y_val = torch.sign(X @ truth + 0.3 * dice.normal(60)), torch.sign(X_val @ truth + dice.normal(60))
    softplus = torch.nn.functional.softplus
    known = KnownProblem(
        "logistic",
        lambda w, h: softplus(-y * (X @ w)).mean() + (h * w**2).sum() / 2,
        lambda w, h: softplus(-y_val * (X_val @ w)).mean(),
        torch.zeros(8, dtype=D),
        bilevel.positive(torch.full((8,), 1e-4, dtype=D)),
    )
    low, high = known.truth.curvature
    assert high / low > 100.0
    problem = known.problem(inner.SGD(lr=1.0 / high, steps=100))
    found = at(problem, method)
    error = relative_error(found.gradient, known.truth.gradient)
    assert error > 0.8
    cosine = torch.nn.functional.cosine_similarity(found.gradient, known.truth.gradient, dim=0)
    assert float(cosine) < (0.6 if method == "neumann" else 0.2)
    assert found.certificate.verdict == "untrusted"
    assert "train the inner problem further" in found.certificate.reasons[0]
    if method != "neumann":
        assert found.certificate.error is not None
        assert error / 3.0 <= found.certificate.error <= 100.0 * error


@pytest.mark.parametrize("rtol", [1e-6, 1e-8])
@pytest.mark.parametrize("method", ["cg", "minres", "gmres", "direct", "neumann", "nystrom", "shine", "fixed-point"])
def test_data_without_noise_hide_no_error(method: str, rtol: float) -> None:
    """∂f/∂w nearly vanishes at the solution, so that a small error of w is a large one of the hypergradient."""
    dice = Dice(0)
    X, X_val, w = dice.normal(32, 8), dice.normal(32, 8), dice.normal(8)
    known = KnownProblem(
        "noise-free ridge",
        lambda v, h: ((X @ (v - w)) ** 2).mean() + h * (v**2).sum(),
        lambda v, h: ((X_val @ (v - w)) ** 2).mean(),
        torch.zeros(8, dtype=D),
        bilevel.positive(1e-6),
    )
    found = at(known.problem(inner.LBFGS(rtol=rtol)), method)
    error = relative_error(found.gradient, known.truth.gradient)
    assert error > 1e-5
    assert found.certificate.error is not None
    assert error / 3.0 <= found.certificate.error <= 100.0 * error


@pytest.mark.parametrize("method", ["implicit", "nystrom", "cg", "one-step"])
@pytest.mark.parametrize("off", [-1e-5, -1e-8, 1e-8])
def test_inner_solutions_on_a_ring_do_no_harm(method: str, off: float) -> None:
    """Along the ring the curvature is 4 (|w|² - λ), of either sign, and neither loss goes there: dF/dλ = -3/4."""
    w = (1.0 + off) * math.sqrt(0.7) * torch.tensor([0.6, 0.8], dtype=D)
    problem = BilevelProblem(
        lambda v, h: ((v**2).sum() - h) ** 2,
        lambda v, h: -0.75 * (v**2).sum(),
        torch.ones(2, dtype=D),
        bilevel.positive(0.7),
    )
    found = at(problem, method, w)
    assert abs(float(found.gradient) + 0.75) <= 10.0 * abs(off)
    assert found.certificate.verdict == "exact"


def test_a_run_ends_trusted_where_the_scale_of_the_hyperparameters_changed() -> None:
    """λ falls from 10 to 4e-4: a hypergradient that counts as zero is 2e4 times larger there, in natural units."""
    c = torch.tensor([1.0, 2.0, 4.0], dtype=D)
    problem = BilevelProblem(
        lambda w, h: (c * (w - 1.0) ** 2).sum() + h * (w**2).sum(),
        lambda w, h: ((w - c / (c + 1e-4)) ** 2).sum(),
        torch.zeros(3, dtype=D),
        bilevel.positive(10.0),
        inner.LBFGS(rtol=1e-5),
    )
    found = bilevel.solve(problem)
    assert found.status.startswith("converged")
    assert found.certificate.verdict == "exact"


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("window", [1, 2, 5, 10])
def test_a_window_that_is_too_short_is_flagged(window: int, momentum: float) -> None:
    """The slowest of the modes decides; the contraction of the first few steps is that of the fastest."""
    _, high = LOGISTIC.truth.curvature
    problem = LOGISTIC.problem(inner.SGD(lr=1.0 / high, momentum=momentum, steps=300))
    whole = at(problem, "unroll")
    cut = at(problem, Truncated(steps=window))
    error = relative_error(cut.gradient, whole.gradient)
    assert cut.certificate.error is not None
    assert error / 3.0 <= cut.certificate.error <= 100.0 * error
    assert cut.certificate.verdict != "exact"
    if error > 0.5:
        assert cut.certificate.verdict == "untrusted"


def test_a_fixed_point_is_that_of_the_step_with_its_decay() -> None:
    """A decay that only the step has moves the solution: the estimate asks the step, not the inner loss."""
    problem = RIDGE.problem(inner.SGD(lr=0.3, weight_decay=0.1, steps=2000))
    assert at(problem, "fixed-point").certificate.verdict == "exact"


@pytest.mark.parametrize(("seed", "window"), [(0, 20), (3, 20), (3, 50)])
def test_a_window_over_a_network_whose_early_steps_are_unlike_its_late_ones(seed: int, window: int) -> None:
    """The adjoint shrinks over the window and not before it: only the steps left out can tell."""
    table, target = load_diabetes(return_X_y=True)
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
    x, y = torch.tensor(table)[order], torch.tensor(target)[order, None]
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(10, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    problem = BilevelProblem(
        lambda m, h: ((m(x[:300]) - y[:300]) ** 2).mean() + sum(h[i // 2] * (m[i].weight ** 2).sum() for i in (0, 2)),
        lambda m, h: ((m(x[300:]) - y[300:]) ** 2).mean(),
        model,
        bilevel.positive(1e-3, shape=2),
        inner.SGD(lr=0.1, momentum=0.9, steps=150),
    )
    truth = hypergradient(problem, "unroll").gradient
    found = hypergradient(problem, bilevel.Truncated(window), on_untrusted="ignore")
    assert relative_error(found.gradient, truth) > 0.5
    assert found.certificate.verdict == "untrusted"
