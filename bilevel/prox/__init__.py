"""Penalties with kinks, and bounds: what `bilevel.inner.Proximal` adds to the inner loss."""

from bilevel.prox.base import Penalty, assign
from bilevel.prox.box import Box, NonNegative
from bilevel.prox.entrywise import L1, ElasticNet
from bilevel.prox.groups import GroupL1
from bilevel.prox.piece import Piece

__all__ = ["L1", "Box", "ElasticNet", "GroupL1", "NonNegative", "Penalty", "Piece", "assign"]
