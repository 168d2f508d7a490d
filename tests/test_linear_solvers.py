"""Linear solvers × operators, both from one table; the truth is the dense matrix."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from bilevel.errors import InvalidValueError
from bilevel.operators import BLOCK, LinearOperator
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
from bilevel.solvers.linear.base import EXPLANATIONS, FATAL
from bilevel.solvers.linear.lanczos import extreme_eigenvalues
from bilevel.testing import CheckFailedError, KnownSystem, check_linear_solver, known_systems
from bilevel.vector import Vector, dot, flatten, norm, unflatten

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
DEFINITE = [name for name, system in SYSTEMS.items() if system.kind == "definite"]
ITERATIVE = ["cg", "minres", "gmres", "neumann", "quasi-newton", "cg with nystrom", "cg with pairs"]
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def run(solver: LinearSolver, name: str, start: Tensor | None = None) -> tuple[KnownSystem, LinearSolution]:
    system = SYSTEMS[name]
    from_here = None if start is None else system.vector(start)
    return system, solver.solve(system.operator, system.vector(system.rhs), from_here)


def relative(system: KnownSystem, x: Vector) -> float:
    return float((system.rhs - system.matrix @ flatten(x)).norm() / system.rhs.norm())


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
    assert neumann.status == "diverged"
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


@every_solver
def test_float32_is_solved_in_float32(solver: LinearSolver) -> None:
    system = SYSTEMS["well-conditioned"]
    low = KnownSystem("float32", system.matrix.float(), system.rhs.float())
    loose = dataclasses.replace(solver, rtol=None) if hasattr(solver, "rtol") else solver  # type: ignore[type-var]
    solution = loose.solve(low.operator, low.vector(low.rhs))
    assert solution.status == "converged"
    assert all(t.dtype == torch.float32 for t in solution.value.values())
    assert relative(system, {"x": flatten(solution.value).double()}) <= 2e-5  # asked for 1e-5; A itself is rounded


@pytest.mark.parametrize("key", ["cg", "minres", "gmres"])
def test_asking_for_more_than_the_precision_ends_and_says_so(key: str) -> None:
    system = SYSTEMS["ill-conditioned"]
    low = KnownSystem("float32", system.matrix.float(), system.rhs.float())
    solver = dataclasses.replace(SOLVERS[key], rtol=1e-14)  # type: ignore[type-var]
    solution = solver.solve(low.operator, low.vector(low.rhs))
    assert solution.status in ("max_steps", "stagnated", "nonpositive curvature")
    assert solution.relative <= 1.0


def test_dots_of_float32_are_summed_in_float64() -> None:
    # In float32, 1 + 1e-8 is 1, ten thousand times.
    a = {"big": torch.ones(1), "small": torch.full((10_000,), 1e-4)}
    expected = 1.0 + 10_000 * float(torch.tensor(1e-4)) ** 2
    assert float(dot(a, a)) == pytest.approx(expected, rel=1e-15)
    assert float(norm(a)) == pytest.approx(math.sqrt(expected), rel=1e-15)


@pytest.mark.parametrize("key", ["cg", "minres", "gmres"])
@pytest.mark.parametrize("name", ["well-conditioned", "ill-conditioned", "two eigenvalues"])
def test_the_smallest_ritz_value_is_the_smallest_eigenvalue_at_the_end(key: str, name: str) -> None:
    system, solution = run(SOLVERS[key], name)
    lowest = float(torch.linalg.eigvalsh(system.matrix)[0])
    # At the end of a Krylov space its Ritz values are eigenvalues; the ill-conditioned one is found to 1e-9.
    assert solution.curvature == pytest.approx(lowest, rel=1e-8)


@pytest.mark.parametrize("steps", [1, 3, 6])
@pytest.mark.parametrize("key", ["cg", "minres", "gmres"])
def test_the_smallest_ritz_value_bounds_the_eigenvalue_from_above(key: str, steps: int) -> None:
    system, solution = run(dataclasses.replace(SOLVERS[key], max_steps=steps), "well-conditioned")  # type: ignore[type-var]
    # The Krylov space by Arnoldi with full orthogonality, and its Ritz values.
    basis = torch.linalg.qr(
        torch.stack([torch.linalg.matrix_power(system.matrix, k) @ system.rhs for k in range(steps)], dim=1)
    ).Q
    ritz = float(torch.linalg.eigvalsh(basis.T @ system.matrix @ basis)[0])
    lowest = float(torch.linalg.eigvalsh(system.matrix)[0])
    assert solution.curvature is not None and solution.curvature >= lowest
    assert solution.curvature == pytest.approx(ritz, rel=1e-8)


def test_neumann_with_enough_terms_follows_its_series() -> None:
    system = SYSTEMS["well-conditioned"]
    step, terms = 0.04, 25
    solution = Neumann(max_steps=terms, rtol=0.0, step_size=step).solve(system.operator, system.vector(system.rhs))
    shrink = torch.eye(12, dtype=torch.float64) - step * system.matrix
    expected = step * sum(torch.linalg.matrix_power(shrink, k) @ system.rhs for k in range(terms))
    assert float((flatten(solution.value) - expected).norm() / expected.norm()) <= 1e-14
    assert (solution.steps, solution.status) == (terms, "max_steps")


def test_a_neumann_step_that_is_too_long_is_found_out() -> None:
    system = SYSTEMS["well-conditioned"]  # largest eigenvalue 20: the series converges below 2 / 20
    solution = Neumann(max_steps=1000, step_size=0.11).solve(system.operator, system.vector(system.rhs))
    assert solution.status == "diverged"
    assert solution.relative <= 1.0
    ends = Neumann(max_steps=10_000, step_size=0.099).solve(system.operator, system.vector(system.rhs))
    assert ends.status == "converged"


@pytest.mark.parametrize("steps", [1, 2, 5, 12, 40])
@pytest.mark.parametrize("name", ["well-conditioned", "ill-conditioned", "indefinite", "times 1e-12", "identity"])
def test_lanczos_finds_the_ends_of_a_small_spectrum(name: str, steps: int) -> None:
    system = SYSTEMS[name]
    low, high = extreme_eigenvalues(system.operator, steps)
    values = torch.linalg.eigvalsh(system.matrix)
    rounding = 1e-13 * float(values.abs().max())
    assert float(values[0]) - rounding <= low <= float(values[-1]) + rounding, "a Ritz value lies in the spectrum"
    if steps >= 5:  # after one or two steps the random start may still hide the largest eigenvalue
        assert float(values[-1]) - rounding <= high <= 1.2 * float(values[-1])
    if steps >= 12:
        assert low == pytest.approx(float(values[0]), rel=1e-6, abs=rounding)
        assert high == pytest.approx(float(values[-1]), rel=1e-10)


@pytest.mark.parametrize("gap", [0.0, 0.05, 0.4, 0.9], ids=lambda gap: f"gap {gap}")
def test_twelve_lanczos_steps_find_the_largest_of_many_eigenvalues(gap: float) -> None:
    ramp = torch.linspace(0.0, 1.0 - gap, 10_000, dtype=torch.float64)
    ramp[-1] = 1.0
    operator = LinearOperator(lambda v: {"w": ramp * v["w"]}, {"w": torch.zeros_like(ramp)}, symmetric=True)
    _, high = extreme_eigenvalues(operator)
    # A Neumann series needs it to a factor of 2; it was within 2 % on every spectrum tried.
    assert high == pytest.approx(1.0, abs=0.05)


def test_lanczos_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    extreme_eigenvalues(SYSTEMS["identity"].operator)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["well-conditioned", "indefinite", "non-symmetric", "one unknown"])
def test_dense_is_the_matrix(name: str) -> None:
    system = SYSTEMS[name]
    assert torch.equal(system.operator.dense(), system.matrix)
    shifted = system.operator.shifted(0.5).dense()
    assert torch.allclose(shifted, system.matrix + 0.5 * torch.eye(len(system.rhs)), rtol=0.0, atol=1e-15)


def test_dense_is_formed_in_blocks_by_the_batched_product() -> None:
    n = BLOCK + 3
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    like = {"a": torch.zeros((), dtype=torch.float64), "b": torch.zeros(n - 1, dtype=torch.float64)}
    counts: list[int] = []

    def many(v: Vector) -> Vector:
        counts.append(len(v["a"]))
        rows = torch.cat([v["a"][:, None], v["b"]], dim=1) @ matrix.T
        return {"a": rows[:, 0], "b": rows[:, 1:]}

    operator = LinearOperator(lambda v: unflatten(matrix @ flatten(v), like), like, symmetric=False, matvecs=many)
    assert torch.equal(operator.dense(), matrix)
    assert counts == [BLOCK, 3]
    assert torch.allclose(operator.shifted(2.0).dense(), matrix + 2.0 * torch.eye(n, dtype=torch.float64), rtol=1e-15)


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
