"""Differences over inner loops that are no smooth functions: noise, staircases, kinks, ranges and errors."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import optree
import pytest
import torch

import bilevel
from bilevel import ZeroOrder, hypergradient
from bilevel.testing import relative_error
from problems import PROBLEMS


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
