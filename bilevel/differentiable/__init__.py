"""Solutions as differentiable functions: minima, roots and fixed points, to any order."""

from bilevel.differentiable.anderson import Anderson
from bilevel.differentiable.maps import argmin, fixed_point, root
from bilevel.differentiable.newton import Found, Newton

__all__ = ["Anderson", "Found", "Newton", "argmin", "fixed_point", "root"]
