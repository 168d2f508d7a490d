"""Differences over whole inner loops."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import optree
import pytest
import torch
from torch import Tensor, nn

import bilevel
from bilevel import ZeroOrder, hypergradient, inner
from bilevel.hyperparameters import Hyperparameters
from bilevel.testing import KnownProblem, known_problems, relative_error

PROBLEMS = {known.name: known for known in known_problems()}
every_problem = pytest.mark.parametrize("known", PROBLEMS.values(), ids=PROBLEMS)


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


# Loops that are no smooth functions


def loop(value: Any, h: Any, dtype: torch.dtype = torch.float64) -> bilevel.BilevelProblem:
    """F(h) = value(h), by a loop that autograd sees nothing of."""
    return bilevel.BilevelProblem(
        lambda w, h: (w**2).sum(),
        lambda w, h: w.sum(),
        params=torch.zeros(1, dtype=dtype),
        hparams=h,
        inner_solver=lambda w, h: torch.tensor([float(value(h.double().numpy()))], dtype=dtype),
    )


def look(value: Any, h: Any, dtype: torch.dtype = torch.float64) -> bilevel.Hypergradient:
    return hypergradient(loop(value, h, dtype), "zero-order", on_untrusted="ignore")


def test_a_noisy_loop_is_as_uncertain_as_it_says() -> None:
    """(h0 + 1)^2 + h1^2 with noise from 1e-6 to 1; the true error is above 3 times the estimate in 1 % at most."""
    trusted, h = 0, bilevel.positive(torch.tensor([0.5, 2.0], dtype=torch.float64))
    for seed in range(12):
        dice, size = np.random.RandomState(seed), 10.0 ** (-6 + seed / 2)
        found = look(lambda h, dice=dice, size=size: (h[0] + 1) ** 2 + h[1] ** 2 + size * dice.randn(), h)
        error, estimate = relative_error(found.gradient, torch.tensor([3.0, 4.0])), found.certificate.error
        if found.certificate.trusted:
            trusted += 1
            assert estimate is not None and error <= 3.0 * estimate
            assert error < (1e-2 if found.certificate.verdict == "exact" else 0.5)
    assert trusted >= 8


@pytest.mark.parametrize("width", [1e-3, 0.03, 0.1, 0.3])
def test_a_staircase_is_seen_on_its_larger_scale(width: float) -> None:
    found = look(lambda h: np.round(h**2 / width) * width, bilevel.positive(1.03))
    error, estimate = relative_error(found.gradient, torch.tensor(2.06)), found.certificate.error
    assert estimate is not None and estimate > 0.0 and error <= 3.0 * estimate
    if found.certificate.trusted and width > 0.01:
        assert "slope over steps of up to" in found.certificate.notes[0]
    assert found.certificate.verdict != "exact" and (width > 0.1 or found.certificate.trusted)


@pytest.mark.parametrize("at", ["low", "high", "near", "inside"])
def test_no_loop_runs_outside_of_a_range(at: str) -> None:
    seen: list[float] = []
    value = {"low": 0.3, "high": 0.7, "near": 0.3003, "inside": 0.5}[at]

    def cube(h: Any) -> Any:
        seen.append(float(h))
        return h**3

    found = look(cube, bilevel.positive(value, low=0.3, high=0.7))
    assert min(seen) >= 0.3 and max(seen) <= 0.7
    assert relative_error(found.gradient, torch.tensor(3.0 * value**2, dtype=torch.float64)) <= 1e-6
    assert found.certificate.verdict == "exact"
    seen.clear()
    problem = loop(cube, bilevel.positive(value, low=0.3, high=0.7))
    hypergradient(problem, ZeroOrder(directions=8, step=0.1), on_untrusted="ignore")
    assert min(seen) >= 0.3 and max(seen) <= 0.7


@pytest.mark.parametrize("draw", [np.random.rand, random.random])
def test_global_random_numbers_are_pinned_and_put_back(draw: Any) -> None:
    np.random.seed(0)
    random.seed(0)
    before = (str(np.random.get_state()), random.getstate())
    found = look(lambda h: h**2 + draw(), bilevel.positive(0.5))
    assert (str(np.random.get_state()), random.getstate()) == before
    assert found.certificate.verdict == "exact"
    assert found.gradient.item() == pytest.approx(1.0, rel=1e-7)


def test_the_rounding_of_float32_is_in_the_estimate() -> None:
    """1000 + h: of steps of 5 % a loss near 1000 keeps three digits."""
    found = look(lambda h: 1000.0 + h**3, bilevel.positive(torch.tensor(0.1)), torch.float32)
    error, estimate = relative_error(found.gradient, torch.tensor(0.03)), found.certificate.error
    assert estimate is not None and error <= 3.0 * estimate and found.certificate.verdict != "exact"


@pytest.mark.parametrize("steep", [1.0, 1e2, 1e4])
def test_the_step_finds_the_scale_of_a_hyperparameter_at_zero(steep: float) -> None:
    found = look(lambda h: np.sin(steep * h + 0.3), bilevel.real(0.0))
    error = relative_error(found.gradient, torch.tensor(steep * np.cos(0.3)))
    assert found.certificate.verdict == "exact" and error <= 1e-3


def test_a_kink_and_a_level_point_are_no_slopes() -> None:
    """|h| has none at 0, and that of h^2 is 0: not a path that is missing."""
    assert not look(abs, bilevel.real(0.0)).certificate.trusted
    level = look(lambda h: h**2, bilevel.real(0.0))
    assert abs(level.gradient.item()) <= 1e-15


def test_an_error_of_the_loop_says_where_it_came_up() -> None:
    def fit(h: Any) -> Any:
        if h > 0.5:
            raise RuntimeError("too steep")
        return h

    with pytest.raises(RuntimeError, match="too steep") as caught:
        look(fit, bilevel.positive(0.499))
    assert any("ran the inner loop at hparams = 0.50" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"directions": 1}, "at least 2"),
        ({"directions": 0}, "`directions` is 0, expected a whole number"),
        ({"step": -1.0}, "`step` is -1.0, expected a number above 0"),
    ],
)
def test_bad_settings_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(bilevel.BilevelError, match=message):
        ZeroOrder(**settings)


def test_the_structure_is_that_of_the_hyperparameters() -> None:
    known = PROBLEMS["coupled quadratic"]
    found = hypergradient(known.problem(), ZeroOrder(directions=2), on_untrusted="ignore")
    assert optree.tree_structure(found.gradient) == optree.tree_structure(known.truth.gradient)
