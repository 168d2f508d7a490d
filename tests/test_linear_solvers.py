"""Linear solvers × operators, both from one table; the truth is the dense matrix."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import pytest
import torch

from bilevel.errors import InvalidValueError
from bilevel.operators import LinearOperator
from bilevel.solvers.linear import CG, GMRES, MINRES, Cholesky, LinearSolution, LinearSolver, Neumann
from bilevel.solvers.linear.base import EXPLANATIONS, FATAL
from bilevel.testing import CheckFailedError, KnownSystem, check_linear_solver
from bilevel.vector import Vector, flatten, unflatten
from problems_linear import RTOL, SOLVERS, SYSTEMS, every_solver, relative, run

DEFINITE = [name for name, system in SYSTEMS.items() if system.kind == "definite"]
ITERATIVE = ["cg", "minres", "gmres", "neumann", "quasi-newton", "cg with nystrom", "cg with pairs"]


@pytest.mark.parametrize("name", DEFINITE)
@every_solver
def test_positive_definite_systems_are_solved(solver: LinearSolver, name: str) -> None:
    system, solution = run(solver, name)
    if solver.truncates and name == "ill-conditioned" and solution.status != "converged":
        assert solution.status == "max_steps"  # condition 1e6: a series needs 1e7 terms, and says so
        return
    assert solution.status == "converged"
    truth = torch.linalg.solve(system.matrix, system.rhs)
    # |x - x*| / |x*| <= condition * |r| / |b|; the dense truth has a rounding of its own, condition * 1e-16.
    bound = float(torch.linalg.cond(system.matrix)) * RTOL
    assert float((flatten(solution.value) - truth).norm()) <= bound * float(truth.norm())


@every_solver
@pytest.mark.parametrize("name", SYSTEMS)
def test_the_reported_residual_is_b_minus_ax(solver: LinearSolver, name: str) -> None:
    if SYSTEMS[name].kind == "non-symmetric" and not isinstance(solver, (GMRES, Cholesky)):
        return  # refused, see below
    system, solution = run(solver, name)
    b, x = system.rhs, flatten(solution.value)
    residual = b - system.matrix @ x
    # Two roundings of one product: 12 terms of size |A| |x|.
    rounding = 12 * 2.3e-16 * (float(b.norm()) + float(system.matrix.norm() * x.norm()))
    assert float((flatten(solution.residual) - residual).norm()) <= rounding
    if float(b.norm()) > 0.0:
        assert abs(solution.relative - float(residual.norm() / b.norm())) <= rounding / float(b.norm())
    assert {key: t.shape for key, t in solution.value.items()} == {
        key: t.shape for key, t in system.operator.like.items()
    }


@pytest.mark.parametrize("key", ITERATIVE)
def test_a_solver_that_stops_early_returns_the_true_residual_of_its_iterate(key: str) -> None:
    system, solution = run(dataclasses.replace(SOLVERS[key], max_steps=3), "well-conditioned")  # type: ignore[type-var]
    assert solution.status == "max_steps"
    assert solution.steps == 3
    assert solution.relative > 1e-3
    assert solution.relative == pytest.approx(relative(system, solution.value), rel=1e-12)


@pytest.mark.parametrize("name", ["identity", "c times the identity", "one unknown"])
@pytest.mark.parametrize("solver", [SOLVERS[key] for key in ITERATIVE], ids=ITERATIVE)
def test_multiples_of_the_identity_take_one_step(solver: LinearSolver, name: str) -> None:
    system, solution = run(solver, name)
    assert solution.steps == 1
    assert solution.relative <= 1e-15
    assert solution.curvature == pytest.approx(float(system.matrix[0, 0]), rel=1e-14)


@pytest.mark.parametrize("key", ["cg", "minres", "gmres"])
def test_two_eigenvalues_take_two_steps(key: str) -> None:
    _, solution = run(SOLVERS[key], "two eigenvalues")
    assert (solution.steps, solution.status) == (2, "converged")


@pytest.mark.parametrize("name", ["times 1e-12", "times 1e+12"])
@every_solver
def test_scaling_changes_nothing(solver: LinearSolver, name: str) -> None:
    plain_system, plain = run(solver, "well-conditioned")
    system, scaled = run(solver, name)
    factor = float(system.matrix.norm() / plain_system.matrix.norm())
    assert (scaled.steps, scaled.status) == (plain.steps, plain.status)
    x, expected = factor * flatten(scaled.value), flatten(plain.value)
    # Rounding, times the condition number of 20: the scale is no power of 2.
    assert float((x - expected).norm() / expected.norm()) <= 1e-13
    assert plain.curvature is not None and scaled.curvature is not None
    assert scaled.curvature == pytest.approx(factor * plain.curvature, rel=1e-10)


@pytest.mark.parametrize("factor", [1e-12, 1e12])
@every_solver
def test_scaling_the_right_hand_side_changes_nothing(solver: LinearSolver, factor: float) -> None:
    system, plain = run(solver, "well-conditioned")
    scaled = solver.solve(system.operator, system.vector(factor * system.rhs))
    assert (scaled.steps, scaled.status) == (plain.steps, plain.status)
    expected = flatten(plain.value)
    assert float((flatten(scaled.value) / factor - expected).norm() / expected.norm()) <= 1e-13


@every_solver
def test_a_zero_right_hand_side_gives_zero(solver: LinearSolver) -> None:
    _, solution = run(solver, "zero right-hand side")
    assert not flatten(solution.value).any()
    assert (solution.status, solution.relative) == ("converged", 0.0)
    _, warm = run(solver, "zero right-hand side", start=torch.ones(12, dtype=torch.float64))
    assert not flatten(warm.value).any()


@pytest.mark.parametrize("solver", [SOLVERS[key] for key in ITERATIVE], ids=ITERATIVE)
def test_a_warm_start_at_the_solution_takes_no_step(solver: LinearSolver) -> None:
    system = SYSTEMS["well-conditioned"]
    truth = torch.linalg.solve(system.matrix, system.rhs)
    _, solution = run(solver, system.name, start=truth)
    assert (solution.steps, solution.status) == (0, "converged")
    assert torch.equal(flatten(solution.value), truth)


@every_solver
def test_a_bad_warm_start_does_no_harm(solver: LinearSolver) -> None:
    start = torch.full((12,), 1e6, dtype=torch.float64)
    _, cold = run(solver, "well-conditioned")
    _, warm = run(solver, "well-conditioned", start=start)
    assert warm.steps == cold.steps
    assert torch.equal(flatten(warm.value), flatten(cold.value))
    assert bool((start == 1e6).all()), "the caller's start was written to"


@every_solver
def test_a_singular_system_with_a_solution_is_solved_by_the_least_norm(solver: LinearSolver) -> None:
    system, solution = run(solver, "singular, consistent")
    assert solution.status == "converged"
    truth = torch.linalg.pinv(system.matrix, hermitian=True) @ system.rhs
    # The condition number on the range is 4.5; 1e-10 is the residual asked for.
    assert float((flatten(solution.value) - truth).norm() / truth.norm()) <= 1e-9


@every_solver
def test_a_singular_system_without_a_solution_is_not_called_solved(solver: LinearSolver) -> None:
    system, solution = run(solver, "singular, inconsistent")
    assert solution.status != "converged"
    least = system.rhs - system.matrix @ torch.linalg.pinv(system.matrix, hermitian=True) @ system.rhs
    assert solution.relative >= float(least.norm() / system.rhs.norm()) * (1.0 - 1e-12)
    assert solution.relative <= 1.0, "the answer is worse than none"
    assert EXPLANATIONS[solution.status]


def test_cholesky_solves_an_inconsistent_system_in_the_least_squares_sense() -> None:
    system, solution = run(Cholesky(), "singular, inconsistent")
    assert solution.status == "singular"
    truth = torch.linalg.pinv(system.matrix, hermitian=True) @ system.rhs
    assert float((flatten(solution.value) - truth).norm() / truth.norm()) <= 1e-12


def test_a_neumann_series_that_only_grows_leaves_its_first_term() -> None:
    diagonal = torch.tensor([1.0, -0.5], dtype=torch.float64)
    operator = LinearOperator(lambda v: {"w": diagonal * v["w"]}, {"w": diagonal}, symmetric=True)
    rhs = {"w": torch.tensor([0.0, 3.0], dtype=torch.float64)}
    solution = Neumann(max_steps=5).solve(operator, rhs)
    assert solution.status == "indefinite"
    assert torch.allclose(solution.value["w"], rhs["w"])  # over the largest curvature, 1
    assert solution.relative == pytest.approx(1.5)
    warm = Neumann(max_steps=5).solve(operator, rhs, start={"w": -2.0 * rhs["w"]})
    assert (warm.status, warm.relative) == ("converged", 0.0)


def test_an_indefinite_system_is_named_by_cg_and_solved_by_the_others() -> None:
    system, cg = run(CG(rtol=RTOL), "indefinite")
    lowest = float(torch.linalg.eigvalsh(system.matrix)[0])
    assert cg.status == "nonpositive curvature"
    assert cg.curvature is not None and lowest <= cg.curvature < 0.0
    _, direct = run(Cholesky(), "indefinite")
    assert (direct.status, direct.relative < 1e-13) == ("nonpositive curvature", True)
    assert direct.curvature == pytest.approx(lowest, rel=1e-12)
    _, minres = run(MINRES(rtol=RTOL), "indefinite")
    assert (minres.status, minres.relative <= RTOL) == ("converged", True)
    assert minres.curvature == pytest.approx(lowest, rel=1e-10)  # all 12 Ritz values are there
    _, gmres = run(GMRES(rtol=RTOL), "indefinite")
    assert (gmres.status, gmres.relative <= RTOL) == ("converged", True)
    _, neumann = run(SOLVERS["neumann"], "indefinite")
    assert neumann.status == "indefinite"
    assert neumann.relative < 1.0, "the best iterate before the growth is returned"
    assert neumann.curvature is not None and neumann.curvature < 0.0
    assert {cg.status, neumann.status} <= set(FATAL)


def test_a_non_symmetric_system_is_refused_or_solved() -> None:
    for solver in (CG(), MINRES(), Neumann()):
        with pytest.raises(InvalidValueError, match=rf"{type(solver).__name__} needs a symmetric operator"):
            run(solver, "non-symmetric")
    for able in (Cholesky(), GMRES(rtol=1e-13)):
        system, solution = run(able, "non-symmetric")
        truth = torch.linalg.solve(system.matrix, system.rhs)
        assert (solution.status, solution.curvature) == ("converged", None)
        assert float((flatten(solution.value) - truth).norm() / truth.norm()) <= 1e-11


def test_cholesky_says_that_a_non_symmetric_matrix_is_singular() -> None:
    matrix = SYSTEMS["non-symmetric"].matrix.clone()
    matrix[:, 0] = 0.0
    system = KnownSystem("singular and non-symmetric", matrix, SYSTEMS["identity"].rhs, "non-symmetric")
    assert Cholesky().solve(system.operator, system.vector(system.rhs)).status == "singular"


@every_solver
def test_coupled_tensors_of_all_shapes(solver: LinearSolver) -> None:
    like = {
        "scalar": torch.zeros((), dtype=torch.float64),
        "matrix": torch.zeros(2, 3, dtype=torch.float64),
        "cube": torch.zeros(1, 2, 2, dtype=torch.float64),
        "empty": torch.zeros(0, 4, dtype=torch.float64),
        "one": torch.zeros(1, dtype=torch.float64),
    }
    system = SYSTEMS["well-conditioned"]
    operator = LinearOperator(lambda v: unflatten(system.matrix @ flatten(v), like), like, symmetric=True)
    rhs = unflatten(system.rhs, like)
    solution = solver.solve(operator, rhs, start={key: torch.zeros_like(t) for key, t in like.items()})
    assert [(key, t.shape) for key, t in solution.value.items()] == [(key, t.shape) for key, t in like.items()]
    assert relative(system, solution.value) <= 2 * RTOL


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: CG(rtol=-1.0), "`rtol` is -1"),
        (lambda: CG(rtol=1.0), "`rtol` is 1"),
        (lambda: CG(max_steps=0), "`max_steps` is 0"),
        (lambda: MINRES(rtol=math.nan), "`rtol` is nan"),
        (lambda: GMRES(restart=0), "`restart` is 0"),
        (lambda: Neumann(step_size=-0.1), "`step_size` is -0.1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(build: object, named: str) -> None:
    assert callable(build)
    with pytest.raises(InvalidValueError, match=named):
        build()


@every_solver
def test_our_solvers_pass_the_public_check(solver: LinearSolver) -> None:
    check_linear_solver(solver, tolerance=2 * RTOL)


@dataclasses.dataclass(frozen=True)
class Flawed:
    """A solver with one flaw."""

    flaw: str
    truncates: ClassVar[bool] = False

    def solve(self, operator: LinearOperator, rhs: Vector, start: Vector | None = None) -> LinearSolution:
        if self.flaw == "refuses":
            raise InvalidValueError("not today")
        solution = Cholesky().solve(operator, rhs)
        if self.flaw == "inaccurate":
            value = {key: 1.001 * t for key, t in solution.value.items()}
            product = operator(value)
            return dataclasses.replace(solution, value=value, residual={k: t - product[k] for k, t in rhs.items()})
        if self.flaw == "hides its residual":
            value = {key: 1.001 * t for key, t in solution.value.items()}
            return dataclasses.replace(solution, value=value)
        assert self.flaw == "not finite"
        return dataclasses.replace(solution, value={key: math.nan * t for key, t in solution.value.items()})


@pytest.mark.parametrize(
    ("flaw", "told"),
    [
        ("refuses", "'identity': refused a positive definite system: not today"),
        ("inaccurate", r"'identity': the relative residual is 1.0e-03, above 1e-08; status 'converged'"),
        ("hides its residual", "'identity': the reported residual is .* away from b - A x"),
        ("not finite", "'identity': the answer is not finite"),
    ],
)
def test_the_public_check_finds_a_flaw(flaw: str, told: str) -> None:
    with pytest.raises(CheckFailedError, match=told) as caught:
        check_linear_solver(Flawed(flaw), tolerance=1e-8)
    assert isinstance(caught.value, AssertionError)
