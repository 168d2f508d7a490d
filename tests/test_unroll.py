"""Unrolling within a budget: the same gradient, and steps taken again as they were.

The truth is the unroll that holds every graph, whose own truth is in test_unroll_recursion.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import bilevel
from bilevel import Truncated, Unroll, hypergradient, inner
from bilevel.certificate import Hypergradient
from bilevel.evaluation import Evaluator
from bilevel.solvers import unroll
from bilevel.solvers.schedule import Schedule
from problems_unroll import XV, YV, Plain, X, Y

T = 30


# The same gradient, whatever is held


class Noisy(nn.Module):
    """Dropout and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6).double(), nn.Linear(6, 1).double()
        self.norm, self.drop = nn.BatchNorm1d(6).double(), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(self.norm(torch.tanh(self.first(x)))))[:, 0]  # type: ignore[no-any-return]


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Rows with fresh noise at every reading."""

    def __init__(self, own: Any = None) -> None:
        self.own = own

    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(8, dtype=torch.float64) if self.own is None else torch.from_numpy(self.own(8))
        return X[i] + 0.3 * noise, Y[i]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(list(zip(X, Y, strict=True)))


def loader(**more: Any) -> Any:
    return DataLoader(TensorDataset(X, Y), batch_size=8, **more)


DATA: dict[str, Any] = {
    "one batch": lambda: (X, Y),
    "in order": loader,
    "shuffled": lambda: loader(shuffle=True),
    "shuffled by its own generator": lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(3)),
    "augmented": lambda: DataLoader(Augmented(), batch_size=8, shuffle=True),
    "a stream": lambda: DataLoader(Stream(), batch_size=16),
    "an iterable": lambda: type("Own", (), {"__iter__": lambda self: iter([(X[:20], Y[:20]), (X[20:], Y[20:])])})(),
}
OPTIMIZERS: dict[str, Any] = {
    "sgd": inner.SGD(lr=lambda h, t: h["lr"][t], steps=T),
    "momentum": inner.SGD(lr=lambda h, t: h["lr"][t], momentum=0.8, steps=T),
    "adam": inner.Adam(lr=lambda h, t: h["lr"][t], steps=T),
    "rmsprop": inner.RMSProp(lr=lambda h, t: h["lr"][t], momentum=0.5, centered=True, steps=T),
    "proximal": inner.ProximalGradient(bilevel.prox.L1(1e-3), lr=lambda h, t: h["lr"][t], steps=T),
}


def problem_of(module: type[nn.Module], solver: Any, data: Any) -> bilevel.BilevelProblem:
    torch.manual_seed(1)
    return bilevel.BilevelProblem(
        lambda m, h, batch: (
            ((m(batch[0]) - batch[1]) ** 2).mean() + h["l2"] * sum((p**2).sum() for p in m.parameters())
        ),
        lambda m, h: ((m(XV) - YV) ** 2).mean(),
        module(),
        {"l2": bilevel.positive(0.01), "lr": bilevel.positive(0.02, shape=(T,))},
        solver,
        data(),
    )


class Planned(Unroll):
    """Unroll by a schedule that is given."""

    def __init__(self, block: int, slots: int) -> None:
        super().__init__("1GB")
        object.__setattr__(self, "given", (block, slots))

    def _plan(self, steps: int, sizes: Any) -> Schedule:
        return Schedule(steps, *self.given)  # type: ignore[attr-defined]


def take(problem: bilevel.BilevelProblem, method: Any) -> tuple[Hypergradient, Any]:
    """Return a hypergradient, and what the next one would draw."""
    problem.restart()
    own = getattr(problem.inner_data, "generator", None)
    if own is not None:
        own.manual_seed(3)
    torch.manual_seed(5)
    found = Evaluator(problem, method)(problem.hparams.layout.start).hypergradient
    after = [torch.rand(3), problem.inner_batches.draw()[0], *problem.params.buffers().values()]
    return found, after


# Every graph; two blocks; blocks of their own; single steps; iterates alone; few iterates, so that steps are taken
# often; none but the start.
PLANS = [(T, 0), (15, 0), (7, 3), (4, 1), (1, T - 2), (1, 3), (5, 0)]


def check_the_same(problem: bilevel.BilevelProblem, plans: list[tuple[int, int]]) -> None:
    whole, after = take(problem, Unroll())
    assert not whole.certificate.notes
    for block, slots in plans:
        plan = Schedule(T, block, slots)
        found, left = take(problem, Planned(block, slots))
        for name, g in whole.gradient.items():
            assert torch.equal(found.gradient[name], g), (name, block, slots)
        for name, w in whole.params.items():
            assert torch.equal(found.params[name], w)
        assert found.outer_loss == whole.outer_loss
        assert (found.certificate.verdict, found.certificate.error) == (
            whole.certificate.verdict,
            whole.certificate.error,
        )
        assert found.cost.products == whole.cost.products
        again = 0 if plan.blocks == 1 else plan.again + unroll.MEASURED
        assert found.cost.gradients == whole.cost.gradients + again
        for a, b in zip(after, left, strict=True):
            assert torch.equal(a, b), "the next hypergradient would see something else"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_gradient_is_the_same_to_the_last_bit(name: str) -> None:
    check_the_same(problem_of(Plain, OPTIMIZERS[name], DATA["one batch"]), PLANS)


@pytest.mark.parametrize("name", DATA)
def test_steps_are_taken_again_with_the_same_batches_masks_and_buffers(name: str) -> None:
    check_the_same(problem_of(Noisy, OPTIMIZERS["momentum"], DATA[name]), [(7, 3), (1, 3), (1, T - 2)])


def test_dropout_and_running_statistics_with_adam() -> None:
    check_the_same(problem_of(Noisy, OPTIMIZERS["adam"], DATA["shuffled"]), PLANS)


def test_an_iterator_that_cannot_go_back_needs_every_graph() -> None:
    def batches() -> Any:
        return (pair for pair in [(X, Y)] * (2 * T))

    problem = problem_of(Plain, OPTIMIZERS["sgd"], batches)
    hypergradient(problem, Unroll(memory="1GB"))
    with pytest.raises(bilevel.InvalidValueError, match=r"`inner_data` is an iterator that cannot go back.*DataLoader"):
        hypergradient(problem, Planned(4, 3))


def test_random_numbers_that_are_not_torchs_are_found_out() -> None:
    numpys = np.random.default_rng(0)
    own = DataLoader(Augmented(numpys.standard_normal), batch_size=8, shuffle=True)
    problem = problem_of(Plain, OPTIMIZERS["sgd"], lambda: own)
    assert take(problem, Unroll())[0].certificate.verdict == "exact"
    for plan in PLANS[1:]:
        certificate = take(problem, Planned(*plan))[0].certificate
        assert certificate.verdict == "untrusted" and certificate.error is None, plan
        assert "taken again came out otherwise" in certificate.reasons[0] and "NumPy" in certificate.reasons[0]


# Loops that amplify rounding


def logistic_map(r: float, steps: int = 200, dtype: torch.dtype = torch.float64) -> bilevel.BilevelProblem:
    """Steps of 1 along the gradient of this loss are w <- r w (1 - w): a cycle of two at 3.2, chaos at 3.9."""
    return bilevel.BilevelProblem(
        lambda w, h: w**2 / 2 - h * (w**2 / 2 - w**3 / 3),
        lambda w, h: (w - 0.3) ** 2,
        torch.tensor(0.4, dtype=dtype),
        bilevel.real(torch.tensor(r, dtype=dtype)),
        inner.SGD(lr=1.0, steps=steps),
    )


@pytest.mark.parametrize("method", ["unroll", "forward", Truncated(steps=1000)])
def test_a_loop_that_amplifies_rounding_is_untrusted(method: Any) -> None:
    calm = hypergradient(logistic_map(3.2), method).certificate
    assert calm.verdict == "exact" and calm.error is not None and calm.error <= 1e-13
    chaos = hypergradient(logistic_map(3.9), method, on_untrusted="ignore")
    assert chaos.certificate.verdict == "untrusted" and "lower the inner learning rate" in chaos.certificate.reasons[0]
    # A change of the last digit is a change of everything.
    beside = hypergradient(logistic_map(3.9 * (1.0 + 1e-15)), method, on_untrusted="ignore")
    assert abs(float(beside.gradient / chaos.gradient) - 1.0) > 0.1


@pytest.mark.parametrize("method", ["unroll", "forward"])
def test_rounding_is_that_of_the_dtype(method: str) -> None:
    """28 chaotic steps grow by about 1e5: nothing to float64, everything to float32."""
    truth = hypergradient(logistic_map(3.9, 28), method)
    assert truth.certificate.verdict == "exact"
    single = hypergradient(logistic_map(3.9, 28, torch.float32), method, on_untrusted="ignore")
    assert abs(float(single.gradient) / float(truth.gradient) - 1.0) > 1e-2
    assert single.certificate.verdict == "untrusted"
    half = hypergradient(logistic_map(2.5, 20, torch.bfloat16), method)  # converges
    assert half.certificate.verdict == "approximate"
    assert half.certificate.error is not None and half.certificate.error >= torch.finfo(torch.bfloat16).eps


def test_steps_that_a_window_foretells_with_the_wrong_sign() -> None:
    """w starts far away, so that the steps left out pull the other way: the whole is smaller than either part."""
    bend = torch.tensor([0.03, 0.59, 0.33], dtype=torch.float64)
    pull = torch.tensor([1.17, 0.88, -0.33], dtype=torch.float64)
    target = torch.tensor([0.02, -0.8, -1.12], dtype=torch.float64)
    problem = bilevel.BilevelProblem(
        lambda w, h: (bend * w**2).sum() / 2 - pull @ w + h * (w**2).sum() / 2,
        lambda w, h: ((w - target) ** 2).sum() / 2,
        torch.tensor([-2.07, -0.43, -0.28], dtype=torch.float64),
        bilevel.positive(0.032),
        inner.SGD(lr=0.21, steps=19),
    )
    whole, window = (hypergradient(problem, m, on_untrusted="ignore") for m in (Unroll(), Truncated(steps=10)))
    error = abs(float(window.gradient / whole.gradient) - 1.0)
    assert error > 0.5 and window.certificate.verdict == "untrusted"
    assert window.certificate.error == pytest.approx(error, rel=0.1)
