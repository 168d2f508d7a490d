"""Typed hyperparameters: maps, their derivatives, ranges, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bilevel
from bilevel.hyperparameters import Hyperparameters
from bilevel.ranges import Hyperparameter

LIKE = torch.zeros((), dtype=torch.float64)

FREE = st.lists(st.floats(-12.0, 12.0), min_size=2, max_size=6).map(lambda x: torch.tensor(x, dtype=torch.float64))

KINDS: dict[str, Callable[[int], Hyperparameter]] = {
    "positive": lambda n: bilevel.positive(2.0, shape=n),
    "interval": lambda n: bilevel.interval(0.5, -1.0, 3.0, shape=n),
    "simplex": lambda n: bilevel.simplex(n),
    "real": lambda n: bilevel.real(0.0, shape=n),
}


@pytest.mark.parametrize("kind", KINDS)
@given(free=FREE)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_free_undoes_natural(kind: str, free: Tensor) -> None:
    leaf = KINDS[kind](len(free))
    natural = leaf.natural(free)
    back = leaf.free(natural)
    if kind == "simplex":  # logits are known up to a shift
        back, free = back - back.mean(), free - free.mean()
    # An interval of width 4 rounds to 1e-16 at its ends, where a logit of 12 has a slope of e^12 = 2e5.
    torch.testing.assert_close(back, free, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(leaf.natural(leaf.free(natural)), natural, rtol=1e-12, atol=1e-14)


@given(free=FREE)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_natural_values_lie_in_their_ranges(free: Tensor) -> None:
    assert bool((KINDS["positive"](len(free)).natural(free) > 0).all())
    inside = KINDS["interval"](len(free)).natural(free)
    assert bool(((inside > -1.0) & (inside < 3.0)).all())
    weights = KINDS["simplex"](len(free)).natural(free)
    assert bool((weights > 0).all())
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-12)


@given(free=FREE)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_gradients_are_chained_by_closed_forms(free: Tensor) -> None:
    n = len(free)
    natural_gradient = torch.arange(1, n + 1, dtype=torch.float64)
    sigmoid = 1 / (1 + torch.exp(-free))
    weights = torch.exp(free - free.max()) / torch.exp(free - free.max()).sum()
    expected = {
        "positive": torch.exp(free) * natural_gradient,
        "interval": 4.0 * sigmoid * (1 - sigmoid) * natural_gradient,
        "simplex": weights * (natural_gradient - weights @ natural_gradient),
        "real": natural_gradient,
    }
    for kind, truth in expected.items():
        found = Hyperparameters(KINDS[kind](n), LIKE).chain({"hparams": free}, {"hparams": natural_gradient})
        torch.testing.assert_close(found["hparams"], truth, rtol=1e-9, atol=1e-12)


def problem(hparams: Any, outer: Callable[[Tensor, Any], Tensor], n: int) -> bilevel.BilevelProblem:
    """Return a problem whose inner solution is the hyperparameters themselves."""
    start = torch.zeros(n, dtype=torch.float64)
    return bilevel.BilevelProblem(lambda w, h: ((w - h) ** 2).sum(), outer, start, hparams)


@pytest.mark.parametrize("kind", KINDS)
def test_hypergradients_are_in_natural_units(kind: str) -> None:
    leaf = KINDS[kind](3)
    target = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    found = bilevel.hypergradient(problem(leaf, lambda w, h: ((w - target) ** 2).sum(), 3))
    torch.testing.assert_close(found.gradient, 2 * (leaf.value - target), rtol=0.0, atol=1e-8)


@pytest.mark.parametrize(
    "optimizer", ["lbfgs", lambda tensors: torch.optim.SGD(tensors, lr=30.0)], ids=["lbfgs", "sgd"]
)
@pytest.mark.parametrize(
    ("leaf", "low", "high"),
    [
        (bilevel.positive(1.0, shape=2, low=0.5, high=2.0), 0.5, 2.0),
        (bilevel.positive(1.0, shape=2), 1e-8, 1e8),
        (bilevel.interval(0.5, 0.0, 1.0, shape=2), 0.0, 1.0),
    ],
    ids=["bounds", "default bounds", "interval"],
)
def test_ranges_are_kept_while_solving(leaf: Hyperparameter, low: float, high: float, optimizer: Any) -> None:
    seen: list[Tensor] = []

    def outer(w: Tensor, h: Tensor) -> Tensor:
        seen.append(h.detach().clone())
        return w[0] - w[1]  # wants one to be small and the other to be large without end

    solution = bilevel.solve(
        problem(leaf, outer, 2), steps=30, outer_optimizer=optimizer, progress=False, on_untrusted="ignore"
    )
    met = torch.stack(seen)
    # exp(log(x)) is x up to rounding
    assert low * (1 - 1e-12) <= met.min().item() and met.max().item() <= high * (1 + 1e-12)
    assert solution.hparams[0].item() < leaf.value[0].item() < solution.hparams[1].item()


def test_a_bound_that_holds_the_optimum_is_reached() -> None:
    solution = bilevel.solve(
        problem(bilevel.positive(1.0, low=0.5, high=2.0), lambda w, h: (w**2).sum(), 1), progress=False
    )
    assert solution.hparams.item() == pytest.approx(0.5, abs=1e-12)
    assert solution.converged


def test_a_simplex_is_solved_on_the_simplex() -> None:
    target = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    solution = bilevel.solve(problem(bilevel.simplex(3), lambda w, h: ((w - target) ** 2).sum(), 3), progress=False)
    torch.testing.assert_close(solution.hparams, target, rtol=0.0, atol=1e-5)  # tol=1e-6 of a gradient near 1
    assert solution.hparams.sum().item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_take_the_dtype_of_params(dtype: torch.dtype) -> None:
    hparams = [bilevel.positive(0.5), bilevel.interval(0.5, 0.0, 1.0), bilevel.real(1.0), bilevel.simplex(3)]
    p = bilevel.BilevelProblem(
        lambda w, h: ((w - h[0] - h[1] - h[2]) ** 2).sum() + (h[3] * w**2).sum(),
        lambda w, h: (w**2).sum(),
        torch.zeros(3, dtype=dtype),
        hparams,
    )
    found = bilevel.hypergradient(p)
    assert {t.dtype for t in found.gradient} == {dtype}
    assert {t.device.type for t in found.gradient} == {"cpu"}
    assert [tuple(t.shape) for t in found.gradient] == [(), (), (), (3,)]


def test_apply_sets_the_start_values() -> None:
    leaf = bilevel.positive(1.0)
    p = problem(leaf, lambda w, h: (w - 3.0).square().sum(), 1)
    solution = bilevel.solve(p, progress=False)
    assert leaf.value.item() == 1.0
    solution.apply_()
    assert leaf.value.item() == pytest.approx(3.0, abs=1e-5)


def test_given_hparams_are_read_in_natural_units() -> None:
    p = problem({"a": bilevel.positive(1.0)}["a"], lambda w, h: (w**2).sum(), 1)
    at = [
        bilevel.hypergradient(p, hparams=h).gradient.item() for h in (torch.tensor(3.0).double(), bilevel.positive(3.0))
    ]
    assert at == pytest.approx([6.0, 6.0], abs=1e-8)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bilevel.positive(0.0), r"positive\(\) needs finite values above 0, got 0"),
        (lambda: bilevel.positive(-1.0), r"positive\(\).*got -1"),
        (lambda: bilevel.positive(NAN), r"positive\(\) needs finite"),
        (lambda: bilevel.positive(INF), r"positive\(\) needs finite"),
        (lambda: bilevel.positive("1"), r"positive\(\).*str, expected a number or a Tensor"),  # type: ignore[arg-type]
        (lambda: bilevel.positive(True), r"positive\(\).*bool"),
        (lambda: bilevel.positive(None), r"positive\(\).*NoneType"),  # type: ignore[arg-type]
        (lambda: bilevel.positive([1.0, 2.0]), r"positive\(\).*list, expected.*torch.tensor"),  # type: ignore[arg-type]
        (lambda: bilevel.positive(1.0, low=2.0), r"low <= value <= high and low < high, got low=2.0"),
        (lambda: bilevel.positive(1.0, high=0.5), r"high=0.5"),
        (lambda: bilevel.positive(1.0, low=-1.0), r"low=-1.0"),
        (lambda: bilevel.positive(1.0, low=NAN), r"low=nan"),
        (lambda: bilevel.positive(1.0, low="a"), r"low='a'"),  # type: ignore[arg-type]
        (lambda: bilevel.positive(1.0, low=1.0, high=1.0), r"low < high"),
        (lambda: bilevel.positive(torch.ones(2), shape=3), r"shape \(2,\), but `shape` says \(3,\)"),
        (lambda: bilevel.positive(torch.tensor([1, 2])), r"positive\(\).*torch.int64.*\.double\(\)"),
        (lambda: bilevel.positive(1.0, shape=-1), r"`shape` is -1"),
        (lambda: bilevel.positive(1.0, shape="3"), r"`shape` is '3'"),  # type: ignore[arg-type]
        (lambda: bilevel.positive(1.0, shape=(2, 0)), r"`shape` is \(2, 0\)"),
        (lambda: bilevel.interval(0.0, 0.0, 1.0), r"strictly between 0.0 and 1.0, got 0"),
        (lambda: bilevel.interval(2.0, 0.0, 1.0), r"strictly between"),
        (lambda: bilevel.interval(NAN, 0.0, 1.0), r"strictly between"),
        (lambda: bilevel.interval(0.5, 1.0, 0.0), r"low < high, got low=1.0, high=0.0"),
        (lambda: bilevel.interval(0.5, 0.0, INF), r"finite.*bilevel.positive"),
        (lambda: bilevel.interval(0.5, "0", 1.0), r"low='0'"),  # type: ignore[arg-type]
        (lambda: bilevel.simplex(1), r"at least 2 weights, got 1"),
        (lambda: bilevel.simplex(2.0), r"simplex\(\).*float"),  # type: ignore[arg-type]
        (lambda: bilevel.simplex(True), r"simplex\(\).*bool"),
        (lambda: bilevel.simplex(torch.tensor([0.5, 0.6])), r"sum to 1, got a sum of 1.1"),
        (lambda: bilevel.simplex(torch.tensor([1.0, 0.0])), r"positive weights"),
        (lambda: bilevel.simplex(torch.tensor([NAN, 0.5])), r"positive weights"),
        (lambda: bilevel.simplex(torch.tensor(1.0)), r"last dimension"),
        (lambda: bilevel.real(NAN), r"real\(\) needs finite values"),
        (lambda: bilevel.real(torch.tensor([1])), r"real\(\).*torch.int64"),
    ],
)
def test_bad_values_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(bilevel.BilevelError, match=message):
        make()


def test_reprs_are_short() -> None:
    shown = [repr(x) for x in (bilevel.positive(1e-3), bilevel.simplex(3), bilevel.interval(0.5, 0, 1))]
    assert shown == ["positive(0.001)", "simplex(shape=(3,))", "interval(0.5)"]
