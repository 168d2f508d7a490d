"""Random healthy problems and random traps, each with the hypergradient that is right where there is one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

import bilevel
from benchmarks.calibration import through_loop
from benchmarks.problems import Dice, Drawn, draw, inner_point
from bilevel import CG, GMRES, METHODS, MINRES, BilevelProblem, Implicit, Neumann, Truncated, inner, positive
from bilevel.oracle import KnownProblem
from bilevel.solvers import Estimator, estimator
from bilevel.solvers.about import about

ABOUT = {name: about(estimator(name)) for name in METHODS}
IMPLICIT = tuple(name for name, a in ABOUT.items() if a.begins == "solution" and a.derivatives == 2 and name != "auto")
FIRST_ORDER = tuple(name for name, a in ABOUT.items() if a.begins == "solution" and a.derivatives < 2)
UNROLLED = tuple(name for name, a in ABOUT.items() if a.unrolls)
NO_TRUTH = None  # no hypergradient exists or the method cannot see it: any trusted answer is wrong


@dataclass(frozen=True)
class Run:
    """One hypergradient to ask for.

    Attributes:
        method: the name of `bilevel.METHODS` that it counts for.
        estimator: with its settings.
        problem: for the library.
        truth: what is right, or `NO_TRUTH`.
        params: inner variables to take as they are; None: the library trains.
    """

    method: str
    estimator: Estimator
    problem: BilevelProblem
    truth: Any
    params: Any = None


@dataclass(frozen=True)
class Case:
    """One random problem under every method that applies.

    Attributes:
        name: which draw of `CASES`.
        healthy: the default settings should do.
        runs: the hypergradients to ask for.
        seed: torch's global seed for each of them.
        drawn: what rival libraries are given; None where they cannot express it.
        params: the inner point that they are given; None: the exact solution.
    """

    name: str
    healthy: bool
    runs: Sequence[Run]
    seed: int = 0
    drawn: Drawn | None = None
    params: Any = None


def _all(known: KnownProblem, truth: Any, methods: Sequence[str] = (), params: Any = None) -> list[Run]:
    methods = methods or (IMPLICIT if truth is NO_TRUTH else IMPLICIT + FIRST_ORDER)
    return [Run(name, estimator(name), known.problem(), truth, params) for name in methods]


def _loops(drawn: Drawn, methods: Sequence[str] = UNROLLED, steps: int = 100) -> list[Run]:
    """Unroll momentum steps from the start; the default window of 20 forgets what came before up to condition 30."""
    solver = inner.SGD(lr=1.0 / drawn.known.truth.curvature[1], momentum=0.5, steps=steps)
    truth = through_loop(drawn, solver, drawn.known.params)
    fit = [name for name in methods if name != "truncated" or drawn.condition <= 30.0]
    return [Run(name, estimator(name), drawn.known.problem(solver), truth) for name in fit]


# Healthy problems


def _plain(dice: Dice) -> Case:
    drawn = draw(dice, sizes=(5, 200), condition=(1, 1e4))
    runs = _all(drawn.known, drawn.known.truth.gradient) + _loops(drawn)
    return Case("strictly convex or near a strict minimum", True, runs, drawn=drawn)


def _orthonormal(dice: Dice) -> Case:
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
    return Case("orthonormal design (c I)", True, _all(known, known.truth.gradient) + _loops(drawn), drawn=drawn)


def _coupled(dice: Dice) -> Case:
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
        "coupled tensors, 0-d, unused ones", True, _all(known, known.truth.gradient) + _loops(drawn), drawn=drawn
    )


def _scalar(dice: Dice) -> Case:
    a, target = dice.log(0.1, 10.0), dice.uniform(0.3, 2.0)
    known = KnownProblem(
        "0-d",
        lambda w, h: a * (w - 1.0) ** 2 + h * w**2 + 0.1 * w**4,
        lambda w, h: (w - target) ** 2,
        torch.zeros((), dtype=torch.float64),
        positive(dice.log(0.1, 10.0)),
    )
    drawn = Drawn(known, "0-d", 1)
    return Case("one 0-d variable", True, _all(known, known.truth.gradient) + _loops(drawn), drawn=drawn)


def _scaled(dice: Dice) -> Case:
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
    return Case("scaled by 1e-12 or 1e12", True, _all(known, known.truth.gradient) + _loops(drawn), drawn=drawn)


def _dropout(dice: Dice) -> Case:
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
    return Case("dropout in the inner loss", True, _all(free, known.truth.gradient), seed=seed)


def _float32(dice: Dice) -> Case:
    known = _single(dice, 10.0 ** dice.uniform(0, 2))
    return Case("float32, condition up to 1e2", True, _single_runs(known))


# Traps


def _ill_float32(dice: Dice) -> Case:
    known = _single(dice, 10.0 ** dice.uniform(3, 8))
    return Case("float32, condition 1e3 to 1e8", False, _single_runs(known))


def _single(dice: Dice, condition: float) -> KnownProblem:
    """Ridge or logistic regression with the same losses in float32 and float64: the data are float32 numbers."""
    n = int(dice.log(4, 60))
    Q, roots = dice.rotation(n), dice.logs(1.0 / condition, 1.0, n).sqrt()
    X, X_val = (((dice.normal(3 * n, n) * roots) @ Q.T).float().double() for _ in range(2))
    truth = dice.normal(n)
    strength = positive(float(torch.tensor(0.5 / condition)))
    y, y_val = ((x @ truth + dice.normal(3 * n)).float().double() for x in (X, X_val))
    if dice.choice((True, False)):

        def inner_loss(w: Tensor, h: Tensor) -> Tensor:
            return ((X.to(w.dtype) @ w - y.to(w.dtype)) ** 2).mean() / 2 + h * (w**2).sum() / 2
    else:

        def inner_loss(w: Tensor, h: Tensor) -> Tensor:
            return softplus(-y.sign().to(w.dtype) * (X.to(w.dtype) @ w)).mean() + h * (w**2).sum() / 2

    return KnownProblem(
        "float32",
        inner_loss,
        lambda w, h: ((X_val.to(w.dtype) @ w - y_val.to(w.dtype)) ** 2).mean() / 2,
        torch.zeros(n, dtype=torch.float64),
        strength,
    )


def _single_runs(known: KnownProblem) -> list[Run]:
    value = known.hparams.value
    problem = BilevelProblem(known.inner_loss, known.outer_loss, known.params.float(), positive(value.float()))
    return [Run(name, estimator(name), problem, known.truth.gradient) for name in IMPLICIT]


def _ill_float64(dice: Dice) -> Case:
    drawn = draw(dice, family=dice.choice(("ridge", "logistic", "quadratic")), sizes=(5, 60), condition=(1e5, 1e7))
    return Case("float64, condition 1e5 to 1e7", False, _all(drawn.known, drawn.known.truth.gradient), drawn=drawn)


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


def _saddle(dice: Dice) -> Case:
    """A stationary point that is no minimum."""
    n = int(dice.log(3, 160))
    values = dice.logs(dice.log(1e-3, 1.0), 1.0, n)
    values[: int(dice.uniform(1, n))] *= -1.0
    known, point = _quadratic_form(dice, values, dice.normal(n), dice.normal(n))
    drawn = Drawn(known, "saddle", n)
    return Case("saddle", False, _all(known, NO_TRUTH, params=point), drawn=drawn, params=point)


def _indefinite(dice: Dice) -> Case:
    """A network that is not at a minimum: its Hessian is indefinite and its gradient is not small."""
    drawn = draw(dice, family="tanh network", sizes=(10, 60))
    params = optree.tree_map(lambda t: t + dice.log(0.1, 1.0) * dice.normal(*t.shape), drawn.known.truth.params)
    runs = _all(drawn.known, drawn.known.truth.gradient, params=params)
    return Case("network away from its minimum", False, runs, drawn=drawn, params=params)


def _singular(dice: Dice) -> Case:
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
    return Case("singular, consistent", False, _all(target_only, truth, params=point))


def _seen_only(known: KnownProblem, point: Tensor) -> Callable[[Any, Any], Tensor]:
    direction = point / point.norm()
    return lambda w, h: (direction @ w - 0.3) ** 2


def _inconsistent(dice: Dice) -> Case:
    """Directions that only the outer loss sees: the inner solution, and so the hypergradient, is not defined."""
    n = int(dice.log(4, 160))
    values, b, target = dice.logs(0.1, 1.0, n), dice.normal(n), dice.normal(n)
    null = int(dice.uniform(1, n - 1))
    values[:null], b[:null] = 0.0, 0.0
    known, point = _quadratic_form(dice, values, b, target)
    return Case("singular, inconsistent", False, _all(known, NO_TRUTH, params=point))


def _not_converged(dice: Dice) -> Case:
    drawn = draw(dice, sizes=(5, 160), condition=(1, 1e5))
    kind = dice.choice(("residual", "noise", "lbfgs", "gradient descent"))
    params = inner_point(dice, drawn.known, kind, dice.log(1e-4, 1e-1))
    runs = _all(drawn.known, drawn.known.truth.gradient, params=params)
    return Case("inner problem not converged", False, runs, drawn=drawn, params=params)


def _early(dice: Dice) -> Case:
    drawn = draw(dice, sizes=(10, 160), condition=(10, 1e5))
    steps = int(dice.log(1, 30))
    solvers = {"cg": CG(max_steps=steps), "minres": MINRES(max_steps=steps), "gmres": GMRES(max_steps=steps)}
    solvers["neumann"] = Neumann(max_steps=steps)  # type: ignore[assignment]
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


def _neumann_diverges(dice: Dice) -> Case:
    drawn = draw(dice, sizes=(5, 80), condition=(1, 1e4))
    size = dice.log(2.05, 100.0) / drawn.known.truth.curvature[1]
    method = Implicit(Neumann(max_steps=int(dice.log(1, 200)), step_size=size))
    run = Run("neumann", method, drawn.known.problem(), drawn.known.truth.gradient, drawn.known.truth.params)
    return Case("Neumann with a step too large", False, [run])


def _short_window(dice: Dice) -> Case:
    drawn = draw(dice, sizes=(5, 60), condition=(10, 1e5))
    steps = int(dice.log(20, 300))
    solver = inner.SGD(
        lr=dice.uniform(0.3, 1.5) / drawn.known.truth.curvature[1], momentum=dice.choice((0.0, 0.5, 0.9)), steps=steps
    )
    truth = through_loop(drawn, solver, drawn.known.params)
    run = Run("truncated", Truncated(steps=int(dice.log(1, 20))), drawn.known.problem(solver), truth)
    return Case("truncated window too short", False, [run])


def _learning_rate(dice: Dice) -> Case:
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


def _once(dice: Dice) -> Case:
    drawn = draw(dice, family="ridge", sizes=(4, 20), condition=(1, 100))
    known = dataclasses.replace(
        drawn.known, inner_loss=lambda w, h: drawn.known.inner_loss(w, h) + 0.1 * Once.apply(w).sum()
    )
    loop = inner.SGD(lr=0.1 / drawn.known.truth.curvature[1], steps=20)
    runs = _all(known, NO_TRUTH)
    runs += [Run(name, estimator(name), known.problem(loop), NO_TRUTH) for name in UNROLLED]
    smooth = dataclasses.replace(drawn.known, inner_loss=lambda w, h: drawn.known.inner_loss(w, h) + 0.1 * (w**2).sum())
    runs += _all(known, smooth.truth.gradient, FIRST_ORDER)
    return Case("once-differentiable function", False, runs)


def _adamw(dice: Dice) -> Case:
    """AdamW decays outside of the inner loss: its end is no stationary point. The truth is its own loop."""
    drawn = draw(dice, family="ridge", sizes=(4, 20), condition=(1, 100))
    solver = inner.AdamW(lr=dice.log(3e-3, 3e-2), weight_decay=dice.log(1e-2, 1.0), steps=300)
    problem = drawn.known.problem(solver)
    truth = bilevel.hypergradient(problem, "unroll").gradient
    return Case("AdamW's weight decay", False, [Run(name, estimator(name), problem, truth) for name in IMPLICIT])


def _zero(dice: Dice) -> Case:
    """The outer loss is at its minimum: the hypergradient is zero, and its relative error is not defined."""
    drawn = draw(dice, family="ridge", sizes=(4, 60), condition=(1, 1e3))
    best = drawn.known.truth.params
    known = dataclasses.replace(drawn.known, outer_loss=lambda w, h: ((w - best) ** 2).sum())
    truth = torch.zeros_like(drawn.known.truth.gradient)
    return Case("zero hypergradient", False, _all(known, truth, params=best))


def _minibatches(dice: Dice) -> Case:
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


def _separable(dice: Dice) -> Case:
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
        "separable classes", False, _all(known, known.truth.gradient, params=params), drawn=drawn, params=params
    )


def _noise_free(dice: Dice) -> Case:
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


def _resting_step(dice: Dice) -> Case:
    """A schedule whose last learning rate is zero, under methods that differentiate the last step."""
    drawn = draw(dice, sizes=(3, 20), condition=(1, 30), family=dice.choice(("quadratic", "ridge")))
    steps, high = 300, drawn.known.truth.curvature[1]
    lr, momentum = (lambda h, step: (1.0 - step / (steps - 1)) / high), dice.choice((0.0, 0.5))
    solver = inner.SGD(lr=lr, momentum=momentum, steps=steps)
    truth = drawn.known.truth.gradient
    runs = [Run(m, estimator(m), drawn.known.problem(solver), truth) for m in ("one-step", "fixed-point", "sama")]
    return Case("last learning rate of zero", False, runs)


# Draw, and how often: healthy problems are half of all.
CASES: dict[Callable[[Dice], Case], int] = {
    _plain: 7,
    _orthonormal: 2,
    _coupled: 2,
    _scalar: 1,
    _scaled: 2,
    _dropout: 1,
    _float32: 2,
    _ill_float32: 1,
    _ill_float64: 1,
    _saddle: 1,
    _indefinite: 1,
    _singular: 1,
    _inconsistent: 1,
    _not_converged: 3,
    _early: 1,
    _neumann_diverges: 1,
    _short_window: 1,
    _learning_rate: 1,
    _once: 1,
    _adamw: 1,
    _zero: 1,
    _minibatches: 1,
    _separable: 1,
    _noise_free: 1,
    _resting_step: 1,
}


def draw_case(seed: int) -> Case:
    """Return the case of a seed."""
    dice = Dice(seed)
    return dice.choice([build for build, times in CASES.items() for _ in range(times)])(dice)


def error_of(found: Any, truth: Any) -> float:
    """Return the relative error, against the size of `found` in float64; infinite where it is not finite."""
    left, right = (
        torch.cat([t.detach().double().reshape(-1) for t in optree.tree_leaves(side)]) for side in (found, truth)
    )
    size = float(right.norm())
    error = float((left - right).norm()) / (size if size > 0.0 else 1.0)
    return error if math.isfinite(error) else math.inf
