"""`solve` with every method of the table of names improves one real problem: digits whose annotators guess."""

from __future__ import annotations

import pytest

import bilevel
from benchmarks.annotators import Digits, outer_loss, problem_for, read_digits, run, untuned
from bilevel import METHODS

STEPS = 5


@pytest.fixture(scope="module")
def digits() -> Digits:
    return read_digits(seed=0)


@pytest.mark.parametrize("method", METHODS)
def test_solve_finds_who_guesses(method: str, digits: Digits) -> None:
    # One difference for each of 20 weights takes 80 inner solves; four random directions take 8, and are noisy.
    noisy = bilevel.ZeroOrder(directions=4) if method == "zero-order" else None
    before, after = untuned(digits), run(method, digits, STEPS, noisy)
    if noisy:
        assert after.valid < before.valid and after.test < before.test and after.told > 0.6
        return
    # 30 steps end at 0.36 and 0.39 from 1.05 and 1.09; five steps go about half of the way.
    assert after.valid < 0.7 * before.valid and after.test < 0.7 * before.test
    assert after.told == 1.0 and before.told == 0.5


def test_the_figures_are_recomputed_from_what_solve_returned(digits: Digits) -> None:
    """Equal weights: the model that L-BFGS trains has the validation loss that the table shows."""
    found = bilevel.hypergradient(problem_for("direct", digits), "direct")
    assert untuned(digits).valid == pytest.approx(found.outer_loss, rel=1e-12)
    assert float(outer_loss(found.params, found.gradient, digits.valid)) == pytest.approx(found.outer_loss, rel=1e-12)
