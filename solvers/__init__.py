"""Hypergradient estimators, one a file, and the one table that maps names to them."""

if __name__ == "solvers":
    raise ImportError("this folder installs as bilevel.solvers; write `import bilevel.solvers`")

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass

from bilevel.errors import InvalidTypeError, InvalidValueError, meant
from bilevel.solvers.about import About, Terms, about
from bilevel.solvers.amigo import AmIGO
from bilevel.solvers.auto import Auto
from bilevel.solvers.averaged import Averaged
from bilevel.solvers.base import Estimator, Response
from bilevel.solvers.bome import BOME
from bilevel.solvers.finite_difference import FiniteDifference
from bilevel.solvers.fixed_point import FixedPoint
from bilevel.solvers.forward import Forward
from bilevel.solvers.implicit import Implicit
from bilevel.solvers.linear import (
    CG,
    GMRES,
    MINRES,
    Cholesky,
    LinearSolution,
    LinearSolver,
    Neumann,
    Nystrom,
    QuasiNewton,
)
from bilevel.solvers.one_step import OneStep
from bilevel.solvers.pbgd import PBGD
from bilevel.solvers.penalty import Penalty
from bilevel.solvers.saba import SABA
from bilevel.solvers.sama import SAMA
from bilevel.solvers.soba import SOBA
from bilevel.solvers.stocbio import StocBiO
from bilevel.solvers.truncated import Truncated
from bilevel.solvers.unroll import Unroll
from bilevel.solvers.zero_order import ZeroOrder

# The table of names; it is also the table of the tests.
METHODS: Mapping[str, Callable[[], Estimator]] = {
    "implicit": Implicit,
    "auto": Auto,
    "cg": lambda: Implicit(CG()),
    "minres": lambda: Implicit(MINRES()),
    "gmres": lambda: Implicit(GMRES()),
    "direct": lambda: Implicit(Cholesky()),
    "neumann": lambda: Implicit(Neumann()),
    "nystrom": lambda: Implicit(Nystrom()),
    "shine": lambda: Implicit(QuasiNewton()),
    "fixed-point": FixedPoint,
    "finite-difference": FiniteDifference,
    "one-step": OneStep,
    "sama": SAMA,
    "penalty": Penalty,
    "unroll": Unroll,
    "truncated": lambda: Truncated(steps=20),
    "forward": Forward,
    "zero-order": ZeroOrder,
    "soba": SOBA,
    "saba": SABA,
    "amigo": AmIGO,
    "stocbio": StocBiO,
}

# Those that have no name of their own, and how they are written.
CLASSES = {"bome": "BOME()", "pbgd": "PBGD(gamma=...)", "averaged": "Averaged(batches=8)"}


def estimator(method: str | Estimator, argument: str = "method") -> Estimator:
    """Return the estimator that a name stands for, or the estimator itself; messages call it `argument`."""
    if isinstance(method, str):
        if method not in METHODS:
            instead = f"; write bilevel.{CLASSES[method.lower()]}" if method.lower() in CLASSES else ""
            raise InvalidValueError(
                f"`{argument}` is {method!r}, expected one of {', '.join(METHODS)}{instead or meant(method, METHODS)}"
            )
        return METHODS[method]()
    if isinstance(method, type):
        raise InvalidTypeError(f"`{argument}` is the class {method.__name__}; write {_instance(method)}")
    if hasattr(method, "solve"):
        raise InvalidTypeError(
            f"`{argument}` is {method!r}, which solves another problem; write bilevel.Implicit({method!r}) for a "
            "linear solver, and give an inner solver to BilevelProblem"
        )
    if not callable(method) or not _takes_a_response(method):
        raise InvalidTypeError(
            f"`{argument}` is {method!r}, expected a name ({', '.join(METHODS)}) or an estimator object such as "
            "bilevel.Truncated(steps=20)"
        )
    return method


def _instance(kind: type) -> str:
    """Return how an object of the class is written, the settings that it must have by name."""
    prefix = "bilevel." if kind.__module__.startswith("bilevel.") else ""
    needed = [f.name for f in fields(kind) if f.default is f.default_factory is MISSING] if is_dataclass(kind) else []
    written = f"{prefix}{kind.__name__}({', '.join(f'{name}=...' for name in needed)})"
    return f"bilevel.Implicit({written})" if hasattr(kind, "solve") else written


def _takes_a_response(method: Callable[..., object]) -> bool:
    """Say whether it can be called as an estimator is; a plain function is more often a loss by mistake."""
    if inspect.isroutine(method):
        return False
    try:
        inspect.signature(method).bind("response", "lower", "upper", "state")
    except (TypeError, ValueError):
        return False
    return True


__all__ = [
    "CG",
    "GMRES",
    "BOME",
    "PBGD",
    "METHODS",
    "SAMA",
    "About",
    "Auto",
    "AmIGO",
    "Averaged",
    "MINRES",
    "Cholesky",
    "Estimator",
    "FiniteDifference",
    "FixedPoint",
    "Forward",
    "Implicit",
    "LinearSolution",
    "LinearSolver",
    "Penalty",
    "Neumann",
    "Nystrom",
    "QuasiNewton",
    "OneStep",
    "Response",
    "SABA",
    "SOBA",
    "StocBiO",
    "Terms",
    "Truncated",
    "Unroll",
    "ZeroOrder",
    "about",
    "estimator",
]
