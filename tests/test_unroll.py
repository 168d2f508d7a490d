"""Unrolling within a budget: the same gradient, steps taken again as they were, and no more memory than asked.

The truth is the unroll that holds every graph, whose own truth is in test_estimators.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from math import ceil
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import bilevel
from bilevel import Truncated, Unroll, hypergradient, inner
from bilevel.certificate import Hypergradient
from bilevel.evaluation import Evaluator
from bilevel.measure import peak_memory
from bilevel.memory import parsed
from bilevel.solvers import unroll
from bilevel.solvers.schedule import Schedule, advances, fitting

CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(0)
X, XV = (torch.randn(40, 8, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
Y, YV = (torch.randn(40, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
T = 30


# The schedule, as integers


@cache
def fewest(blocks: int, snapshots: int) -> int:
    """Return the fewest advances, by trying every place of the next snapshot."""
    if blocks == 1:
        return 0
    if snapshots == 1:
        return blocks * (blocks - 1) // 2
    return min(m + fewest(m, snapshots) + fewest(blocks - m, snapshots - 1) for m in range(1, blocks))


def test_the_binomial_schedule_is_the_best_there_is() -> None:
    for blocks in range(1, 60):
        for snapshots in range(1, 8):
            assert advances(blocks, snapshots) == fewest(blocks, snapshots)
            assert Schedule(blocks, 1, snapshots - 1).again == fewest(blocks, snapshots)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 19, 20, 50])
@pytest.mark.parametrize("slots", [0, 1, 2, 5, 40])
def test_every_step_is_reversed_once_and_in_order(block: int, slots: int) -> None:
    total = 50
    plan = Schedule(total, block, slots)
    at, end, most, held = 0, total, 0, list[int]()
    for action, t in plan.actions():
        if action == "hold":
            assert t == at
            held.append(t)
        elif action == "return":
            assert t == held[-1]
        elif action == "advance":
            assert t > at
        else:
            assert t == end and 0 < t - at <= block
            end = at
            if held[-1] == end:
                held.pop()
        at, most = t, max(most, len(held))
    assert end == 0 and not held
    assert most <= slots + 1  # the start of the loop is held besides
    if slots >= plan.blocks - 2:
        assert plan.again == total - block if plan.blocks > 1 else plan.again == 0


@pytest.mark.parametrize("state", [1, 5, 20])
def test_the_schedule_that_fits_is_close_to_the_best(state: int) -> None:
    total, graph = 90, 20
    for room in range(graph + state, total * graph, 37):
        found = fitting(total, room, graph, state)
        assert found is not None and found.block * graph + found.slots * state <= room
        every = []
        for block in range(1, min(total, room // graph) + 1):
            slots = min(max(0, ceil(total / block) - 2), (room - block * graph) // state)
            if slots or block * 2 >= total:
                every.append(Schedule(total, block, slots).again)
        # Not every length of block is tried.
        assert found.again + total <= 1.04 * (min(every) + total)


# The same gradient, whatever is held


class Noisy(nn.Module):
    """Dropout and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6).double(), nn.Linear(6, 1).double()
        self.norm, self.drop = nn.BatchNorm1d(6).double(), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(self.norm(torch.tanh(self.first(x)))))[:, 0]  # type: ignore[no-any-return]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6).double(), nn.Linear(6, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))[:, 0]  # type: ignore[no-any-return]


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


# What is held


def network(solver: Any, data: Any = None) -> bilevel.BilevelProblem:
    """Return a 784-256-10 network in small: 32-24-5, float32."""
    torch.manual_seed(1)
    x, xv = torch.randn(64, 32), torch.randn(50, 32)
    y, yv = torch.randint(0, 5, (64,)), torch.randint(0, 5, (50,))
    module = nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 5))
    decay: Any = lambda m, h: h * sum((p**2).sum() for p in m.parameters())  # noqa: E731
    if data is None:
        return bilevel.BilevelProblem(
            lambda m, h: F.cross_entropy(m(x), y) + decay(m, h),
            lambda m, h: F.cross_entropy(m(xv), yv),
            module,
            bilevel.positive(1e-3),
            solver,
        )
    return bilevel.BilevelProblem(
        lambda m, h, batch: F.cross_entropy(m(batch[0]), batch[1]) + decay(m, h),
        lambda m, h: F.cross_entropy(m(xv), yv),
        module,
        bilevel.positive(1e-3),
        solver,
        DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True),
    )


def peak(problem: bilevel.BilevelProblem, method: Any) -> tuple[int, Hypergradient]:
    with peak_memory(CPU) as measured:
        found = hypergradient(problem, method, on_untrusted="ignore")
    return measured.bytes, found


SOLVERS: dict[str, Any] = {
    "sgd": lambda steps: inner.SGD(lr=0.1, steps=steps),
    "momentum": lambda steps: inner.SGD(lr=0.1, momentum=0.9, steps=steps),
    "adam": lambda steps: inner.Adam(lr=0.01, steps=steps),
}


@pytest.mark.parametrize(("name", "data"), [("sgd", None), ("sgd", "batches"), ("momentum", None), ("adam", "batches")])
def test_the_peak_keeps_to_the_budget(name: str, data: Any) -> None:
    steps = 60
    problem = network(SOLVERS[name](steps), data)
    every = Unroll(memory="1GB")
    most, whole = peak(problem, every)
    assert "all 60 steps" in whole.certificate.notes[0]
    for part in (2, 6, 14):
        taken, found = peak(problem, Unroll(memory=most // part))
        # Measured: 0.8 to 1.1. What a loss takes on its way and frees again is estimated by one graph.
        assert taken <= 1.25 * (most // part), (part, found.certificate.notes)
        predicted = re.search(r"([\d.]+) (.)B predicted of", found.certificate.notes[0])
        assert predicted is not None
        bytes_predicted = float(predicted[1]) * {"k": 1e3, "M": 1e6}[predicted[2]]
        assert 0.75 * taken <= bytes_predicted <= 1.5 * taken


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_memory_within_a_budget_does_not_grow_with_the_steps(name: str) -> None:
    budget = peak(network(SOLVERS[name](30)), Unroll(memory="1GB"))[0] // 5
    taken = {steps: peak(network(SOLVERS[name](steps)), Unroll(memory=budget))[0] for steps in (30, 150)}
    assert max(taken.values()) <= 1.25 * budget
    assert taken[150] <= 1.1 * max(taken[30], 0.95 * budget)


@pytest.mark.parametrize("window", [5, 20])
def test_a_truncated_sweep_holds_its_window(window: int) -> None:
    """And up to eight steps that it looks at: its memory does not depend on the length of the loop."""
    taken = {steps: peak(network(SOLVERS["momentum"](steps)), Truncated(steps=window))[0] for steps in (50, 500)}
    assert taken[500] <= 1.05 * taken[50]
    assert taken[500] < peak(network(SOLVERS["momentum"](50)), "unroll")[0]


def test_by_default_half_of_the_free_memory_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = network(SOLVERS["adam"](40))
    most, whole = peak(problem, "unroll")
    assert not whole.certificate.notes  # nothing to tell
    for free in (most, most // 4):
        monkeypatch.setattr(unroll, "free_memory", lambda device, free=free: free)
        taken, found = peak(problem, "unroll")
        assert taken <= 1.1 * (free / 2)
        assert torch.equal(found.gradient, whole.gradient)
        assert "taken again" in found.certificate.notes[0]
    monkeypatch.setattr(unroll, "free_memory", lambda device: 1000)
    with pytest.raises(bilevel.InvalidValueError, match=r"half of the free memory.*expected .* at least"):
        hypergradient(problem, "unroll")
    monkeypatch.setattr(unroll, "free_memory", lambda device: None)
    assert peak(problem, "unroll")[1].cost == whole.cost


def test_the_least_budget_is_named_and_enough() -> None:
    problem = network(SOLVERS["momentum"](60))
    with pytest.raises(
        bilevel.InvalidValueError, match=r"`memory` is '1 kB'.*60 steps, expected .* at least"
    ) as caught:
        hypergradient(problem, Unroll(memory="1 kB"))
    named = re.search(r"Unroll\(memory=(\d+)\)", str(caught.value))
    assert named is not None
    least = int(named[1])
    taken, found = peak(problem, Unroll(memory=least))
    assert taken <= 1.25 * least
    assert torch.equal(found.gradient, hypergradient(problem, "unroll").gradient)
    with pytest.raises(bilevel.InvalidValueError, match="expected"):
        hypergradient(problem, Unroll(memory=least - 1))


def test_a_large_outer_loss_is_part_of_the_budget() -> None:
    outer = torch.randn(2000, 8, dtype=torch.float64)
    torch.manual_seed(1)
    problem = bilevel.BilevelProblem(
        lambda m, h: ((m(X) - Y) ** 2).mean() + h * sum((p**2).sum() for p in m.parameters()),
        lambda m, h: m(outer).square().mean(),
        Plain(),
        bilevel.positive(0.01),
        inner.SGD(lr=0.1, steps=200),
    )
    budget = 600_000
    assert peak(problem, Unroll(memory=budget))[0] <= 1.25 * budget
    with pytest.raises(bilevel.InvalidValueError, match="for derivatives"):
        hypergradient(problem, Unroll(memory=100_000))


def test_loops_of_one_and_two_steps_are_held_whole() -> None:
    for steps in (1, 2):
        problem = network(SOLVERS["sgd"](steps))
        found = hypergradient(problem, Unroll(memory=1))
        assert torch.equal(found.gradient, hypergradient(problem, "unroll").gradient)


@pytest.mark.parametrize(
    ("memory", "error", "message"),
    [
        ("lots", ValueError, r"`memory` is 'lots', expected a number and one of B, kB, MB"),
        ("5 apples", ValueError, r"`memory` is '5 apples', expected a number and one of"),
        (0, ValueError, r"`memory` is 0, expected more than nothing"),
        (-5, ValueError, r"`memory` is -5, expected more"),
        (0.5, TypeError, r'`memory` is 0.5, expected an amount such as "500MB"'),
        (True, TypeError, r"`memory` is True, expected an amount"),
    ],
)
def test_a_wrong_budget_is_named(memory: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        Unroll(memory=memory)
    assert isinstance(caught.value, bilevel.BilevelError)


def test_amounts() -> None:
    assert [parsed(a, "memory") for a in ("500MB", "2 gib", "1.5kB", "12B", "12", 12)] == [
        500_000_000,
        2 * 1024**3,
        1500,
        12,
        12,
        12,
    ]
    assert Unroll(memory="500MB") == Unroll(memory="500MB") != Unroll()


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
