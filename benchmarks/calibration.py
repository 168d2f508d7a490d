"""How well a certificate's `error` tells the true relative error of a hypergradient.

    python -m benchmarks.calibration [--problems 3000] [--seed 0] [--plot FILE]

Each random problem is put to every method, at settings and at an inner point drawn at random. The truth is a dense
float64 solve (`bilevel.oracle`), for a truncated loop backpropagation through the whole loop written out here.

What counts as right beside the two bars:
- Below the rounding of the truth itself, `ROUNDING` times the condition number and at least 1e-12, an error cannot be
  told from none, and neither can an estimate.
- A true error above 1 counts as 1: no digit is right, and how wrong it is does not matter.
- No estimate (at an indefinite Hessian, always with the verdict "untrusted") is counted apart.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from benchmarks.problems import POINTS, Dice, Drawn, Flat, draw, inner_point
from bilevel import CG, GMRES, MINRES, Cholesky, FixedPoint, Implicit, Neumann, Truncated, hypergradient, inner
from bilevel.errors import BilevelError
from bilevel.solvers import Estimator, estimator
from bilevel.solvers.about import about
from bilevel.testing import relative_error

ROUNDING = 10 * 2.2e-16
TOO_LOW, TOO_HIGH = 3.0, 100.0
BARS = (0.99, 0.90)


@dataclass(frozen=True)
class Trial:
    """One hypergradient: what is true, what was estimated, and where."""

    method: str
    true: float
    estimate: float | None
    verdict: str
    where: str
    rounding: float
    products: tuple[int, int] = (0, 0)

    @property
    def covered(self) -> bool:
        """The true error is at most three times the estimate."""
        if self.estimate is None:
            return self.verdict == "untrusted"
        return min(self.true, 1.0) <= max(TOO_LOW * self.estimate, self.rounding)

    @property
    def tight(self) -> bool:
        """The estimate is at most a hundred times the true error."""
        return self.estimate is None or self.estimate <= max(TOO_HIGH * self.true, self.rounding)


def _iterative(solver: Callable[..., Any]) -> Callable[[Dice], Estimator]:
    def build(dice: Dice) -> Estimator:
        steps = dice.choice((None, None, int(dice.log(3, 300))))
        return Implicit(solver(rtol=dice.log(1e-10, 0.3), max_steps=steps))

    return build


# Method: how its settings are drawn.
METHODS: dict[str, Callable[[Dice], Estimator]] = {
    "implicit": lambda dice: Implicit(),
    "cg": _iterative(CG),
    "minres": _iterative(MINRES),
    "gmres": _iterative(GMRES),
    "direct": lambda dice: Implicit(Cholesky()),
    "neumann": lambda dice: Implicit(Neumann(max_steps=int(dice.log(3, 1000)), rtol=dice.log(1e-10, 0.1))),
    "fixed-point": lambda dice: FixedPoint(max_steps=int(dice.log(3, 1000)), rtol=dice.log(1e-10, 0.1)),
    "truncated": lambda dice: Truncated(steps=int(dice.log(2, 100))),
    "nystrom": lambda dice: estimator("nystrom"),
    "shine": lambda dice: estimator("shine"),
    "finite-difference": lambda dice: estimator("finite-difference"),
    "one-step": lambda dice: estimator("one-step"),
    "penalty": lambda dice: estimator("penalty"),
}


def trials(problems: int, seed: int, methods: Sequence[str] = tuple(METHODS), **limits: Any) -> Iterator[Trial]:
    """Yield a trial for each of `problems` random problems and each method."""
    for i in range(problems):
        dice = Dice(seed * 1_000_003 + i)
        drawn = draw(dice, **limits)
        point = dice.choice(POINTS)
        params = inner_point(dice, drawn.known, point)
        for name in methods:
            method = METHODS[name](dice)
            where = f"{i}: {drawn.family}, {drawn.size} variables, condition {drawn.condition:.0e}, {point}, {method}"
            try:
                yield (
                    _unrolled(dice, drawn, method, where)
                    if about(method).unrolls
                    else _implicit(dice, drawn, name, method, params, where)
                )
            except BilevelError as error:
                print(f"{where}: {error}", file=sys.stderr)


def _implicit(dice: Dice, drawn: Drawn, name: str, method: Estimator, params: Any, where: str) -> Trial:
    # A fixed-point iteration differentiates the step of the inner solver where that has one.
    solver = _momentum(dice, drawn, 10) if name == "fixed-point" and dice.choice((True, False)) else None
    found = hypergradient(drawn.known.problem(solver), method, params=params, on_untrusted="ignore")
    true = relative_error(found.gradient, drawn.known.truth.gradient)
    return Trial(name, true, found.certificate.error, found.certificate.verdict, where, _rounding(drawn))


def _rounding(drawn: Drawn) -> float:
    return max(1e-12, ROUNDING * drawn.condition)


def _momentum(dice: Dice, drawn: Drawn, steps: int) -> inner.SGD:
    """Gradient descent, or the heavy-ball method, with a step that is stable."""
    largest = drawn.known.truth.curvature[1]
    if dice.choice((True, False)):
        return inner.SGD(lr=dice.uniform(0.5, 1.5) / largest, steps=steps)
    return inner.SGD(lr=1.0 / largest, momentum=dice.choice((0.5, 0.9)), steps=steps)


def _unrolled(dice: Dice, drawn: Drawn, method: Any, where: str) -> Trial:
    """Truncate a loop of up to ten windows; the truth is autograd through all of it."""
    solver = _momentum(dice, drawn, min(500, int(method.steps * dice.log(1, 10))))
    flat = Flat(drawn.known)
    start = flat.params(dice.choice((flat.start, flat.best + 0.1 * dice.normal(len(flat.best)))))
    found = hypergradient(drawn.known.problem(solver), method, params=start, on_untrusted="ignore")
    true = relative_error(found.gradient, through_loop(drawn, solver, start))
    return Trial(
        "truncated", true, found.certificate.error, found.certificate.verdict, f"{where}, {solver}", _rounding(drawn)
    )


def through_loop(drawn: Drawn, solver: inner.SGD, start: Any) -> Any:
    """Return the gradient through every step of SGD with momentum, by one graph."""
    leaves, spec = optree.tree_flatten(drawn.known.hparams)
    h = [getattr(leaf, "value", leaf).detach().clone().requires_grad_() for leaf in leaves]
    hparams = optree.tree_unflatten(spec, h)
    tensors, shape = optree.tree_flatten(start)
    w: list[Tensor] = [t.detach().requires_grad_() for t in tensors]
    velocity = [torch.zeros_like(t) for t in w]
    for _ in range(solver.steps or 0):
        loss = drawn.known.inner_loss(optree.tree_unflatten(shape, w), hparams)
        gradient = torch.autograd.grad(loss, w, create_graph=True)
        velocity = [solver.momentum * v + g for v, g in zip(velocity, gradient, strict=True)]
        w = [x - solver.lr * v for x, v in zip(w, velocity, strict=True)]
    outer = drawn.known.outer_loss(optree.tree_unflatten(shape, w), hparams)
    return optree.tree_unflatten(spec, list(torch.autograd.grad(outer, h)))


@dataclass(frozen=True)
class Row:
    """The summary of one method."""

    method: str
    count: int
    silent: float
    covered: float
    tight: float
    true: float
    estimate: float
    ratio: float

    @property
    def passes(self) -> bool:
        """Both bars are met."""
        return self.covered >= BARS[0] and self.tight >= BARS[1]


def summary(found: Sequence[Trial]) -> list[Row]:
    """Return a row for each method, in the order of `METHODS`."""
    rows = []
    for method in METHODS:
        mine = [t for t in found if t.method == method]
        if not mine:
            continue
        told = [t for t in mine if t.estimate is not None]
        known = [t.estimate / t.true for t in told if t.estimate is not None and t.true > t.rounding]
        rows.append(
            Row(
                method,
                len(mine),
                1.0 - len(told) / len(mine),
                sum(t.covered for t in told) / len(told),
                sum(t.tight for t in told) / len(told),
                statistics.median(t.true for t in told),
                statistics.median(t.estimate or 0.0 for t in told),
                statistics.median(known) if known else math.nan,
            )
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| method | hypergradients | without estimate | true ≤ 3 × estimate | estimate ≤ 100 × true "
        "| median true error | median estimate | median estimate / true |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| `{r.method}` | {r.count} | {r.silent:.1%} | {r.covered:.2%} | {r.tight:.2%} "
        f"| {r.true:.1e} | {r.estimate:.1e} | {r.ratio:.2g} |"
        for r in rows
    ]
    return "\n".join(lines)


def plot(found: Sequence[Trial], file: str) -> None:
    """Draw estimate against truth, one mark a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 5.6), dpi=110)
    low, high = 1e-15, 1e3
    for method, mark in zip(METHODS, "os^v*xD+1234P", strict=True):
        mine = [t for t in found if t.method == method and t.estimate is not None][:400]
        if not mine:
            continue
        x = [min(max(t.true, low), high) for t in mine]
        y = [min(max(t.estimate or 0.0, low), high) for t in mine]
        axes.scatter(x, y, s=7, marker=mark, linewidths=0.5, alpha=0.6, label=method)
    line = [low, high]
    axes.plot(line, line, "k-", linewidth=0.8, label="estimate = truth")
    axes.fill_between(
        line, [v / TOO_LOW for v in line], [v * TOO_HIGH for v in line], color="0.9", zorder=0, label="between the bars"
    )
    axes.axvspan(low, ROUNDING, color="0.96", zorder=-1)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set(xlabel="true relative error of the hypergradient", ylabel="certificate.error")
    axes.legend(fontsize=8, markerscale=2)
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description="certificate.error against the true error")
    parser.add_argument("--problems", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--plot", metavar="FILE")
    parser.add_argument("--worst", type=int, default=0, help="print this many of the trials outside of the bars")
    options = parser.parse_args()
    found = list(trials(options.problems, options.seed, options.methods))
    print(table(summary(found)))
    missed = [t for t in found if not (t.covered and t.tight)]
    for trial in sorted(missed, key=lambda t: (t.covered, t.method))[: options.worst]:
        kind = "tight" if trial.covered else "UNCOVERED"
        estimate = "none" if trial.estimate is None else f"{trial.estimate:.1e}"
        print(f"{kind} {trial.method} true {trial.true:.1e} estimate {estimate} {trial.verdict}; {trial.where}")
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
