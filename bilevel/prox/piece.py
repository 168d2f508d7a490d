"""The smooth piece of a kinked inner problem on which a point lies, and the inner gradient along it.

    min over w   g(w, λ) + ψ(w, λ)

At a solution some entries are held by ψ (at zero, at a bound c(λ)), and stay held for all λ nearby; the others are
free, and ψ is smooth in them. With ŵ = w where free and c(λ) where held, the residual is

    R(w, λ) = ∇(g + ψ)(ŵ, λ)   where free            its derivative in w:   H  of g + ψ over the free entries
              τ (w - c(λ))     where held                                   τ  on the diagonal of the others

R = 0 at the solution, is smooth in both arguments and has a symmetric derivative without coupling between free and held
entries: all that a method for smooth inner problems asks for. Bertrand, Klopfenstein, Massias, Blondel, Vaiter,
Gramfort and Salmon, Implicit differentiation for fast hyperparameter selection in non-smooth convex learning, JMLR 23
(2022), theorem 13. The factor τ is a curvature of g + ψ along a random free direction: it lies between the smallest and
the largest curvature there, so the held entries change neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bilevel.prox.base import Penalty
from bilevel.vector import Vector, detach, dot, leaves, max_abs

ROUNDING = 64.0  # units in the last place that a gradient may be off
PROPAGATED = 4.0  # by how much an error of the inner gradient along free entries may grow in those of held ones
ON_THE_EDGE = 1e-8  # margin, relative to the gradient's size, below which a solution is close to a kink in λ

Lend = Callable[[], AbstractContextManager[Any]]
"""Lends the user's `hparams` with the current tensors."""
Smooth = Callable[[Vector], tuple[Tensor, Vector]]
"""w -> g and its gradient with a graph."""


@dataclass(frozen=True)
class Part:
    """One tensor with a penalty: which entries are held, and on which piece the free ones lie."""

    penalty: Penalty
    pattern: Tensor
    free: Tensor


@dataclass(frozen=True)
class Piece:
    """The smooth piece on which a point lies.

    Attributes:
        parts: by the names of the tensors that have a penalty.
        stiffness: τ.
        reasons: why a hypergradient there cannot be trusted.
        notes: what is worth knowing.
    """

    parts: Mapping[str, Part]
    stiffness: float = 1.0
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def at(cls, penalties: Mapping[str, Penalty], lower: Vector, hparams: Any) -> Piece:
        """Return the piece of `lower`, with τ = 1 and nothing examined."""
        return cls({name: _part(penalty, lower[name].detach(), hparams) for name, penalty in penalties.items()})

    @classmethod
    def examined(
        cls,
        penalties: Mapping[str, Penalty],
        lower: Vector,
        lend: Lend,
        smooth: Smooth,
        size: float,
        label: Callable[[str], str],
    ) -> Piece:
        """Return the piece of an inner solution, with τ, and what speaks against that solution.

        Args:
            penalties: by the names of their tensors.
            lower: the inner solution.
            lend: for the hyperparameters.
            smooth: g.
            size: of gradients of g, against which a margin is small.
            label: what the user calls a tensor.
        """
        with lend() as hparams:
            bare = cls.at(penalties, lower, hparams)
        w = leaves(lower)
        _, gradient, residual = bare._evaluate(w, lend, smooth)
        stiffness = _curvature(bare, w, residual)
        off = float(max_abs(detach(bare._only_free(residual))))
        with lend() as hparams:
            found = _margins(bare, detach(lower), detach(gradient), off, size, hparams, label)
        return replace(bare, stiffness=stiffness, reasons=tuple(found[0]), notes=tuple(found[1]))

    def everywhere(self) -> Piece:
        """Return the piece with no entry held: the problem as it would be without kinks."""
        parts = {name: replace(part, free=torch.ones_like(part.free)) for name, part in self.parts.items()}
        return replace(self, parts=parts)

    def same(self, other: Piece) -> bool:
        """Say whether two points lie on one piece."""
        return all(torch.equal(part.pattern, other.parts[name].pattern) for name, part in self.parts.items())

    def evaluate(self, lower: Vector, lend: Lend, smooth: Smooth) -> tuple[Tensor, Vector]:
        """Return g + ψ and R, both differentiable."""
        value, _, residual = self._evaluate(lower, lend, smooth)
        return value, residual

    def _evaluate(self, lower: Vector, lend: Lend, smooth: Smooth) -> tuple[Tensor, Vector, Vector]:
        """Return g + ψ, the gradient of g, and R."""
        with lend() as hparams, torch.enable_grad():
            amounts = {name: part.penalty.amounts(lower[name], hparams) for name, part in self.parts.items()}
            held = {n: part.penalty.held(lower[n], part.pattern, amounts[n]) for n, part in self.parts.items()}
            placed = dict(lower)
            for name, part in self.parts.items():
                placed[name] = torch.where(part.free, lower[name], held[name])
            parts = self.parts.items()
            penalties = [part.penalty.smooth(placed[name], part.pattern, amounts[name]) for name, part in parts]
        value, gradient = smooth(placed)
        residual = dict(gradient)
        with torch.enable_grad():
            for (name, part), penalty in zip(parts, penalties, strict=True):
                along = gradient[name] + _slope(penalty, placed[name])
                residual[name] = torch.where(part.free, along, self.stiffness * (lower[name] - held[name]))
        return value + sum(penalties), gradient, residual

    def _only_free(self, v: Vector) -> Vector:
        return {n: t * self.parts[n].free if n in self.parts else t for n, t in v.items()}


def _part(penalty: Penalty, w: Tensor, hparams: Any) -> Part:
    pattern = penalty.pattern(w, tuple(t.detach() for t in penalty.amounts(w, hparams)))
    return Part(penalty, pattern, penalty.free(pattern))


def _slope(value: Tensor, at: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(at)
    (slope,) = torch.autograd.grad(value, [at], create_graph=True, allow_unused=True)
    return torch.zeros_like(at) if slope is None else slope


def _curvature(piece: Piece, w: Vector, residual: Vector) -> float:
    """Return |v·Hv / v·v| for a random v of free entries; 1 where there is none."""
    generator = torch.Generator().manual_seed(0)
    noise = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for n, t in w.items()}
    v = piece._only_free(noise)
    attached = [name for name, t in residual.items() if t.requires_grad]
    outputs, cotangents = [residual[name] for name in attached], [v[name] for name in attached]
    grads = torch.autograd.grad(outputs, list(w.values()), cotangents, retain_graph=True, allow_unused=True)
    product = {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(w.items(), grads, strict=True)}
    size = float(dot(v, v))
    return abs(float(dot(v, product))) / size or 1.0 if size > 0.0 else 1.0


def _margins(
    piece: Piece, lower: Vector, gradient: Vector, off: float, size: float, hparams: Any, label: Callable[[str], str]
) -> tuple[list[str], list[str]]:
    """Return reasons and notes: held entries that would move, and entries between held and free."""
    reasons, notes = [], []
    for name, part in piece.parts.items():
        w, g = lower[name], gradient[name]
        eps, now = torch.finfo(w.dtype).eps, tuple(t.detach() for t in part.penalty.amounts(w, hparams))
        unit = max(size, float(g.abs().max()))
        unsure = PROPAGATED * off + ROUNDING * eps * unit
        slack = part.penalty.slack(g, part.pattern, now)
        gap = part.penalty.gap(w, part.pattern, now) / max(float(w.abs().max()), torch.finfo(w.dtype).tiny)
        if float(slack.min()) < -unsure:
            reasons.append(_MOVES.format(label(name), int((slack < -unsure).sum()), -float(slack.min()) / unit))
            continue
        edge = (slack <= unsure) | (gap <= ROUNDING * eps)
        near = (slack <= max(unsure, ON_THE_EDGE * unit)) | (gap <= ON_THE_EDGE)
        if bool(edge.any()):
            reasons.append(_EDGE.format(label(name), _entries(edge)))
        elif bool(near.any()):
            notes.append(_NEAR.format(label(name), _entries(near)))
    return reasons, notes


def _entries(mask: Tensor) -> str:
    """Return the first few indices of a mask as text."""
    found = [str(index[0] if len(index) == 1 else tuple(index)) for index in mask.nonzero()[:3].tolist()]
    return ", ".join(found) + (", ..." if int(mask.sum()) > 3 else "")


_MOVES = (
    "{}: {} entries that lie on a kink or a bound of the penalty would leave it (the gradient exceeds what holds them "
    "by up to {:.1e} of its size), so this is no inner solution: train the inner problem further (a smaller `rtol`)"
)
_EDGE = (
    "{}: whether entry {} is held by the penalty or free cannot be told at this inner solution; where it is just "
    "between the two, the solution has a kink in the hyperparameters and this is the slope of one side: move the "
    "hyperparameters a little, or train the inner problem further"
)
_NEAR = (
    "{}: entry {} is about to be released or held by the penalty, so this hypergradient holds for small changes of the "
    "hyperparameters only"
)
