"""Linear solvers and known systems by name."""

from __future__ import annotations

import pytest
from torch import Tensor

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
from bilevel.testing import KnownSystem, known_systems
from bilevel.vector import Vector, flatten

RTOL = 1e-10
SOLVERS: dict[str, LinearSolver] = {
    "cg": CG(rtol=RTOL),
    "minres": MINRES(rtol=RTOL),
    "gmres": GMRES(rtol=RTOL),
    "cholesky": Cholesky(),
    "neumann": Neumann(rtol=RTOL, max_steps=2000),
    "nystrom, full rank": Nystrom(rank=12),
    "quasi-newton": QuasiNewton(rtol=RTOL, max_steps=2000),
    "cg with nystrom": CG(rtol=RTOL, preconditioner=Nystrom(rank=6)),
    "cg with pairs": CG(rtol=RTOL, preconditioner="lbfgs"),
}
SYSTEMS = {system.name: system for system in known_systems()}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def run(solver: LinearSolver, name: str, start: Tensor | None = None) -> tuple[KnownSystem, LinearSolution]:
    system = SYSTEMS[name]
    from_here = None if start is None else system.vector(start)
    return system, solver.solve(system.operator, system.vector(system.rhs), from_here)


def relative(system: KnownSystem, x: Vector) -> float:
    return float((system.rhs - system.matrix @ flatten(x)).norm() / system.rhs.norm())
