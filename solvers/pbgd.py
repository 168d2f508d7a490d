"""PBGD: gradient steps of the outer loss plus a penalty of the value gap, of fixed weight.

    F_γ(λ, y) = f(λ, y) + γ [g(λ, y) - min_z g(λ, z)]
    D_λ = ∂f/∂λ (λ, y) + γ [∂g/∂λ (λ, y) - ∂g/∂λ (λ, z)]        y <- y - a D_y        z <- z - b ∂g/∂z

Shen and Chen, On penalty-based bilevel gradient descent, ICML 2023, algorithm 1 (V-PBGD) with the penalty of their
section 3.1; the bias of its stationary points is O(1/γ). For differences from the paper see
`bilevel.solvers.value_gap`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bilevel.solvers.about import About, Terms
from bilevel.solvers.pulled_pair import Pair, Seen
from bilevel.solvers.value_gap import ValueGap, check_positive
from bilevel.vector import axpy

PULL = 100.0  # γ in units of |∂f/∂y| over the inner gradient's scale: y is pulled about a hundredth of that


@dataclass(frozen=True)
class PBGD(ValueGap):
    """Move the pulled and the plain inner variables by gradient steps, a few for each hypergradient.

    No inner solver runs. On fixed data it ends at the forward form of `Penalty` with σ = 1/γ, whose error is O(1/γ).

    Args:
        lr, warmup, moves: see `ValueGap`; a round is one step of y and one of z.
        gamma: weight of the inner loss; larger is less biased, and takes more digits. None: 100 times |∂f/∂y| over the
            scale of the inner gradient in the first call.

    >>> import torch, bilevel
    >>> problem = bilevel.BilevelProblem(
    ...     lambda w, h: (w - h) ** 2, lambda w, h: w**2,
    ...     params=torch.zeros((), dtype=torch.float64), hparams=torch.tensor(3.0, dtype=torch.float64))
    >>> round(bilevel.hypergradient(problem, bilevel.PBGD(gamma=99.0)).gradient.item(), 6)  # 6 γ / (1 + γ)
    5.94
    """

    gamma: float | None = None
    about: ClassVar[About] = About(
        begins="last",
        sees="losses",
        derivatives=1,
        exact=False,
        terms=Terms("30 gradients", "y", "1/γ, and lag of y and z", "Shen and Chen 2023"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.gamma, "gamma")

    def _approach(self, pair: Pair, seen: Seen | None) -> None:
        if seen is None:
            pair.z = pair.train(pair.z, 1)
        elif not pair.response.held:
            pair.z = axpy(-pair.size, seen.plain.lower, pair.z)

    def _multiplier(self, pair: Pair, seen: Seen) -> float:
        return PULL * pair.unit if self.gamma is None else self.gamma

    def _least(self, pair: Pair) -> float:
        return 0.0
