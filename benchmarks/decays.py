"""A weight decay for each weight of a network, by two methods.

    python -m benchmarks scaling --only decays

784-n-n-10 on 512 digits, float32, the decay of every weight positive; 10 million weights in full runs: one
hypergradient, and two outer steps of `solve` with its default, L-BFGS. What a method takes is told in copies of the
weights: the peak of the process beyond what it was before, over the bytes of all weights. Conjugate gradients meet the
negative curvature of a network that is not trained to the end; their limit on products keeps them from going on.
"""

from __future__ import annotations

import resource
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel
from benchmarks.report import Settings, duration, size, table
from benchmarks.worker import Stopwatch, Worker
from benchmarks.workloads import load

STEPS = 2
EXAMPLES = 512  # half of them for validation
SGD = bilevel.inner.SGD(lr=0.1, steps=20)
METHODS: dict[str, tuple[Any, Any]] = {
    "cg, 10 products": (bilevel.Implicit(bilevel.CG(max_steps=10)), SGD),
    "last 5 of 20 steps": (bilevel.Truncated(steps=5), SGD),
}


def problem(width: int, solver: Any, data: str, small: bool) -> bilevel.BilevelProblem:
    """Return the problem; its inner variables and its hyperparameters are as many as the network has weights."""
    X, y = (torch.from_numpy(a)[:EXAMPLES] for a in load("cleaning", data, small).valid)
    half = len(y) // 2
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(784, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))

    def inner(network: Any, h: dict[str, Tensor]) -> Tensor:
        decay = sum((h[name] * w**2).sum() for name, w in network.named_parameters())
        return cross_entropy(network(X[:half]), y[:half]) + 0.5 * decay

    def outer(network: Any, h: dict[str, Tensor]) -> Tensor:
        return cross_entropy(network(X[half:]), y[half:])

    decays = {name: bilevel.positive(torch.full_like(w, 1e-3)) for name, w in network.named_parameters()}
    return bilevel.BilevelProblem(inner, outer, network, decays, inner_solver=solver)


def serve(task: dict[str, Any]) -> Any:
    """Build one problem; a request is one hypergradient, or a run of some steps."""
    method, solver = METHODS[task["method"]]
    built = problem(task["width"], solver, task["data"], task["small"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        watch = Stopwatch()
        if request["steps"]:
            solved = bilevel.solve(built, method, steps=request["steps"], on_untrusted="ignore", progress=False)
            losses = [solved.start.outer_loss, solved.outer_loss]
        else:
            losses = [bilevel.hypergradient(built, method, on_untrusted="ignore").outer_loss]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {**watch.read(), "losses": losses, "peak": 1024 * peak, "beyond": 1024 * (peak - before)}

    return answer


def run(settings: Settings) -> str:
    """Return a table as Markdown."""
    width = 40 if settings.small else 300 if settings.quick else 2800
    count = 784 * width + width**2 + 12 * width + 10
    rows = []
    for method in METHODS:
        for steps in (0, STEPS):
            task = {"method": method, "width": width, "data": settings.data, "small": settings.small}
            worker = Worker("benchmarks.decays", task, settings.python, settings.threads)
            found = worker.ask(timeout=3600.0, steps=steps)
            worker.close()
            rows.append([f"{method}, {f'{steps} outer steps' if steps else 'one hypergradient'}",
                         duration(found[settings.clock]), size(found["peak"]), f"{found['beyond'] / (4 * count):.0f}",
                         " → ".join(f"{loss:.3f}" for loss in found["losses"])])  # fmt: skip
    head = ["", "time", "peak of the process", "copies of the weights", "outer loss"]
    return table(f"A weight decay for each of {count:,} weights of a 784-{width}-{width}-10 network", head, rows)
