"""Linear models: the training problems of all folds as one bilevel problem.

    inner   w_f = argmin  sum_i t_fi loss(x_i w, y_i) + 1/2 l2 sum_j own_j w_j^2 + l1 sum_j own_j |w_j|
    outer   min over strength and own   scoring's loss of w_f on the validation rows of fold f, and the prior of own

`strength` is scikit-learn's alpha or 1/C; a model says what multiples of it l2 and l1 are. With an l1, own_j is the
scale of column j, so that its part of l2 goes with own_j^2 (`bilevel.sklearn.strengths`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bilevel import prox
from bilevel.hyperparameters import positive
from bilevel.inner import NewtonCG, Proximal
from bilevel.inner.base import InnerSolver
from bilevel.problem import BilevelProblem
from bilevel.sklearn.folds import Design, Folds
from bilevel.sklearn.lasso import BlockLasso, OnSupport
from bilevel.sklearn.newton import BlockNewton, Factored
from bilevel.sklearn.scoring import Scoring, mean_losses
from bilevel.sklearn.tuning import Floats, Options, Row, Tuned, Watched, prior, run, try_each
from bilevel.solvers import Implicit
from bilevel.vector import Vector

DENSE_UP_TO = 500  # columns of a Hessian that is formed and factored for every fold and model
COUPLED_UP_TO = 150  # the same where all classes have one Hessian together
DECADES = np.arange(1.0, -6.5, -1.0)  # of the curvature: strengths that are tried before the run
PARTS = np.arange(-0.5, -3.6, -0.5)  # decades of the smallest l1 that holds all weights at zero
BEYOND = 1e4  # times the largest and below the smallest strength tried: as far as a run goes


@dataclass(frozen=True)
class Linear:
    """What scikit-learn minimizes for a linear model.

    Attributes:
        parameter: "alpha", or "C" for its inverse.
        losses: scores `(folds, models, n)`, targets `(models, n)` -> the shape of scores, or `(folds, 1, n)` where the
            models of a fold have one loss together.
        scorings: what it can be tuned for, by name; the first is the default.
        l2: what `strength` is multiplied by.
        l1: the same.
        mean: strengths refer to the weighted mean of the losses, not to their sum.
        intercept: whether there is one, and whether it is penalized like a weight (liblinear).
        scaling: the feature that the intercept is the weight of.
        classes: targets are classes.
        squares: losses are half of the squared errors.
        coupled: the models of a fold have one loss together (softmax).
        class_weight: scikit-learn's.
        scaled: losses take a third argument, the scale of the residuals `(folds, 1, 1)`, which is trained (Huber).
    """

    parameter: Literal["alpha", "C"]
    losses: Callable[..., Tensor]
    scorings: dict[str, Scoring]
    l2: float = 1.0
    l1: float = 0.0
    mean: bool = False
    intercept: Literal["free", "penalized", "none"] = "free"
    scaling: float = 1.0
    classes: bool = False
    squares: bool = False
    coupled: bool = False
    class_weight: Any = None
    scaled: bool = False

    def strength(self, estimator: Any) -> float:
        """Return the strength that an estimator has; where it has none, one to begin with."""
        value = float(getattr(estimator, self.parameter))
        return 1.0 if not value > 0.0 else value if self.parameter == "alpha" else 1.0 / value

    def params(self, strength: float) -> dict[str, Any]:
        """Return the setting of the estimator."""
        return {self.parameter: strength if self.parameter == "alpha" else 1.0 / strength}


class LinearSearch:
    """The search over the strengths of one linear model.

    Args:
        model: what is trained.
        folds: on which rows.
        targets: `(models, n)`.
        scoring: what is minimized on the validation rows.
        index: the strength of each column, `(d,)`; None: there is one strength.
        options: see `Options`.
        start: the strength that the user's estimator has.
    """

    def __init__(
        self,
        model: Linear,
        folds: Folds,
        targets: Tensor,
        scoring: Scoring,
        index: NDArray[np.int64] | None,
        options: Options,
        start: float,
    ) -> None:
        self.model, self.folds, self.targets, self.scoring, self.options = model, folds, targets, scoring, options
        self.index = None if index is None else torch.from_numpy(index)
        self.start = start
        self.design = Design(folds.rows, None if model.intercept == "none" else model.scaling)
        self.training = folds.training[:, None]
        if model.class_weight is not None and not model.coupled and len(targets) > 1:
            # One against the rest in liblinear: a class has its weight in its own model, the rest has none.
            self.training = torch.where(targets.bool(), self.training, folds.unbalanced[:, None])
        self.total = float(folds.training.sum())
        self.factor = folds.training.sum(1)[:, None, None] if model.mean else torch.ones(1, 1, 1, dtype=torch.float64)
        self.size = float(targets.std()) or 1.0  # of residuals, to begin with
        self.rows: list[Row] = []

    def run(self) -> Tuned:
        """Try a few common strengths, and go on from the best one with all of them by hypergradients."""
        method, solver = self._solver()
        watched = Watched(solver, self._see, penalties=getattr(solver, "penalties", ()))
        shape = (len(self.training), len(self.targets), self.design.shape[1])
        zeros = torch.zeros(shape, dtype=torch.float64)
        params = {"w": zeros}
        if self.model.scaled:
            params["log size"] = torch.zeros(len(self.training), 1, 1, dtype=torch.float64)
        tried = self._probes(zeros)
        low, high = min(tried) / BEYOND, max(tried) * BEYOND
        hparams: dict[str, Any] = {
            "strength": positive(self.start, low=min(low, self.start), high=max(high, self.start))
        }
        if self.index is not None:
            hparams["own"] = positive(1.0, shape=(int(self.index.max()) + 1,))
        # the strengths that are tried set the scale of the hypergradient at the start
        problem = BilevelProblem(self._inner, self._outer, params, hparams, watched)
        try_each(problem, "strength", sorted({*tried, self.start}, reverse=True), lambda: [r.loss for r in self.rows])
        best = min(self.rows, key=lambda row: row.loss)
        begin = self._strength(best)
        hparams["strength"] = positive(begin, low=min(low, begin), high=max(high, begin))
        problem = BilevelProblem(self._inner, self._outer, params, hparams, watched)
        solution = run(problem, method, self.options)
        return Tuned(self.rows, self._ended_at(solution), solution, solution.status)

    def _ended_at(self, solution: Any) -> int:
        """Return the row whose settings the run ended with."""
        end, own = math.log(float(solution.hparams["strength"])), solution.hparams.get("own")
        ratios = np.zeros(1) if own is None else own.log().numpy()

        def distance(row: Row) -> float:
            there = np.zeros(1) if row.own is None else np.log(row.own)
            return float(np.abs(ratios - there).max()) + abs(end - math.log(self._strength(row)))

        return min(range(len(self.rows)), key=lambda i: (distance(self.rows[i]), -i))

    def _strength(self, row: Row) -> float:
        value = float(row.params[self.model.parameter])
        return value if self.model.parameter == "alpha" else 1.0 / value

    def _solver(self) -> tuple[str | Implicit, InnerSolver]:
        """Return the method and the inner solver: with factors of their own where the Hessians are small."""
        model, p = self.model, self.design.shape[1]
        if model.l1 > 0.0:
            penalty = prox.L1(self._l1)
            if not model.squares or self.design.sparse or p > DENSE_UP_TO:
                return "implicit", Proximal(penalty)
            lasso = BlockLasso(
                self.design,
                self.targets[0],
                self.folds.training,
                lambda h: self._l1(h) * self.total,
                self._l2,
                model.intercept != "none",
                (penalty,),
            )
            return Implicit(OnSupport(lasso, self.total)), lasso
        if (
            self.design.sparse
            or p > DENSE_UP_TO
            or model.scaled
            or (model.coupled and p * len(self.targets) > COUPLED_UP_TO)
        ):
            return "implicit", NewtonCG()
        shift = 1.0 if model.coupled and model.intercept == "free" else 0.0
        newton = BlockNewton(self.design, self._losses, self.training, self._l2, model.coupled, shift)
        return Implicit(Factored(newton, self.total)), newton

    def _probes(self, zeros: Tensor) -> list[float]:
        """Return common strengths from hardly any weights to hardly any penalty."""
        with torch.enable_grad():
            scores = self.design.scores(zeros).requires_grad_()
            losses = (self.training * self._losses(scores)).sum()
            (first,) = torch.autograd.grad(losses, scores, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), scores)
        features = zeros.shape[-1] - (self.model.intercept != "none")
        if self.model.l1 > 0.0:
            centered = first.detach() - self.training * (first.detach().sum(-1) / self.training.sum(-1))[..., None]
            largest = self.design.back(centered)[..., :features].abs() / (self.factor * self.model.l1)
            return [float(largest.max()) * 10.0**part for part in PARTS]
        squares = self.design.squares(second.detach())[..., :features] / (self.factor * self.model.l2)
        curvature = float(squares.mean()) or 1.0
        return [curvature * 10.0**decade for decade in DECADES]

    def _losses(self, scores: Tensor, size: Tensor | None = None) -> Tensor:
        if not self.model.scaled:
            return self.model.losses(scores, self.targets)
        size = torch.ones(1, 1, 1, dtype=torch.float64) if size is None else size
        return self.model.losses(scores, self.targets, self.size * size)

    def _own(self, h: Any, power: float) -> Tensor:
        """Return the part of each weight's strength that is its column's own, `(p,)`."""
        d = self.folds.features
        own = torch.ones(d, dtype=torch.float64) if self.index is None else h["own"][self.index] ** power
        if self.model.intercept == "none":
            return own
        last = 1.0 if self.model.intercept == "penalized" else 0.0
        return torch.cat([own, torch.full((1,), last, dtype=torch.float64)])

    def _l2(self, h: Any) -> Tensor:
        l2: Tensor = h["strength"] * self.model.l2 * self.factor * self._own(h, 2.0 if self.model.l1 else 1.0)
        return l2

    def _l1(self, h: Any) -> Tensor:
        l1: Tensor = h["strength"] * self.model.l1 * self.factor * self._own(h, 1.0) / self.total
        return l1.expand(len(self.training), len(self.targets), -1)

    def _inner(self, params: Any, h: Any) -> Tensor:
        w = params["w"]
        size = params["log size"].exp() if self.model.scaled else None
        losses = (self.training * self._losses(self.design.scores(w), size)).sum()
        penalty = 0.5 * (self._l2(h) * w**2).sum()
        if self.model.coupled and self.model.intercept == "free":  # the same number added to all changes no softmax
            penalty = penalty + 0.5 * (w[..., -1].sum(1) ** 2).sum()
        loss: Tensor = (losses + penalty) / self.total
        return loss

    def _means(self, w: Tensor, weights: Tensor) -> Tensor:
        """Return the mean loss of the scoring on rows of each fold, `(folds,)`."""
        return mean_losses(self.scoring, self.design.scores(w), self.targets, weights)

    def _outer(self, params: Any, h: Any) -> Tensor:
        loss = self.scoring.outer(self._means(params["w"], self.folds.validation))
        if self.index is None or self.options.spread is None:
            return loss
        return loss + prior(h["own"], self.options.spread, self.targets.shape[1])

    def _scale(self, own: Tensor | None) -> Floats | None:
        if own is None or self.index is None:
            return None
        scale: Floats = (own[self.index] if self.model.l1 else own[self.index].sqrt()).numpy()
        return scale

    def _see(self, value: Vector, upper: Vector, seconds: float) -> None:
        with torch.no_grad():
            means = self._means(value["w"], self.folds.validation)
            trained = self._means(value["w"], self.folds.training)
            loss = float(self.scoring.outer(means))
        strength, own = float(upper["strength"]), upper.get("own")
        each = np.full(1, strength) if own is None else strength * own.numpy()
        told, alpha = self.scoring.told, self.model.parameter == "alpha"
        row = Row(
            self.model.params(strength),
            None if own is None else own.numpy(),
            (self.model.parameter, each if alpha else 1.0 / each),
            self._scale(own),
            told(means).numpy(),
            told(trained).numpy(),
            loss,
            seconds,
        )
        self.rows.append(row)
