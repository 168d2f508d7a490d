"""Inner solvers: how the inner variables are trained."""

from bilevel.inner.base import InnerSolution, InnerSolver, Task
from bilevel.inner.custom import Custom, fit
from bilevel.inner.lbfgs import LBFGS
from bilevel.inner.newton import Newton
from bilevel.inner.newton_cg import NewtonCG
from bilevel.inner.optimizers import SGD, Adam, AdamW, RMSProp
from bilevel.inner.proximal import Proximal
from bilevel.inner.proximal_gradient import ProximalGradient
from bilevel.inner.torch_optim import TorchOptim

__all__ = [
    "LBFGS",
    "SGD",
    "Adam",
    "AdamW",
    "Custom",
    "InnerSolution",
    "InnerSolver",
    "Newton",
    "NewtonCG",
    "Proximal",
    "ProximalGradient",
    "RMSProp",
    "Task",
    "TorchOptim",
    "fit",
]
