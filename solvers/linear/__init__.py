"""Linear solvers on vectors of named tensors, one a file."""

from bilevel.solvers.linear.base import LinearSolution, LinearSolver
from bilevel.solvers.linear.cg import CG
from bilevel.solvers.linear.cholesky import Cholesky
from bilevel.solvers.linear.neumann import Neumann

__all__ = ["CG", "Cholesky", "LinearSolution", "LinearSolver", "Neumann"]
