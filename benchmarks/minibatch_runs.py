"""Hyper-cleaning on minibatches by SOBA and SABA, ours and written by hand.

Both write Adam's steps on the outer level, and both measure the largest inner curvature for their inner step. The
hand-written ones take one step of every variable on each minibatch (Dagréou and others, NeurIPS 2022, algorithms 1
and 2); ours are the default settings, ten inner steps for each outer one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.utils.data import DataLoader

import bilevel
from benchmarks.runs import Note, Run
from benchmarks.workloads import CLEANING_STRENGTH, Workload

BATCH = 100
Batch = tuple[Tensor, Tensor, Tensor]  # images, labels, numbers of the examples

# Name -> the contender of `benchmarks.contenders` whose library it needs.
MINIBATCH_RUNS = {
    "bilevel, SOBA": "bilevel",
    "bilevel, SOBA(steps=1, warmup=1)": "bilevel",
    "hand-written SOBA": "hand-written",
    "bilevel, SABA": "bilevel",
    "bilevel, SABA(steps=1, warmup=1)": "bilevel",
    "hand-written SABA": "hand-written",
}


def prepare_minibatch_run(name: str, workload: Workload) -> Run:
    """Load one contender."""
    train = tuple(torch.from_numpy(a) for a in workload.train)
    valid = tuple(torch.from_numpy(a) for a in workload.valid)
    data = (*train, torch.arange(len(train[1]))), valid
    h, w = torch.from_numpy(workload.hparams), workload.torch_params()[0]
    runs: dict[str, Callable[..., str]] = {
        "bilevel, SOBA": partial(_bilevel, bilevel.SOBA()),
        "bilevel, SOBA(steps=1, warmup=1)": partial(_bilevel, bilevel.SOBA(steps=1, warmup=1)),
        "bilevel, SABA": partial(_bilevel, bilevel.SABA(batch_size=BATCH)),
        "bilevel, SABA(steps=1, warmup=1)": partial(_bilevel, bilevel.SABA(batch_size=BATCH, steps=1, warmup=1)),
        "hand-written SOBA": partial(_by_hand, False),
        "hand-written SABA": partial(_by_hand, True),
    }
    run = partial(runs[name], data, w, h)
    with suppress(_WarmError):  # imports and first calls, off the clock
        run(_stop, 0.1)
    return run


class _WarmError(Exception):
    """Ends the first run after its first step."""


def _stop(h: Any, loss: float) -> None:
    raise _WarmError


def inner_loss(w: Tensor, h: Tensor, batch: Batch) -> Tensor:
    """Return the weighted loss of some examples, with the whole penalty."""
    X, y, which = batch
    each = cross_entropy(linear(X, w), y, reduction="none")
    return (h[which].sigmoid() * each).mean() + CLEANING_STRENGTH * (w**2).sum()


def outer_loss(w: Tensor, h: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss of clean examples."""
    return cross_entropy(linear(batch[0], w), batch[1])


def _blocks(part: tuple[Tensor, ...]) -> list[Any]:
    """Cut a data set into blocks of examples."""
    return [tuple(a[i : i + BATCH] for a in part) for i in range(0, len(part[1]), BATCH)]


def _loader(part: tuple[Tensor, ...]) -> DataLoader[Any]:
    """Return the blocks in random order."""
    blocks: Any = _blocks(part)
    return DataLoader(blocks, batch_size=None, shuffle=True)


def _bilevel(method: Any, data: Any, w: Tensor, h: Tensor, note: Note, rate: float) -> str:
    last: list[Tensor] = []

    def watched(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        last[:] = [h.detach()]
        return outer_loss(w, h, batch)

    inner_data, outer_data = data if isinstance(method, bilevel.SABA) else (_loader(data[0]), _loader(data[1]))
    problem = bilevel.BilevelProblem(inner_loss, watched, w, h, inner_data=inner_data, outer_data=outer_data)
    return bilevel.solve(
        problem,
        method,
        steps=1_000_000,
        tol=0.0,
        outer_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=rate),
        seed=0,
        callbacks=[lambda record: note(last[0].numpy(), math.nan)],
        on_untrusted="ignore",
        progress=False,
    ).status


def _by_hand(reduced: bool, data: Any, w: Tensor, h: Tensor, note: Note, rate: float) -> str:
    """Move w, v and h at once, on one minibatch of each data set after the other."""
    torch.manual_seed(0)
    w, h = w.clone().requires_grad_(), h.clone().requires_grad_()
    v = torch.zeros_like(w)
    optimizer = torch.optim.Adam([h], lr=rate)
    largest = _largest_curvature(w, h, data[0])
    memory: dict[Any, Any] = {}
    for t, (i, inner_batch, j, outer_batch) in enumerate(_draws(data)):
        step = 1.0 / (3.0 * largest) if reduced else 1.0 / (largest * math.sqrt(1.0 + t / 500.0))
        residual = torch.autograd.grad(inner_loss(w, h, inner_batch), w, create_graph=True)[0]
        product, through = torch.autograd.grad(residual, (w, h), v)
        rhs = torch.autograd.grad(outer_loss(w, h, outer_batch), w)[0]
        found = {"residual": residual.detach(), "product": product, "through": through}
        if reduced:
            found = {name: _saga(memory, name, i, value, len(data[0][1])) for name, value in found.items()}
            rhs = _saga(memory, "rhs", j, rhs, len(data[1][1]))
        with torch.no_grad():
            w -= step * found["residual"]
            v = v - step * (found["product"] - rhs)
        h.grad = -found["through"]
        optimizer.step()
        note(h.detach().numpy(), math.nan)
    raise AssertionError("draws never end")


def _draws(data: Any) -> Iterator[tuple[int, Any, int, Any]]:
    """Yield random blocks of both data sets, with their numbers."""
    blocks = [_blocks(part) for part in data]
    while True:
        i, j = (int(torch.randint(len(part), ())) for part in blocks)
        yield i, blocks[0][i], j, blocks[1][j]


def _saga(memory: dict[Any, Any], name: str, i: int, value: Tensor, rows: int) -> Tensor:
    """Return value - its last value for this block + the mean of all blocks' last values; zeros before the first."""
    count = math.ceil(rows / BATCH)
    if name not in memory:
        memory[name] = value.new_zeros((count, *value.shape)), torch.zeros_like(value)
    held, mean = memory[name]
    change = value - held[i]
    found = change + mean
    held[i] = value
    mean += change / count
    return found


def _largest_curvature(w: Tensor, h: Tensor, data: Batch) -> float:
    """Return it for the first block, by 20 power iterations."""
    batch: Any = tuple(a[:BATCH] for a in data)
    residual = torch.autograd.grad(inner_loss(w, h, batch), w, create_graph=True)[0]
    v, size = torch.randn_like(w), 1.0
    for _ in range(20):
        v = torch.autograd.grad(residual, w, v / v.norm(), retain_graph=True)[0]
        size = float(v.norm())
    return size
