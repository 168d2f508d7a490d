"""Where batches come from: nothing, one batch, a dataset, a stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import bilevel

X = torch.arange(12, dtype=torch.float64).reshape(6, 2) / 10
Y = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)


class Stream(IterableDataset[Tensor]):
    """Rows without a length."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(X)


class Named(Dataset[dict[str, Tensor]]):
    """Samples as dicts."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": X[i], "y": Y[i]}


def recorded(inner_data: Any, **more: Any) -> list[Any]:
    """Return the batches that the inner loss is called with in three inner steps."""
    seen: list[Any] = []

    def loss(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        seen.append(batch)
        return ((w - h) ** 2).sum()

    solver = bilevel.inner.SGD(lr=0.1, steps=3)
    problem = bilevel.BilevelProblem(
        loss,
        lambda w, h: w.sum(),
        torch.zeros(1, dtype=torch.float64),
        torch.ones((), dtype=torch.float64),
        solver,
        inner_data,
        **more,
    )
    bilevel.hypergradient(problem, "unroll")
    return seen


@pytest.mark.parametrize("batch", [X, (X, Y), [X, Y], {"x": X, "more": [Y, (X,)]}])
def test_one_batch_comes_as_it_was_given(batch: Any) -> None:
    for seen in recorded(batch):
        assert type(seen) is type(batch)
        torch.testing.assert_close(seen, batch, rtol=0, atol=0)


def test_a_dataset_is_read_whole() -> None:
    for x, y in recorded(TensorDataset(X, Y)):
        assert torch.equal(x, X) and torch.equal(y, Y)
    for batch in recorded(Named()):
        assert torch.equal(batch["x"], X) and torch.equal(batch["y"], Y)


def test_a_dataset_is_deterministic_and_a_loader_is_not() -> None:
    def problem(data: Any) -> bilevel.BilevelProblem:
        w, h = torch.zeros(1, dtype=torch.float64), torch.ones((), dtype=torch.float64)
        return bilevel.BilevelProblem(lambda w, h, b: w.sum(), lambda w, h: w.sum(), w, h, inner_data=data)

    assert problem(TensorDataset(X)).deterministic
    assert problem(X).deterministic
    assert not problem(DataLoader(TensorDataset(X))).deterministic


def test_a_stream_starts_again_when_it_ends() -> None:
    seen = recorded(DataLoader(TensorDataset(X, Y), batch_size=3))
    assert len(seen) >= 3
    firsts = {float(x[0, 0]) for x, _ in seen}
    assert firsts == {0.0, 0.6}


def test_an_iterable_of_any_kind_is_a_stream() -> None:
    seen = recorded(DataLoader(Stream(), batch_size=2))
    assert all(batch.shape == (2, 2) for batch in seen)


def test_strings_in_the_batches_of_a_stream_are_left_alone() -> None:
    class Texts:
        def __iter__(self) -> Iterator[Any]:
            return iter([{"x": X, "text": ["a", "b"]}])

    assert recorded(Texts())[0]["text"] == ["a", "b"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter([X]), r"`inner_data` has no batch left.*DataLoader"),
        (DataLoader(TensorDataset(X[:0])), r"`inner_data`.*(no batch|empty)"),
        (X.numpy(), r"`inner_data` is a ndarray.*torch.from_numpy"),
        (pd.DataFrame({"x": [1.0, 2.0]}), r"`inner_data` is a DataFrame.*torch.tensor\(frame.to_numpy\(\)\)"),
        (pd.Series([1.0, 2.0]), r"`inner_data` is a Series.*to_numpy"),
        ([X.numpy()], r"`inner_data` holds a ndarray.*torch.from_numpy"),
        ((X, None), r"`inner_data` holds a NoneType"),
        ((X, [1.0, 2.0]), r"`inner_data` holds a float"),
        ({}, r"`inner_data` holds a empty structure|`inner_data` is empty"),
        ([], r"`inner_data`.*empty"),
        ("train.csv", r"`inner_data` is a str"),
        (b"x", r"`inner_data` is a bytes"),
        (3, r"`inner_data` is a int"),
        (TensorDataset(X[:0]), r"`inner_data`.*empty"),
        ((X[:0], Y[:0]), r"`inner_data`.*empty"),
        (lambda: X, r"`inner_data` is a function"),
        (np.float64(1.0), r"`inner_data` is a float64"),
        (DataLoader, r"`inner_data` is the class DataLoader"),
        ([(X[:2], Y[:2]), (X[2:], Y[2:])], r"`inner_data` is a list of 2 batches.*write a DataLoader"),
        ([{"x": X[:2]}, {"x": X[2:3]}], r"`inner_data` is a list of 2 batches"),
    ],
)
def test_wrong_data_are_named(data: Any, message: str) -> None:
    with pytest.raises(bilevel.BilevelError, match=message):
        recorded(data)


def test_outer_data_are_named_too() -> None:
    with pytest.raises(bilevel.BilevelError, match=r"`outer_data` is a str"):
        recorded(X, outer_data="valid.csv")


def test_a_position_before_the_first_batch_keeps_the_generator_of_the_loader() -> None:
    generator = torch.Generator().manual_seed(3)
    loader: Any = DataLoader(X, batch_size=2, shuffle=True, generator=generator)  # type: ignore[arg-type]
    problem = bilevel.BilevelProblem(
        lambda w, h, batch: w.sum(), lambda w, h: w.sum(), torch.zeros(1), torch.ones(1), inner_data=loader
    )
    before, position = generator.get_state(), problem.position()
    first = problem.inner_batches.draw()
    problem.go_to(position)
    assert torch.equal(before, generator.get_state())
    assert torch.equal(first, problem.inner_batches.draw())


@pytest.mark.parametrize("drawn", [1, 3, 4, 5])
def test_a_position_in_a_pass_is_found_again_without_reading_what_is_passed(drawn: int) -> None:
    class Counted(Named):
        reads = 0

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            Counted.reads += 1
            return super().__getitem__(i)

    loader: Any = DataLoader(Counted(), batch_size=2, shuffle=True)
    problem = bilevel.BilevelProblem(
        lambda w, h, batch: w.sum(), lambda w, h: w.sum(), torch.zeros(1), torch.ones(1), inner_data=loader
    )
    batches = problem.inner_batches
    for _ in range(drawn):
        batches.draw()
    position, random = batches.position(), torch.get_rng_state()
    expected = [batches.draw()["x"] for _ in range(4)]
    after = torch.get_rng_state()
    Counted.reads = 0
    torch.manual_seed(7)
    before = torch.get_rng_state()
    batches.go_to(position)
    assert Counted.reads == 0
    assert torch.equal(torch.get_rng_state(), before), "the global random state stays as it is"
    torch.set_rng_state(random)
    for x in expected:
        assert torch.equal(batches.draw()["x"], x)
    assert torch.equal(torch.get_rng_state(), after)
