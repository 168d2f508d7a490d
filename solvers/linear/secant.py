"""The inverse Hessian estimate of L-BFGS as a preconditioner, from pairs that were seen before.

    H+ = (I - s y^T / s·y) H (I - y s^T / s·y) + s s^T / s·y            for each pair (s, y), oldest first

in the compact form of Byrd, Nocedal and Schnabel, Representations of quasi-Newton matrices, Math. Programming 63
(1994), theorem 2.2: two products with the n × m matrices of all pairs.
Ramzi et al., SHINE, ICLR 2022: the pairs of the inner L-BFGS serve the backward pass. Morales and Nocedal, Automatic
preconditioning by limited memory quasi-Newton updating, SIAM J. Optim. 10 (2000): the directions of one solve by
conjugate gradients, a sample spread evenly over it, serve the next one of a slowly changing sequence. Both are taken
where they are there; those of conjugate gradients come last, since they are exact and weigh more so (docs/design.md,
"Preconditioners").
"""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.operators import LinearOperator, Pairs
from bilevel.solvers.linear.base import Preconditioner

MEMORY = 20  # pairs of conjugate gradients' own that are kept
STRAIGHT = 1e-8  # s·y over |s| |y|, below which rounding may have made y


class InverseEstimate:
    """H of the pairs, begun at γ times the diagonal of the scale, with γ = s·y / y·y of the newest pair.

    Args:
        pairs: at least one.
    """

    def __init__(self, pairs: Pairs) -> None:
        S, Y = pairs.steps, pairs.changes
        self._scale = pairs.scale
        products = (S * Y).sum(1)
        self._gamma = float(products[-1] / (Y[-1] ** 2 * self._scale).sum())
        unit = products.rsqrt()[:, None]  # s·y = 1 for every pair: the estimate does not change, R is well scaled
        self._S, self._Y = S * unit, Y * unit
        self._Z = self._Y * self._scale
        self._R = torch.triu(self._S @ self._Y.T)
        self._middle = torch.eye(len(S), dtype=S.dtype, device=S.device) + self._gamma * self._Y @ self._Z.T

    def __call__(self, r: Tensor) -> Tensor:
        """Return H r."""
        u = torch.linalg.solve_triangular(self._R, (self._S @ r)[:, None], upper=True)
        right = self._middle @ u - self._gamma * (self._Z @ r)[:, None]
        v = torch.linalg.solve_triangular(self._R.T, right, upper=False)
        product: Tensor = self._gamma * (self._scale * r - self._Z.T @ u[:, 0]) + self._S.T @ v[:, 0]
        return product


def precondition(operator: LinearOperator) -> Preconditioner:
    """Return M = H^-1 of the pairs of the inner L-BFGS and of the last solve; the identity where there are none."""
    known, sample = gathered(operator), _Sample()

    def keep(steps: int, decades: float) -> dict[str, Tensor] | None:
        old = () if operator.kept is None else zip(operator.kept["steps"], operator.kept["changes"], strict=True)
        both = [*old, *sample.pairs][-MEMORY:]
        if not both:
            return None
        steps_taken, changes = (torch.stack(side) for side in zip(*both, strict=True))
        return {"steps": steps_taken, "changes": changes}

    if known is None:
        note = (
            "there were no quasi-Newton pairs yet (they come from inner.LBFGS, and from the last hypergradient of a "
            "run), so conjugate gradients ran without a preconditioner"
        )
        return Preconditioner(lambda r: r, 1.0, note, sample.add, keep)
    note = f"CG was preconditioned by {len(known.steps)} quasi-Newton pairs"
    return Preconditioner(InverseEstimate(known), 0.0, note, sample.add, keep)


def gathered(operator: LinearOperator) -> Pairs | None:
    """Return the pairs of the inner L-BFGS and of the last solve, those with s·y > 0; None for none."""
    given, kept = operator.pairs, operator.kept
    steps = ([] if given is None else [given.steps]) + ([] if kept is None else [kept["steps"]])
    changes = ([] if given is None else [given.changes]) + ([] if kept is None else [kept["changes"]])
    if not steps:
        return None
    S, Y = torch.cat(steps), torch.cat(changes)
    straight = (S * Y).sum(1) > STRAIGHT * S.norm(dim=1) * Y.norm(dim=1)
    if not bool(straight.any()):
        return None
    scale = torch.ones(operator.size, dtype=S.dtype, device=S.device) if given is None else given.scale
    return Pairs(S[straight], Y[straight], scale)


class _Sample:
    """At most `MEMORY` of the directions seen, spread evenly (Morales and Nocedal, section 3)."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self._seen, self._stride = 0, 1

    def add(self, p: Tensor, Ap: Tensor) -> None:
        """Take every `stride`-th; when the memory is full, drop every other one and double the stride."""
        if self._seen % self._stride == 0:
            if len(self.pairs) == MEMORY:
                self.pairs, self._stride = self.pairs[::2], 2 * self._stride
            if self._seen % self._stride == 0:
                self.pairs.append((p, Ap))
        self._seen += 1
