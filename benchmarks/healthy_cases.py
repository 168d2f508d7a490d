"""Random healthy problems: the default settings should do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bilevel
from benchmarks.cases import Case, all_runs, float32_known, float32_runs, loop_runs
from benchmarks.problems import Dice, Drawn, draw
from bilevel import positive
from bilevel.oracle import KnownProblem


def plain(dice: Dice) -> Case:
    drawn = draw(dice, sizes=(5, 200), condition=(1, 1e4))
    runs = all_runs(drawn.known, drawn.known.truth.gradient) + loop_runs(drawn)
    return Case("strictly convex or near a strict minimum", True, runs, drawn=drawn)


def orthonormal(dice: Dice) -> Case:
    """Ridge on an orthonormal design: H = c I, where a CG that returns the iterate before the last returns zero."""
    n = int(dice.log(2, 40))
    Q, Q_val = dice.rotation(2 * n)[:, :n], dice.normal(2 * n, n)
    y, y_val = dice.normal(2 * n), dice.normal(2 * n)
    known = KnownProblem(
        "orthonormal ridge",
        lambda w, h: (((Q @ w - y) ** 2).sum() + h * (w**2).sum()) / 2,
        lambda w, h: ((Q_val @ w - y_val) ** 2).sum() / 2,
        torch.zeros(n, dtype=torch.float64),
        positive(dice.log(1e-2, 1e2)),
    )
    drawn = Drawn(known, "ridge", n)
    return Case("orthonormal design (c I)", True, all_runs(known, known.truth.gradient) + loop_runs(drawn), drawn=drawn)


def coupled(dice: Dice) -> Case:
    """Several tensors, 0-d ones and an unused one, coupled by one matrix."""
    n = int(dice.log(4, 30))
    root = dice.normal(n, n)
    A, b = root @ root.T / n + 0.2 * torch.eye(n, dtype=torch.float64), dice.normal(n)

    def stack(p: Any) -> Tensor:
        return torch.cat([p["a"].reshape(1), p["b"]["c"].reshape(2), p["b"]["d"]])

    known = KnownProblem(
        "coupled tensors",
        lambda p, h: stack(p) @ (A @ stack(p)) / 2 - h["pull"] * (b @ stack(p)) + h["keep"] * (p["b"]["d"] ** 2).sum(),
        lambda p, h: (p["a"] - 1.0) ** 2 + (p["b"]["d"] ** 2).sum(),
        {
            "a": torch.zeros((), dtype=torch.float64),
            "b": {"c": torch.zeros(2, 1, dtype=torch.float64), "d": torch.zeros(n - 3, dtype=torch.float64)},
        },
        {"pull": bilevel.real(dice.uniform(0.5, 2.0)), "keep": positive(dice.log(0.1, 10.0))},
    )
    drawn = Drawn(known, "coupled", n)
    return Case(
        "coupled tensors, 0-d, unused ones", True, all_runs(known, known.truth.gradient) + loop_runs(drawn), drawn=drawn
    )


def scalar(dice: Dice) -> Case:
    a, target = dice.log(0.1, 10.0), dice.uniform(0.3, 2.0)
    known = KnownProblem(
        "0-d",
        lambda w, h: a * (w - 1.0) ** 2 + h * w**2 + 0.1 * w**4,
        lambda w, h: (w - target) ** 2,
        torch.zeros((), dtype=torch.float64),
        positive(dice.log(0.1, 10.0)),
    )
    drawn = Drawn(known, "0-d", 1)
    return Case("one 0-d variable", True, all_runs(known, known.truth.gradient) + loop_runs(drawn), drawn=drawn)


def scaled(dice: Dice) -> Case:
    """A healthy problem whose losses are tiny or huge."""
    drawn = draw(dice, sizes=(5, 40), condition=(1, 1e3))
    by, outer_by = dice.choice((1e-12, 1.0, 1e12)), dice.choice((1e-12, 1e12))
    first = drawn.known
    known = dataclasses.replace(
        first,
        inner_loss=lambda p, h: by * first.inner_loss(p, h),
        outer_loss=lambda p, h: outer_by * first.outer_loss(p, h),
    )
    drawn = dataclasses.replace(drawn, known=known)
    return Case("scaled by 1e-12 or 1e12", True, all_runs(known, known.truth.gradient) + loop_runs(drawn), drawn=drawn)


def dropout(dice: Dice) -> Case:
    """Dropout in the inner loss: pinned, it is one mask, and the truth is that mask's."""
    n = int(dice.log(4, 40))
    X, y, X_val, y_val = dice.normal(3 * n, n), dice.normal(3 * n), dice.normal(3 * n, n), dice.normal(3 * n)
    seed = int(dice.uniform(0, 1e6))

    def loss(mask: Tensor) -> Callable[[Any, Any], Tensor]:
        return lambda w, h: (((X * mask) @ w - y) ** 2).mean() / 2 + h * (w**2).sum() / 2

    def masked(w: Tensor, h: Tensor) -> Tensor:
        return loss(torch.nn.functional.dropout(torch.ones_like(X), 0.2))(w, h)

    torch.manual_seed(seed)
    mask = torch.nn.functional.dropout(torch.ones_like(X), 0.2)
    h = positive(dice.log(0.05, 1.0))
    known = KnownProblem(
        "dropout", loss(mask), lambda w, h: ((X_val @ w - y_val) ** 2).mean() / 2, torch.zeros(n).double(), h
    )
    free = dataclasses.replace(known, inner_loss=masked)
    return Case("dropout in the inner loss", True, all_runs(free, known.truth.gradient), seed=seed)


def float32(dice: Dice) -> Case:
    known = float32_known(dice, 10.0 ** dice.uniform(0, 2))
    return Case("float32, condition up to 1e2", True, float32_runs(known))
