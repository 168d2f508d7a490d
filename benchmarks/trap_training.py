"""Random traps of the training and of the solvers: stopped early, too short, too long, or noisy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from benchmarks.calibration import through_loop
from benchmarks.cases import IMPLICIT, NO_TRUTH, Case, Run, all_runs
from benchmarks.problems import Dice, draw, inner_point
from bilevel import CG, GMRES, MINRES, BilevelProblem, Implicit, Neumann, Truncated, inner, positive
from bilevel.oracle import KnownProblem
from bilevel.solvers import estimator
from bilevel.solvers.linear import LinearSolver


def not_converged(dice: Dice) -> Case:
    drawn = draw(dice, sizes=(5, 160), condition=(1, 1e5))
    kind = dice.choice(("residual", "noise", "lbfgs", "gradient descent"))
    params = inner_point(dice, drawn.known, kind, dice.log(1e-4, 1e-1))
    runs = all_runs(drawn.known, drawn.known.truth.gradient, params=params)
    return Case("inner problem not converged", False, runs, drawn=drawn, params=params)


def early(dice: Dice) -> Case:
    drawn = draw(dice, sizes=(10, 160), condition=(10, 1e5))
    steps = int(dice.log(1, 30))
    kinds = {"cg": CG, "minres": MINRES, "gmres": GMRES, "neumann": Neumann}
    solvers: dict[str, LinearSolver] = {name: kind(max_steps=steps) for name, kind in kinds.items()}
    runs = [
        Run(name, Implicit(solver), drawn.known.problem(), drawn.known.truth.gradient, drawn.known.truth.params)
        for name, solver in solvers.items()
    ]
    runs.append(
        Run(
            "fixed-point",
            bilevel.FixedPoint(max_steps=steps),
            drawn.known.problem(),
            drawn.known.truth.gradient,
            drawn.known.truth.params,
        )
    )
    return Case("linear solver stopped early", False, runs)


def neumann_diverges(dice: Dice) -> Case:
    drawn = draw(dice, sizes=(5, 80), condition=(1, 1e4))
    size = dice.log(2.05, 100.0) / drawn.known.truth.curvature[1]
    method = Implicit(Neumann(max_steps=int(dice.log(1, 200)), step_size=size))
    run = Run("neumann", method, drawn.known.problem(), drawn.known.truth.gradient, drawn.known.truth.params)
    return Case("Neumann with a step too large", False, [run])


def short_window(dice: Dice) -> Case:
    drawn = draw(dice, sizes=(5, 60), condition=(10, 1e5))
    steps = int(dice.log(20, 300))
    solver = inner.SGD(
        lr=dice.uniform(0.3, 1.5) / drawn.known.truth.curvature[1], momentum=dice.choice((0.0, 0.5, 0.9)), steps=steps
    )
    truth = through_loop(drawn, solver, drawn.known.params)
    run = Run("truncated", Truncated(steps=int(dice.log(1, 20))), drawn.known.problem(solver), truth)
    return Case("truncated window too short", False, [run])


def learning_rate(dice: Dice) -> Case:
    """A learning rate among the hyperparameters: implicit methods cannot see it."""
    drawn = draw(dice, family="ridge", sizes=(4, 20), condition=(1, 100))
    steps, rate = int(dice.log(5, 200)), dice.uniform(0.3, 1.2) / drawn.known.truth.curvature[1]
    known = drawn.known
    problem = BilevelProblem(
        lambda w, h: known.inner_loss(w, h["strength"]),
        lambda w, h: known.outer_loss(w, h["strength"]),
        known.params,
        {"strength": known.hparams, "lr": positive(rate)},
        inner.SGD(lr=lambda h: h["lr"], steps=steps),
    )
    runs = [Run(name, estimator(name), problem, NO_TRUTH) for name in IMPLICIT if name != "fixed-point"]
    # At the solution one more step moves nothing, whatever its length: the truth of a fixed point is zero.
    at_end = {"strength": known.truth.gradient, "lr": torch.zeros((), dtype=torch.float64)}
    return Case("learning rate", False, [*runs, Run("fixed-point", estimator("fixed-point"), problem, at_end)])


def adamw(dice: Dice) -> Case:
    """AdamW decays outside of the inner loss: its end is no stationary point. The truth is its own loop."""
    drawn = draw(dice, family="ridge", sizes=(4, 20), condition=(1, 100))
    solver = inner.AdamW(lr=dice.log(3e-3, 3e-2), weight_decay=dice.log(1e-2, 1.0), steps=300)
    problem = drawn.known.problem(solver)
    truth = bilevel.hypergradient(problem, "unroll").gradient
    return Case("AdamW's weight decay", False, [Run(name, estimator(name), problem, truth) for name in IMPLICIT])


def minibatches(dice: Dice) -> Case:
    """Stochastic inner training: the hypergradient of one batch is not that of the data."""
    n = int(dice.log(4, 20))
    X, X_val = dice.normal(64, n), dice.normal(64, n)
    y, y_val = dice.normal(64), dice.normal(64)

    def loss(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        return ((batch[0] @ w - batch[1]) ** 2).mean() / 2 + h * (w**2).sum() / 2

    known = KnownProblem(
        "minibatches",
        lambda w, h: loss(w, h, (X, y)),
        lambda w, h: ((X_val @ w - y_val) ** 2).mean() / 2,
        torch.zeros(n, dtype=torch.float64),
        positive(dice.log(0.05, 1.0)),
    )
    problem = BilevelProblem(
        loss,
        known.outer_loss,
        known.params,
        known.hparams,
        inner.SGD(lr=0.05, epochs=10),
        inner_data=DataLoader(TensorDataset(X, y), batch_size=8),
    )
    runs = [Run(name, estimator(name), problem, known.truth.gradient) for name in IMPLICIT]
    return Case("minibatches", False, runs)


def resting_step(dice: Dice) -> Case:
    """A schedule whose last learning rate is zero, under methods that differentiate the last step."""
    drawn = draw(dice, sizes=(3, 20), condition=(1, 30), family=dice.choice(("quadratic", "ridge")))
    steps, high = 300, drawn.known.truth.curvature[1]
    lr, momentum = (lambda h, step: (1.0 - step / (steps - 1)) / high), dice.choice((0.0, 0.5))
    solver = inner.SGD(lr=lr, momentum=momentum, steps=steps)
    truth = drawn.known.truth.gradient
    runs = [Run(m, estimator(m), drawn.known.problem(solver), truth) for m in ("one-step", "fixed-point", "sama")]
    return Case("last learning rate of zero", False, runs)
