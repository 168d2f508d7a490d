"""What kinks of the inner problem do to a hypergradient: of a penalty that was declared, and of one that was not."""

from __future__ import annotations

from dataclasses import replace

import torch

from bilevel.certificate import Hypergradient
from bilevel.prox import Piece
from bilevel.response import ProblemResponse
from bilevel.vector import Vector, detach, leaves, max_abs, norm, subtract

SMALL = 1e-2  # of the largest entry: an entry that a kink at zero has drawn near
NEAR, NEARER = 1e-6, 1e-7  # of the largest entry: where gradients on both sides of zero are compared


def doubt_kinks(response: ProblemResponse, found: Hypergradient, upper: Vector, status: str) -> Hypergradient:
    """Add what the certificate must say about kinks.

    Args:
        response: where the hypergradient was taken.
        found: the hypergradient.
        upper: the hyperparameters.
        status: why the inner solver stopped.
    """
    piece, certificate = response.piece, found.certificate
    reasons, notes = ((), ()) if piece is None else (piece.reasons, piece.notes)
    if piece is None and not certificate.trusted and status in ("stalled", "max_steps"):
        reasons = (_UNDECLARED,) if jumps_at_zero(response, found.params, upper) else ()
    if not (reasons or notes):
        return found
    verdict = "untrusted" if reasons else certificate.verdict
    told = replace(
        certificate,
        verdict=verdict,
        reasons=(*certificate.reasons, *reasons),
        notes=(*certificate.notes, *notes),
    )
    return replace(found, certificate=told)


_UNDECLARED = (
    "the gradient of `inner_loss` jumps where entries of params pass through zero (an l1 penalty, abs, a norm?), and "
    "both L-BFGS and the implicit formula need a smooth loss: take the kink out of `inner_loss` and write "
    "inner_solver=bilevel.inner.Proximal(bilevel.prox.L1(lambda h: ...)), or another penalty of bilevel.prox"
)


def without_kinks(response: ProblemResponse, lower: Vector, upper: Vector) -> ProblemResponse:
    """Return the same problem with no entry held by a penalty: its curvature in all directions."""
    if not response.penalties:
        return response
    with response.hparams(detach(upper)) as hparams:
        return response.on(Piece.at(response.penalties, lower, hparams).everywhere())


def jumps_at_zero(response: ProblemResponse, lower: Vector, upper: Vector) -> bool:
    """Say whether the inner gradient jumps where the small entries of `lower` pass through zero.

    The difference of gradients across zero shrinks with the distance for a smooth loss, and not across a kink. Five
    gradients.
    """
    largest = float(max_abs(lower)) or 1.0

    def at(distance: float) -> Vector:
        moved = {n: torch.where(w.abs() <= SMALL * largest, distance * largest, w) for n, w in lower.items()}
        return detach(response.residual(leaves(moved), upper))

    def across(distance: float) -> float:
        return float(norm(subtract(at(distance), at(-distance))))

    near, nearer = across(NEAR), across(NEARER)
    left = float(norm(detach(response.residual(leaves(lower), upper))))
    return nearer > 0.5 * near and nearer > 0.1 * left
