"""BOME: a penalty of the value gap whose weight is the dynamic barrier's.

    q(λ, y) = g(λ, y) - g(λ, z)       z: T gradient steps of g from y, held still where q is differentiated
    κ = max(0, (φ - <∇f, ∇q>) / |∇q|²)       φ = η |∇q|²       D = ∇f + κ ∇q, over λ and y at once

Liu, Ye, Wright, Stone and Liu, BOME! Bilevel optimization made easy: a simple first-order approach, NeurIPS 2022,
equations 5 to 7 and algorithm 1. D is the direction nearest to ∇f that lets q fall like -φ. Differences from the
paper: those of `bilevel.solvers.value_gap`; the inner products are over y alone unless `joint`; κ is 0 where q
is closed as far as rounding tells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from bilevel.solvers.about import About, Terms
from bilevel.solvers.base import present
from bilevel.solvers.linear.base import check_count, dtype_of
from bilevel.solvers.pulled_pair import Pair, Seen
from bilevel.solvers.value_gap import ValueGap, check_positive
from bilevel.vector import dot, norm, subtract, zeros_like

PAPER = 0.5  # η


@dataclass(frozen=True)
class BOME(ValueGap):
    """Move the inner variables down the outer loss, as steeply as the value gap still closes.

    No inner solver runs. κ finds itself: it grows by η with each move while λ stands still, and falls where λ leaves a
    gap, so the bias of 1/κ fades. In ill-conditioned inner problems T steps see the steep directions only, and an
    error stays.

    Args:
        lr, moves: see `ValueGap`; a move takes `steps` steps of z and one of y.
        warmup: see `ValueGap`; each round is `steps` steps.
        steps: T, of z from y; more see flatter directions and cost more.
        eta: η, which κ grows by; larger is sooner accurate and leaves y slower. None: 0.5 (the paper's) in units of
            |∂f/∂y| over the scale of the inner gradient in the first call, so that no loss's unit matters.
        joint: take the two inner products over λ and y, as the paper does, where f and q fall by both steps. They
            depend on the units of λ, and away from the outer optimum κ stays small, so that D is far from the
            hypergradient and untrusted. False: over y alone, since the step of λ is the outer optimizer's.

    >>> import torch, bilevel
    >>> problem = bilevel.BilevelProblem(
    ...     lambda w, h: (w - h) ** 2, lambda w, h: w**2,
    ...     params=torch.zeros((), dtype=torch.float64), hparams=torch.tensor(3.0, dtype=torch.float64))
    >>> found = bilevel.hypergradient(problem, bilevel.BOME())
    >>> abs(found.gradient.item() - 6.0) < 0.1, found.certificate.verdict
    (True, 'approximate')
    """

    warmup: int = 200
    steps: int = 10
    eta: float | None = None
    joint: bool = False
    about: ClassVar[About] = About(
        begins="last",
        sees="losses",
        derivatives=1,
        exact=False,
        terms=Terms("130 gradients", "y", "1/κ, lag of y, and that of T steps", "Liu et al. 2022"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.steps, "steps")
        check_positive(self.eta, "eta")

    def _approach(self, pair: Pair, seen: Seen | None) -> None:
        pair.z = pair.train(pair.z if pair.response.held else pair.y, self.steps)

    def _multiplier(self, pair: Pair, seen: Seen) -> float:
        slope, gap = seen.outer.lower, seen.inner.lower
        square, along = float(dot(gap, gap)), float(dot(slope, gap))
        if math.sqrt(square) <= math.sqrt(torch.finfo(dtype_of(pair.y)).eps) * float(norm(slope)) / pair.unit:
            return 0.0  # closed, as far as rounding tells
        if self.joint:
            h = zeros_like(pair.upper)
            gap = subtract(h | present(seen.inner.upper), h | present(seen.plain.upper))
            square += float(dot(gap, gap))
            along += float(dot(h | present(seen.outer.upper), gap))
        return max(0.0, self._least(pair) - along / square)

    def _least(self, pair: Pair) -> float:
        return PAPER * pair.unit if self.eta is None else self.eta
