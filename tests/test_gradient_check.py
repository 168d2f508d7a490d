"""`bilevel.check_gradient`: right gradients pass, wrong ones fail, noise is inconclusive."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from bilevel import inner
from bilevel.solvers.base import Response
from bilevel.testing import known_problems
from bilevel.vector import Vector, scale

GENERATOR = torch.Generator().manual_seed(0)
X, XV = (torch.randn(20, 4, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
Y, YV = (torch.randn(20, generator=GENERATOR, dtype=torch.float64) for _ in range(2))


def start() -> Tensor:
    return torch.zeros(4, dtype=torch.float64)


@pytest.mark.parametrize("known", known_problems(), ids=lambda known: known.name)
def test_right_implicit_gradients_pass(known: Any) -> None:
    found = bilevel.check_gradient(known.problem(), "direct", directions=1)
    assert found.passed and found.conclusive, str(found)
    assert found.cosine == pytest.approx(1.0, abs=1e-6) and found.ratio == pytest.approx(1.0, abs=1e-4)


def typed() -> dict[str, Any]:
    return {
        "lr": bilevel.interval(0.05, 0.0, 0.2),
        "l2": bilevel.positive(0.1, shape=(4,)),
        "mix": bilevel.simplex(3),
        "shift": bilevel.real(0.3),
        "plain": torch.tensor([0.5, 0.2], dtype=torch.float64),
    }


def mixed(w: Tensor, h: Any) -> Tensor:
    groups = ((X @ w - Y - h["shift"]) ** 2)[:18].reshape(3, 6).mean(1)
    total: Tensor = (h["mix"] * groups).sum() + (h["l2"] * w**2).sum() + (h["plain"] * w[:2]).sum()
    return total


@pytest.mark.parametrize("solver", [inner.SGD, inner.Adam])
def test_right_unrolled_gradients_of_typed_hyperparameters_pass(solver: Any) -> None:
    problem = bilevel.BilevelProblem(
        mixed, lambda w, h: ((XV @ w - YV) ** 2).mean(), start(), typed(), solver(lr=lambda h: h["lr"], steps=15)
    )
    found = bilevel.check_gradient(problem, "unroll", directions=4)
    assert found.passed and found.conclusive, str(found)
    assert "passed" in str(found) and len(found.directions) == 4


@pytest.mark.parametrize("own_generator", [True, False])
def test_minibatches_are_the_same_at_every_point(own_generator: bool) -> None:
    generator = torch.Generator().manual_seed(5) if own_generator else None
    loader = DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True, generator=generator)
    problem = bilevel.BilevelProblem(
        lambda w, h, batch: ((batch[0] @ w - batch[1]) ** 2).mean() + h * (w**2).sum(),
        lambda w, h, batch: ((batch[0] @ w - batch[1]) ** 2).mean(),
        start(),
        bilevel.positive(0.1),
        inner.SGD(lr=0.05, steps=11),
        inner_data=loader,
        outer_data=DataLoader(TensorDataset(XV, YV), batch_size=5, shuffle=True),
    )
    random = torch.get_rng_state()
    own = None if generator is None else generator.get_state()
    found = bilevel.check_gradient(problem, "unroll", directions=2)
    assert found.passed and found.conclusive, str(found)
    assert torch.equal(random, torch.get_rng_state())
    assert generator is None or (own is not None and torch.equal(own, generator.get_state()))
    assert problem.position()["inner"]["drawn"] == 0


def test_dropout_is_the_same_at_every_point() -> None:
    problem = bilevel.BilevelProblem(
        lambda w, h: ((torch.dropout(X, 0.5, True) @ w - Y) ** 2).mean() + h * (w**2).sum(),
        lambda w, h: ((torch.dropout(XV, 0.5, True) @ w - YV) ** 2).mean(),
        start(),
        bilevel.positive(0.1),
        inner.SGD(lr=0.05, steps=11),
    )
    random = torch.get_rng_state()
    found = bilevel.check_gradient(problem, "unroll", directions=2)
    assert found.passed and found.conclusive, str(found)
    assert torch.equal(random, torch.get_rng_state())


@dataclass(frozen=True)
class Wrong:
    """The implicit gradient, times a factor."""

    factor: float

    def __call__(
        self, response: Response, lower: Vector, upper: Vector, state: Any = None
    ) -> tuple[bilevel.Hypergradient, Any]:
        found, state = bilevel.Implicit()(response, lower, upper, state)
        return replace(found, gradient=scale(self.factor, found.gradient)), state


@pytest.mark.parametrize(("factor", "passed"), [(1.0, True), (1.001, True), (1.05, False), (-1.0, False), (0.0, False)])
def test_wrong_gradients_fail(factor: float, passed: bool) -> None:
    found = bilevel.check_gradient(known_problems()[0].problem(), Wrong(factor))
    assert found.passed == passed and found.conclusive
    assert found.ratio == pytest.approx(abs(factor), abs=1e-4)
    assert ("FAILED" in str(found)) == (not passed)


def test_noise_is_inconclusive() -> None:
    """Noise that nothing pins: the differences see another outer loss at every call."""
    noise = torch.Generator().manual_seed(0)

    def validate(w: Tensor, h: Tensor) -> Tensor:
        return ((XV @ w - YV) ** 2).mean() + torch.randn((), generator=noise, dtype=torch.float64)

    problem = bilevel.BilevelProblem(
        lambda w, h: ((X @ w - Y) ** 2).mean() + h * (w**2).sum(), validate, start(), bilevel.positive(0.1)
    )
    found = bilevel.check_gradient(problem)
    assert not found.conclusive and "INCONCLUSIVE" in str(found)


def test_float32_passes_within_its_digits() -> None:
    x, y, xv, yv = (t.float() for t in (X, Y, XV, YV))
    problem = bilevel.BilevelProblem(
        lambda w, h: ((x @ w - y) ** 2).mean() + (h * w**2).sum(),
        lambda w, h: ((xv @ w - yv) ** 2).mean(),
        start().float(),
        bilevel.positive(0.1),
    )
    assert bilevel.check_gradient(problem).passed


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="`directions` is 0"):
        bilevel.check_gradient(known_problems()[0].problem(), directions=0)
    with pytest.raises(TypeError, match="`problem`"):
        bilevel.check_gradient(3)  # type: ignore[arg-type]
