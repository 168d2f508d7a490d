"""Which hypergradient estimator?
==============================

Four problems, every method where it applies, error against cost.

Two columns of the tables are worth a look: `error` is the truth, `claimed` is what the certificate estimates without
knowing it. Each panel of the picture teaches one thing; the sentence below it says which, and an assertion at the end
of this file holds it. `python examples/compare_estimators.py --panel ridge` runs one of them.
"""

import argparse
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter
from sklearn.datasets import load_diabetes, load_digits
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from torch import Tensor, nn

import bilevel
from bilevel import CG, BilevelProblem, Implicit, Neumann, Nystrom, Truncated, inner

Methods = dict[str, Any]


def split(x: Tensor, y: Tensor, n: int, m: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return (x[order[:n]], y[order[:n]]), (x[order[n : n + m]], y[order[n : n + m]])


# --- 1. Ridge regression, one strength for each of 65 features: the hypergradient has a closed form, so for once nobody
# needs to guess how wrong an approximation is. The condition number of the inner Hessian is 350.


def squares(w: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (batch[0] @ w - batch[1]).square().mean() / 2


def exact_ridge(strength: Tensor, train: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor]) -> Tensor:
    """Return dF/dλ = -w * H^-1 grad f, with w = H^-1 X^T y / n and H = X^T X / n + diag(λ)."""
    hessian = train[0].T @ train[0] / len(train[0]) + torch.diag(strength)
    w: Tensor = torch.linalg.solve(hessian, train[0].T @ train[1] / len(train[0]))
    gradient = valid[0].T @ (valid[0] @ w - valid[1]) / len(valid[0])
    adjoint: Tensor = torch.linalg.solve(hessian, gradient)
    return -w * adjoint


def compare_ridge() -> bilevel.Comparison:
    table, target = load_diabetes(return_X_y=True)
    features = StandardScaler().fit_transform(PolynomialFeatures(2, include_bias=False).fit_transform(table))
    x, y = torch.tensor(features), torch.tensor((target - target.mean()) / target.std())
    train, valid = split(x, y, 300, 142)
    problem = BilevelProblem(
        inner_loss=lambda w, strength, batch: squares(w, batch) + (strength * w.square()).sum() / 2,
        outer_loss=lambda w, strength, batch: squares(w, batch),
        params=torch.zeros(x.shape[1], dtype=torch.float64),
        hparams=bilevel.positive(3e-2, shape=x.shape[1]),
        # Heavy ball, long enough to reach the minimum: what is left is each estimator's own error.
        inner_solver=inner.SGD(lr=0.15, momentum=0.9, steps=500),
        inner_data=train,
        outer_data=valid,
    )
    methods: Methods = {f"cg {r:.0e}": Implicit(CG(rtol=r)) for r in (1e-1, 1e-2, 1e-4, 1e-8)}
    methods |= {f"neumann {k}": Implicit(Neumann(max_steps=k)) for k in (5, 20, 80, 320)}
    methods |= {f"truncated {k}": Truncated(k) for k in (5, 20, 80, 320)}
    methods |= {name: name for name in ("direct", "unroll", "one-step", "finite-difference")}
    return bilevel.compare(problem, methods, reference=exact_ridge(torch.full((65,), 3e-2).double(), train, valid))


# --- 2. Softmax regression on digits, one strength for each of 640 weights: many inner variables, a Hessian whose
# eigenvalues fall off fast.


def compare_softmax() -> bilevel.Comparison:
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    train, valid = split(x / 16.0, y, 500, 500)
    model = nn.Linear(64, 10, dtype=torch.float64)

    def loss(m: Any, strength: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        penalty: Tensor = (strength * m.weight.square()).sum() + 1e-3 * m.bias.square().sum()
        return nn.functional.cross_entropy(m(batch[0]), batch[1]) + penalty

    problem = BilevelProblem(
        inner_loss=loss,
        outer_loss=lambda m, strength, batch: nn.functional.cross_entropy(m(batch[0]), batch[1]),
        params=model,
        hparams=bilevel.positive(1e-3, shape=(10, 64)),
        inner_data=train,
        outer_data=valid,
    )
    methods: Methods = {f"cg {r:.0e}": Implicit(CG(rtol=r)) for r in (1e-1, 1e-2, 1e-4, 1e-8)}
    methods |= {f"nystrom {k}": Implicit(Nystrom(rank=k)) for k in (10, 40, 160)}
    methods |= {name: name for name in ("direct", "neumann", "shine", "penalty", "finite-difference")}
    return bilevel.compare(problem, methods)


# --- 3. A small network whose training was cut off: there is no minimum to differentiate.


def compare_network() -> bilevel.Comparison:
    table, target = load_diabetes(return_X_y=True)
    x = torch.tensor(StandardScaler().fit_transform(table))
    y = torch.tensor((target - target.mean()) / target.std())[:, None]
    train, valid = split(x, y, 300, 142)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    problem = BilevelProblem(
        inner_loss=lambda m, h, batch: (
            (m(batch[0]) - batch[1]).square().mean() + sum(h[i // 2] * m[i].weight.square().sum() for i in (0, 2))
        ),
        outer_loss=lambda m, h, batch: (m(batch[0]) - batch[1]).square().mean(),
        params=model,
        hparams=bilevel.positive(1e-3, shape=2),
        inner_solver=inner.SGD(lr=0.1, momentum=0.9, steps=150),
        inner_data=train,
        outer_data=valid,
    )
    methods: Methods = {f"truncated {k}": Truncated(k) for k in (5, 20, 80)}
    methods |= {name: name for name in ("unroll", "forward", "zero-order", "direct", "cg", "finite-difference")}
    return bilevel.compare(problem, methods, reference="unroll")


# --- 4. A learning rate for each of 10 stretches of training: only the inner loop uses them.


def compare_learning_rates() -> bilevel.Comparison:
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    train, valid = split(x / 16.0, y, 500, 500)
    stretches, steps = 10, 100
    problem = BilevelProblem(
        inner_loss=lambda m, h, batch: nn.functional.cross_entropy(m(batch[0]), batch[1]),
        outer_loss=lambda m, h, batch: nn.functional.cross_entropy(m(batch[0]), batch[1]),
        params=nn.Linear(64, 10, dtype=torch.float64),
        hparams=bilevel.positive(0.3, shape=stretches),
        inner_solver=inner.SGD(lr=lambda h, step: h[step * stretches // steps], momentum=0.9, steps=steps),
        inner_data=train,
        outer_data=valid,
    )
    methods: Methods = {f"truncated {k}": Truncated(k) for k in (10, 30, 60, 90)}
    methods |= {f"random {k}": bilevel.Forward(directions=k) for k in (1, 3)}
    methods |= {name: name for name in ("unroll", "forward", "zero-order", "implicit")}
    return bilevel.compare(problem, methods)


# --- What each teaches, and the picture.


@dataclass
class Panel:
    """A problem, and what the comparison on it teaches."""

    title: str
    lesson: str
    compare: Callable[[], bilevel.Comparison]


PANELS = {
    "ridge": Panel(
        "ridge regression, 65 strengths",
        "Conjugate gradients need about √κ products for what a series or a window needs κ for; the dense Hessian is "
        "cheapest while it is small.",
        compare_ridge,
    ),
    "softmax": Panel(
        "softmax regression on digits, 640 strengths",
        "With many inner variables products decide: CG buys digits for a few more, the inner L-BFGS's own curvature "
        "two for very few; the spectrum is too flat for a sketch.",
        compare_softmax,
    ),
    "network": Panel(
        "a network whose training was cut off",
        "Away from a minimum the implicit methods answer another question, and say so: what the loop computes is seen "
        "by the methods that run it.",
        compare_network,
    ),
    "rates": Panel(
        "10 learning rates",
        "No implicit method sees a learning rate, and says so. Forward mode is exact and keeps no steps; random "
        "directions trade products for noise.",
        compare_learning_rates,
    ),
}
COLORS = {"exact": "C2", "approximate": "C0", "untrusted": "C3"}


def draw(axes: Axes, panel: Panel, comparison: bilevel.Comparison) -> None:
    shown = [row for row in comparison.rows if row.error is not None]
    families: dict[str, list[bilevel.ComparedMethod]] = {}
    for row in shown:
        families.setdefault(row.method.split()[0], []).append(row)
    for i, (name, rows) in enumerate(families.items()):
        # What an estimator spends: gradients and, about twice as dear, products.
        at = [row.gradients + 2 * row.products for row in rows]
        errors = [max(row.error or 0.0, 1e-16) for row in rows]
        axes.plot(at, errors, color="lightgray", zorder=1)
        axes.scatter(at, errors, color=[COLORS[row.verdict] for row in rows], s=22, zorder=2)
        below = -11 if i % 2 else 4  # neighbours keep out of each other's way
        axes.annotate(name, (at[-1], errors[-1]), xytext=(4, below), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", title=panel.title, ylabel="relative error")
    axes.set_xlabel("gradients + 2 x products\n\n" + textwrap.fill(panel.lesson, 78), fontsize=9)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.15)
    axes.grid(alpha=0.3)


def save_picture(comparisons: dict[str, bilevel.Comparison]) -> None:
    columns = min(2, len(comparisons))
    rows = -(-len(comparisons) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(6.4 * columns, 5 * rows), layout="constrained", squeeze=False)
    for axes, (name, comparison) in zip(grid.flat, comparisons.items(), strict=True):
        draw(axes, PANELS[name], comparison)
    for verdict, color in COLORS.items():
        grid[0, 0].scatter([], [], color=color, label=verdict)
    grid[0, 0].legend(title="the certificate says", fontsize=8, title_fontsize=8)
    figure.savefig("compare_estimators.png", dpi=110)


def check_lessons(comparisons: dict[str, bilevel.Comparison]) -> None:
    for name, comparison in comparisons.items():
        rows = {row.method: row for row in comparison.rows}
        error = {row.method: math.inf if row.error is None else row.error for row in comparison.rows}
        # What a certificate calls exact is exact, in every panel.
        wrong = [row.method for row in comparison.rows if row.verdict == "exact" and error[row.method] >= 1e-3]
        assert not wrong, f"{name}: {wrong}"
        if name == "ridge":
            assert error["cg 1e-08"] < 1e-7 and error["neumann 80"] > 1e-3
            assert rows["cg 1e-08"].products < rows["truncated 320"].products
        if name == "softmax":
            assert rows["cg 1e-02"].products < rows["cg 1e-08"].products < rows["direct"].products
        if name == "network":
            assert rows["direct"].verdict == "untrusted" and error["forward"] < 1e-8
        if name == "rates":
            assert rows["implicit"].verdict == "refused" and error["forward"] < 1e-8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--panel", choices=list(PANELS), nargs="+", default=list(PANELS))
    torch.set_num_threads(1)  # tensors this small are faster without threads that wait for each other
    comparisons = {}
    for name in parser.parse_args().panel:
        comparisons[name] = PANELS[name].compare()
        print(f"\n{PANELS[name].title}\n\n{comparisons[name].table()}\n\n{PANELS[name].lesson}", flush=True)
    save_picture(comparisons)
    check_lessons(comparisons)


if __name__ == "__main__":
    main()
