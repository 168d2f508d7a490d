"""How one hypergradient's time grows with the inner variables, the hyperparameters and the inner condition.

    python -m benchmarks scaling

The inner problem is a quadratic whose curvatures lie evenly on a log scale between 1/κ and 1, turned by a reflection so
that no diagonal preconditioner undoes it: w -> 1/2 |√d Q w|² - b·w, plus one strength for each of m groups of
variables. A whole hypergradient by conjugate gradients is taken, the inner solve included. The slope is that of a
straight line through log(seconds) against log(size), by least squares over the upper half of the sizes, where the fixed
cost has faded.
"""

from __future__ import annotations

import math
import resource
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bilevel
from benchmarks import decays
from benchmarks.report import Settings, duration, size, table
from benchmarks.worker import Stopwatch, Worker

SIZES_AT = 10.0  # condition at which sizes are varied
LONG = 1_000_000  # inner variables whose call is not repeated


def problem(variables: int, hyperparameters: int, condition: float) -> bilevel.BilevelProblem:
    """Return the quadratic, float64."""
    dice = torch.Generator().manual_seed(0)
    curvature = torch.logspace(-math.log10(condition), 0.0, variables, dtype=torch.float64)
    b, target, u = (torch.randn(variables, generator=dice, dtype=torch.float64) for _ in range(3))
    u = u / u.norm()
    group = torch.arange(variables) * hyperparameters // variables if hyperparameters < variables else None

    def inner(w: Tensor, h: Tensor) -> Tensor:
        turned = w - 2.0 * u.dot(w) * u
        strengths = h if group is None else h[group]
        return 0.5 * (curvature * turned**2).sum() + 0.5 / condition * (strengths * w**2).sum() - b.dot(w)

    def outer(w: Tensor, h: Tensor) -> Tensor:
        return 0.5 * ((w - target) ** 2).sum() / variables

    start = torch.zeros(variables, dtype=torch.float64)
    strengths = bilevel.positive(torch.full((hyperparameters,), 0.1, dtype=torch.float64))
    return bilevel.BilevelProblem(inner, outer, start, strengths)


def serve(task: dict[str, Any]) -> Any:
    """Build one problem; each request is one hypergradient."""
    built = problem(task["variables"], task["hyperparameters"], task["condition"])

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        watch = Stopwatch()
        found = bilevel.hypergradient(built, "cg", on_untrusted="ignore")
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {**watch.read(), "products": found.cost.products, "gradients": found.cost.gradients, "peak": peak,
                "verdict": found.certificate.verdict}  # fmt: skip

    return answer


def run(settings: Settings) -> str:
    """Return the section as Markdown."""
    most = 4 if settings.small else 5 if settings.quick else 7
    half = most - 1
    sweeps = {
        "inner variables": [(10**k, 10**k, SIZES_AT) for k in range(3, most + 1)],
        "hyperparameters": [(10**half, 10**k, SIZES_AT) for k in range(0, half + 1, 2)],
        "condition": [(10 ** min(half, 4), 10, 10.0**k) for k in range(1, 4 if settings.small else 7)],
    }
    curves: dict[str, Any] = {}
    parts = [_sweep(name, sweeps[name], settings, curves) for name in settings.chosen(tuple(sweeps))]
    if settings.chosen(("decays",)):
        parts.append(decays.run(settings))
    if settings.images is not None and len(curves) == len(sweeps):
        _plot(curves, settings)
        parts.append("![Time against size, products against condition](images/scaling.png)")
    return "\n\n".join(parts)


def _plot(curves: dict[str, Any], settings: Settings) -> None:
    """Draw time against both sizes, and products against the condition, on log scales."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.0), layout="constrained")
    for axis, (name, (sizes, seconds, products)) in zip(figure.subplots(1, 3), curves.items(), strict=True):
        condition = name == "condition"
        figures = products if condition else seconds
        axis.loglog(sizes, figures, "o-")
        power = 0.5 if condition else 0.0 if name == "hyperparameters" else 1.0
        axis.loglog(sizes, [figures[-1] * (x / sizes[-1]) ** power for x in sizes], ":", color="gray")
        axis.set(xlabel=name, ylabel="products" if condition else "seconds")
        if max(figures) < 10 * min(figures):  # a flat line shall look flat
            axis.set_ylim(min(figures) / 5, max(figures) * 5)
        axis.set_title(f"dotted: power {power:g}", fontsize="small")
    assert settings.images is not None
    settings.images.mkdir(parents=True, exist_ok=True)
    figure.savefig(settings.images / "scaling.png", dpi=110)


def _sweep(name: str, cases: list[tuple[int, int, float]], settings: Settings, curves: dict[str, Any]) -> str:
    at = ["inner variables", "hyperparameters", "condition"].index(name)
    rows, seconds, products = [], [], []
    for case in cases:
        found = _measure(case, settings)
        seconds.append(found[settings.clock])
        products.append(found["products"])
        rows.append([f"{case[at]:,.0f}", duration(seconds[-1]), f"{found['gradients']:,}", f"{found['products']:,}",
                     size(found["peak"]), found["verdict"]])  # fmt: skip
    curves[name] = [case[at] for case in cases], seconds, products
    if name == "condition":
        for row, case, count in zip(rows, cases, products, strict=True):
            row.insert(4, f"{count / math.sqrt(case[2]):.1f}")
        slope = f"products grow as its power {_slope([c[at] for c in cases], products):.2f}"
    else:
        slope = f"time grows as their power {_slope([c[at] for c in cases], seconds):.2f}"
    head = [name, "time", "gradients", "products", "peak of the process", "verdict"]
    if name == "condition":
        head.insert(4, "products / √κ")
    others = {
        "inner variables": f"as many hyperparameters, κ = {SIZES_AT:g}",
        "hyperparameters": f"{cases[0][0]:,} inner variables, κ = {SIZES_AT:g}",
        "condition": f"{cases[0][0]:,} inner variables, 10 hyperparameters",
    }[name]
    return table(f"Against the {name} ({others}): {slope}", head, rows)


def _measure(case: tuple[int, int, float], settings: Settings) -> dict[str, Any]:
    """Return the faster of two calls; of one where it is long."""
    task = dict(zip(("variables", "hyperparameters", "condition"), case, strict=True))
    worker = Worker("benchmarks.scaling", task, settings.python, settings.threads)
    turns = [worker.ask(timeout=3600.0) for _ in range(1 if case[0] >= LONG else 2)]
    found = min(turns, key=lambda turn: turn[settings.clock])
    worker.close()
    return found


def _slope(sizes: list[float], figures: list[float]) -> float:
    upper = min(len(sizes) // 2, len(sizes) - 2)
    return float(np.polyfit(np.log(sizes[upper:]), np.log(figures[upper:]), 1)[0])
