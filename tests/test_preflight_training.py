"""`bilevel.check`: the inner solver, its memory, and the data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from bilevel import inner
from bilevel.measure import free_memory
from bilevel.preflight import training
from problems_preflight import METHODS, XV, YV, X, Y, findings, network, only, problem_of, train

# The inner solver


def test_an_inner_solver_that_does_not_fit_is_an_error() -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=4)

    def loss(w: Tensor, h: Tensor, batch: list[Tensor]) -> Tensor:
        return ((batch[0] @ w - batch[1]) ** 2).mean() + h * (w**2).sum()

    found = only(problem_of(loss, inner_data=loader))
    assert (found.level, found.subject) == ("error", "inner_solver") and "inner.Adam" in found.remedy
    found = only(problem_of(), "unroll")
    assert (found.level, found.subject) == ("error", "inner_solver") and "inner.SGD" in found.remedy


@pytest.mark.parametrize("decay", [0.1, lambda h: h], ids=["number", "function"])
@pytest.mark.parametrize("solver", [inner.AdamW, inner.Adam, inner.SGD])
def test_a_decay_outside_of_the_loss_is_an_error(solver: Any, decay: Any) -> None:
    problem = problem_of(inner_solver=solver(lr=0.05, weight_decay=decay, steps=5))
    found = only(problem, "cg")
    assert (found.level, found.subject) == ("error", "inner_solver")
    assert "weight_decay" in found.message and "`inner_loss`" in found.remedy and "unroll" in found.remedy
    assert not findings(problem, "unroll")


@pytest.mark.parametrize("method", METHODS)
def test_settings_that_return_wrong_things_are_errors(method: str) -> None:
    solver = inner.SGD(lr=lambda h: h["lr"], steps=5)
    problem = problem_of(
        lambda w, h: train(w, h["l2"]),
        hparams={"lr": bilevel.positive(0.1, shape=(5,)), "l2": bilevel.positive(0.1)},
        inner_solver=solver,
    )
    found = [f for f in findings(problem, method, "error") if f.subject == "inner_solver"]
    assert len(found) == 1 and "`lr` returned" in found[0].message
    solver = inner.SGD(lr=lambda h: h["rate"], steps=5)
    found = [f for f in findings(problem_of(inner_solver=solver), method, "error") if f.subject == "inner_solver"]
    assert len(found) == 1 and "`lr` has no entry for step 0" in found[0].message


def test_a_loop_that_diverges_is_a_warning() -> None:
    for lr, levels in ((0.05, []), (10.0, ["warning"])):
        found = findings(problem_of(inner_solver=inner.SGD(lr=lr, steps=100)), "unroll")
        assert [f.level for f in found] == levels
    assert "lower the learning rate" in found[0].remedy
    assert not findings(problem_of(inner_solver=inner.Adam(lr=1e-3, steps=1000)), "unroll")
    stretching = network(nn.Tanh())  # by Adam's normalization alone, while the loss falls
    stretching.inner_solver = inner.Adam(lr=1e-3, steps=1000)
    assert not findings(stretching, "unroll", "error", "warning")
    found = findings(problem_of(inner_solver=inner.SGD(lr=1e200, steps=100)), "unroll")
    assert [(f.level, f.subject) for f in found] == [("error", "inner_solver")] and "after step" in found[0].message


def test_a_graph_that_does_not_fit_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(inner_solver=inner.SGD(lr=0.1, steps=1000))
    method = bilevel.Truncated(steps=1000)
    megabytes = bilevel.check(problem, method).costs.megabytes
    assert megabytes is not None
    monkeypatch.setattr(training, "free_memory", lambda device: int(1.9e6 * megabytes))
    found = only(problem, method)
    assert (found.level, found.subject) == ("warning", "method") and "Truncated(steps=9" in found.remedy
    assert not findings(problem, "truncated")
    assert not findings(problem, "implicit")
    monkeypatch.setattr(training, "free_memory", lambda device: int(2.1e6 * megabytes))
    assert not findings(problem, method)


def test_steps_that_unrolling_takes_again_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(inner_solver=inner.SGD(lr=0.1, steps=1000))
    whole = bilevel.check(problem, "unroll").costs
    assert whole.megabytes is not None and whole.gradients == 1000
    monkeypatch.setattr(training, "free_memory", lambda device: int(1e6 * whole.megabytes))
    found = only(problem, "unroll")
    assert (found.level, found.subject) == ("note", "method") and "inner steps are taken again" in found.message
    costs = bilevel.check(problem, "unroll").costs
    assert costs.megabytes is not None and costs.megabytes <= whole.megabytes / 2
    assert costs.gradients is not None and 1400 < costs.gradients < 2000 and costs.products == 1000
    report = bilevel.check(problem, bilevel.Unroll(memory=1000))
    assert not report.ok and "expected" in str(report) and "at least" in str(report)


def test_memory_that_all_steps_share_counts_once() -> None:
    """Every step's graph holds the same data; ten thousand rows of it are no reason to fear a hundred steps."""
    data = torch.ones(10_000, 4, dtype=torch.float64)
    problem = problem_of(lambda w, h: ((data @ w) ** 2).mean() + h * (w**2).sum(), inner_solver=inner.SGD(0.1, steps=1))
    first = bilevel.check(problem, "unroll").costs.megabytes
    problem.inner_solver = inner.SGD(lr=0.1, steps=100)
    hundred = bilevel.check(problem, "unroll").costs.megabytes
    assert first is not None and hundred is not None
    assert first > data.nbytes / 1e6  # data and the vectors of its length
    assert hundred < 100 * data.nbytes / 1e6


def test_free_memory_is_known_here() -> None:
    free = free_memory(torch.device("cpu"))
    assert free is None or free > 1e6
    assert free_memory(torch.device("meta")) is None


# Data


def losses_of_batches() -> tuple[Any, Any]:
    def loss(w: Tensor, h: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return ((batch[0] @ w - batch[1]) ** 2).mean()

    return lambda w, h, batch: loss(w, h, batch) + (h * w**2).sum(), loss


@pytest.mark.parametrize("shared", ["tuple", "tensor", "dataset", "loader"])
def test_training_data_as_validation_data_are_a_warning(shared: str) -> None:
    batch, dataset = (X, Y), TensorDataset(X, Y)
    pairs: dict[str, Any] = {
        "tuple": (batch, batch),
        "tensor": ((X, Y), (X, YV)),
        "dataset": (dataset, DataLoader(dataset, batch_size=20)),
        "loader": (batch, DataLoader(dataset, batch_size=20)),
    }
    inner_data, outer_data = pairs[shared]
    found = only(problem_of(*losses_of_batches(), inner_data=inner_data, outer_data=outer_data))
    assert (found.level, found.subject) == ("warning", "outer_data") and "validation data" in found.remedy
    assert not findings(problem_of(*losses_of_batches(), inner_data=(X, Y), outer_data=(XV, YV)))


@pytest.mark.parametrize("kind", ["batch", "loader"])
def test_more_hyperparameters_than_outer_examples_are_a_note(kind: str) -> None:
    data: Any = (XV[:3], YV[:3]) if kind == "batch" else DataLoader(TensorDataset(XV[:3], YV[:3]), batch_size=3)
    problem = problem_of(
        *losses_of_batches(), hparams=bilevel.positive(0.1, shape=(4,)), inner_data=(X, Y), outer_data=data
    )
    found = only(problem)
    assert (found.level, found.subject) == ("note", "hparams") and "4 hyperparameters and 3" in found.message


def test_data_that_cannot_start_again_are_a_warning() -> None:
    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield X, Y

    solver = inner.SGD(lr=0.05, steps=5)
    problem = problem_of(*losses_of_batches(), inner_solver=solver, inner_data=endless(), outer_data=(XV, YV))
    assert (only(problem).level, only(problem).subject) == ("warning", "inner_data")
    exhausted: Iterator[Any] = iter([])
    problem = problem_of(*losses_of_batches(), inner_solver=solver, inner_data=exhausted, outer_data=(XV, YV))
    assert [f.subject for f in findings(problem, "implicit", "error")] == ["problem"]
