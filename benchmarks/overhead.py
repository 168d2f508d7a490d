"""What the library itself takes in each outer step of a small problem.

    python -m benchmarks overhead

Logistic regression with 64 inner variables and 64 strengths. Our own time is that of `bilevel.solve` less its gradients
and Hessian-vector products at the price that bare autograd has for them on the same losses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

import bilevel
from benchmarks.report import Settings, duration, table
from benchmarks.worker import Stopwatch, Worker
from bilevel.batching import batched as together
from bilevel.vector import Vector

SIZE = 64
METHODS = ("implicit", "cg", "direct")


def losses() -> tuple[Any, Any]:
    """Return the inner and the outer loss on 500 rows each."""
    dice = torch.Generator().manual_seed(0)
    X, Xv = (torch.randn(500, SIZE, generator=dice, dtype=torch.float64) for _ in range(2))
    truth = torch.randn(SIZE, generator=dice, dtype=torch.float64) * (torch.arange(SIZE) < 20)
    y, yv = (torch.bernoulli((x @ truth).sigmoid(), generator=dice) for x in (X, Xv))

    def inner(w: Tensor, h: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(X @ w, y) + (h * w**2).sum()

    return inner, lambda w, h: binary_cross_entropy_with_logits(Xv @ w, yv)


def serve(task: dict[str, Any]) -> Any:
    """Measure one method."""
    inner, outer = losses()
    start = torch.zeros(SIZE, dtype=torch.float64)
    problem = bilevel.BilevelProblem(inner, outer, start, bilevel.positive(0.01, shape=(SIZE,)))

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        watch = Stopwatch()
        solution = bilevel.solve(problem, task["method"], steps=request["steps"], progress=False, on_untrusted="ignore")
        spent = watch.read()
        records = [solution.start, *solution.history]
        counts = {name: sum(record[name] for record in records) for name in ("gradients", "products", "inner_solves")}
        return {
            **spent,
            **counts,
            "steps": len(solution.history),
            **_prices(inner, task["clock"], task["method"] != "cg"),
        }

    return answer


def _prices(inner: Any, clock: str, batched: bool, repeats: int = 300) -> dict[str, float]:
    """Return the seconds of a gradient and of a product, of 64 in one batch where dense Hessians are formed so."""
    w = torch.full((SIZE,), 0.1, dtype=torch.float64, requires_grad=True)
    h = torch.full((SIZE,), 0.01, dtype=torch.float64, requires_grad=True)
    watch = Stopwatch()
    for _ in range(repeats):
        torch.autograd.grad(inner(w, h), w)
    middle = watch.read()[clock]
    residual = torch.autograd.grad(inner(w, h), w, create_graph=True)[0]

    def product(v: Vector) -> Vector:
        return {"w": torch.autograd.grad(residual, w, v["w"], retain_graph=True)[0]}

    units, ones = {"w": torch.eye(SIZE, dtype=w.dtype)}, {"w": torch.ones_like(w)}
    for _ in range(repeats):
        together(product, units, SIZE) if batched else product(ones)
    spent = (watch.read()[clock] - middle) / (repeats * (SIZE if batched else 1))
    return {"gradient": middle / repeats, "product": spent}


def run(settings: Settings) -> str:
    """Return the section as Markdown."""
    rows = []
    for method in settings.chosen(METHODS):
        task = {"method": method, "clock": settings.clock}
        worker = Worker("benchmarks.overhead", task, settings.python, settings.threads)
        worker.ask(steps=2)
        turns = [worker.ask(steps=30) for _ in range(settings.repeats)]
        worker.close()
        best = min(turns, key=lambda turn: turn[settings.clock])
        total, solves = best[settings.clock], best["inner_solves"]
        bare = best["gradients"] * best["gradient"] + best["products"] * best["product"]
        rows.append([f"`{method}`", str(best["steps"]), str(solves), duration(total / best["steps"]),
                     f"{best['gradients'] / best['steps']:.0f}", f"{best['products'] / best['steps']:.0f}",
                     duration(bare / best["steps"]), duration(max(total - bare, 0.0) / best["steps"]),
                     duration(max(total - bare, 0.0) / solves)])  # fmt: skip
    head = ["method", "steps", "inner solves", "time a step", "gradients", "products", "their time", "ours a step",
            "ours a solve"]  # fmt: skip
    return table(f"Logistic regression, {SIZE} inner variables, {SIZE} strengths, 500 rows", head, rows)
