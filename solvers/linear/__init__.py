"""Linear solvers on vectors of named tensors, one a file."""

from bilevel.solvers.linear.base import LinearSolution, LinearSolver
from bilevel.solvers.linear.cg import CG
from bilevel.solvers.linear.cholesky import Cholesky
from bilevel.solvers.linear.gmres import GMRES
from bilevel.solvers.linear.minres import MINRES
from bilevel.solvers.linear.neumann import Neumann
from bilevel.solvers.linear.nystrom import Nystrom
from bilevel.solvers.linear.quasi_newton import QuasiNewton

__all__ = ["CG", "GMRES", "MINRES", "Cholesky", "LinearSolution", "LinearSolver", "Neumann", "Nystrom", "QuasiNewton"]
