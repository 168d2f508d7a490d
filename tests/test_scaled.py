"""L-BFGS with a diagonal from the gradients, for many hyperparameters that lie within bounds."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

import bilevel
from bilevel.minimize import Array, far_lbfgs, lbfgs
from bilevel.scaled import LEAP, scaled_lbfgs

N = 30
WEIGHTS = np.logspace(-3, 0, N)
TARGET = np.linspace(-4.0, 4.0, N)


class Counted:
    """Σ c_i (exp(u_i - t_i) - u_i), with curvatures and slopes that are three decades apart; its minimum is at t."""

    def __init__(self) -> None:
        self.calls, self.needed, self.trail = 0, 0, [np.zeros(N)]

    def __call__(self, u: Array) -> tuple[float, Array]:
        self.calls += 1
        grown = np.exp(u - TARGET)
        return float(WEIGHTS @ (grown - u)), WEIGHTS * (grown - 1.0)

    def after_step(self, u: Array) -> bool:
        self.trail.append(u.copy())
        self.needed = self.calls
        return bool(np.abs(u - TARGET).max() < 1e-2)


def spent(minimizer: Callable[..., object]) -> Counted:
    counted = Counted()
    ends = np.full(N, -20.0), np.full(N, 20.0)
    minimizer(counted, np.zeros(N), max_steps=300, bounds=ends, after_step=counted.after_step)
    assert np.abs(counted.trail[-1] - TARGET).max() < 1e-2
    return counted


def test_scales_that_lie_decades_apart_cost_few_evaluations() -> None:
    assert 2 * spent(scaled_lbfgs).needed < spent(lbfgs).needed


def test_no_step_is_longer_than_a_leap() -> None:
    trail = spent(scaled_lbfgs).trail
    assert max(float(np.abs(b - a).max()) for a, b in itertools.pairwise(trail)) <= LEAP * (1.0 + 1e-12)


def test_it_ends_by_itself_at_the_bounds() -> None:
    counted = Counted()
    ends = np.full(N, -1.0), np.full(N, 2.0)

    def after_step(u: Array) -> bool:
        counted.trail.append(u.copy())
        return False

    scaled_lbfgs(counted, np.zeros(N), max_steps=1000, bounds=ends, after_step=after_step)
    np.testing.assert_allclose(counted.trail[-1], np.clip(TARGET, *ends), atol=1e-5)


def test_solve_takes_it_for_many_strengths() -> None:
    """The strengths that a quadratic wants lie four decades apart, as they do for words."""
    weight = torch.logspace(-2, 2, N, dtype=torch.float64)
    problem = bilevel.BilevelProblem(
        lambda w, h: (weight * (w - 1) ** 2 + h * w**2).sum() / 2,
        lambda w, h: ((w - 0.5) ** 2).sum(),
        torch.zeros(N, dtype=torch.float64),
        bilevel.positive(1.0, shape=(N,)),
    )
    solution = bilevel.solve(problem, "direct", steps=60, on_untrusted="ignore")  # at the end it is zero
    assert solution.outer_loss < 1e-6
    torch.testing.assert_close(solution.hparams, weight, rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("distance", [1e-3, 1.0, 3.0, 100.0])
def test_many_entries_take_no_more_evaluations_than_one(distance: float) -> None:
    calls = {}
    for minimizer in (far_lbfgs, lbfgs):
        points = [np.zeros(400)]

        def parabola(x: Array) -> tuple[float, Array]:
            points.append(x.copy())  # noqa: B023  used in this turn alone
            return 0.5 * float(((x - distance) ** 2).sum()) / distance, (x - distance) / distance

        def there(x: Array) -> bool:
            return bool(np.abs(x - distance).max() <= 1e-6 * distance)

        infinite = np.full(400, -np.inf), np.full(400, np.inf)
        minimizer(parabola, points[0], max_steps=50, bounds=infinite, after_step=there)
        assert there(points[-1])
        calls[minimizer] = len({p.tobytes() for p in points})
        first = next(p for p in points if p.any())
        assert float(np.abs(first).max()) <= 1.0 and float(np.linalg.norm(first)) <= max(1.0, 10.0 * distance + 1e-12)
    # SciPy's first step has the norm 1, and 20 is needed for an entry to move by 1.
    assert calls[far_lbfgs] <= calls[lbfgs] - (distance >= 1.0)
