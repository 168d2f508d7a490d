"""Differences over whole inner loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bilevel
from bilevel import ZeroOrder, hypergradient, inner
from bilevel.hyperparameters import Hyperparameters
from bilevel.testing import KnownProblem, relative_error
from problems import every_problem


@every_problem
def test_coordinates_are_the_truth(known: KnownProblem) -> None:
    """From the start, by inner solves to 1e-12, which is 1e-10 of a difference; extrapolation leaves h^4 = 1e-9."""
    found = hypergradient(known.problem(inner.LBFGS(rtol=1e-12)), "zero-order")
    error = relative_error(found.gradient, known.truth.gradient)
    assert error <= 1e-8
    assert found.certificate.verdict == "exact"
    assert found.certificate.error is not None and found.certificate.error >= error / 3.0


def test_a_given_step_is_the_central_difference() -> None:
    """F(h) = h^4 by steps of a factor: (F(h e^s) - F(h e^-s)) / 2s h = h^3 sinh(4 s) / s."""
    problem = bilevel.BilevelProblem(
        lambda w, h: (w - h**2) ** 2,
        lambda w, h: w**2,
        params=torch.zeros((), dtype=torch.float64),
        hparams=bilevel.positive(1.5),
    )
    for step in (0.1, 0.01):
        found = hypergradient(problem, ZeroOrder(step=step), on_untrusted="ignore")
        assert found.gradient.item() == pytest.approx(1.5**3 * np.sinh(4 * step) / step, rel=1e-7)
        error = found.gradient.item() / (4 * 1.5**3) - 1.0
        assert found.certificate.error == pytest.approx(error, rel=0.1)


def test_learning_rates_and_starting_points_are_seen() -> None:
    """Against unroll, to which the loop is the same function."""
    bend = torch.tensor([1.0, 0.3], dtype=torch.float64)

    def problem(solver: Any) -> bilevel.BilevelProblem:
        return bilevel.BilevelProblem(
            lambda w, h: (bend * (w - 1.0) ** 2).sum() + h["l2"] * (w**2).sum(),
            lambda w, h: ((w - 0.5) ** 2).sum(),
            params=torch.zeros(2, dtype=torch.float64),
            hparams={
                "lr": bilevel.positive(0.05, shape=(7,)),
                "momentum": bilevel.interval(0.3, 0.0, 1.0),
                "l2": bilevel.positive(0.1),
            },
            inner_solver=solver,
        )

    solver = inner.SGD(lr=lambda h, t: h["lr"][t], momentum=lambda h: h["momentum"], steps=7)
    found, expected = (hypergradient(problem(solver), method) for method in ("zero-order", "unroll"))
    for name, g in expected.gradient.items():
        assert relative_error(found.gradient[name], g) <= 1e-7, name
    assert relative_error(found.params, expected.params) == 0.0
    report = bilevel.check(problem(solver), "zero-order")
    assert report.ok and not [f for f in report.findings if f.level == "warning"]


def test_a_loop_outside_of_torch() -> None:
    """Ridge by numpy, where nothing has a graph."""
    generator = torch.Generator().manual_seed(0)
    X, XV = (torch.randn(20, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    y, yv = (torch.randn(20, generator=generator, dtype=torch.float64) for _ in range(2))

    def fit(w: Tensor, h: Tensor) -> Tensor:
        A = X.numpy().T @ X.numpy() / 20 + np.diag(h.detach().numpy())
        return torch.from_numpy(np.linalg.solve(A, X.numpy().T @ y.numpy() / 20))

    problem = bilevel.BilevelProblem(
        lambda w, h: ((X @ w - y) ** 2).mean() / 2 + (h * w**2).sum() / 2,
        lambda w, h: ((XV @ w - yv) ** 2).mean(),
        params=torch.zeros(4, dtype=torch.float64),
        hparams=bilevel.positive(0.2, shape=(4,)),
        inner_solver=fit,
    )
    expected = hypergradient(problem, "direct").gradient
    assert relative_error(hypergradient(problem, "zero-order").gradient, expected) <= 1e-7
    solution = bilevel.solve(problem, "zero-order", steps=5)
    assert solution.outer_loss < hypergradient(problem, "zero-order").outer_loss


def test_a_module_that_is_trained_in_place_and_drops_out() -> None:
    """Common random numbers: the same masks in every loop, so that differences see hyperparameters alone."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 3, dtype=torch.float64), torch.randn(16, 1, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1)).double()

    def fit(m: nn.Module, h: Tensor) -> None:
        optimizer = torch.optim.SGD(m.parameters(), lr=float(h))
        for _ in range(5):
            optimizer.zero_grad()
            ((m(x) - y) ** 2).mean().backward()
            optimizer.step()

    problem = bilevel.BilevelProblem(
        lambda m, h: ((m(x) - y) ** 2).mean(),
        lambda m, h: sum((p**2).sum() for p in m.parameters()),
        params=model,
        hparams=bilevel.positive(0.05),
        inner_solver=fit,
    )
    found = hypergradient(problem, "zero-order")
    assert found.certificate.verdict == "exact"
    assert relative_error(hypergradient(problem, ZeroOrder(step=1e-3)).gradient, found.gradient) <= 1e-4


# Random directions


def known_quadratic(n: int) -> tuple[bilevel.BilevelProblem, Tensor]:
    """F(h) = |h - t|^2: differences of it have no bias, whatever the step."""
    t, h = torch.linspace(-1.0, 1.0, n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    problem = bilevel.BilevelProblem(
        lambda w, h: ((w - h) ** 2).sum(),
        lambda w, h: ((w - t) ** 2).sum(),
        params=torch.zeros(n, dtype=torch.float64),
        hparams=h,
        inner_solver=lambda w, h: h.clone(),
    )
    return problem, 2.0 * (h - t)


def test_random_directions_are_unbiased_with_the_variance_of_the_theory() -> None:
    """E |g - ∇F|^2 = (m + 1) / n |∇F|^2 for m hyperparameters and n directions."""
    problem, truth = known_quadratic(5)
    found = [hypergradient(problem, ZeroOrder(20, seed=s), on_untrusted="ignore") for s in range(60)]
    samples = torch.stack([f.gradient for f in found])
    variance = float(((samples - truth) ** 2).sum(1).mean()) / float((truth**2).sum())
    assert variance == pytest.approx(6 / 20, rel=0.25)  # 60 samples: 8 % standard error
    # The mean of 60 x 20 directions is sqrt(6 / 1200) = 7 % away; 3 standard errors.
    assert relative_error(samples.mean(0), truth) <= 3 * 0.07
    reported = torch.tensor([f.certificate.standard_error for f in found])
    actual = (samples - truth).norm(dim=1) / samples.norm(dim=1)
    assert float(reported.mean()) == pytest.approx(float(actual.mean()), rel=0.2)
    assert all(f.certificate.verdict != "exact" for f in found)


def test_each_call_draws_new_directions_and_the_seed_repeats_them() -> None:
    problem, _ = known_quadratic(40)  # above 32 directions are the default
    first, again = (bilevel.solve(problem, "zero-order", steps=3, on_untrusted="ignore") for _ in range(2))
    assert relative_error(first.hparams, again.hparams) == 0.0
    other = bilevel.solve(problem, ZeroOrder(16, seed=1), steps=3, on_untrusted="ignore")
    assert relative_error(first.hparams, other.hparams) > 1e-3


# Ranges


def test_moved_hyperparameters_stay_inside_and_gradients_come_back() -> None:
    """Steps of any size; and dF/dλ from dF/dstep, against autograd through `moved`."""
    structure = {
        "positive": bilevel.positive(0.3, shape=(2,)),
        "interval": bilevel.interval(0.9, -1.0, 1.0),
        "simplex": bilevel.simplex(3),
        "real": bilevel.real(torch.tensor([3.0, -4.0], dtype=torch.float64)),
        "plain": torch.zeros(2, dtype=torch.float64),
    }
    hparams = Hyperparameters(structure, like=torch.zeros(1, dtype=torch.float64))
    start = hparams.layout.start
    torch.manual_seed(0)
    for size in (0.1, 10.0):
        step = {name: size * torch.randn_like(t) for name, t in start.items()}
        hparams.read(hparams.layout.shaped(hparams.moved(start, step)), "moved")  # raises outside of a range
    g = {name: torch.randn_like(t) for name, t in start.items()}
    h = 1e-6
    by_step = {}
    for name, t in start.items():
        slopes = []
        for i in range(t.numel()):
            unit = {n: torch.zeros_like(x) for n, x in start.items()}
            unit[name].view(-1)[i] = h
            plus, minus = hparams.moved(start, unit), hparams.moved(start, {n: -x for n, x in unit.items()})
            slopes.append(sum(float((g[n] * (plus[n] - minus[n])).sum()) for n in start) / (2 * h))
        by_step[name] = torch.tensor(slopes, dtype=torch.float64).reshape(t.shape)
    back = hparams.unchained(start, by_step)
    for name, label in zip(start, structure, strict=True):
        apart = back[name] - g[name]
        if "simplex" in name or "simplex" in label:
            apart = apart - apart.mean()
        assert float(apart.abs().max()) <= 1e-8


def test_what_the_loop_does_not_feel_is_named() -> None:
    problem = bilevel.BilevelProblem(
        lambda w, h: ((w - h["a"]) ** 2).sum(),
        lambda w, h: (w**2).sum(),
        params=torch.zeros(1, dtype=torch.float64),
        hparams={"a": bilevel.positive(0.1), "idle": bilevel.positive(0.5)},  # log and exp do not give 0.1 back
    )
    with pytest.raises(bilevel.UnseenHyperparameterError, match="idle"):
        hypergradient(problem, "zero-order")


def test_a_loop_that_jumps_is_not_exact() -> None:
    """Rounded to a thousandth, F is a staircase: its differences never settle."""
    problem = bilevel.BilevelProblem(
        lambda w, h: ((w - h) ** 2).sum(),
        lambda w, h: (torch.round(w * 1e3) / 1e3 - 3.0).square().sum(),
        params=torch.zeros(1, dtype=torch.float64),
        hparams=bilevel.positive(0.51234),
        inner_solver=lambda w, h: h.reshape(1).clone(),
    )
    found = hypergradient(problem, "zero-order", on_untrusted="ignore")
    error = abs(found.gradient.item() / (2 * (0.51234 - 3.0)) - 1.0)
    assert found.certificate.verdict != "exact" or error < 1e-3
