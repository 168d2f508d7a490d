"""Memory and time of unrolled hypergradients, with a budget and without.

    python -m benchmarks unrolling

The learning rate of a 784-256-10 network is tuned, trained by T steps on minibatches of 64 digits, float32. Peak: what
tensors take at once beyond what was there before, watched operation by operation in a run of its own; time in another.
The reference is the same method with a budget that all graphs fit into; for 10,000 steps, with SGD, there is none, and
the peak alone is measured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import bilevel
from benchmarks.report import Settings, duration, size, table
from benchmarks.worker import Stopwatch, Worker
from benchmarks.workloads import load
from bilevel.measure import peak_memory

BATCH = 64
OPTIMIZERS = ("sgd", "momentum", "adam")
METHODS = {
    "all graphs": bilevel.Unroll(memory="1TB"),
    "150 MB": bilevel.Unroll(memory="150MB"),
    "60 MB": bilevel.Unroll(memory="60MB"),
    "last 20 steps": bilevel.Truncated(steps=20),
}
TIMED_UP_TO = 1_000  # steps: all graphs take 1.8 GB with SGD, more with Adam
LONG = ("60 MB", "last 20 steps")  # beyond that


def problem(data: str, optimizer: str, steps: int, small: bool) -> bilevel.BilevelProblem:
    """Return the problem; batches go round the 5,000 images in order."""
    held = load("cleaning", data, small)
    X, y = (torch.from_numpy(a) for a in held.valid)  # the labels that were left clean
    Xv, yv = X[: len(X) // 2], y[: len(y) // 2]
    X, y = X[len(X) // 2 :], y[len(y) // 2 :]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, 10))
    rate = {"sgd": 0.1, "momentum": 0.02, "adam": 1e-3}[optimizer]
    solver: Any = {
        "sgd": lambda lr: bilevel.inner.SGD(lr=lr, steps=steps),
        "momentum": lambda lr: bilevel.inner.SGD(lr=lr, momentum=0.9, steps=steps),
        "adam": lambda lr: bilevel.inner.Adam(lr=lr, steps=steps),
    }[optimizer]

    def loss(model: Any, h: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    batches: Any = [(X[i : i + BATCH], y[i : i + BATCH]) for i in range(0, len(X) - BATCH + 1, BATCH)]
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None)
    return bilevel.BilevelProblem(
        loss, loss, model, {"lr": bilevel.positive(rate)}, inner_solver=solver(lambda h: h["lr"]), inner_data=loader,
        outer_data=(Xv[:1000], yv[:1000]),
    )  # fmt: skip


def serve(task: dict[str, Any]) -> Any:
    """Build one problem; a request takes one hypergradient and its time, or its peak."""
    built = problem(task["data"], task["optimizer"], task["steps"], task["small"])
    method = METHODS[task["method"]]

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        built.restart()  # the same batches every time
        if request["peak"]:
            with peak_memory(torch.device("cpu")) as peak:
                found = bilevel.hypergradient(built, method, on_untrusted="ignore")
            return {"peak": peak.bytes, "gradients": found.cost.gradients}
        watch = Stopwatch()
        found = bilevel.hypergradient(built, method, on_untrusted="ignore")
        return {**watch.read(), "gradient": float(found.gradient["lr"]), "gradients": found.cost.gradients}

    return answer


def run(settings: Settings) -> str:
    """Return the section as Markdown."""
    quick = settings.quick or settings.small
    lengths = (10, 40) if settings.small else (10, 100) if quick else (10, 100, TIMED_UP_TO)
    longer = {"sgd": (*lengths, 10 * TIMED_UP_TO)} if not quick else {}
    names = settings.chosen(OPTIMIZERS, quick=("sgd",))
    return "\n\n".join(_table(name, longer.get(name, lengths), settings) for name in names)


def _table(optimizer: str, lengths: tuple[int, ...], settings: Settings) -> str:
    rows = []
    for steps in lengths:
        methods = METHODS if steps <= TIMED_UP_TO else LONG
        found = {method: _measure(optimizer, steps, method, settings) for method in methods}
        whole = found.get("all graphs")
        for method, figures in found.items():
            row = [f"{steps:,}", method, size(figures["peak"])]
            if whole is None:
                rows.append([*row, "-", "-", f"{figures['gradients']:,}", "-"])
                continue
            same = f"{abs(figures['gradient'] / whole['gradient'] - 1.0):.0e}"
            ratio = f"{figures[settings.clock] / whole[settings.clock]:.2f}"
            rows.append([*row, duration(figures[settings.clock]), ratio, f"{figures['gradients']:,}", same])
    head = ["steps", "method", "peak", "time", "of all graphs'", "gradients", "relative difference"]
    return table(f"784-256-10 network, {optimizer}, batches of {BATCH}", head, rows)


def _measure(optimizer: str, steps: int, method: str, settings: Settings) -> dict[str, Any]:
    task = {"optimizer": optimizer, "steps": steps, "method": method, "data": settings.data, "small": settings.small}
    worker = Worker("benchmarks.unrolling", task, settings.python, settings.threads)
    turns = [worker.ask(timeout=7200.0, peak=False) for _ in range(2)] if steps <= TIMED_UP_TO else []
    peak = worker.ask(timeout=7200.0, peak=True)
    worker.close()
    return {**min(turns, key=lambda turn: turn[settings.clock], default={}), **peak}
