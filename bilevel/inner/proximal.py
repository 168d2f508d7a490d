"""Accelerated proximal gradient steps for penalties with kinks, finished by Newton steps on the piece that they find.

    w+ = prox_{ψ/L}(y - ∇g(y) / L)      y = w + t / (t + 3) (w - w-)

Beck and Teboulle, A fast iterative shrinkage-thresholding algorithm, SIAM J. Imaging Sciences 2 (2009); restarts:
O'Donoghue and Candès, Adaptive restart for accelerated gradient schemes, Found. Comput. Math. 15 (2015), the gradient
scheme. The support is found after finitely many steps (Bertrand and others, JMLR 23, 2022, section 3.2), and sooner
with Newton steps by conjugate gradients on the free entries, cut where they leave the piece; on the support they go to
the end of the digits.
Deliberate difference from the textbook: no line search, which compares values and so loses half of the digits. L is
measured at the start, and raised when two gradients met differ by more than L times their distance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from bilevel.errors import NonFiniteError
from bilevel.inner.base import InnerSolution, Task, check_fixed_loss
from bilevel.prox.base import Penalty, as_penalties, assign
from bilevel.prox.piece import Piece
from bilevel.solvers.base import Linearization
from bilevel.solvers.linear.base import check_settings
from bilevel.solvers.linear.cg import CG
from bilevel.solvers.linear.lanczos import extreme_eigenvalues
from bilevel.vector import Vector, axpy, detach, dot, is_finite, norm, subtract

WAIT = 10  # steps before Newton steps are tried; twice as many after each failure
NEWTON_STEPS = 8
NEWTON_RTOL = 1e-2  # each Newton step shrinks the gradient about this much on a quadratic
HALVINGS = 6  # of a Newton step that leaves its piece
VALUE_RTOL = 1e-10  # part of its value by which the loss must fall there; less is too near to rounding
ARMIJO = 1e-4  # part of the first-order decrease that such a step must bring
NEWTON_PRODUCTS = 500  # most products of one Newton step
ROUGH = 1.05  # a gradient may change by this much more than L says before L counts as too small
ROUNDING = 8.0  # units in the last place of w: a shorter step is none


@dataclass(frozen=True)
class Proximal:
    """Minimize `inner_loss` plus a penalty with kinks, or under bounds, to the end.

    For deterministic problems. `inner_loss` is the smooth part alone. Implicit methods differentiate the solution on
    its support (see docs/lasso.md).

    Args:
        penalty: one of `bilevel.prox`, or a list of them for different tensors (`on=`).
        rtol: stop when the proximal gradient is below rtol times the gradient of `inner_loss` at `params`; None:
            1e-10 in float64, 1e-5 in float32. The hypergradient's error is this times the condition number.
        max_steps: most proximal gradient steps.

    >>> import torch, bilevel
    >>> problem = bilevel.BilevelProblem(  # the lasso with an orthonormal design: w = y - l1 where y > l1
    ...     lambda w, h: 0.5 * ((w - torch.tensor([3.0, 1.0])) ** 2).sum(), lambda w, h: w.sum(),
    ...     params=torch.zeros(2), hparams=bilevel.positive(2.0),
    ...     inner_solver=bilevel.inner.Proximal(bilevel.prox.L1(lambda h: h)))
    >>> h = bilevel.hypergradient(problem)
    >>> h.params, h.gradient
    (tensor([1., 0.]), tensor(-1.))
    """

    penalty: Penalty | Sequence[Penalty]
    rtol: float | None = None
    max_steps: int = 20_000
    needs_fixed_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        as_penalties(self.penalty, "inner.Proximal")
        check_settings(self.rtol, self.max_steps)

    @property
    def penalties(self) -> tuple[Penalty, ...]:
        """See `InnerSolver`."""
        return as_penalties(self.penalty, "inner.Proximal")

    def solve(self, task: Task, lower: Vector, upper: Vector) -> InnerSolution:
        """See `InnerSolver.solve`."""
        instead = "inner_solver=bilevel.inner.ProximalGradient(penalty, lr=..., momentum=0.0, steps=...)"
        check_fixed_loss(task, "inner.Proximal", f"take steps on minibatches: {instead}")
        run = _Run(task, lower, upper, self.penalties)
        threshold = self._rtol(run.dtype) * task.start_gradient_norm(upper)
        while run.steps < self.max_steps:
            run.step()
            if run.residual <= max(threshold, run.rounding()):
                return InnerSolution(run.w, run.steps, "converged")
            if run.waited >= run.wait:
                run.newton(threshold)
        return InnerSolution(run.w, run.steps, "max_steps")

    def _rtol(self, dtype: torch.dtype) -> float:
        if self.rtol is not None:
            return self.rtol
        return 1e-10 if dtype == torch.float64 else 1e-5


class _Run:
    """The state of one solve; w, y and L are the textbook's.

    Attributes:
        residual: L |y - w+|, which bounds half of the smallest subgradient at w+.
        waited: steps since Newton steps were tried.
        wait: so many of them before they are tried again.
    """

    def __init__(self, task: Task, lower: Vector, upper: Vector, penalties: Sequence[Penalty]) -> None:
        self._task, self._upper, self._batch = task, detach(upper), task.draw()
        self._penalties = assign(penalties, task.params)
        self.dtype = next(iter(lower.values())).dtype
        self._eps = torch.finfo(self.dtype).eps
        with task.hparams(self._upper) as hparams:
            self._amounts = {name: p.amounts(lower[name], hparams) for name, p in self._penalties.items()}
        self.w = self._prox(detach(lower), 0.0)
        self._before, self._t = self.w, 0
        self._last: tuple[Vector, Vector] | None = None  # y and its gradient
        self.steps, self.waited, self.wait, self.residual = 0, 0, WAIT, math.inf
        whole = Linearization(task.on(self._piece_of(self.w).everywhere()), self.w, self._upper)
        self._L = max(map(abs, extreme_eigenvalues(whole.operator)))
        if not self._L > 0.0:  # no curvature: any length will do to begin with
            self._L = float(norm(whole.residual)) / (float(norm(self.w)) or 1.0) or 1.0

    def step(self) -> None:
        """Take one accelerated step; the momentum starts anew where it leads uphill."""
        y = axpy(self._t / (self._t + 3.0), subtract(self.w, self._before), self.w)
        g = self._gradient(y)
        self._raise_bound(y, g)
        after = self._prox(axpy(-1.0 / self._L, g, y), 1.0 / self._L)
        gone = subtract(y, after)
        self.residual = self._L * float(norm(gone))
        uphill = float(dot(gone, subtract(after, self.w))) > 0.0
        self._before, self.w = (after if uphill else self.w), after
        self._t = 0 if uphill else self._t + 1
        self.steps += 1
        self.waited += 1

    def _raise_bound(self, y: Vector, g: Vector) -> None:
        """Raise L where two gradients in a row differ by more than it allows."""
        if self._last is not None:
            apart, turned = (float(norm(subtract(now, was))) for now, was in zip((y, g), self._last, strict=True))
            if turned > ROUGH * self._L * apart + math.sqrt(self._eps) * float(norm(g)):
                self._L, self._t = 1.5 * turned / apart if apart > 0.0 else 2.0 * self._L, 0
        self._last = y, g

    def rounding(self) -> float:
        """Return the residual below which steps are no longer than w's last digits."""
        return ROUNDING * self._eps * self._L * float(norm(self.w))

    def newton(self, threshold: float) -> None:
        """Take Newton steps on the present piece, and keep them if they lead closer to the solution."""
        piece = self._piece_of(self.w)
        found, leaving = self._descend(piece, threshold)
        if leaving is None:
            better = self._stillness(found) < 0.5 * self._stillness(self.w)
        else:
            found, better = self._backtrack(found, *leaving, piece)
        self.waited, self.wait = 0, (1 if better else 2 * max(self.wait, WAIT))
        if better:
            self.w = self._before = found
            self._t, self._last = 0, None

    def _descend(self, piece: Piece, threshold: float) -> tuple[Vector, tuple[Vector, Vector] | None]:
        """Return the end of Newton steps while R shrinks; the step that would leave the piece, and R there."""
        best, smallest, candidate = self.w, math.inf, self.w
        for _ in range(NEWTON_STEPS):
            system = Linearization(self._task.on(piece), candidate, self._upper)
            size = float(norm(system.residual))
            if not size < 0.5 * smallest:
                return (candidate if size < smallest else best), None
            best, smallest = candidate, size
            if size <= 0.1 * threshold:
                break
            step = CG(rtol=NEWTON_RTOL, max_steps=NEWTON_PRODUCTS).solve(system.operator, system.residual)
            if step.status == "nonpositive curvature":
                break
            candidate = detach(subtract(candidate, step.value))
            if not self._piece_of(candidate).same(piece):
                return best, (step.value, system.residual)
        return best, None

    def _backtrack(self, w: Vector, step: Vector, residual: Vector, piece: Piece) -> tuple[Vector, bool]:
        """Return w - α step, put back on the edge of the piece, for the longest α that lowers the loss; if one does.

        Bertsekas, Projected Newton methods, SIAM J. Control Optim. 20 (1982).
        """
        value = self._loss(w)
        visible = VALUE_RTOL * abs(value)
        for k in range(HALVINGS):
            trial = self._closest(axpy(-(0.5**k), step, w), piece)
            if value - self._loss(trial) > max(visible, ARMIJO * float(dot(residual, subtract(w, trial)))):
                return trial, True
        return w, False

    def _loss(self, w: Vector) -> float:
        """Return g + ψ."""
        loss, _ = self._task.value_and_gradient(w, self._upper, self._batch, pinned=True)
        penalties = (float(p.evaluate(w[n], self._amounts[n])) for n, p in self._penalties.items())
        return float(loss.detach()) + sum(penalties)

    def _stillness(self, w: Vector) -> float:
        """Return the length of the proximal gradient at w."""
        after = self._prox(axpy(-1.0 / self._L, self._gradient(w), w), 1.0 / self._L)
        return self._L * float(norm(subtract(w, after)))

    def _closest(self, w: Vector, piece: Piece) -> Vector:
        """Return w with the entries that left the piece put at the kink that they crossed."""
        back = dict(w)
        for name, part in piece.parts.items():
            now = self._amounts[name]
            crossed = part.penalty.pattern(w[name], now) != part.pattern
            kink = part.penalty.proximal(torch.zeros_like(w[name]), 0.0, now)
            inside = part.penalty.proximal(w[name], 0.0, now)
            back[name] = torch.where(crossed, torch.where(inside != w[name], inside, kink), w[name])
        return back

    def _gradient(self, w: Vector) -> Vector:
        _, gradient = self._task.value_and_gradient(w, self._upper, self._batch, pinned=True)
        if not is_finite(gradient):
            raise NonFiniteError("the gradient of the inner loss is not finite during inner.Proximal", "inner gradient")
        return gradient

    def _prox(self, v: Vector, step: float) -> Vector:
        moved = {n: p.proximal(v[n], step, self._amounts[n]) for n, p in self._penalties.items()}
        return detach({name: moved.get(name, t) for name, t in v.items()})

    def _piece_of(self, w: Vector) -> Piece:
        with self._task.hparams(self._upper) as hparams:
            return Piece.at(self._penalties, w, hparams)
