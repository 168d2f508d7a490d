"""Random traps of the problem itself: its condition, its curvature, its losses and its data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.cases import FIRST_ORDER, IMPLICIT, NO_TRUTH, UNROLLED, Case, Run, all_runs, float32_known, float32_runs
from benchmarks.problems import Dice, Drawn, draw, inner_point
from bilevel import inner, positive
from bilevel.oracle import KnownProblem
from bilevel.solvers import estimator


def ill_float32(dice: Dice) -> Case:
    known = float32_known(dice, 10.0 ** dice.uniform(3, 8))
    return Case("float32, condition 1e3 to 1e8", False, float32_runs(known))


def ill_float64(dice: Dice) -> Case:
    drawn = draw(dice, family=dice.choice(("ridge", "logistic", "quadratic")), sizes=(5, 60), condition=(1e5, 1e7))
    return Case("float64, condition 1e5 to 1e7", False, all_runs(drawn.known, drawn.known.truth.gradient), drawn=drawn)


def _quadratic_form(dice: Dice, values: Tensor, b: Tensor, target: Tensor) -> tuple[KnownProblem, Tensor]:
    """Return w·Aw / 2 - h b·w with these eigenvalues, and its stationary point for h = 1."""
    n = len(values)
    Q = dice.rotation(n)
    A = (Q * values) @ Q.T
    known = KnownProblem(
        "quadratic form",
        lambda w, h: w @ (A @ w) / 2 - h * (Q @ b) @ w,
        lambda w, h: ((w - Q @ target) ** 2).sum() / 2,
        torch.zeros(n, dtype=torch.float64),
        positive(1.0),
    )
    return known, Q @ torch.where(values == 0.0, torch.zeros_like(b), b / values)


def saddle(dice: Dice) -> Case:
    """A stationary point that is no minimum."""
    n = int(dice.log(3, 160))
    values = dice.logs(dice.log(1e-3, 1.0), 1.0, n)
    values[: int(dice.uniform(1, n))] *= -1.0
    known, point = _quadratic_form(dice, values, dice.normal(n), dice.normal(n))
    drawn = Drawn(known, "saddle", n)
    return Case("saddle", False, all_runs(known, NO_TRUTH, params=point), drawn=drawn, params=point)


def indefinite(dice: Dice) -> Case:
    """A network that is not at a minimum: its Hessian is indefinite and its gradient is not small."""
    drawn = draw(dice, family="tanh network", sizes=(10, 60))
    params = optree.tree_map(lambda t: t + dice.log(0.1, 1.0) * dice.normal(*t.shape), drawn.known.truth.params)
    runs = all_runs(drawn.known, drawn.known.truth.gradient, params=params)
    return Case("network away from its minimum", False, runs, drawn=drawn, params=params)


def singular(dice: Dice) -> Case:
    """Directions that neither loss bends: harmless, since the outer loss does not see them."""
    n = int(dice.log(4, 160))
    values, b, target = dice.logs(0.1, 1.0, n), dice.normal(n), dice.normal(n)
    null = int(dice.uniform(1, n - 1))
    values[:null], b[:null] = 0.0, 0.0
    known, point = _quadratic_form(dice, values, b, target)
    target_only = dataclasses.replace(known, outer_loss=_seen_only(known, point))
    h = torch.ones((), dtype=torch.float64)
    # w* = h point, F = |w* - t|^2 / 2 over what is seen, so dF/dh = (point - t)·point.
    (truth,) = torch.autograd.grad(target_only.outer_loss(point * h.requires_grad_(), h), h)
    return Case("singular, consistent", False, all_runs(target_only, truth, params=point))


def _seen_only(known: KnownProblem, point: Tensor) -> Callable[[Any, Any], Tensor]:
    direction = point / point.norm()
    return lambda w, h: (direction @ w - 0.3) ** 2


def inconsistent(dice: Dice) -> Case:
    """Directions that only the outer loss sees: the inner solution, and so the hypergradient, is not defined."""
    n = int(dice.log(4, 160))
    values, b, target = dice.logs(0.1, 1.0, n), dice.normal(n), dice.normal(n)
    null = int(dice.uniform(1, n - 1))
    values[:null], b[:null] = 0.0, 0.0
    known, point = _quadratic_form(dice, values, b, target)
    return Case("singular, inconsistent", False, all_runs(known, NO_TRUTH, params=point))


class Once(torch.autograd.Function):
    """A square whose second derivative is missing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2.0 * x * grad


def once(dice: Dice) -> Case:
    drawn = draw(dice, family="ridge", sizes=(4, 20), condition=(1, 100))
    known = dataclasses.replace(
        drawn.known, inner_loss=lambda w, h: drawn.known.inner_loss(w, h) + 0.1 * Once.apply(w).sum()
    )
    loop = inner.SGD(lr=0.1 / drawn.known.truth.curvature[1], steps=20)
    runs = all_runs(known, NO_TRUTH)
    runs += [Run(name, estimator(name), known.problem(loop), NO_TRUTH) for name in UNROLLED]
    smooth = dataclasses.replace(drawn.known, inner_loss=lambda w, h: drawn.known.inner_loss(w, h) + 0.1 * (w**2).sum())
    runs += all_runs(known, smooth.truth.gradient, FIRST_ORDER)
    return Case("once-differentiable function", False, runs)


def zero(dice: Dice) -> Case:
    """The outer loss is at its minimum: the hypergradient is zero, and its relative error is not defined."""
    drawn = draw(dice, family="ridge", sizes=(4, 60), condition=(1, 1e3))
    best = drawn.known.truth.params
    known = dataclasses.replace(drawn.known, outer_loss=lambda w, h: ((w - best) ** 2).sum())
    truth = torch.zeros_like(drawn.known.truth.gradient)
    return Case("zero hypergradient", False, all_runs(known, truth, params=best))


def separable(dice: Dice) -> Case:
    """Logistic regression on separable data, hardly regularized: small gradients far from the solution."""
    n = int(dice.log(3, 30))
    X, X_val, truth = dice.normal(2 * n, n), dice.normal(2 * n, n), dice.normal(n)
    sign, sign_val = torch.sign(X @ truth), torch.sign(X_val @ truth + dice.normal(2 * n))
    known = KnownProblem(
        "separable",
        lambda w, h: softplus(-sign * (X @ w)).mean() + h * (w**2).sum() / 2,
        lambda w, h: softplus(-sign_val * (X_val @ w)).mean(),
        torch.zeros(n, dtype=torch.float64),
        positive(dice.log(1e-7, 1e-2)),
    )
    params = inner_point(dice, known, dice.choice(("lbfgs", "gradient descent")))
    drawn = Drawn(known, "logistic", n)
    return Case(
        "separable classes", False, all_runs(known, known.truth.gradient, params=params), drawn=drawn, params=params
    )


def noise_free(dice: Dice) -> Case:
    """Data without noise, loosely solved: ∂f/∂w nearly vanishes, and a small error of w is a large one of dF/dλ."""
    n = int(dice.log(4, 40))
    X, X_val, w = dice.normal(3 * n, n), dice.normal(3 * n, n), dice.normal(n)
    known = KnownProblem(
        "noise-free ridge",
        lambda v, h: ((X @ (v - w)) ** 2).mean() + h * (v**2).sum(),
        lambda v, h: ((X_val @ (v - w)) ** 2).mean(),
        torch.zeros(n, dtype=torch.float64),
        positive(dice.log(1e-7, 1e-3)),
    )
    solver = inner.LBFGS(rtol=dice.log(1e-9, 1e-4))
    truth = known.truth.gradient
    runs = [Run(name, estimator(name), known.problem(solver), truth) for name in (*IMPLICIT, "finite-difference")]
    return Case("data without noise, loosely solved", False, runs)
