"""Inner solvers: how the inner variables are trained."""

from bilevel.inner.base import InnerSolution, InnerSolver, Task
from bilevel.inner.custom import Custom
from bilevel.inner.lbfgs import LBFGS
from bilevel.inner.optimizers import SGD, Adam, AdamW, RMSProp

__all__ = ["LBFGS", "SGD", "Adam", "AdamW", "Custom", "InnerSolution", "InnerSolver", "RMSProp", "Task"]
