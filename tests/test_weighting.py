"""Weights of tasks and of examples, against closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bilevel
from bilevel import weighting
from problems_variables import scalar, vector

pytestmark = pytest.mark.usefixtures("seeded")


def test_weights_of_tasks() -> None:
    """w* = Σ p_i a_i for losses (w - a_i)² / 2 with weights p on a simplex; F = (w - t)² / 2."""
    a = vector(1.0, -2.0, 4.0)
    problem = bilevel.BilevelProblem(
        lambda w, p: weighting.tasks([(w - x).square() / 2 for x in a], p),
        lambda w, p: (w - 0.5).square() / 2,
        scalar(0.0),
        bilevel.simplex(3),
    )
    found = bilevel.hypergradient(problem)
    assert found.params.item() == pytest.approx(1.0, abs=1e-8)
    torch.testing.assert_close(found.gradient, 0.5 * (a - 1.0), rtol=1e-7, atol=1e-9)
    named = weighting.tasks({"a": scalar(2.0), "b": scalar(3.0)}, {"b": 10.0, "a": 1.0})
    assert named.item() == 32.0


def test_scales_of_tasks_end_at_their_losses() -> None:
    losses, scales = vector(4.0, 0.25), vector(2.0, 0.5).requires_grad_()
    value = weighting.uncertain_tasks(losses, scales)
    assert value.item() == pytest.approx(1.0, abs=1e-12)  # 1/2 + 1/2 + log(2) + log(1/2)
    (slope,) = torch.autograd.grad(value, scales)
    torch.testing.assert_close(slope, torch.zeros(2, dtype=torch.float64), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
def test_weights_of_examples(normalize: bool) -> None:
    """w* = Σ p_i a_i / Σ p_i for losses (w - a_i)² / 2, so dw*/dp_i = (a_i - w*) / Σ p."""
    a, p = vector(1.0, -2.0, 4.0, 0.0), vector(0.5, 1.0, 2.0, 0.5)

    def inner(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        targets, index = batch
        return weighting.examples((w - targets).square() / 2, h, index, normalize=normalize)

    order = torch.tensor([2, 0, 3, 1])
    problem = bilevel.BilevelProblem(
        inner, lambda w, h: (w - 1.0).square() / 2, scalar(0.0), bilevel.positive(p), inner_data=(a[order], order)
    )
    found = bilevel.hypergradient(problem)
    mean = float((p * a).sum() / p.sum())
    assert found.params.item() == pytest.approx(mean, abs=1e-8)
    torch.testing.assert_close(found.gradient, (mean - 1.0) * (a - mean) / p.sum(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: weighting.tasks({"seg": scalar(1.0)}, {"segs": 1.0}),
            r"`weights` are \['segs'\], expected a dict with the keys \['seg'\]; did you mean \"seg\"",
        ),
        (lambda: weighting.tasks([scalar(1.0)], vector(1.0, 2.0)), r"2 weights for 1 losses"),
        (lambda: weighting.tasks([vector(1.0, 2.0)], [1.0]), r"one of `losses` has shape \(2,\).*add .mean\(\)"),
        (lambda: weighting.tasks(scalar(1.0), [1.0]), r"`losses` has shape \(\), expected \(tasks\)"),
        (lambda: weighting.tasks([scalar(1.0)], 1.0), r"`weights` is a float, expected a dict, a list"),
        (lambda: weighting.examples(scalar(1.0), vector(1.0)), r"`losses` are of shape \(\).*reduction=\"none\""),
        (lambda: weighting.examples(vector(1.0, 2.0), vector(1.0, 2.0, 3.0)), r"say by `index` which of them"),
        (lambda: weighting.examples(vector(1.0), vector(1.0), vector(0.0)), r"`index` is a torch.float64 tensor"),
    ],
)
def test_messages(call: Any, message: str) -> None:
    with pytest.raises(bilevel.BilevelError, match=message):
        call()


def test_losses_that_are_whole_numbers_do_not_round_their_weights() -> None:
    assert weighting.tasks(torch.tensor([1, 2]), torch.tensor([0.5, 0.25])) == 1.0


def test_a_list_of_weights_is_refused() -> None:
    with pytest.raises(bilevel.InvalidTypeError, match="`weights` are a list, expected a Tensor"):
        weighting.examples(torch.ones(2), [1.0, 2.0])  # type: ignore[arg-type]
