"""`solve` with every method of the table of names improves one real problem: digits whose annotators guess."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import Tensor

import bilevel
from benchmarks.annotators import Digits, outer_loss, problem_for, read_digits, run, untuned
from bilevel import METHODS

STEPS = 3  # the table in docs/choosing.md has 30, of images four times as large


@pytest.fixture(scope="module")
def digits() -> Digits:
    """Return the digits as images of 4 x 4 pixels."""
    full = read_digits(seed=0)

    def small(images: Tensor) -> Tensor:
        return images.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)

    x, labels, who = full.train
    (xv, yv), (xt, yt) = full.valid, full.test
    return replace(full, train=(small(x), labels, who), valid=(small(xv), yv), test=(small(xt), yt))


@pytest.mark.parametrize("method", METHODS)
def test_solve_finds_who_guesses(method: str, digits: Digits) -> None:
    # One difference for each of 20 weights takes 80 inner solves; four random directions take 8, and are noisy.
    noisy = bilevel.ZeroOrder(directions=4) if method == "zero-order" else None
    before, after = untuned(digits), run(method, digits, STEPS, noisy, loop=100)
    # The exact ones end at 0.83 and 0.84 of the losses before, single-loop ones at 0.92, the noisy one at 0.94.
    assert after.valid < 0.95 * before.valid and after.test < 0.95 * before.test
    assert after.told > 0.75 and before.told == 0.5


def test_the_figures_are_recomputed_from_what_solve_returned(digits: Digits) -> None:
    """Equal weights: the model that L-BFGS trains has the validation loss that the table shows."""
    found = bilevel.hypergradient(problem_for("direct", digits), "direct")
    assert untuned(digits).valid == pytest.approx(found.outer_loss, rel=1e-12)
    assert float(outer_loss(found.params, found.gradient, digits.valid)) == pytest.approx(found.outer_loss, rel=1e-12)
