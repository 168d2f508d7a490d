"""Bilevel optimization in PyTorch: tune hyperparameters by gradients that say how far they can be trusted."""

from bilevel import augment, callbacks, inner, penalties, priors, prox, relaxed, sparse, weighting
from bilevel.certificate import Certificate, Cost, Hypergradient
from bilevel.checkpoint import Checkpoint
from bilevel.comparison import ComparedMethod, Comparison, compare
from bilevel.differentiable import Anderson, Newton, argmin, fixed_point, root
from bilevel.errors import (
    BilevelError,
    InvalidTypeError,
    InvalidValueError,
    NonFiniteError,
    NotTwiceDifferentiableError,
    UnseenHyperparameterError,
    UntrustedHypergradientError,
    UntrustedHypergradientWarning,
)
from bilevel.families import over
from bilevel.gradient_check import GradientCheck, check_gradient
from bilevel.hyper_optimizer import HyperOptimizer
from bilevel.hyperparameters import interval, positive, real, simplex
from bilevel.outer import hypergradient, solve
from bilevel.preflight import Finding, Report, check
from bilevel.problem import BilevelProblem
from bilevel.reporting import report
from bilevel.selection import Selection, parameters
from bilevel.solution import Record, Solution
from bilevel.solvers import (
    BOME,
    CG,
    GMRES,
    METHODS,
    MINRES,
    PBGD,
    SABA,
    SAMA,
    SOBA,
    AmIGO,
    Auto,
    Averaged,
    Cholesky,
    FiniteDifference,
    FixedPoint,
    Forward,
    Implicit,
    Neumann,
    Nystrom,
    OneStep,
    Penalty,
    QuasiNewton,
    StocBiO,
    Truncated,
    Unroll,
    ZeroOrder,
)

__version__ = "0.1.0"

__all__ = [
    "Anderson",
    "CG",
    "GMRES",
    "METHODS",
    "BOME",
    "PBGD",
    "MINRES",
    "SAMA",
    "SABA",
    "SOBA",
    "AmIGO",
    "Auto",
    "Averaged",
    "BilevelError",
    "BilevelProblem",
    "Certificate",
    "Checkpoint",
    "ComparedMethod",
    "Comparison",
    "Cholesky",
    "Cost",
    "Finding",
    "FiniteDifference",
    "FixedPoint",
    "Forward",
    "GradientCheck",
    "HyperOptimizer",
    "Hypergradient",
    "Implicit",
    "InvalidTypeError",
    "InvalidValueError",
    "Neumann",
    "Newton",
    "NonFiniteError",
    "NotTwiceDifferentiableError",
    "Nystrom",
    "QuasiNewton",
    "OneStep",
    "Penalty",
    "Record",
    "Report",
    "Selection",
    "Solution",
    "StocBiO",
    "Truncated",
    "UnseenHyperparameterError",
    "UntrustedHypergradientError",
    "UntrustedHypergradientWarning",
    "Unroll",
    "ZeroOrder",
    "argmin",
    "augment",
    "callbacks",
    "check",
    "check_gradient",
    "compare",
    "fixed_point",
    "hypergradient",
    "inner",
    "interval",
    "over",
    "parameters",
    "penalties",
    "positive",
    "priors",
    "prox",
    "real",
    "relaxed",
    "report",
    "root",
    "simplex",
    "solve",
    "sparse",
    "weighting",
]
