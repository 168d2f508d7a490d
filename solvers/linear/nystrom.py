"""Nyström approximation of a symmetric positive semidefinite matrix: its inverse, or a preconditioner.

    A ~ C W^+ C^T = U Λ U^T                                   C = A Ω, W = Ω^T A Ω, Ω `(n, rank)` orthonormal
    (U Λ U^T + ρ I)^-1 r = U (Λ + ρ)^-1 U^T r + (r - U U^T r) / ρ                                  the inverse
    M^-1 r = (λ + ρ) U (Λ + ρ)^-1 U^T r + (r - U U^T r),  λ the last of Λ                   the preconditioner

Hataya and Yamada, Nyström method for accurate and scalable implicit differentiation, AISTATS 2023, equations 5 to 7
(Woodbury), with random columns of A; Frangella, Tropp and Udell, Randomized Nyström preconditioning, SIAM J. Matrix
Anal. Appl. 44 (2023), algorithm 2.1 (Gaussian Ω, and a shift by the rounding of A Ω that keeps W definite) and
equation 1.3. Deliberate difference: without a given ρ the inverse is not damped. The curvature of the part of r
that the sketch says nothing about is measured by one product; that is ρ outside of U, and no Λ counts as smaller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bilevel.errors import InvalidValueError
from bilevel.operators import LinearOperator
from bilevel.solvers.about import Terms
from bilevel.solvers.linear.base import (
    LinearSolution,
    Preconditioner,
    Status,
    check_count,
    default_rtol,
    dtype_of,
    inner,
    wide,
)
from bilevel.vector import Vector, unflatten

ROUNDING = 100.0  # times the shift: an eigenvalue of W that far below zero is negative, one that near it says nothing
WORSE = 2.0  # a kept sketch that leaves so many times the residual of its first answer is drawn again
SLIGHT = 1e-3  # a negative curvature, relative to the largest, where a flat direction may have either sign
SEEN = 1e3  # times the machine precision: what is left of r outside of U is rounding


@dataclass(frozen=True)
class Sketch:
    """U Λ U^T, and the smallest Rayleigh quotient in the span of Ω.

    Attributes:
        basis: U, `(n, k)`, orthonormal columns.
        values: Λ, `(k,)`, positive, largest first.
        lowest: the smallest eigenvalue of W that is not rounding; infinite for none, and for a sketch that was kept,
            since A has moved on.
    """

    basis: Tensor
    values: Tensor
    lowest: float


@dataclass(frozen=True)
class Nystrom:
    """Approximate A^-1 b by a low-rank sketch of A; the sketch is kept while it serves.

    Also a preconditioner, which changes the number of products and not the answer:
    `bilevel.CG(preconditioner=bilevel.Nystrom(rank=50))`.

    Args:
        rank: products spent on a new sketch, and `rank` vectors held; larger is more accurate.
        damping: ρ; the answer is that of A + ρ I, as in the paper. None: no damping, see above.
        sketch: "gaussian", or "columns" of A drawn at random, as in the paper: for a Hessian of many
            alike entries no worse, for one with a few strong ones it misses them.
        seed: of Ω, whatever torch's global random state is.

    >>> import torch
    >>> from bilevel.operators import LinearOperator
    >>> A = LinearOperator(lambda v: {"w": 4.0 * v["w"]}, {"w": torch.zeros(2)}, symmetric=True)
    >>> Nystrom(rank=1).solve(A, {"w": torch.ones(2)}).value["w"]
    tensor([0.2500, 0.2500])
    """

    rank: int = 20
    damping: float | None = None
    sketch: Literal["gaussian", "columns"] = "gaussian"
    seed: int = 0
    truncates: ClassVar[bool] = True
    terms: ClassVar[Terms] = Terms(
        "k + 2 products in blocks, k = 20 the rank; 2 while the sketch is kept",
        "k vectors of n",
        "what lies beyond the rank; measured",
        "Hataya & Yamada 2023",
    )

    def __post_init__(self) -> None:
        check_count(self.rank, "rank")
        if self.damping is not None and not 0.0 < self.damping < math.inf:
            raise InvalidValueError(
                f"`damping` is {self.damping!r}, expected a positive number, or None for no damping"
            )
        if self.sketch not in ("gaussian", "columns"):
            raise InvalidValueError(f'`sketch` is {self.sketch!r}, expected "gaussian" or "columns"')
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise InvalidValueError(f"`seed` is {self.seed!r}, expected a whole number")

    def solve(self, operator: LinearOperator, rhs: Vector, start: Vector | None = None) -> LinearSolution:
        """Approximate the solution of A x = rhs; a function of the sketch and rhs alone, not of `start`."""
        if not operator.symmetric:
            raise InvalidValueError('Nystrom needs a symmetric operator and this one is not; use method="gmres"')
        b, kept, steps = wide(rhs), operator.kept, 0
        if not bool(b.any()):
            return LinearSolution(rhs, "converged", 0, rhs, 0.0, None, kept=kept)
        step = None
        if kept is not None:
            step, steps = self._step(operator, b, _restored(kept)), 1
        if step is None or step.has_aged(kept["left"]):
            step = self._step(operator, b, self.draw(operator))
            kept, steps = step.kept(), steps + min(self.rank, operator.size)
        status = "converged" if step.left <= default_rtol(None, dtype_of(rhs)) else step.status
        residual = unflatten(step.residual, rhs)
        found = LinearSolution(unflatten(step.value, rhs), status, steps, residual, step.left, step.curvature)
        return replace(found, kept=kept, notes=(self._note(step),))

    def _note(self, step: _Step) -> str:
        if self.damping is not None:
            return (
                f"the Nyström inverse of rank {len(step.sketch.values)} is that of the Hessian + {self.damping:.2g} I"
            )
        outside = f"; outside of its range, a curvature of {step.outside:.2g} was measured" if step.outside else ""
        return f"the Nyström inverse is of rank {len(step.sketch.values)}{outside}"

    def draw(self, operator: LinearOperator) -> Sketch:
        """Return a new sketch of A."""
        like, n = next(iter(operator.like.values())), operator.size
        k, generator = min(self.rank, n), torch.Generator().manual_seed(self.seed)
        if self.sketch == "columns":
            rows = torch.zeros(k, n, dtype=torch.float64)
            rows[torch.arange(k), torch.randperm(n, generator=generator)[:k]] = 1.0
        else:
            rows = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q.T
        test = rows.to(like).double()
        products = operator.each(test.to(like)).double()
        shift = torch.finfo(like.dtype).eps * float(products.norm())
        W = test @ products.T
        values, vectors = torch.linalg.eigh((W + W.T) / 2)
        clear = values > ROUNDING * shift
        B = (products + shift * test).T @ (vectors[:, clear] / (values[clear] + shift).sqrt())
        basis, singular, _ = torch.linalg.svd(B, full_matrices=False)
        found = singular**2 - shift
        clear, bent = found > ROUNDING * shift, values[values.abs() > ROUNDING * shift]
        return Sketch(basis[:, clear], found[clear], float(bent[0]) if len(bent) else math.inf)

    def _step(self, operator: LinearOperator, r: Tensor, sketch: Sketch) -> _Step:
        """Return what the inverse makes of r."""
        inside = sketch.basis.T @ r
        rest = r - sketch.basis @ inside
        if inner(rest, rest) <= (SEEN * torch.finfo(dtype_of(operator.like)).eps) ** 2 * inner(r, r):
            rest = torch.zeros_like(rest)
        outside, status = self.damping, _LOW
        if outside is None:
            outside, status = _curvature_along(operator, rest, sketch)
        values = sketch.values.clamp(min=outside or 0.0) if self.damping is None else sketch.values + self.damping
        x = sketch.basis @ (inside / values) + (rest / outside if outside else 0.0)
        return _Step(sketch, x, operator.flat(x), r, outside, status)

    def precondition(self, operator: LinearOperator) -> Preconditioner:
        """Return the preconditioner for conjugate gradients; its smallest eigenvalue is 1.

        A kept sketch is drawn again once it has cost more steps than a new one costs products.
        """
        kept = operator.kept
        fresh = kept is None
        sketch = self.draw(operator) if kept is None else _restored(kept)
        basis, damping = sketch.basis, self.damping or 0.0
        last = float(sketch.values[-1]) if len(sketch.values) else 1.0
        factors = (last + damping) / (sketch.values + damping) - 1.0

        def keep(steps: int, decades: float) -> dict[str, Any] | None:
            if not steps:
                return None if kept is None else dict(kept)
            rate = decades / steps if kept is None else float(kept["rate"])
            if not rate > 0.0:
                return None
            wasted = 0.0 if kept is None else kept["wasted"] + max(0.0, steps - decades / rate)
            if wasted > self.rank:
                return None
            return {"basis": basis, "values": sketch.values, "rate": rate, "wasted": wasted}

        note = f"CG was preconditioned by a Nyström sketch of rank {len(factors)}" + ("" if fresh else ", kept")
        return Preconditioner(lambda r: r + basis @ (factors * (basis.T @ r)), 1.0, note, keep=keep)


@dataclass(frozen=True)
class _Step:
    """One application of the inverse.

    Attributes:
        sketch: what was applied.
        value: the answer.
        product: A times that.
        rhs: the right-hand side.
        outside: what stood for A where the sketch says nothing; None for nothing.
        ended: "singular" or "nonpositive curvature" where that would have been such, else "low rank".
    """

    sketch: Sketch
    value: Tensor
    product: Tensor
    rhs: Tensor
    outside: float | None
    ended: Status

    @property
    def residual(self) -> Tensor:
        return self.rhs - self.product

    @property
    def left(self) -> float:
        """The relative residual."""
        return math.sqrt(inner(self.residual, self.residual) / inner(self.rhs, self.rhs))

    @property
    def curvature(self) -> float:
        size = inner(self.value, self.value)
        along = inner(self.value, self.product) / size if size > 0.0 else 0.0
        return along if self._harmless else min(self.sketch.lowest, along)

    @property
    def _harmless(self) -> bool:
        """Say whether the negative curvature is slight and r has nothing outside of the positive ones."""
        steepest = float(self.sketch.values[0]) if len(self.sketch.values) else 0.0
        return -SLIGHT * steepest < self.sketch.lowest < 0.0 and self.outside is None and self.ended == _LOW

    @property
    def status(self) -> Status:
        if self.sketch.lowest < 0.0 and not self._harmless:
            return "nonpositive curvature"
        return self.ended

    def kept(self) -> dict[str, Any]:
        return {"basis": self.sketch.basis, "values": self.sketch.values, "left": self.left}

    def has_aged(self, when_new: float) -> bool:
        """Say whether a kept sketch leaves a much larger residual than it did when it was new."""
        return self.ended != _LOW or self.left > WORSE * when_new


def _restored(kept: dict[str, Any]) -> Sketch:
    return Sketch(kept["basis"], kept["values"], math.inf)


_LOW: Status = "low rank"


def _curvature_along(operator: LinearOperator, rest: Tensor, sketch: Sketch) -> tuple[float | None, Status]:
    """Return the curvature of `rest`, None where there is nothing to divide by, and how the solve ends."""
    if not bool(rest.any()):
        return None, _LOW
    curvature = inner(rest, operator.flat(rest)) / inner(rest, rest)
    # Rounding in a product of the size of A cannot tell a smaller curvature from zero.
    zero = SEEN * torch.finfo(dtype_of(operator.like)).eps * float(sketch.values.sum())
    if curvature > zero:
        return curvature, _LOW
    return None, "nonpositive curvature" if curvature < -zero else "singular"
